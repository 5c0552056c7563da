"""What the tests of weights share: one jitted forward, and folders of weights."""

import functools
import json

import jax
import jax.numpy as jnp
from einops import rearrange

from ultradino_jax.weights.files import write_safetensors


def channels_last(x):
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


@functools.partial(jax.jit, static_argnames=("model", "layers", "norm_layers"))
def _apply(model, params, images, masks, layers, norm_layers):
    return model.apply(
        {"params": params}, images, masks, layers=layers, norm_layers=norm_layers
    )


def forward(backbone, images, masks=None, layers=None, norm_layers=True):
    """Images [B,S,S,C]; equal models, shapes and layers are compiled once."""
    args = (backbone.model, backbone.params, jnp.asarray(images), masks)
    return _apply(*args, layers=layers, norm_layers=norm_layers)


def hf_folder(folder, tensors, config, **files):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def meta_of(g):
    """What a golden file says of the model it was made with."""
    return json.loads(str(g["meta"]))


def sides(size):
    """'56x84' -> (56, 84)."""
    height, width = size.split("x")
    return int(height), int(width)


class HuggingFace:
    """The golden file of transformers' DINOv2 with registers, and without."""

    def __init__(self, g, below):
        self.g, self.meta = g, meta_of(g)
        registers = below(g, "param/")
        dropped = str(g["registers/load_into_plain_unexpected"][0])
        plain = {k: v for k, v in registers.items() if k != dropped}
        self.tensors = {"registers": registers, "plain": plain}
        self.registers = {"registers": self.meta["registers"], "plain": 0}
        self.sizes = [k.removeprefix("input/") for k in g if k.startswith("input/")]
        self.native = f"{self.meta['img']}x{self.meta['img']}"
        self.config = {
            "num_hidden_layers": self.meta["layers"],
            "num_attention_heads": self.meta["heads"],
        }

    def folder(self, path, kind="registers"):
        return hf_folder(path, self.tensors[kind], self.config)

    def images(self, size=None):
        return channels_last(self.g[f"input/{size or self.native}"])
