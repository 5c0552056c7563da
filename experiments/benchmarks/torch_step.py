# lightly-train is in an environment of its own.
# pyright: reportMissingImports=false
"""The peers of step.py: a DINOv2 training step in PyTorch, served over a pipe.

    PYTHON torch_step.py (torch-reference|lightly-train) INPUT.npz THREADS [DEVICE]

Runs in an environment of its own (torch and numpy, or lightly-train) and imports of
this project only tests/torch_reference.py, which needs no more. INPUT.npz is what
step.py writes: the student's state dict in facebookresearch/dinov2's names, one batch
of normalised crops with its masks, and the schedules' values. Each line 'step' on stdin
runs one step; the answer is one JSON line. DEVICE is 'cpu', 'cuda' or 'auto'; on CUDA
networks and losses run under bfloat16 autocast, and the peak is that of the GPU.
"""

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.torch_reference import Reference, split


class Lightly:
    """lightly-train 0.18's DINOv2 on the same tensors, without its trainer.

    Its own model, losses, optimiser groups, clipping value and EMA; random weights. The
    masks are handed in, so that it works on as many patches as the others.
    """

    def __init__(self, state: dict, heads: int, *, drop_path: float, half: bool):
        from lightly_train._methods.dinov2 import dinov2
        from lightly_train._models.dinov2_vit.dinov2_vit import DINOv2ViTModelWrapper
        from lightly_train._models.dinov2_vit.dinov2_vit_src.models import (
            vision_transformer,
        )
        from lightly_train._models.embedding_model import EmbeddingModel

        dim, channels, patch, _ = state["backbone.patch_embed.proj.weight"].shape
        build = {384: vision_transformer.vit_small, 768: vision_transformer.vit_base}
        side = patch * round((state["backbone.pos_embed"].shape[1] - 1) ** 0.5)
        vit = build[dim](
            patch_size=patch,
            num_register_tokens=state["backbone.register_tokens"].shape[1],
            img_size=side,
            init_values=1e-5,
            block_chunks=0,
            in_chans=channels,
        )
        k, bottleneck = state["dino_head.last_layer.weight_v"].shape
        hidden = len(state["dino_head.mlp.0.weight"])
        arguments = dinov2.DINOv2Args(
            hidden_dim=hidden,
            dino_bottleneck_dim=bottleneck,
            ibot_bottleneck_dim=bottleneck,
            output_dim=k,
            weight_decay_start=0.04,
        )
        self.method = dinov2.DINOv2(
            method_args=arguments,
            optimizer_args=dinov2.DINOv2AdamWViTArgs(),
            embedding_model=EmbeddingModel(DINOv2ViTModelWrapper(vit)),
            global_batch_size=4,
            num_input_channels=channels,
        )
        self.module, self.half = dinov2, half
        self.device = state["backbone.cls_token"].device
        self.method.to(self.device)
        run = SimpleNamespace(
            global_step=2000, estimated_stepping_batches=125_000, max_epochs=100
        )
        dinov2.DINOv2.trainer = property(lambda _: run)
        (self.optimizer,), _ = self.method.configure_optimizers()

    def step(self, batch, hyper: dict) -> dict:
        """One training step; hyper is not read, the schedules are its own."""
        del hyper
        method = self.method
        b = len(batch["global_crops"]) // 2
        views = [*batch["global_crops"].split(b), *batch["local_crops"].split(b)]
        self.module.create_collated_masks = lambda **_: {
            "collated_masks": batch["masks"],
            "mask_indices_list": batch["mask_indices"],
            "masks_weight": batch["mask_weights"],
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            result = method.training_step_impl({"views": views}, 0)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        nn.utils.clip_grad_norm_(
            [p for g in self.optimizer.param_groups for p in g["params"]],
            method.method_args.gradient_clip_val,
        )
        method.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        momentum = method.method_args.momentum_start
        for name in ("embedding_model", "head"):
            parts = (getattr(method, f"{who}_{name}") for who in ("student", "teacher"))
            self.module.update_momentum(*parts, m=momentum)
        return {"total": result.loss.item()}


def main() -> None:
    """Build the peer, say 'ready', then one step per line until the pipe closes."""
    kind, path, threads, *where = sys.argv[1:]
    torch.set_num_threads(int(threads))
    device = where[0] if where else "cpu"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with np.load(path) as arrays:
        tensors = {k: torch.from_numpy(arrays[k]).to(device) for k in arrays.files}
    batch, hyper = split(tensors, "batch/"), split(tensors, "hyper/")
    hyper = {k: float(v) for k, v in hyper.items()}
    make = {"torch-reference": Reference, "lightly-train": Lightly}[kind]
    torch.manual_seed(0)
    options = {"drop_path": float(tensors["drop_path"]), "half": device == "cuda"}
    peer = make(split(tensors, "student/"), int(tensors["heads"]), **options)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device == "cuda":
        versions["device"] = torch.cuda.get_device_name()
    print(json.dumps(versions), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        terms = peer.step(batch, hyper)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e9
        answer = {"seconds": seconds, "terms": terms, "peak_gb": peak}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
