import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ultradino_jax.run.program import keep_programs

FOLDER = "jax_compilation_cache_dir"
LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def settings():
    """JAX's own, put back afterwards."""
    before = {name: getattr(jax.config, name) for name in (FOLDER, LEAST)}
    jax.config.update(LEAST, 0.0)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_in_a_folder_and_found_again(tmp_path, settings):
    folder = tmp_path / "programs"
    keep_programs(str(folder))

    def made():
        jax.jit(lambda x: jnp.cos(x) * 3).lower(jnp.ones(5)).compile()
        return sorted(path.name for path in folder.glob("*-cache"))

    first = made()
    assert first
    jax.clear_caches()
    assert made() == first


def test_the_users_folder_is_for_gpus_and_gives_way(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(FOLDER, None)
    keep_programs("auto")
    assert getattr(jax.config, FOLDER) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    keep_programs("auto")
    assert getattr(jax.config, FOLDER) == str(tmp_path / "ultradino_jax" / "programs")
    jax.config.update(FOLDER, "set/by/JAX_COMPILATION_CACHE_DIR")
    keep_programs("auto")
    assert getattr(jax.config, FOLDER) == "set/by/JAX_COMPILATION_CACHE_DIR"
    keep_programs("")
    assert getattr(jax.config, FOLDER) is None
