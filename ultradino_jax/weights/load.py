"""Any public or own checkpoint -> `backbone.Backbone`.

Read are: this project's runs, backbones and exports; DINOv2 with and without registers
in Meta's, Hugging Face's and timm's naming; iBOT; USFM; UltraDINO's teacher and model
files. The family is told from the tensor names. Every tensor is placed, or named in
`Backbone.source` as left out on purpose; a file that does not fit whole is refused.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat

from ultradino_jax.backbone import Backbone, load_backbone
from ultradino_jax.errors import UserError
from ultradino_jax.models.pos_embed import interpolate_pos_embed
from ultradino_jax.models.usfm import USFM, resize_table
from ultradino_jax.models.vit import VARIANTS
from ultradino_jax.weights.families import backbone_from_tensors
from ultradino_jax.weights.files import read_weights


def load_backbone_file(
    path: str | Path,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Backbone:
    """Read a checkpoint of any known kind.

    path: a .pth/.pt/.bin/.ckpt/.safetensors file, a Hugging Face folder, an export or a
    run of this project. arch: 'tiny', 'small', 'base' or 'large', checked against the
    file (None trusts it). image_size: side in pixels the model is to be used at, None
    for the native one; see `with_image_size`. channels: C wanted, None for the file's;
    see `with_channels`.

    Raises FileNotFoundError, ImportError (torch is missing for a pickle) or UserError
    with one line that names the file and what is wrong: the missing and the unexpected
    tensors of a partial fit, wrong shapes, another architecture, a damaged file.
    """
    path = Path(path)
    if arch is not None and arch not in VARIANTS:
        raise UserError(
            f"unknown ViT variant {arch!r}; choose one of {', '.join(VARIANTS)}"
        )
    if any((folder / "params").is_dir() for folder in (path, path / "backbone")):
        backbone = load_backbone(path)
    else:
        file = read_weights(path)
        try:
            backbone = backbone_from_tensors(file, arch=arch, source=str(path))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    found = (backbone.model.embed_dim, backbone.model.depth)
    if arch is not None and found != VARIANTS[arch][:2]:
        width, depth = VARIANTS[arch][:2]
        raise UserError(
            f"{path}: not a {arch!r} model: it is {found[0]} wide with {found[1]} "
            f"blocks, {arch!r} is {width} wide with {depth}"
        )
    backbone = with_channels(backbone, channels or backbone.channels)
    return with_image_size(backbone, image_size or backbone.image_size)


def with_channels(backbone: Backbone, channels: int) -> Backbone:
    """The same backbone for another number of input channels.

    3 -> 1 sums the patch kernel over the colours: the result equals that of three equal
    channels. 1 -> 3 repeats it divided by three, which changes nothing for grey input.
    mean and std are averaged or repeated. Raises UserError for another conversion.
    """
    have = backbone.channels
    if have == channels:
        return backbone
    p = backbone.model.patch_size
    kernel = backbone.params["patch_embed"]["kernel"]
    kernel = rearrange(kernel, "(p q c) d -> p q c d", p=p, q=p)
    statistics = (backbone.mean, backbone.std)
    if (have, channels) == (3, 1):
        kernel = reduce(kernel, "p q c d -> p q 1 d", "sum")
        mean, std = ((sum(values) / 3,) for values in statistics)
    elif (have, channels) == (1, 3):
        kernel = repeat(kernel, "p q 1 d -> p q c d", c=3) / 3
        mean, std = (values * 3 for values in statistics)
    else:
        raise UserError(
            f"{backbone.name}: cannot turn {have} input channels into {channels}; "
            "3 to 1 and 1 to 3 are possible"
        )
    kernel = rearrange(kernel, "p q c d -> (p q c) d")
    embed = {**backbone.params["patch_embed"], "kernel": kernel}
    params = {**backbone.params, "patch_embed": embed}
    return dataclasses.replace(
        backbone, params=params, channels=channels, mean=mean, std=std
    )


def with_image_size(backbone: Backbone, image_size: int) -> Backbone:
    """The same backbone with positions resized once to `image_size` pixels.

    At that size the result equals what the model's own interpolation gives: bicubic,
    with the flags of the library the weights come from (DINOv2 without registers:
    offset 0.1; with registers: antialiased; USFM: its bias tables). Raises UserError
    when the size is not a multiple of the patch size.
    """
    model, params = backbone.model, backbone.params
    p = model.patch_size
    if image_size <= 0 or image_size % p:
        raise UserError(
            f"{backbone.name}: image size {image_size} is not a multiple of the patch "
            f"size {p}"
        )
    window, grid = 2 * (model.image_size // p,), 2 * (image_size // p,)
    if window != grid and isinstance(model, USFM):
        blocks = params["blocks"]
        tables = jnp.asarray(blocks["attn"]["rel_pos_table"])
        tables = jax.vmap(lambda table: resize_table(table, window, grid))(tables)
        attn = {**blocks["attn"], "rel_pos_table": tables}
        params = {**params, "blocks": {**blocks, "attn": attn}}
    elif window != grid:
        pos_embed = interpolate_pos_embed(
            params["pos_embed"],
            grid,
            offset=model.pos_offset,
            antialias=model.pos_antialias,
        )
        params = {**params, "pos_embed": pos_embed}
    return dataclasses.replace(
        backbone,
        model=model.clone(image_size=image_size),
        params=params,
        image_size=image_size,
    )
