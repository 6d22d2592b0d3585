"""Validation of the arrays in the files of a packed store.

A digest shows that a byte has changed, but not who wrote the file. So no value of a file is used before it is
validated here.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dclr.data.display import are_displays
from dclr.data.store_files import MAX_BYTES, MAX_FRAMES, MAX_SIDE, Arrays, frame_bytes
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError


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
    _check_columns(path, index, missing, int64=["missing_split", "missing_label"], strings=["missing"])
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
    least = stored.astype(np.int64)  # a video that is in no shard has no frames and no size
    for name, right, rule in (
        ("numbers", numbers >= 0, "0 or more"),
        ("numbers", 0 < len(numbers) == len(set(numbers.tolist())), "at least one, and each different"),
        ("missing_number", np.isin(index["missing_number"], numbers), "one of the numbers"),
        ("missing_split", _between(index["missing_split"], 0, 2), "0 to 2"),
        ("missing_label", _between(index["missing_label"], -1, classes - 1), f"-1 to {classes - 1}"),
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
