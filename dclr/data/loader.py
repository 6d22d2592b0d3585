"""Batches of a run: samples are read by worker processes and written into a ring of shared memory.

Training and evaluation read in the same way. A training batch depends on (seed, step, batch size) only, and its samples
as samples.py says. Frames stay uint8 planes until they are on the device.
"""

import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from dclr.data.ring_buffer import FrameRing, FrameShape, available_memory
from dclr.data.samples import TEST_CLIPS, Samples, TestClips, stack_flags
from dclr.data.workers import Chunk, Workers, read_chunk
from dclr.errors import UserError
from dclr.kernels import Yuv420

CHUNK = 8
"""Most samples in a chunk of training. The workers share the chunks of a micro-batch."""

PREFETCH = 2
"""Chunks that a worker has received and not yet answered: it reads one while the other waits."""

_TEST_BATCH_BYTES = 2**28
"""Most bytes of a test batch that has more than one clip. Frames of 1920 x 1080 then make batches of 5 clips."""

_TEST_SHARE = 1 / 16
"""Fraction of the free memory that test batches take. Fewer batches are read ahead if their frames are large."""

Position = tuple[int, int]
"""The two numbers that name a sample, see `Samples`."""


class Sampler(Protocol):
    """The positions of every batch of a run."""

    chunk_size: int
    """Most samples in a chunk."""
    chunks_a_batch: int

    def __iter__(self) -> Iterator[Sequence[Position]]: ...

    def largest(self, shape: Callable[[Sequence[Position]], FrameShape]) -> FrameShape:
        """Return the largest shape of a batch, given the shape of a batch by its positions."""
        ...


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
        # Chunks of equal size. The last one may have fewer samples.
        self.chunk_size = math.ceil(self.micro_batch_size / math.ceil(self.micro_batch_size / CHUNK))
        self.chunks_a_batch = math.ceil(self.micro_batch_size / self.chunk_size)

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

    def largest(self, shape: Callable[[Sequence[Position]], FrameShape]) -> FrameShape:
        """Return the shape of every micro-batch."""
        return shape([(0, 0)] * self.micro_batch_size)


class TestSampler:
    """The positions of test clips: all clips of the first video, then those of the next.

    A batch has consecutive clips of one video. It has all of them, or fewer if frames are so large that the batch would
    have more than _TEST_BATCH_BYTES.
    """

    __test__ = False  # pytest would collect it because of its name
    chunk_size, chunks_a_batch = TEST_CLIPS, 1

    def __init__(
        self, samples: TestClips, indices: Sequence[int] | None = None, numbers: Sequence[int] = range(TEST_CLIPS)
    ) -> None:
        """`indices`: the videos, by default all. `numbers`: the clips of each video, by default all."""
        self._batches: list[list[Position]] = []
        for index in range(len(samples.videos)) if indices is None else indices:
            most = max(1, _TEST_BATCH_BYTES // samples.shape([(index, 0)]).bytes)
            size = math.ceil(len(numbers) / math.ceil(len(numbers) / most))
            for first in range(0, len(numbers), size):
                self._batches.append([(index, number) for number in numbers[first : first + size]])

    def __iter__(self) -> Iterator[list[Position]]:
        return iter(self._batches)

    def largest(self, shape: Callable[[Sequence[Position]], FrameShape]) -> FrameShape:
        """Return the shape of the batch that has the most bytes."""
        return max(map(shape, self._batches), key=lambda found: found.bytes)


class ChunkSampler:
    """The chunks that are sent to workers: each batch divided into chunks, which share a slot of the ring.

    Batch n is written to slot n % slots. The number of slots is the number of batches that can be in use or in writing
    at once:

    - From the request for batch n to the next request, the consumer may use batches n - hold + 1 to n.
    - At most `ahead` chunks are sent after the last chunk of batch n. With k chunks in a batch, these chunks belong to
      batches up to n + ceil(ahead / k).
    - Together these are hold + ceil(ahead / k) batches.

    Attributes:
        newest: the number of the batch that the consumer requested last.
    """

    def __init__(
        self, sampler: Sampler, shape: Callable[[Sequence[Position]], FrameShape], ahead: int, hold: int
    ) -> None:
        """`shape`: see `Samples.shape`."""
        self.slots = hold + math.ceil(ahead / sampler.chunks_a_batch)
        self.sampler, self.shape, self.hold = sampler, shape, hold
        self.newest = -1

    def __iter__(self) -> Iterator[Chunk]:
        size = self.sampler.chunk_size
        for number, positions in enumerate(self.sampler):
            shape = self.shape(positions)
            for first in range(0, len(positions), size):
                if number - self.slots > self.newest - self.hold:
                    raise RuntimeError(
                        f"batch {number} would be written over batch {number - self.slots}, which is in use"
                    )
                yield Chunk(number % self.slots, shape, first, positions[first : first + size])


class Batches(Iterator[Any]):
    """The batches of a whole run in order. One pool of workers serves all epochs, so no epoch starts with idle workers.

    Frames are views of a ring of shared memory that the workers write to. The frames of a batch stay valid until `hold`
    more batches have been requested. With hold = 1 they stay valid until the next request. All other tensors belong to
    the batch.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: Sampler,
        workers: int,
        hold: int = 1,
        processes: int = 1,
        ahead: int | None = None,
    ) -> None:
        """Start the workers.

        Args:
            workers: worker processes. 0 reads in this process.
            processes: processes of the run on this machine.
            ahead: most chunks that workers read ahead, by default PREFETCH for each worker.

        Raises:
            UserError: the rings take too much of the machine's memory.
        """
        ahead = workers * PREFETCH if ahead is None else min(ahead, workers * PREFETCH)
        self.samples = samples
        self._chunks = ChunkSampler(sampler, samples.shape, ahead, hold)
        self.ring = FrameRing(self._chunks.slots, sampler.largest(samples.shape), samples.advice, processes)
        self._coming = iter(self._chunks)
        self._sent: deque[Chunk] = deque()
        self._workers: Workers | None = None
        if workers:
            # Garbage collection writes to every object it visits. This process's first full collection, 20 minutes into
            # a run, copied 70 MB that it shares with its workers (docs/LOG.md). Frozen objects are not visited.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self._workers = Workers(samples, self.ring, min(workers, ahead))
            for _ in range(ahead):
                self._send()

    def __next__(self) -> Any:
        self._chunks.newest += 1
        infos = []
        try:
            for _ in range(self._chunks.sampler.chunks_a_batch):
                if self._workers is None:
                    self._newest = next(self._coming)
                    infos += read_chunk(self.samples, self.ring, self._newest)
                else:
                    if not self._sent:
                        raise StopIteration
                    self._newest = self._sent.popleft()
                    infos += self._workers.receive()
                    self._send()
        except BaseException:
            if self._workers is not None:
                self._workers.close()
            self._sent.clear()
            self._coming = iter(())
            raise
        return self.samples.batch(Yuv420(*self.view(self.slot()), *stack_flags(infos)), infos)

    def _send(self) -> None:
        """Send the next chunk to a worker, if there is one."""
        chunk = next(self._coming, None)
        if chunk is not None and self._workers is not None:
            self._workers.send(chunk)
            self._sent.append(chunk)

    def slot(self) -> Tensor:
        """Return the bytes of the newest batch's frames, (N,) uint8, for `view`."""
        return self.ring.slot(self._newest.slot)[: self._newest.shape.bytes]

    def view(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, u and v of the newest batch, as views of its slot or of a copy of its slot."""
        return self._newest.shape.view(memory)


def batches_ahead(samples: TestClips, sampler: TestSampler) -> int:
    """Return how many test batches workers may read ahead, by the free memory; at least one."""
    return max(1, int(available_memory() * _TEST_SHARE) // sampler.largest(samples.shape).bytes - 1)
