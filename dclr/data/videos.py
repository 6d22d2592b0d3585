"""The readable videos of one split, as arrays: worker processes inherit them and never copy them.

A Python object lies beside its own reference count, so a worker that only looks at inherited objects copies the memory they lie in,
page by page, until it has all of it (pytorch/pytorch#13246). Arrays have one count for all their numbers. Kinetics' list of 240,000
videos would cost each worker a hundred megabytes as objects; so it costs nothing.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dclr.data import decoder_process
from dclr.data.catalog import Catalog, Video
from dclr.data.decode import Planes, UnreadableVideo, VideoRecord, YuvFrames, read_planes
from dclr.data.manifest import load_manifest
from dclr.data.store import is_store, open_store
from dclr.data.string_array import StringArray
from dclr.errors import UserError


class Source(Protocol):
    """Where the frames of a split's videos are read from."""

    def read_planes(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        """The wanted frames of video `index`, as `decode.read_planes`. Raises UnreadableVideo."""
        ...

    def identity(self) -> list[np.ndarray]:
        """Arrays that change when the content of a video does."""
        ...


class RaggedArray:
    """Arrays of different lengths, stored end to end in one."""

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
    """N videos in catalog order; a sample's index is a place in it."""

    root: Path
    """The folder that paths start from."""
    layout: str
    """As the catalog's."""
    classes: tuple[str, ...]
    """Names by label; empty where nothing is labelled."""
    unreadable: dict[str, str]
    """Path -> reason, of the videos of the split that are left out."""
    paths: StringArray
    """Relative to root."""
    labels: np.ndarray
    """(N,) int64, places in `classes`; -1: unlabelled."""
    frames: np.ndarray
    """(N,) int64, frames that decode."""
    heights: np.ndarray
    """(N,) int64, pixels."""
    widths: np.ndarray
    """(N,) int64, pixels."""
    source: Source
    faults: np.ndarray = field(init=False)
    """(N,) int64, shared by all processes forked later: 0, or how the decoder ended that tried to read the video.
    See decoder_process.describe. Such a video is not read again."""
    timeout: float = decoder_process.TIMEOUT
    """Seconds without a frame after which a watched decoder is ended."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "faults", decoder_process.shared_array(len(self), np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Relative to root, as the catalog has it."""
        return self.paths[index]

    def read(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        """The wanted frames of a video, as `decode.read_planes`. Raises UnreadableVideo."""
        if fault := int(self.faults[index]):
            raise UnreadableVideo(decoder_process.describe(fault, self.timeout))
        decoder_process.report_video(index)
        return self.source.read_planes(index, wanted, into)

    def fingerprint(self) -> str:
        """Of which videos these are, in which order, and what is in them as far as it is known without reading them again."""
        paths = self.paths.packed[self.paths.packed != 0]  # without the null characters between them
        own = (paths, self.labels, self.frames, self.heights, self.widths, *self.source.identity())
        digest = hashlib.sha256()
        for array in own:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class VideoFiles:
    """A Source: video files, each decoded by the record of its verification."""

    def __init__(
        self, root: Path, paths: StringArray, records: Sequence[VideoRecord], sizes: Sequence[int] = ()
    ) -> None:
        """`sizes`: of the files in bytes."""
        self._root, self._paths, self._sizes = root, paths, np.array(sizes, np.int64)
        self._columns = {
            field.name: _column([getattr(r, field.name) for r in records]) for field in fields(VideoRecord)
        }

    def record(self, index: int) -> VideoRecord:
        """What verifying the video found."""
        row: dict[str, Any] = {name: column[index] for name, column in self._columns.items()}
        return VideoRecord(**{name: v.item() if isinstance(v, np.generic) else v for name, v in row.items()})

    def read_planes(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        return read_planes(self._root / self._paths[index], self.record(index), wanted, into)

    def identity(self) -> list[np.ndarray]:
        """The files' sizes, timestamps, keyframes and the rest of what verifying found."""
        return [self._sizes] + [
            column.values if isinstance(column, RaggedArray) else column for column in self._columns.values()
        ]


def _column(values: list[Any]) -> RaggedArray | np.ndarray:
    """One field of all records: numbers as an array, arrays end to end."""
    return RaggedArray(values, values[0].dtype) if isinstance(values[0], np.ndarray) else np.array(values)


def open_videos(
    catalog: Catalog, split: str, workers: int, progress: bool = True, timeout: float = decoder_process.TIMEOUT
) -> VideoSet:
    """The split's videos that a full decode could read, once and cached, or those that a packed store holds.

    `timeout`: seconds that a decoder may take without giving a frame, now and when training reads.
    Raises UserError: there are none; a damaged store (see `open_store`).
    """
    listed = catalog.videos(split)
    if is_store(catalog.root):
        return _packed_videos(catalog, listed, timeout)
    manifest = load_manifest(
        catalog.root, [v.path for v in listed], workers=workers, progress=progress, timeout=timeout
    )
    videos = [v for v in listed if v.path in manifest.records]
    if not videos:
        first, reason = next(iter(manifest.unreadable.items()))
        raise UserError(
            f"{catalog.root}: none of the {len(listed)} videos of split {split} can be read ({first}: {reason}); see train.py check"
        )
    paths = StringArray(v.path for v in videos)
    records = [manifest.records[v.path] for v in videos]
    return VideoSet(
        root=catalog.root,
        layout=catalog.layout,
        classes=catalog.classes,
        unreadable={v.path: manifest.unreadable[v.path] for v in listed if v.path in manifest.unreadable},
        paths=paths,
        labels=np.array([v.label for v in videos], np.int64),
        frames=np.array([record.frames for record in records], np.int64),
        heights=np.array([record.height for record in records], np.int64),
        widths=np.array([record.width for record in records], np.int64),
        source=VideoFiles(catalog.root, paths, records, [manifest.sizes[v.path] for v in videos]),
        timeout=timeout,
    )


def _packed_videos(catalog: Catalog, listed: Sequence[Video], timeout: float) -> VideoSet:
    """The same from a store, whose index knows what a verification would find."""
    store = open_store(catalog.root)
    videos = [v for v in listed if v.path not in store.unreadable]
    if not videos:
        raise UserError(f"{catalog.root}: none of these {len(listed)} videos could be packed; see train.py check")
    rows = store.rows_of(v.path for v in videos)
    return VideoSet(
        root=catalog.root,
        layout=catalog.layout,
        classes=catalog.classes,
        unreadable={v.path: store.unreadable[v.path] for v in listed if v.path in store.unreadable},
        paths=StringArray(v.path for v in videos),
        labels=np.array([v.label for v in videos], np.int64),
        frames=store.frames[rows],
        heights=store.heights[rows],
        widths=store.widths[rows],
        source=store.source(rows),
        timeout=timeout,
    )
