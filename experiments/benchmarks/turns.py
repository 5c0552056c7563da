"""Systems in processes of their own that take turns, so that a busy machine is fair."""

import json
import os
import subprocess


def share_cores(count: int) -> None:
    """Keep this process and its children on `count` cores; before any thread pool."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


class Worker:
    """A process that says what it is in one JSON line and answers each line with one.

    An answer holds 'seconds' and 'peak_gb', and 'terms' where there are losses.
    """

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin and self.process.stdout  # both are pipes
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.about = self._answer()
        self.seconds: list[float] = []
        self.first_terms: dict[str, float] = {}
        self.peak_gb = 0.0

    def _answer(self) -> dict:
        line = self.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: {self.process.wait()}")
        return json.loads(line)

    def step(self) -> float:
        """Seconds of one step."""
        self.stdin.write("step\n")
        self.stdin.flush()
        answer = self._answer()
        self.first_terms = self.first_terms or answer.get("terms", {})
        self.peak_gb = answer["peak_gb"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self.stdin.close()
        self.process.wait()
