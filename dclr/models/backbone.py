"""The base class of backbones, and layers that several backbones use.

A backbone turns clips into feature maps. backbones.py lists them by name. docs/extend.md shows how to add another.

Letters: B clips, C channels, T frames, H, W pixels.
"""

from abc import abstractmethod
from typing import cast

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

    @abstractmethod
    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map of clips (B, 3, T, H, W) in the memory format channels_last_3d.

        The clips are normalised with `statistics`.
        """

    def pad_channels(self, multiple: int) -> None:
        """Pad channels inside the network with zeros, to a multiple of `multiple`. 1 switches the padding off.

        Tensor cores work on 8 or 16 channels at a time. Results, parameters and checkpoints must stay the same. A
        backbone whose numbers of channels are multiples of 8 does nothing here.
        """

    def forward(self, x: Tensor, differences: int = 0) -> Tensor:
        """Compute the feature maps (B, feature_dim, T', H', W') of clips (B, 3, T, H, W).

        Args:
            x: clips normalised with ImageNet's statistics, whatever the weights expect.
            differences: how many clips, the last of the batch, are differences of frames (dynamic views).
        """
        x = convert(x, self.statistics, differences)
        # CPUs in bfloat16 and tensor cores take half the time of the default memory format.
        return self.feature_map(x.contiguous(memory_format=torch.channels_last_3d))


def convert(x: Tensor, statistics: Statistics, differences: int = 0) -> Tensor:
    """Convert clips (B, 3, T, H, W) from ImageNet's statistics to others.

    A normalised value is x = (v - m) / s with ImageNet's mean m and deviation s. With mean m' and deviation s' it is
    (v - m') / s' = x * s / s' + (m - m') / s'. A difference of two frames has no mean: it is only multiplied.

    Args:
        differences: how many clips, the last of the batch, are differences of frames.
    """
    if statistics == IMAGENET:
        return x
    clips = len(x) - differences
    channels = []
    # In float32, because views may be bfloat16: the result is rounded once.
    for channel, values in enumerate(zip(*IMAGENET, *statistics, strict=True)):
        mean, std, new_mean, new_std = values
        scaled = x[:, channel].float() * (std / new_std)
        shift = (mean - new_mean) / new_std
        channels.append(torch.cat([scaled[:clips] + shift, scaled[clips:]]) if differences else scaled + shift)
    return torch.stack(channels, dim=1).to(x.dtype)


class BatchNorm(nn.BatchNorm3d):
    """Batch normalisation that can add zero channels, and that sums in float64 when it trains in float32 on a CPU.

    torch's CPU kernel for channels_last_3d sums each channel in one float32 number. With 6 x 64 x 16 x 56 x 56 values
    its result is off by 4e-5 of the largest value, where float64 sums give 3e-8 (torch 2.11). Such an error differs
    between CPUs, and training amplifies it. Bfloat16 rounds to 4e-3, so nothing is gained there.
    """

    def forward(self, x: Tensor, extra: int = 0) -> Tensor:
        """Normalise (B, C + extra, T, H, W); the last `extra` channels are zero and stay zero."""
        precise = self.training and x.dtype == torch.float32 and x.device.type == "cpu"
        if not (precise or extra):
            return super().forward(x)
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        running_mean, running_var, batches = cast(tuple[Tensor, Tensor, Tensor], buffers)
        momentum = 0.1 if self.momentum is None else self.momentum
        mean, variance = F.pad(running_mean, (0, extra)), F.pad(running_var, (0, extra), value=1.0)
        scale, shift = F.pad(self.weight, (0, extra)), F.pad(self.bias, (0, extra))
        dtype = x.dtype
        if precise:
            x, mean, variance, scale, shift = (t.double() for t in (x, mean, variance, scale, shift))
        x = F.batch_norm(x, mean, variance, scale, shift, self.training, momentum, self.eps).to(dtype)
        if self.training:
            running_mean.copy_(mean[: self.num_features])
            running_var.copy_(variance[: self.num_features])
            batches.add_(1)
        return x


def replace_norms(module: nn.Module) -> None:
    """Replace every nn.BatchNorm3d inside a module of torchvision by a BatchNorm with the same eps and momentum."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm3d:
            setattr(module, name, BatchNorm(child.num_features, child.eps, child.momentum))
        else:
            replace_norms(child)


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
