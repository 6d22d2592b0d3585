"""What the processes of a run say to each other. With one process, or none started, every function is the identity."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dclr.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes_of_machine() -> int:
    """How many processes of the run a launcher started on this machine."""
    names = (
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "WORLD_SIZE",
    )  # torchrun's name, deepspeed's, and another launcher's: all there are
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 1))


def gather_batch(rows: Tensor) -> Tensor:
    """(B, ...) on each rank -> (ranks * B, ...) in rank order on all. No gradient."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean over ranks, as a new tensor."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(values: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


_patient: dist.ProcessGroup | None = None
"""The processes once more, for what may take days; None: as always, for half an hour."""


@contextmanager
def patience() -> Iterator[None]:
    """Inside, `gather_objects`, `together` and `on_rank_zero` wait as long as it takes: verifying a large data set takes hours."""
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world_size() > 1 else None
    try:
        yield
    finally:
        _patient = None


def gather_objects(value: Any) -> list[Any]:
    """One object from each rank, in rank order, on all."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_patient)
    return values


def together(work: Callable[[], T]) -> T:
    """Run `work` on every rank; where it raises UserError on any, it is raised on all, so that none waits for one that has left."""
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    for found in gather_objects(problem):
        if found is not None:
            raise UserError(found)
    return result  # type: ignore[return-value]


def on_rank_zero(work: Callable[[], T]) -> T:
    """`work`'s result on rank 0, told to all; where it raises UserError, all raise it."""
    told = [together(lambda: work() if rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore[return-value]


class Exchange:
    """Whole numbers that each rank adds to once a step, summed over ranks. Nobody waits: a sum is asked for one step after it was begun.

    All ranks get the same sum at the same step, so that what they do about it they do together. On the CPU (gloo), also where the
    network is on GPUs: looking at it makes no host wait for its device.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._begun: tuple[Any, Tensor] | None = None

    def add(self, *numbers: int) -> list[int]:
        """Begin the sum of these over ranks; returns the sum of those of the call before (zeros in the first)."""
        own = torch.tensor(numbers, dtype=torch.int64)
        if self._group is None:
            return own.tolist()  # alone, there is nothing to wait for
        total = self.finish() or [0] * len(numbers)
        self._begun = (dist.all_reduce(own, group=self._group, async_op=True), own)
        return total

    def finish(self) -> list[int] | None:
        """The last sum begun, once it is there. To be called before the processes part."""
        if self._begun is None:
            return None
        work, total = self._begun
        work.wait()
        self._begun = None
        return total.tolist()


def launched_rank() -> int:
    """The rank a launcher gave this process, also before and after it joined the others."""
    return int(os.environ.get("RANK", "0"))
