"""A packed store: the videos of a data set decoded once and resized, in a folder that is quick to read from.

    dclr-plan.npz      which video goes where; written first, and what a run that goes on is compared with
    shard-00000.yuv    planes: video after video, frame after frame, each y, then u, then v
    shard-00000/       or, in a compact store, a folder of small videos, named by their rows
    shard-00000.npz    checksums of that shard; written after it, and only when it is complete
    dclr-index.npz     the plan with what was found while packing; written last

A *row* is a video's place in the index, which holds every video that any official split lists, and the lists themselves.
`dclr.data.pack` writes stores; this module says what they look like and reads them.
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
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from dclr.data import decode
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, check_frame_numbers, empty_planes
from dclr.data.encode import compact_record
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError
from dclr.files import atomic_write

INDEX, PLAN = "dclr-index.npz", "dclr-plan.npz"

VERSION = 1
"""Of the folder's format: raise it when that changes."""

SHORT_SIDE = 128

MAX_FILE, MAX_FRAMES, MAX_SIDE, MAX_BYTES = 2**30, 2**24, 2**14, 2**50
"""Bytes of a file of arrays (Kinetics-400's index takes 60 MB), frames of a video, pixels of a side, bytes of a shard: far beyond any data
set's, and low enough that no product or sum of them leaves int64."""

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
        rows = {path: row for row, path in enumerate(unpack_strings(self._paths))}
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

        numbers = check_frame_numbers(wanted, frames)
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
    reasons = zip(unpack_strings(index["paths"]), unpack_strings(index["reasons"]), strict=True)
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
    """Raises UserError: the store is unfinished, of another version, or its index is damaged or says what cannot be."""
    if not (folder / INDEX).is_file():
        plan, _ = load_plan(folder)
        raise UserError(f"{folder} is an unfinished store: run `{pack_command(folder, plan)}` to finish it")
    index, _ = load_arrays(folder / INDEX)
    check_index(folder / INDEX, index)
    return index


def load_plan(folder: Path) -> tuple[Arrays, bytes]:
    """The plan and its digest. Raises UserError as `load_index`."""
    plan, digest = load_arrays(folder / PLAN)
    check_plan(folder / PLAN, plan)
    return plan, digest


def pack_command(folder: Path, plan: Arrays) -> str:
    """What makes, or mends, the store in `folder`: to be copied into a shell, so what the file says of its source is quoted."""
    (source,) = map(shlex.quote, unpack_strings(plan["source"]))
    size = "" if plan["short_side"] == SHORT_SIDE else f" --short-side {plan['short_side']}"
    outside = " --allow-outside" if any(map(leaves_folder, unpack_strings(plan["paths"]))) else ""
    compact = " --compact" if plan["compact"] else ""
    return f"train.py pack --data {source} --out {shlex.quote(str(folder))}{size}{outside}{compact}"


def leaves_folder(path: str) -> bool:
    """Whether a path of a list may point out of the data folder."""
    return path.startswith("/") or ".." in PurePosixPath(path).parts


def damaged_shards(store: Store, workers: int, progress: bool = True) -> dict[str, str]:
    """Name of a shard -> what is wrong with it, after reading every byte of the store."""
    shards = rows_by_shard(store.shards)
    find = partial(_fault, store, unpack_strings(store._paths))
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


# ---------------------------------------------------------------- what an index may say


def check_plan(path: Path, plan: Arrays) -> None:
    """Raises UserError, naming the array of `path` that says what cannot be.

    A digest tells that a byte has changed, not who wrote the file: nothing in it is used before it has been looked at here.
    """
    _check_lists(path, plan)
    _check_planes(path, plan)


def check_index(path: Path, index: Arrays) -> None:
    """As `check_plan`, with what is only known once all is packed."""
    _check_lists(path, index)
    _check_columns(path, index, (len(index["frames"]),), uint32=["crc32"], bool=["bt709", "full_range"])
    if index["compact"]:
        _check_small_videos(path, index)
    else:
        _check_planes(path, index)


def check_shard(path: Path, found: Arrays, sizes: np.ndarray | None, rows: int) -> None:
    """The same of what was found while a shard of so many rows was written; `sizes` as planned, where they were not free to differ."""
    _check_columns(
        path, found, (rows,), int64=["sizes"], uint32=["crc32"], bool=["bt709", "full_range"], texts=["reasons"]
    )
    _require(path, "sizes", _between(found["sizes"], 0, MAX_BYTES), f"0 to {MAX_BYTES:,}")
    _require(path, "sizes", sizes is None or found["sizes"] == sizes, "those of the plan")


def _check_lists(path: Path, index: Arrays) -> None:
    """All but where the videos lie."""
    _check_columns(path, index, (), int64=["version", "short_side"], bool=["compact"])
    _check_columns(path, index, (1,), texts=["source", "layout"])
    _check_columns(path, index, (None,), int64=["numbers", "entry_row", "missing_number", "frames"], texts=["classes"])
    numbers, classes, videos = index["numbers"], len(unpack_strings(index["classes"])), len(index["frames"])
    entries, missing = index["entry_row"].shape, index["missing_number"].shape
    _check_columns(path, index, entries, int64=["entry_number", "entry_split", "entry_label"], texts=["entry_group"])
    _check_columns(path, index, missing, texts=["missing"])
    places = ["heights", "widths", "sizes", "shards", "offsets"]
    _check_columns(path, index, (videos,), int64=places, texts=["paths", "reasons"])
    _check_columns(path, index, (videos, 2), int64=["stamps"])

    paths, shards, stored = unpack_strings(index["paths"]), index["shards"], index["shards"] >= 0
    absent = np.array([reason != "" for reason in unpack_strings(index["reasons"])], dtype=bool)
    short_sides = np.minimum(index["heights"], index["widths"])
    least = stored.astype(np.int64)  # a video that is in no shard has no frames and no size
    for name, right, rule in (
        ("numbers", 0 < len(numbers) == len(set(numbers.tolist()) & {1, 2, 3}), "some of 1, 2 and 3, each once"),
        ("missing_number", np.isin(index["missing_number"], numbers), "one of the numbers"),
        ("entry_number", np.isin(index["entry_number"], numbers), "one of the numbers"),
        ("entry_split", _between(index["entry_split"], 0, 2), "0 to 2"),
        ("entry_row", _between(index["entry_row"], 0, videos - 1), f"0 to {videos - 1}"),
        ("entry_label", _between(index["entry_label"], -1, classes - 1), f"-1 to {classes - 1}"),
        ("paths", 0 < videos == len(set(paths)), "at least one, and each another"),
        ("shards", shards >= -1, "-1 or more"),
        ("shards", shards[stored][:1] == 0, "0 for the first video that is in one"),
        ("shards", _between(np.diff(shards[stored]), 0, 1), "that of the video before, or the next"),
        ("reasons", stored | absent, "given for what is in no shard"),
        ("frames", _between(index["frames"], least, least * MAX_FRAMES), f"1 to {MAX_FRAMES:,}, or 0 in no shard"),
        ("heights", _between(index["heights"], least, least * MAX_SIDE), f"1 to {MAX_SIDE:,}, or 0 in no shard"),
        ("widths", _between(index["widths"], least, least * MAX_SIDE), f"1 to {MAX_SIDE:,}, or 0 in no shard"),
        ("short_side", np.max(short_sides, initial=1) <= index["short_side"], "at least that of every video"),
        ("sizes", _between(index["sizes"], 0, MAX_BYTES), f"0 to {MAX_BYTES:,}"),
        ("offsets", _between(index["offsets"], 0, MAX_BYTES), f"0 to {MAX_BYTES:,}"),
    ):
        _require(path, name, right, rule)


def _check_planes(path: Path, index: Arrays) -> None:
    """Every video's planes follow those of the video before. That they end where the shard does is `size_fault`'s to say."""
    chroma = (index["heights"] + 1) // 2 * ((index["widths"] + 1) // 2)
    sizes = index["frames"] * (index["heights"] * index["widths"] + 2 * chroma)
    _require(path, "sizes", index["sizes"] == sizes, "frames times the bytes of a frame")
    stored = index["shards"] >= 0
    starts, first = index["offsets"][stored], np.diff(index["shards"][stored], prepend=-1) == 1
    ends = np.roll(starts + sizes[stored], 1)  # of the video before
    _require(path, "offsets", starts == np.where(first, 0, ends), "where the video before ends")


def _check_small_videos(path: Path, index: Arrays) -> None:
    """Every video is a file of its own; a frame takes more than a byte, so no reader prepares for frames that cannot be there."""
    absent = np.array([reason != "" for reason in unpack_strings(index["reasons"])], dtype=bool)
    _require(path, "offsets", index["offsets"] == 0, "0 in a compact store")
    _require(path, "sizes", absent | (index["sizes"] > index["frames"]), "more than a byte a frame")


def _check_columns(
    path: Path, arrays: Arrays, shape: tuple[int | None, ...], texts: Sequence[str] = (), **names: Sequence[str]
) -> None:
    """The arrays of these names are there, of the type that they are listed under, and of this shape (None: of any length)."""
    for kind, name in [("texts", name) for name in texts] + [
        (kind, n) for kind, listed in names.items() for n in listed
    ]:
        array = arrays.get(name, np.empty(0))
        dtype = "uint8" if kind == "texts" else kind
        _require(path, name, name in arrays and array.dtype == dtype, f"an array of {dtype}")
        found: tuple[int, ...] = array.shape
        if kind == "texts":
            ended = array.ndim == 1 and not array[-1:].any()
            _require(path, name, ended, "texts, each with a null character behind it")
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
    atomic_write(path, content.getvalue() + digest, aside=path.with_name(f"{path.name}.part"))
    return digest


def load_arrays(path: Path) -> tuple[Arrays, bytes]:
    """The arrays and the digest. Raises UserError: the file cannot be read, a byte of it has changed, it is of another version."""
    try:
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path} was not written by train.py pack ({size:,} bytes): delete it and pack again")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    digest = content[-32:]
    if hashlib.sha256(memoryview(content)[:-32]).digest() != digest:
        raise UserError(f"{path} is damaged: delete it and run the train.py pack command of this store again")
    try:
        arrays = _arrays_of(content[:-32])
        version = int(arrays["version"])
    except Exception as error:  # whatever a file that was not written by `save_arrays` makes of its readers
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} was not written by train.py pack ({reason}): delete it and pack again") from error
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, not {VERSION}: pack the videos into another folder")
    return arrays, digest


def _arrays_of(content: bytes) -> Arrays:
    """The members of a .npz file as `save_arrays` writes them, uncompressed. Raises ValueError and more: it is another file.

    Nothing is unpickled, and nothing is allocated that the file does not hold: a header may promise terabytes.
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
            # A copy, for memory of one's own can be written to.
            arrays[member.filename.removesuffix(".npy")] = np.frombuffer(values, dtype).reshape(shape).copy()
    return arrays


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
