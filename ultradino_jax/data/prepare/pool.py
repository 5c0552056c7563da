"""Runs tasks in spawned processes, in order, whatever the inputs do to them."""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

import cv2

from ultradino_jax.data.prepare.file import MemberResult, Settings, Task, run_task


def run_in_order(
    tasks: Iterable[Task],
    settings: Settings,
    workers: int,
    timeout: float,
    run=run_task,
) -> Iterator[tuple[int, MemberResult]]:
    """(entry, result) of every file and archive member, in the order of the tasks.

    The results do not depend on the number of workers. workers=0 works in this process:
    then nothing protects from a decoder that crashes or hangs. timeout: seconds for one
    file or member; past them its process is killed. A process that dies or is killed is
    replaced and the member tried once more (the machine may have been asleep or out of
    memory), then skipped. run: what the processes call.
    """
    if workers:
        yield from _Pool(settings, workers, timeout, run).run(tasks)
        return
    for task in tasks:
        yield from _run_here(task, settings)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps decoders from reporting damaged files: they quote what is in them."""
    log = logging.getLogger("pydicom")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _run_here(task: Task, settings: Settings) -> Iterator[tuple[int, MemberResult]]:
    events = []
    with _quiet():
        run_task(task, settings, lambda *event: events.append(event))
    for kind, value in events:
        if kind == "member":
            yield task.entry, value
        elif kind == "split":
            for slot in _parts(task, *value):
                yield from ((task.entry, result) for result in slot.results)
                if not slot.done:
                    yield from _run_here(slot.task, settings)


class _Slot:
    """A task's place in the order, with the results it has so far."""

    def __init__(self, task: Task):
        self.task = task
        self.results: deque[MemberResult] = deque()
        self.dispatched = self.done = False
        self.retried: int | None = None  # the member that lost its process once


def _parts(task: Task, count: int, part: int, damaged: bool) -> list[_Slot]:
    slots = [
        _Slot(task._replace(start=start, stop=min(start + part, count)))
        for start in range(task.start, count, part)
    ]
    if damaged and task.start <= count:
        slots.append(_Slot(task))
        slots[-1].done = slots[-1].dispatched = True
        slots[-1].results.append(MemberResult(count, "unreadable", "damaged archive"))
    return slots


class _Worker:
    def __init__(self, settings: Settings, timeout: float, run):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, settings, timeout, run), daemon=True
        )
        self.process.start()
        theirs.close()  # so that its death reads as end of file here
        self.slot: _Slot | None = None
        self.ready = False
        self.member = 0
        self.deadline = float("inf")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Pool:
    def __init__(self, settings: Settings, workers: int, timeout: float, run):
        self._start = lambda: _Worker(settings, timeout, run)
        self._count, self._timeout = workers, timeout
        # How far ahead of the first unfinished task others may run: bounds the memory.
        self._window = 4 * workers + 8

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, MemberResult]]:
        tasks = iter(tasks)
        self._slots: deque[_Slot] = deque()
        self._workers = [self._start() for _ in range(self._count)]
        try:
            while True:
                while len(self._slots) < self._window:
                    task = next(tasks, None)
                    if task is None:
                        break
                    self._slots.append(_Slot(task))
                if not self._slots:
                    return
                self._dispatch()
                self._wait()
                while self._slots and (self._slots[0].results or self._slots[0].done):
                    head = self._slots[0]
                    while head.results:
                        yield head.task.entry, head.results.popleft()
                    if not head.done:
                        break
                    self._slots.popleft()
        finally:
            for worker in self._workers:
                worker.kill()

    def _dispatch(self) -> None:
        idle = [w for w in self._workers if w.ready and w.slot is None]
        for slot in list(self._slots)[: self._window] if idle else ():
            if not slot.dispatched:
                worker = idle.pop()
                worker.slot, slot.dispatched = slot, True
                worker.member = slot.task.start
                worker.deadline = time.monotonic() + self._timeout
                with contextlib.suppress(OSError):  # dead: _wait will notice
                    worker.pipe.send(slot.task)
                if not idle:
                    return

    def _wait(self) -> None:
        if self._slots[0].done:
            return
        soonest = min(w.deadline for w in self._workers)
        pause = max(0.0, soonest - time.monotonic())
        by_pipe: dict[Any, _Worker] = {w.pipe: w for w in self._workers}
        for pipe in connection.wait(by_pipe, min(pause, 60.0)):
            worker = by_pipe[pipe]
            try:
                self._receive(worker, *worker.pipe.recv())
            except (EOFError, OSError):
                self._bury(worker, "worker_died")
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline <= now]:
            self._bury(worker, "timeout")

    def _receive(self, worker: _Worker, kind: str, value) -> None:
        slot = worker.slot
        worker.deadline = time.monotonic() + self._timeout
        if kind == "ready":
            worker.ready, worker.deadline = True, float("inf")
            return
        assert slot is not None  # it speaks of the task that it was sent
        if kind == "beat":
            worker.member = value
        elif kind == "member":
            slot.results.append(value)
            slot.done = value.member < 0  # the one result of a plain file
            worker.member = value.member + 1
        elif kind == "split":
            place = self._slots.index(slot)
            del self._slots[place]
            for part in reversed(_parts(slot.task, *value)):
                self._slots.insert(place, part)
        elif kind == "done":
            slot.done = True
            worker.slot, worker.deadline = None, float("inf")

    def _bury(self, worker: _Worker, reason: str) -> None:
        """Replaces a dead or late process and decides what becomes of its task."""
        if not worker.ready:
            raise RuntimeError(
                "worker processes cannot start; a script must call prepare() under "
                '`if __name__ == "__main__":`, because its processes import the script'
            )
        worker.kill()
        self._workers[self._workers.index(worker)] = self._start()
        slot = worker.slot
        if slot is None or slot.done or slot not in self._slots:
            return
        stop = slot.task.stop
        whole = stop is None
        blamed = max(worker.member, slot.task.start)
        if slot.retried == blamed:
            slot.results.append(MemberResult(-1 if whole else blamed, reason))
            slot.done = whole or blamed + 1 >= stop
            blamed += 1
        else:
            slot.retried = blamed
        if not slot.done and not whole:
            slot.task = slot.task._replace(start=blamed)
        slot.dispatched = slot.done


def _serve(pipe: connection.Connection, settings: Settings, timeout: float, run):
    """A worker process: tasks in, events out, until the pipe closes."""
    # Decoders in C print what they like, file contents included.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    cv2.setNumThreads(0)
    watch = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)

    def emit(kind: str, value) -> None:
        # Should the parent be gone, a decoder that hangs must not stay for ever.
        faulthandler.dump_traceback_later(2 * timeout + 60, exit=True, file=watch)
        pipe.send((kind, value))

    emit("ready", None)
    while True:
        faulthandler.cancel_dump_traceback_later()
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        with _quiet():
            run(task, settings, emit)
        emit("done", None)
