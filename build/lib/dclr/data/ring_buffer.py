"""A ring of shared memory for the frames of batches.

Workers decode into the ring, and batches are views of it. So a frame is written once and copied only to the device.
"""

import math
import mmap
import re
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dclr.errors import UserError

_ALIGNMENT = 256
"""Planes start at multiples of this number of bytes, so that a kernel can load several pixels at once."""

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Folder and files with the limit and the use of memory in a container: cgroup version 2, then version 1."""

_SHARE = 0.5
"""Largest fraction of the free memory that rings may take."""


@dataclass(frozen=True)
class FrameShape:
    """The shape of a batch's frames: `samples` samples of `frames` frames each, in planes of YUV 4:2:0."""

    samples: int
    frames: int
    height: int
    width: int

    @property
    def planes(self) -> list[tuple[int, int, int, int]]:
        """The shapes of y, (B, F, H, W), and of u and v, (B, F, ceil(H / 2), ceil(W / 2))."""
        chroma = ((self.height + 1) // 2, (self.width + 1) // 2)
        return [(self.samples, self.frames, *size) for size in ((self.height, self.width), chroma, chroma)]

    @property
    def bytes(self) -> int:
        """The memory that the planes take, with their alignment."""
        return sum(aligned(math.prod(shape)) for shape in self.planes)

    def view(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, u and v as views of `memory`, which has at least `bytes` uint8."""
        views, start = [], 0
        for shape in self.planes:
            size = math.prod(shape)
            views.append(memory[start : start + size].view(shape))
            start += aligned(size)
        y, u, v = views
        return y, u, v


def aligned(size: int) -> int:
    """Round a number of bytes up to a multiple of _ALIGNMENT."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class FrameRing:
    """Memory for the frames of `slots` batches.

    The memory is anonymous and shared. Processes that are forked later see the same bytes, and the limit of /dev/shm
    (64 MB in a container by default) does not apply. Memory that nobody writes to costs nothing.
    """

    def __init__(self, slots: int, largest: FrameShape, advice: str, processes: int = 1) -> None:
        """Allocate the ring.

        Args:
            largest: the largest batch.
            advice: what the user can do if there is too little memory, as the end of a message.
            processes: processes of the run on this machine, each with such a ring.

        Raises:
            UserError: the rings take more than half of the free memory.
        """
        self.slot_bytes = largest.bytes
        self.slots = slots
        needed, free = processes * slots * self.slot_bytes, available_memory()
        if needed > _SHARE * free:
            raise UserError(
                f"the largest frame of these videos is {largest.width} x {largest.height}, and batches in memory would "
                f"take {needed / 2**30:.1f} GiB, which is more than half of the {free / 2**30:.1f} GiB free: {advice}"
            )
        try:
            memory = mmap.mmap(-1, slots * self.slot_bytes)
        except OSError as error:  # a limit of the shell, such as ulimit -v
            raise UserError(
                f"{slots * self.slot_bytes / 2**30:.1f} GiB for batches in memory cannot be allocated "
                f"({error.strerror}): {advice}"
            ) from None
        self._memory = torch.frombuffer(memory, dtype=torch.uint8).view(slots, -1)

    def slot(self, number: int) -> Tensor:
        """Return all bytes of a slot, (slot_bytes,) uint8, for `FrameShape.view`."""
        return self._memory[number]

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
    """Return the bytes that can be allocated without swapping, within the limit of the container if it has one."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    for folder, limit, usage in _CGROUPS:
        with suppress(OSError, ValueError):  # no such file; "max": no limit
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / usage).read_text()) - (int(cache[1]) if cache else 0)  # the kernel frees this cache
            free = min(free, max(int((folder / limit).read_text()) - used, 0))
    return free
