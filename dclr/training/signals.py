"""Requests to stop a run: signals, and the end of its launcher.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away. Ctrl-C sends SIGINT, and a terminal that is closed
sends SIGHUP.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

from dclr.lock import start_time
from dclr.programs import name_of, running

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

STATUS = 75
"""Exit status of a run that was asked to stop and has written a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""


class Stopped(Exception):
    """The run was asked to stop and has written a checkpoint. The message says how to continue it."""


class StopRequest:
    """Record the signals while the context is active. The loop reads `asked` after every step.

    Further signals change nothing. One Ctrl-C under a launcher arrives several times: from the terminal and from the
    launcher. SIGHUP stays ignored if it was ignored before, as under nohup.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        recorded = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        self._before = {number: signal.signal(number, self._record) for number in recorded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class LauncherWatch:
    """Send SIGTERM to this process when its launcher ends, while the context is active.

    A launcher that is killed does not end its ranks. They would continue to train, unseen, next to the next run.
    Without a launcher there is nothing to watch: a run that was started from a shell outlives the shell.
    """

    INTERVAL_S = 0.2

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if launchers := find_launchers(os.getppid()):
            self._thread = threading.Thread(target=self._watch, args=(launchers,), name="launcher", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, launchers: dict[int, str]) -> None:
        while not self._stopped.wait(self.INTERVAL_S):
            for process, started in launchers.items():
                if not started or start_time(process) != started:
                    print(
                        f"{name_of(running())}: the launcher (process {process}) has ended, so the run stops",
                        file=sys.stderr,
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return


def find_launchers(parent: int) -> dict[int, str]:
    """Return the launchers above a rank whose parent is `parent`: process id -> start time (see lock.start_time).

    torchrun starts the ranks itself. deepspeed starts a second launcher on each machine, directly or over ssh, which
    starts the ranks. If the first one or its ssh connection ends, the second one continues. So both are watched.
    Open MPI's mpirun starts the ranks itself, or a helper on each other machine does. Slurm ends the tasks of srun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {parent: start_time(parent)}
    found, above = {}, parent
    while "deepspeed.launcher.launch" in _command(above):  # the second launcher, and a shell that ssh started for it
        found[above] = start_time(above)
        above = _parent(above)
    if found:
        # The system gives a process whose parent has ended to process 1.
        has_ended = above == 1 and "deepspeed" not in _command(above)
        found[above] = "" if has_ended else start_time(above)
    if not found and "OMPI_COMM_WORLD_RANK" in os.environ:  # mpirun, or its helper on another machine
        found[parent] = start_time(parent)
    return found


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0
