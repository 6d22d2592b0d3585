"""A ring of shared memory for the frames of batches.

Workers decode into the ring, and batches are views of it. So a frame is written once and copied only to the device.
"""

import mmap
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dclr.data.decode import Planes
from dclr.errors import UserError

_ALIGNMENT = 256
"""Planes start at multiples of this number of bytes, so that a kernel can load several pixels at once."""

_SHARE = 0.5
"""Largest fraction of the free memory that rings may take."""


class FrameRing:
    """Memory for `slots` batches of B samples, each of F frames of at most H x W pixels, as planes of YUV 4:2:0.

    The memory is anonymous and shared. Processes that are forked later see the same bytes, and the limit of /dev/shm
    (64 MB in a container by default) does not apply. A smaller frame leaves the rest of its row unchanged.
    """

    def __init__(self, slots: int, samples: int, frames: int, height: int, width: int, processes: int = 1) -> None:
        """Allocate the ring. `processes`: training processes on this machine, each with such a ring.

        Raises UserError: the rings take too much of the machine's memory.
        """
        chroma = ((height + 1) // 2, (width + 1) // 2)
        self._shapes = [(samples, frames, *size) for size in ((height, width), chroma, chroma)]
        self._starts = [0]
        for shape in self._shapes:
            size = torch.Size(shape).numel()
            self._starts.append(self._starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self.slot_bytes = self._starts[-1]
        self.slots = slots

        needed, free = processes * slots * self.slot_bytes, available_memory()
        if needed > _SHARE * free:
            raise UserError(
                f"the largest frame of these videos is {width} x {height}, and batches in memory would take "
                f"{needed / 2**30:.1f} GiB, which is more than half of the {free / 2**30:.1f} GiB free: "
                "make frames smaller with train.py pack, or lower --batch-size or --workers"
            )
        self._memory = torch.frombuffer(mmap.mmap(-1, slots * self.slot_bytes), dtype=torch.uint8).view(slots, -1)

    def slot(self, number: int) -> Tensor:
        """Return all bytes of a slot, (slot_bytes,) uint8, for `planes`."""
        return self._memory[number]

    def planes(self, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (B, F, H, W), u and v (B, F, ceil(H / 2), ceil(W / 2)) as views of a slot or of a copy of a slot."""
        y, u, v = (
            slot[start : start + torch.Size(shape).numel()].view(shape)
            for start, shape in zip(self._starts, self._shapes, strict=False)
        )
        return y, u, v

    def row(self, slot: int, sample: int) -> Planes:
        """Return the planes of one sample for writing: y (F, H, W), u and v (F, ceil(H / 2), ceil(W / 2))."""
        y, u, v = (plane[sample].numpy() for plane in self.planes(self.slot(slot)))
        return y, u, v

    def pin(self, device: torch.device) -> None:
        """Pin the memory, so that a GPU copies from it without the CPU. Call this after the workers are forked.

        Warns if the memory cannot be pinned.
        """
        cudart, address = torch.cuda.cudart(), self._memory.data_ptr()
        try:
            torch.cuda.check_error(cudart.cudaHostRegister(address, self._memory.numel(), 0))
        except RuntimeError as error:
            print(
                f"warning: batches cannot be pinned in memory ({error}); copies to the GPU will be slower, "
                "and training waits for them",
                file=sys.stderr,
            )
            # CUDA reports a refused call again at the next kernel. This kernel takes the error.
            with suppress(RuntimeError):
                torch.ones(1, device=device)
            return

        def unpin() -> None:
            torch.cuda.synchronize(device)  # copies may still be under way
            cudart.cudaHostUnregister(address)

        weakref.finalize(self, unpin).atexit = False  # the driver cleans up after a process that ends


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping, within the container's limit if it has one (cgroup
    v2)."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    with suppress(OSError, ValueError):  # no such file; "max": no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
