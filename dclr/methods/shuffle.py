"""The shuffle of clips over ranks: which rank encodes a clip, and the way there and back.

Letters: R ranks, n rows that each rank has.
"""

import torch
from torch import Tensor

from dclr import distributed
from dclr.kernels.backend import to_device


class Shuffle:
    """A random permutation of the rows of all ranks. Each rank gives its n rows away and gets n rows.

    Rows are numbered over all ranks: rank r has the rows r * n to (r + 1) * n - 1. After the shuffle it has the rows
    order[r * n] to order[(r + 1) * n - 1]. All ranks compute the permutation from the same seed, so nobody sends it.

    Attributes:
        order: (R * n,) the permutation.
        own: (n,) numbers of the rows that this rank has.
        arrived: (n,) numbers of the rows that this rank gets.
        leaving: (n,) the own rows, counted from 0, in the order in which they are sent.
        arriving: (n,) the position in `arrived` of each row that this rank receives, in the order of receiving.
    """

    def __init__(self, size: int, seed: int) -> None:
        """`size`: n. `seed`: the same on all ranks."""
        ranks, rank = distributed.world_size(), distributed.rank()
        self.order = torch.randperm(ranks * size, generator=torch.Generator().manual_seed(seed))
        self.own = torch.arange(rank * size, (rank + 1) * size)
        self.arrived = self.order[self.own]
        self._positions = self.order.argsort()  # of each row, after the shuffle
        # Rows travel by rank, and between the same two ranks by their position after the shuffle.
        self.leaving = self._positions[self.own].argsort()
        self.arriving = (self.arrived // size).argsort(stable=True)
        self._sent = (self._positions[self.own] // size).bincount(minlength=ranks).tolist()
        self._received = (self.arrived // size).bincount(minlength=ranks).tolist()

    def send(self, rows: Tensor) -> Tensor:
        """Return the rows `arrived`, given the rows `own`: (n, ...) -> (n, ...). There is no gradient."""
        leaving, arriving = (to_device(numbers, rows.device) for numbers in (self.leaving, self.arriving))
        received = distributed.all_to_all(rows[leaving], self._sent, self._received)
        return torch.empty_like(received).index_copy_(0, arriving, received)

    def send_back(self, rows: Tensor) -> Tensor:
        """Return the rows `own`, given the rows `arrived`: the inverse of `send`."""
        leaving, arriving = (to_device(numbers, rows.device) for numbers in (self.leaving, self.arriving))
        received = distributed.all_to_all(rows[arriving], self._received, self._sent)
        return torch.empty_like(received).index_copy_(0, leaving, received)

    def send_bytes(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows of different lengths.

        Args:
            rows: uint8, the rows `leaving`, one after the other.
            sent: the bytes of each of these rows.
            received: the bytes of each row that this rank receives, in the order of `arriving`.

        Returns:
            uint8, the received rows, one after the other, in the order of `arriving`.
        """
        return distributed.all_to_all(rows, _sums(sent, self._sent), _sums(received, self._received))

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks in the order of their numbers, given the rows `arrived`.

        (n, ...) -> (R * n, ...), on every rank.
        """
        return distributed.gather_batch(rows)[to_device(self._positions, rows.device)]


def _sums(sizes: list[int], counts: list[int]) -> list[int]:
    """Return the sums of `sizes` in consecutive groups, which have `counts` members."""
    groups = torch.tensor(sizes).split(counts)
    return [int(group.sum()) for group in groups]
