"""Video ResNets (Tran et al., CVPR 2018, arXiv 1711.11248) without a classifier, built from torchvision's blocks.

    r2plus1d_10  (2+1)D convolutions, one block per stage, 12.5 M parameters; the DCLR authors call it r2plus1d_18
    r2plus1d_18  (2+1)D convolutions, two blocks per stage; torchvision's r2plus1d_18
    r3d_10       3-D convolutions, one block per stage
    r3d_18       3-D convolutions, two blocks per stage; torchvision's r3d_18
    mc3_18       3-D convolutions in the first stage, 2-D convolutions in the others; torchvision's mc3_18

Parameter names are torchvision's, so torchvision's weights load strictly, except `fc`.

Letters: B clips, C channels, T frames, H, W pixels.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.errors import UserError


class Factored(Conv2Plus1D):
    """torchvision's (2+1)D convolution, with optional padding of its inner channels: see `Backbone.pad_channels`."""

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
    """The plain stem factored into a convolution in space and one in time, with the same optional padding."""

    channel_multiple = 1

    def __init__(self, width: int) -> None:
        between = max(1, 45 * width // 64)  # torchvision has 45 channels at width 64
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

# name -> the convolutions of the four stages, and the number of blocks per stage
_STAGES: dict[str, tuple[list[_Conv], int]] = {
    "r2plus1d_10": ([Factored] * 4, 1),
    "r2plus1d_18": ([Factored] * 4, 2),
    "r3d_10": ([Conv3DSimple] * 4, 1),
    "r3d_18": ([Conv3DSimple] * 4, 2),
    "mc3_18": ([Conv3DSimple, Conv3DNoTemporal, Conv3DNoTemporal, Conv3DNoTemporal], 2),
}

BACKBONES = tuple(_STAGES)
"""The names that `build_backbone` accepts."""

MAX_WIDTH = 1024
"""The largest width, 16 times that of the standard networks. A wrong width in a file must not fill the memory."""


class Backbone(nn.Module):
    """A stem and four stages of residual blocks.

    Attributes:
        name: one of BACKBONES.
        width: channels of the first stage, 64 in the standard networks. Each later stage doubles the channels.
        feature_dim: channels of the last feature map, 8 * width.
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
        """Pad the channels between the convolutions in space and in time with zeros, to a multiple of `multiple`.

        Tensor cores work on 8 or 16 channels at a time, but torchvision's networks have 45, 144, 230, 460 or 921. Every
        forward pass appends zeros to the weights. Parameters, gradients, momentum and checkpoints keep torchvision's
        shapes, so no stored value can become non-zero. Networks without (2+1)D convolutions do not change.

        Args:
            multiple: 1 switches the padding off.
        """
        for module in self.modules():
            if isinstance(module, Factored | FactoredStem):
                module.channel_multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """Compute the last feature map: (B, 3, T, H, W) -> (B, 8 * width, T/8, H/16, W/16), each size rounded up.

        mc3_18 has no stride in time: its map is (B, 8 * width, T, H/16, W/16).
        """
        # CPUs in bfloat16 and tensor cores take half the time of the default memory format.
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self.stem(x)  # (B, width, T, H/2, W/2)
        x = self.layer1(x)  # (B, width, T, H/2, W/2)
        x = self.layer2(x)  # (B, 2 * width, T/2, H/4, W/4)
        x = self.layer3(x)  # (B, 4 * width, T/4, H/8, W/8)
        return self.layer4(x)  # (B, 8 * width, T/8, H/16, W/16)


def map_size(name: str, frames: int, pixels: int) -> tuple[int, int, int]:
    """Return the size (T', H', W') of a backbone's last feature map, for a clip of frames of pixels x pixels."""
    time = 1 if _STAGES[name][0][3] is Conv3DNoTemporal else 8
    return -(-frames // time), -(-pixels // 16), -(-pixels // 16)


def build_backbone(name: str, width: int = 64) -> Backbone:
    """Build a backbone with random weights: convolutions Kaiming normal by fan-out, batch normalisation 1 and 0.

    Raises:
        UserError: `name` is not in BACKBONES, or `width` is not 1 to MAX_WIDTH.
    """
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}: choose one of {', '.join(BACKBONES)}")
    if not 1 <= width <= MAX_WIDTH:
        raise UserError(f"a backbone's width must be 1 to {MAX_WIDTH}, not {width}")
    return Backbone(name, width)


def _replace_norms(module: nn.Module) -> None:
    """Replace every nn.BatchNorm3d of torchvision's blocks by a BatchNorm."""
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
    """Convolve in space, normalise, apply ReLU, convolve in time. The inner channels are padded to a multiple."""
    space, between, time = cast(nn.Conv3d, spatial), cast(BatchNorm, norm), cast(nn.Conv3d, temporal)
    to_more, from_more, extra = _padded(space, time, multiple)
    x = _in_space(x, to_more, space)
    x = F.relu(between(x, extra), inplace=True)
    return _in_time(x, from_more, time)


def _padded(space: nn.Conv3d, time: nn.Conv3d, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Return the weights of both convolutions with zeros for `extra` inner channels, and `extra`."""
    extra = -space.out_channels % multiple
    if not extra:
        return space.weight, time.weight, 0
    return F.pad(space.weight, (0, 0) * 4 + (0, extra)), F.pad(time.weight, (0, 0) * 3 + (0, extra)), extra


def _in_space(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply a (1, k, k) convolution as a 2-D convolution of every frame, (B, C, T, H, W) -> (B, C', T, H', W').

    The result is the same, but cuDNN and torch.compile are fastest in 2-D. On a CPU, forward and backward in float32
    take 0.6 of the time of the 3-D convolution (docs/LOG.md). In channels_last_3d memory the reshapes copy nothing.
    """
    frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
    frames = F.conv2d(frames, weight.squeeze(2), None, conv.stride[1:], conv.padding[1:])
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _in_time(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply a (3, 1, 1) convolution as a 2-D convolution of images: time is the height, all pixels are the width."""
    rows = x.flatten(3)  # (B, C, T, H * W)
    rows = F.conv2d(rows, weight.squeeze(4), None, (conv.stride[0], 1), (int(conv.padding[0]), 0))
    return rows.unflatten(3, x.shape[3:])


def _stage(conv: _Conv, channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Build the residual blocks of a stage. The first block changes the number of channels and the resolution."""
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(
            nn.Conv3d(channels_in, channels_out, 1, stride=conv.get_downsample_stride(stride), bias=False),
            nn.BatchNorm3d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, conv, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, conv) for _ in range(blocks - 1)))
