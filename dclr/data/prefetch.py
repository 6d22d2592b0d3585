"""Batches on the training device. Each is copied while the batch before it is computed."""

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
    """Return the micro-batches of a whole run with frames and labels on `device`. A batch is valid until the next
    request.

    View parameters and colour spaces stay on the host, where they are checked. They are copied later as one small
    table.

    Args:
        workers: data workers.
        processes: training processes on this machine.

    Raises:
        UserError: see TrainBatches.
    """
    if device.type == "cuda":
        batches = TrainBatches(samples, sampler, workers, hold=2, processes=processes)
        batches.ring.pin(device)
        return DeviceBatches(batches, device)
    return TrainBatches(samples, sampler, workers, processes=processes)


class DeviceBatches(Iterator[Any]):
    """Batches on the GPU: batch n + 1 is copied while the GPU computes batch n. The host waits for neither.

    There are two buffers on the device, and the batches must keep two slots valid on the host (hold = 2). Batches n - 1
    and n + 1 have the same buffer, so batch n + 1 is copied after the work that reads batch n - 1. The host waits only
    for the workers, or if it is two steps ahead of the GPU.
    """

    def __init__(self, batches: TrainBatches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(batches.ring.slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # by buffer
        self._started = 0  # number of copies
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
        """Start to copy the next batch and return it; None after the last. Its frames are valid after the buffer's
        event."""
        buffer, copied = self._buffers[self._started % 2], self._copied[self._started % 2]
        # Wait for the copy of batch n - 1: the request for batch n + 1 gives its slot back to the workers.
        copied.synchronize()
        batch = next(self._batches, None)
        if batch is None:
            return None
        self._started += 1
        own, computing = batch.frames, torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)  # the computation may still read the buffer
        with torch.cuda.stream(self._stream):
            buffer.copy_(self._batches.slot(), non_blocking=True)
            if isinstance(batch, ClipBatch):
                labels = batch.labels.pin_memory().to(self._device, non_blocking=True)
                labels.record_stream(computing)
                batch = replace(batch, labels=labels)
            copied.record(self._stream)
        return replace(batch, frames=Yuv420(*self._batches.ring.planes(buffer), own.bt709, own.full_range))
