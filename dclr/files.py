"""Atomic writes and the lock of a folder.

Atomic writes: after a kill, a full disk or a power failure, a file has either its old content or its new content.
The lock: only one process at a time writes a run or a packed store.
"""

import fcntl
import json
import os
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
"""Name of the lock file in a folder that a process writes to. Nothing else reads the file."""

REFRESH_S = 5.0
"""Seconds between two changes of a lock file's time by its owner."""

SILENCE_S = 60.0
"""Seconds without such a change after which an owner on another machine counts as gone."""

RELEASE_S = 2.0
"""Seconds in which the system releases the lock of a process that was killed."""


class FolderInUse(UserError):
    """Another process writes to the folder."""


_descriptors: set[int] = set()
"""Descriptors of the lock files that this process holds."""


def _close_in_child() -> None:
    """Close the lock files in a forked process. Otherwise the child would hold the locks longer than its parent."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def atomic_write(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Write `content` to the file `aside`, flush it to disk, and rename it to `path`. A reader never sees half a file.

    `aside` must be in the folder of `path`. By default its name is the name of `path` with ".tmp" added.

    Raises OSError. `path` then still has its old content.
    """
    aside = aside or path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # frees its space on a full disk
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which becomes `path` at the end of the context. After an error it is deleted.

    Use it in place of `atomic_write` for a file that is written without holding all of it in memory. Raises OSError.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the folder's list of names to disk, so that new names survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let only this process write to `folder` inside the context.

    The operating system locks the file LOCK in the folder. It releases the lock when the process ends, for whatever
    reason. So a lock file that a killed process left is no obstacle. The file names the process for the message.
    The operating system may not know of a process on another machine, which shares a network disk. The owner therefore
    changes the file's time every REFRESH_S seconds, and a change within SILENCE_S seconds shows that it is alive.

    Raises:
        FolderInUse: another process writes to the folder. The message names it.
        OSError: the folder does not exist or cannot be written.
    """
    path = folder / LOCK
    descriptor, released = _take(path), threading.Event()
    _descriptors.add(descriptor)
    refreshing = threading.Thread(target=_refresh, args=(descriptor, released), name="folder lock", daemon=True)
    refreshing.start()
    try:
        yield
    finally:
        released.set()
        refreshing.join()
        with suppress(OSError):  # the folder has vanished, or its disk has failed
            path.unlink()
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _take(path: Path) -> int:
    """Lock the file `path`, write this process's name into it, and return its descriptor."""
    _wait_for_other_machine(path)
    deadline = time.monotonic() + RELEASE_S
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            owner = _read_owner(descriptor)
            is_locked = _lock(descriptor)
            is_dying = is_locked is False and not _is_running(owner) and time.monotonic() < deadline
            if is_dying:
                time.sleep(0.02)
            elif is_locked is False or (is_locked is None and _is_running(owner)):
                raise _refusal(path, owner)
            elif _is_open(path, descriptor):
                own = {
                    "host": socket.gethostname(),
                    "process": os.getpid(),
                    "started": start_time(os.getpid()),
                    "machine": _machine(),
                    "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
                }
                path.write_text(json.dumps(own))
                if is_locked is None:
                    time.sleep(1.0)  # if two processes write at the same time, the second one keeps the folder
                    if (other := _look(path)[0]) != own:
                        raise _refusal(path, other)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the owner has just deleted the file, or its lock is still there


def _lock(descriptor: int) -> bool | None:
    """Lock an open file. Return False if another process has locked it, and None if the file system has no locks.

    NFS counts as such: it locks only files that are open for writing, and keeps locks of a dead machine for long.
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


def _wait_for_other_machine(path: Path) -> None:
    """If a process on another machine has left the lock file `path`, wait until the process counts as gone.

    Raises UserError if the file's time changes: the process is alive.
    """
    owner, changed = _look(path)
    if not owner or owner.get("machine") == _machine():
        return
    print(
        f"{path.parent} was written by process {owner.get('process')} on {owner.get('host')}: "
        f"waiting {SILENCE_S:.0f} s to see whether it still runs (if it does not, delete {path} to save the time)",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(min(REFRESH_S, SILENCE_S / 4))
        owner_now, changed_now = _look(path)
        if not owner_now:
            return
        if (owner_now, changed_now) != (owner, changed):
            raise _refusal(path, owner_now)


def _look(path: Path) -> tuple[dict[str, Any], int]:
    """Return the owner in a lock file and the file's time in ns. A network disk gives them anew for every open file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}, 0
    try:
        return _read_owner(descriptor), os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _read_owner(descriptor: int) -> dict[str, Any]:
    """Return the content of an open lock file. A killed process may have left it incomplete: then return {}."""
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(path: Path, owner: dict[str, Any]) -> FolderInUse:
    who = "another process"
    if "process" in owner:
        who = f"process {owner['process']} on {owner.get('host')}, since {owner.get('since')}"
    return FolderInUse(
        f"{path.parent} is being written by {who}: wait until that process has ended, stop it, or give another --out"
    )


def _refresh(descriptor: int, released: threading.Event) -> None:
    while not released.wait(REFRESH_S):
        with suppress(OSError):
            os.utime(descriptor)


def _machine() -> str:
    """Return a text that identifies this machine since its boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(process: int) -> str:
    """Return when a process started, in clock ticks since the boot; "" if it is not running.

    Process ids are used again. The id together with this time is unique.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # Z and X: the process has ended


def _is_running(owner: dict[str, Any]) -> bool:
    """Return whether the process that a lock file names is running on this machine."""
    started = start_time(owner.get("process", 0))
    return bool(started) and (owner.get("machine"), owner.get("started")) == (_machine(), started)
