"""Verification: one complete decode of every video finds what is readable, how long it is and where seeking works.

The findings are kept in one cache file per data folder, outside of it because data folders are often read-only. They
are found again by path, file size and modification time. So only new and changed files are decoded at the next start.
"""

import hashlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dclr.data.decode import MOST_PIXELS, UnreadableVideo, VideoRecord, verify_video
from dclr.data.decoder_process import TIMEOUT, DecoderDied, answers, report_video
from dclr.data.display import Display, are_displays
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError
from dclr.progress import ProgressBar

_VERSION = 5
"""Version of the cache file's format and of what `verify_video` finds: raise it when either changes."""

_SAVE_EVERY = 300.0
"""Seconds between saves while verifying, so that a crash after hours loses minutes."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that schedulers and terminals send before they end a process."""

Finding = VideoRecord | str
"""The record of a video, or the reason why it cannot be read."""

Stamp = tuple[int, int]
"""File size in bytes and modification time in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The findings about each requested video. A video is either in `records` or in `unreadable`, in the requested
    order."""

    root: Path
    records: dict[str, VideoRecord]
    """By path relative to root."""
    unreadable: dict[str, str]
    """Path relative to root -> reason in one line."""
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
    """Verify the videos `root / path` that the cache does not know, in `workers` decoder processes.

    The cache is also saved when the work is interrupted, by Ctrl-C or by a signal of `_SIGNALS`. The signal then ends
    this process as it would without this function. The cache keeps the findings of videos that `paths` does not name.

    Args:
        cache_dir: the folder of the cache, by default $XDG_CACHE_HOME/dclr/manifests or ~/.cache/dclr/manifests.
        timeout: seconds without a frame after which a decoder process is killed. Its video is then unreadable, like one
            on which the decoder crashes. These findings are not cached, because the machine may have caused them.

    Raises:
        UserError: the cache cannot be written.
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
        _save(cache, known)  # now, so that a cache that cannot be written is noticed before hours of verifying
    saved = time.monotonic()
    with _recorded_signals() as received:
        try:
            for path, finding in _verify(root, list(todo), workers, timeout, progress, received):
                if isinstance(finding, DecoderDied):
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


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Record the first of `_SIGNALS` instead of ending this process, and send it again at the end.

    A signal that has a handler already, or is ignored, is not touched. Only the main thread may set handlers, so in
    another thread nothing is recorded.
    """
    received: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    recorded = [number for number in _SIGNALS if in_main_thread and signal.getsignal(number) == signal.SIG_DFL]
    for number in recorded:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number in recorded:
            signal.signal(number, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


def _verify(
    root: Path, paths: list[str], workers: int, timeout: float, progress: bool, received: list[int]
) -> Iterator[tuple[str, Finding | DecoderDied]]:
    """Yield (path, finding) for each path, in the order in which they are finished.

    Raises:
        SystemExit: soon after a signal is in `received`.
        UserError: there is too little memory.
    """
    waiting, tried_twice = deque(paths), set[str]()

    def tick() -> None:
        bar.advance(0)
        if received:
            name = signal.Signals(received[0]).name
            print(f"stopped by {name}: the videos verified so far are not decoded again", file=sys.stderr, flush=True)
            raise SystemExit(128 + received[0])

    with ProgressBar(len(paths), "verifying videos", "video", shown=bool(progress and paths)) as bar:
        findings = answers(lambda path: _find(root / path), waiting, workers, timeout, tick)
        try:
            for path, finding in findings:
                if isinstance(finding, DecoderDied) and finding.out_of_memory and path not in tried_twice:
                    tried_twice.add(path)
                    waiting.append(path)  # last, when the other processes may have freed their memory
                    continue
                bar.advance()
                yield path, finding
        except MemoryError:
            raise UserError(f"{root}: a process that verifies videos has too little memory: lower --workers") from None


def _find(path: Path) -> Finding:
    report_video(0)  # any number: `answers` knows the path
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
    """Write the cache file under another name, then rename it. So a reader never sees half a file. Raises UserError."""
    stamps = [stamp for stamp, _ in known.values()]
    records = [finding if isinstance(finding, VideoRecord) else None for _, finding in known.values()]
    readable = [record for record in records if record is not None]
    # Differences of timestamps are mostly the same number, which compresses to almost nothing (Kinetics: 72 million).
    pts_steps = [np.diff(record.pts, prepend=np.int64(0)) for record in readable]
    arrays = {
        "version": np.array(_VERSION),
        "paths": pack_strings(list(known)),
        "reasons": pack_strings(
            [finding if isinstance(finding, str) else finding.damage for _, finding in known.values()]
        ),
        "stamps": np.array(stamps, dtype=np.int64).reshape(-1, 2),
        "readable": np.array([record is not None for record in records], dtype=bool),
        "declared": np.array([record.declared for record in readable], dtype=np.int64),
        "sizes": np.array([(record.height, record.width) for record in readable], dtype=np.int64).reshape(-1, 2),
        "seekable": np.array([record.seekable for record in readable], dtype=bool),
        "skippable": np.array([record.skippable for record in readable], dtype=bool),
        "displays": np.array([record.display for record in readable], dtype=np.int64).reshape(-1, 3),
        "oblique": np.array([record.oblique for record in readable], dtype=bool),
        "interlaced": np.array([record.interlaced for record in readable], dtype=bool),
        "video_streams": np.array([record.video_streams for record in readable], dtype=np.int64),
        "cut_from": np.array([record.cut_from for record in readable], dtype=np.int64),
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
    """Return the saved findings. A damaged file, or one of another version, gives none and a warning on stderr."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            if file["version"] != _VERSION:
                raise ValueError(f"it is of version {file['version']}, not {_VERSION}")
            arrays = {name: file[name] for name in file.files}
        return _unpacked_findings(arrays)
    except FileNotFoundError:
        return {}
    except Exception as error:  # readers raise many kinds of errors on a damaged file
        print(f"warning: {cache} cannot be used ({error}); the videos are verified again", file=sys.stderr)
        return {}


def _unpacked_findings(arrays: dict[str, np.ndarray]) -> dict[str, tuple[Stamp, Finding]]:
    _check_numbers(arrays)
    steps = np.split(arrays["pts_steps"], np.cumsum(arrays["frames"])[:-1])
    keyframes = np.split(arrays["keyframes"], np.cumsum(arrays["keyframe_counts"])[:-1])
    paths, reasons = unpack_strings(arrays["paths"]), unpack_strings(arrays["reasons"])
    damages = [reason for reason, readable in zip(reasons, arrays["readable"], strict=True) if readable]
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
            display=Display(*arrays["displays"][row].tolist()),
            oblique=bool(arrays["oblique"][row]),
            interlaced=bool(arrays["interlaced"][row]),
            video_streams=int(arrays["video_streams"][row]),
            cut_from=int(arrays["cut_from"][row]),
            damage=damages[row],
        )
        for row in range(len(arrays["frames"]))
    )
    return {
        path: ((int(size), int(mtime)), next(records) if readable else reason)
        for path, reason, (size, mtime), readable in zip(
            paths, reasons, arrays["stamps"], arrays["readable"], strict=True
        )
    }


def _check_numbers(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError if numbers of the cache file contradict each other. Frames could not be
    found with such a record."""
    frames, marks, sizes = arrays["frames"], arrays["keyframe_counts"], arrays["sizes"]
    count = np.count_nonzero(arrays["readable"])
    if not (
        frames.shape == marks.shape == arrays["declared"].shape == arrays["seekable"].shape == (count,)
        and arrays["skippable"].shape == arrays["oblique"].shape == arrays["interlaced"].shape == (count,)
        and arrays["video_streams"].shape == arrays["cut_from"].shape == (count,)
        and arrays["displays"].shape == (count, 3)
        and are_displays(arrays["displays"])
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
