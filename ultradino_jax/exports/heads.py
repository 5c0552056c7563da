"""What a training run left beside its exported backbone: facts, and the heads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ultradino_jax.errors import UserError, damaged
from ultradino_jax.jsonl import read_rows
from ultradino_jax.weights.files import read_weights
from ultradino_jax.weights.meta import dino_head_params
from ultradino_jax.whole import read_json


def find_run(checkpoint: str | Path) -> Path | None:
    """The workdir that a checkpoint path is or lies in, or None for a foreign file."""
    path = Path(checkpoint).absolute()
    for folder in (path, path.parent):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def _exported_step(run: Path) -> int | None:
    record = run / "backbone" / "backbone.json"
    return read_json(record).get("step") if record.is_file() else None


def run_facts(checkpoint: str | Path) -> dict:
    """What a model card says of the training, {} when there is no run.

    step: optimiser steps of the exported backbone; images: records of the source;
    config: the run's config; metrics: the last line logged up to that step.
    """
    run = find_run(checkpoint)
    if run is None:
        return {}
    facts: dict = {"config": read_json(run / "config.json")}
    step = facts["step"] = _exported_step(run)
    meta = run / "checkpoints" / str(step) / "meta" / "metadata"
    with damaged(run):
        if meta.is_file():
            facts["images"] = read_json(meta)["stream"]["records"]
        lines = read_rows(run / "metrics.jsonl")
        lines = [line for line in lines if step is None or line["step"] < step]
    if lines:
        facts["metrics"] = lines[-1]
    return facts


def run_heads(checkpoint: str | Path) -> dict:
    """The teacher's heads {'dino_head': params[, 'ibot_head': params]} of a run.

    They are read from the train state saved at the step of the exported backbone.
    Raises FileNotFoundError when the path is no run, or that state is no longer kept.
    """
    run = find_run(checkpoint)
    if run is None:
        raise FileNotFoundError(
            f"{str(checkpoint)!r} is not the workdir of a run: only a run has heads"
        )
    step = _exported_step(run)
    state = run / "checkpoints" / str(step) / "state"
    if not state.is_dir():
        raise FileNotFoundError(
            f"{str(run)!r} keeps no train state of step {step}, the backbone's step"
        )
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(state).item_metadata["teacher"]
        heads = {"teacher": {k: v for k, v in tree.items() if k != "backbone"}}
        to_here = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), heads)
        arguments = ocp.args.PyTreeRestore(
            heads, restore_args=to_here, partial_restore=True
        )
        return checkpointer.restore(state, args=arguments)["teacher"]


def load_heads_file(path: str | Path) -> dict:
    """{'dino_head': params[, 'ibot_head': params]} of a run or a training checkpoint.

    Raises UserError when the file holds no projection head.
    """
    if find_run(path) is not None:
        return run_heads(path)
    heads: dict[str, dict] = {}
    for name, x in read_weights(path).heads.items():
        head, _, rest = name.partition(".")
        # iBOT shares one head between its losses and calls it 'head'.
        heads.setdefault("dino_head" if head == "head" else head, {})[rest] = x
    if not heads:
        raise UserError(f"{path} holds no dino_head or ibot_head")
    try:
        params = {name: dino_head_params(state) for name, state in heads.items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return jax.tree.map(jnp.asarray, params)
