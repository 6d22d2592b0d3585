"""A process that decodes, watched by the one that needs the frames: a crash of FFmpeg, or a call that never returns, costs one video.

Progress lies in a few bytes that both see: which video is being read, and a number that rises with every frame. So a decode may take as
long as it likes; only one that gives nothing for `limit` seconds is ended.
"""

import ctypes
import gc
import mmap
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import numpy as np

TIMEOUT = 60.0
"""Seconds without a frame after which a decoder is ended, where nobody says otherwise. A frame takes milliseconds, a seek on a busy network
disk seconds."""

TICK = 0.5
"""Seconds between two looks at a child that is busy."""

STALLED = 1000
"""Stands for an exit status: the child gave nothing for too long, and was ended."""

_PR_SET_PDEATHSIG = 1
_NOTHING = -1  # in place of a video's number


def shared_array(count: int, dtype: type) -> np.ndarray:
    """(count,) zeros that this process and those forked later see and write together."""
    return np.frombuffer(mmap.mmap(-1, max(count, 1) * np.dtype(dtype).itemsize), dtype)[:count]


class Progress:
    """Of one process that works, for one that was its parent: what it works at, and whether it gets on."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, 16)).cast("q")  # beats, number of the video
        self._cells[1] = _NOTHING
        self.restart()

    def restart(self) -> None:
        self._seen, self._looked, self._idle = self._cells[0], time.monotonic(), 0.0

    @property
    def item(self) -> int | None:
        """What the process said last that it begins; None: nothing."""
        return None if self._cells[1] == _NOTHING else self._cells[1]

    def idle(self) -> float:
        """Seconds without a beat, as far as somebody looked: a run that was stopped (Ctrl-Z) and goes on has not waited for its child."""
        now = time.monotonic()
        if self._cells[0] != self._seen:
            self._seen, self._idle = self._cells[0], 0.0
        else:
            self._idle += min(now - self._looked, 2 * TICK)
        self._looked = now
        return self._idle

    def attach(self) -> None:
        """From now on `report_video` and `report_progress` in this process write here."""
        global _cells
        _cells = self._cells


_cells = memoryview(bytearray(16)).cast("q")  # of this process; nobody looks at it unless it is watched


def report_video(item: int | None) -> None:
    """This process begins to read video number `item`; None: it is done with it."""
    _cells[0] += 1
    _cells[1] = _NOTHING if item is None else item


def report_progress() -> None:
    """This process gets on."""
    _cells[0] += 1


def describe(status: int, limit: float) -> str:
    """Why a video cannot be read whose decoder ended with this status: negative for a signal, or STALLED."""
    if status == STALLED:
        return f"the decoder gives no frame for {limit:g} s"
    if status < 0:
        try:
            return f"the decoder crashes on it ({signal.Signals(-status).name})"
        except ValueError:  # a real-time signal has no name
            return f"the decoder crashes on it (signal {-status})"
    return f"the decoder crashes on it (exit status {status})"


class DecoderDied(Exception):
    """A child ended before its answer; the message is `describe`'s."""

    def __init__(self, status: int, limit: float) -> None:
        super().__init__(describe(status, limit))
        self.status = status

    @property
    def out_of_memory(self) -> bool:
        """Perhaps: the kernel ends a process by SIGKILL when memory is short, whatever it was reading."""
        return self.status == -signal.SIGKILL


class RemoteTraceback(Exception):
    """The cause of what is raised here for an exception in a child: where it came from there."""


class DecoderProcess:
    """`serve(request)` in a forked process, one request at a time; a new process after each that died.

    Requests and answers are pickled, `serve` is not. To be used by the thread that stays: the child ends with the thread that forked it.
    """

    def __init__(self, serve: Callable[[Any], Any], limit: float) -> None:
        """`limit`: seconds without a beat after which `end_if_stalled` ends it."""
        self._serve, self.limit = serve, limit
        self._progress, self._pid, self._stalled = Progress(), 0, False
        # There once something was asked; ready when there is an answer, or when the process has ended.
        self.connection: Connection[Any, Any]

    @property
    def item(self) -> int | None:
        """Which video it reads, or read when it died; None: none."""
        return self._progress.item

    def ask(self, request: Any) -> None:
        if not self._pid:
            self._start()
        self._progress.restart()
        with suppress(BrokenPipeError):  # it died while it waited, and `answer` says so
            self.connection.send_bytes(pickle.dumps(request))

    def answer(self) -> Any:
        """What `serve` returned; waits for it. Raises DecoderDied, and what `serve` raised."""
        try:
            content = self.connection.recv_bytes()
        except (EOFError, OSError):  # OSError: in the middle of its answer
            raise DecoderDied(self._reap(), self.limit) from None
        error, text, value = pickle.loads(content)
        if error is not None:
            raise error from RemoteTraceback(f"\n{text}")
        return value

    def end_if_stalled(self) -> None:
        """To be called every TICK while it is busy."""
        if self._progress.idle() > self.limit:
            self._stalled = True
            os.kill(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        """Whatever it is doing."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        self._progress, self._stalled = Progress(), False
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self.connection.close()
            _run(self._serve, theirs, self._progress, parent)
        theirs.close()

    def _reap(self) -> int:
        """Its exit status, as `describe` takes it."""
        self.connection.close()
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return STALLED if self._stalled else os.waitstatus_to_exitcode(status) or 1  # 0 stands for no fault


def _run(serve: Callable[[Any], Any], connection: "Connection[Any, Any]", progress: Progress, parent: int) -> NoReturn:
    """The child, which never returns into its parent's code."""
    try:
        end_with_parent(parent)
        leave_signals_to_parent()
        # DataLoader's handlers print that a worker died, which is the parent's to say.
        for fatal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
            signal.signal(fatal, signal.SIG_DFL)
        # Garbage collection writes to every object it looks at: the first one in a forked process copied 82 MB of its parent's memory.
        gc.freeze()
        progress.attach()
        while True:
            content = connection.recv_bytes()
            try:
                answer = pickle.dumps((None, "", serve(pickle.loads(content))), protocol=5)
            except BaseException as error:  # also an interrupt: it belongs to whoever asked
                answer = _raised(error)
            report_video(None)
            connection.send_bytes(answer)
    except (EOFError, OSError):
        pass  # the parent has closed its end
    finally:
        os._exit(0)


def _raised(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        content = pickle.dumps((error, text, None))
        pickle.loads(content)
    except Exception:  # not every exception can be made again from what pickle keeps of it
        content = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text, None))
    return content


def end_with_parent(parent: int) -> None:
    """The kernel ends this process when its parent, process `parent`, is gone, however that ended: nobody would read its answers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def leave_signals_to_parent() -> None:
    """A terminal's Ctrl-C and a scheduler's signals reach all processes of a run: what becomes of it is for the training process to say,
    which may need batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
