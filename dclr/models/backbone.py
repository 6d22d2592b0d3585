"""The base class of backbones, and layers that several backbones use.

A backbone turns clips into feature maps. backbones.py lists them by name. docs/extend.md shows how to add another.

Letters: B clips, C channels, T frames, H, W pixels.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dclr.models.clip_format import IMAGENET, Statistics


class Backbone(nn.Module):
    """Base class of backbones: clips (B, 3, T, H, W) -> feature maps (B, feature_dim, T', H', W').

    A backbone defines `feature_map`, and gives `feature_dim` to this class. `feature_map` must also work on torch's
    device "meta", which computes shapes without values: the sizes of feature maps are found there.

    Attributes:
        name: the backbone's name in BACKBONES. `build_backbone` sets it.
        width: channels of the first stage, 64 in the standard networks. `build_backbone` sets it.
        feature_dim: channels of the feature map.
        statistics: mean and standard deviation that the weights expect. `forward` takes clips normalised with
            ImageNet's statistics all the same.
    """

    name: str
    width: int

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.statistics = IMAGENET

    @property
    def takes_blocks(self) -> bool:
        """True if clips may also come in the layout of `dclr.kernels.space_to_depth`."""
        return False

    @abstractmethod
    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map of clips (B, 3, T, H, W) in the memory format channels_last_3d.

        The clips are normalised with `statistics`.
        """

    def feature_maps(self, views: Sequence[Tensor], frames: int) -> list[Tensor]:
        """Compute the last feature map of each view. The views share BatchNorm's statistics. See `forward_views`.

        A backbone may define a faster way than this one, which makes one batch of all views.
        """
        batch = torch.cat([view.expand(-1, -1, frames, -1, -1) for view in views])
        maps = self.feature_map(batch.contiguous(memory_format=torch.channels_last_3d))
        return list(maps.split([view.shape[0] for view in views]))

    def pad_channels(self, multiple: int) -> None:
        """Pad channels inside the network with zeros, to a multiple of `multiple`. 1 switches the padding off.

        Tensor cores work on 8 or 16 channels at a time. Results, parameters and checkpoints must stay the same. A
        backbone whose numbers of channels are multiples of 8 does nothing here.
        """

    def fusible(self) -> dict[str, Tensor]:
        """Return the convolutions that `fuse` takes: the name of the module -> the weight that would be used.

        The weight may have padded channels. `dclr.kernels.convolution.supports` tells whether the kernels take it.
        """
        return {}

    def fuse(self, names: Collection[str]) -> None:
        """Let `dclr.kernels.convolution` compute these convolutions of `fusible`, and the library the others.

        A fused convolution normalises its input itself and computes the statistics of its output. Parameters and
        checkpoints stay the same. Results change by rounding errors only.
        """

    def recompute(self) -> bool:
        """Keep fewer results for the backward pass, and compute the others again there. `recompute.py` helps.

        Losses, gradients and running statistics must stay the same bit for bit.

        Returns:
            False if the backbone cannot do so, as here. --recompute is then refused unless the backbone is compiled.
        """
        return False

    def forward(self, x: Tensor, differences: bool = False) -> Tensor:
        """Compute the feature maps (B, feature_dim, T', H', W') of clips (B, 3, T, H, W).

        Args:
            x: clips normalised with ImageNet's statistics, whatever the weights expect.
            differences: the clips are differences of frames (a dynamic view).
        """
        return self.forward_views([x], x.shape[2], differences)[0]

    def forward_views(self, views: Sequence[Tensor], frames: int, differences: bool = False) -> list[Tensor]:
        """Compute the feature maps of the views of a step, one (B, feature_dim, T', H', W') for each view.

        The views share BatchNorm's statistics in training, as one batch of all views would.

        Args:
            views: each (B, 3, frames, H, W), or (B, 3, 1, H, W) for one frame that stands for `frames` equal frames.
                If `takes_blocks`, also the layout of `dclr.kernels.space_to_depth`. Values as in `forward`.
            frames: T, the number of frames of every view.
            differences: the last view is a dynamic view.
        """
        last = len(views) - 1
        converted = [
            convert(view, self.statistics, differences and number == last) for number, view in enumerate(views)
        ]
        return self.feature_maps(converted, frames)


def convert(x: Tensor, statistics: Statistics, differences: bool = False) -> Tensor:
    """Convert clips (B, 3, T, H, W) from ImageNet's statistics to others.

    A normalised value is x = (v - m) / s with ImageNet's mean m and deviation s. With mean m' and deviation s' it is
    (v - m') / s' = x * s / s' + (m - m') / s'. A difference of two frames has no mean: it is only multiplied.

    Args:
        differences: the clips are differences of frames.
    """
    if statistics == IMAGENET:
        return x
    channels = []
    # In float32, because views may be bfloat16: the result is rounded once.
    for channel, values in enumerate(zip(*IMAGENET, *statistics, strict=True)):
        mean, std, new_mean, new_std = values
        shift = 0.0 if differences else (mean - new_mean) / new_std
        channels.append(x[:, channel].to(torch.promote_types(x.dtype, torch.float32)) * (std / new_std) + shift)
    return torch.stack(channels, dim=1).to(x.dtype)


def initialise(module: nn.Module) -> None:
    """Draw random weights: convolutions Kaiming normal by fan-out, batch normalisation 1 and 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv3d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(child, nn.BatchNorm3d):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


def in_space(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply a (1, k, k) convolution as a 2-D convolution of every frame, (B, C, T, H, W) -> (B, C', T, H', W').

    The result is the same, but cuDNN and torch.compile are fastest in 2-D. On a CPU, forward and backward in float32
    take 0.6 of the time of the 3-D convolution (docs/LOG.md). In channels_last_3d memory the reshapes copy nothing.
    """
    frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
    frames = F.conv2d(frames, weight.squeeze(2), None, conv.stride[1:], conv.padding[1:])
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def in_time(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply a (3, 1, 1) convolution as a 2-D convolution of images: time is the height, all pixels are the width."""
    rows = x.flatten(3)  # (B, C, T, H * W)
    rows = F.conv2d(rows, weight.squeeze(4), None, (conv.stride[0], 1), (int(conv.padding[0]), 0))
    return rows.unflatten(3, x.shape[3:])
