"""The files of a packed store: their names, and how arrays are written to a file and read.

    dclr-plan.npz      which video goes where; written first, and compared when an interrupted pack continues
    shard-00000.yuv    planes: video after video, frame after frame, each y, then u, then v
    shard-00000/       in a compact store instead: a folder of small video files, named by their rows
    shard-00000.npz    checksums of that shard; written after it, and only when it is complete
    dclr-index.npz     the plan and what was found while packing; written last

A *row* is the position of a video in the index. The index holds every video that any official split lists, and the
lists themselves.
"""

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import TypeVar

import numpy as np

from dclr.errors import UserError
from dclr.files import atomic_write

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
"""The arrays that say how the data set was read."""

MAX_FILE, MAX_FRAMES, MAX_SIDE, MAX_BYTES = 2**30, 2**24, 2**14, 2**50
"""Largest file of arrays in bytes (Kinetics-400's index takes 60 MB), frames of a video, pixels of a side, and bytes of
a shard. They are far above those of any data set, and low enough that no product or sum of them leaves int64."""

Arrays = dict[str, np.ndarray]

Size = TypeVar("Size", int, np.ndarray)


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
