"""The linear probe: how well a linear classifier separates classes by frozen features.

The classifier is multinomial logistic regression on standardised features. The loss is the sum of the cross entropies
plus half the sum of the squared weights, which is a standard normal prior on each weight. This loss is strictly convex
in the weights. So the solution is unique, does not depend on the optimizer, and needs no tuning. A linear layer trained
by SGD (`train.py linear`) depends on its learning rate and its number of epochs.

Letters: N videos, D features, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_STEPS = 2000
SMALLEST_GRADIENT = 1e-6
"""A probe has converged if no derivative of the mean loss per video is larger than this in absolute value."""


@dataclass(frozen=True)
class Probe:
    """A fitted classifier. All tensors are float64 on the CPU."""

    mean: Tensor  # (D,) mean of the features that the probe was fitted to
    scale: Tensor  # (D,) their standard deviation, or 1 where the deviation is 0
    weight: Tensor  # (C, D), for standardised features
    bias: Tensor  # (C,)
    steps: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits: (N, D) -> (N, C) float64."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)


def fit_probe(
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N,) int64 in 0 to classes - 1
    classes: int,
) -> Probe:
    """Fit a probe by L-BFGS with a line search, in float64, from zero weights. The result is deterministic.

    A class may have no video.
    """
    features = features.double()
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x = (features - mean) / scale
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        history_size=20,
        tolerance_grad=SMALLEST_GRADIENT,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss_per_video() -> Tensor:
        optimizer.zero_grad()
        # Dividing the loss by N keeps the solution, and makes SMALLEST_GRADIENT independent of the number of videos.
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(loss_per_video)
    loss_per_video()  # computes the gradient at the solution: the line search may have ended with another point
    gradient = max(parameter.grad.abs().max().item() for parameter in (weight, bias) if parameter.grad is not None)
    return Probe(
        mean=mean,
        scale=scale,
        weight=weight.detach(),
        bias=bias.detach(),
        steps=optimizer.state[weight]["n_iter"],
        converged=gradient <= SMALLEST_GRADIENT,
    )
