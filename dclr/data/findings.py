"""What is known about video files: the findings of their verification, as arrays and in a file.

A finding belongs to a file of one size and modification time, its stamp. A file that has changed has no finding.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dclr.data.decode import MOST_PIXELS, VideoRecord
from dclr.data.display import Displays, are_displays
from dclr.data.file_content import DIGEST_BYTES
from dclr.data.records import RaggedArray, Records, collect_records
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.files import atomic_file

Arrays = dict[str, np.ndarray]

_VERSION = 6
"""Version of the file's format and of what `verify_video` finds: raise it when either changes."""

_COLUMNS = ("paths", "stamps", "readable", "reasons", "digests")
"""The arrays of Findings."""

_RECORD_COLUMNS = ("frames", "declared", "sizes", "seekable", "skippable", "video_streams", "cut_from", "damages")
"""The arrays of Records. The other attributes of Records are made of two or three arrays each."""

Finding = VideoRecord | str
"""The record of a video, or the reason why it cannot be read."""

Stamp = tuple[int, int]
"""File size in bytes and modification time in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class VerifiedFile:
    """The finding about one file."""

    path: str
    """Relative to the data folder."""
    stamp: Stamp
    finding: Finding
    digest: bytes
    """Digest of the first and the last bytes of the file (see file_content.py); empty: not known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """The findings about V files, R of which are readable videos."""

    paths: np.ndarray
    """uint8, relative to the data folder, by `pack_strings`."""
    stamps: np.ndarray
    """(V, 2) int64, see Stamp."""
    readable: np.ndarray
    """(V,) bool."""
    reasons: np.ndarray
    """uint8, why each of the other V - R files cannot be read, by `pack_strings`."""
    digests: np.ndarray
    """(V, DIGEST_BYTES) uint8, see VerifiedFile; zeros: not known."""
    records: Records
    """R records, in the order of the readable files."""

    def __len__(self) -> int:
        return len(self.stamps)

    def __iter__(self) -> Iterator[VerifiedFile]:
        """Yield the findings one by one."""
        reasons, damages = iter(unpack_strings(self.reasons)), unpack_strings(self.records.damages)
        record = 0
        for row, path in enumerate(unpack_strings(self.paths)):
            finding: Finding
            if self.readable[row]:
                finding = replace(self.records[record], damage=damages[record])
                record += 1
            else:
                finding = next(reasons)
            size, modified = self.stamps[row].tolist()
            digest = self.digests[row].tobytes() if self.digests[row].any() else b""
            yield VerifiedFile(path=path, stamp=(size, modified), finding=finding, digest=digest)

    def record_rows(self) -> np.ndarray:
        """Return (V,) int64: the number of a readable file's record, and of another file's reason."""
        return np.where(self.readable, np.cumsum(self.readable), np.cumsum(~self.readable)) - 1

    def select(self, rows: np.ndarray) -> "Findings":
        """Return the findings about some of the files, given by their numbers."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        paths, reasons = unpack_strings(self.paths), unpack_strings(self.reasons)
        readable, numbers = self.readable[rows], self.record_rows()[rows]
        return Findings(
            paths=pack_strings(paths[row] for row in rows.tolist()),
            stamps=self.stamps[rows],
            readable=readable,
            reasons=pack_strings(reasons[number] for number in numbers[~readable].tolist()),
            digests=self.digests[rows],
            records=self.records.select(numbers[readable]),
        )


def collect_findings(files: Iterable[VerifiedFile]) -> Findings:
    """Return findings as arrays."""
    files = list(files)
    records = [file.finding for file in files if isinstance(file.finding, VideoRecord)]
    digests = b"".join(file.digest or bytes(DIGEST_BYTES) for file in files)
    return Findings(
        paths=pack_strings(file.path for file in files),
        stamps=np.array([file.stamp for file in files], np.int64).reshape(-1, 2),
        readable=np.array([isinstance(file.finding, VideoRecord) for file in files], bool),
        reasons=pack_strings(file.finding for file in files if isinstance(file.finding, str)),
        digests=np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
        records=collect_records(records),
    )


def merge_findings(parts: Sequence[Findings]) -> Findings:
    """Return the findings of several parts. If parts have the same path, the last one counts."""
    parts = [part for part in parts if len(part)] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
    arrays = [_record_arrays(part.records) for part in parts]
    records = _records({name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]})
    last = {path: row for row, path in enumerate(unpack_strings(joined["paths"]))}
    return Findings(**joined, records=records).select(np.array(sorted(last.values()), np.int64))


# ---------------------------------------------------------------- the file


def save_findings(file: Path, findings: Findings) -> None:
    """Write a file of findings. A reader never sees half of it. Raises OSError."""
    arrays = {name: getattr(findings, name) for name in _COLUMNS}
    arrays |= {"version": np.array(_VERSION), **_record_arrays(findings.records)}
    with atomic_file(file) as aside, aside.open("wb") as opened:
        # Not compressed: a million findings take 0.2 GB on disk, and compressing them would take half a minute.
        np.savez(opened, **arrays)


def load_findings(file: Path, warn: bool = True) -> Findings:
    """Return the saved findings. Nothing is mapped, because other machines may replace the file at any time.

    A damaged file, or one of another version, gives none and, with `warn`, a warning on stderr.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
        version = int(arrays.pop("version"))
        if version != _VERSION:
            raise ValueError(f"it is of version {version}, not {_VERSION}")
        _check_numbers(arrays)
        return Findings(**{name: arrays[name] for name in _COLUMNS}, records=_records(arrays))
    except FileNotFoundError:
        pass
    except Exception as error:  # readers raise many kinds of errors on a damaged file
        if warn:
            print(f"warning: {file} cannot be used ({error}); the videos are verified again", file=sys.stderr)
    return collect_findings(())


def _record_arrays(records: Records) -> Arrays:
    """Return records as the arrays of a file."""
    return {
        **{name: getattr(records, name) for name in _RECORD_COLUMNS},
        "displays": records.displays.values,
        "oblique": records.displays.oblique,
        "interlaced": records.displays.interlaced,
        "pts_run_counts": records.pts_runs.lengths,
        "pts_runs": records.pts_runs.values,
        "keyframe_counts": records.keyframes.lengths,
        "keyframes": records.keyframes.values,
    }


def _records(arrays: Arrays) -> Records:
    return Records(
        **{name: arrays[name] for name in _RECORD_COLUMNS},
        displays=Displays(arrays["displays"], arrays["oblique"], arrays["interlaced"]),
        pts_runs=RaggedArray(arrays["pts_runs"], arrays["pts_run_counts"]),
        keyframes=RaggedArray(arrays["keyframes"], arrays["keyframe_counts"]),
    )


def _check_numbers(arrays: Arrays) -> None:
    """Raise ValueError if arrays of the file contradict each other. Frames could not be found with such a record."""
    frames, marks, sizes = arrays["frames"], arrays["keyframe_counts"], arrays["sizes"]
    runs, run_counts = arrays["pts_runs"], arrays["pts_run_counts"]
    files, count = len(arrays["readable"]), np.count_nonzero(arrays["readable"])
    columns = ("frames", "declared", "seekable", "skippable", "oblique", "interlaced", "video_streams", "cut_from")
    numbers = ("keyframe_counts", "pts_run_counts")
    if not (
        all(array.dtype.kind in "iub" for array in arrays.values())
        and all(arrays[name].shape == (count,) for name in (*columns, *numbers))
        and arrays["readable"].dtype == bool
        and arrays["readable"].shape == (files,)
        and arrays["stamps"].shape == (files, 2)
        and arrays["digests"].shape == (files, DIGEST_BYTES)
        and arrays["digests"].dtype == np.uint8
        and [_count_strings(arrays[name]) for name in ("paths", "reasons", "damages")] == [files, files - count, count]
        and arrays["displays"].shape == (count, 3)
        and are_displays(arrays["displays"])
        and sizes.shape == (count, 2)
        and (frames > 0).all()
        and (marks >= 0).all()
        and (run_counts > 0).all()
        and run_counts.sum() == len(runs)
        and runs.shape[1:] == (2,)
        and (runs[:, 1] > 0).all()
        and (runs[:, 1] <= np.repeat(frames, run_counts)).all()
        and (count == 0 or (np.add.reduceat(runs[:, 1], np.cumsum(run_counts) - run_counts) == frames).all())
        and marks.sum() == len(arrays["keyframes"])
        and (arrays["keyframes"] >= 0).all()
        and (arrays["keyframes"] < np.repeat(frames, marks)).all()
        and (sizes > 0).all()
        and (sizes <= MOST_PIXELS // sizes[:, ::-1].astype(np.int64)).all()
    ):
        raise ValueError("its numbers contradict each other")


def _count_strings(packed: np.ndarray) -> int:
    """Return the number of strings in an array by `pack_strings`; -1 if it is not such an array."""
    whole = packed.dtype == np.uint8 and packed.ndim == 1 and (len(packed) == 0 or packed[-1] == 0)
    return int(np.count_nonzero(packed == 0)) if whole else -1
