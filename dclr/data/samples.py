"""Samples and batches: which frames and which augmentation a video gives to a training step or to a test.

A training sample depends on (seed, epoch, index of the video) only. So the number of workers, the number of ranks and a
resume do not change it.

Letters: B samples in a batch, T frames in a clip, H and W the largest height and width of the videos (in a test batch:
of its own videos). A smaller frame fills the top left corner of its plane. The bytes to its right and below it are
undefined and are never read: the augmentation of each clip holds the true size of the frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dclr.config import DataConfig
from dclr.data import augmentation, clips
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, empty_planes
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from kernels import Augmentation, ViewParams, Yuv420
from kernels.types import AUGMENTATION

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
    """One clip of each of B videos (training), or all test clips of several videos, video after video (B clips in
    total)."""

    frames: Yuv420
    """Planes (B, T, H, W)."""
    augmentation: Augmentation
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64, the video of each clip."""
    failures: dict[str, str]
    """Path -> reason, of the videos that could not be read."""

    def pin_memory(self) -> "ClipBatch":
        """Return a copy in pinned memory. DataLoader calls this for test clips, so that copies to the GPU do not
        block."""
        own = self.frames
        return replace(self, frames=replace(own, y=own.y.pin_memory(), u=own.u.pin_memory(), v=own.v.pin_memory()))


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


class TrainSamples(ABC):
    """Random training samples by (epoch, position in the epoch's order)."""

    frames_a_sample: int

    def __init__(self, videos: VideoSet, config: DataConfig, seed: int) -> None:
        self.videos, self.config, self.seed = videos, config, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

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

    @abstractmethod
    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> Batch:
        """Return B samples as a batch. Frames are not copied."""


class PairSamples(TrainSamples):
    """Pretraining samples: two clips of a video and one still of each clip."""

    def __init__(
        self,
        videos: VideoSet,
        config: DataConfig,
        seed: int,
        recipe: augmentation.AugmentRecipe = augmentation.PRETRAIN,
    ) -> None:
        super().__init__(videos, config, seed)
        self.frames_a_sample, self.recipe = 2 * config.clip_length + 2, recipe

    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """Return frames in the order query clip, key clip, query still, key still, and rows in the order query, its
        still, key, its still."""
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        pair = clips.draw_pair(rng, count, length, stride)
        wanted = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
        frames = self.videos.read(index, wanted, into)  # one pass over the file for all four
        height, width = frames.y.shape[1:]
        rows = [augmentation.draw_augmentation(rng, height, width, self.recipe) for _ in range(4)]
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

    def __init__(self, videos: VideoSet, config: DataConfig, seed: int) -> None:
        super().__init__(videos, config, seed)
        self.frames_a_sample = config.clip_length

    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """Return the frames of the clip and its one row."""
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        wanted = clips.window(clips.random_start(rng, count, length, stride), count, length, stride)
        frames = self.videos.read(index, wanted, into)
        height, width = frames.y.shape[1:]
        row = augmentation.draw_augmentation(rng, height, width, augmentation.FINETUNE)
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


class TestClips(Dataset[Any]):
    """The clips of the test protocol: TEST_CLIPS evenly spaced clips of a video, centre crop."""

    __test__ = False  # pytest would collect it because of its name

    def __init__(self, videos: VideoSet, config: DataConfig) -> None:
        self.videos, self.config = videos, config

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, index: int, into: Planes | None = None) -> YuvFrames:
        """Return the frames of a video's clips, clip after clip, (TEST_CLIPS * T, H, W). Raises UnreadableVideo.

        The frames are written into `into`, or into new memory without it.
        """
        frames, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        return self.videos.read(index, clips.uniform_clips(frames, TEST_CLIPS, length, stride).ravel(), into)

    def __getitems__(self, indices: Sequence[int]) -> ClipBatch:
        """Return the clips of these videos. A video that fails is skipped, because an accuracy must not count another
        video instead."""
        own, length = self.videos, self.config.clip_length
        frames_a_video = TEST_CLIPS * length
        height, width = int(own.heights[indices].max()), int(own.widths[indices].max())
        planes = empty_planes(len(indices) * frames_a_video, height, width)
        read: list[int] = []
        frames: list[YuvFrames] = []
        failures: dict[str, str] = {}
        for index in indices:
            first = len(read) * frames_a_video
            y, u, v = (plane[first : first + frames_a_video] for plane in planes)
            try:
                frames.append(self.read(index, (y, u, v)))
            except UnreadableVideo as error:
                failures[own.path(index)] = str(error)
                continue
            read.append(index)

        of_clips = np.repeat(np.array(read, np.int64), TEST_CLIPS)  # (B,)
        rows = [augmentation.centre_crop(int(own.heights[index]), int(own.widths[index])) for index in of_clips]
        y, u, v = (torch.from_numpy(plane).unflatten(0, (-1, length))[: len(of_clips)] for plane in planes)
        bt709, full_range = (flags.repeat_interleave(TEST_CLIPS) for flags in stack_flags(frames))
        return ClipBatch(
            Yuv420(y, u, v, bt709, full_range),
            augmentation.to_augmentation(np.array(rows, AUGMENTATION)),
            torch.from_numpy(own.labels[of_clips]),
            torch.from_numpy(of_clips),
            failures,
        )
