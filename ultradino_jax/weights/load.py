"""Any public or own checkpoint -> `backbone.Backbone`.

Read are: this project's runs, backbones and exports; DINOv2 with and without registers
in Meta's, Hugging Face's and timm's naming; iBOT; USFM; UltraDINO's teacher and model
files. The family is told from the tensor names. Every tensor is placed, or named in
`Backbone.source` as left out on purpose; a file that does not fit whole is refused.
"""

import dataclasses
from pathlib import Path

from einops import rearrange, reduce, repeat

from ultradino_jax.errors import UserError
from ultradino_jax.models.vit import VARIANTS
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.families import backbone_from_tensors, family_of_model
from ultradino_jax.weights.files import read_weights
from ultradino_jax.weights.own import (
    backbone_from_flat,
    is_flat,
    own_folder,
    read_backbone,
)
from ultradino_jax.whole import named


def load_backbone(
    path: str | Path,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Backbone:
    """Read a checkpoint of any known kind: the one door to a backbone.

    path: the workdir of a run, a backbone's folder, an export, a Hugging Face folder,
    or a .pth/.pt/.bin/.ckpt/.safetensors file. arch: 'tiny', 'small', 'base' or
    'large', checked against the file. image_size: side in pixels the model is to be
    used at; see `with_image_size`. channels: C wanted; see `with_channels`. What is
    None, empty or 0 is taken from the file.

    Raises FileNotFoundError, MissingPackage (torch for a pickle) or UserError with one
    line that names the file and what is wrong: the missing and the unexpected tensors
    of a partial fit, wrong shapes, another architecture, a damaged file.
    """
    path = named(path, "checkpoint")
    if arch and arch not in VARIANTS:
        raise UserError(
            f"unknown ViT variant {arch!r}; choose one of {', '.join(VARIANTS)}"
        )
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    if own_folder(path) is not None:
        backbone = read_backbone(path)
    else:
        file = read_weights(path)
        try:
            if is_flat(file):
                backbone = backbone_from_flat(file, str(path))
            else:
                backbone = backbone_from_tensors(file, source=str(path))
        except KeyError as error:
            raise UserError(f"{path}: its record lacks {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    found = (backbone.model.embed_dim, backbone.model.depth)
    if arch and found != VARIANTS[arch][:2]:
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
    side = image_size // p
    if side != model.image_size // p:
        params = family_of_model(model).resize(model, params, (side, side))
    return dataclasses.replace(
        backbone,
        model=model.clone(image_size=image_size),
        params=params,
        image_size=image_size,
    )
