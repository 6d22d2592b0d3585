"""A packed store: the videos of a data set, decoded once and resized, in a folder that is fast to read.

`dclr.data.pack` writes stores. This module opens them and reads their videos. `dclr.data.store_files` defines the
files of a store, `dclr.data.store_validation` validates them, and `dclr.data.store_damage` finds damaged shards.
`dclr.data.remote` reads the bytes of a store on a server.
"""

import mmap
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np

from dclr.data import decode
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, check_frame_numbers, empty_planes
from dclr.data.display import Displays
from dclr.data.encode import compact_record
from dclr.data.remote import Missing, RemoteFolder, RemotePath, RemoteVideos
from dclr.data.store_files import (
    FOUND,
    INDEX,
    MAX_FILE,
    PLAN,
    SHORT_SIDE,
    Arrays,
    file_name,
    frame_bytes,
    load_arrays,
    parse_arrays,
    shard_name,
)
from dclr.data.store_validation import check_index, check_plan
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError

_OPEN_SHARDS = 256
"""Shards that a process maps at a time. Each holds a file descriptor, and 1,024 are allowed by default."""


# ---------------------------------------------------------------- reading videos


@dataclass(frozen=True, eq=False)
class Store:
    """An open store of V videos. It holds arrays only, so forked workers share its memory, however many videos it
    has."""

    folder: Path
    compact: bool
    frames: np.ndarray
    """(V,) int64; 0 if the source could not be read."""
    heights: np.ndarray
    """(V,) int64, pixels."""
    widths: np.ndarray
    """(V,) int64, pixels."""
    shards: np.ndarray
    """(V,) int64, never decreasing, except that a video without a shard has -1."""
    offsets: np.ndarray
    """(V,) int64, bytes from the beginning of the shard; all 0 in a compact store."""
    sizes: np.ndarray
    """(V,) int64, bytes."""
    crc32: np.ndarray
    """(V,) uint32, of these bytes."""
    bt709: np.ndarray
    """(V,) bool."""
    full_range: np.ndarray
    """(V,) bool."""
    displays: Displays
    """How the V videos are to be shown. Frames are stored as they are coded."""
    unreadable: dict[str, str]
    """Path of the source -> why it is not in the store."""
    packed_paths: np.ndarray
    """uint8, the paths of the sources by `pack_strings`."""
    shard: Callable[[int], np.ndarray]
    """Number of a shard -> its bytes, mapped when this process first needs them."""
    remote: RemoteVideos | None = None
    """Reads the videos if the store is on a server. Then `shard` is not called."""

    def rows_of(self, paths: Iterable[str]) -> np.ndarray:
        """Return the rows of these videos, (number of paths,) int64. Raises KeyError: a path is not in the index."""
        rows = {path: row for row, path in enumerate(unpack_strings(self.packed_paths))}
        return np.array([rows[path] for path in paths], dtype=np.int64)

    def read_planes(self, row: int, wanted: np.ndarray | Sequence[int], into: Planes | None = None) -> YuvFrames:
        """Return the wanted frames of a video in the size of the store. Arguments and errors are those of
        `decode.read_planes`.

        Frames of a store of planes are copied once, from the mapped file to their destination.
        """
        frames, height, width = int(self.frames[row]), int(self.heights[row]), int(self.widths[row])
        bt709, full_range = bool(self.bt709[row]), bool(self.full_range[row])
        if self.compact:
            with self._small_video(row) as file:
                try:
                    planes = decode.read_planes(file, compact_record(frames, height, width), wanted, into)
                except UnreadableVideo as reason:
                    raise UnreadableVideo(f"{file_name(self.shards, row, compact=True)}: {reason}") from reason
            return replace(planes, bt709=bt709, full_range=full_range, display=self.displays[row])

        numbers = check_frame_numbers(wanted, frames)
        half = ((height + 1) // 2, (width + 1) // 2)
        luma, chroma, size = height * width, half[0] * half[1], frame_bytes(height, width)
        y, u, v = into or empty_planes(len(numbers), height, width)
        y, u, v = y[:, :height, :width], u[:, : half[0], : half[1]], v[:, : half[0], : half[1]]
        runs = list(_runs(numbers.tolist()))
        spans = [(run.start * size, run.stop * size) for _, run in runs]
        for (positions, run), content in zip(runs, self._bytes(row, spans), strict=True):
            stored = content.reshape(-1, size)[:: run.step]
            y[positions] = stored[:, :luma].reshape(-1, height, width)
            u[positions] = stored[:, luma : luma + chroma].reshape(-1, *half)
            v[positions] = stored[:, luma + chroma :].reshape(-1, *half)
        return YuvFrames(y, u, v, bt709, full_range, self.displays[row])

    def _bytes(self, row: int, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return byte ranges (start, stop) of a video in a store of planes, counted from its first byte, uint8.

        Those of a local store are views of the mapped file.
        """
        if self.remote is not None:
            return self.remote.read(row, spans)
        start, size = int(self.offsets[row]), int(self.sizes[row])
        shard = self.shard(int(self.shards[row]))
        if len(shard) < start + size:
            raise UnreadableVideo(f"{shard_name(int(self.shards[row]), compact=False)} is too short: it is damaged")
        video = shard[start : start + size]
        return [video[first:stop] for first, stop in spans]

    @contextmanager
    def _small_video(self, row: int) -> Iterator[Path]:
        """Give the file of a video in a compact store. A video from a server is held in memory."""
        if self.remote is None:
            yield self.folder / file_name(self.shards, row, compact=True)
            return
        descriptor = os.memfd_create("video", os.MFD_CLOEXEC)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(self.remote.whole(row).data)
            yield Path(f"/proc/self/fd/{descriptor}")


@dataclass(frozen=True, eq=False)
class Selection:
    """Some videos of a store, numbered 0 to N - 1."""

    store: Store
    rows: np.ndarray
    """(N,) int64."""

    @property
    def frames(self) -> np.ndarray:
        return self.store.frames[self.rows]

    @property
    def heights(self) -> np.ndarray:
        return self.store.heights[self.rows]

    @property
    def widths(self) -> np.ndarray:
        return self.store.widths[self.rows]

    @property
    def displays(self) -> Displays:
        return self.store.displays.select(self.rows)

    def read_planes(self, index: int, wanted: np.ndarray | Sequence[int], into: Planes | None = None) -> YuvFrames:
        """Return frames of video `index` of the selection by `Store.read_planes`."""
        return self.store.read_planes(int(self.rows[index]), wanted, into)

    def identity(self) -> list[np.ndarray]:
        """Return the checksums of the videos."""
        return [self.store.crc32[self.rows]]


def _mapped(folder: Path, number: int) -> np.ndarray:
    """Return the bytes of a shard, uint8. They are read from the disk when they are used."""
    name = shard_name(number, compact=False)
    try:
        with (folder / name).open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise UnreadableVideo(f"{name} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UnreadableVideo(f"{name} cannot be mapped: {error}") from error


def _runs(numbers: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield (positions, frames) for each run of evenly spaced frames, such as a window's. A run is copied as one
    slice."""
    first = 0
    while first < len(numbers):
        step = max(numbers[first + 1] - numbers[first], 1) if first + 1 < len(numbers) else 1
        last = first
        while last + 1 < len(numbers) and numbers[last + 1] - numbers[last] == step:
            last += 1
        yield slice(first, last + 1), slice(numbers[first], numbers[last] + 1, step)
        first = last + 1


# ---------------------------------------------------------------- opening


def is_store(folder: Path) -> bool:
    """Return whether `train.py pack` wrote this folder, or began to. A URL always names a store."""
    return isinstance(folder, RemotePath) or (folder / INDEX).is_file() or (folder / PLAN).is_file()


def load_index(folder: Path) -> Arrays:
    """Read and validate the index. A run calls this once: `open_catalog` keeps the index in the catalog.

    Raises UserError: the store is unfinished or of another version, its index is damaged or not valid, or the server
    has no such store or cannot be reached.
    """
    if isinstance(folder, RemotePath):
        index, _ = parse_arrays(folder / INDEX, _fetch_index(folder))
    elif (folder / INDEX).is_file():
        index, _ = load_arrays(folder / INDEX)
    else:
        plan, _ = load_plan(folder)
        raise UserError(f"{folder} is an unfinished store: run `{pack_command(folder, plan)}` to finish it")
    check_index(folder / INDEX, index)
    return index


def _fetch_index(folder: RemotePath) -> bytes:
    """Return the content of the index of a store on a server."""
    try:
        return RemoteFolder(folder).read_file(INDEX, MAX_FILE)
    except Missing:
        raise UserError(
            f"{folder} holds no {INDEX}: a URL must be that of a packed store, which `train.py pack` writes and you "
            "upload, this file last"
        ) from None


def load_plan(folder: Path) -> tuple[Arrays, bytes]:
    """Read and validate the plan. Returns the plan and its digest. Raises UserError as `load_index` does."""
    plan, digest = load_arrays(folder / PLAN)
    check_plan(folder / PLAN, plan)
    return plan, digest


def open_store(folder: Path, index: Arrays) -> Store:
    """Open a store by its index. The shards are not checked: see `check_sizes` and `damaged_shards`.

    Raises UserError: the cache for a store on a server cannot be used.
    """
    reasons = zip(unpack_strings(index["paths"]), unpack_strings(index["reasons"]), strict=True)
    remote, compact = None, bool(index["compact"])
    if isinstance(folder, RemotePath):
        name = partial(file_name, index["shards"], compact=compact)
        remote = RemoteVideos(folder, name, index["offsets"], index["sizes"], index["crc32"])
    return Store(
        folder=folder,
        compact=compact,
        **{name: index[name] for name in ("frames", "heights", "widths", "shards", "offsets", *FOUND)},
        displays=Displays(index["displays"], index["oblique"], index["interlaced"]),
        unreadable={path: reason for path, reason in reasons if reason},
        packed_paths=index["paths"],
        shard=lru_cache(_OPEN_SHARDS)(partial(_mapped, folder)),
        remote=remote,
    )


def pack_command(folder: Path, plan: Arrays) -> str:
    """Return the shell command that writes or repairs the store in `folder`. File names in it are quoted."""
    (source,) = map(shlex.quote, unpack_strings(plan["source"]))
    size = "" if plan["short_side"] == SHORT_SIDE else f" --short-side {plan['short_side']}"
    outside = " --allow-outside" if any(map(leaves_folder, unpack_strings(plan["paths"]))) else ""
    compact = " --compact" if plan["compact"] else ""
    return f"train.py pack --data {source} --out {shlex.quote(str(folder))}{size}{outside}{compact}"


def leaves_folder(path: str) -> bool:
    """Return whether a path of a list may point out of the data folder."""
    return path.startswith("/") or ".." in PurePosixPath(path).parts
