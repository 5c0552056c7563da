"""The peer of extract.py: timm's ViT-S/16 on one ready batch, served over a pipe.

    PYTHON timm_forward.py BATCH THREADS

Needs timm; imports nothing of this project.
"""

import json
import resource
import sys
import time

import timm  # pyright: ignore[reportMissingImports]
import torch


def main() -> None:
    """One forward pass in inference mode per line on stdin."""
    batch, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    x = torch.randn(batch, 3, 224, 224)
    print(json.dumps({"timm": timm.__version__, "torch": torch.__version__}))
    sys.stdout.flush()
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.inference_mode():
            model(x)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "peak_gb": peak}), flush=True)


if __name__ == "__main__":
    main()
