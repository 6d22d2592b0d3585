"""Atomic writes: after a kill, a full disk or a power failure, a file has either its old content or its new content."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(
    path: Path, content: bytes, aside: Path | None = None, before_rename: Callable[[], None] = lambda: None
) -> None:
    """Write `content` to the file `aside`, flush it to disk, and rename it to `path`. A reader never sees half a file.

    `aside` must be in the folder of `path`. By default it has a name that no other process uses. So two processes may
    write one file at the same time: `path` then has the whole content of one of them.

    `before_rename` may raise an exception to prevent the rename. The file `aside` then stays.

    Raises OSError. `aside` is then deleted, and `path` still has its old content, unless only the last flush of the
    folder failed.
    """
    aside = aside or _new_name(path)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before_rename()
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # frees its space on a full disk
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write. It is renamed to `path` at the end of the context, or deleted after an error.

    Use it in place of `atomic_write` for a file that is written without holding all of it in memory. Raises OSError.
    """
    aside = _new_name(path)
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


def _new_name(path: Path) -> Path:
    """Return a name next to `path` that no other process uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
