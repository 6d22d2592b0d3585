"""One complete decode of every video, once: what is readable, how long it is, where it can be sought.

The findings are kept in one cache file a data folder, outside of it (data folders are often read-only), and found again
by path, file size and modification time: only new and changed files are decoded at the next start.
"""

import contextlib
import hashlib
import multiprocessing
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dclr.data.decode import UnreadableVideo, VideoRecord, verify_video
from dclr.data.texts import packed, unpacked
from dclr.errors import UserError

_VERSION = 2
"""Of the cache file's format and of what `verify_video` finds: raise it when either changes."""

_SAVE_EVERY = 300.0
"""Seconds between saves while verifying, so that a machine lost after hours costs minutes."""

_WAVE = 32
"""Videos a worker gets at a time; a crash of the decoder costs a second look at no more than that."""

_CRASHED = "the decoder crashes on it"

Finding = VideoRecord | str
"""A record, or the reason why there is none."""

Stamp = tuple[int, int]
"""File size in bytes and modification time in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Each video asked for is in exactly one of the two, in the order asked for."""

    root: Path
    records: dict[str, VideoRecord]
    """By path relative to root."""
    unreadable: dict[str, str]
    """Path relative to root -> the reason in one line."""
    sizes: dict[str, int]
    """Bytes of the files in `records`."""


def load_manifest(
    root: Path, paths: Sequence[str], *, workers: int, progress: bool = True, cache_dir: Path | None = None
) -> Manifest:
    """Verifies the videos `root / path` that the cache does not know yet, in `workers` processes (1: in this one).

    The cache lies in `cache_dir`, by default $XDG_CACHE_HOME/dclr/manifests or ~/.cache/dclr/manifests. It is saved
    when the work is interrupted too, and keeps videos that `paths` does not name. UserError: it cannot be written.
    """
    cache = _cache_file(root, cache_dir)
    known = _load(cache)
    findings: dict[str, Finding] = {}
    sizes: dict[str, int] = {}
    todo: dict[str, Stamp] = {}
    for path in paths:
        try:
            status = (root / path).stat()
        except OSError as error:
            findings[path] = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
            continue
        if not os.access(root / path, os.R_OK):
            findings[path] = "no permission to read it"
            continue
        sizes[path] = status.st_size
        stamp = (status.st_size, status.st_mtime_ns)
        if path in known and known[path][0] == stamp:
            findings[path] = known[path][1]
        else:
            todo[path] = stamp

    if todo:
        _save(cache, known)  # now, for what cannot be written should not come out after hours of verifying
    saved = time.monotonic()
    try:
        for path, finding in _verify(root, list(todo), workers, progress):
            findings[path] = finding
            if finding != _CRASHED:  # which may have been the machine's fault (memory): looked at again next time
                known[path] = (todo[path], finding)
            if time.monotonic() - saved > _SAVE_EVERY:
                _save(cache, known)
                saved = time.monotonic()
    finally:
        if todo:
            _save(cache, known)
    in_order = {path: findings[path] for path in paths}
    return Manifest(
        root=root,
        records={path: finding for path, finding in in_order.items() if isinstance(finding, VideoRecord)},
        unreadable={path: finding for path, finding in in_order.items() if isinstance(finding, str)},
        sizes={path: sizes[path] for path, finding in in_order.items() if isinstance(finding, VideoRecord)},
    )


# ---------------------------------------------------------------- verifying


def _verify(root: Path, paths: list[str], workers: int, progress: bool) -> Iterator[tuple[str, Finding]]:
    """(path, finding) for each path, as they get done."""
    with tqdm(total=len(paths), desc="verifying videos", unit="video", disable=not (progress and paths)) as bar:
        found = _verify_in_processes(root, paths, workers) if workers > 1 else ((p, _find(root / p)) for p in paths)
        for path, finding in found:
            bar.update()
            yield path, finding


def _verify_in_processes(root: Path, paths: list[str], workers: int) -> Iterator[tuple[str, Finding]]:
    """A broken video can crash the decoder and with it its process, which ends the whole pool without saying which
    video it was. So work goes out in waves, and after a crash each unfinished one gets a process of its own."""
    pool = _pool(workers)
    try:
        for start in range(0, len(paths), _WAVE * workers):
            wave = paths[start : start + _WAVE * workers]
            futures: dict[str, Future[Finding]] = {}
            with contextlib.suppress(BrokenProcessPool):  # comes from here if a crash is quicker than the last submit
                for path in wave:
                    futures[path] = pool.submit(_find, root / path)
            crashed = [path for path in wave if path not in futures]
            for path, future in futures.items():
                try:
                    finding = future.result()
                except BrokenProcessPool:
                    crashed.append(path)
                else:
                    yield path, finding
            if crashed:
                pool.shutdown()
                pool = _pool(workers)
            for path in crashed:
                yield path, _find_alone(root / path)
    finally:
        pool.shutdown(cancel_futures=True)


def _find(path: Path) -> Finding:
    try:
        return verify_video(path)
    except UnreadableVideo as reason:
        return str(reason)


def _find_alone(path: Path) -> Finding:
    with _pool(1) as pool:
        try:
            return pool.submit(_find, path).result()
        except BrokenProcessPool:
            return _CRASHED


def _pool(workers: int) -> ProcessPoolExecutor:
    # fork, as torch's DataLoader does on Linux: other ways import the main script, and with it torch, in every worker.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))


# ---------------------------------------------------------------- the cache file: path -> (stamp, finding)


def _cache_file(root: Path, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dclr" / "manifests"
    root = root.resolve()
    return cache_dir / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.npz"


def _save(cache: Path, known: dict[str, tuple[Stamp, Finding]]) -> None:
    """Atomically: a reader sees the old file or the new one."""
    stamps = [stamp for stamp, _ in known.values()]
    records = [finding if isinstance(finding, VideoRecord) else None for _, finding in known.values()]
    readable = [record for record in records if record is not None]
    # Timestamps as differences: mostly one number over and over, which compresses to nothing (Kinetics: 72 million).
    pts_steps = [np.diff(record.pts, prepend=np.int64(0)) for record in readable]
    arrays = {
        "version": np.array(_VERSION),
        "paths": packed(list(known)),
        "reasons": packed([finding if isinstance(finding, str) else "" for _, finding in known.values()]),
        "stamps": np.array(stamps, dtype=np.int64).reshape(-1, 2),
        "readable": np.array([record is not None for record in records], dtype=bool),
        "declared": np.array([record.declared for record in readable], dtype=np.int64),
        "sizes": np.array([(record.height, record.width) for record in readable], dtype=np.int64).reshape(-1, 2),
        "seekable": np.array([record.seekable for record in readable], dtype=bool),
        "skippable": np.array([record.skippable for record in readable], dtype=bool),
        "frames": np.array([record.frames for record in readable], dtype=np.int64),
        "pts_steps": np.concatenate([*pts_steps, np.empty(0, dtype=np.int64)]),
        "keyframe_counts": np.array([len(record.keyframes) for record in readable], dtype=np.int64),
        "keyframes": np.concatenate([*(record.keyframes for record in readable), np.empty(0, dtype=np.int64)]),
    }
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the list of verified videos to {cache.parent} ({error.strerror}); "
            "set $XDG_CACHE_HOME to a folder that can be written"
        ) from error


def _load(cache: Path) -> dict[str, tuple[Stamp, Finding]]:
    """What was saved; nothing, with a warning on stderr, where the file is damaged or of another version."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            if file["version"] != _VERSION:
                raise ValueError(f"of version {file['version']}, not {_VERSION}")
            arrays = {name: file[name] for name in file.files}
        return _unpacked_findings(arrays)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"warning: {cache} cannot be used ({error}); the videos are verified anew", file=sys.stderr)
        return {}


def _unpacked_findings(arrays: dict[str, np.ndarray]) -> dict[str, tuple[Stamp, Finding]]:
    steps = np.split(arrays["pts_steps"], np.cumsum(arrays["frames"])[:-1])
    keyframes = np.split(arrays["keyframes"], np.cumsum(arrays["keyframe_counts"])[:-1])
    records = iter(
        VideoRecord(
            frames=int(arrays["frames"][row]),
            declared=int(arrays["declared"][row]),
            height=int(arrays["sizes"][row, 0]),
            width=int(arrays["sizes"][row, 1]),
            pts=np.cumsum(steps[row]),
            keyframes=keyframes[row],
            seekable=bool(arrays["seekable"][row]),
            skippable=bool(arrays["skippable"][row]),
        )
        for row in range(len(arrays["frames"]))
    )
    paths, reasons = unpacked(arrays["paths"]), unpacked(arrays["reasons"])
    return {
        path: ((int(size), int(mtime)), next(records) if readable else reason)
        for path, reason, (size, mtime), readable in zip(
            paths, reasons, arrays["stamps"], arrays["readable"], strict=True
        )
    }
