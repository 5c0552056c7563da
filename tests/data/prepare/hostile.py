"""Work that hangs or dies; a module of its own, so that processes start quickly."""

import os
import time

from ultradino_jax.data.prepare.file import MemberResult


def hostile(task, settings, emit):
    """A run_task whose inputs hang, or end its process, by name."""
    if task.name == "late":
        emit("member", MemberResult(-1))
        os._exit(1)
    if task.stop is None:
        emit("split", (4, 2, False))
        return
    for member in range(task.start, task.stop):
        emit("beat", member)
        if task.name == "hang" and member == 1:
            time.sleep(60)
        if task.name == "die" and member == 2:
            os._exit(1)
        emit("member", MemberResult(member))
