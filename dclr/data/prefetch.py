"""Batches on the device that trains, each copied there while the one before it is computed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dclr.data.loader import BatchSampler, TrainBatches
from dclr.data.samples import ClipBatch, TrainSamples
from kernels import Yuv420


def batches_on(
    device: torch.device, samples: TrainSamples, sampler: BatchSampler, workers: int, processes: int = 1
) -> Iterator[Any]:
    """Micro-batches of a whole run with frames and labels on `device`, each valid until the next one is asked for.

    View parameters and colour spaces stay on the host: they are checked there, and travel as one small table.
    Raises UserError: see TrainBatches.
    """
    if device.type == "cuda":
        batches = TrainBatches(samples, sampler, workers, hold=2, processes=processes)
        batches.ring.pin(device)
        return DeviceBatches(batches, device)
    return TrainBatches(samples, sampler, workers, processes=processes)


class DeviceBatches(Iterator[Any]):
    """Copies batch n + 1 on a stream of its own while the GPU computes batch n. The host waits for neither.

    There are two buffers on the device, and the batches must hold two slots on the host: batch n + 1 is copied once what read batch
    n - 1, which had the same buffer, is done. The host waits only if it is two steps ahead of the GPU, or for the workers.
    """

    def __init__(self, batches: TrainBatches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(batches.ring.slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # by buffer
        self._started = 0  # how many copies were
        self._coming: Any = None

    def __next__(self) -> Any:
        if self._started == 0:
            self._coming = self._start_copy()
        batch = self._coming
        if batch is None:
            raise StopIteration
        torch.cuda.current_stream(self._device).wait_event(self._copied[(self._started - 1) % 2])
        self._coming = self._start_copy()
        return batch

    def _start_copy(self) -> Any:
        """The next batch, whose frames will be in its buffer once its event has come; None: there is no more."""
        buffer, copied = self._buffers[self._started % 2], self._copied[self._started % 2]
        copied.synchronize()  # of the batch two before: asking for another one gives its slot back to the workers
        batch = next(self._batches, None)
        if batch is None:
            return None
        self._started += 1
        own, computing = batch.frames, torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)  # which may still read the buffer
        with torch.cuda.stream(self._stream):
            buffer.copy_(self._batches.slot(), non_blocking=True)
            if isinstance(batch, ClipBatch):
                labels = batch.labels.pin_memory().to(self._device, non_blocking=True)
                labels.record_stream(computing)
                batch = replace(batch, labels=labels)
            copied.record(self._stream)
        return replace(batch, frames=Yuv420(*self._batches.ring.planes(buffer), own.bt709, own.full_range))
