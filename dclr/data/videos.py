"""The readable videos of one split, as arrays that worker processes inherit and never copy.

A Python object is stored next to its own reference count. So a worker that only reads inherited objects writes to their
memory, and copies it page by page until it has all of it (pytorch/pytorch#13246). An array has one count for all its
numbers. Kinetics' list of 240,000 videos would cost each worker a hundred megabytes as objects, and costs nothing as
arrays.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dclr.data import decoder_process
from dclr.data.catalog import Catalog
from dclr.data.decode import Planes, UnreadableVideo, VideoRecord, YuvFrames, read_planes
from dclr.data.display import AS_CODED, Displays, collect_displays
from dclr.data.manifest import load_manifest
from dclr.data.store import Selection, check_sizes, open_store
from dclr.data.string_array import StringArray
from dclr.errors import UserError


class NoReadableVideo(UserError):
    """Not one of the requested videos can be read.

    Attributes:
        reasons: path of each video -> why it cannot be read.
    """

    def __init__(self, message: str, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons


class Source(Protocol):
    """A reader of the frames of N videos, by index."""

    @property
    def frames(self) -> np.ndarray:
        """(N,) int64, frames that decode."""
        ...

    @property
    def heights(self) -> np.ndarray:
        """(N,) int64, pixels."""
        ...

    @property
    def widths(self) -> np.ndarray:
        """(N,) int64, pixels."""
        ...

    def read_planes(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        """Return the wanted frames of a video, like `decode.read_planes`. Raises UnreadableVideo."""
        ...

    @property
    def displays(self) -> Displays:
        """How the N videos are to be shown."""
        ...

    def identity(self) -> list[np.ndarray]:
        """Return arrays that change if the content of a video changes."""
        ...


class RaggedArray:
    """Arrays of different lengths, stored end to end in one array."""

    def __init__(self, arrays: Iterable[np.ndarray], dtype: Any) -> None:
        arrays = list(arrays)
        self.values = np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype)
        self._starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self._starts[index] : self._starts[index + 1]]


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """N videos in the order of the catalog. The index of a video is its position in this order."""

    root: Path
    """The folder that paths start from."""
    layout: str
    """The layout of the catalog."""
    classes: tuple[str, ...]
    """Names by label; empty if nothing is labelled."""
    unreadable: dict[str, str]
    """Path -> reason, of the videos of the split that cannot be read and are skipped."""
    paths: StringArray
    """Relative to root."""
    labels: np.ndarray
    """(N,) int64, indices into `classes`; -1: unlabelled."""
    frames: np.ndarray
    """(N,) int64, frames that decode."""
    heights: np.ndarray
    """(N,) int64, pixels."""
    widths: np.ndarray
    """(N,) int64, pixels."""
    source: Source
    faults: np.ndarray = field(init=False)
    """(N,) int64, shared with all processes that are forked later. 0, or how the decoder process that tried to read the
    video ended (the status of `decoder_process.describe`). Such a video is not read again."""
    timeout: float = decoder_process.TIMEOUT
    """Seconds without a frame after which a decoder process is killed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "faults", decoder_process.shared_array(len(self), np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Return the path of a video relative to root, as in the catalog."""
        return self.paths[index]

    def read(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        """Return the wanted frames of a video, like `decode.read_planes`. Raises UnreadableVideo."""
        if fault := int(self.faults[index]):
            raise UnreadableVideo(decoder_process.describe(fault, self.timeout))
        decoder_process.report_video(index)
        return self.source.read_planes(index, wanted, into)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the list of videos and of all that is known of their content without reading them
        again."""
        paths = self.paths.packed[self.paths.packed != 0]  # without the null characters between them
        own = [paths, self.labels, self.frames, self.heights, self.widths, *self.source.identity()]
        displays = self.source.displays.values
        if (displays != AS_CODED).any():  # otherwise the digest is that of checkpoints from before displays were known
            own.append(displays)
        digest = hashlib.sha256()
        for array in own:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


NOT_FOR_READING = ("display", "oblique", "interlaced", "video_streams", "cut_from", "damage")
"""Fields of a VideoRecord that do not decide which frames are read. They are not in the fingerprint of a run, so
checkpoints from before these fields were known can still be resumed."""


class VideoFiles:
    """A Source of video files. Each is decoded by the record of its verification."""

    def __init__(
        self, root: Path, paths: StringArray, records: Sequence[VideoRecord], sizes: Sequence[int] = ()
    ) -> None:
        """`sizes`: bytes of the files."""
        self._root, self._paths, self._sizes = root, paths, np.array(sizes, np.int64)
        names = [field.name for field in fields(VideoRecord) if field.name not in NOT_FOR_READING]
        self._columns = {name: _column([getattr(record, name) for record in records]) for name in names}
        self.displays = collect_displays((record.display, record.oblique, record.interlaced) for record in records)
        self.frames, self.heights, self.widths = (
            np.array([getattr(record, name) for record in records], np.int64) for name in ("frames", "height", "width")
        )

    def record(self, index: int) -> VideoRecord:
        """Return the record of a video's verification."""
        row: dict[str, Any] = {name: column[index] for name, column in self._columns.items()}
        row = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
        displays = self.displays
        return VideoRecord(
            **row,
            display=displays[index],
            oblique=bool(displays.oblique[index]),
            interlaced=bool(displays.interlaced[index]),
        )

    def read_planes(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        return read_planes(self._root / self._paths[index], self.record(index), wanted, into)

    def identity(self) -> list[np.ndarray]:
        """Return the sizes of the files, and the timestamps, keyframes and all else that decides what is read."""
        columns = self._columns.values()
        return [self._sizes, *(column.values if isinstance(column, RaggedArray) else column for column in columns)]


def _column(values: list[Any]) -> RaggedArray | np.ndarray:
    """Return one field of all records: numbers as an array, arrays as a RaggedArray."""
    return RaggedArray(values, values[0].dtype) if isinstance(values[0], np.ndarray) else np.array(values)


def open_videos(
    catalog: Catalog, split: str, workers: int, progress: bool = True, timeout: float = decoder_process.TIMEOUT
) -> VideoSet:
    """Return the readable videos of a split. Video files are verified by a full decode, once: the findings are cached.

    Args:
        workers: processes that verify.
        timeout: seconds without a frame after which a decoder process is killed, now and when training reads.

    Raises:
        NoReadableVideo: none of the videos can be read.
        UserError: there are no such videos, or the store is damaged (see `store.check_sizes`).
    """
    listed = catalog.videos(split)
    if catalog.index is None:
        paths_listed = [video.path for video in listed]
        manifest = load_manifest(catalog.root, paths_listed, workers=workers, progress=progress, timeout=timeout)
        unreadable = manifest.unreadable
    else:
        store = open_store(catalog.root, catalog.index)
        check_sizes(store)
        if progress and store.remote is not None and (line := store.remote.cache.describe()):
            print(f"warning: {line}", file=sys.stderr)
        unreadable = store.unreadable
    unreadable = {video.path: unreadable[video.path] for video in listed if video.path in unreadable}
    videos = [video for video in listed if video.path not in unreadable]
    if not videos:
        first, reason = next(iter(unreadable.items()))
        raise NoReadableVideo(
            f"{catalog.root}: none of the {len(listed)} videos of split {split} can be read ({first}: {reason}); "
            "see train.py check",
            unreadable,
        )
    paths = StringArray(video.path for video in videos)
    source: Source
    if catalog.index is None:
        records = [manifest.records[video.path] for video in videos]
        source = VideoFiles(catalog.root, paths, records, [manifest.sizes[video.path] for video in videos])
    else:
        source = Selection(store, store.rows_of(video.path for video in videos))
    return VideoSet(
        root=catalog.root,
        layout=catalog.layout,
        classes=catalog.classes,
        unreadable=unreadable,
        paths=paths,
        labels=np.array([video.label for video in videos], np.int64),
        frames=source.frames,
        heights=source.heights,
        widths=source.widths,
        source=source,
        timeout=timeout,
    )
