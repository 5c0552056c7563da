"""The images of a run, as its config describes them."""

from ml_collections import ConfigDict

from ultradino_jax.data.crops import CropConfig
from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.data.sources import CacheSource, open_source
from ultradino_jax.errors import UserError
from ultradino_jax.normalization import NORMALIZATION
from ultradino_jax.run.limits import CACHE, CROP_STYLES


def normalization(name: str, source, channels: int):
    """(mean, std) by name; 'cache' takes those measured when the cache was made.

    Raises UserError for statistics of another channel count, or 'cache' with a source
    that has none.
    """
    if name == CACHE:
        if not isinstance(source, CacheSource):
            raise UserError(
                "data.normalization='cache' needs data.root to be a prepared cache"
            )
        mean, std = tuple(source.manifest["mean"]), tuple(source.manifest["std"])
    else:
        mean, std = NORMALIZATION[name]
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise UserError(
            f"data.normalization={name!r} has {len(mean)} channels, "
            f"data.channels is {channels}"
        )
    return tuple(mean), tuple(std)


def phantom_source(config: ConfigDict) -> PhantomSource:
    """The built-in phantom as the config describes it."""
    d = config.data
    return PhantomSource(
        d.phantom_images,
        tuple(d.phantom_size),
        seed=d.phantom_seed,
        channels=d.channels,
        settings=d.phantom_settings or None,
    )


def make_source(config: ConfigDict):
    """The images of a run: those of data.root, or the phantom when none is named."""
    data = config.data
    if data.root:
        list_file = data.list_file or None
        return open_source(data.root, list_file=list_file, channels=data.channels)
    if data.list_file:
        raise UserError(f"data.list_file={data.list_file!r} needs data.root")
    return phantom_source(config)


def make_crops(config: ConfigDict) -> CropConfig:
    """The multi-crop recipe: a named style with the config's changes."""
    c = config.crops
    style, flip = CROP_STYLES[c.style]
    return style(
        global_size=c.global_size,
        local_size=c.local_size,
        num_local=c.num_local,
        global_scale=tuple(c.global_scale),
        local_scale=tuple(c.local_scale),
        **{flip: c.flip_prob},
    )
