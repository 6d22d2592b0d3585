"""The verification of videos, shared by all processes that verify the same data folder at the same time.

The processes may be ranks of a run, or commands on several machines with a common cache folder. They communicate by
files next to the cache file, in the folder NAME.parts:

    dclr-lock.json  the lock (dclr/lock.py) of a process that chooses videos or merges
    ID.claim        the videos that a process verifies now, and those whose findings it has not saved. It is locked,
                    and its time changes every few seconds, as long as the process runs
    ID.npz          the findings of a process

A claim is not a lock of dclr/lock.py, which another process may have to watch for a minute before it knows whether the
owner runs. Whether a claim counts is decided at once: if the decision is wrong, a video is decoded twice.

Each process takes the next videos that no other process has taken, so no video is decoded twice. At its end it merges
all findings into the cache file. Findings of a killed process are merged by the next process that verifies.
"""

import fcntl
import os
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np

from dclr.data.decode import UnreadableVideo, verify_video
from dclr.data.decoder_process import DecoderDied, answers, report_video
from dclr.data.file_content import digest_of_ends
from dclr.data.findings import (
    Finding,
    Stamp,
    VerifiedFile,
    collect_findings,
    load_findings,
    merge_findings,
    save_findings,
)
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError
from dclr.lock import folder_lock, machine_id
from dclr.progress import ProgressBar

TAKEN = 64
"""Most videos that a process takes at once for each of its workers."""

SAVE_EVERY = 60.0
"""Seconds between two saves of a process's findings, so that a crash after hours loses a minute."""

REFRESH = 5.0
"""Seconds between two changes of a claim's time."""

SILENCE = 60.0
"""Seconds without such a change after which a process on another machine counts as gone."""

POLL = 0.2
"""Seconds between two looks at what other processes have finished, if they have taken all that is left."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that schedulers and terminals send before they end a process."""


def verify_files(
    cache: Path, root: Path, todo: Mapping[str, Stamp], workers: int, timeout: float, progress: bool
) -> dict[str, str]:
    """Verify the videos `root / path` of `todo` in `workers` decoder processes, together with other processes.

    The findings are in the cache file `cache` at the end, also if the work is interrupted, by Ctrl-C or by a signal of
    `_SIGNALS`. The signal then ends this process as it would without this function.

    Returns:
        path -> reason, of the videos on which a decoder process died. They are not in the cache, because the machine
        may have caused it.

    Raises:
        UserError: the cache cannot be written, or there is too little memory.
    """
    died: dict[str, str] = {}
    with (
        _recorded_signals() as received,
        _SharedWork(cache, todo) as work,
        ProgressBar(len(todo), "verifying videos", "video", shown=progress) as bar,
    ):

        def tick() -> None:
            work.refresh_claim()
            bar.advance(len(todo) - len(work.waiting) - bar.count)  # also what other processes have finished
            if received:
                name = signal.Signals(received[0]).name
                print(f"stopped by {name}: the videos verified so far are not decoded again", file=sys.stderr)
                raise SystemExit(128 + received[0])

        while work.waiting:
            taken = deque(work.take(workers))
            for path, (finding, digest) in _verify(root, taken, workers, timeout, tick):
                if isinstance(finding, DecoderDied):
                    died[path] = str(finding)
                    work.give_up(path)
                else:
                    work.add(path, finding, digest)
                if len(taken) < workers:
                    taken.extend(work.take(workers))
            work.save()  # other processes may wait for these findings
            tick()
            if work.waiting:
                time.sleep(POLL)  # other processes verify the rest
    return died


# ---------------------------------------------------------------- decoding


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Record the first of `_SIGNALS` instead of ending this process, and send it again at the end.

    A signal that has a handler already, or is ignored, is not touched. Only the main thread may set handlers, so in
    another thread nothing is recorded.
    """
    received: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    recorded = [number for number in _SIGNALS if in_main_thread and signal.getsignal(number) == signal.SIG_DFL]
    for number in recorded:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number in recorded:
            signal.signal(number, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


def _verify(
    root: Path, waiting: deque[str], workers: int, timeout: float, tick: Callable[[], None]
) -> Iterator[tuple[str, tuple[Finding | DecoderDied, bytes]]]:
    """Yield (path, (finding, digest)) for each path, in the order in which they are finished.

    The caller may append to `waiting`. `tick` is called about twice a second. It may raise an exception to end this.

    Raises UserError: there is too little memory.
    """
    tried_twice = set[str]()
    try:
        for path, answer in answers(lambda path: _find(root / path), waiting, workers, timeout, tick):
            if isinstance(answer, DecoderDied) and answer.out_of_memory and path not in tried_twice:
                tried_twice.add(path)
                waiting.append(path)  # last, when the other processes may have freed their memory
            else:
                yield path, (answer, b"") if isinstance(answer, DecoderDied) else answer
    except MemoryError:
        raise UserError(f"{root}: a process that verifies videos has too little memory: lower --workers") from None


def _find(file: Path) -> tuple[Finding, bytes]:
    report_video(0)  # any number: `answers` knows the path
    try:
        return verify_video(file), digest_of_ends(file) or b""
    except UnreadableVideo as reason:
        return str(reason), b""


# ---------------------------------------------------------------- sharing the work


class _SharedWork:
    """The videos that have no finding yet, and the findings of this process.

    Attributes:
        waiting: path -> stamp, of the videos without a finding of any process.
    """

    def __init__(self, cache: Path, todo: Mapping[str, Stamp]) -> None:
        self.waiting = dict(todo)
        self._cache, self._folder = cache, cache.with_suffix(".parts")
        name = uuid.uuid4().hex
        self._part, self._claim = self._folder / f"{name}.npz", self._folder / f"{name}.claim"
        self._next, self._later = deque(todo), deque[str]()
        self._claimed: dict[str, Stamp] = {}
        self._new: list[VerifiedFile] = []
        self._own = collect_findings(())
        self._read: dict[Path, tuple[int, ...]] = {}
        self._saved = self._refreshed = time.monotonic()

    def __enter__(self) -> Self:
        """Write an empty claim, so that a folder that cannot be written is noticed before hours of verifying."""
        with self._writing(), self._lock():
            self._claim_file = self._claim.open("wb")
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._claim_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write_claim()
        return self

    def __exit__(self, *_: object) -> None:
        """Merge the findings of all processes into the cache file."""
        with self._writing(), self._lock(), self._claim_file:
            self.save()
            files = sorted(self._folder.glob("*.npz"))
            parts = [load_findings(file, warn=False) for file in (self._cache, *files)]
            if any(map(len, parts[1:])):
                save_findings(self._cache, merge_findings(parts))
            ended = [self._claim, *(claim for claim in self._other_claims() if not self._is_alive(claim))]
            alive = {claim.stem for claim in self._other_claims()} - {claim.stem for claim in ended}
            for file, part in zip(files, parts[1:], strict=True):
                if file.stem not in alive and len(part):  # a file without findings may be of another program: it stays
                    file.unlink(missing_ok=True)
            # A process that was killed while it wrote leaves a file that has no final name yet.
            unfinished = [file for file in self._folder.glob("*.tmp") if file.name.partition(".")[0] not in alive]
            for file in (*ended, *unfinished):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # other processes use the folder, or files of others are there
            self._folder.rmdir()

    def take(self, workers: int) -> list[str]:
        """Return the next videos that no process has taken, and take them; none if other processes have all the rest.

        The fewer videos are left, the fewer are taken at once, so that all processes end at almost the same time.
        """
        count = min(TAKEN * workers, max(workers, len(self.waiting) // 8))
        with self._writing(), self._lock():
            self._read_findings()
            others = self._claims_of_others()
            taken: list[str] = []
            while self._next and len(taken) < count:
                path = self._next.popleft()
                if path in self.waiting:
                    (self._later if path in others else taken).append(path)
            if not self._next:  # what others have taken may come back, if they end
                self._next, self._later = self._later, deque()
            if taken:
                self._claimed |= {path: self.waiting[path] for path in taken}
                self._write_claim()
        return taken

    def add(self, path: str, finding: Finding, digest: bytes) -> None:
        """Add a finding of this process."""
        self.waiting.pop(path, None)
        self._new.append(VerifiedFile(path=path, stamp=self._claimed[path], finding=finding, digest=digest))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def give_up(self, path: str) -> None:
        """Count a video as finished although there is no finding about it."""
        self.waiting.pop(path, None)
        self._claimed.pop(path, None)

    def refresh_claim(self) -> None:
        """Show the other processes that this one runs. Call this at least every few seconds."""
        if time.monotonic() - self._refreshed > REFRESH:
            with suppress(OSError):
                os.utime(self._claim)
            self._refreshed = time.monotonic()

    def save(self) -> None:
        """Write the findings of this process that are not written yet."""
        self._saved = time.monotonic()
        if not self._new:
            return
        with self._writing():
            self._own = merge_findings([self._own, collect_findings(self._new)])
            save_findings(self._part, self._own)
        for file in self._new:
            self._claimed.pop(file.path, None)
        self._new = []

    def _write_claim(self) -> None:
        """Write the machine of this process and the videos that it has taken."""
        self._claim_file.seek(0)
        self._claim_file.truncate()
        self._claim_file.write(pack_strings([machine_id(), *self._claimed]).tobytes())
        self._claim_file.flush()

    def _read_findings(self) -> None:
        """Look which videos other processes have finished since the last look."""
        for file in (self._cache, *self._folder.glob("*.npz")):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if file == self._part or self._read.get(file) == version:
                continue
            self._read[file] = version
            found = load_findings(file, warn=file != self._cache)
            for path, stamp in zip(unpack_strings(found.paths), found.stamps.tolist(), strict=True):
                if self.waiting.get(path) == tuple(stamp) and path not in self._claimed:
                    del self.waiting[path]

    def _other_claims(self) -> list[Path]:
        return [claim for claim in self._folder.glob("*.claim") if claim != self._claim]

    def _claims_of_others(self) -> set[str]:
        """Return the videos that other running processes have taken."""
        taken = set[str]()
        for claim in self._other_claims():
            with suppress(FileNotFoundError):
                if self._is_alive(claim):
                    taken.update(_read_claim(claim)[1:])
        return taken

    def _is_alive(self, claim: Path) -> bool:
        """Return whether the process that wrote a claim still runs, and is not silent."""
        with suppress(FileNotFoundError), claim.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                pass
            else:
                if _read_claim(claim)[:1] == [machine_id()]:
                    return False
            # The file system may not know of locks, or of those of other machines. Both times are the file system's.
            os.utime(self._claim)
            return self._claim.stat().st_mtime - claim.stat().st_mtime < SILENCE
        return False

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Let no other process choose videos or merge. The folder exists inside the context."""
        with ExitStack() as stack:
            while True:
                self._folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has just deleted the folder
                    stack.enter_context(folder_lock(self._folder, wait=True))
                    break
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise UserError in place of OSError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the list of verified videos to {self._cache.parent} ({error.strerror}); "
                "set $XDG_CACHE_HOME to a folder that can be written"
            ) from error


def _read_claim(claim: Path) -> list[str]:
    """Return the machine of the process that wrote a claim, and its videos."""
    return unpack_strings(np.frombuffer(claim.read_bytes(), np.uint8))
