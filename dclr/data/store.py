"""A packed store: the videos of a data set, decoded once and resized, in a folder that is fast to read.

    dclr-plan.npz      which video goes where; written first, and compared when an interrupted pack continues
    shard-00000.yuv    planes: video after video, frame after frame, each y, then u, then v
    shard-00000/       in a compact store instead: a folder of small video files, named by their rows
    shard-00000.npz    checksums of that shard; written after it, and only when it is complete
    dclr-index.npz     the plan and what was found while packing; written last

A *row* is the position of a video in the index. The index holds every video that any official split lists, and the
lists themselves. `dclr.data.pack` writes stores. This module defines their format, validates and reads them.
`dclr.data.remote` reads the bytes of a store on a server.
"""

import hashlib
import io
import math
import mmap
import os
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from dclr.data import decode
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, check_frame_numbers, empty_planes
from dclr.data.display import AS_CODED, Displays, are_displays
from dclr.data.encode import compact_record
from dclr.data.remote import Missing, RemoteFolder, RemotePath, RemoteVideos
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.progress import ProgressBar

INDEX, PLAN = "dclr-index.npz", "dclr-plan.npz"

VERSION = 1
"""Version of the folder's format: raise it when the format changes."""

SHORT_SIDE = 128
"""Default length of a video's shorter side, in pixels."""

FOUND = ("sizes", "crc32", "bt709", "full_range")
"""The columns that are known only after a shard is written."""

READING = (
    "recognised",
    "recognised_number",
    "warnings",
    "warnings_number",
    "unused",
    "unused_reason",
    "unused_number",
)
"""The arrays that say how the data set was read. Stores of older versions have none of them."""

MAX_FILE, MAX_FRAMES, MAX_SIDE, MAX_BYTES = 2**30, 2**24, 2**14, 2**50
"""Largest file of arrays in bytes (Kinetics-400's index takes 60 MB), frames of a video, pixels of a side, and bytes of
a shard. They are far above those of any data set, and low enough that no product or sum of them leaves int64."""

_OPEN_SHARDS = 256
"""Shards that a process maps at a time. Each holds a file descriptor, and 1,024 are allowed by default."""

Arrays = dict[str, np.ndarray]

Size = TypeVar("Size", int, np.ndarray)


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
    index = with_displays(index)
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
    plan = with_displays(plan)
    check_plan(folder / PLAN, plan)
    return plan, digest


def with_displays(index: Arrays) -> Arrays:
    """Return a plan or an index with the arrays of `Displays`.

    Early stores of version 1 do not have these arrays. Their videos are shown as coded.
    """
    videos = len(index.get("frames", ()))
    no = np.zeros(videos, dtype=bool)
    return {"displays": np.tile(np.array(AS_CODED, np.int64), (videos, 1)), "oblique": no, "interlaced": no, **index}


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


# ---------------------------------------------------------------- damage


def check_sizes(store: Store) -> None:
    """Raise UserError if a shard is missing or not as long as it should be. The message names the shard.

    On a server, the first video of each shard of a compact store stands for the others. They are checked when they are
    read.
    """
    if store.remote is not None:
        shards = rows_by_shard(store.shards)
        sizes = {file_name(store.shards, int(rows[0]), store.compact): int(store.sizes[rows].sum()) for rows in shards}
        if store.compact:
            firsts = [int(rows[store.sizes[rows] > 0][0]) for rows in shards if store.sizes[rows].any()]
            sizes = {file_name(store.shards, row, compact=True): int(store.sizes[row]) for row in firsts}
        if fault := store.remote.remember(sizes):
            raise UserError(f"{store.folder}: {fault}")
        return
    for number, rows in enumerate(rows_by_shard(store.shards)):
        if fault := size_fault(store.folder, store.compact, number, rows, store.sizes):
            shard = store.folder / shard_name(number, store.compact)
            raise UserError(f"{shard} {fault}: see train.py check --data {store.folder}")


def damaged_shards(store: Store, workers: int, progress: bool = True) -> dict[str, str]:
    """Read every byte of the store and return the name of each damaged shard -> what is wrong with it."""
    shards = rows_by_shard(store.shards)
    find = partial(_fault, store, unpack_strings(store.packed_paths))
    with (
        ThreadPoolExecutor(workers) as threads,  # checksums are computed without Python's lock
        ProgressBar(len(shards), "checking shards", "shard", shown=progress) as bar,
    ):
        damaged = {}
        for number, fault in enumerate(threads.map(find, range(len(shards)), shards)):
            bar.advance()
            if fault:
                damaged[shard_name(number, store.compact)] = fault
    return damaged


def _fault(store: Store, paths: list[str], number: int, rows: np.ndarray) -> str:
    """Return what is wrong with a shard, sizes and checksums; empty if nothing is."""
    if store.remote is None and (fault := size_fault(store.folder, store.compact, number, rows, store.sizes)):
        return fault
    for row in rows.tolist():
        if paths[row] in store.unreadable:
            continue
        if store.remote is not None:
            try:
                store.remote.download(row)
            except UnreadableVideo as reason:
                return f"is damaged at {paths[row]}: {reason}"
            continue
        file = store.folder / file_name(store.shards, row, store.compact)
        try:  # not mapped: an error of the disk would kill the process
            content = np.fromfile(file, np.uint8, count=int(store.sizes[row]), offset=int(store.offsets[row]))
        except OSError as error:
            return f"cannot be read at {paths[row]} ({error.strerror})"
        if zlib.crc32(content.data) != store.crc32[row]:
            return f"is damaged at {paths[row]}: its checksum differs"
    return ""


def size_fault(folder: Path, compact: bool, number: int, rows: np.ndarray, sizes: np.ndarray) -> str:
    """Return what is wrong with the sizes of a shard's files, as the end of a sentence; empty if nothing is.

    Args:
        rows: the rows of the shard's videos.
        sizes: (V,) int64, bytes of all videos of the store.
    """
    shard = folder / shard_name(number, compact)
    try:
        if compact:
            found = {entry.name: entry.stat().st_size for entry in os.scandir(shard)}
            expected = {compact_name(row): int(sizes[row]) for row in rows.tolist() if sizes[row]}
            wrong = sorted(name for name in expected if found.get(name) != expected[name])
            return f"is damaged: {wrong[0]} is missing or not {expected[wrong[0]]:,} bytes long" if wrong else ""
        found_size, size = shard.stat().st_size, int(sizes[rows].sum())
        return f"is damaged: it has {found_size:,} bytes instead of {size:,}" if found_size != size else ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


# ---------------------------------------------------------------- validation
# A digest shows that a byte has changed, but not who wrote the file. So no value of a file is used before it is
# validated here.


def check_plan(path: Path, plan: Arrays) -> None:
    """Raise UserError if an array of the file `path` is not valid. The message names it."""
    _check_lists(path, plan)
    _check_planes(path, plan)


def check_index(path: Path, index: Arrays) -> None:
    """Raise UserError if an array of the file `path` is not valid. The message names it."""
    _check_lists(path, index)
    _check_columns(path, index, (len(index["frames"]),), uint32=["crc32"], bool=["bt709", "full_range"])
    if index["compact"]:
        _check_small_videos(path, index)
    else:
        _check_planes(path, index)


def check_shard(path: Path, found: Arrays, sizes: np.ndarray | None, rows: int) -> None:
    """Raise UserError if an array of a shard's checksums is not valid. The message names it.

    Args:
        path: the file of checksums, which messages name.
        found: the arrays of the file.
        sizes: the planned sizes in bytes; None if the sizes were not planned (compact store).
        rows: number of videos in the shard.
    """
    _check_columns(
        path, found, (rows,), int64=["sizes"], uint32=["crc32"], bool=["bt709", "full_range"], strings=["reasons"]
    )
    _require(path, "sizes", _between(found["sizes"], 0, MAX_BYTES), f"0 to {MAX_BYTES:,}")
    _require(path, "sizes", sizes is None or found["sizes"] == sizes, "those of the plan")


def _check_lists(path: Path, index: Arrays) -> None:
    """Validate all arrays of a plan or an index, except where the videos are inside their shards."""
    _check_columns(path, index, (), int64=["version", "short_side"], bool=["compact"])
    _check_columns(path, index, (1,), strings=["source", "layout"])
    _check_columns(
        path, index, (None,), int64=["numbers", "entry_row", "missing_number", "frames"], strings=["classes"]
    )
    numbers, classes, videos = index["numbers"], len(unpack_strings(index["classes"])), len(index["frames"])
    entries, missing = index["entry_row"].shape, index["missing_number"].shape
    _check_columns(path, index, entries, int64=["entry_number", "entry_split", "entry_label"], strings=["entry_group"])
    _check_columns(path, index, missing, strings=["missing"])
    if "missing_split" in index:  # stores of older versions have neither
        _check_columns(path, index, missing, int64=["missing_split", "missing_label"])
    if any(name in index for name in READING):
        _check_columns(path, index, (None,), int64=["recognised_number", "warnings_number", "unused_number"])
        for name in ("recognised", "warnings", "unused"):
            _check_columns(path, index, index[f"{name}_number"].shape, strings=[name])
        _check_columns(path, index, index["unused_number"].shape, strings=["unused_reason"])
    by_video = ["heights", "widths", "sizes", "shards", "offsets"]
    _check_columns(path, index, (videos,), int64=by_video, strings=["paths", "reasons"])
    _check_columns(path, index, (videos,), bool=["oblique", "interlaced"])
    _check_columns(path, index, (videos, 2), int64=["stamps"])
    _check_columns(path, index, (videos, 3), int64=["displays"])

    paths, shards, stored = unpack_strings(index["paths"]), index["shards"], index["shards"] >= 0
    short_sides = np.minimum(index["heights"], index["widths"])
    no_entries = np.empty(0, dtype=np.int64)
    least = stored.astype(np.int64)  # a video that is in no shard has no frames and no size
    for name, right, rule in (
        ("numbers", numbers >= 0, "0 or more"),
        ("numbers", 0 < len(numbers) == len(set(numbers.tolist())), "at least one, and each different"),
        ("missing_number", np.isin(index["missing_number"], numbers), "one of the numbers"),
        ("missing_split", _between(index.get("missing_split", no_entries), 0, 2), "0 to 2"),
        ("missing_label", _between(index.get("missing_label", no_entries), -1, classes - 1), f"-1 to {classes - 1}"),
        ("entry_number", np.isin(index["entry_number"], numbers), "one of the numbers"),
        ("entry_split", _between(index["entry_split"], 0, 2), "0 to 2"),
        ("entry_row", _between(index["entry_row"], 0, videos - 1), f"0 to {videos - 1}"),
        ("entry_label", _between(index["entry_label"], -1, classes - 1), f"-1 to {classes - 1}"),
        ("paths", 0 < videos == len(set(paths)), "at least one, and each different"),
        ("shards", shards >= -1, "-1 or more"),
        ("shards", shards[stored][:1] == 0, "0 for the first video that is in one"),
        ("shards", _between(np.diff(shards[stored]), 0, 1), "that of the video before, or the next"),
        ("reasons", stored | _absent(index), "given for what is in no shard"),
        ("frames", _between(index["frames"], least, least * MAX_FRAMES), f"1 to {MAX_FRAMES:,}, or 0 in no shard"),
        ("heights", _between(index["heights"], least, least * MAX_SIDE), f"1 to {MAX_SIDE:,}, or 0 in no shard"),
        ("widths", _between(index["widths"], least, least * MAX_SIDE), f"1 to {MAX_SIDE:,}, or 0 in no shard"),
        ("displays", are_displays(index["displays"]), "orientations 0 to 7 and pixels of positive size"),
        ("short_side", np.max(short_sides, initial=1) <= index["short_side"], "at least that of every video"),
        ("sizes", _between(index["sizes"], 0, MAX_BYTES), f"0 to {MAX_BYTES:,}"),
        ("offsets", _between(index["offsets"], 0, MAX_BYTES), f"0 to {MAX_BYTES:,}"),
    ):
        _require(path, name, right, rule)


def _absent(index: Arrays) -> np.ndarray:
    """Return which videos are not in the store, (V,) bool."""
    return np.array([reason != "" for reason in unpack_strings(index["reasons"])], dtype=bool)


def _check_planes(path: Path, index: Arrays) -> None:
    """Validate that the planes of each video follow those of the video before. `size_fault` checks the end of a
    shard."""
    sizes = index["frames"] * frame_bytes(index["heights"], index["widths"])
    _require(path, "sizes", index["sizes"] == sizes, "frames times the bytes of a frame")
    stored = index["shards"] >= 0
    starts, first = index["offsets"][stored], np.diff(index["shards"][stored], prepend=-1) == 1
    ends = np.roll(starts + sizes[stored], 1)  # of the video before
    _require(path, "offsets", starts == np.where(first, 0, ends), "where the video before ends")


def _check_small_videos(path: Path, index: Arrays) -> None:
    """Validate sizes and offsets of a compact store.

    Every video is a file of its own. A frame takes more than a byte, so no reader allocates memory for frames that
    cannot exist.
    """
    _require(path, "offsets", index["offsets"] == 0, "0 in a compact store")
    _require(path, "sizes", _absent(index) | (index["sizes"] > index["frames"]), "more than a byte a frame")


def _check_columns(
    path: Path, arrays: Arrays, shape: tuple[int | None, ...], strings: Sequence[str] = (), **names: Sequence[str]
) -> None:
    """Validate that arrays exist and have the right type and shape.

    Args:
        shape: the shape of all these arrays; None stands for any length.
        strings: names of arrays of strings, whose shape is (number of strings,).
        names: dtype -> names of arrays of this dtype.
    """
    columns = [(dtype, name) for dtype, listed in names.items() for name in listed]
    for dtype, name in [("uint8", name) for name in strings] + columns:
        array = arrays.get(name, np.empty(0))
        _require(path, name, name in arrays and array.dtype == dtype, f"an array of {dtype}")
        found: tuple[int, ...] = array.shape
        if name in strings:
            ended = array.ndim == 1 and not array[-1:].any()
            _require(path, name, ended, "strings, each with a null character behind it")
            found = (int(np.count_nonzero(array == 0)),)
        right = len(found) == len(shape) and all(want in (None, have) for want, have in zip(shape, found, strict=True))
        _require(path, name, right, f"of shape {shape}, not {found}".replace("None", "any"))


def _between(values: np.ndarray, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
    return (low <= values) & (values <= high)


def _require(path: Path, name: str, right: np.ndarray | bool, rule: str) -> None:
    if not np.all(right):
        raise UserError(f"{path} cannot be used: {name} must be {rule}; delete it and pack again")


# ---------------------------------------------------------------- the files


def shard_name(number: int, compact: bool) -> str:
    return f"shard-{number:05d}" + ("" if compact else ".yuv")


def checksums_name(number: int) -> str:
    return f"shard-{number:05d}.npz"


def compact_name(row: int) -> str:
    return f"{row:08d}.avi"


def file_name(shards: np.ndarray, row: int, compact: bool) -> str:
    """Return the file of a video, relative to the store. `shards`: (V,) int64, the shard of each video."""
    shard = shard_name(int(shards[row]), compact)
    return f"{shard}/{compact_name(row)}" if compact else shard


def rows_by_shard(shards: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each shard, given the shard of each row, (V,) int64."""
    stored = np.flatnonzero(shards >= 0)
    return np.split(stored, np.flatnonzero(np.diff(shards[stored])) + 1)


def frame_bytes(height: Size, width: Size) -> Size:
    """Return the bytes of a frame in YUV 4:2:0."""
    return height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2)


def empty_columns(count: int) -> Arrays:
    """Return the FOUND columns of `count` videos, all zero."""
    dtypes = (np.int64, np.uint32, np.bool_, np.bool_)
    return {name: np.zeros(count, dtype) for name, dtype in zip(FOUND, dtypes, strict=True)}


def save_arrays(path: Path, arrays: Arrays) -> bytes:
    """Write arrays as a .npz file followed by its SHA-256, in an atomic write. Returns the digest. Raises OSError.

    The same arrays give the same bytes.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            # ZipInfo's default date is 1980, so that the bytes do not depend on the time.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    digest = hashlib.sha256(content.getbuffer()).digest()
    atomic_write(path, content.getvalue() + digest, aside=path.with_name(f"{path.name}.part"))
    return digest


def load_arrays(path: Path) -> tuple[Arrays, bytes]:
    """Read a file of `save_arrays`. Returns the arrays and the digest.

    Raises UserError: the file cannot be read, see also `parse_arrays`.
    """
    try:
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path} was not written by train.py pack ({size:,} bytes): delete it and pack again")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return parse_arrays(path, content)


def parse_arrays(path: Path, content: bytes) -> tuple[Arrays, bytes]:
    """Return the arrays in the content of a file of `save_arrays`, and the digest. `path` is named in messages.

    Raises UserError: a byte has changed, or the file is of another version.
    """
    digest = content[-32:]
    if hashlib.sha256(memoryview(content)[:-32]).digest() != digest:
        raise UserError(f"{path} is damaged: delete it and run the train.py pack command of this store again")
    try:
        arrays = _arrays_of(content[:-32])
        version = int(arrays["version"])
    except Exception as error:  # readers raise many kinds of errors on a file that `save_arrays` did not write
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} was not written by train.py pack ({reason}): delete it and pack again") from error
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, not {VERSION}: pack the videos into another folder")
    return arrays, digest


def _arrays_of(content: bytes) -> Arrays:
    """Return the arrays of an uncompressed .npz file. Raises ValueError and others: `save_arrays` did not write it.

    Nothing is unpickled. No memory is allocated beyond the size of the file, because a header may declare terabytes.
    """
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its members are larger than the file")
        for member in members:
            file = io.BytesIO(archive.read(member))
            major, _ = np.lib.format.read_magic(file)
            if major != 1:
                raise ValueError(f"{member.filename} is of .npy version {major}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            values = file.read()
            if dtype.kind not in "biu" or len(values) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{member.filename} does not hold the numbers that its header promises")
            # The copy is writable.
            arrays[member.filename.removesuffix(".npy")] = np.frombuffer(values, dtype).reshape(shape).copy()
    return arrays
