"""Batches for the loop: from the pipeline to the devices, whatever its workers do."""

import contextlib
import dataclasses
import gc
import multiprocessing.resource_tracker
import signal
import sys

import jax

from ultradino_jax.data.pipeline import build_pipeline
from ultradino_jax.run.bad_steps import BadRecords
from ultradino_jax.run.meter import Meter
from ultradino_jax.run.plan import Plan
from ultradino_jax.run.stops import RunStopped, Signals

MAX_RESTARTS = 3
# What Grain says of a worker process that is gone.
WORKER_DIED = "terminated unexpectedly"


def pipeline(plan: Plan, start_step: int, num_steps: int):
    """The input stream of this process from `start_step` on."""
    return build_pipeline(
        plan.source,
        plan.crops,
        **dataclasses.asdict(plan.feed),
        start_step=start_step,
        num_steps=num_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


@contextlib.contextmanager
def signals_kept_from_children():
    """Worker processes started inside never see Ctrl-C or the pre-emption signal.

    Both go to every process of a group or job; the workers must live while the state
    is saved. A blocked signal stays blocked in children and is delivered here later.
    """
    # The tracker's start unblocks SIGINT, so it must be running already.
    multiprocessing.resource_tracker.ensure_running()
    blocked = {signal.SIGINT, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Feed:
    """feed(step) -> (batch on the devices, its source records, its host arrays).

    Steps must come in order from `start`. A worker that dies is replaced by reading on
    from the step that was asked for, which gives the same batches; after MAX_RESTARTS
    the run stops.
    """

    def __init__(
        self, plan: Plan, start: int, *, sharding, meter: Meter, bad: BadRecords, say
    ):
        self.plan, self.sharding = plan, sharding
        self.meter, self.bad, self.say = meter, bad, say
        self.restarts = 0
        self._open(start)

    def _open(self, step):
        self.stream = pipeline(self.plan, step, self.plan.total_steps - step)
        self.fresh = True

    def __call__(self, step: int, signals: Signals):
        """Raises Interrupted on a signal, RunStopped when there is no batch to have."""
        with self.meter.waiting():
            batch = dict(self._next(step, signals))
        index, rejected = batch.pop("index"), batch.pop("bad")
        self.bad.check(rejected)
        place = jax.make_array_from_process_local_data
        arrays = {k: place(self.sharding, v) for k, v in batch.items()}
        return arrays, index, batch

    def _next(self, step, signals):
        while True:
            try:
                if self.fresh and self.plan.feed.num_workers:
                    with signals_kept_from_children():
                        batch = next(self.stream)
                else:
                    with signals.waiting():
                        batch = next(self.stream)
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or ["no batch"])[-1]
                if WORKER_DIED not in reason:
                    raise RunStopped(reason) from error
                self._restart(step, signals, error)
            else:
                self.fresh = False
                return batch

    def _restart(self, step, signals, error):
        with signals.waiting():  # the signal that killed the worker came here too
            pass
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise RunStopped(
                f"a data worker died {self.restarts} times, the last at step {step}; "
                "the usual cause is memory: fewer data.workers, data.threads or "
                "data.prefetch need less"
            ) from error
        self.say(f"a data worker died at step {step}; reading on from there")
        self.close()
        self._open(step)

    def close(self) -> None:
        """Stop the workers and give back the memory that is shared with them."""
        self.stream.close()
        del self.stream  # with what it has read ahead
        free_shared_memory()


def free_shared_memory() -> None:
    """Free what nothing refers to any more: at exit it would be reported as leaked.

    JAX lets go of host arrays at its next call or collection, and there may be none;
    Grain frees them in a thread that the end of the program does not wait for.
    """
    gc.collect()
    # Grain has no name for it that it promises to keep: without it, a warning at most.
    module = sys.modules.get("grain._src.python.ipc.shared_memory_array")
    arrays = getattr(module, "SharedMemoryArray", None)
    if thread := getattr(arrays, "_del_thread_pool", None):
        thread.apply(int)  # one thread: when this is done, so is all before
