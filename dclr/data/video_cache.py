"""A cache on the local disk for the videos of stores that lie on a server. Its size is bounded.

    CACHE/dclr-cache.lock           the bytes in the cache; locked by the process that changes it
    CACHE/store-KEY/000/ROW.video   a video as it is in the store; the key is a digest of the store's index

All processes of a machine share the cache. A video is written to a file of its own and renamed, so no process finds
half a video. After a power failure the disk may still hold half a video. So the first reader in a run compares the
checksum. Least recently used videos are deleted to make room. A process that is reading such a video keeps it open.
"""

import fcntl
import mmap
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from dclr.data.decoder_process import shared_array
from dclr.errors import UserError

FOLDER, SIZE = "DCLR_CACHE", "DCLR_CACHE_GB"
"""Environment variables: the folder of the cache, and its largest size in GB."""

DEFAULT_GB = 50.0

LARGEST = 2**26
"""Bytes of the largest video that is cached. A sample needs about 2 MB of a video, so fetching a longer one would cost
more than fetching 30 samples of it."""

LOCK = "dclr-cache.lock"

STALE_S = 600.0
"""Age in seconds after which a half-written file counts as left by a process that was killed."""

ROOM = 0.05
"""Share of the limit that is freed at a time, so that the cache is not searched for every video."""


def cache_folder() -> Path:
    """Return the folder of the cache: $DCLR_CACHE, $XDG_CACHE_HOME/dclr/stores or ~/.cache/dclr/stores."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dclr" / "stores"


def cache_limit() -> int:
    """Return the largest size of the cache in bytes. Raises UserError: $DCLR_CACHE_GB is not a number of GB."""
    text = os.environ.get(SIZE) or str(DEFAULT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise UserError(f"{SIZE} is {text}, but must be a number of GB from 0, such as {DEFAULT_GB:g}")
    return int(gigabytes * 1e9)


def choose_cached(sizes: np.ndarray, limit: int) -> np.ndarray:
    """Return which videos of a store are cached, (V,) bool: all that fit, or else always the same part of them.

    Training reads every video once in an epoch. If the cache is smaller than the store and every video entered it, a
    video would be deleted before its next use. A fixed part keeps its videos: half a cache saves half of the bytes.

    Args:
        sizes: (V,) int64, bytes.
        limit: bytes.
    """
    order = np.random.default_rng(0).permutation(len(sizes))
    fits = (sizes[order] > 0) & (sizes[order] <= LARGEST)
    chosen = np.zeros(len(sizes), bool)
    chosen[order] = fits & (np.cumsum(np.where(fits, sizes[order], 0)) <= limit)
    return chosen


class VideoCache:
    """The part of the cache that holds V videos of one store. Processes that are forked later share it."""

    def __init__(self, folder: Path, limit: int, key: str, sizes: np.ndarray, crc32: np.ndarray) -> None:
        """Open the cache and create its folder.

        Args:
            folder: of the whole cache.
            limit: largest size of the whole cache in bytes; 0 caches nothing and creates nothing.
            key: text that identifies the content of the store.
            sizes, crc32: (V,) int64 and (V,) uint32, bytes of each video and their checksum.

        Raises:
            UserError: the folder cannot be written, or its disk has too little space.
        """
        self.folder, self.limit, self._own = folder, limit, folder / f"store-{key}"
        self._sizes, self._crc32 = sizes, crc32
        self.chosen = choose_cached(sizes, limit)
        self._verified = shared_array(len(sizes), np.uint8)
        self._failed = shared_array(1, np.uint8)
        if self.chosen.any():
            self._check_disk(int(sizes[self.chosen].sum()))

    def describe(self) -> str:
        """Return a line that says which part of the store is fetched again in every epoch; "" if none is."""
        if self.chosen[self._sizes > 0].all():
            return ""
        whole, kept = int(self._sizes.sum()), int(self._sizes[self.chosen].sum())
        return (
            f"the cache {self.folder} holds {kept / 1e9:.3g} of the store's {whole / 1e9:.3g} GB, "
            f"and the rest is fetched in every epoch (at most {SIZE}={self.limit / 1e9:g}, "
            f"and no video above {LARGEST / 1e6:.0f} MB)"
        )

    def _check_disk(self, wanted: int) -> None:
        advice = f"set {FOLDER} to another folder, or {SIZE} to 0 for no cache"
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            with self._locked() as counter:
                held = self._held(counter)
            disk = os.statvfs(self.folder)
        except OSError as error:
            raise UserError(f"the cache {self.folder} cannot be written ({error.strerror}): {advice}") from None
        free = disk.f_bavail * disk.f_frsize
        if free + held < wanted:
            raise UserError(
                f"the cache {self.folder} may grow to {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                f"lower {SIZE}, or {advice}"
            )

    def find(self, row: int) -> np.ndarray | None:
        """Return the bytes of a video, (size,) uint8, mapped from its file; None if the cache does not hold it."""
        path = self._path(row)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self._sizes[row]:
                    raise ValueError
                with suppress(OSError):  # another user's file
                    os.utime(file.fileno())
                content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            if not self._verified[row] and zlib.crc32(content.data) != self._crc32[row]:
                raise ValueError
        except ValueError:  # damaged, also an empty file
            path.unlink(missing_ok=True)
            return None
        except OSError:
            return None
        self._verified[row] = 1
        return content

    def add(self, row: int, content: bytes) -> None:
        """Write a video whose checksum is right, unless other processes are filling the cache to its limit just now.

        If the disk fails, warn once and cache nothing from then on.
        """
        path = self._path(row)
        part = path.with_name(f"{row}.{os.urandom(8).hex()}.part")
        if self._failed[0]:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as counter:
                if path.exists() or not self._make_room(counter, len(content)):
                    return
                with part.open("wb") as file:
                    file.truncate(len(content))  # counts from now on
            with part.open("r+b") as file:
                file.write(content)
            with self._locked():  # a process that counts the files sees each of them once
                part.rename(path)
            self._verified[row] = 1
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            if not self._failed[0]:
                self._failed[0] = 1
                print(
                    f"warning: the cache {self.folder} cannot be written ({error.strerror}): videos that it does not "
                    "hold are fetched in every epoch from now on",
                    file=sys.stderr,
                )

    def _path(self, row: int) -> Path:
        return self._own / f"{row // 1000:03d}" / f"{row}.video"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Let only this process change the cache. Gives the open file that holds the number of bytes."""
        counter = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(counter, fcntl.LOCK_EX)
            yield counter
        finally:
            os.close(counter)

    def _held(self, counter: int) -> int:
        """Return the bytes in the cache, or more if a process was killed. If the file is empty, count the bytes."""
        text = os.pread(counter, 32, 0)
        return int(text) if text.isdigit() else sum(size for _, size, _ in self._files())

    def _make_room(self, counter: int, size: int) -> bool:
        """Delete the least recently used videos until `size` more bytes fit, and count these. Return whether they fit.

        Files that are being written are not deleted.
        """
        held = self._held(counter)
        if held + size > self.limit:
            files = sorted(self._files())
            held = sum(own for _, own, _ in files)
            excess = held + size - self.limit
            if excess > 0:
                excess += int(ROOM * self.limit)
            for used, own, path in files:
                if excess <= 0:
                    break
                if path.endswith(".part") and time.time() - used < STALE_S:
                    continue
                with suppress(FileNotFoundError):  # deleted by its reader
                    os.unlink(path)
                held, excess = held - own, excess - own
        fits = held + size <= self.limit
        os.ftruncate(counter, 0)
        os.pwrite(counter, str(held + size if fits else held).encode(), 0)
        return fits

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Yield (time of the last use, bytes, path) of every file in the cache."""
        for store in self.folder.glob("store-*"):
            for file in store.glob("*/*"):
                with suppress(FileNotFoundError):  # deleted by its reader, or renamed
                    status = file.stat()
                    yield status.st_mtime, status.st_size, str(file)
