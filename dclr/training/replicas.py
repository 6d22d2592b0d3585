"""The replica consistency check: all ranks must hold the same network.

Each rank computes its update from the same sums, so one flipped bit on one rank would stay for the rest of the run.
"""

import torch
from torch import Tensor, nn

from dclr import distributed
from dclr.errors import UserError
from dclr.training import batchnorm


def checksums(module: nn.Module) -> dict[str, Tensor]:
    """Return a checksum () int64 for each parameter and buffer: the sum of its bits, read as whole numbers.

    BatchNorm's running statistics are not included, because each rank has its own.
    """
    own = batchnorm.running_statistics(module)
    shared = {name: tensor.detach() for name, tensor in module.state_dict().items() if name not in own}
    return {name: _as_integers(tensor).sum(dtype=torch.int64) for name, tensor in shared.items()}


def check_replicas(module: nn.Module, step: int) -> None:
    """Compare the checksums of all ranks.

    Raises:
        UserError: on all ranks, a checksum differs. The message names the first tensor that differs from rank 0's.
    """
    if distributed.world_size() == 1:
        return
    sums = checksums(module)
    ranks = distributed.gather_batch(torch.stack(list(sums.values()))[None]).tolist()
    for rank, own in enumerate(ranks[1:], start=1):
        for name, first, other in zip(sums, ranks[0], own, strict=True):
            if first != other:
                raise UserError(
                    f"rank {rank} no longer holds the network of rank 0 at step {step}: {name} differs. A machine's "
                    "memory may be faulty: --resume continues from the last checkpoint; if it happens again, "
                    "use other machines"
                )


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor.to(torch.int64)
