"""A deadline for calls that cannot be interrupted: the process ends with one line when its time is over."""

import os
import sys
import threading
import time
from collections.abc import Callable

from dclr.distributed import launched_rank
from dclr.programs import name_of, running

RANK_ZERO_FIRST = 5.0
"""Seconds that the other ranks give rank 0 to print why the run ends. A launcher kills all ranks at the first exit."""

STATUS = 1
"""Exit status of a process that ends because another rank has failed or cannot be reached."""


class Deadline:
    """A context that ends this process if it lasts too long. A thread of its own counts the time.

    Args:
        seconds: time until the end of the process, from the start or from the last `extend`.
        message: one line, printed before the process ends with `STATUS`.
    """

    def __init__(self, seconds: float, message: str) -> None:
        self._seconds, self._message = seconds, message
        self._left = threading.Event()

    def __enter__(self) -> "Deadline":
        self.extend()
        threading.Thread(target=self._wait, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def extend(self, seconds: float = 0.0) -> None:
        """Count the time from now, and allow these seconds more than usual."""
        self._end = time.monotonic() + self._seconds + seconds

    def _wait(self) -> None:
        while (remaining := self._end - time.monotonic()) > 0:
            if self._left.wait(remaining):
                return
        if launched_rank() > 0 and self._left.wait(RANK_ZERO_FIRST):
            return
        end_process(self._message, STATUS)


def end_process(message: str, status: int, last: Callable[[], None] = lambda: None) -> None:
    """Print the error, call `last`, and end this process at once, whatever its other threads do."""
    try:
        print(f"{name_of(running())}: error: {message}", file=sys.stderr, flush=True)
        last()
    finally:
        os._exit(status)
