"""Communication between the processes (ranks) of a run.

A run of one process calls neither `gloo_group` nor `all_to_all`. All other functions then return their own input or
result, without any communication.
"""

import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dclr.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of the run, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched_rank() -> int:
    """Return the rank that the launcher gave this process. It is known before and after the processes are connected.

    A RANK that is not a number counts as 0. `commands.launcher.check_ranks` refuses it.
    """
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0


def processes_of_machine() -> int:
    """Return the number of processes that the launcher started on this machine."""
    # The names are from torchrun, from deepspeed, and from launchers that only name the processes of all machines.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 1))


def share_cores() -> None:
    """Let the processes of this machine share its cores, unless OMP_NUM_THREADS is set.

    With OpenMP's default each process uses all cores: two processes on two cores then ran 12 to 20 times slower than
    with one thread each.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_of_machine()))


def gather_batch(rows: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, on every rank: (B, ...) -> (ranks * B, ...). There is no gradient."""
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return a new group of all ranks that exchanges tensors on the CPU. All ranks must call this together.

    Args:
        timeout: how long a rank waits for the others. None means 30 minutes.
    """
    # torch 2.14 declares a second type, which a rank outside of the group gets. Here no rank is outside.
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


_host_group: dist.ProcessGroup | None = None
"""The group that sends tensors on the CPU if the default group (NCCL) cannot. Made at its first use."""


def all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send rows to all ranks and return the received rows, in the order of the ranks. There is no gradient.

    Tensors on a GPU travel by NCCL, and the host does not wait for the device. Tensors on the CPU travel by gloo.

    Args:
        rows: (N, ...): the rows for rank 0, then those for rank 1, and so on.
        sent: the number of rows for each rank, whose sum is N.
        received: the number of rows that each rank sends to this rank.
    """
    global _host_group
    group = None
    if rows.device.type == "cpu" and dist.get_backend() != "gloo":
        group = _host_group = _host_group or gloo_group()
    # gloo does not know all dtypes, so rows travel as bytes.
    data = rows.contiguous().view(len(rows), -1).view(torch.uint8)
    result = data.new_empty(sum(received), data.shape[1])
    dist.all_to_all_single(result, data, received, sent, group=group)
    return result.view(rows.dtype).view(-1, *rows.shape[1:])


class _GatherBatch(torch.autograd.Function):
    """`gather_batch` with the gradient of `gather_batch_with_gradient`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = rows.shape[0]
        return gather_batch(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank() * ctx.size : (rank() + 1) * ctx.size]


def gather_batch_with_gradient(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, as `gather_batch` does. All ranks must have equally many rows.

    The gradient of a rank's rows is the sum over the gradients that all ranks have for these rows. The mean of the
    parameters' gradients over ranks, which the engine takes, is then the gradient of the mean of the ranks' losses.
    """
    return rows if world_size() == 1 else _GatherBatch.apply(rows)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise mean over the ranks. In a run of one process, this is `values` itself."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(values: Tensor) -> Tensor:
    """Replace `values` by their elementwise maximum over the ranks, in place, and return them."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


_object_group: dist.ProcessGroup | None = None
"""The group that exchanges objects. None: the default group, whose timeout is 30 minutes."""

_patient_group: dist.ProcessGroup | None = None
"""The group of `without_timeout`, made at its first use. Each group keeps open files and threads, so there is one."""


@contextmanager
def without_timeout() -> Iterator[None]:
    """Let `gather_objects`, `gather_rows`, `on_all_ranks` and `on_rank_zero` wait up to 30 days.

    Verifying a large data set takes hours. Inside the context, gloo exchanges the rows, also if the run is on GPUs.
    """
    global _object_group, _patient_group
    if world_size() > 1:
        _patient_group = _patient_group or gloo_group(timedelta(days=30))
    before, _object_group = _object_group, _patient_group
    try:
        yield
    finally:
        _object_group = before


def gather_objects(value: Any) -> list[Any]:
    """Return the objects of all ranks in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_object_group)
    return values


def on_all_ranks(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return its result. If it raises UserError on one rank, every rank raises the error.

    Without this, the other ranks would wait for a rank that has left. The error names the rank and its machine if rank
    0 had no error, such as a file that is missing on one machine.
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error), socket.gethostname()
    for number, found in enumerate(gather_objects(problem)):
        if found is not None:
            message, host = found
            raise UserError(f"{message} (rank {number} on {host})" if number else message)
    return result  # type: ignore[return-value]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its result on every rank. If it raises UserError, every rank raises it."""
    result = [only_on_rank_zero(work)]
    if world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def once_on_each_machine(work: Callable[[bool], T]) -> T:
    """Call `work(True)` on one rank of each machine, then `work(False)` on the others. Return this rank's result.

    The first call fills a cache of the machine, which the others read. If `work` raises UserError on one rank, every
    rank raises the error.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with without_timeout():
        result = on_all_ranks(lambda: work(True) if first else None)
        return on_all_ranks(lambda: work(False) if result is None else result)


# ---------------------------------------------------------------- results that only rank 0 holds


def own_share(count: int) -> range:
    """Return which of `count` videos this rank takes: consecutive ones, so that rank order is video order.

    With more ranks than videos, some shares are empty.
    """
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


_BYTES_AT_ONCE = 2**26
"""Bytes of `gather_rows` that are sent at once."""


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order on rank 0, and an empty tensor on the others: (n, ...) -> (N, ...).

    Ranks may have different numbers of rows. Without rows, the other dimensions and the dtype do not matter. Rank 0
    holds the result, its own rows and one message of at most _BYTES_AT_ONCE, so no rank holds the result twice.

    Args:
        rows: on the CPU.
    """
    if world_size() == 1:
        return rows
    shapes = gather_objects((rows.shape, rows.dtype))
    each, dtype = next(((shape[1:], dtype) for shape, dtype in shapes if shape[0]), (rows.shape[1:], rows.dtype))
    at_once = max(1, _BYTES_AT_ONCE // max(1, math.prod(each) * dtype.itemsize))
    if rank() > 0:
        for message in rows.split(at_once) if len(rows) else ():
            dist.send(message.contiguous(), 0, group=_object_group)
        return torch.empty((0, *each), dtype=dtype)
    gathered = torch.empty((sum(shape[0] for shape, _ in shapes), *each), dtype=dtype)
    gathered[: len(rows)] = rows.view(len(rows), *each)
    first = len(rows)
    for sender, (shape, _) in enumerate(shapes[1:], start=1):
        for part in gathered[first : first + shape[0]].split(at_once) if shape[0] else ():
            dist.recv(part, sender, group=_object_group)
        first += shape[0]
    return gathered


def gather_on_rank_zero(value: Any) -> list[Any]:
    """Return the objects of all ranks in rank order on rank 0, and an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values or None, dst=0, group=_object_group)
    return values


def only_on_rank_zero(work: Callable[[], T]) -> T | None:
    """Call `work` on rank 0 and return its result there, None elsewhere. If it raises UserError, every rank does."""
    return on_all_ranks(lambda: work() if rank() == 0 else None)


@contextmanager
def buffers_of_rank_zero(module: torch.nn.Module) -> Iterator[None]:
    """Set the floating-point buffers of a module, such as BatchNorm's statistics, to those of rank 0 on all ranks.

    At the end of the context, each rank gets its own values back.
    """
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()] if world_size() > 1 else []
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        dist.broadcast(buffer, src=0)
    try:
        yield
    finally:
        for buffer, values in zip(buffers, own, strict=True):
            buffer.copy_(values)


class DelayedSum:
    """Sums of whole numbers over the ranks, one call late: each call returns the sums that the call before began.

    A rank calls `add` once a step. The call rarely waits, because the sum had a whole step to complete. All ranks get
    the same sums at the same step, so they can act on them together. The sum is computed on the CPU (gloo), even if
    the network is on a GPU. Reading the sum therefore does not make the host wait for the device.
    """

    def __init__(self) -> None:
        self._group = gloo_group() if world_size() > 1 else None
        self._begun: tuple[Any, Tensor] | None = None

    def add(self, *numbers: int) -> list[int]:
        """Begin the sums of these numbers, and return the sums that the call before began: zeros at the first call.

        A run of one process returns the numbers themselves.
        """
        own = torch.tensor(numbers, dtype=torch.int64)
        if self._group is None:
            return own.tolist()
        total = self.finish() or [0] * len(numbers)
        self._begun = (dist.all_reduce(own, group=self._group, async_op=True), own)
        return total

    def finish(self) -> list[int] | None:
        """Wait for the last sums and return them, or None if there are none.

        Call this before the processes disconnect.
        """
        if self._begun is None:
            return None
        work, total = self._begun
        work.wait()
        self._begun = None
        return total.tolist()
