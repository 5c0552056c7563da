"""A run without its mathematics: hardly anything is compiled, all else is the real one.

A step adds the brightness of its batch to the teacher, which
metrics and probe show, so that a wrong resume is seen.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.health import checkups
from ultradino_jax.run import loop, program, workdir
from ultradino_jax.run.bad_steps import skip_not_finite

METRICS = (
    "total",
    "dino_local",
    "dino_global",
    "koleo",
    "ibot",
    "teacher_entropy",
    "marginal_entropy",
)

# Shapes of parameters and of a whole state, by the networks.
SHAPES = {}


def small(config):
    """The config with a network whose checkpoints are written at once."""
    config.model.embed_dim, config.model.depth, config.model.num_heads = 64, 1, 1
    return config


def rows(path) -> list[dict]:
    """The rows of a file of JSON lines, all of which must be whole."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@jax.jit
def step(state, batch):
    """What the train step returns, without its work."""
    bright = batch["global_crops"].mean() / 255
    teacher = jax.tree.map(lambda x: x + bright, state.teacher)
    value = state.step / 10 + jax.tree.leaves(teacher)[0].mean()
    new = state.replace(step=state.step + 1, teacher=teacher)
    return new, dict.fromkeys(METRICS, value)


def nan_at(*steps):
    """`step` whose iBOT loss is not finite, and its teacher neither, in these steps."""

    @jax.jit
    def poisoned(state, batch):
        new, metrics = step(state, batch)
        nan = jnp.where(jnp.isin(state.step, jnp.array(steps)), jnp.nan, 0.0)
        teacher = jax.tree.map(lambda x: x + nan, new.teacher)
        return new.replace(teacher=teacher), {**metrics, "ibot": metrics["ibot"] + nan}

    return poisoned


def fill(x):
    """An array that does not compress, as weights do not; counters are 0."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.sin(1.7 * jnp.arange(x.size, dtype=x.dtype) ** 2).reshape(x.shape)


class Probe:
    """Health that is a function of the teacher; always an alarm of duplicates."""

    def __init__(self, source, **settings):
        self.source, self.settings = source, settings

    def prepare(self, backbone):
        pass

    def panel_images(self):
        return np.zeros((4, 32, 32, 1), np.uint8)

    def __call__(self, backbone, head, head_params, center):
        mean = float(np.mean(jax.tree.leaves(backbone.params)[0]))
        zeros = dict.fromkeys(
            ("rankme_cls", "rankme_patch", "std_cls", "prototypes_used"), 0.5
        )
        return {"knn": mean / 100, **zeros, "dimensions": 16.0, "duplicates": 0.9}


def stub(patch, step=step) -> None:
    """Put the above in place, by a pytest.MonkeyPatch."""

    def once(owner, name, networks):
        """Flax is asked for the shapes of the same networks once."""
        real = getattr(owner, name)

        def shapes(*args):
            key = name, *networks(*args)
            if key not in SHAPES:
                SHAPES[key] = jax.eval_shape(lambda: real(*args))
            return SHAPES[key]

        return shapes

    shapes = once(program, "init_state", lambda *args: (args[0], args[3]))
    parameters = once(
        workdir, "_parameters", lambda plan: (plan.modules, plan.channels)
    )

    def compiled_step(plan, mesh, state):
        return skip_not_finite(step) if plan.nan.policy == "skip" else step

    patch.setattr(
        program, "init_state", lambda *args: jax.tree.map(fill, shapes(*args))
    )
    patch.setattr(workdir, "_parameters", parameters)
    patch.setattr(loop, "compiled_step", compiled_step)
    patch.setattr(loop, "executable", lambda step, arguments, say: step)
    patch.setattr(checkups, "Probe", Probe)
    picture = np.zeros((8, 8, 3), np.uint8)
    patch.setattr(checkups, "attention_panel", lambda *args: picture)
