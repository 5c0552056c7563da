"""Checkpoints to resume from, through Orbax; which of them stay.

A run keeps `workdir/checkpoints/<step>` with the train state and a JSON record of
where the data stream stands; an evaluation keeps its training the same way.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ultradino_jax.errors import (
    UserError,
    first_line,
    of_file_system,
    out_of_memory,
    user_line,
)
from ultradino_jax.sharding import wait_for_all
from ultradino_jax.whole import newest_step

ADVICE = "delete that folder to begin again"
WAITS = (1, 4, 10)  # seconds, between tries to read from a file system that failed


@jax.jit
def checksum(tree) -> jax.Array:
    """uint32 that changes with any bit of any leaf, and with nothing else.

    A wrapping sum of bits times odd position weights: exact integer arithmetic, so
    neither the order of summation nor the number of devices matters.
    """

    def leaf_sum(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    sums = [leaf_sum(x) for x in jax.tree.leaves(tree)]
    total = sum((2 * i + 1) * s for i, s in enumerate(sums))
    return jnp.asarray(total, jnp.uint32)


@dataclasses.dataclass
class Retention:
    """Which checkpoints stay: the newest `last`, every `every` steps, the best.

    every: 0 for none. best: whether the one of the highest score stays, the earliest
    of equals. scores: {step: score}, filled in while the run goes on.
    """

    last: int = 3
    every: int = 0
    best: bool = False
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def kept(self, steps: list[int]) -> list[bool]:
        """Whether each of the steps, oldest first, stays."""
        newest = set(steps[-self.last :])
        scored = [step for step in steps if step in self.scores]
        if self.best and scored:
            newest.add(max(scored, key=lambda step: (self.scores[step], -step)))
        return [
            step in newest or (self.every > 0 and step % self.every == 0)
            for step in steps
        ]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """`kept` in the shape of an Orbax preservation policy."""
        del context
        return self.kept([info.step for info in checkpoints])


class RunCheckpoints:
    """Asynchronous checkpoints of a run, newest last.

    directory: `workdir/checkpoints`. keep: which of them to hold, or how many.
    sleep(seconds): waits before a file system that failed is asked again.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | Retention = 3,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self.sleep = sleep
        self.directory = Path(directory).absolute()
        self.retention = keep if isinstance(keep, Retention) else Retention(keep)
        self._open()

    def _open(self):
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=self.retention),
            item_names=("state", "meta"),
        )

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Start writing; returns once the arrays are copied from the device."""
        if step in self.manager.all_steps():
            return
        meta = {**meta, "checksum": int(checksum(state))}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(
        self,
        abstract_state: Any,
        *,
        check: Callable[[dict], object] = lambda meta: None,
        advice: str = ADVICE,
        restart: bool = False,
        report: Callable[[str], object] = print,
    ):
        """(state, meta) of the newest checkpoint that is whole, None if there is none.

        `abstract_state` holds ShapeDtypeStructs with the shardings wanted now, which
        need not be those of the run that saved. check(meta) raises UserError for a
        checkpoint of another job, before its state is read.

        A checkpoint whose contents cannot be read, or whose checksum differs, is
        reported; the one before it is used and the damaged one goes to
        `corrupt/<step>`. Where none is usable everything stays, and a UserError with
        `advice` is raised; with `restart` all of them go to `corrupt` and None is
        returned. An error of the file system is no damage: it is waited for, then
        raised as UserError, and everything stays, too.
        """
        damaged: list[int] = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = self._read_patiently(step, abstract_state, check, report)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax raise
                if out_of_memory(error):  # that is no fault of the checkpoint
                    raise
                why = f"{type(error).__name__}: {first_line(error)}"
                report(f"checkpoint {step} is not usable ({why})")
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return found
        if damaged and not restart:
            raise UserError(
                f"none of the checkpoints in {str(self.directory)!r} is usable; "
                f"{advice}"
            )
        self._set_aside(damaged)
        return None

    def _read_patiently(self, step: int, abstract_state, check, report):
        # Processes that read together must not repeat it one by one.
        waits = WAITS if jax.process_count() == 1 else ()
        for wait in (*waits, None):
            try:
                return self._read(step, abstract_state, check)
            except UserError:
                raise
            except Exception as error:
                if not of_file_system(error):
                    raise
                line = user_line(error) or first_line(error)
                what = f"checkpoint {step} cannot be read now: {line}"
                if wait is None:
                    raise UserError(
                        f"{what}; nothing was changed, the same command goes on from "
                        f"{str(self.directory)!r} when the file system is well again"
                    ) from error
                report(f"{what}; trying again in {wait} s")
                self.sleep(wait)

    def _read(self, step: int, abstract_state, check):
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self.manager.restore(step, args=args)["meta"]
        check(meta)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self.manager.restore(step, args=args)["state"]
        if int(checksum(state)) != meta["checksum"]:
            raise ValueError("checksum differs from the one saved")
        return state, meta

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self.manager.close()
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory.parent / "corrupt" / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(target)
        wait_for_all("damaged checkpoints set aside")
        self._open()

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is complete on disk, or None."""
        return newest_step(self.directory)

    def last_good(self) -> int | None:
        """`newest`, once the save in flight is on disk or has failed."""
        with contextlib.suppress(Exception):
            self.wait()
        return self.newest()

    def wait(self) -> None:
        """Block until the save in flight is on disk; raises if it failed."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save in flight and release Orbax's threads."""
        self.manager.close()
