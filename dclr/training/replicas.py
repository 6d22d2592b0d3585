"""Whether the ranks still hold the same network. They compute it independently from the same sums, so one flipped bit stays for ever."""

import torch
from torch import Tensor, nn

from dclr import distributed
from dclr.errors import UserError
from dclr.training import batchnorm


def checksums(module: nn.Module) -> dict[str, Tensor]:
    """Of parameters and buffers by name, () int64: the sum of a tensor's bits taken as whole numbers. BatchNorm's statistics are each
    rank's own, and left out."""
    own = batchnorm.running_statistics(module)
    shared = {name: tensor.detach() for name, tensor in module.state_dict().items() if name not in own}
    return {name: _as_integers(tensor).sum(dtype=torch.int64) for name, tensor in shared.items()}


def check_same(module: nn.Module, step: int) -> None:
    """Raises UserError on all ranks, naming the first tensor in which any two differ."""
    if distributed.world_size() == 1:
        return
    sums = checksums(module)
    ranks = distributed.gather_batch(torch.stack(list(sums.values()))[None]).tolist()
    for rank, own in enumerate(ranks[1:], start=1):
        for name, first, other in zip(sums, ranks[0], own, strict=True):
            if first != other:
                raise UserError(
                    f"rank {rank} has drifted from rank 0 at step {step}: {name} differs; a machine's memory may be faulty: "
                    "--resume goes on from the last checkpoint, on other machines if it comes again"
                )


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor.to(torch.int64)
