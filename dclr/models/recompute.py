"""Activation checkpointing: a part of a network keeps only its inputs, and is computed again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recompute(parts: Iterable[nn.Module], compute: Callable[..., Any], *tensors: Tensor) -> Any:
    """Return compute(*tensors). Its inner results are not kept, but computed again in the backward pass.

    The second computation has the same random numbers and the same autocast as the first one, so gradients are the same
    bit for bit. The running statistics of batch normalisation are updated in the first computation only. Without a
    gradient, and in compiled code, this is an ordinary call.

    Args:
        parts: the modules that `compute` uses.
        compute: a function of tensors without other effects than those on running statistics.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(*tensors)
    norms = [module for part in parts for module in part.modules() if isinstance(module, _NORMS)]
    first = True

    def run(*given: Tensor) -> Any:
        nonlocal first
        if first:
            first = False
            return compute(*given)
        with _fixed(norms):
            return compute(*given)

    return checkpoint(run, *tensors, use_reentrant=False)


@contextmanager
def _fixed(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch normalisation in training leave its running statistics as they are. It does not read them."""
    tracking = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, before in zip(norms, tracking, strict=True):
            norm.track_running_stats = before
