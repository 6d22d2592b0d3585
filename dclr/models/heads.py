"""The steps from a feature map to an embedding: activation map, pooling, projection head.

Letters: B clips, C channels, T, H, W cells of the feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST_MEAN = 1e-12  # prevents 0 / 0 for an all-zero activation map


class ProjectionHead(nn.Sequential):
    """Linear, ReLU, Linear, L2 normalisation: (B, in_dim) -> (B, out_dim) float32, rows of length 1.

    Initial weights are drawn from a normal distribution with standard deviation 0.01. Initial biases are 0.
    """

    def __init__(self, in_dim: int, out_dim: int = 128) -> None:
        super().__init__(nn.Linear(in_dim, in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        # float() comes first, because the layers return bfloat16 under autocast and the length must be precise.
        return F.normalize(super().forward(x).float(), dim=1)


class LinearHead(nn.Linear):
    """Linear and L2 normalisation: (B, in_dim) -> (B, out_dim) float32, rows of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x).float(), dim=1)


class NormalisedLinear(nn.Linear):
    """Linear layer that scales each feature to length 1 first: (..., in_dim) -> (..., out_dim).

    The released code does this in its linear probe. A learning rate then fits features of any scale.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.normalize(x, dim=-1))


def activation_map(features: Tensor) -> Tensor:
    """Sum a feature map over its channels: (B, C, T, H, W) -> (B, 1, T, H, W) float32.

    The sum shows where the network responds.
    """
    return features.sum(dim=1, keepdim=True, dtype=torch.float32)


def pool(
    features: Tensor,  # (B, C, T, H, W)
    weight: Tensor | None = None,  # (B, 1, T, H, W)
) -> Tensor:  # (B, C)
    """Average a feature map f over time and space, in float32. With an activation map A, average f * A / mean(A).

    The division by mean(A) keeps only A's relative values: where the network responds, not how strongly. An all-zero A
    gives zeros.

    Args:
        weight: the activation map A.

    Raises:
        ValueError: `weight` is not (B, 1, T, H, W) with the sizes of `features`.
    """
    if weight is None:
        return features.mean(dim=(2, 3, 4), dtype=torch.float32)
    if weight.shape != (features.shape[0], 1, *features.shape[2:]):
        raise ValueError(f"weight {tuple(weight.shape)} is not the activation map of features {tuple(features.shape)}")
    weight = weight.float()
    weight = weight / weight.mean(dim=(2, 3, 4), keepdim=True).clamp(min=_LEAST_MEAN)
    return (features.float() * weight).mean(dim=(2, 3, 4))
