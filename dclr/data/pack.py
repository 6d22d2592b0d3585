"""train.py pack: decodes every video of a data set once, and writes it, small, into a store (dclr/data/store.py).

The plan, which video goes where, follows from what is known of the videos beforehand. So each shard is a piece of work of its own: it is
written aside, brought down to the disk, renamed, and then vouched for by a file of checksums. However often packing is interrupted, shards
that are vouched for stay, the others are made, and every byte of the store is what an uninterrupted run would have written.
"""

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dclr.config import DataConfig
from dclr.data import decoder_process, store
from dclr.data.catalog import catalog_arrays, official_splits, open_catalog
from dclr.data.datasets import DEMO_VIDEOS, make_demo
from dclr.data.decode import (
    UnreadableVideo,
    VideoRecord,
    YuvFrames,
    resized_planes,
    verify_video,
)
from dclr.data.encode import compact_record, compact_video
from dclr.data.manifest import load_manifest
from dclr.data.store import Arrays, shard_name
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError
from dclr.files import sync_folder

SHARD_BYTES = 2**30
"""Of planes, also where a compact store is written: what a worker loses when it is killed is then under a minute of work either way."""

COMPACT_SHARE = 0.12
"""Bytes a pixel of a compact store, for the estimate: measured 0.07 on genuine UCF101 clips, 0.12 on Kinetics'."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to write a shard."""

    root: Path  # of the videos
    folder: Path  # of the store
    plan: Arrays
    digest: bytes  # of the plan, which checksums of shards refer to
    paths: list[str]  # by row
    records: dict[str, VideoRecord]  # by path

    @property
    def compact(self) -> bool:
        return bool(self.plan["compact"])

    @property
    def shards(self) -> list[np.ndarray]:
        """The rows of each."""
        return store.rows_by_shard(self.plan["shards"])

    def shard(self, number: int) -> Path:
        return self.folder / shard_name(number, self.compact)


def pack(data: DataConfig, out: str = "", short_side: int = store.SHORT_SIDE, compact: bool = False) -> None:
    """Prints what the store will take, and unless `out` is empty, writes it there, or goes on where an earlier call was stopped.

    Raises UserError: nothing to pack, an output folder that holds something else or was begun with other videos or settings, too
    little space, a disk that cannot be written.
    """
    if short_side < 16 or short_side % 2:
        raise UserError(f"--short-side is {short_side}, but must be even and at least 16 (the smallest --crop-size)")
    if not data.data:
        make_demo()
    source, folder = Path(data.data or DEMO_VIDEOS), Path(out)
    if store.is_store(source):
        raise UserError(f"--data {source} is a packed store already: give the videos that it was made from")
    catalogs = {number: open_catalog(source, number, data.allow_outside) for number in official_splits(source)}
    root = next(iter(catalogs.values())).root
    if out and folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out} lies in the data folder, where it could be taken for videos: give another place")

    lists = catalog_arrays(catalogs)
    paths = unpack_strings(lists["paths"])
    manifest = load_manifest(root, paths, workers=max(1, data.workers), timeout=data.video_timeout)
    if not manifest.records:
        first, reason = next(iter(manifest.unreadable.items()))
        raise UserError(f"{root}: none of its {len(paths)} videos can be read ({first}: {reason}); see train.py check")
    reasons = [manifest.unreadable.get(path, "") for path in paths]
    plan = make_plan(source, root, lists, manifest.records, reasons, short_side, compact)
    print("\n".join(describe(root, plan)))
    if not out:
        print("nothing is written yet: give --out STORE, and --compact if it should be the smaller one")
        return

    with writable(folder), locked(folder):
        digest = begin(folder, plan)
        job = Job(root, folder, plan, digest, paths, manifest.records)
        todo = [number for number in range(len(job.shards)) if finished(job, number) is None]
        check_space(job, todo)
        if len(todo) < len(job.shards):
            print(f"{len(job.shards) - len(todo)} of {len(job.shards)} shards are there already")
        write_shards(job, todo, max(1, data.workers), data.video_timeout)
        failed = write_index(job)
    for path, reason in failed.items():
        print(f"warning: {path} could not be packed ({reason}); it is listed as unreadable", file=sys.stderr)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"packed {len(manifest.records) - len(failed)} videos into {folder}, {amount(size)}: train.py --data {folder}"
    )


# ---------------------------------------------------------------- the plan


def make_plan(
    source: Path,
    root: Path,
    lists: Arrays,
    records: dict[str, VideoRecord],
    reasons: list[str],  # by row; empty: readable
    short_side: int,
    compact: bool,
) -> Arrays:
    """Every array that the index has, but for what is only known once a shard is written (see `write_shard`)."""
    paths = unpack_strings(lists["paths"])
    frames, heights, widths, sizes, shards, offsets = np.zeros((6, len(paths)), dtype=np.int64)
    stamps = np.zeros((len(paths), 2), dtype=np.int64)
    shard, filled = 0, 0
    for row, path in enumerate(paths):
        if reasons[row]:
            shards[row] = -1
            continue
        record = records[path]
        status = (root / path).stat()
        stamps[row] = status.st_size, status.st_mtime_ns
        frames[row] = record.frames
        heights[row], widths[row] = small_size(record.height, record.width, short_side)
        sizes[row] = record.frames * planes_size(heights[row], widths[row])
        if filled and filled + sizes[row] > SHARD_BYTES:
            shard, filled = shard + 1, 0
        shards[row], offsets[row] = shard, filled
        filled += int(sizes[row])
    return {
        "version": np.array(store.VERSION),
        "compact": np.array(compact),
        "short_side": np.array(short_side),
        "source": pack_strings([os.path.abspath(source)]),
        **lists,
        "reasons": pack_strings(reasons),
        "stamps": stamps,
        "frames": frames,
        "heights": heights,
        "widths": widths,
        "sizes": sizes,
        "shards": shards,
        "offsets": offsets,
    }


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The size in which a video is stored: never enlarged; the longer side is rounded to an even number, so that chroma planes are
    exactly half as large and no colour shifts against its brightness."""
    short, long = min(height, width), max(height, width)
    if short <= short_side:
        return height, width
    long = 2 * round(long * short_side / short / 2)
    return (short_side, long) if height <= width else (long, short_side)


def planes_size(height: int, width: int) -> int:
    """Bytes of a frame in 4:2:0."""
    return int(height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2))


def compact_size(plan: Arrays, rows: np.ndarray | slice = slice(None)) -> int:
    """About how many bytes these videos take as small video files."""
    return int(COMPACT_SHARE * np.sum((plan["frames"] * plan["heights"] * plan["widths"])[rows]))


def describe(root: Path, plan: Arrays) -> list[str]:
    """The lines that `pack` prints before it writes anything."""
    stored = plan["shards"] >= 0
    (layout,) = unpack_strings(plan["layout"])
    numbers = plan["numbers"].tolist()
    splits = f" (splits {', '.join(map(str, numbers))})" if len(numbers) > 1 else ""
    lines = [
        f"{root}: {layout}{splits}, {stored.sum()} videos, {plan['frames'].sum():,} frames, short side {plan['short_side']}",
        f"  the videos themselves            {amount(plan['stamps'][:, 0].sum()):>12}",
        f"  as planes, read by copying       {amount(plan['sizes'].sum()):>12}",
        f"  --compact, small, re-encoded     {amount(compact_size(plan)):>12} (about)",
    ]
    if not stored.all():
        lines.append(f"  {(~stored).sum()} videos cannot be read and are left out: train.py check names them")
    return lines


def amount(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# ---------------------------------------------------------------- the folder


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Makes the folder; a disk that fails from here on is a line that says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(cannot_write(folder, error)) from error


def cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"cannot write to {folder}: {error.strerror}; what is finished stays, run the same command once that is mended"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One pack a folder at a time. Workers inherit the lock, so that it also waits for those of a killed process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another train.py pack is writing to {folder}: wait until it has ended") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def begin(folder: Path, plan: Arrays) -> bytes:
    """Writes the plan, or compares it with the one that is there, and clears away half-written files. Returns the plan's digest.

    Raises UserError where they differ, or where the folder holds something else.
    """
    if (folder / store.PLAN).is_file():
        before, digest = store.load_plan(folder)
        if difference := difference_of(before, plan):
            raise UserError(
                f"{folder} was begun with {difference}: pack as before, or into another folder (or delete this one)"
            )
    elif any(not entry.name.startswith(("dclr-", "shard-")) for entry in folder.iterdir()):
        raise UserError(f"--out {folder} holds something that is not a packed store: give an empty or a new folder")
    else:
        store.check_plan(folder / store.PLAN, plan)  # or no one could open what is packed by it
        digest = store.save_arrays(folder / store.PLAN, plan)
    for leftover in folder.glob("*.part"):
        remove(leftover)
    return digest


def difference_of(before: Arrays, now: Arrays) -> str:
    """What a store was begun with that is otherwise now, as the end of a sentence; empty: nothing that matters."""
    if before["compact"] != now["compact"]:
        return "--compact" if before["compact"] else "planes, not --compact"
    if before["short_side"] != now["short_side"]:
        return f"--short-side {before['short_side']}, not {now['short_side']}"
    paths, paths_now = unpack_strings(before["paths"]), unpack_strings(now["paths"])
    if odd := sorted(set(paths) ^ set(paths_now)):
        return f"{len(paths)} videos, not {len(paths_now)} (such as {odd[0]})"
    if paths == paths_now:
        for name, what in (("stamps", "size or date"), ("frames", "number of frames"), ("reasons", "readability")):
            old, new = before[name], now[name]
            if name == "reasons":
                old, new = np.array(unpack_strings(old)), np.array(unpack_strings(new))
            if changed := [path for path, *pair in zip(paths, old, new, strict=True) if not np.array_equal(*pair)]:
                more = f", as in {len(changed) - 1} more" if len(changed) > 1 else ""
                return f"another {changed[0]} (its {what} has changed{more})"
    lists = ("layout", "classes", "paths", "numbers", "missing", "missing_number")
    if not all(np.array_equal(before[name], now[name]) for name in now if name in lists or name.startswith("entry_")):
        return "other lists of classes or splits"
    if not all(np.array_equal(before[name], now[name]) for name in now if name != "source"):
        return "another division into shards"
    return ""


def check_space(job: Job, todo: list[int]) -> None:
    """Raises UserError: what is left to write does not fit on the disk."""
    rows = np.concatenate([job.shards[number] for number in todo]) if todo else np.empty(0, dtype=np.int64)
    needed = compact_size(job.plan, rows) if job.compact else int(job.plan["sizes"][rows].sum())
    free = shutil.disk_usage(job.folder).free
    if needed > free:
        about = "about " if job.compact else ""
        smaller = "" if job.compact else f"; --compact takes about {amount(compact_size(job.plan))}"
        raise UserError(
            f"{job.folder}: {about}{amount(needed)} are still to be written, and {amount(free)} are free{smaller}"
        )


def remove(path: Path) -> None:
    """A file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- shards


def finished(job: Job, number: int) -> Arrays | None:
    """What `write_shard` found, where the shard is there and its size is right. One that is not is named: it is made again."""
    vouched = job.folder / f"shard-{number:05d}.npz"
    if not vouched.is_file():
        return None
    rows = job.shards[number]
    try:
        found, _ = store.load_arrays(vouched)
        ours = "plan" in found and found["plan"].tobytes() == job.digest
        if ours:
            store.check_shard(vouched, found, None if job.compact else job.plan["sizes"][rows], len(rows))
    except UserError:
        print(f"warning: {vouched} is damaged: its shard is made again", file=sys.stderr)
        return None
    if not ours:
        print(f"warning: {vouched} belongs to another store: its shard is made again", file=sys.stderr)
        return None
    sizes = job.plan["sizes"].copy()
    sizes[rows] = found["sizes"]
    if fault := store.size_fault(job.folder, job.compact, number, rows, sizes):
        print(f"warning: {job.shard(number)} {fault}: it is made again", file=sys.stderr)
        return None
    return found


def write_shard(job: Job, number: int, count: Any) -> None:
    """One shard, then its checksums; `count` is told each frame that is done. Raises OSError."""
    rows, shard = job.shards[number], job.shard(number)
    aside = shard.with_name(f"{shard.name}.part")
    remove(aside)
    found: Arrays = {
        "version": np.array(store.VERSION),
        "plan": np.frombuffer(job.digest, np.uint8),
        "sizes": np.zeros(len(rows), dtype=np.int64),
        "crc32": np.zeros(len(rows), dtype=np.uint32),
        "bt709": np.zeros(len(rows), dtype=bool),
        "full_range": np.zeros(len(rows), dtype=bool),
    }
    reasons = [""] * len(rows)
    write = write_small_videos if job.compact else write_planes
    for place, written in enumerate(write(job, rows, aside, count)):
        if isinstance(written, str):
            reasons[place] = written
        else:
            names = ("sizes", "crc32", "bt709", "full_range")
            for name, value in zip(names, written, strict=True):
                found[name][place] = value
    if not job.compact:
        found["sizes"] = job.plan["sizes"][rows]  # those of failed videos too: their place stays empty
    remove(shard)  # a folder cannot be renamed onto another
    os.rename(aside, shard)
    sync_folder(job.folder)
    store.save_arrays(job.folder / f"shard-{number:05d}.npz", {**found, "reasons": pack_strings(reasons)})


Written = tuple[int, int, bool, bool] | str
"""Bytes, their crc32, bt709, full_range; or the reason why a video cannot be packed."""


def write_planes(job: Job, rows: np.ndarray, aside: Path, count: Any) -> Iterator[Written]:
    """The videos' planes into one file, each at the place that the plan gives it."""
    with aside.open("wb") as file:
        for row in rows.tolist():
            file.seek(job.plan["offsets"][row])
            size, checksum, colours = 0, 0, Colours()
            try:
                for frame in small_frames(job, row, count):
                    colours.see(frame)
                    for plane in (frame.y, frame.u, frame.v):
                        content = plane.tobytes()
                        size += file.write(content)
                        checksum = zlib.crc32(content, checksum)
            except UnreadableVideo as reason:
                file.truncate(job.plan["offsets"][row])
                yield str(reason)
            else:
                yield size, checksum, colours.bt709, colours.full_range
        file.truncate(job.plan["sizes"][rows].sum())
        file.flush()
        os.fsync(file.fileno())


def write_small_videos(job: Job, rows: np.ndarray, aside: Path, count: Any) -> Iterator[Written]:
    """Each video into a file of its own, in one folder, and decoded once more: its frames must be as many as the source's, in the order
    and with the keyframes that `compact_record` promises to training."""
    aside.mkdir()
    for row in rows.tolist():
        height, width = int(job.plan["heights"][row]), int(job.plan["widths"][row])
        file, colours = aside / store.compact_name(row), Colours()
        try:
            content = compact_video(colours.watch(small_frames(job, row, count)), height, width)
            with file.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            check_small_video(file, compact_record(int(job.plan["frames"][row]), height, width))
        except UnreadableVideo as reason:
            file.unlink(missing_ok=True)
            yield str(reason)
        else:
            yield len(content), zlib.crc32(content), colours.bt709, colours.full_range
    sync_folder(aside)


def small_frames(job: Job, row: int, count: Any) -> Iterator[YuvFrames]:
    path = job.paths[row]
    height, width = int(job.plan["heights"][row]), int(job.plan["widths"][row])
    decoder_process.report_video(row)
    try:
        for frame in resized_planes(job.root / path, job.records[path], height, width):
            yield frame
            with count.get_lock():
                count.value += 1
    finally:
        decoder_process.report_video(None)


def check_small_video(file: Path, promised: VideoRecord) -> None:
    """Raises UnreadableVideo where a complete decode finds anything else than promised."""
    try:
        record = verify_video(file)
    except UnreadableVideo as reason:
        raise UnreadableVideo(f"what was made of it cannot be read: {reason}") from reason
    for name, value in vars(promised).items():
        if not np.array_equal(value, getattr(record, name)):
            raise UnreadableVideo(f"what was made of it is not as it should be ({name})")


class Colours:
    """The matrix and range of a video, which the index holds once for all its frames."""

    def __init__(self) -> None:
        self.seen: tuple[bool, bool] | None = None

    def see(self, frame: YuvFrames) -> None:
        """Raises UnreadableVideo: they are not those of the frames before."""
        if self.seen not in (None, (frame.bt709, frame.full_range)):
            raise UnreadableVideo("its colour matrix or range changes on the way, which a store cannot hold")
        self.seen = (frame.bt709, frame.full_range)

    def watch(self, frames: Iterator[YuvFrames]) -> Iterator[YuvFrames]:
        for frame in frames:
            self.see(frame)
            yield frame

    @property
    def bt709(self) -> bool:
        return self.seen is not None and self.seen[0]

    @property
    def full_range(self) -> bool:
        return self.seen is not None and self.seen[1]


def write_index(job: Job) -> dict[str, str]:
    """The index, last of all. Returns the videos that failed while they were packed, and why."""
    index = dict(job.plan)
    size = len(job.paths)
    index |= {
        "crc32": np.zeros(size, dtype=np.uint32),
        "bt709": np.zeros(size, bool),
        "full_range": np.zeros(size, bool),
    }
    index["sizes"] = job.plan["sizes"].copy()
    reasons = unpack_strings(job.plan["reasons"])
    failed = {}
    for number, rows in enumerate(job.shards):
        found = finished(job, number)
        if found is None:
            raise UserError(f"{job.shard(number)} is gone again: run the same command once more")
        for name in ("sizes", "crc32", "bt709", "full_range"):
            index[name][rows] = found[name]
        for row, reason in zip(rows.tolist(), unpack_strings(found["reasons"]), strict=True):
            if reason:
                reasons[row] = failed[job.paths[row]] = reason
    index["reasons"] = pack_strings(reasons)
    if job.compact:
        index["offsets"] = np.zeros(size, dtype=np.int64)
    store.save_arrays(job.folder / store.INDEX, index)
    return failed


# ---------------------------------------------------------------- workers


def write_shards(job: Job, todo: list[int], workers: int, timeout: float) -> None:
    """Each of these shards, in processes of their own; a bar counts frames. Raises UserError: a worker died, or decodes no frame for
    `timeout` seconds. Videos were verified in the same way before, so both are the exception, and end the work."""
    context = multiprocessing.get_context("fork")  # as in dclr.data.manifest
    next_place, count, messages = context.Value("q", 0), context.Value("q", 0), context.SimpleQueue()
    progresses = [decoder_process.Progress() for _ in range(min(workers, len(todo)))]
    processes = [
        context.Process(target=_work, args=(job, todo, next_place, count, messages, progress), daemon=True)
        for progress in progresses
    ]
    frames = sum(int(job.plan["frames"][job.shards[number]].sum()) for number in todo)
    try:
        for process in processes:
            process.start()
        with tqdm(total=frames, desc="packing", unit="frame", unit_scale=True, disable=not todo) as bar:
            running = processes
            while running:
                wait([process.sentinel for process in running], timeout=0.3)
                running = [process for process in processes if process.is_alive()]
                bar.update(count.get_obj().value - bar.n)  # without its lock, which a dead worker may hold
                _check(job, processes, messages)
                _check_progress(job, progresses, timeout)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _check(job: Job, processes: Sequence[BaseProcess], messages: Any) -> None:
    """Raises UserError where a worker has ended before its work did."""
    if not messages.empty():
        raise UserError(messages.get())
    if any(process.exitcode not in (None, 0) for process in processes):
        raise UserError(
            f"a worker process died while it packed into {job.folder} (out of memory?); what is finished stays: "
            "run the same command again, perhaps with fewer --workers"
        )


def _check_progress(job: Job, progresses: Sequence[decoder_process.Progress], timeout: float) -> None:
    """Raises UserError where a worker that is reading a video does not get on."""
    for progress in progresses:
        idle, row = progress.idle(), progress.video
        if row is not None and idle > timeout:
            reason = decoder_process.describe(decoder_process.STALLED, timeout)
            raise UserError(
                f"{job.root / job.paths[row]}: {reason}, though it did before; what is finished in {job.folder} stays: "
                "run the same command again, perhaps with a higher --video-timeout"
            )


def _work(
    job: Job, todo: list[int], next_place: Any, count: Any, messages: Any, progress: decoder_process.Progress
) -> None:
    """A worker: takes the next shard until there is none."""
    progress.attach()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            with next_place.get_lock():
                place = next_place.value
                next_place.value += 1
            if place >= len(todo):
                return
            write_shard(job, todo[place], count)
    except OSError as error:
        messages.put(cannot_write(job.folder, error))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers; without this they would go on to write beside those of the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
