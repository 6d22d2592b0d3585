"""From a feature map to an embedding: activation map, pooling, projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST_MEAN = 1e-12  # keeps an all-zero activation map from dividing 0 by 0


class ProjectionHead(nn.Sequential):
    """Linear, ReLU, Linear, L2 normalisation: (B, in_dim) -> (B, out_dim) float32 of length 1.

    Weights start from a normal distribution of standard deviation 0.01, biases from 0.
    """

    def __init__(self, in_dim: int, out_dim: int = 128) -> None:
        super().__init__(nn.Linear(in_dim, in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Widened first: the layers give bfloat16 under autocast, and a length of 1 should hold to float32's precision.
        return F.normalize(super().forward(x).float(), dim=1)


def activation_map(features: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, 1, T, H, W) float32: where the network responds, the sum over channels."""
    return features.sum(dim=1, keepdim=True, dtype=torch.float32)


def pool(
    features: Tensor,  # (B, C, T, H, W)
    weight: Tensor | None = None,  # (B, 1, T, H, W)
) -> Tensor:  # (B, C)
    """The mean of a feature map f over time and space, float32; with an activation map A, of f * A / mean(A).

    The division leaves A only its shape: where it attends, not how strongly. An all-zero A gives zeros.

    Raises:
        ValueError: a weight that is not (B, 1, T, H, W) of the features' sizes.
    """
    if weight is None:
        return features.mean(dim=(2, 3, 4), dtype=torch.float32)
    if weight.shape != (features.shape[0], 1, *features.shape[2:]):
        raise ValueError(f"weight {tuple(weight.shape)} is not the activation map of features {tuple(features.shape)}")
    weight = weight.float()
    weight = weight / weight.mean(dim=(2, 3, 4), keepdim=True).clamp(min=_LEAST_MEAN)
    return (features.float() * weight).mean(dim=(2, 3, 4))
