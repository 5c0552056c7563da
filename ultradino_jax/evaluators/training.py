"""The loop of every training that keeps its best state and survives an interruption.

A kind of training brings its state, its step, its batches and its validation figure.
The state is kept in `workdir/checkpoints` while it runs; the same call again goes on
from there and ends in the same numbers.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.progress import Progress
from ultradino_jax.whole import check_same

ADVICE = "choose another workdir, or delete what is there"


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: what it is, how long it lasts and where it is kept.

    name: for progress and errors; what: 'a fine-tuning', for refusals. identity: what
    tells it from every other, {'backbone': digest, .., 'settings': {name: value}};
    named: turns settings that were once recorded as a list into such a dict. metric:
    name of the validation figure, higher is better. steps: all of them;
    validate_every: steps, the last one validates, too; checkpoint_every: validations.
    """

    name: str
    what: str
    workdir: Path
    identity: dict[str, Any]
    named: Callable[[list], dict[str, Any]]
    metric: str
    steps: int
    validate_every: int
    checkpoint_every: int

    @property
    def checkpoints(self) -> Path:
        """Folder of the state while it trains."""
        return self.workdir / "checkpoints"

    def check(self, there: dict) -> None:
        """Raises UserError naming what differs when a record is of another training."""
        with damaged(self.workdir):
            if isinstance(there["settings"], list):
                there = {**there, "settings": self.named(there["settings"])}
        check_same(there, self.identity, self.workdir, self.what, ADVICE)

    def clear(self) -> None:
        """Remove the state of a training whose result is kept."""
        shutil.rmtree(self.checkpoints)


def train(
    job: Job,
    state: Any,
    *,
    best_of: Callable[[Any], Any],
    step: Callable[[Any, Any, int], tuple[Any, jax.Array]],
    batches: Callable[[int], Iterable],
    validate: Callable[[Any], float],
) -> tuple[Any, list[dict]]:
    """(best, history): what validated best, and {'step','loss',metric} each time.

    state: the initial one, on its devices. best_of(state): the part that is kept, of
    the first of equals. step(state, batch, k) -> (state, loss) may donate the state.
    batches(k): those from step k on. validate(state) -> the figure of job.metric.
    Raises UserError when the loss is not finite, or as `Job.check`.
    """
    manager = RunCheckpoints(job.checkpoints, keep=1)
    best, history = _copy(best_of(state)), []
    try:
        restored = manager.restore(
            _abstract({"state": state, "best": best}),
            check=lambda meta: job.check(meta["identity"]),
        )
        if restored is not None:
            tree, meta = restored
            state, best, history = tree["state"], tree["best"], list(meta["history"])
        done = len(history) * job.validate_every
        progress = Progress(job.name, job.steps, unit="step")
        losses = []
        for batch in batches(done):
            state, loss = step(state, batch, done)
            done += 1
            losses.append(loss)
            if len(losses) % 10 == 0:  # the host must not run far ahead of the device
                jax.block_until_ready(loss)
            progress.update(done)
            if done % job.validate_every and done != job.steps:
                continue
            mean = float(np.mean(jax.device_get(losses)))
            losses = []
            if not np.isfinite(mean):
                raise UserError(
                    f"{job.name}: the loss is not finite before step {done}"
                )
            figure = validate(state)
            if not history or figure > best_figure(job.metric, history):
                best = _copy(best_of(state))
            history.append({"step": done, "loss": mean, job.metric: figure})
            if len(history) % job.checkpoint_every == 0 and done != job.steps:
                meta = {"identity": job.identity, "history": history}
                manager.save(done, {"state": state, "best": best}, meta)
                manager.wait()  # the next step donates what is being written
        progress.close()
    finally:
        manager.close()
    return jax.device_get(best), history


def best_figure(metric: str, history: list[dict]) -> float:
    """The highest validation figure."""
    return max(row[metric] for row in history)


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
