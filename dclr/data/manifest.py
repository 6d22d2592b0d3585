"""One complete decode of every video, once: what is readable, how long it is, where it can be sought.

The findings are kept in one cache file a data folder, outside of it (data folders are often read-only), and found again
by path, file size and modification time: only new and changed files are decoded at the next start.
"""

import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dclr.data.decode import MOST_PIXELS, UnreadableVideo, VideoRecord, verify_video
from dclr.data.decoder_process import TICK, TIMEOUT, DecoderDied, DecoderProcess, report_video
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError

_VERSION = 2
"""Of the cache file's format and of what `verify_video` finds: raise it when either changes."""

_SAVE_EVERY = 300.0
"""Seconds between saves while verifying, so that a machine lost after hours costs minutes."""

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
    root: Path,
    paths: Sequence[str],
    *,
    workers: int,
    progress: bool = True,
    cache_dir: Path | None = None,
    timeout: float = TIMEOUT,
) -> Manifest:
    """Verifies the videos `root / path` that the cache does not know yet, in `workers` processes of their own.

    A video on which the decoder crashes, or gives no frame for `timeout` seconds, is unreadable; alone of all findings this is not kept.

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
        for path, finding in _verify(root, list(todo), workers, timeout, progress):
            if isinstance(
                finding, DecoderDied
            ):  # may have been the machine's fault (memory, a slow disk): looked at again next time
                findings[path] = str(finding)
                known.pop(path, None)
            else:
                findings[path] = finding
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


def _verify(
    root: Path, paths: list[str], workers: int, timeout: float, progress: bool
) -> Iterator[tuple[str, Finding | DecoderDied]]:
    """(path, finding) for each path, as they get done. Each worker has one video at a time, so it is known which one it died on."""
    children = [DecoderProcess(lambda path: _find(root / path), timeout) for _ in range(min(workers, len(paths)))]
    waiting, asked, tried_twice = deque(paths), dict[DecoderProcess, str](), set[str]()
    try:
        with tqdm(total=len(paths), desc="verifying videos", unit="video", disable=not (progress and paths)) as bar:
            while waiting or asked:
                for child in children:
                    if child not in asked and waiting:
                        asked[child] = waiting.popleft()
                        child.request(asked[child])
                ready = wait([child.connection for child in asked], TICK)
                for child, path in list(asked.items()):
                    if child.connection not in ready:
                        child.end_if_stalled()
                        continue
                    del asked[child]
                    finding: Finding | DecoderDied
                    try:
                        finding = child.answer()
                    except DecoderDied as death:
                        if death.out_of_memory and path not in tried_twice:
                            tried_twice.add(path)
                            waiting.append(path)  # last, when the others may have let go of their memory
                            continue
                        finding = death
                    bar.update()
                    yield path, finding
    finally:
        for child in children:
            child.stop()


def _find(path: Path) -> Finding:
    report_video(0)
    try:
        return verify_video(path)
    except UnreadableVideo as reason:
        return str(reason)


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
        "paths": pack_strings(list(known)),
        "reasons": pack_strings([finding if isinstance(finding, str) else "" for _, finding in known.values()]),
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
    except Exception as error:  # whatever a damaged file makes of its readers
        print(f"warning: {cache} cannot be used ({error}); the videos are verified anew", file=sys.stderr)
        return {}


def _unpacked_findings(arrays: dict[str, np.ndarray]) -> dict[str, tuple[Stamp, Finding]]:
    _check_numbers(arrays)
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
    paths, reasons = unpack_strings(arrays["paths"]), unpack_strings(arrays["reasons"])
    return {
        path: ((int(size), int(mtime)), next(records) if readable else reason)
        for path, reason, (size, mtime), readable in zip(
            paths, reasons, arrays["stamps"], arrays["readable"], strict=True
        )
    }


def _check_numbers(arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError where they contradict each other: whoever reads by them would read frames that are not there."""
    frames, marks, sizes = arrays["frames"], arrays["keyframe_counts"], arrays["sizes"]
    count = np.count_nonzero(arrays["readable"])
    if not (
        frames.shape == marks.shape == arrays["declared"].shape == arrays["seekable"].shape == (count,)
        and arrays["skippable"].shape == (count,)
        and sizes.shape == (count, 2)
        and all(array.dtype.kind in "iub" for array in arrays.values())
        and (frames > 0).all()
        and (marks >= 0).all()
        and frames.sum() == len(arrays["pts_steps"])
        and marks.sum() == len(arrays["keyframes"])
        and (arrays["keyframes"] >= 0).all()
        and (arrays["keyframes"] < np.repeat(frames, marks)).all()
        and (sizes > 0).all()
        and (sizes <= MOST_PIXELS // sizes[:, ::-1]).all()
    ):
        raise ValueError("its numbers contradict each other")
