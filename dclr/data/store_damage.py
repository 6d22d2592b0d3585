"""Damage of a packed store: shards that are missing, too short, or differ from their checksums."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dclr.data.decode import UnreadableVideo
from dclr.data.store import Store
from dclr.data.store_files import compact_name, file_name, rows_by_shard, shard_name
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError
from dclr.progress import ProgressBar


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


def damaged_shards(store: Store, workers: int) -> dict[str, str]:
    """Read every byte of the store and return the name of each damaged shard -> what is wrong with it."""
    shards = rows_by_shard(store.shards)
    find = partial(_fault, store, unpack_strings(store.packed_paths))
    with (
        ThreadPoolExecutor(workers) as threads,  # checksums are computed without Python's lock
        ProgressBar(len(shards), "checking shards", "shard") as bar,
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
