"""Atomic writes: after a kill, a full disk or a power failure, a file has either its old content or its new content."""

import os
from pathlib import Path


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


def sync_folder(folder: Path) -> None:
    """Flush the folder's list of names to disk, so that new names survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
