"""Batches on the training device. Each is copied while the batch before it is computed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dclr.data.loader import Batches, Sampler
from dclr.data.samples import ClipBatch, Samples
from dclr.kernels import Yuv420


def batches_on(
    device: torch.device,
    samples: Samples,
    sampler: Sampler,
    workers: int,
    processes: int = 1,
    ahead: int | None = None,
) -> Iterator[Any]:
    """Return the batches of a whole run with frames and labels on `device`. A batch is valid until the next request.

    View parameters and colour spaces stay on the host, where they are checked. They are copied later as one small
    table.

    Args:
        workers, processes, ahead: see Batches.

    Raises:
        UserError: see Batches.
    """
    if device.type == "cuda":
        batches = Batches(samples, sampler, workers, hold=2, processes=processes, ahead=ahead)
        batches.ring.pin(device)
        return DeviceBatches(batches, device)
    return Batches(samples, sampler, workers, processes=processes, ahead=ahead)


class DeviceBatches(Iterator[Any]):
    """Batches on the GPU: batch n + 1 is copied while the GPU computes batch n. The host waits for neither.

    There are two buffers on the device, and the batches must keep two slots valid on the host (hold = 2). Batches n - 1
    and n + 1 have the same buffer, so batch n + 1 is copied after the work that reads batch n - 1. The host waits only
    for the workers, or if it is two steps ahead of the GPU.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
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
            slot = self._batches.slot()
            buffer[: len(slot)].copy_(slot, non_blocking=True)
            if isinstance(batch, ClipBatch):
                labels = batch.labels.pin_memory().to(self._device, non_blocking=True)
                labels.record_stream(computing)
                batch = replace(batch, labels=labels)
            copied.record(self._stream)
        # A test batch has no clips if its video failed.
        y, u, v = (plane[: len(own.y)] for plane in self._batches.view(buffer))
        return replace(batch, frames=Yuv420(y, u, v, own.bt709, own.full_range))
