"""DINOv2 pretraining and evaluation for ultrasound in JAX/Flax.

    import ultradino_jax as us
    backbone = us.load_backbone("runs/vitb")

The names below are the public face; docs/api.md has an example of each. A name is
imported when it is first used (PEP 562), so importing the package loads neither jax nor
a backend. No name is that of a submodule: `ultradino_jax.embed` is always the command's
module, `embed_images` its function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultradino_jax.data.phantom.source import PhantomSource
    from ultradino_jax.data.sources import open_source
    from ultradino_jax.embed import embed as embed_images
    from ultradino_jax.errors import UserError
    from ultradino_jax.evaluators.evaluate import evaluate
    from ultradino_jax.evaluators.features import extract_features
    from ultradino_jax.export import export as export_model
    from ultradino_jax.phantom import write_phantoms
    from ultradino_jax.prepare import prepare as prepare_cache
    from ultradino_jax.report import write_report
    from ultradino_jax.run.train import train
    from ultradino_jax.segment import segment as segment_images
    from ultradino_jax.weights.backbone import Backbone
    from ultradino_jax.weights.load import load_backbone

__all__ = [
    "Backbone",
    "PhantomSource",
    "UserError",
    "embed_images",
    "evaluate",
    "export_model",
    "extract_features",
    "load_backbone",
    "open_source",
    "prepare_cache",
    "segment_images",
    "train",
    "write_phantoms",
    "write_report",
]

# {public name: (module, its name there)}, the imports above once more for run time.
_PLACES = {
    "Backbone": ("weights.backbone", "Backbone"),
    "PhantomSource": ("data.phantom.source", "PhantomSource"),
    "UserError": ("errors", "UserError"),
    "embed_images": ("embed", "embed"),
    "evaluate": ("evaluators.evaluate", "evaluate"),
    "export_model": ("export", "export"),
    "extract_features": ("evaluators.features", "extract_features"),
    "load_backbone": ("weights.load", "load_backbone"),
    "open_source": ("data.sources", "open_source"),
    "prepare_cache": ("prepare", "prepare"),
    "segment_images": ("segment", "segment"),
    "train": ("run.train", "train"),
    "write_phantoms": ("phantom", "write_phantoms"),
    "write_report": ("report", "write_report"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _PLACES[name]
    found = getattr(import_module(f"{__name__}.{module}"), inside)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module"})
