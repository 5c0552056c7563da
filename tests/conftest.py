"""Shared fixtures, and settings that make compiling cheap.

The suite spends its time in the compiler, on shapes that run in milliseconds. XLA's
optimisation level 0, its older way of emitting fusions and one module of machine code
per program take a fifth of the compiler's time that its defaults take; a compilation
cache makes the second run faster still.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)

import jax
import numpy as np
import pytest

from tests.sizes import below

CACHE = Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Tracing makes millions of small objects; looking through them for circles after every
# 700, as Python does, is a tenth of the time.
gc.set_threshold(100_000, 20, 20)


# Folders whose files take longest.
LONG = ("run", "pretraining", "models", "evaluators")


def pytest_collection_modifyitems(items):
    """Long files first: a process runs a whole file, the last started ends last."""

    def place(item):
        parts = item.path.relative_to(Path(__file__).parent).parts
        return LONG.index(parts[0]) if parts[0] in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A process that keeps every program it compiled needs 5 GB by the end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Runs within this process see one device: half the time to compile for eight."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            some = getattr(jax, name)
            patch.setattr(jax, name, lambda *args, some=some: some(*args)[:1])
        yield


@pytest.fixture(scope="session")
def golden():
    """Loader of the reference arrays: golden('vit') -> dict of numpy arrays."""

    def load(name):
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def sub():
    """Select a name space of a golden file."""
    return below


def _tiny_config(**changes):
    """pretrain_smoke shrunk to seconds; changes are dotted keys."""
    from configs import pretrain_smoke

    config = pretrain_smoke.get_config("seconds")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="session")
def tiny_config():
    """The function above: tiny_config(**{'data.root': ..})."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_flags():
    """The tiny config as flags of main.py."""
    return ["--config=configs/pretrain_smoke.py:seconds"]
