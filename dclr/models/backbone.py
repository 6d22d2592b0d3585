"""Video ResNets (Tran et al., CVPR 2018, arXiv 1711.11248) without a classifier, built from torchvision's blocks.

    r2plus1d_10  (2+1)D convolutions, one block a stage: 12.5 M parameters. DCLR's authors call it r2plus1d_18.
    r2plus1d_18  (2+1)D convolutions, two blocks a stage: torchvision's r2plus1d_18.
    r3d_10       3-D convolutions, one block a stage
    r3d_18       3-D convolutions, two blocks a stage: torchvision's r3d_18
    mc3_18       3-D convolutions in the first stage, 2-D ones after it: torchvision's mc3_18

Parameter names are torchvision's, so that its weights fit strictly but for `fc`.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.errors import UserError


class Factored(Conv2Plus1D):
    """torchvision's (2+1)D convolution, whose channels between space and time can be padded: see `Backbone.pad_channels`."""

    channel_multiple = 1

    def forward(self, x: Tensor) -> Tensor:
        spatial, norm, _, temporal = self
        return _factored(x, spatial, norm, temporal, self.channel_multiple)


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


class FactoredStem(nn.Sequential):
    """The plain stem as a convolution in space, then one in time; padded likewise."""

    channel_multiple = 1

    def __init__(self, width: int) -> None:
        between = max(1, 45 * width // 64)  # torchvision's 45 channels at width 64
        super().__init__(
            nn.Conv3d(3, between, kernel_size=(1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(inplace=True),
            nn.Conv3d(between, width, kernel_size=(3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        spatial, between, _, temporal, norm, relu = self
        return relu(norm(_factored(x, spatial, between, temporal, self.channel_multiple)))


_Conv = type[Factored] | type[Conv3DSimple] | type[Conv3DNoTemporal]

# name -> the convolution of each of four stages, and the number of blocks in a stage
_STAGES: dict[str, tuple[list[_Conv], int]] = {
    "r2plus1d_10": ([Factored] * 4, 1),
    "r2plus1d_18": ([Factored] * 4, 2),
    "r3d_10": ([Conv3DSimple] * 4, 1),
    "r3d_18": ([Conv3DSimple] * 4, 2),
    "mc3_18": ([Conv3DSimple, Conv3DNoTemporal, Conv3DNoTemporal, Conv3DNoTemporal], 2),
}

BACKBONES = tuple(_STAGES)
"""The names that `build_backbone` knows."""

MAX_WIDTH = 1024
"""Sixteen times the standard networks': what a file says of its width must not fill the memory."""


class Backbone(nn.Module):
    """A stem and four stages of residual blocks.

    Attributes:
        name: one of BACKBONES.
        width: channels of the first stage, 64 in the standard networks; each later stage has twice as many.
        feature_dim: channels of the feature map, 8 * width.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.width = width
        self.feature_dim = 8 * width

        convs, blocks = _STAGES[name]
        self.stem = FactoredStem(width) if convs[0] is Factored else _plain_stem(width)
        self.layer1 = _stage(convs[0], width, width, blocks, stride=1)
        self.layer2 = _stage(convs[1], width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(convs[2], 2 * width, 4 * width, blocks, stride=2)
        self.layer4 = _stage(convs[3], 4 * width, 8 * width, blocks, stride=2)
        _replace_norms(self)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def pad_channels(self, multiple: int) -> None:
        """From now on, add zero channels between the convolutions in space and in time, up to the next multiple (1: none).

        Tensor cores take 8 or 16 channels at a time, and 45, 144, 230, 460 and 921 are torchvision's. Zeros are joined to the weights at
        every forward pass; parameters, their gradients, momentum and checkpoints keep torchvision's shapes, so that nothing is there that
        could cease to be zero. Only factored networks have such channels.
        """
        for module in self.modules():
            if isinstance(module, Factored | FactoredStem):
                module.channel_multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the last feature map, (B, 8 * width, T/8, H/16, W/16), each size rounded up.

        mc3_18 has no stride in time: its map is (B, 8 * width, T, H/16, W/16).
        """
        x = x.contiguous(
            memory_format=torch.channels_last_3d
        )  # a CPU takes half the time in bfloat16, and so do tensor cores
        x = self.stem(x)  # (B, width, T, H/2, W/2)
        x = self.layer1(x)  # (B, width, T, H/2, W/2)
        x = self.layer2(x)  # (B, 2 * width, T/2, H/4, W/4)
        x = self.layer3(x)  # (B, 4 * width, T/4, H/8, W/8)
        return self.layer4(x)  # (B, 8 * width, T/8, H/16, W/16)


def build_backbone(name: str, width: int = 64) -> Backbone:
    """A freshly initialised backbone: convolutions Kaiming normal by fan-out, batch normalisation 1 and 0.

    Raises:
        UserError: a name not in BACKBONES, or a width that is not 1 to MAX_WIDTH.
    """
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}: choose one of {', '.join(BACKBONES)}")
    if not 1 <= width <= MAX_WIDTH:
        raise UserError(f"a backbone's width must be 1 to {MAX_WIDTH}, not {width}")
    return Backbone(name, width)


def _replace_norms(module: nn.Module) -> None:
    """Put a BatchNorm in the place of every nn.BatchNorm3d that torchvision's blocks make."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm3d:
            setattr(module, name, BatchNorm(child.num_features))
        else:
            _replace_norms(child)


def _plain_stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, width, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def _factored(x: Tensor, spatial: nn.Module, norm: nn.Module, temporal: nn.Module, multiple: int) -> Tensor:
    """Convolution in space, normalisation, ReLU, convolution in time; between them zero channels, up to a multiple."""
    space, between, time = cast(nn.Conv3d, spatial), cast(BatchNorm, norm), cast(nn.Conv3d, temporal)
    to_more, from_more, extra = _padded(space, time, multiple)
    x = _in_space(x, to_more, space)
    x = F.relu(between(x, extra), inplace=True)
    return _in_time(x, from_more, time)


def _padded(space: nn.Conv3d, time: nn.Conv3d, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Weights into and out of the channels between the two, with zeros for `extra` more of them."""
    extra = -space.out_channels % multiple
    if not extra:
        return space.weight, time.weight, 0
    return F.pad(space.weight, (0, 0) * 4 + (0, extra)), F.pad(time.weight, (0, 0) * 3 + (0, extra)), extra


def _in_space(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """A (1, k, k) convolution as a 2-D one of every frame. In channels_last_3d memory (B, T, H, W, C) that is a view, as below.

    The same sums; but the fastest paths of cuDNN and of torch.compile are for 2-D, and on a CPU forward and backward in float32 take
    0.6 of the time (docs/LOG.md).
    """
    frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
    frames = F.conv2d(frames, weight.squeeze(2), None, conv.stride[1:], conv.padding[1:])
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _in_time(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """A (3, 1, 1) convolution as a 2-D one of pictures that have time for their height and all pixels in one row."""
    rows = x.flatten(3)  # (B, C, T, H * W)
    rows = F.conv2d(rows, weight.squeeze(4), None, (conv.stride[0], 1), (int(conv.padding[0]), 0))
    return rows.unflatten(3, x.shape[3:])


def _stage(conv: _Conv, channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Residual blocks, of which the first changes the number of channels and the resolution."""
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(
            nn.Conv3d(channels_in, channels_out, 1, stride=conv.get_downsample_stride(stride), bias=False),
            nn.BatchNorm3d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, conv, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, conv) for _ in range(blocks - 1)))
