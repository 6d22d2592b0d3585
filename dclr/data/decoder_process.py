"""A decoder process: a child process that decodes videos, watched by the process that needs the frames.

So a crash of FFmpeg, or a call that never returns, costs one video and not the run.

The two processes share a few bytes: the number of the video that is being read, and a counter that rises with every
frame. A decode may take as long as it needs. The decoder process is killed only if it gives no frame for `limit`
seconds.
"""

import ctypes
import gc
import mmap
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

import numpy as np

TIMEOUT = 60.0
"""Default limit in seconds without a frame, after which a decoder process is killed. A frame takes milliseconds, a seek
on a busy network disk takes seconds."""

TICK = 0.5
"""Seconds between two checks of a busy decoder process."""

STALLED = 1000
"""Replaces the exit status of a decoder process that was killed because it gave no frame for too long."""

_PR_SET_PDEATHSIG = 1
_NO_VIDEO = -1


def shared_array(count: int, dtype: type) -> np.ndarray:
    """Return (count,) zeros in memory that this process shares with the processes it forks later."""
    return np.frombuffer(mmap.mmap(-1, max(count, 1) * np.dtype(dtype).itemsize), dtype)[:count]


class Progress:
    """The progress of a child process, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, 16)).cast("q")  # counter, number of the video
        self._cells[1] = _NO_VIDEO
        self.restart()

    def restart(self) -> None:
        """Set the idle time to zero."""
        self._seen, self._looked, self._idle = self._cells[0], time.monotonic(), 0.0

    @property
    def video(self) -> int | None:
        """The video that the child reads; None if it reads none."""
        return None if self._cells[1] == _NO_VIDEO else self._cells[1]

    def idle(self) -> float:
        """Return the seconds without progress. Call this every TICK.

        Time in which nobody called this counts as two TICKs at most. So a run that was stopped (Ctrl-Z) and continues
        does not blame its child.
        """
        now = time.monotonic()
        if self._cells[0] != self._seen:
            self._seen, self._idle = self._cells[0], 0.0
        else:
            self._idle += min(now - self._looked, 2 * TICK)
        self._looked = now
        return self._idle

    def attach(self) -> None:
        """Make `report_video` and `report_progress` of this process write here."""
        global _cells
        _cells = self._cells


_cells = memoryview(bytearray(16)).cast("q")  # of this process; nobody reads it until `Progress.attach`


def report_video(video: int | None) -> None:
    """Report that this process starts to read a video, by number; None: it has finished."""
    _cells[0] += 1
    _cells[1] = _NO_VIDEO if video is None else video


def report_progress() -> None:
    """Report that this process has made progress, such as one more frame."""
    _cells[0] += 1


def describe(status: int, limit: float) -> str:
    """Return why a video cannot be read, given how its decoder process ended.

    Args:
        status: the exit status, negative for a signal, or STALLED.
        limit: seconds without a frame after which the process was killed.
    """
    if status == STALLED:
        return f"the decoder gives no frame for {limit:g} s"
    if status < 0:
        try:
            return f"the decoder crashes on it ({signal.Signals(-status).name})"
        except ValueError:  # a real-time signal has no name
            return f"the decoder crashes on it (signal {-status})"
    return f"the decoder crashes on it (exit status {status})"


class DecoderDied(Exception):
    """A decoder process ended before it answered. The message is the one of `describe`."""

    def __init__(self, status: int, limit: float, video: int | None) -> None:
        """`status`, `limit`: as for `describe`. `video`: the video that the process was reading; None if none."""
        super().__init__(describe(status, limit))
        self.status, self.video = status, video

    @property
    def out_of_memory(self) -> bool:
        """True if the machine may have run out of memory. Linux then kills processes with SIGKILL, whatever they are
        reading."""
        return self.status == -signal.SIGKILL


class RemoteTraceback(Exception):
    """The traceback of an exception in a decoder process, set as the cause of the exception that is raised here."""


class DecoderProcess:
    """A child process that answers requests with `serve(request)`, one at a time. After it died, the next request
    starts a new one.

    Requests and answers are pickled. `serve` is not, because the child is forked. The child ends with the thread that
    forked it, so use this from a thread that lives as long as it is needed.

    Attributes:
        connection: exists after the first request. It becomes ready when there is an answer, or when the process has
            ended.
    """

    def __init__(self, serve: Callable[[Any], Any], limit: float) -> None:
        """`limit`: seconds without progress after which `end_if_stalled` kills the process."""
        self._serve, self.limit = serve, limit
        self._progress, self._pid, self._stalled = Progress(), 0, False
        self.connection: Connection[Any, Any]

    @property
    def video(self) -> int | None:
        """The video that the process reads, or was reading when it died; None if none."""
        return self._progress.video

    def request(self, request: Any) -> None:
        """Send a request. Fetch its answer with `answer` before the next request."""
        if not self._pid:
            self._start()
        self._progress.restart()
        with suppress(BrokenPipeError):  # the process died while it waited, which `answer` reports
            self.connection.send_bytes(pickle.dumps(request))

    def answer(self) -> Any:
        """Wait for the answer and return it. Raises DecoderDied, or the exception that `serve` raised."""
        while not self.connection.poll(TICK):
            # A child of the process may hold the connection open after the process has ended.
            if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                raise DecoderDied(self._reap(), self.limit, self.video)
        try:
            content = self.connection.recv_bytes()
        except (EOFError, OSError):  # OSError: in the middle of its answer
            raise DecoderDied(self._reap(), self.limit, self.video) from None
        error, text, value = pickle.loads(content)
        if error is not None:
            raise error from RemoteTraceback(f"\n{text}")
        return value

    def end_if_stalled(self) -> None:
        """Kill the process if it has made no progress for `limit` seconds. Call this every TICK while it is busy."""
        if self._progress.idle() > self.limit:
            self._stalled = True
            os.kill(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill the process if there is one."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def join(self, seconds: float) -> None:
        """Wait for the process to end, if there is one. Kill it after `seconds`, and then do not wait for its end.

        The kernel ends a killed process that reads from a network disk only when the disk answers.
        """
        deadline = time.monotonic() + seconds
        while self._pid:
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                self._pid = 0
            elif time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                self._pid = 0
            else:
                time.sleep(0.005)

    @property
    def running(self) -> bool:
        """True after the first request until the process has ended."""
        return self._pid != 0

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
        """Wait for the process to end and return its exit status, as `describe` takes it."""
        self.connection.close()
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return STALLED if self._stalled else os.waitstatus_to_exitcode(status) or 1  # 0 would mean no fault


def answers(
    serve: Callable[[Any], Any],
    requests: deque[Any],
    workers: int,
    limit: float,
    tick: Callable[[], None] = lambda: None,
    only_while_reading: bool = False,
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (request, answer) for each request, as they are finished by `workers` decoder processes.

    Each process has one request at a time, so it is known which request a process died on. The answer is then a
    DecoderDied. An exception that `serve` raises is raised here and ends all processes.

    Args:
        serve: answers a request, in a decoder process.
        requests: taken from the left until it is empty. The caller may append to it while this runs.
        limit: seconds without progress after which a busy process is killed.
        tick: called every TICK or more often.
        only_while_reading: apply `limit` only while a process reads a video. Writing may take longer than reading.
    """
    idle = [DecoderProcess(serve, limit) for _ in range(min(workers, len(requests)))]
    busy: dict[DecoderProcess, Any] = {}
    try:
        while requests or busy:
            while idle and requests:
                process, request = idle.pop(), requests.popleft()
                busy[process] = request
                process.request(request)
            ready = wait([process.connection for process in busy], TICK)
            tick()
            for process, request in list(busy.items()):
                if process.connection not in ready:
                    if process.video is not None or not only_while_reading:
                        process.end_if_stalled()
                    continue
                try:
                    answer = process.answer()
                except DecoderDied as death:
                    answer = death
                del busy[process]
                idle.append(process)
                yield request, answer
    finally:
        for process in [*idle, *busy]:
            process.stop()


def _run(serve: Callable[[Any], Any], connection: "Connection[Any, Any]", progress: Progress, parent: int) -> NoReturn:
    """Serve requests in the child process. Never returns into the code of the parent."""
    try:
        end_with_parent(parent)
        ignore_stop_signals()
        # Handlers of the parent, such as faulthandler's, would print a traceback. The parent reports the death itself.
        for fatal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
            signal.signal(fatal, signal.SIG_DFL)
        # A garbage collection writes to every object that it visits. Without this line, the first collection copied
        # 82 MB of the parent's memory.
        gc.freeze()
        progress.attach()
        while True:
            content = connection.recv_bytes()
            try:
                answer = pickle.dumps((None, "", serve(pickle.loads(content))), protocol=5)
            except BaseException as error:  # an interrupt too: the parent raises it
                answer = _pickled_error(error)
            report_video(None)
            connection.send_bytes(answer)
    except (EOFError, OSError):
        pass  # the parent has closed its end
    finally:
        os._exit(0)


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        content = pickle.dumps((error, text, None))
        pickle.loads(content)
    except Exception:  # some exceptions cannot be pickled, or not unpickled
        content = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text, None))
    return content


def end_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent `parent` ends, for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent had ended before the call
        os._exit(1)


def ignore_stop_signals() -> None:
    """Ignore the signals that a terminal or a scheduler sends to all processes of a run.

    The training process decides what to do. It may need more batches until it has saved a checkpoint.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
