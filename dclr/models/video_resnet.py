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
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.kernels.space_to_depth import CHANNELS, space_to_depth
from dclr.models.backbone import Backbone, in_space, in_time, initialise
from dclr.models.batch_norm import BatchNorm, replace_norms
from dclr.models.clip_format import IMAGENET
from dclr.models.clips import Clips, align, as_clips, convolve


class Factored(Conv2Plus1D):
    """torchvision's (2+1)D convolution, with optional padding of its inner channels: see `Backbone.pad_channels`."""

    channel_multiple = 1

    def apply_to(self, views: list[Clips]) -> list[Clips]:
        """Convolve in space, normalise, apply ReLU, and convolve in time."""
        spatial, norm, _, temporal = self
        return _factored(views, spatial, norm, temporal, self.channel_multiple)


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

    def apply_to(self, views: list[Clips]) -> list[Clips]:
        """Compute the stem's output of views (B, 3, D, H, W), or of their blocks: see `space_to_depth`."""
        spatial, between, _, temporal, norm, _ = self
        views = _factored(views, spatial, between, temporal, self.channel_multiple)
        return cast(BatchNorm, norm).normalise(views)


class PlainStem(nn.Sequential):
    """The stem of networks with 3-D convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv3d(3, width, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )

    def apply_to(self, views: list[Clips]) -> list[Clips]:
        """Compute the stem's output of views (B, 3, D, H, W), or of their blocks: see `space_to_depth`."""
        conv, norm, _ = self
        return cast(BatchNorm, norm).normalise(_convolve(views, cast(nn.Conv3d, conv)))


class Block(BasicBlock):
    """torchvision's residual block for several views, whose batch normalisation has joint statistics."""

    def apply_to(self, views: list[Clips]) -> list[Clips]:
        """Compute the block's output of each view."""
        (conv1, norm1, _), (conv2, norm2) = self.conv1, self.conv2
        inner = cast(BatchNorm, norm1).normalise(_convolve(views, conv1))
        inner = _convolve(inner, conv2)
        if self.downsample is not None:
            conv, norm = self.downsample
            views = cast(BatchNorm, norm).normalise(_convolve(views, conv), relu=False)
        shortcuts = [align(shortcut, main) for shortcut, main in zip(views, inner, strict=True)]
        return cast(BatchNorm, norm2).normalise(inner, shortcuts=shortcuts)


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
        self.stem = (FactoredStem if convs[0] is Factored else PlainStem)(width)
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

    @property
    def takes_blocks(self) -> bool:
        """Whether clips may also come in blocks: only if the weights expect ImageNet's statistics."""
        return self.statistics == IMAGENET

    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map: (B, 3, T, H, W) -> (B, 8 * width, T/8, H/16, W/16), each size rounded up.

        mc3_18 has no stride in time: its map is (B, 8 * width, T, H/16, W/16).
        """
        return self.feature_maps([x], x.shape[2])[0]

    def feature_maps(self, views: Sequence[Tensor], frames: int) -> list[Tensor]:
        """Compute the last feature map of each view, see `feature_map`. Equal frames are computed once."""
        clips = [as_clips(view, frames) for view in views]
        clips = self.stem.apply_to(clips)  # (B, width, T, H/2, W/2)
        # layer1 keeps this size. Each later stage halves T, H and W and doubles the channels.
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                clips = cast(Block, block).apply_to(clips)
        return [view.expand() for view in clips]


def _convolve(views: list[Clips], conv: nn.Module) -> list[Clips]:
    """Apply a convolution of a block or of a stem to each view."""
    if isinstance(conv, Factored):
        return conv.apply_to(views)
    conv = cast(nn.Conv3d, conv)
    return [convolve(view, conv, partial(_in_three, weight=conv.weight, conv=conv)) for view in views]


def _in_three(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply a 3-D convolution. The stem's may get blocks, see `_of_blocks`.

    Two frames get their zeros in time before. On CPUs with bfloat16, torch 2.11 computes a wrong weight gradient for
    exactly two frames that the convolution pads itself: 100 % off, or infinite.
    """
    stride, padding = conv.stride, cast(tuple[int, ...], conv.padding)
    if conv.in_channels == 3 and (x := _as_blocks(x)).shape[1] == CHANNELS:
        weight, stride, padding = _of_blocks(weight), (conv.stride[0], 1, 1), (padding[0], 0, 0)
    if x.shape[2] == 2 and x.device.type == "cpu":
        x, padding = F.pad(x, (0, 0) * 2 + (padding[0], padding[0])), (0, *padding[1:])
    return F.conv3d(x, weight, None, stride, padding)


def _factored(
    views: list[Clips], spatial: nn.Module, norm: nn.Module, temporal: nn.Module, multiple: int
) -> list[Clips]:
    """Convolve in space, normalise, apply ReLU, convolve in time. The inner channels are padded to a multiple."""
    space, between, time = cast(nn.Conv3d, spatial), cast(BatchNorm, norm), cast(nn.Conv3d, temporal)
    to_more, from_more, extra = _padded(space, time, multiple)
    in_frames = _stem_in_space if space.in_channels == 3 and space.kernel_size[1] == 7 else in_space
    views = [convolve(view, space, partial(in_frames, weight=to_more, conv=space)) for view in views]
    views = between.normalise(views, extra=extra)
    return [convolve(view, time, partial(in_time, weight=from_more, conv=time)) for view in views]


def _stem_in_space(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply the stem's (1, 7, 7) convolution of stride 2 to pixels or to blocks, (B, C, T, H, W) -> (B, C', T, ...).

    On a GPU pixels become blocks first, because 3 channels leave most of its matrix units idle (docs/LOG.md). On a CPU
    the 7 x 7 convolution is faster.
    """
    x = _as_blocks(x)
    if x.shape[1] != CHANNELS:
        return in_space(x, weight, conv)
    frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), _of_blocks(weight).squeeze(2))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _as_blocks(x: Tensor) -> Tensor:
    """Return the blocks of a stem's input on a GPU. On a CPU return the input, which may be blocks already."""
    return space_to_depth(x) if x.is_cuda and x.shape[1] == 3 else x


def _of_blocks(weight: Tensor) -> Tensor:
    """Return the weight (C, 16, t, 4, 4) for blocks that convolves like the weight (C, 3, t, 7, 7) with stride 2.

    A kernel of 8 x 8 whose first row and column are zero reaches from pixel 2 o - 4 to 2 o + 3 for output o. These are
    the blocks o - 2 to o + 1. Channels are in the order of `space_to_depth`.
    """
    blocks = F.pad(weight, (1, 0, 1, 0)).unflatten(4, (4, 2)).unflatten(3, (4, 2))  # (C, 3, t, 4, 2, 4, 2)
    blocks = blocks.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)  # (C, 12, t, 4, 4)
    return F.pad(blocks, (0, 0) * 3 + (0, CHANNELS - blocks.shape[1]))


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
    first = Block(channels_in, channels_out, conv, stride, shortcut)
    return nn.Sequential(first, *(Block(channels_out, channels_out, conv) for _ in range(blocks - 1)))
