"""The records of N videos as arrays, which worker processes inherit and never copy.

A Python object is stored next to its own reference count. So a worker that only reads inherited objects writes to their
memory, and copies it page by page until it has all of it (pytorch/pytorch#13246). An array has one count for all its
numbers. A million records as objects would take 4 GB.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dclr.data.decode import VideoRecord
from dclr.data.display import Displays, collect_displays
from dclr.data.string_array import pack_strings, unpack_strings

_CHUNK = 4096
"""Videos whose timestamps are in memory at a time (300 frames each: 10 MB)."""


class RaggedArray:
    """Arrays of different lengths, stored end to end in one array."""

    def __init__(self, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        self.values = values
        self.starts = np.append(0, np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64."""
        return np.diff(self.starts)

    def select(self, rows: np.ndarray) -> "RaggedArray":
        """Return some of the arrays, given by their numbers, in a new array."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) + np.repeat(self.starts[rows] - (ends - lengths), lengths)
        return RaggedArray(self.values[positions], lengths)


def collect_arrays(arrays: Iterable[np.ndarray], dtype: Any) -> RaggedArray:
    """Return arrays of different lengths as one."""
    arrays = list(arrays)
    return RaggedArray(np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype), [len(array) for array in arrays])


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """The records of N videos. The fields are those of VideoRecord, one array each."""

    frames: np.ndarray
    """(N,) int64."""
    declared: np.ndarray
    """(N,) int64."""
    sizes: np.ndarray
    """(N, 2) int32, height and width."""
    pts_runs: RaggedArray
    """(runs, 2) int64 of each video: a difference of two timestamps, and how many times it occurs in a row. The first
    timestamp is its difference from 0. Most videos have two runs, and 300 timestamps would take 2,400 bytes."""
    keyframes: RaggedArray
    """(keyframes,) int32 of each video."""
    seekable: np.ndarray
    """(N,) bool."""
    skippable: np.ndarray
    """(N,) bool."""
    displays: Displays
    video_streams: np.ndarray
    """(N,) int64."""
    cut_from: np.ndarray
    """(N,) int64."""
    damages: np.ndarray
    """uint8, the damage of each video, by `pack_strings`."""

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> VideoRecord:
        """Return the record of one video without its damage."""
        runs = self.pts_runs[index]
        return VideoRecord(
            frames=int(self.frames[index]),
            declared=int(self.declared[index]),
            height=int(self.sizes[index, 0]),
            width=int(self.sizes[index, 1]),
            pts=np.cumsum(np.repeat(runs[:, 0], runs[:, 1])),
            keyframes=self.keyframes[index].astype(np.int64),
            seekable=bool(self.seekable[index]),
            skippable=bool(self.skippable[index]),
            display=self.displays[index],
            oblique=bool(self.displays.oblique[index]),
            interlaced=bool(self.displays.interlaced[index]),
            video_streams=int(self.video_streams[index]),
            cut_from=int(self.cut_from[index]),
        )

    def select(self, rows: np.ndarray) -> "Records":
        """Return some of the records, given by their numbers."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        damages = unpack_strings(self.damages)
        return Records(
            frames=self.frames[rows],
            declared=self.declared[rows],
            sizes=self.sizes[rows],
            pts_runs=self.pts_runs.select(rows),
            keyframes=self.keyframes.select(rows),
            seekable=self.seekable[rows],
            skippable=self.skippable[rows],
            displays=self.displays.select(rows),
            video_streams=self.video_streams[rows],
            cut_from=self.cut_from[rows],
            damages=pack_strings(damages[row] for row in rows.tolist()),
        )

    def identity(self) -> Iterator[np.ndarray]:
        """Yield all that decides which frames are read, in the order of VideoRecord's fields, for a fingerprint.

        The other fields are not in the fingerprint of a run, so checkpoints from before these fields were known can
        still be resumed.
        """
        yield from (self.frames, self.declared, *self.sizes.T.astype(np.int64))
        for first in range(0, len(self), _CHUNK):
            yield self._pts(first, min(first + _CHUNK, len(self)))
        yield from (self.keyframes.values.astype(np.int64), self.seekable, self.skippable)

    def _pts(self, first: int, last: int) -> np.ndarray:
        """Return the timestamps of the videos `first` to `last - 1`, end to end."""
        runs = self.pts_runs.values[self.pts_runs.starts[first] : self.pts_runs.starts[last]]
        sums = np.cumsum(np.repeat(runs[:, 0], runs[:, 1]))
        frames = self.frames[first:last]
        before = np.append(0, sums[np.cumsum(frames)[:-1] - 1])  # the sum up to the video before
        return sums - np.repeat(before, frames)


def collect_records(records: Iterable[VideoRecord]) -> Records:
    """Return records as arrays."""
    records = list(records)
    frames = np.array([record.frames for record in records], np.int64)
    steps = [np.diff(record.pts, prepend=np.int64(0)) for record in records]
    return Records(
        frames=frames,
        declared=np.array([record.declared for record in records], np.int64),
        sizes=np.array([(record.height, record.width) for record in records], np.int32).reshape(-1, 2),
        pts_runs=_find_runs(np.concatenate([np.empty(0, np.int64), *steps]), frames),
        keyframes=collect_arrays((record.keyframes for record in records), np.int32),
        seekable=np.array([record.seekable for record in records], bool),
        skippable=np.array([record.skippable for record in records], bool),
        displays=collect_displays((record.display, record.oblique, record.interlaced) for record in records),
        video_streams=np.array([record.video_streams for record in records], np.int64),
        cut_from=np.array([record.cut_from for record in records], np.int64),
        damages=pack_strings(record.damage for record in records),
    )


def _find_runs(steps: np.ndarray, frames: np.ndarray) -> RaggedArray:
    """Return the runs of equal numbers of each video.

    Args:
        steps: (frames of all videos,) int64, differences of timestamps.
        frames: (N,) int64, at least 1 for each video.
    """
    first = np.cumsum(frames) - frames
    begins = np.diff(steps, prepend=np.int64(0)) != 0
    begins[first] = True
    positions = np.flatnonzero(begins)
    runs = np.stack([steps[positions], np.diff(positions, append=len(steps))], axis=1)
    return RaggedArray(runs, np.diff(np.searchsorted(positions, first), append=len(positions)))
