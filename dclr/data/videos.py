"""The readable videos of one split, as arrays that worker processes inherit and never copy (see records.py)."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dclr.data import decoder_process
from dclr.data.catalog import Catalog
from dclr.data.decode import Planes, UnreadableVideo, VideoRecord, YuvFrames, read_planes
from dclr.data.display import AS_CODED, Displays
from dclr.data.manifest import KnownFiles, load_manifest
from dclr.data.records import Records
from dclr.data.store import Selection, open_store
from dclr.data.store_damage import check_sizes
from dclr.data.string_array import StringArray
from dclr.errors import UserError


class NoReadableVideo(UserError):
    """None of the requested videos can be read.

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

    def identity(self) -> Iterable[np.ndarray]:
        """Yield arrays that change if the content of a video changes."""
        ...


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the set without `faults`: each set has its own. The fingerprint is pickled if it is known."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        known = {name: value for name, value in self.__dict__.items() if name == "_fingerprint"}
        return partial(VideoSet, **values), (), known or None

    def fingerprint(self) -> str:
        """Return a SHA-256 of the list of videos and of all that is known of their content without reading them
        again. It is computed once: for a million videos this takes some seconds."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        paths = self.paths.packed[self.paths.packed != 0]  # without the null characters between them
        digest = hashlib.sha256()
        for array in chain([paths, self.labels, self.frames, self.heights, self.widths], self.source.identity()):
            digest.update(np.ascontiguousarray(array).data)
        displays = self.source.displays.values
        if (displays != AS_CODED).any():  # otherwise the digest is that of checkpoints from before displays were known
            digest.update(np.ascontiguousarray(displays).data)
        return digest.hexdigest()


class VideoFiles:
    """A Source of video files. Each is decoded by the record of its verification."""

    def __init__(self, root: Path, paths: StringArray, records: Records, sizes: np.ndarray | None = None) -> None:
        """`sizes`: (N,) int64, bytes of the files."""
        self._root, self._paths, self._records = root, paths, records
        self._sizes = np.empty(0, np.int64) if sizes is None else sizes
        self.frames, self.displays = records.frames, records.displays
        self.heights, self.widths = records.sizes.T.astype(np.int64, order="C")

    def record(self, index: int) -> VideoRecord:
        """Return the record of a video's verification."""
        return self._records[index]

    def read_planes(self, index: int, wanted: np.ndarray, into: Planes | None = None) -> YuvFrames:
        return read_planes(self._root / self._paths[index], self.record(index), wanted, into)

    def identity(self) -> Iterator[np.ndarray]:
        """Yield the sizes of the files, and the timestamps, keyframes and all else that decides what is read."""
        yield self._sizes
        yield from self._records.identity()


def open_videos(
    catalog: Catalog,
    split: str,
    workers: int,
    progress: bool = True,
    timeout: float = decoder_process.TIMEOUT,
    known: KnownFiles | None = None,
) -> VideoSet:
    """Return the readable videos of a split. Video files are verified by a full decode, once: the findings are cached.

    Args:
        workers: processes that verify.
        timeout: seconds without a frame after which a decoder process is killed, now and when training reads.
        known: see `load_manifest`.

    Raises:
        NoReadableVideo: none of the videos can be read.
        UserError: there are no such videos, or the store is damaged (see `store_damage.check_sizes`).
    """
    listed = catalog.videos(split)
    if catalog.index is None:
        paths_listed = [video.path for video in listed]
        manifest = load_manifest(
            catalog.root, paths_listed, workers=workers, progress=progress, timeout=timeout, known=known
        )
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
        rows = manifest.records.rows([video.path for video in videos])
        source = VideoFiles(catalog.root, paths, manifest.records.records.select(rows), manifest.sizes[rows])
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
