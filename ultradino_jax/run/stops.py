"""What stops a run before its end, and how several processes agree on it."""

import contextlib
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from ultradino_jax.errors import Paused, UserError


class RunStopped(UserError):
    """The run cannot go on; the message is one line for the user."""


class RunPaused(Paused):
    """A signal ended the run after its state was saved; the message says where."""


class Interrupted(Exception):
    """Raised by a signal's handler where the main thread waits for data."""


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 as a request to save and stop.

    `received` is the name of the first one or None. A second one has its usual effect
    at once. Outside the main thread, where Python allows no handlers, nothing changes.
    interrupt_waits: whether `waiting` is cut short; not where several processes must
    take the same number of steps.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, interrupt_waits: bool = True):
        self.received: str | None = None
        self.interrupt_waits = interrupt_waits
        self._waiting = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in self.CAUGHT}

    def _handle(self, number, frame):
        del frame
        self.received = signal.Signals(number).name
        self.close()
        if self._waiting:
            raise Interrupted

    @contextlib.contextmanager
    def waiting(self):
        """A wait that a signal cuts short by raising Interrupted."""
        self._waiting = self.interrupt_waits
        try:
            if self.received and self.interrupt_waits:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def stop_agreed(signals: Signals, step: int, every: int) -> bool:
    """Whether to save and stop now; several processes agree every `every` steps.

    Not by multihost_utils.reached_preemption_sync_point: XLA's manager behind it hears
    SIGTERM alone, by a handler that ours replaces, and has no door for another notice,
    while SLURM is asked for SIGUSR1 and people press Ctrl-C.
    """
    if jax.process_count() == 1:
        return signals.received is not None
    if step % every:
        return False
    wanted = np.array(signals.received is not None)
    return bool(multihost_utils.process_allgather(wanted).any())
