"""Worker processes that read chunks of samples into the ring. Each reads in a decoder process that it watches.

There are two processes for each worker. The worker is forked from the process that trains or evaluates, which may
already have threads and a GPU. It uses neither: it only decodes. It forks its decoder process, and forks another if a
video crashes it.
"""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch

from dclr.data.decode import Planes
from dclr.data.decoder_process import TICK, DecoderDied, DecoderProcess, shared_array
from dclr.data.ring_buffer import FrameRing, FrameShape
from dclr.data.samples import SampleInfo, Samples
from dclr.errors import UserError

_SECONDS_TO_END = 5.0
"""Time that a worker has to end by itself, before it is killed."""


@dataclass(frozen=True)
class Chunk:
    """Samples that a worker reads at once, and where it writes them in the ring."""

    slot: int
    shape: FrameShape
    """The shape of the whole batch."""
    first_row: int
    """The row of the first sample in the batch. The others follow."""
    positions: Sequence[tuple[int, int]]
    """The position of each sample, as `Samples` takes it."""


def read_chunk(samples: Samples, ring: FrameRing, chunk: Chunk) -> list[SampleInfo]:
    """Read a chunk. The frames are written into the ring, and the rest of each sample is returned."""
    rows = slice(chunk.first_row, chunk.first_row + len(chunk.positions))
    y, u, v = (plane[rows].numpy() for plane in chunk.shape.view(ring.slot(chunk.slot)))
    planes: Planes = (y, u, v)
    return samples.read_chunk(chunk.positions, planes)


class Workers:
    """`count` worker processes. Chunk n goes to worker n % count, and the answers come in the order of the chunks.

    The worker processes end when this object is deleted, when `close` is called or when this process ends.
    """

    def __init__(self, samples: Samples, ring: FrameRing, count: int) -> None:
        self._samples, self._ended = samples, shared_array(1, np.uint8)
        reader = _Reader(samples, ring, self._ended)
        self._processes = [DecoderProcess(reader, math.inf) for _ in range(count)]
        self._sent = self._received = 0
        self.close = Finalize(self, _end, (self._processes, self._ended), exitpriority=1)

    def send(self, chunk: Chunk) -> None:
        """Send a chunk to its worker, which reads its chunks in the order in which they are sent."""
        self._processes[self._sent % len(self._processes)].request(chunk)
        self._sent += 1

    def receive(self) -> list[SampleInfo]:
        """Wait for the answer to the oldest chunk and return it.

        Raises:
            UserError: the worker has ended or has no memory.
            Exception: what the worker raised, with its traceback as the cause.
        """
        process = self._processes[self._received % len(self._processes)]
        self._received += 1
        try:
            return process.answer()
        except DecoderDied as death:
            raise UserError(_explain(death.status, self._samples.advice)) from None
        except MemoryError:
            raise UserError(f"a data worker has too little memory: {self._samples.advice}") from None


def _end(processes: list[DecoderProcess], ended: np.ndarray) -> None:
    """End the workers, also those that wait for a decoder."""
    ended[0] = 1
    running = [process for process in processes if process.running]
    for process in running:
        process.request(None)  # wakes a worker that waits for a request
    for process in running:
        process.join(_SECONDS_TO_END)


def _explain(status: int, advice: str) -> str:
    """Return the message about a worker that has ended with this status, negative for a signal."""
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"status {status}"
    if name == "SIGKILL":
        return f"a data worker was killed (SIGKILL), as Linux does when memory is short: {advice}"
    return f"a data worker has crashed ({name}) outside of a decoder: run the command again, or use --workers 0"


class _Reader:
    """The reader of chunks in a worker process.

    If the decoder crashes on a video, or gives no frame for too long, the video is marked in `videos.faults` and the
    chunk is requested again. From then on reading the video fails at once in every worker, as for any unreadable video.
    """

    def __init__(self, samples: Samples, ring: FrameRing, ended: np.ndarray) -> None:
        """`ended`: (1,) in shared memory, not 0 when nobody needs the chunks any more."""
        self._samples, self._ring, self._ended = samples, ring, ended
        self._decoder: DecoderProcess | None = None

    def __call__(self, chunk: Chunk) -> Any:
        self._exit_if_ended()
        if self._decoder is None:
            torch.set_num_threads(1)  # the threads of the training process do not exist in a forked one
            self._decoder = DecoderProcess(self._read, self._samples.videos.timeout)
        decoder = self._decoder
        tried_twice = set[int | None]()
        while True:
            decoder.request(chunk)
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
                    raise UserError(_explain(death.status, self._samples.advice)) from None
                else:
                    self._samples.videos.faults[index] = death.status

    def _read(self, chunk: Chunk) -> list[SampleInfo]:
        return read_chunk(self._samples, self._ring, chunk)

    def _exit_if_ended(self) -> None:
        if self._ended[0]:
            if self._decoder is not None:
                self._decoder.stop()  # before this process ends, so that the decoder's CPU time counts as the worker's
            os._exit(0)
