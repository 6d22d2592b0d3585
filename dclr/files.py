"""Files that a kill, a full disk or a loss of power leaves either as they were or as they should be."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Write `content` aside, down to the disk, then give it its name: whoever looks sees the old file or the new one, never half of one.

    `aside` is in the same folder, by default the path with .tmp behind it. Raises OSError; `path` is as it was then.
    """
    aside = aside or path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # gives its space back to a full disk
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names in the folder survive a loss of power from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
