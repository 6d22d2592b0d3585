"""A file of features that several processes make together, and that an interrupted command continues.

    FEATURES.parts/plan.json       what is embedded; a command with another plan is refused
    FEATURES.parts/part-00012.npz  the rows of the listed videos 12 * chunk to 13 * chunk - 1
    FEATURES                       written when the last part is there; then FEATURES.parts is deleted

Process r of W makes the parts r, r + W, r + 2 W and so on that do not exist yet. Each process only verifies the videos
of its own parts. A process that has written a part and then finds all of them writes FEATURES. So no process waits for
another one, and the death of a process cannot block the others. Then the same command makes what is missing.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr.data.given_videos import EVERYTHING, splits_of
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.data.videos import NoReadableVideo
from dclr.errors import UserError
from dclr.evaluation.embedding import make_embedder
from dclr.evaluation.feature_file import FeatureTable, parts_folder, write_features
from dclr.evaluation.feature_table import Request, Rows, clip_format, collect, embed_listed, join
from dclr.files import atomic_file, atomic_write
from dclr.lock import FolderInUse, folder_lock

VERSION = 1
"""Version of the parts' format: raise it when the format or the rows change."""

LARGEST_CHUNK, PARTS = 64, 64
"""A part has at most LARGEST_CHUNK videos. A small data set has about PARTS parts, so that all processes have work."""

PLAN = "plan.json"


@dataclass(frozen=True)
class Process:
    """This process among those that a launcher started for the same file."""

    rank: int
    count: int


def make_features(request: Request, out: Path, device: torch.device, process: Process) -> FeatureTable | None:
    """Make this process's parts of the file `out`. Return the table if this process has written the file, else None.

    Process 0 shows its progress.

    Raises:
        UserError: another command writes the same file; the parts are those of another command; no video can be read;
            the network has no such embedding, or an embedding is not finite; a file cannot be written.
    """
    make_embedder(request.pretrained, request.kinds)  # refuses a network without heads before anything is written
    folder = parts_folder(out)
    try:
        folder.mkdir(exist_ok=True)
        # Process 0 keeps other commands away. The other processes of this command write to the same folder.
        with folder_lock(folder) if process.rank == 0 else nullcontext():
            try:
                complete = _make_parts(request, folder, device, process)
            except UserError:
                if process.rank == 0 and not any(folder.glob("part-*.npz")):
                    shutil.rmtree(folder)
                raise
            if process.rank == 0:
                return _merge(request, out, folder) if complete else None
        return _merge_alone(request, out, folder) if complete else None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None


def _make_parts(request: Request, folder: Path, device: torch.device, process: Process) -> bool:
    """Make the parts of this process that do not exist. Return whether this process is to write the file."""
    chunk = max(1, min(LARGEST_CHUNK, len(request) // PARTS))
    _check_plan(request, folder, chunk)
    parts = [_part(folder, number) for number in range(-(-len(request) // chunk))]
    own = [position for position in range(len(request)) if position // chunk % process.count == process.rank]
    todo = [position for position in own if not parts[position // chunk].exists()]
    title = "embedding videos" + (f" (process 0 of {process.count})" if process.count > 1 else "")
    results = embed_listed(request, todo, device, "" if process.rank else title, done=len(own) - len(todo))
    for number, of_part in groupby(results, key=lambda result: result[0] // chunk):
        _write_part(parts[number], collect(of_part))
    # If no part was missing, only process 0 writes the file.
    return all(part.exists() for part in parts) and (process.rank == 0 or bool(todo))


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.npz"


def _check_plan(request: Request, folder: Path, chunk: int) -> None:
    """Write what the parts hold to the folder. Raises UserError if it has parts that hold something else."""
    listed, splits = request.listed.videos(EVERYTHING), splits_of(request.catalog)
    videos = "".join(f"{video.path}\0{video.label}\0{video.group}\0{splits[video.path]}\0" for video in listed)
    plan = {
        "version of the format": VERSION,
        "checkpoint": request.pretrained.fingerprint(),
        "data set": str(request.catalog.root.resolve()),
        "list of videos": hashlib.sha256(videos.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        "clips": clip_format(request),
        "kinds of embeddings (--like)": list(request.kinds),
        "rows (--clips)": "clips" if request.by_clip else "videos",
        "numbers (--half)": "float16" if request.half else "float32",
        "chunk": chunk,
    }
    plan = json.loads(json.dumps(plan))  # tuples become lists, as in the file
    file = folder / PLAN
    if any(folder.glob("part-*.npz")):
        try:
            found = json.loads(file.read_bytes())
            different = [name for name in plan if found.get(name) != plan[name]]
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{file} is damaged: delete {folder}, or give another --out") from None
        if different:
            raise UserError(
                f"{folder} holds parts with another {different[0]}: repeat the command that began them, delete the "
                "folder, or give another --out"
            )
    else:
        atomic_write(file, json.dumps(plan, indent=2).encode(), aside=folder / f"{PLAN}.{os.getpid()}.tmp")


def _merge(request: Request, out: Path, folder: Path) -> FeatureTable:
    """Write the file from all parts, and delete them.

    Raises:
        UserError: no video can be read, and then the parts are deleted too; the file cannot be written.
    """
    try:
        table = join(request, map(_read_part, sorted(folder.glob("part-*.npz"))))
    except NoReadableVideo:
        shutil.rmtree(folder)
        raise
    write_features(table, out)
    shutil.rmtree(folder)
    return table


def _merge_alone(request: Request, out: Path, folder: Path) -> FeatureTable | None:
    """Do what `_merge` does, unless another process does so: then return None."""
    while True:
        try:
            with folder_lock(folder):
                return _merge(request, out, folder)
        except FolderInUse:  # process 0 ends soon, because all parts exist
            time.sleep(0.2)
        except FileNotFoundError:  # another process has written the file and deleted the folder
            return None


def _write_part(path: Path, rows: Rows) -> None:
    columns: dict[str, Any] = {
        "positions": np.array(rows.positions, np.int64),
        "skipped": np.array(list(rows.skipped), np.int64),
        "reasons": pack_strings(rows.skipped.values()),
    }
    columns |= {f"kind/{kind}": values for kind, values in rows.embeddings.items()}
    with atomic_file(path) as aside, aside.open("wb") as file:
        np.savez(file, **columns)


def _read_part(path: Path) -> Rows:
    """Return the rows of a part. Raises UserError: the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            skipped = dict(zip(file["skipped"].tolist(), unpack_strings(file["reasons"]), strict=True))
            kinds = [name for name in file.files if name.startswith("kind/")]
            embeddings = {name.removeprefix("kind/"): file[name] for name in kinds}
            return Rows(file["positions"].tolist(), embeddings, skipped)
    except Exception as error:  # readers raise many kinds of errors on a damaged file
        raise UserError(f"{path} is damaged ({error}): delete it and repeat the command") from None
