"""Requests to stop a run: SIGTERM and SIGUSR1, which schedulers send before they take a machine away, and Ctrl-C."""

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

STATUS = 75
"""Exit status of a run that was asked to stop and has written a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""


class Stopped(Exception):
    """The run was asked to stop and has written a checkpoint. The message says how to continue it."""


class StopRequest:
    """Record the signals while the context is active. The loop reads `asked` after every step.

    Further signals change nothing. One Ctrl-C under a launcher arrives several times: from the terminal and from the
    launcher.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
