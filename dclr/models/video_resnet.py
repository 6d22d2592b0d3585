"""Video ResNets (Tran et al., CVPR 2018, arXiv 1711.11248) without a classifier, built from torchvision's blocks.

    r2plus1d_10  (2+1)D convolutions, one block per stage, 12.5 M parameters; the DCLR authors call it r2plus1d_18
    r2plus1d_18  (2+1)D convolutions, two blocks per stage; torchvision's r2plus1d_18
    r3d_10       3-D convolutions, one block per stage
    r3d_18       3-D convolutions, two blocks per stage; torchvision's r3d_18
    mc3_18       3-D convolutions in the first stage, 2-D convolutions in the others; torchvision's mc3_18

Parameter names are torchvision's, so torchvision's weights load strictly, except `fc`.

Letters: B clips, C channels, T frames, H, W pixels.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.models.backbone import Backbone, BatchNorm, in_space, in_time, initialise, replace_norms


class Factored(Conv2Plus1D):
    """torchvision's (2+1)D convolution, with optional padding of its inner channels: see `Backbone.pad_channels`."""

    channel_multiple = 1

    def forward(self, x: Tensor) -> Tensor:
        spatial, norm, _, temporal = self
        return _factored(x, spatial, norm, temporal, self.channel_multiple)


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


Conv = type[Factored] | type[Conv3DSimple] | type[Conv3DNoTemporal]


class VideoResNet(Backbone):
    """A stem and four stages of residual blocks. The feature map has 8 * width channels.

    Args:
        convs: the convolutions of the four stages.
        blocks: residual blocks of each stage.
        width: channels of the first stage, 64 in the standard networks. Each later stage doubles the channels.
    """

    def __init__(self, convs: Sequence[Conv], blocks: int, width: int) -> None:
        super().__init__(feature_dim=8 * width)
        self.stem = FactoredStem(width) if convs[0] is Factored else _plain_stem(width)
        self.layer1 = _stage(convs[0], width, width, blocks, stride=1)
        self.layer2 = _stage(convs[1], width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(convs[2], 2 * width, 4 * width, blocks, stride=2)
        self.layer4 = _stage(convs[3], 4 * width, 8 * width, blocks, stride=2)
        replace_norms(self)
        initialise(self)

    def pad_channels(self, multiple: int) -> None:
        """Pad the channels between the convolutions in space and in time with zeros, to a multiple of `multiple`.

        torchvision's networks have 45, 144, 230, 460 or 921 such channels. Every forward pass appends zeros to the
        weights. Parameters, gradients, momentum and checkpoints keep torchvision's shapes, so no stored value can
        become non-zero. Networks without (2+1)D convolutions do not change.
        """
        for module in self.modules():
            if isinstance(module, Factored | FactoredStem):
                module.channel_multiple = multiple

    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map: (B, 3, T, H, W) -> (B, 8 * width, T/8, H/16, W/16), each size rounded up.

        mc3_18 has no stride in time: its map is (B, 8 * width, T, H/16, W/16).
        """
        x = self.stem(x)  # (B, width, T, H/2, W/2)
        x = self.layer1(x)  # (B, width, T, H/2, W/2)
        x = self.layer2(x)  # (B, 2 * width, T/2, H/4, W/4)
        x = self.layer3(x)  # (B, 4 * width, T/4, H/8, W/8)
        return self.layer4(x)  # (B, 8 * width, T/8, H/16, W/16)


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
    x = in_space(x, to_more, space)
    x = F.relu(between(x, extra), inplace=True)
    return in_time(x, from_more, time)


def _padded(space: nn.Conv3d, time: nn.Conv3d, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Return the weights of both convolutions with zeros for `extra` inner channels, and `extra`."""
    extra = -space.out_channels % multiple
    if not extra:
        return space.weight, time.weight, 0
    return F.pad(space.weight, (0, 0) * 4 + (0, extra)), F.pad(time.weight, (0, 0) * 3 + (0, extra)), extra


def _stage(conv: Conv, channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Build the residual blocks of a stage. The first block changes the number of channels and the resolution."""
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(
            nn.Conv3d(channels_in, channels_out, 1, stride=conv.get_downsample_stride(stride), bias=False),
            nn.BatchNorm3d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, conv, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, conv) for _ in range(blocks - 1)))
