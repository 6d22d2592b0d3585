"""Batches from videos: decoded by worker processes, uint8 planes until the device, and at any step the same whoever asks.

What a sample is depends on (seed, epoch, index) alone; which samples make a batch on (seed, step, batch size). So the number of
workers and of ranks, and whether the run was resumed, change nothing.

Letters: B samples in a micro-batch, T frames a clip, H, W the largest height and width of the videos (of a test batch: of its videos).
What lies beside and below a smaller frame is undefined, and nobody reads it: augmentation rows hold the frame's true size.
"""

import gc
import math
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dclr.config import DataConfig
from dclr.data import augmentation, clips
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, empty_planes
from dclr.data.decoder_process import (
    TICK,
    DecoderDied,
    DecoderProcess,
    end_with_parent,
    leave_signals_to_parent,
    shared_array,
)
from dclr.data.ring_buffer import FrameRing
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from kernels import Augmentation, ViewParams, Yuv420
from kernels.types import AUGMENTATION

TEST_CLIPS = 10  # clips a video, uniformly spaced: the test protocol of the released code
CHUNK = 8  # samples at most that a worker is asked for at a time: the workers share out a micro-batch
PREFETCH = 2  # chunks that a worker has been asked for and not given: one that it reads, one that waits
T = TypeVar("T")


@dataclass(frozen=True)
class PairBatch:
    """Two clips of each of B videos and a still of each clip, for pretraining."""

    frames: Yuv420  # planes (B, 2 T + 2, H, W): query clip, key clip, query still, key still
    query_params: ViewParams
    key_params: ViewParams
    indices: Tensor  # (B,) int64: which videos
    failures: dict[str, str]  # path -> reason, of videos that gave their position to the next

    @property
    def query_frames(self) -> Yuv420:  # (B, T, H, W), as key_frames
        return self._part(slice(0, self._length))

    @property
    def key_frames(self) -> Yuv420:
        return self._part(slice(self._length, 2 * self._length))

    @property
    def query_stills(self) -> Yuv420:  # (B, H, W), as key_stills
        return self._part(-2)

    @property
    def key_stills(self) -> Yuv420:
        return self._part(-1)

    @property
    def _length(self) -> int:
        return self.frames.y.shape[1] // 2 - 1

    def _part(self, positions: slice | int) -> Yuv420:
        """Views of some frames of every sample."""
        own = self.frames
        return own.select(np.s_[:, positions])


@dataclass(frozen=True)
class ClipBatch:
    """One clip of each of B videos (training), or all test clips of some videos, one after the other."""

    frames: Yuv420  # planes (B, T, H, W)
    augmentation: Augmentation
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64: which videos
    failures: dict[str, str]

    def pin_memory(self) -> "ClipBatch":
        """Called by the DataLoader of test clips, so that copies to the GPU do not wait."""
        own = self.frames
        return replace(self, frames=replace(own, y=own.y.pin_memory(), u=own.u.pin_memory(), v=own.v.pin_memory()))


Batch = PairBatch | ClipBatch


@dataclass(frozen=True)
class Sample:
    """What one video gives to a batch."""

    index: int
    frames: YuvFrames
    rows: np.ndarray  # dtype AUGMENTATION: one for each clip and still


@dataclass(frozen=True)
class SampleInfo:
    """A sample whose frames lie in the ring: all else, which is what travels from a worker."""

    index: int
    rows: np.ndarray  # as Sample's
    bt709: bool
    full_range: bool
    failures: dict[str, str]


def read_or_next(
    videos: VideoSet, order: np.ndarray, position: int, read: Callable[[int], T]
) -> tuple[T, dict[str, str]]:
    """`read(index)` of the video at `position` of the epoch's order; one that fails gives its position to the next of the order.

    Returns what was read and the failures (path -> reason). Raises UserError when no video of the epoch can be read.
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
    """Random samples by (epoch, position in the epoch's order)."""

    frames_a_sample: int

    def __init__(self, videos: VideoSet, config: DataConfig, seed: int) -> None:
        self.videos, self.config, self.seed = videos, config, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def read_into(self, epoch: int, position: int, into: Planes) -> SampleInfo:
        """Reads a sample's frames into `into`, which a video that fails on the way may have written to before."""
        if self._order[0] != epoch:
            self._order = (epoch, clips.epoch_order(self.seed, epoch, len(self.videos)))
        order = self._order[1]
        sample, failures = read_or_next(self.videos, order, position, lambda index: self.read(epoch, index, into))
        return SampleInfo(sample.index, sample.rows, sample.frames.bt709, sample.frames.full_range, failures)

    @abstractmethod
    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """The sample of a video in an epoch: a pure function of (seed, epoch, index). Raises UnreadableVideo."""

    @abstractmethod
    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> Batch:
        """Frames of B samples and the rest of them -> a batch, without copying frames."""


class PairSamples(TrainSamples):
    """Pretraining: two clips of a video and a still of each."""

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
        """Frames of the query clip, the key clip, the query's still and the key's; rows of query, its still, key, its still."""
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        pair = clips.draw_pair(rng, count, length, stride)
        wanted = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
        frames = self.videos.read(index, wanted, into)  # one pass over the file for all four
        height, width = frames.y.shape[1:]
        return Sample(
            index, frames, np.stack([augmentation.draw_augmentation(rng, height, width, self.recipe) for _ in range(4)])
        )

    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> PairBatch:
        rows = np.stack([sample.rows for sample in infos])  # (B, 4)
        query, query_still, key, key_still = (augmentation.to_augmentation(rows[:, i]) for i in range(4))
        size = (self.config.crop_size, self.config.crop_size)
        return PairBatch(
            frames,
            ViewParams(query, query_still, size),
            ViewParams(key, key_still, size),
            torch.tensor([sample.index for sample in infos]),
            merge(sample.failures for sample in infos),
        )


class ClipSamples(TrainSamples):
    """WatchedSamples training: one random clip of a video."""

    def __init__(self, videos: VideoSet, config: DataConfig, seed: int) -> None:
        super().__init__(videos, config, seed)
        self.frames_a_sample = config.clip_length

    def read(self, epoch: int, index: int, into: Planes | None = None) -> Sample:
        """Frames of the clip and its row."""
        rng = clips.sample_rng(self.seed, epoch, index)
        count, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        wanted = clips.window(clips.random_start(rng, count, length, stride), count, length, stride)
        frames = self.videos.read(index, wanted, into)
        return Sample(
            index,
            frames,
            augmentation.draw_augmentation(rng, frames.y.shape[1], frames.y.shape[2], augmentation.FINETUNE)[None],
        )

    def batch(self, frames: Yuv420, infos: Sequence[SampleInfo]) -> ClipBatch:
        indices = [sample.index for sample in infos]
        return ClipBatch(
            frames,
            augmentation.to_augmentation(np.concatenate([sample.rows for sample in infos])),
            torch.from_numpy(self.videos.labels[indices]),
            torch.tensor(indices),
            merge(sample.failures for sample in infos),
        )


class TestClips(Dataset[Any]):
    """The test protocol: TEST_CLIPS clips of a video, uniformly spaced, centre crop; by index."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, videos: VideoSet, config: DataConfig) -> None:
        self.videos, self.config = videos, config

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, index: int, into: Planes | None = None) -> YuvFrames:
        """The frames of a video's clips, one clip after the other (see `VideoSet.read`). Raises UnreadableVideo."""
        frames, length, stride = int(self.videos.frames[index]), self.config.clip_length, self.config.clip_stride
        return self.videos.read(index, clips.uniform_clips(frames, TEST_CLIPS, length, stride).ravel(), into)

    def __getitems__(self, indices: Sequence[int]) -> ClipBatch:
        """A batch of these videos. One that fails is left out: a figure must not count another video in its position."""
        own, length = self.videos, self.config.clip_length
        frames_a_video = TEST_CLIPS * length
        height, width = int(own.heights[indices].max()), int(own.widths[indices].max())
        planes = empty_planes(len(indices) * frames_a_video, height, width)
        read: list[int] = []
        flags: list[tuple[bool, bool]] = []
        failures: dict[str, str] = {}
        for index in indices:
            first = len(read) * frames_a_video
            y, u, v = (plane[first : first + frames_a_video] for plane in planes)
            try:
                frames = self.read(index, (y, u, v))
            except UnreadableVideo as error:
                failures[own.path(index)] = str(error)
                continue
            read.append(index)
            flags.append((frames.bt709, frames.full_range))

        of_clips = np.repeat(np.array(read, np.int64), TEST_CLIPS)  # (B,)
        rows = [augmentation.centre_crop(int(own.heights[index]), int(own.widths[index])) for index in of_clips]
        y, u, v = (torch.from_numpy(plane).unflatten(0, (-1, length))[: len(of_clips)] for plane in planes)
        bt709, full_range = torch.tensor(flags).reshape(-1, 2).bool().repeat_interleave(TEST_CLIPS, 0).unbind(1)
        return ClipBatch(
            Yuv420(y, u, v, bt709, full_range),
            augmentation.to_augmentation(np.array(rows, AUGMENTATION)),
            torch.from_numpy(own.labels[of_clips]),
            torch.from_numpy(of_clips),
            failures,
        )


def merge(parts: Any) -> dict[str, str]:
    return {path: reason for part in parts for path, reason in part.items()}


class BatchSampler:
    """Which (epoch, position) a rank reads at each micro-batch, from `start` to `stop` (both in optimizer steps).

    A step takes `batch_size` consecutive positions of the epoch's order, cut first into accumulation micro-batches and those into
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
        self.micro_batch_size = batch_size // (accumulation * ranks)
        self.steps_per_epoch = count // batch_size
        self.stop = epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro = self.micro_batch_size
        for step in range(self.start, self.stop):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            for part in range(self.accumulation):
                first = step_in_epoch * self.batch_size + (part * self.ranks + self.rank) * micro
                yield [(epoch, position) for position in range(first, first + micro)]


@dataclass(frozen=True)
class Chunk:
    """Samples that a worker is asked for, and where in the ring the first of them belongs."""

    slot: int
    first_row: int
    positions: list[tuple[int, int]]  # (epoch, position)


class ChunkSampler:
    """What DataLoader sends to workers: the sampler's micro-batches, cut up, each batch with a slot of the ring.

    How many slots are enough: while batch n is asked for, and until the next one is, batches n - hold + 1 to n are the consumer's.
    DataLoader has sent at most `workers * PREFETCH` chunks beyond the last one it was asked for, which is the last of batch n at most:
    with k chunks a batch, these are of batches up to n + ceil(workers * PREFETCH / k). From the first to the last that is
    hold + ceil(workers * PREFETCH / k) batches; batch n lies in slot n % slots.
    """

    def __init__(self, sampler: BatchSampler, workers: int, hold: int) -> None:
        size = sampler.micro_batch_size
        self.chunk_size = math.ceil(size / math.ceil(size / CHUNK))  # samples, the same for all chunks but the last
        self.firsts = range(0, size, self.chunk_size)  # rows
        self.slots = hold + math.ceil(workers * PREFETCH / len(self.firsts))
        self.sampler, self.hold = sampler, hold
        self.asked_for = -1  # the last batch that the consumer asked for

    def __iter__(self) -> Iterator[Chunk]:
        for number, positions in enumerate(self.sampler):
            for first in self.firsts:
                if number - self.slots > self.asked_for - self.hold:
                    raise RuntimeError(
                        f"batch {number} would be written over batch {number - self.slots}, which is in use"
                    )
                yield Chunk(number % self.slots, first, positions[first : first + self.chunk_size])


class RingSamples(Dataset[Any]):
    """A chunk in, its frames written into the ring, all else out."""

    def __init__(self, samples: TrainSamples, ring: FrameRing) -> None:
        self.samples, self.ring = samples, ring

    def __getitems__(self, chunk: Chunk) -> list[SampleInfo]:
        return [
            self.samples.read_into(epoch, position, self.ring.row(chunk.slot, row))
            for row, (epoch, position) in enumerate(chunk.positions, start=chunk.first_row)
        ]


class WatchedSamples(Dataset[Any]):
    """What DataLoader's workers see: `samples`, read in a child process that the worker watches. Without workers, read in this process.

    A video whose decoder crashes or gives no frame for too long is marked in the set's `faults`, and the samples are asked for once more:
    from then on reading it fails in every worker, as it does for any unreadable video, and takes no time.
    """

    def __init__(self, samples: "RingSamples | TestClips", videos: VideoSet) -> None:
        self.samples, self.videos = samples, videos
        self._child: DecoderProcess | None = None
        self._ended, self._parent = shared_array(1, np.uint8), os.getpid()

    def __len__(self) -> int:
        """Of the test clips; training's chunks are counted by their sampler."""
        return len(self.videos)

    def __getitems__(self, request: Any) -> Any:
        if get_worker_info() is None:
            return self.samples.__getitems__(request)
        if self._child is None:
            self._child = DecoderProcess(self.samples.__getitems__, self.videos.timeout)
            # At the worker's end, so that what the child used counts as the worker's.
            Finalize(None, self._child.stop, exitpriority=1)
        child = self._child
        tried_twice = set[int | None]()
        while True:
            child.ask(request)
            while not child.connection.poll(TICK):
                self._end_if_told()
                child.end_if_stalled()
            try:
                return child.answer()
            except DecoderDied as death:
                index = child.item
                if death.out_of_memory and index not in tried_twice:
                    tried_twice.add(index)
                elif index is None:
                    raise RuntimeError(f"a decoding process died while it read no video: {death}") from death
                else:
                    self.videos.faults[index] = death.status

    def end(self) -> None:
        """Nobody wants what the workers read any more: those that still read end within a second."""
        self._ended[0] = 1

    def start_worker(self, worker: int) -> None:
        """Called in each of DataLoader's workers before all else."""
        end_with_parent(self._parent)
        leave_signals_to_parent()
        # DataLoader and the end of the main process send this to a worker that is late; its parent has called `end` before.
        signal.signal(signal.SIGTERM, lambda *_: self._end_if_told())
        leave_inherited_objects_alone(worker)

    def _end_if_told(self) -> None:
        if self._ended[0]:
            os._exit(0)  # and its child with it


class TrainBatches(Iterator[Any]):
    """Micro-batches of a whole run in order; one pool of workers for all epochs, so that no epoch starts with idle ones.

    Frames are views of a ring of shared memory that workers decode into. A batch's frames stay as they are until `hold` more batches
    have been asked for: with hold = 1, until the next one is. Parameters, labels and the rest are the batch's own.
    """

    def __init__(
        self, samples: TrainSamples, sampler: BatchSampler, workers: int, hold: int = 1, processes: int = 1
    ) -> None:
        """`processes`: of the machine, that each make such batches. Raises UserError: their rings take too much of its memory."""
        videos = samples.videos
        self.samples, self._chunks, self._workers = samples, ChunkSampler(sampler, workers, hold), workers
        self.ring = FrameRing(
            self._chunks.slots, sampler.micro_batch_size, samples.frames_a_sample,
            int(videos.heights.max()), int(videos.widths.max()), processes,
        )  # fmt: skip
        supervised = WatchedSamples(RingSamples(samples, self.ring), videos)
        if workers:
            # Garbage collection writes to every object it looks at: this process's first full one, 20 minutes into a run, copied 70 MB
            # that it shares with its workers (docs/LOG.md). What is frozen it does not look at.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        loader: DataLoader[Any] = DataLoader(
            supervised,
            batch_sampler=self._chunks,  # type: ignore[arg-type]  # typed as lists of keys, but any iterable of what __getitems__ takes will do
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            # Forked, workers share the ring and the list of videos with this process; started in any other way they would get copies.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=supervised.start_worker,
        )
        self._infos: Iterator[list[SampleInfo]] = iter(loader)  # workers start here
        # When this is dropped or the process ends: in either case before DataLoader waits for its workers.
        self._end = Finalize(self, supervised.end, exitpriority=1)

    def __next__(self) -> Any:
        self._chunks.asked_for += 1
        infos: list[SampleInfo] = []
        try:
            for _ in self._chunks.firsts:
                infos += next(self._infos)
        except Exception as error:  # StopIteration too
            # The workers end here. Left to whoever collects garbage, their queues could be closed before they are told to, and each
            # would be waited for 5 seconds. DataLoader's frames, which the traceback holds, refer to them too; what was raised in a
            # worker has its own traceback in its message.
            if self._workers:
                error.__traceback__ = None
            self._end()
            self._infos = iter(())
            if isinstance(error, UserError):
                raise UserError(error.args[0].rpartition("UserError: ")[2].strip()) from None
            raise error
        bt709, full_range = (torch.tensor([getattr(d, flag) for d in infos]) for flag in ("bt709", "full_range"))
        return self.samples.batch(Yuv420(*self.ring.planes(self.slot()), bt709, full_range), infos)

    def slot(self) -> Tensor:
        """The memory of the newest batch's frames, as `FrameRing.planes` takes it."""
        return self.ring.slot(self._chunks.asked_for % self.ring.slots)


def as_it_is(fetched: T) -> T:
    """For DataLoader, whose default makes tensors of everything."""
    return fetched


def leave_inherited_objects_alone(worker: int) -> None:
    """Garbage collection writes to every object it looks at: a forked worker's first one copied 82 MB of the parent's memory."""
    gc.freeze()


def test_loader(samples: TestClips, videos_a_batch: int, workers: int, pin: bool) -> Iterator[ClipBatch]:
    """Each video once, in order."""
    supervised = WatchedSamples(samples, samples.videos)
    loader: DataLoader[Any] = DataLoader(
        supervised,
        batch_size=videos_a_batch,
        shuffle=False,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=supervised.start_worker,
    )
    end = Finalize(None, supervised.end, exitpriority=1)
    try:
        yield from loader
    finally:
        end()


class Failures:
    """Videos that failed while a run read them: counted, each named once on stderr with what becomes of it."""

    def __init__(self, consequence: str = "its position goes to the next video") -> None:
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


def check_bad(videos: VideoSet, failed: dict[str, str], max_bad: float) -> None:
    """Raises UserError when more than `max_bad` percent of the split's videos are bad: left out as unreadable, or `failed` (path -> reason,
    of all ranks) while a run read them."""
    bad = {**videos.unreadable, **failed}
    listed = len(videos) + len(videos.unreadable)
    share = 100 * len(bad) / listed
    if share > max_bad:
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{videos.root}: {len(bad)} of the split's {listed} videos cannot be read ({share:.3g} %), and --max-bad allows {max_bad:g} %; "
            f"the first is {path} ({reason}): see train.py check, or raise --max-bad"
        )
