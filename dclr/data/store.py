"""A packed store: the videos of a data set decoded once and resized, in a folder that is quick to read from.

    dclr-plan.npz      which video goes where; written first, and what a run that goes on is compared with
    shard-00000.yuv    planes: video after video, frame after frame, each y, then u, then v
    shard-00000/       or, in a compact store, a folder of small videos, named by their rows
    shard-00000.npz    checksums of that shard; written after it, and only when it is complete
    dclr-index.npz     the plan with what was found while packing; written last

A *row* is a video's place in the index, which holds every video that any official split lists, and the lists themselves.
`dclr.pack` writes stores; this module says what they look like and reads them.
"""

import hashlib
import io
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dclr.data import decode
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, compact_record, empty_planes
from dclr.data.texts import unpacked
from dclr.errors import UserError

INDEX, PLAN = "dclr-index.npz", "dclr-plan.npz"

VERSION = 1
"""Of the folder's format: raise it when that changes."""

SHORT_SIDE = 128

_OPEN_SHARDS = 256
"""Mapped at a time in a process: each holds a file descriptor, and 1,024 are allowed by default."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Store:
    """An open store. Only arrays, so that workers share it with the process they were forked from, however many videos it has."""

    folder: Path
    compact: bool
    frames: np.ndarray  # (V,) int64; 0 where the source could not be read
    heights: np.ndarray  # (V,) int64, pixels
    widths: np.ndarray  # (V,) int64, pixels
    shards: np.ndarray  # (V,) int64, never falling; -1: not in the store
    offsets: np.ndarray  # (V,) int64, bytes from the beginning of its shard; 0 throughout a compact store
    sizes: np.ndarray  # (V,) int64, bytes
    crc32: np.ndarray  # (V,) uint32, of these bytes
    bt709: np.ndarray  # (V,) bool
    full_range: np.ndarray  # (V,) bool
    unreadable: dict[str, str]  # path of the source -> why it is not here
    _paths: np.ndarray  # uint8, packed
    _shard: Callable[[int], np.ndarray]  # number -> its bytes, mapped when this process first asks for it

    def rows_of(self, paths: Iterable[str]) -> np.ndarray:
        """(number of paths,) int64: the rows of these videos. KeyError: the index does not know one."""
        rows = {path: row for row, path in enumerate(unpacked(self._paths))}
        return np.array([rows[path] for path in paths], dtype=np.int64)

    def source(self, rows: np.ndarray) -> "Selection":
        """Some of the videos, numbered anew: what is number i there is row rows[i] here."""
        return Selection(self, rows)

    def read_planes(self, row: int, wanted: np.ndarray | Sequence[int], into: Planes | None = None) -> YuvFrames:
        """The wanted frames of a video: as `decode.read_planes`, and with its errors, in the size that the index says.

        From a raw store they are copied once, from the mapped file to where they are wanted.
        """
        frames, height, width = int(self.frames[row]), int(self.heights[row]), int(self.widths[row])
        if self.compact:
            file = self.folder / shard_name(int(self.shards[row]), compact=True) / compact_name(row)
            try:
                planes = decode.read_planes(file, compact_record(frames, height, width), wanted, into)
            except UnreadableVideo as reason:
                raise UnreadableVideo(f"{file.relative_to(self.folder)}: {reason}") from reason
            return replace(planes, bt709=bool(self.bt709[row]), full_range=bool(self.full_range[row]))

        numbers = np.asarray(wanted, dtype=np.int64)
        if numbers.ndim != 1:
            raise ValueError(f"wanted must be a list of frame numbers, got shape {numbers.shape}")
        if numbers.size and (numbers.min() < 0 or numbers.max() >= frames):
            raise ValueError(f"wanted must be in [0, {frames}), got {numbers.min()} to {numbers.max()}")
        stored = self._planes(row)
        runs = list(_runs(numbers.tolist()))
        views = []
        for plane, target in zip(stored, into or empty_planes(len(numbers), height, width), strict=True):
            view = target[:, : plane.shape[1], : plane.shape[2]]
            for places, run in runs:
                view[places] = plane[run]
            views.append(view)
        y, u, v = views
        return YuvFrames(y, u, v, bool(self.bt709[row]), bool(self.full_range[row]))

    def _planes(self, row: int) -> Planes:
        """y (frames, H, W), u and v of a whole video, as they lie in the file."""
        height, width = int(self.heights[row]), int(self.widths[row])
        half = ((height + 1) // 2, (width + 1) // 2)
        luma, chroma = height * width, half[0] * half[1]
        start, size = int(self.offsets[row]), int(self.sizes[row])
        shard = self._shard(int(self.shards[row]))
        if len(shard) < start + size:
            raise UnreadableVideo(f"{shard_name(int(self.shards[row]), compact=False)} is too short: it is damaged")
        video = shard[start : start + size].reshape(-1, luma + 2 * chroma)
        return (
            video[:, :luma].reshape(-1, height, width),
            video[:, luma : luma + chroma].reshape(-1, *half),
            video[:, luma + chroma :].reshape(-1, *half),
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """Some videos of a store, as a set of videos reads them."""

    store: Store
    rows: np.ndarray  # (N,) int64

    def read_planes(self, index: int, wanted: np.ndarray | Sequence[int], into: Planes | None = None) -> YuvFrames:
        """`Store.read_planes` of video `index` of these."""
        return self.store.read_planes(int(self.rows[index]), wanted, into)

    def identity(self) -> list[np.ndarray]:
        """The videos' checksums."""
        return [self.store.crc32[self.rows]]


def is_store(folder: Path) -> bool:
    """Whether a folder was written, or begun, by `train.py pack`."""
    return (folder / INDEX).is_file() or (folder / PLAN).is_file()


def open_store(folder: Path) -> Store:
    """Raises UserError, naming the file: the store is unfinished, its index is damaged, a shard is missing or not as long as it should be.

    Checksums are not looked at; `damaged_shards` does.
    """
    store = store_of(folder, load_index(folder))
    for number, rows in enumerate(rows_by_shard(store.shards)):
        if fault := size_fault(folder, store.compact, number, rows, store.sizes):
            name = shard_name(number, store.compact)
            raise UserError(f"{folder / name} {fault}: see train.py check --data {folder}")
    return store


def store_of(folder: Path, index: Arrays) -> Store:
    """A store by its index, whatever became of its shards."""
    reasons = zip(unpacked(index["paths"]), unpacked(index["reasons"]), strict=True)
    return Store(
        folder=folder,
        compact=bool(index["compact"]),
        **{name: index[name] for name in ("frames", "heights", "widths", "shards", "offsets", "sizes")},
        **{name: index[name] for name in ("crc32", "bt709", "full_range")},
        unreadable={path: reason for path, reason in reasons if reason},
        _paths=index["paths"],
        _shard=lru_cache(_OPEN_SHARDS)(partial(_mapped, folder)),
    )


def load_index(folder: Path) -> Arrays:
    """Raises UserError: the store is unfinished, of another version, or its index is damaged."""
    if not (folder / INDEX).is_file():
        plan, _ = load_arrays(folder / PLAN)
        raise UserError(f"{folder} is an unfinished store: run `{pack_command(folder, plan)}` to finish it")
    index, _ = load_arrays(folder / INDEX)
    return index


def pack_command(folder: Path, plan: Arrays) -> str:
    """What makes, or mends, the store in `folder`."""
    (source,) = unpacked(plan["source"])
    size = "" if plan["short_side"] == SHORT_SIDE else f" --short-side {plan['short_side']}"
    return f"train.py pack --data {source} --out {folder}{size}{' --compact' if plan['compact'] else ''}"


def damaged_shards(store: Store, workers: int, progress: bool = True) -> dict[str, str]:
    """Name of a shard -> what is wrong with it, after reading every byte of the store."""
    shards = rows_by_shard(store.shards)
    find = partial(_fault, store, unpacked(store._paths))
    with (
        ThreadPoolExecutor(workers) as threads,  # checksums are computed without Python's lock
        tqdm(total=len(shards), desc="checking shards", unit="shard", disable=not progress) as bar,
    ):
        damaged = {}
        for number, fault in enumerate(threads.map(find, range(len(shards)), shards)):
            bar.update()
            if fault:
                damaged[shard_name(number, store.compact)] = fault
    return damaged


def _fault(store: Store, paths: list[str], number: int, rows: np.ndarray) -> str:
    """What is wrong with a shard; empty where nothing is."""
    if fault := size_fault(store.folder, store.compact, number, rows, store.sizes):
        return fault
    shard = store.folder / shard_name(number, store.compact)
    for row in rows.tolist():
        if paths[row] in store.unreadable:
            continue
        file = shard / compact_name(row) if store.compact else shard
        try:  # not mapped: a disk's error would end the process
            content = np.fromfile(file, np.uint8, count=int(store.sizes[row]), offset=int(store.offsets[row]))
        except OSError as error:
            return f"cannot be read at {paths[row]} ({error.strerror})"
        if zlib.crc32(content.data) != store.crc32[row]:
            return f"is damaged at {paths[row]}: its checksum differs"
    return ""


def size_fault(folder: Path, compact: bool, number: int, rows: np.ndarray, sizes: np.ndarray) -> str:
    """What is wrong with a shard at first sight, as the end of a sentence; empty where nothing is."""
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


# ---------------------------------------------------------------- the files


def shard_name(number: int, compact: bool) -> str:
    return f"shard-{number:05d}" + ("" if compact else ".yuv")


def compact_name(row: int) -> str:
    return f"{row:08d}.avi"


def rows_by_shard(shards: np.ndarray) -> list[np.ndarray]:
    """The rows of each shard, by its number."""
    stored = np.flatnonzero(shards >= 0)
    return np.split(stored, np.flatnonzero(np.diff(shards[stored])) + 1)


def save_arrays(path: Path, arrays: Arrays) -> bytes:
    """Writes a .npz file, which is the same for the same arrays, with its SHA-256 behind it, atomically and down to the disk.

    Returns the digest. Raises OSError.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:  # dated 1980, always
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    digest = hashlib.sha256(content.getbuffer()).digest()
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content.getbuffer())
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
    return digest


def load_arrays(path: Path) -> tuple[Arrays, bytes]:
    """The arrays and the digest. Raises UserError: the file cannot be read, a byte of it has changed, it is of another version."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    digest = content[-32:]
    if hashlib.sha256(memoryview(content)[:-32]).digest() != digest:
        raise UserError(f"{path} is damaged: delete it and run the train.py pack command of this store again")
    with np.load(io.BytesIO(content[:-32]), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if arrays["version"] != VERSION:
        raise UserError(f"{path} is of version {arrays['version']}, not {VERSION}: pack the videos into another folder")
    return arrays, digest


def sync_folder(folder: Path) -> None:
    """Names written to the folder survive a loss of power from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mapped(folder: Path, number: int) -> np.ndarray:
    """A shard's bytes, uint8, read from the disk as they are looked at."""
    name = shard_name(number, compact=False)
    try:
        with (folder / name).open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise UnreadableVideo(f"{name} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UnreadableVideo(f"{name} cannot be mapped: {error}") from error


def _runs(numbers: list[int]) -> Iterator[tuple[slice, slice]]:
    """(places, frames): evenly spaced frames, such as a window's, are one slice of the file and one copy."""
    first = 0
    while first < len(numbers):
        step = max(numbers[first + 1] - numbers[first], 1) if first + 1 < len(numbers) else 1
        last = first
        while last + 1 < len(numbers) and numbers[last + 1] - numbers[last] == step:
            last += 1
        yield slice(first, last + 1), slice(numbers[first], numbers[last] + 1, step)
        first = last + 1
