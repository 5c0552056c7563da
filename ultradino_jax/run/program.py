"""What runs on the devices: the state, the compiled step, the teacher in it."""

import contextlib
import ctypes
import dataclasses
import os
import time
from pathlib import Path

import jax

from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.data.source_digest import difference
from ultradino_jax.errors import UserError, as_user_error
from ultradino_jax.pretraining.device_crops import rendered
from ultradino_jax.pretraining.step import init_state, make_train_step
from ultradino_jax.run.bad_steps import skip_not_finite
from ultradino_jax.run.plan import Plan
from ultradino_jax.sharding import abstract_with, replicated, state_shardings
from ultradino_jax.weights.backbone import Backbone


def restore_or_init(plan: Plan, mesh, checkpoints: RunCheckpoints, say):
    """(state, step): the newest usable checkpoint, or a fresh sharded state.

    Raises UserError when the checkpoint is of other images or other groups.
    """
    key = jax.random.key(plan.feed.seed)

    # On the host: the loaded arrays sit on one device, the mesh may have more.
    weights = jax.device_get(plan.start.params) if plan.start else None

    def init(weights):  # an argument, not a constant of the compiled program
        return init_state(plan.modules, plan.optimizer, key, plan.channels, weights)

    abstract = jax.eval_shape(init, weights)
    with as_user_error():
        shardings = state_shardings(abstract, mesh)
    restored = checkpoints.restore(
        abstract_with(shardings, abstract),
        check=lambda meta: check_resumed(plan, meta),
        advice="--config.restart=True begins again at step 0, and so does an empty "
        "--workdir",
        restart=plan.loop.restart,
        report=say,
    )
    if restored is None:
        return jax.jit(init, out_shardings=shardings)(weights), 0
    state, meta = restored
    say(f"resumed from the checkpoint at step {int(meta['step'])}")
    return state, int(meta["step"])


def check_resumed(plan: Plan, meta: dict) -> None:
    """Raises UserError when a checkpoint is of other images or other groups."""
    if other := difference(meta["stream"], plan.stream, plan.source):
        raise UserError(
            f"the images are not those this run started with ({other}); give it the "
            "same ones or another --workdir"
        )
    if meta["groups"] != plan.groups:
        raise UserError(
            f"this run was trained in {meta['groups']} groups, {jax.device_count()} "
            f"devices need {plan.groups}; set config.groups or use a divisor of "
            f"{meta['groups']} devices"
        )


def compiled_step(plan: Plan, mesh, state):
    """The jitted train step; the state it is given is consumed."""
    step = make_train_step(
        plan.modules,
        plan.objective,
        plan.optimizer,
        schedules=plan.schedules,
        seed=plan.feed.seed,
        accum_steps=plan.accum_steps,
        whole=lambda params: jax.lax.with_sharding_constraint(params, replicated(mesh)),
    )
    if plan.nan.policy == "skip":
        step = skip_not_finite(step)

    def train_step(state, batch):
        # Kernels of our own share the groups of the mesh they are traced under.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, rendered(batch, plan.crops))

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )


def kept_programs() -> str | None:
    """The folder that compiled programs are kept in, or None."""
    option = "jax_compilation_cache_dir"  # which JAX adds where it starts
    return getattr(jax.config, option)


def keep_programs(wanted: str) -> None:
    """Have JAX keep compiled programs on disk for the next start.

    wanted: a folder; 'auto', which is one in the user's cache folder, for GPUs and TPUs
    (a CPU's programs need not run on another machine of the same home); '' for none.
    JAX_COMPILATION_CACHE_DIR, where set, goes before 'auto'.
    """
    if wanted == "auto":
        if kept_programs() or jax.default_backend() == "cpu":
            return
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        wanted = str(Path(caches) / "ultradino_jax" / "programs")
    jax.config.update("jax_compilation_cache_dir", wanted or None)


def executable(step, arguments, say):
    """A jitted step compiled for these arguments; says how long it took, what it needs.

    The compiler leaves up to a gigabyte of freed memory with the process, which glibc
    is told to give back before the temporaries come on top of it.
    """
    say("compiling the train step")
    start = time.monotonic()
    compiled = step.lower(*arguments).compile()
    line = f"compiled in {time.monotonic() - start:.0f} s"
    if memory := compiled.memory_analysis():
        state, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        line += f"; GB per device: state and batch {state / 1e9:.2f}"
        line += f", temporaries {rest / 1e9:.2f}"
    say(line)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return compiled


def teacher_of(plan: Plan, state, mesh) -> tuple[Backbone, dict, jax.Array]:
    """(backbone, DINO head's parameters, DINO center), gathered from their shards.

    They may be the state's own arrays, so they live until the next step.
    """
    wanted = state.teacher, state.centers["dino"]
    teacher, center = jax.device_put(wanted, replicated(mesh))
    backbone = Backbone(
        # XLA's attention shares rows over local devices by itself.
        model=plan.modules.backbone.clone(attention="xla"),
        params=teacher["backbone"],
        image_size=plan.crops.global_size,
        channels=plan.channels,
        mean=plan.objective.mean,
        std=plan.objective.std,
        name=plan.name,
    )
    return backbone, teacher["dino_head"], center


def local(backbone: Backbone, head_params, center):
    """The same values as host arrays where the devices are not all this process's.

    So that each process can work with them on its own devices.
    """
    if jax.process_count() == 1:
        return backbone, head_params, center
    params, head_params, center = jax.device_get((backbone.params, head_params, center))
    return dataclasses.replace(backbone, params=params), head_params, center
