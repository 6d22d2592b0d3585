"""Sizes, times and digests of many files, to see which have changed and which are equal."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_BYTES = 64 * 1024
"""Bytes at each end of a file that `digest_of_ends` reads."""

DIGEST_BYTES = 16
"""Length of a digest of `digest_of_ends`."""

WHOLE_DIGEST_BYTES = 32
"""Length of a digest of `digest_of_all`."""

THREADS = 8
"""Files that are read, or whose status is asked for, at a time. Most of the time is spent waiting for the disk."""

_CHUNK = 1_000
"""Files whose status a thread asks for before it takes others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileStatus:
    """What the file system says about N files."""

    numbers: np.ndarray
    """(N, 4) int64: device, inode (both modulo 2^63), size in bytes, modification time in nanoseconds. Zeros: the file
    cannot be used."""
    faults: dict[int, str]
    """Position -> why the file cannot be used."""

    @property
    def stamps(self) -> np.ndarray:
        """(N, 2) int64: size and modification time."""
        return self.numbers[:, 2:]


def find_status(root: Path, paths: Sequence[str]) -> FileStatus:
    """Return the status of the files `root / path`. Links are followed. No file is opened."""
    numbers = np.zeros((len(paths), 4), np.int64)
    faults: dict[int, str] = {}
    prefix = os.path.join(root, "")

    def find(first: int) -> None:
        for position in range(first, min(first + _CHUNK, len(paths))):
            path = paths[position]
            file = path if path.startswith("/") else prefix + path
            try:
                found = os.stat(file)
            except OSError as error:
                faults[position] = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
                continue
            # A file that everybody may read needs no second call.
            if found.st_mode & 0o444 != 0o444 and not os.access(file, os.R_OK):
                faults[position] = "no permission to read it"
                continue
            numbers[position] = found.st_dev % 2**63, found.st_ino % 2**63, found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(find, range(0, len(paths), _CHUNK)))
    return FileStatus(numbers=numbers, faults=faults)


def digest_of_ends(file: Path) -> bytes | None:
    """Return a digest of the first and the last bytes of a file, or None if the file cannot be read."""
    try:
        with file.open("rb") as opened:
            first = opened.read(SAMPLE_BYTES)
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - SAMPLE_BYTES))
            return hashlib.sha256(first + opened.read(SAMPLE_BYTES)).digest()[:DIGEST_BYTES]
    except OSError:
        return None


def digest_of_all(file: Path) -> bytes | None:
    """Return a digest of a file, or None if the file cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return None
