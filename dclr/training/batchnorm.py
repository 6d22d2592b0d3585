"""BatchNorm's running statistics over the ranks. Each rank keeps those of its own clips; what is saved must be of all.

Training never reads them, so they may differ while it runs. A checkpoint holds both: the mean over ranks, which a network is measured
with, and each rank's own, so that a resumed run goes on bit for bit.
"""

import torch
from torch import Tensor, nn

from dclr import distributed


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by their names in the state dict: the module's own buffers."""
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    }


def of_all_ranks(module: nn.Module) -> Tensor:
    """(ranks, N) float32: the statistics of every rank, end to end in the order of `running_statistics`; on all ranks."""
    own = [buffer.flatten() for buffer in running_statistics(module).values()]
    device = next(module.parameters()).device
    return distributed.gather_batch(torch.cat([torch.empty(0, device=device), *own])[None])


def count(module: nn.Module) -> int:
    """How many numbers a rank's statistics are."""
    return sum(buffer.numel() for buffer in running_statistics(module).values())


def by_name(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """(N,) float32, as a row of `of_all_ranks` -> statistics by their names in the module's state dict."""
    own = running_statistics(module)
    parts = flat.split([buffer.numel() for buffer in own.values()])
    return {name: part.view_as(buffer) for (name, buffer), part in zip(own.items(), parts, strict=True)}


@torch.no_grad()
def put(module: nn.Module, flat: Tensor) -> None:
    """A row of `of_all_ranks`, or their mean, into the module's buffers."""
    for name, part in by_name(module, flat).items():
        module.get_buffer(name).copy_(part)


def average(module: nn.Module) -> None:
    """Make the statistics on every rank their mean over all: for a network that is not trained any more."""
    put(module, of_all_ranks(module).mean(0))
