"""Samples and batches: which frames and which augmentation a video gives to a training step or to a test.

A training sample depends on (seed, epoch, index of the video) only. So the number of workers, the number of ranks and a
resume do not change it.

Letters: B samples in a batch, F frames in a sample, T frames in a clip, H and W the largest height and width of the
videos (in a test batch: those of its one video). A smaller frame fills the top left corner of its plane. The bytes to
its right and below it are undefined and are never read: the augmentation of each clip holds the true size of the frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dclr.config import DataConfig
from dclr.data import augmentation, clips
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames
from dclr.data.ring_buffer import FrameShape
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from dclr.kernels import Augmentation, ViewParams, Yuv420
from dclr.kernels.types import AUGMENTATION

TEST_CLIPS = 10
"""Test clips per video, evenly spaced: the test protocol of the released code."""

T = TypeVar("T")


@dataclass(frozen=True)
class PairBatch:
    """Two clips of each of B videos and one still of each clip, for pretraining."""

    frames: Yuv420
    """Planes (B, 2 T + 2, H, W): query clip, key clip, query still, key still."""
    query_params: ViewParams
    key_params: ViewParams
    indices: Tensor
    """(B,) int64, the videos."""
    failures: dict[str, str]
    """Path -> reason, of the videos that failed and were replaced by the next video of the epoch."""

    @property
    def query_frames(self) -> Yuv420:
        """(B, T, H, W)"""
        return self.frames.select(np.s_[:, : self._length])

    @property
    def key_frames(self) -> Yuv420:
        """(B, T, H, W)"""
        return self.frames.select(np.s_[:, self._length : -2])

    @property
    def query_stills(self) -> Yuv420:
        """(B, H, W)"""
        return self.frames.select(np.s_[:, -2])

    @property
    def key_stills(self) -> Yuv420:
        """(B, H, W)"""
        return self.frames.select(np.s_[:, -1])

    @property
    def _length(self) -> int:
        return self.frames.y.shape[1] // 2 - 1


@dataclass(frozen=True)
class ClipBatch:
    """One clip of each of B videos (training), or B test clips of one video; none if that video failed."""

    frames: Yuv420
    """Planes (B, T, H, W)."""
    augmentation: Augmentation
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64, the video of each clip."""
    failures: dict[str, str]
    """Path -> reason, of the videos that could not be read."""


Batch = PairBatch | ClipBatch


@dataclass(frozen=True)
class Sample:
    """The frames and augmentation of one video in a batch."""

    index: int
    frames: YuvFrames
    rows: np.ndarray
    """Dtype AUGMENTATION, one entry for each clip and still."""


@dataclass(frozen=True)
class SampleInfo:
    """A sample without its frames, which a worker has written into shared memory: all that a worker sends to the
    training process."""

    index: int
    rows: np.ndarray
    """The same as in Sample."""
    bt709: bool
    full_range: bool
    failures: dict[str, str]
    """Path -> reason, of the videos that were tried before this one."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the rows as bytes. The description of their dtype would take 468 bytes for each chunk."""
        return _sample_info, (self.index, self.rows.tobytes(), self.bt709, self.full_range, self.failures)


def _sample_info(index: int, rows: bytes, *others: Any) -> SampleInfo:
    return SampleInfo(index, np.frombuffer(bytearray(rows), AUGMENTATION), *others)


def stack_frames(frames: Sequence[YuvFrames]) -> Yuv420:
    """Stack B clips of one size, T frames each, as planes (B, T, H, W)."""
    y, u, v = (torch.from_numpy(np.stack([getattr(clip, plane) for clip in frames])) for plane in "yuv")
    return Yuv420(y, u, v, *stack_flags(frames))


def stack_flags(samples: Sequence[YuvFrames | SampleInfo]) -> tuple[Tensor, Tensor]:
    """Return bt709 and full_range of B samples, each (B,) bool."""
    flags = torch.tensor([(sample.bt709, sample.full_range) for sample in samples], dtype=torch.bool).reshape(-1, 2)
    return flags[:, 0], flags[:, 1]


def merge_failures(failures: Iterable[dict[str, str]]) -> dict[str, str]:
    """Return the failures (path -> reason) of several samples or batches in one dict."""
    return {path: reason for group in failures for path, reason in group.items()}


def read_or_next(
    videos: VideoSet, order: np.ndarray, position: int, read: Callable[[int], T]
) -> tuple[T, dict[str, str]]:
    """Call `read(index)` for the video at `position` of the epoch's order, or for the next one that can be read.

    Args:
        order: (N,) int64, the videos in the order of the epoch.
        read: raises UnreadableVideo if the video cannot be read.

    Returns:
        The result of `read`, and the failures before it (path -> reason).

    Raises:
        UserError: no video of the epoch can be read.
    """
    failures: dict[str, str] = {}
    for offset in range(len(order)):
        index = int(order[(position + offset) % len(order)])
        try:
            return read(index), failures
        except UnreadableVideo as error:
            failures[videos.path(index)] = str(error)
    raise UserError(
        f"{videos.root}: not one of {len(order)} videos can be read any more; was the folder moved or unmounted?"
    )


class Samples(ABC):
    """Samples of training or of a test. A pair of numbers names a sample, its position."""

    videos: VideoSet

    advice: str
    """What the user can do if batches take too much memory, as the end of a message."""

    @abstractmethod
    def shape(self, positions: Sequence[tuple[int, int]]) -> FrameShape:
        """Return the shape of the frames of a batch that has these samples."""

    @abstractmethod
    def read_chunk(self, positions: Sequence[tuple[int, int]], into: Planes) -> list[SampleInfo]:
        """Write the frames of these samples into planes (B, F, H, W) and return the rest of the samples."""

    @abstractmethod
    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> Batch:
        """Return samples as a batch. Frames are not copied."""


class TrainSamples(Samples):
    """Random training samples by (epoch, position in the epoch's order)."""

    frames_a_sample: int
    advice = "make frames smaller with train.py pack, or lower --batch-size or --workers"

    def __init__(self, videos: VideoSet, config: DataConfig, seed: int) -> None:
        self.videos, self.config, self.seed = videos, config, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._largest = int(videos.heights.max()), int(videos.widths.max())

    def shape(self, positions: Sequence[tuple[int, int]]) -> FrameShape:
        """Return the same shape for all batches of one size. It has room for the largest video."""
        return FrameShape(len(positions), self.frames_a_sample, *self._largest)

    def read_chunk(self, positions: Sequence[tuple[int, int]], into: Planes) -> list[SampleInfo]:
        return [
            self.read_into(epoch, position, (y, u, v))
            for (epoch, position), y, u, v in zip(positions, *into, strict=True)
        ]

    def read_into(self, epoch: int, position: int, into: Planes) -> SampleInfo:
        """Write the frames of a sample into `into` and return the rest of it. A failed video may have written to `into`
        before."""
        if self._order[0] != epoch:
            self._order = (epoch, clips.epoch_order(self.seed, epoch, len(self.videos)))
        order = self._order[1]
        sample, failures = read_or_next(self.videos, order, position, lambda index: self.read(epoch, index, into))
        return SampleInfo(sample.index, sample.rows, sample.frames.bt709, sample.frames.full_range, failures)

    @abstractmethod
    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """Return the sample of a video in an epoch, a pure function of (seed, epoch, index). Raises UnreadableVideo.

        The frames are written into `into`, or into new memory without it.
        """


class PairSamples(TrainSamples):
    """Pretraining samples: two clips of a video and one still of each clip.

    With `same_frames`, both clips are the same frames, each with its own augmentation. `distinct_starts`: see
    `clips.draw_pair`.
    """

    def __init__(
        self,
        videos: VideoSet,
        config: DataConfig,
        seed: int,
        recipe: augmentation.AugmentRecipe = augmentation.PRETRAIN,
        same_frames: bool = False,
        distinct_starts: bool = True,
    ) -> None:
        super().__init__(videos, config, seed)
        self.frames_a_sample, self.recipe = 2 * config.clip_length + 2, recipe
        self.same_frames, self.distinct_starts = same_frames, distinct_starts

    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """Return frames in the order query clip, key clip, query still, key still, and rows in the order query, its
        still, key, its still."""
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        pair = clips.draw_pair(rng, count, length, stride, self.same_frames, self.distinct_starts)
        wanted = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
        frames = self.videos.read(index, wanted, into)  # one pass over the file for all four
        height, width = frames.y.shape[1:]
        rows = [augmentation.draw_augmentation(rng, height, width, self.recipe, frames.display) for _ in range(4)]
        return Sample(index, frames, np.stack(rows))

    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> PairBatch:
        rows = np.stack([info.rows for info in infos])  # (B, 4)
        query, query_still, key, key_still = (augmentation.to_augmentation(rows[:, i]) for i in range(4))
        size = (self.config.crop_size, self.config.crop_size)
        return PairBatch(
            frames,
            ViewParams(query, query_still, size),
            ViewParams(key, key_still, size),
            torch.tensor([info.index for info in infos]),
            merge_failures(info.failures for info in infos),
        )


class ClipSamples(TrainSamples):
    """Samples for training on labels: one random clip of a video."""

    def __init__(
        self,
        videos: VideoSet,
        config: DataConfig,
        seed: int,
        recipe: augmentation.AugmentRecipe = augmentation.FINETUNE["crop"],
    ) -> None:
        super().__init__(videos, config, seed)
        self.frames_a_sample, self.recipe = config.clip_length, recipe

    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """Return the frames of the clip and its one row."""
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        wanted = clips.window(clips.random_start(rng, count, length, stride), count, length, stride)
        frames = self.videos.read(index, wanted, into)
        height, width = frames.y.shape[1:]
        row = augmentation.draw_augmentation(rng, height, width, self.recipe, frames.display)
        return Sample(index, frames, row[None])

    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> ClipBatch:
        indices = [info.index for info in infos]
        return ClipBatch(
            frames,
            augmentation.to_augmentation(np.concatenate([info.rows for info in infos])),
            torch.from_numpy(self.videos.labels[indices]),
            torch.tensor(indices),
            merge_failures(info.failures for info in infos),
        )


class TestClips(Samples):
    """The clips of the test protocol: TEST_CLIPS evenly spaced clips of a video, centre crop.

    The position of a clip is (video, number of the clip). A batch has clips of one video.
    """

    __test__ = False  # pytest would collect it because of its name
    advice = "make frames smaller with train.py pack, or use --workers 0, which holds one batch in memory"

    def __init__(self, videos: VideoSet, config: DataConfig) -> None:
        self.videos, self.config = videos, config

    def shape(self, positions: Sequence[tuple[int, int]]) -> FrameShape:
        """Return a shape of the video's own height and width."""
        index = positions[0][0]
        height, width = int(self.videos.heights[index]), int(self.videos.widths[index])
        return FrameShape(len(positions), self.config.clip_length, height, width)

    def read(self, index: int, numbers: Sequence[int] = range(TEST_CLIPS), into: Planes | None = None) -> YuvFrames:
        """Return the frames of some of a video's clips, clip after clip, (B T, H, W). Raises UnreadableVideo.

        The frames are written into `into`, or into new memory without it.
        """
        frames, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        wanted = clips.uniform_clips(frames, TEST_CLIPS, length, stride)[list(numbers)]
        return self.videos.read(index, wanted.ravel(), into)

    def read_chunk(self, positions: Sequence[tuple[int, int]], into: Planes) -> list[SampleInfo]:
        """Write the clips into `into`.

        A video that fails gives one SampleInfo with the reason. An accuracy must not count another video instead.
        """
        index = positions[0][0]
        y, u, v = (plane.reshape(-1, *plane.shape[2:]) for plane in into)
        try:
            frames = self.read(index, [number for _, number in positions], (y, u, v))
        except UnreadableVideo as error:
            none = np.empty(0, AUGMENTATION)
            return [SampleInfo(index, none, False, False, {self.videos.path(index): str(error)})]
        height, width = frames.y.shape[1:]
        row = np.array([augmentation.centre_crop(height, width, frames.display)], AUGMENTATION)
        return [SampleInfo(index, row, frames.bt709, frames.full_range, {})] * len(positions)

    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> ClipBatch:
        """Return the clips of a video, or a batch without clips if the video failed."""
        read = [info for info in infos if not info.failures]
        indices = np.array([info.index for info in read], np.int64)
        y, u, v = (plane[: len(read)] for plane in (frames.y, frames.u, frames.v))
        return ClipBatch(
            Yuv420(y, u, v, *stack_flags(read)),
            augmentation.to_augmentation(np.concatenate([info.rows for info in infos])),
            torch.from_numpy(self.videos.labels[indices]),
            torch.from_numpy(indices),
            merge_failures(info.failures for info in infos),
        )
