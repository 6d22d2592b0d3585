"""Pack a data set (train.py pack): decode every video once and write it, small, into a store (dclr/data/store.py).

The plan says which video goes where. It depends only on what is known of the videos before packing. So each shard can
be written independently: it is written under a temporary name, synced to the disk and renamed, and then a file of its
checksums is written. If packing is interrupted, shards with checksums stay and the others are written again. Every byte
of the finished store is the same as without the interruption.

Several processes, also on several machines, may write one store. A process writes a shard only while it holds the
shard's lock file (dclr/lock.py), and each process ends when all shards are complete. The lock of the folder covers
the plan at the beginning and the index at the end.
"""

import contextlib
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dclr.config import DataConfig, is_url
from dclr.data import decoder_process, store, store_damage, store_files, store_validation
from dclr.data.catalog import catalog_arrays, describe_reading, describe_warnings
from dclr.data.datasets import DEMO_VIDEOS, make_demo, official_splits, open_catalog
from dclr.data.decode import UnreadableVideo, VideoRecord, YuvFrames, resized_planes, verify_video
from dclr.data.decoder_process import DecoderDied
from dclr.data.display import AS_CODED, Display, collect_displays
from dclr.data.encode import compact_record, compact_video
from dclr.data.manifest import load_manifest
from dclr.data.remote import data_path
from dclr.data.store_files import Arrays, checksums_name, frame_bytes, shard_name
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError, printable
from dclr.files import sync_folder
from dclr.lock import LOCK, Lock, folder_lock
from dclr.progress import ProgressBar, write_line

SHARD_BYTES = 2**30
"""Most bytes of planes in a shard, also of a compact store. A worker that is killed loses less than a minute of work
either way."""

WAIT_S = 0.5
"""Seconds between two looks at the shards that other processes write."""

COMPACT_SHARE = 0.12
"""Bytes per pixel of a compact store, for the estimate: measured 0.07 on genuine UCF101 clips, 0.12 on Kinetics'."""


LOCK_SUFFIX = ".lock"
"""Suffix of the lock file of a shard. The finished store has none."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to write a shard."""

    root: Path
    """The folder of the videos."""
    folder: Path
    """The folder of the store."""
    plan: Arrays
    digest: bytes
    """SHA-256 of the plan, which the checksums of each shard refer to."""
    paths: list[str]
    """The paths of the videos, by row."""
    records: Mapping[str, VideoRecord]
    """The records of the readable videos, by path."""

    @property
    def compact(self) -> bool:
        return bool(self.plan["compact"])

    @property
    def shards(self) -> list[np.ndarray]:
        """The rows of each shard."""
        return store_files.rows_by_shard(self.plan["shards"])

    def shard(self, number: int) -> Path:
        return self.folder / shard_name(number, self.compact)

    def checksums(self, number: int) -> Path:
        return self.folder / checksums_name(number)

    def lock(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}{LOCK_SUFFIX}"


def pack(data: DataConfig, out: str = "", short_side: int = store_files.SHORT_SIDE, compact: bool = False) -> None:
    """Print how large the store will be. Unless `out` is empty, write the store there, or what is missing of it.

    Other processes may write the same store at the same time. The function returns when the store is complete.

    Args:
        short_side: pixels of a video's shorter side in the store.
        compact: store small video files instead of planes.

    Raises:
        UserError: there is nothing to pack, the output folder holds something else or was begun with other videos or
            settings, there is too little space, or the disk cannot be written.
    """
    if short_side < 16 or short_side % 2:
        raise UserError(f"--short-side is {short_side}, but must be even and at least 16 (the smallest --crop-size)")
    if is_url(out):
        raise UserError(f"--out is {out}, but must be a local folder: pack there, then upload the folder")
    if not data.data:
        make_demo()
    source, folder = data_path(data.data or str(DEMO_VIDEOS)), Path(out)
    if store.is_store(source):
        raise UserError(f"--data {source} is a packed store already: give the videos that it was made from")
    catalogs = {number: open_catalog(source, number, data.allow_outside) for number in official_splits(source)}
    root = next(iter(catalogs.values())).root
    if out and folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out} lies in the data folder, where it could be taken for videos: give another folder")
    if out and folder.exists():  # refused before hours of verifying
        with writable(folder):
            check_folder(folder)

    lists = catalog_arrays(catalogs)
    paths = unpack_strings(lists["paths"])
    manifest = load_manifest(root, paths, workers=max(1, data.workers), timeout=data.video_timeout)
    if not manifest.records:
        first, reason = next(iter(manifest.unreadable.items()))
        raise UserError(f"{root}: none of its {len(paths)} videos can be read ({first}: {reason}); see train.py check")
    reasons = [manifest.unreadable.get(path, "") for path in paths]
    plan = make_plan(source, root, lists, manifest.records, reasons, short_side, compact)
    print("\n".join(describe(root, plan)))
    found = [line for each in catalogs.values() for line in (*describe_reading(each), *describe_warnings(each))]
    for line in dict.fromkeys(found):  # several splits may have the same line
        print(f"  {line}")
    if not out:
        print("nothing is written yet: give --out STORE, and --compact if it should be the smaller one")
        return

    with writable(folder):
        with folder_lock(folder, wait=True):
            digest = write_plan(folder, plan)
        job = Job(root, folder, plan, digest, paths, manifest.records)
        todo = []
        for number in range(len(job.shards)):
            complete, fault = finished(job, number)
            if complete is None:
                todo.append(number)
            if fault:
                print(f"warning: {fault}", file=sys.stderr)
        check_space(job, todo)
        if len(todo) < len(job.shards):
            print(f"{len(job.shards) - len(todo)} of {len(job.shards)} shards are there already")
        write_shards(job, todo, max(1, data.workers), data.video_timeout)
        with folder_lock(folder, wait=True):
            failed = write_index(job)
            size = store_bytes(folder)
    for path, reason in failed.items():
        shown = f"{printable(path)} could not be packed ({printable(reason)})"
        print(f"warning: {shown}; it is listed as unreadable", file=sys.stderr)
    print(
        f"packed {len(manifest.records) - len(failed)} videos into {folder}, {amount(size)}: train.py --data {folder}"
    )


# ---------------------------------------------------------------- the plan


def make_plan(
    source: Path,
    root: Path,
    lists: Arrays,
    records: Mapping[str, VideoRecord],
    reasons: list[str],
    short_side: int,
    compact: bool,
) -> Arrays:
    """Return every array of the index except those that are known only after a shard is written (see `write_shard`).

    Args:
        source: the folder or list that --data names, for the user to read.
        root: the folder that paths start from.
        lists: what `catalog_arrays` returns.
        records: by path.
        reasons: by row, why a video cannot be read; empty if it can.
    """
    paths = unpack_strings(lists["paths"])
    frames, heights, widths, sizes, shards, offsets = np.zeros((6, len(paths)), dtype=np.int64)
    stamps = np.zeros((len(paths), 2), dtype=np.int64)
    displays = collect_displays(
        (record.display, record.oblique, record.interlaced) if record else (AS_CODED, False, False)
        for record in map(records.get, paths)
    )
    shard, filled = 0, 0
    for row, path in enumerate(paths):
        if reasons[row]:
            shards[row] = -1
            continue
        record = records[path]
        status = (root / path).stat()
        stamps[row] = status.st_size, status.st_mtime_ns
        frames[row] = record.frames
        heights[row], widths[row] = small_size(record.height, record.width, short_side, record.display)
        sizes[row] = record.frames * frame_bytes(heights[row], widths[row])
        if filled and filled + sizes[row] > SHARD_BYTES:
            shard, filled = shard + 1, 0
        shards[row], offsets[row] = shard, filled
        filled += int(sizes[row])
    return {
        "version": np.array(store_files.VERSION),
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
        "displays": displays.values,
        "oblique": displays.oblique,
        "interlaced": displays.interlaced,
    }


def small_size(height: int, width: int, short_side: int, display: Display = AS_CODED) -> tuple[int, int]:
    """Return the height and width in which a video is stored, as coded. A video is never enlarged.

    The shorter side of the shown frame becomes `short_side`. The longer side is rounded to an even number. Then the
    chroma planes have exactly half its size, and colours do not shift against brightness. If pixels are not square,
    both sides are rounded to even numbers.
    """
    if display.aspect != 1:
        scale = short_side / min(display.size(height, width))
        if scale >= 1:
            return height, width
        return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))
    short, long = min(height, width), max(height, width)
    if short <= short_side:
        return height, width
    long = 2 * round(long * short_side / short / 2)
    return (short_side, long) if height <= width else (long, short_side)


def compact_size(plan: Arrays, rows: np.ndarray | slice = slice(None)) -> int:
    """Estimate the bytes of these videos as small video files."""
    return int(COMPACT_SHARE * np.sum((plan["frames"] * plan["heights"] * plan["widths"])[rows]))


def describe(root: Path, plan: Arrays) -> list[str]:
    """Return the lines that `pack` prints before it writes anything."""
    stored = plan["shards"] >= 0
    (layout,) = unpack_strings(plan["layout"])
    numbers = plan["numbers"].tolist()
    splits = f" (splits {', '.join(map(str, numbers))})" if len(numbers) > 1 else ""
    lines = [
        f"{root}: {layout}{splits}, {stored.sum()} videos, {plan['frames'].sum():,} frames, "
        f"short side {plan['short_side']}",
        f"  the videos themselves            {amount(int(plan['stamps'][:, 0].sum())):>12}",
        f"  as planes, read by copying       {amount(int(plan['sizes'].sum())):>12}",
        f"  --compact, small, re-encoded     {amount(compact_size(plan)):>12} (about)",
    ]
    if not stored.all():
        lines.append(
            f"  {(~stored).sum()} videos cannot be read and are skipped: train.py check --report FILE names them"
        )
    return lines


def amount(size: float) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# ---------------------------------------------------------------- the folder


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Create the folder. Raises UserError, with advice, if the disk fails inside the context."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; finished shards stay: fix the cause, "
            "then run the same command again"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise UserError if the folder holds something that is not a packed store. Raises OSError."""
    names = os.listdir(folder)
    if store_files.PLAN not in names and any(not name.startswith(("dclr-", "shard-")) for name in names):
        raise UserError(f"--out {folder} holds something that is not a packed store: give an empty or a new folder")


def write_plan(folder: Path, plan: Arrays) -> bytes:
    """Write the plan, or compare it with the plan that another pack wrote.

    Returns the plan's digest. Raises UserError: the plans differ, or the folder holds something else.
    """
    if (folder / store_files.PLAN).is_file():
        before, digest = store.load_plan(folder)
        if difference := difference_of(before, plan):
            raise UserError(
                f"{folder} was begun with {difference}: pack as before, or into another folder (or delete this one)"
            )
    else:
        check_folder(folder)
        store_validation.check_plan(folder / store_files.PLAN, plan)  # otherwise the finished store might be refused
        digest = store_files.save_arrays(folder / store_files.PLAN, plan)
    return digest


def difference_of(before: Arrays, now: Arrays) -> str:
    """Return how an earlier plan differs from the plan now, as the end of a sentence; empty if they agree."""
    if before["compact"] != now["compact"]:
        return "--compact" if before["compact"] else "planes, not --compact"
    if before["short_side"] != now["short_side"]:
        return f"--short-side {before['short_side']}, not {now['short_side']}"
    paths, paths_now = unpack_strings(before["paths"]), unpack_strings(now["paths"])
    if odd := sorted(set(paths) ^ set(paths_now)):
        return f"{len(paths)} videos, not {len(paths_now)} (such as {odd[0]})"
    if paths == paths_now:
        for name, what in (
            ("stamps", "size or date"),
            ("frames", "number of frames"),
            ("reasons", "readability"),
            ("displays", "rotation or pixel aspect"),
            ("oblique", "rotation"),
            ("interlaced", "interlacing"),
        ):
            old, new = before[name], now[name]
            if name == "reasons":
                old, new = np.array(unpack_strings(old)), np.array(unpack_strings(new))
            if changed := [path for path, *pair in zip(paths, old, new, strict=True) if not np.array_equal(*pair)]:
                more = f", as in {len(changed) - 1} more" if len(changed) > 1 else ""
                return f"another {changed[0]} (its {what} has changed{more})"
    lists = [name for name in now if name in ("layout", "classes", "paths", "numbers", "missing", "missing_number")]
    lists += [name for name in now if name.startswith("entry_")]
    if not all(np.array_equal(before[name], now[name]) for name in lists):
        return "other lists of classes or splits"
    ignored = {"source", *store_files.READING}
    if not all(np.array_equal(before[name], now[name]) for name in now if name not in ignored):
        return "another division into shards"
    return ""


def check_space(job: Job, todo: list[int]) -> None:
    """Raise UserError if the shards `todo` do not fit on the disk.

    The size of planes is exact. The size of a compact store is an estimate, up to five times too large for videos that
    are easy to encode. So the estimate only warns. A disk that does become full ends the pack, and finished shards
    stay.
    """
    rows = np.concatenate([job.shards[number] for number in todo]) if todo else np.empty(0, dtype=np.int64)
    needed = compact_size(job.plan, rows) if job.compact else int(job.plan["sizes"][rows].sum())
    # Unfinished shards belong to the shards that are still to be written.
    free = shutil.disk_usage(job.folder).free + sum(map(bytes_in, job.folder.glob("shard-*.part")))
    if needed <= free:
        return
    if job.compact:
        still = f"an estimated {amount(needed)} are still to be written"
        print(f"warning: {job.folder}: {still}, and {amount(free)} are free", file=sys.stderr)
    else:
        raise UserError(
            f"{job.folder}: {amount(needed)} are still to be written, and {amount(free)} are free; "
            f"--compact takes about {amount(compact_size(job.plan, rows))}"
        )


def bytes_in(path: Path) -> int:
    """Return the size of a file, or of all files in a folder. What another process has just deleted counts as 0."""
    size = 0
    for file in [path, *path.glob("*")]:
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size


def store_bytes(folder: Path) -> int:
    """Return the size of a finished store."""
    return sum(bytes_in(entry) for entry in folder.iterdir() if entry.suffix != LOCK_SUFFIX and entry.name != LOCK)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- shards


def finished(job: Job, number: int) -> tuple[Arrays | None, str]:
    """Return the checksums of a shard if it is complete, else None, and what to tell the user about a damaged shard."""
    file, rows = job.checksums(number), job.shards[number]
    if not file.is_file():
        return None, ""
    try:
        found, _ = store_files.load_arrays(file)
        ours = "plan" in found and found["plan"].tobytes() == job.digest
        if ours:
            store_validation.check_shard(file, found, None if job.compact else job.plan["sizes"][rows], len(rows))
    except UserError:
        return None, f"{file} is damaged: its shard is made again"
    if not ours:
        return None, f"{file} belongs to another store: its shard is made again"
    sizes = job.plan["sizes"].copy()
    sizes[rows] = found["sizes"]
    if fault := store_damage.size_fault(job.folder, job.compact, number, rows, sizes):
        return None, f"{job.shard(number)} {fault}: it is made again"
    return found, ""


def temporary_of(shard: Path) -> Path:
    """Return the name of a shard that is being written."""
    return shard.with_name(f"{shard.name}.part")


def write_shard(job: Job, number: int, written: np.ndarray) -> Arrays:
    """Write one shard under its temporary name and return the content of its file of checksums.

    Adds the finished frames to `written` (1,) int64. Raises OSError.
    """
    rows, temporary = job.shards[number], temporary_of(job.shard(number))
    remove(temporary)
    found: Arrays = {
        "version": np.array(store_files.VERSION),
        "plan": np.frombuffer(job.digest, np.uint8),
        **store_files.empty_columns(len(rows)),
    }
    reasons = [""] * len(rows)
    write = write_small_videos if job.compact else write_planes
    for position, result in enumerate(write(job, rows, temporary, written)):
        if isinstance(result, str):
            reasons[position] = result
        else:
            for name, value in zip(store_files.FOUND, result, strict=True):
                found[name][position] = value
    if not job.compact:
        found["sizes"] = job.plan["sizes"][rows]  # also of failed videos, whose bytes stay zero
    return {**found, "reasons": pack_strings(reasons)}


def publish_shard(job: Job, number: int, checksums: Arrays) -> None:
    """Give a shard that `write_shard` has written its name, then write its checksums. Raises OSError."""
    shard = job.shard(number)
    remove(shard)  # a folder cannot be renamed onto another
    os.rename(temporary_of(shard), shard)
    sync_folder(job.folder)
    store_files.save_arrays(job.checksums(number), checksums)


Result = tuple[int, int, bool, bool] | str
"""Size in bytes, crc32, bt709 and full_range of a packed video (`store_files.FOUND`), or the reason why it cannot be
packed."""


def write_planes(job: Job, rows: np.ndarray, temporary: Path, written: np.ndarray) -> Iterator[Result]:
    """Write the planes of videos into one file, each at the offset that the plan gives it, and yield their results."""
    with temporary.open("wb") as file:
        for row in rows.tolist():
            file.seek(job.plan["offsets"][row])
            size, checksum, colours = 0, 0, Colours()
            try:
                for frame in colours.check(small_frames(job, row, written)):
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


def write_small_videos(job: Job, rows: np.ndarray, temporary: Path, written: np.ndarray) -> Iterator[Result]:
    """Write each video into a file of its own, in one folder, and yield the results.

    Each file is decoded once more. It must have as many frames as its source, in the order and with the keyframes that
    training expects by `compact_record`.
    """
    temporary.mkdir()
    for row in rows.tolist():
        height, width = int(job.plan["heights"][row]), int(job.plan["widths"][row])
        file, colours = temporary / store_files.compact_name(row), Colours()
        try:
            content = compact_video(colours.check(small_frames(job, row, written)), height, width)
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
    sync_folder(temporary)


def small_frames(job: Job, row: int, written: np.ndarray) -> Iterator[YuvFrames]:
    """Yield the frames of a video in the size of the store, one at a time. Raises UnreadableVideo."""
    path = job.paths[row]
    height, width = int(job.plan["heights"][row]), int(job.plan["widths"][row])
    decoder_process.report_video(row)
    try:
        for frame in resized_planes(job.root / path, job.records[path], height, width):
            yield frame
            written += 1
    finally:
        decoder_process.report_video(None)


def check_small_video(file: Path, expected: VideoRecord) -> None:
    """Raise UnreadableVideo unless a complete decode of the file finds the expected record."""
    try:
        record = verify_video(file)
    except UnreadableVideo as reason:
        raise UnreadableVideo(f"its compact video cannot be read: {reason}") from reason
    for name, value in vars(expected).items():
        if not np.array_equal(value, getattr(record, name)):
            raise UnreadableVideo(f"its compact video is not as expected ({name})")


class Colours:
    """The colour matrix and range of a video. The index holds them once for all frames of the video."""

    bt709 = full_range = False

    def check(self, frames: Iterator[YuvFrames]) -> Iterator[YuvFrames]:
        """Yield the frames. Raises UnreadableVideo: matrix or range change from one frame to the next."""
        for number, frame in enumerate(frames):
            if number == 0:
                self.bt709, self.full_range = frame.bt709, frame.full_range
            elif (frame.bt709, frame.full_range) != (self.bt709, self.full_range):
                raise UnreadableVideo("its colour matrix or range changes inside the video, which a store cannot hold")
            yield frame


def write_index(job: Job) -> dict[str, str]:
    """Write the index, which is the last file of a store, and delete what killed processes left.

    Returns path -> reason of the videos that failed to pack.
    """
    index = {**job.plan, **store_files.empty_columns(len(job.paths)), "sizes": job.plan["sizes"].copy()}
    reasons = unpack_strings(job.plan["reasons"])
    failed = {}
    for number, rows in enumerate(job.shards):
        found, fault = finished(job, number)
        if found is None:
            raise UserError(f"{fault or f'{job.shard(number)} has disappeared'}: run the same command again")
        for name in store_files.FOUND:
            index[name][rows] = found[name]
        for row, reason in zip(rows.tolist(), unpack_strings(found["reasons"]), strict=True):
            if reason:
                reasons[row] = failed[job.paths[row]] = reason
    index["reasons"] = pack_strings(reasons)
    if job.compact:
        index["offsets"] = np.zeros(len(job.paths), dtype=np.int64)
    for leftover in [*job.folder.glob("*.part"), *job.folder.glob(f"shard-*{LOCK_SUFFIX}")]:
        remove(leftover)
    store_files.save_arrays(job.folder / store_files.INDEX, index)
    return failed


class Claims:
    """The shards that this process writes now, and those that are not complete yet.

    Attributes:
        held: number of a shard -> its lock, for the shards that this process writes.
        open: the numbers of the shards that this process does not write and that are not complete, as far as it knows.
        ready: the numbers of the shards that it has found complete since `take` was last called.
    """

    def __init__(self, job: Job, todo: list[int]) -> None:
        self.job = job
        self.held: dict[int, Lock] = {}
        self.open, self.ready = deque(todo), list[int]()
        self._locks = {number: Lock(job.lock(number)) for number in todo}

    def take(self, count: int) -> list[int]:
        """Claim up to `count` shards and return their numbers. Fewer: other processes write the rest."""
        taken: list[int] = []
        self.ready = []
        for _ in range(len(self.open)):
            if len(taken) == count:
                break
            number = self.open.popleft()
            if self._is_complete(number):
                self.ready.append(number)
            elif not self._locks[number].take():
                self.open.append(number)
            elif self._is_complete(number):  # its writer ended between the two lines above
                self._locks[number].release()
                self.ready.append(number)
            else:
                self.held[number] = self._locks[number]
                remove(self.job.checksums(number))  # of a damaged shard
                taken.append(number)
        return taken

    def _is_complete(self, number: int) -> bool:
        return finished(self.job, number)[0] is not None

    def publish(self, number: int, checksums: Arrays) -> None:
        """Finish a shard that is written, and release it.

        If this process was suspended for long, another process may have taken the shard over. That process writes it.
        """
        if self.held[number].is_lost():
            self.open.append(number)
        else:
            publish_shard(self.job, number, checksums)
        self.held.pop(number).release()

    def close(self) -> None:
        """Release the shards that are not finished. Other processes may write them."""
        for lock in self.held.values():
            lock.release()

    def describe_others(self) -> str:
        """Return which processes write the open shards."""
        owners = sorted({self._locks[number].describe_owner() for number in self.open})
        more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
        return f"{len(self.open)} shard(s) of {self.job.folder} are being written by {owners[0]}{more}"


def write_shards(job: Job, todo: list[int], workers: int, timeout: float) -> None:
    """Write the shards `todo`, together with other processes, and return when all of them are complete.

    Each shard is written in one of `workers` decoder processes, with a progress bar of frames. A shard whose writer
    ended before it was complete is written by another process.

    Raises UserError if a decoder process dies, or if it gives no frame for `timeout` seconds. Every video was verified
    in the same way before, so this is rare and ends the pack.
    """
    written = decoder_process.shared_array(len(job.shards), np.int64)  # frames, by shard
    frames = [int(job.plan["frames"][rows].sum()) for rows in job.shards]

    def write(number: int) -> Arrays:
        return write_shard(job, number, written[number : number + 1])

    claims, has_said = Claims(job, todo), False
    with (
        contextlib.closing(claims),
        ProgressBar(sum(frames[number] for number in todo), "packing", "frame", shown=bool(todo)) as bar,
    ):

        def show() -> None:
            bar.advance(int(written.sum()) - bar.count)

        def claim(count: int) -> list[int]:
            taken = claims.take(count)
            written[taken], written[claims.ready] = 0, [frames[number] for number in claims.ready]
            return taken

        while claims.open:
            requests = deque(claim(workers))
            if not requests and claims.open:
                if not has_said:
                    write_line(f"{claims.describe_others()}: waiting for them", sys.stdout)
                    has_said = True
                time.sleep(WAIT_S)
            answers = decoder_process.answers(write, requests, workers, timeout, tick=show, only_while_reading=True)
            with contextlib.closing(answers):
                try:
                    for number, answer in answers:
                        if isinstance(answer, DecoderDied):
                            raise UserError(_fault(job, answer))
                        claims.publish(number, answer)
                        requests.extend(claim(1))
                except MemoryError:
                    raise UserError(f"a worker process ran out of memory; {_again(job)} fewer --workers") from None
            show()


def _fault(job: Job, death: DecoderDied) -> str:
    """Return what to tell the user about a decoder process that died while it wrote a shard."""
    again = _again(job)
    if death.status == decoder_process.STALLED and death.video is not None:
        return f"{job.root / job.paths[death.video]}: {death}, though it did before; {again} a higher --video-timeout"
    return f"a worker process died while it packed into {job.folder} (out of memory?); {again} fewer --workers"


def _again(job: Job) -> str:
    return f"finished shards in {job.folder} stay: run the same command again, perhaps with"
