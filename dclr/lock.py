"""Lock files: only one process at a time writes to a folder, or writes a shard, on whatever machine it runs.

The operating system locks the file. It releases the lock when the process ends, for whatever reason. So a lock file
that a killed process left is no obstacle. Some file systems have no such locks, and others have locks that only the
same machine sees. So two more rules hold:

- The file names its owner. If the owner ran on this machine and has ended, the lock is free.
- The owner changes the file's time every REFRESH_S seconds. An owner on another machine counts as gone if the time does
  not change for SILENCE_S seconds. The process that wants the lock measures them by its own clock, because clocks of
  two machines differ.

An owner may have been silent although it runs: it was suspended, or its network failed. Another process may then have
taken the lock over. So an owner calls `check` before each write and stops if the file names another process.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from dclr.errors import UserError

LOCK = "dclr-lock.json"
"""Name of the lock file of a folder that a process writes to. Nothing else reads the file."""

REFRESH_S = 5.0
"""Seconds between two changes of a lock file's time by its owner."""

SILENCE_S = 60.0
"""Seconds without such a change after which an owner on another machine counts as gone."""

RELEASE_S = 2.0
"""Seconds in which the system releases the lock of a process that was killed."""

SETTLE_S = 1.0
"""Seconds in which two processes that take over the same lock at the same time have both written their names."""

POLL_S = 0.1
"""Seconds between two attempts of `folder_lock` to take a lock."""

_LENGTH = 1000
"""Bytes of a lock file. A constant length lets one write replace the owner, so nobody reads half a name."""


class FolderInUse(UserError):
    """Another process writes to the folder."""


class LockLost(UserError):
    """Another process has taken the lock over."""


_held: set["Lock"] = set()
"""The locks of this process."""


def _close_in_child() -> None:
    """Close the lock files in a forked process. Otherwise the child would hold the locks longer than its parent."""
    for lock in _held:
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """The lock file `path`, which this process can take and release. It protects the folder that it is in.

    Attributes:
        owner: what the file said about its owner when it was last read. Empty: it said nothing.
        owner_lives: whether that owner is known to be alive.
        descriptor: the open file, while this process has the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self.owner: dict[str, Any] = {}
        self.owner_lives = False
        self.descriptor = -1
        self._own: dict[str, Any] = {}
        self._began = self._since = time.monotonic()
        self._seen: tuple[dict[str, Any], int] | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ taking

    def take(self) -> bool:
        """Take the lock and return True, or return False if another process has the lock or may have it.

        It does not wait for the other process. Call it again later: then it can tell whether the owner has changed the
        file's time since the first call.

        Raises OSError: the folder does not exist or cannot be written.
        """
        self.owner, changed = _look(self.path)
        is_foreign = (
            bool(self.owner) and self.owner.get("machine") != machine_id() and not _is_earlier_start(self.owner)
        )
        if is_foreign and not self._is_silent(changed):
            return False
        descriptor, is_new = self._open()
        try:
            is_taken = self._lock(descriptor, is_new, is_foreign)
        except BaseException:
            os.close(descriptor)
            raise
        if not is_taken:
            os.close(descriptor)
            return False
        self.descriptor, self._released = descriptor, threading.Event()
        _held.add(self)
        self._thread = threading.Thread(target=self._refresh, name="lock", daemon=True)
        self._thread.start()
        return True

    def _open(self) -> tuple[int, bool]:
        """Open the file, and return whether this process has created it.

        Only one of several processes can create it, also on a network disk without locks.
        """
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self.path, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            return os.open(self.path, flags, 0o666), False

    def _lock(self, descriptor: int, is_new: bool, is_foreign: bool) -> bool:
        """Do what `take` does with the open file. `is_foreign`: its owner was on another machine and is gone."""
        self.owner = _read_owner(descriptor)
        is_locked = _lock_of_system(descriptor)
        if is_locked is False:
            # The operating system takes a moment to release the lock of a process that was killed.
            is_dying = _has_ended(self.owner) and time.monotonic() < self._began + RELEASE_S
            self.owner_lives = not is_dying
            return False
        if is_locked is None and not (is_new or is_foreign or _has_ended(self.owner)):
            if not self._is_silent(os.fstat(descriptor).st_mtime_ns):
                return False
            is_foreign = True
        if not _is_open(self.path, descriptor):  # its owner has just deleted it
            return False
        self._own = _describe_process()
        try:
            _write_owner(self.path, self._own)
        except OSError:
            if is_new:
                self.path.unlink(missing_ok=True)
            raise
        if not is_new and (is_foreign or is_locked is None):
            time.sleep(SETTLE_S)  # if two processes take the lock over at the same time, the second one keeps it
            self.owner, _ = _look(self.path)
            return self.owner == self._own
        return True

    def _is_silent(self, changed: int) -> bool:
        """Return whether the file has not changed for SILENCE_S. `changed`: the file's time in ns."""
        now, seen = time.monotonic(), (self.owner, changed)
        if self._seen != seen:
            self.owner_lives = self._seen is not None
            self._seen, self._since = seen, now
        return now - self._since >= SILENCE_S

    @property
    def silent_s(self) -> float:
        """Seconds since `take` saw the latest change by an owner that may have ended; 0 if there is no such owner."""
        return time.monotonic() - self._since if self._seen else 0.0

    def describe_owner(self) -> str:
        """Return the name of the process that has the lock."""
        if "process" not in self.owner:
            return "another process"
        return f"process {self.owner['process']} on {self.owner.get('host')}, since {self.owner.get('since')}"

    # ------------------------------------------------------------ having it

    def is_lost(self) -> bool:
        """Return whether another process has taken the lock over, or the file has been deleted.

        If the disk has failed or the whole folder has vanished, return False: the next write will tell.
        """
        try:
            self.owner, _ = _look(self.path)
        except OSError:
            return False
        return self.owner != self._own and self.folder.is_dir()

    def check(self) -> None:
        """Raise LockLost if this process does not have the lock any more."""
        if self.is_lost():
            what = (
                f"{self.folder} has been taken over by {self.describe_owner()}"
                if self.owner
                else f"{self.path} has been deleted, so another process may write to {self.folder}"
            )
            raise LockLost(f"{what}: this command stops and writes nothing more there")

    def release(self) -> None:
        """Delete the file and release the lock. A file that names another process stays."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):  # the folder has vanished, or its disk has failed
            if not self.is_lost():
                self.path.unlink()
        if self in _held:  # not in a forked process
            _held.discard(self)
            os.close(self.descriptor)

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_S):
            if self.is_lost():
                return
            with suppress(OSError):
                os.utime(self.descriptor)


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[Lock]:
    """Let only this process write to `folder` inside the context.

    Args:
        wait: wait for a process that has the lock, instead of raising FolderInUse.

    Raises:
        FolderInUse: another process writes to the folder. The message names it.
        OSError: the folder does not exist or cannot be written.
    """
    lock, has_said, began = Lock(folder / LOCK), False, time.monotonic()
    while not lock.take():
        if lock.owner_lives and not wait:
            hint = f" (if it does not run any more, delete {lock.path})" if lock.silent_s >= SILENCE_S else ""
            raise FolderInUse(
                f"{folder} is being written by {lock.describe_owner()}: wait until that process has ended, stop it, "
                f"or give another --out{hint}"
            )
        if not has_said and time.monotonic() - began > min(2 * REFRESH_S, SILENCE_S / 2):
            has_said = True
            message = f"{folder} is being written by {lock.describe_owner()}: waiting for that process"
            if not lock.owner_lives:
                message = (
                    f"{folder} was written by {lock.describe_owner()}: waiting {SILENCE_S:.0f} s to see whether it "
                    f"still runs (if it does not, delete {lock.path} to save the time)"
                )
            print(message, file=sys.stderr, flush=True)
        time.sleep(POLL_S)
    try:
        yield lock
    finally:
        lock.release()


def check_lock(folder: Path) -> None:
    """Raise LockLost if this process has locked `folder` and another process has taken the lock over.

    Call it before a write into the folder.
    """
    for lock in _held:
        if lock.folder == folder:
            lock.check()


@contextmanager
def writing_to_run(folder: Path) -> Iterator[None]:
    """Write into a run's folder in the `with` block.

    Raises UserError if the folder cannot be written, or if another process has taken it over.
    """
    check_lock(folder)
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): free disk space or fix the folder's permissions, "
            "then use --resume"
        ) from None


# ---------------------------------------------------------------- the file


def _lock_of_system(descriptor: int) -> bool | None:
    """Lock an open file. Return False if another process has locked it, and None if the file system has no locks.

    NFS version 4 counts as a file system without locks: it locks only files that are open for writing, and it keeps the
    locks of a dead machine for a long time.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open(path: Path, descriptor: int) -> bool:
    """Return whether `path` is still the file that is open as `descriptor`, and was not deleted."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _look(path: Path) -> tuple[dict[str, Any], int]:
    """Return the owner in a lock file, and the file's time in ns. A network disk looks for changes at each opening."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}, 0
    try:
        return _read_owner(descriptor), os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _read_owner(descriptor: int) -> dict[str, Any]:
    """Return the content of an open lock file, or {} if it is damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 10 * _LENGTH, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _write_owner(path: Path, owner: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, json.dumps(owner).encode().ljust(_LENGTH), 0)
        os.ftruncate(descriptor, _LENGTH)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- the process


def _describe_process() -> dict[str, Any]:
    """Return what a lock file says about this process."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "started": start_time(os.getpid()),
        "machine": machine_id(),
        "namespace": _namespace(),
        "job": _job(),
        "restart": _restart(),
        "token": secrets.token_hex(8),
    }


def machine_id() -> str:
    """Return a text that identifies this machine since its boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    """Return a text that identifies the processes that this process can see: those of its container."""
    return os.readlink("/proc/self/ns/pid")


def _job() -> str:
    """Return torchrun's name of the job; "" without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def _restart() -> int:
    """Return how often torchrun has restarted the processes of this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start_time(process: int) -> str:
    """Return when a process started, in clock ticks since the boot; "" if it is not running.

    Process ids are used again. The id together with this time is unique.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # Z and X: the process has ended


def _has_ended(owner: dict[str, Any]) -> bool:
    """Return whether the process that a lock file names is known to have ended."""
    if (owner.get("machine"), owner.get("namespace")) == (machine_id(), _namespace()):
        return start_time(owner.get("process", 0)) != owner.get("started")
    return _is_earlier_start(owner)


def _is_earlier_start(owner: dict[str, Any]) -> bool:
    """Return whether the owner is a process of this job from before a restart by torchrun, maybe on another machine."""
    restart = owner.get("restart")
    return bool(_job()) and owner.get("job") == _job() and isinstance(restart, int) and restart < _restart()
