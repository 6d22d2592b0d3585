"""Batches of a run: samples are read by worker processes and written into a ring of shared memory.

A batch depends on (seed, step, batch size) only, and its samples as samples.py says. Frames stay uint8 planes until
they are on the device.
"""

import gc
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dclr.data.decoder_process import (
    TICK,
    DecoderDied,
    DecoderProcess,
    end_with_parent,
    freeze_inherited_objects,
    ignore_stop_signals,
    shared_array,
)
from dclr.data.ring_buffer import FrameRing
from dclr.data.samples import ClipBatch, SampleInfo, TestClips, TrainSamples, stack_flags
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from kernels import Yuv420

CHUNK = 8
"""Most samples in a chunk. The workers share the chunks of a micro-batch."""

PREFETCH = 2
"""Chunks that a worker has received and not yet answered: it reads one while the other waits."""

T = TypeVar("T")


class BatchSampler:
    """The (epoch, position) of every sample of a rank's micro-batches, from step `start` to step `stop`.

    A step takes `batch_size` consecutive positions of the epoch's order. They are divided into accumulation
    micro-batches first, and each of these among the ranks. The last incomplete step of an epoch is dropped.
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
        """`count`: readable training videos. `start`: the optimizer step that a resumed run starts at.

        Raises UserError: there are fewer videos than `batch_size`.
        """
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
        """The number of micro-batches."""
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the (epoch, position) pairs of each micro-batch."""
        size = self.micro_batch_size
        for step in range(self.start, self.stop):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            for micro_batch in range(self.accumulation):
                first = step_in_epoch * self.batch_size + (micro_batch * self.ranks + self.rank) * size
                yield [(epoch, position) for position in range(first, first + size)]


@dataclass(frozen=True)
class Chunk:
    """Samples that a worker reads at once, and where it writes them in the ring."""

    slot: int
    first_row: int
    """The row of the first sample in the slot. The others follow."""
    positions: list[tuple[int, int]]
    """(epoch, position) of each sample."""


class ChunkSampler:
    """The chunks that DataLoader sends to its workers: each micro-batch divided into chunks, which share a slot of the
    ring.

    Batch n is written to slot n % slots. The number of slots is the number of batches that can be in use or in writing
    at once:

    - From the request for batch n to the next request, the consumer may use batches n - hold + 1 to n.
    - DataLoader sends at most `workers * PREFETCH` chunks ahead of the last chunk of batch n. With k chunks in a batch,
      these chunks belong to batches up to n + ceil(workers * PREFETCH / k).
    - Together these are hold + ceil(workers * PREFETCH / k) batches.

    Attributes:
        newest: the number of the batch that the consumer requested last.
    """

    def __init__(self, sampler: BatchSampler, workers: int, hold: int) -> None:
        size = sampler.micro_batch_size
        self.chunk_size = math.ceil(size / math.ceil(size / CHUNK))  # samples; the last chunk may have fewer
        self.first_rows = range(0, size, self.chunk_size)
        self.slots = hold + math.ceil(workers * PREFETCH / len(self.first_rows))
        self.sampler, self.hold = sampler, hold
        self.newest = -1

    def __iter__(self) -> Iterator[Chunk]:
        for number, positions in enumerate(self.sampler):
            for first in self.first_rows:
                if number - self.slots > self.newest - self.hold:
                    raise RuntimeError(
                        f"batch {number} would be written over batch {number - self.slots}, which is in use"
                    )
                yield Chunk(number % self.slots, first, positions[first : first + self.chunk_size])


class RingSamples(Dataset[Any]):
    """Training samples by chunk. The frames are written into the ring, and the rest of each sample is returned."""

    def __init__(self, samples: TrainSamples, ring: FrameRing) -> None:
        self.samples, self.ring = samples, ring

    def __getitems__(self, chunk: Chunk) -> list[SampleInfo]:
        return [
            self.samples.read_into(epoch, position, self.ring.row(chunk.slot, row))
            for row, (epoch, position) in enumerate(chunk.positions, start=chunk.first_row)
        ]


class WatchedSamples(Dataset[Any]):
    """The samples that DataLoader's workers read. A worker reads them in a decoder process that it watches.

    If the decoder crashes on a video, or gives no frame for too long, the video is marked in `videos.faults` and the
    samples are requested again. From then on reading the video fails at once in every worker, as for any unreadable
    video. Without workers, samples are read in the training process and nothing watches.
    """

    def __init__(self, samples: RingSamples | TestClips, videos: VideoSet) -> None:
        self.samples, self.videos = samples, videos
        self._decoder: DecoderProcess | None = None
        self._ended, self._parent = shared_array(1, np.uint8), os.getpid()

    def __len__(self) -> int:
        """The number of videos. DataLoader asks for it with test clips only."""
        return len(self.videos)

    def __getitems__(self, request: Any) -> Any:
        if get_worker_info() is None:
            return self.samples.__getitems__(request)
        if self._decoder is None:
            self._decoder = DecoderProcess(self.samples.__getitems__, self.videos.timeout)
            # The decoder process must end inside the worker's end, so that its CPU time counts as the worker's.
            Finalize(None, self._decoder.stop, exitpriority=1)
        decoder = self._decoder
        tried_twice = set[int | None]()
        while True:
            decoder.request(request)
            while not decoder.connection.poll(TICK):
                self._exit_if_ended()
                decoder.end_if_stalled()
            try:
                return decoder.answer()
            except DecoderDied as death:
                index = death.video
                if death.out_of_memory and index not in tried_twice:
                    tried_twice.add(index)
                elif index is None:
                    raise RuntimeError(f"a decoder process died while it read no video: {death}") from death
                else:
                    self.videos.faults[index] = death.status

    def end(self) -> None:
        """Tell the workers that nobody needs their samples any more. A worker that is reading ends within a second."""
        self._ended[0] = 1

    def start_worker(self, worker: int) -> None:
        """Prepare a worker. DataLoader calls this in each worker first."""
        end_with_parent(self._parent)
        ignore_stop_signals()
        # DataLoader, or the end of the training process, sends SIGTERM to a worker that does not end in time. `end` was
        # called before.
        signal.signal(signal.SIGTERM, lambda *_: self._exit_if_ended())
        freeze_inherited_objects()

    def _exit_if_ended(self) -> None:
        if self._ended[0]:
            os._exit(0)  # ends the decoder process too


class TrainBatches(Iterator[Any]):
    """The micro-batches of a whole run in order. One pool of workers serves all epochs, so no epoch starts with idle
    workers.

    Frames are views of a ring of shared memory that the workers write to. The frames of a batch stay valid until `hold`
    more batches have been requested. With hold = 1 they stay valid until the next request. All other tensors belong to
    the batch.
    """

    def __init__(
        self, samples: TrainSamples, sampler: BatchSampler, workers: int, hold: int = 1, processes: int = 1
    ) -> None:
        """`processes`: training processes on this machine. Raises UserError: their rings take too much of its
        memory."""
        videos = samples.videos
        self.samples, self._chunks, self._workers = samples, ChunkSampler(sampler, workers, hold), workers
        self.ring = FrameRing(
            self._chunks.slots, sampler.micro_batch_size, samples.frames_a_sample,
            int(videos.heights.max()), int(videos.widths.max()), processes,
        )  # fmt: skip
        watched = WatchedSamples(RingSamples(samples, self.ring), videos)
        if workers:
            # Garbage collection writes to every object it visits. This process's first full collection, 20 minutes into
            # a run, copied 70 MB that it shares with its workers (docs/LOG.md). Frozen objects are not visited.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        loader: DataLoader[Any] = DataLoader(
            watched,
            # Typed as lists of keys, but DataLoader passes on whatever it yields.
            batch_sampler=self._chunks,  # type: ignore[arg-type]
            collate_fn=keep,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            # Forked workers share the ring and the list of videos with this process. Spawned workers would get copies.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=watched.start_worker,
        )
        self._infos: Iterator[list[SampleInfo]] = iter(loader)  # workers start here
        # Called when this object is deleted or the process ends. Both happen before DataLoader waits for its workers.
        self._end = Finalize(self, watched.end, exitpriority=1)

    def __next__(self) -> Any:
        self._chunks.newest += 1
        infos: list[SampleInfo] = []
        try:
            for _ in self._chunks.first_rows:
                infos += next(self._infos)
        except Exception as error:  # StopIteration too
            # End the workers here. If garbage collection ended them, it might close their queues before they are told
            # to end, and each worker would be waited for 5 seconds. The traceback refers to DataLoader's frames, which
            # hold the queues as well. An error from a worker has the worker's traceback in its message.
            if self._workers:
                error.__traceback__ = None
            self._end()
            self._infos = iter(())
            if isinstance(error, UserError):
                raise UserError(error.args[0].rpartition("UserError: ")[2].strip()) from None
            raise error
        return self.samples.batch(Yuv420(*self.ring.planes(self.slot()), *stack_flags(infos)), infos)

    def slot(self) -> Tensor:
        """Return the memory of the newest batch's frames, as `FrameRing.planes` takes it."""
        return self.ring.slot(self._chunks.newest % self.ring.slots)


def keep(fetched: T) -> T:
    """Return what was fetched. DataLoader's default collate function would convert everything to tensors."""
    return fetched


def test_loader(samples: TestClips, videos_a_batch: int, workers: int, pin: bool) -> Iterator[ClipBatch]:
    """Yield the test clips of each video once, in order. `pin`: put the tensors into pinned memory."""
    watched = WatchedSamples(samples, samples.videos)
    loader: DataLoader[Any] = DataLoader(
        watched,
        batch_size=videos_a_batch,
        shuffle=False,
        collate_fn=keep,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=watched.start_worker,
    )
    end = Finalize(None, watched.end, exitpriority=1)
    try:
        yield from loader
    finally:
        end()
