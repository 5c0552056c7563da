"""Makes monai_nets.npz: outputs of monai's U-Net and UNETR with weights made by name.

    python tests/golden/make_monai_nets.py

Run once by hand with monai 1.6.1 and torch 2.13.0 on a CPU; monai is not installed for
the tests. The weights are not stored: `fill` makes them again from a tensor's name.

Two of monai's choices differ from the papers and are undone here. BasicUNet does not
halve the channels in its last upsampling and has leaky ReLUs and instance norms by
default: its last `UpCat` is built like its others, with ReLU and no norm. UNETR taps
the states z4, z7 and z10 of its encoder: our network is given those taps in the test.
"""

import json
import zlib
from pathlib import Path

import numpy as np

SIDE = 64
STRIDE = 3  # of the logits that are kept
UNET = {"width": 8, "num_classes": 3}
UNETR = {"width": 4, "embed_dim": 48, "num_heads": 4, "num_classes": 3}


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform weights that depend on the name alone; every one matters in the output.

    RandomState's stream is frozen, unlike Generator's.
    """
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    x = rng.random_sample(shape) * 2 - 1
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.5 * x).astype(np.float32)
    if name.endswith("weight"):
        return (x * (6 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
    return (0.5 * x).astype(np.float32)


def images() -> np.ndarray:
    """Float32 [2,1,64,64], multiples of 1/8."""
    x = np.random.RandomState(7).standard_normal((2, 1, SIDE, SIDE))
    return (np.round(x * 8) / 8).astype(np.float32)


def monai_unet(width: int, num_classes: int, channels: int = 1):
    """BasicUNet with five levels, its last upsampling as in the paper."""
    from monai.networks.nets import BasicUNet
    from monai.networks.nets.basic_unet import UpCat

    features = (*(width * 2**k for k in range(5)), width)
    options = dict(act=("relu", {}), norm=None, bias=True)
    net = BasicUNet(2, channels, num_classes, features, **options)
    net.upcat_1 = UpCat(2, 2 * width, width, width, **options)
    return net


def monai_unetr(
    side: int, width: int, embed_dim: int, num_heads: int, num_classes: int
):
    """UNETR in two dimensions with monai's defaults but for its sizes."""
    from monai.networks.nets import UNETR as Net

    return Net(
        1,
        num_classes,
        side,
        feature_size=width,
        hidden_size=embed_dim,
        mlp_dim=4 * embed_dim,
        num_heads=num_heads,
        spatial_dims=2,
    )


def main():
    import monai
    import torch

    def count(net):
        # monai builds these norms in every block and never calls them.
        unused = "norm_cross_attn"
        return sum(p.numel() for k, p in net.named_parameters() if unused not in k)

    arrays = {
        "monai_version": np.array(monai.__version__),
        "unet/full_parameters": np.array(count(monai_unet(64, 5))),
        "unetr/full_parameters": np.array(count(monai_unetr(224, 16, 768, 12, 5))),
    }
    nets = {"unet": monai_unet(**UNET), "unetr": monai_unetr(SIDE, **UNETR)}
    for name, net in nets.items():
        net.eval()
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        state = {k: torch.from_numpy(fill(k, s)) for k, s in shapes.items()}
        net.load_state_dict(state)
        with torch.no_grad():
            logits = net(torch.from_numpy(images())).numpy()
        arrays[f"{name}/logits"] = logits[:, :, ::STRIDE, ::STRIDE]
        arrays[f"{name}/shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(Path(__file__).with_name("monai_nets.npz"), **arrays)


if __name__ == "__main__":
    main()
