"""Batches from videos: decoded by worker processes, uint8 until the device, and at any step the same whoever asks.

What a sample is depends on (seed, epoch, index) alone; which samples make a batch on (seed, step, batch size). So the number of
workers and of ranks, and whether the run was resumed, change nothing.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dclr import views
from dclr.config import DataConfig
from dclr.data import clips
from dclr.data.catalog import Catalog, Video
from dclr.data.decode import UnreadableVideo, VideoRecord, read_frames
from dclr.data.manifest import load_manifest
from dclr.errors import UserError
from kernels import Augmentation, ViewParams

TEST_CLIPS = 10  # clips a video, uniformly spaced: the test protocol of the released code
T = TypeVar("T")


@dataclass(frozen=True)
class VideoSet:
    """The readable videos of one split, in catalog order; a sample's index is a place in this list."""

    catalog: Catalog
    videos: tuple[Video, ...]
    records: tuple[VideoRecord, ...]
    unreadable: dict[str, str]  # path -> reason

    def read(self, index: int, wanted: np.ndarray) -> np.ndarray:
        """Frames (len(wanted), H, W, 3) uint8 of a video. Raises UnreadableVideo."""
        return read_frames(self.catalog.root / self.videos[index].path, self.records[index], wanted)


def open_videos(catalog: Catalog, split: str, workers: int, progress: bool = True) -> VideoSet:
    """The split's videos that a full decode could read, once and cached. Raises UserError: none can be."""
    listed = catalog.videos(split)
    manifest = load_manifest(catalog.root, [v.path for v in listed], workers=workers, progress=progress)
    videos = tuple(v for v in listed if v.path in manifest.records)
    if not videos:
        first, reason = next(iter(manifest.unreadable.items()))
        raise UserError(
            f"{catalog.root}: none of the {len(listed)} videos of split {split} can be read ({first}: {reason}); see train.py check"
        )
    unreadable = {v.path: manifest.unreadable[v.path] for v in listed if v.path in manifest.unreadable}
    return VideoSet(catalog, videos, tuple(manifest.records[v.path] for v in videos), unreadable)


@dataclass(frozen=True)
class Batch:
    """Fields are tensors, parameters of views, or plain values; frames are uint8."""

    def to(self, device: torch.device) -> "Batch":
        """Frames and labels on `device`. View parameters stay: they are checked on the host, and travel as one small table."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader, so that copies to the GPU do not wait."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> Any:
        values = [getattr(self, f.name) for f in fields(self)]
        return type(self)(*(move(v) if isinstance(v, Tensor) else v for v in values))


@dataclass(frozen=True)
class PairBatch(Batch):
    """Two clips of each of B videos, for pretraining."""

    query_frames: Tensor  # (B, T, H, W, 3) uint8, zero-padded to the largest frame of the batch
    query_stills: Tensor  # (B, H, W, 3) uint8
    query_params: ViewParams
    key_frames: Tensor  # (B, T, H, W, 3) uint8
    key_stills: Tensor  # (B, H, W, 3) uint8
    key_params: ViewParams
    indices: Tensor  # (B,) int64: which videos
    failures: dict[str, str]  # path -> reason, of videos that gave their place to the next


@dataclass(frozen=True)
class ClipBatch(Batch):
    """One clip of each of B videos (training), or all test clips of some videos, one after the other."""

    frames: Tensor  # (B, T, H, W, 3) uint8
    augmentation: Augmentation
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64: which videos
    failures: dict[str, str]


def read_or_next(videos: VideoSet, order: np.ndarray, place: int, read: Callable[[int], T]) -> tuple[T, dict[str, str]]:
    """`read(index)` of the video at `place` of the epoch's order; one that fails gives its place to the next of the order.

    Returns what was read and the failures (path -> reason). Raises UserError when no video of the epoch can be read.
    """
    failures: dict[str, str] = {}
    for offset in range(len(order)):
        index = int(order[(place + offset) % len(order)])
        try:
            return read(index), failures
        except UnreadableVideo as error:
            failures[videos.videos[index].path] = str(error)
    raise UserError(
        f"{videos.catalog.root}: not one of {len(order)} videos can be read any more; was the folder moved or unmounted?"
    )


class TrainSamples(Dataset[Any], ABC):
    """Random samples by (epoch, place in the epoch's order)."""

    def __init__(self, videos: VideoSet, config: DataConfig, seed: int) -> None:
        self.videos, self.config, self.seed = videos, config, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, dict[str, str]]:
        epoch, place = key
        if self._order[0] != epoch:
            self._order = (epoch, clips.epoch_order(self.seed, epoch, len(self.videos.videos)))
        return read_or_next(self.videos, self._order[1], place, lambda index: self.read(epoch, index))

    @abstractmethod
    def read(self, epoch: int, index: int) -> Any:
        """The sample of a video in an epoch: a pure function of (seed, epoch, index). Raises UnreadableVideo."""

    @abstractmethod
    def collate(self, drawn: Sequence[tuple[Any, dict[str, str]]]) -> Batch:
        """Samples with their failures -> a batch."""


class PairSamples(TrainSamples):
    """Pretraining: two clips of a video and a still of each."""

    def read(self, epoch: int, index: int) -> tuple[Any, ...]:
        """A sample: index, frames of both clips, both stills, and four augmentation rows."""
        rng = clips.sample_rng(self.seed, epoch, index)
        pair = clips.draw_pair(rng, self.videos.records[index].frames, self.config.clip_length, self.config.clip_stride)
        wanted = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
        frames = self.videos.read(index, wanted)  # one pass over the file for all four
        height, width = frames.shape[1:3]
        rows = [views.draw_augmentation(rng, height, width, views.PRETRAIN) for _ in range(4)]
        length = self.config.clip_length
        return index, frames[:length], frames[length:-2], frames[-2], frames[-1], rows

    def collate(self, drawn: Sequence[tuple[tuple[Any, ...], dict[str, str]]]) -> PairBatch:
        samples = [sample for sample, _ in drawn]
        indices, query, key, query_still, key_still, rows = zip(*samples, strict=True)
        query_row, query_still_row, key_row, key_still_row = (
            views.to_augmentation([r[i] for r in rows]) for i in range(4)
        )
        size = (self.config.crop_size, self.config.crop_size)
        return PairBatch(
            pad(query),
            pad(query_still),
            ViewParams(query_row, query_still_row, size),
            pad(key),
            pad(key_still),
            ViewParams(key_row, key_still_row, size),
            torch.tensor(indices),
            merge(failures for _, failures in drawn),
        )


class ClipSamples(TrainSamples):
    """Supervised training: one random clip of a video."""

    def read(self, epoch: int, index: int) -> tuple[int, np.ndarray, list[np.ndarray]]:
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = self.videos.records[index].frames, self.config.clip_length, self.config.clip_stride
        frames = self.videos.read(
            index, clips.window(clips.random_start(rng, count, length, stride), count, length, stride)
        )
        return index, frames[None], [views.draw_augmentation(rng, frames.shape[1], frames.shape[2], views.FINETUNE)]

    def collate(self, drawn: Sequence[Any]) -> ClipBatch:
        return collate_clips(self.videos, drawn)


class TestClips(Dataset[Any]):
    """The test protocol: TEST_CLIPS clips of a video, uniformly spaced, centre crop; by index."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, videos: VideoSet, config: DataConfig) -> None:
        self.videos, self.config = videos, config

    def __len__(self) -> int:
        return len(self.videos.videos)

    def __getitem__(self, index: int) -> Any:
        count = self.videos.records[index].frames
        wanted = clips.uniform_clips(count, TEST_CLIPS, self.config.clip_length, self.config.clip_stride)
        try:
            frames = self.videos.read(index, wanted.ravel())
        except UnreadableVideo as error:
            return None, {self.videos.videos[index].path: str(error)}
        row = views.centre_crop(*frames.shape[1:3])
        return (index, frames.reshape(*wanted.shape, *frames.shape[1:]), [row] * TEST_CLIPS), {}

    def collate(self, drawn: Sequence[Any]) -> ClipBatch:
        """Videos that fail are left out: a figure must not count another video in their place."""
        return collate_clips(self.videos, drawn)


def collate_clips(videos: VideoSet, drawn: Sequence[tuple[Any, dict[str, str]]]) -> ClipBatch:
    samples = [sample for sample, _ in drawn if sample is not None]
    indices = [index for index, clip_frames, _ in samples for _ in clip_frames]
    return ClipBatch(
        pad([clip for _, clip_frames, _ in samples for clip in clip_frames]),
        views.to_augmentation([row for _, _, rows in samples for row in rows] or np.empty(0, views.AUGMENTATION)),
        torch.tensor([videos.videos[index].label for index in indices], dtype=torch.int64),
        torch.tensor(indices, dtype=torch.int64),
        merge(failures for _, failures in drawn),
    )


def pad(images: Sequence[np.ndarray]) -> Tensor:
    """Arrays (..., H, W, 3) of equal leading sizes -> (len, ..., max H, max W, 3), each at the top left, zeros elsewhere."""
    if not images:
        return torch.empty(0, 1, 1, 1, 3, dtype=torch.uint8)
    height, width = (max(image.shape[axis] for image in images) for axis in (-3, -2))
    buffer = np.zeros((len(images), *images[0].shape[:-3], height, width, 3), np.uint8)
    for slot, image in zip(buffer, images, strict=True):
        slot[..., : image.shape[-3], : image.shape[-2], :] = image
    return torch.from_numpy(buffer)


def merge(parts: Any) -> dict[str, str]:
    return {path: reason for part in parts for path, reason in part.items()}


class Schedule:
    """Which (epoch, place) a rank reads at each micro-batch, from `start` to `stop` (both in optimizer steps).

    A step takes `batch_size` consecutive places of the epoch's order, cut first into accumulation micro-batches and those into
    ranks; the last incomplete step of an epoch is dropped.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        *,
        start: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if count < batch_size:
            raise UserError(
                f"--batch-size is {batch_size}, but there are only {count} readable training videos: lower it"
            )
        self.batch_size, self.accumulation, self.start = batch_size, accumulation, start
        self.rank, self.ranks = rank, ranks
        self.steps_per_epoch = count // batch_size
        self.stop = epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro = self.batch_size // (self.accumulation * self.ranks)
        for step in range(self.start, self.stop):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            for part in range(self.accumulation):
                first = step_in_epoch * self.batch_size + (part * self.ranks + self.rank) * micro
                yield [(epoch, place) for place in range(first, first + micro)]


def train_loader(samples: TrainSamples, schedule: Schedule, workers: int, pin: bool) -> Iterator[Any]:
    """Micro-batches of a whole run in order; one loader for all epochs, so that no epoch starts with idle workers."""
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=schedule,
        collate_fn=samples.collate,
        num_workers=workers,
        pin_memory=pin,
    )
    return _in_one_line(iter(loader))


def _in_one_line(batches: Iterator[Any]) -> Iterator[Any]:
    """The same; a worker's UserError without the traceback that DataLoader puts before its message."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def test_loader(samples: TestClips, videos_a_batch: int, workers: int, pin: bool) -> DataLoader[Any]:
    """Each video once, in order."""
    return DataLoader(
        samples,
        batch_size=videos_a_batch,
        shuffle=False,
        collate_fn=samples.collate,
        num_workers=workers,
        pin_memory=pin,
    )


class Failures:
    """Videos that failed while a run read them: counted, each named once on stderr with what becomes of it."""

    def __init__(self, consequence: str = "its place goes to the next video") -> None:
        self.reasons: dict[str, str] = {}
        self.count = 0
        self.consequence = consequence

    def add(self, failures: dict[str, str]) -> None:
        self.count += len(failures)
        for path, reason in failures.items():
            if path not in self.reasons:
                print(
                    f"warning: {path} can no longer be read ({reason}); {self.consequence}",
                    file=sys.stderr,
                )
            self.reasons.setdefault(path, reason)
