"""Video ResNets (Tran et al., CVPR 2018, arXiv 1711.11248) without a classifier, built from torchvision's blocks.

    r2plus1d_10  (2+1)D convolutions, one block per stage, 12.5 M parameters; the DCLR authors call it r2plus1d_18
    r2plus1d_18  (2+1)D convolutions, two blocks per stage; torchvision's r2plus1d_18
    r3d_10       3-D convolutions, one block per stage
    r3d_18       3-D convolutions, two blocks per stage; torchvision's r3d_18
    mc3_18       3-D convolutions in the first stage, 2-D convolutions in the others; torchvision's mc3_18

Parameter names are torchvision's, so torchvision's weights load strictly, except `fc`.

Letters: B clips, C channels, T frames, H, W pixels.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.kernels import convolution
from dclr.kernels.space_to_depth import CHANNELS, space_to_depth
from dclr.models.backbone import Backbone, in_space, in_time, initialise
from dclr.models.batch_norm import BatchNorm, merge_statistics, replace_norms
from dclr.models.clip_format import IMAGENET
from dclr.models.clips import Clips, align, as_clips, before_convolution, convolve
from dclr.models.recompute import recompute

CHANNEL_MULTIPLE = 16
"""Fused convolutions take multiples of so many channels. The channels inside a (2+1)D convolution are padded to it."""

Apply = Callable[[Tensor, Tensor, nn.Conv3d], Tensor]

BatchStatistics = tuple[Tensor, Tensor]
"""The mean and the biased variance (C,) of a convolution's output over all views, which the convolution computed."""


class Before(NamedTuple):
    """Batch normalisation with ReLU that comes before a convolution."""

    norm: BatchNorm
    statistics: BatchStatistics | None
    """The statistics of the views that it normalises. None computes them from the views."""
    extra: int = 0
    """The number of padded channels of the views."""


class SpaceThenTime(nn.Sequential):
    """A convolution in space, batch normalisation, ReLU and a convolution in time. Other layers may follow.

    Attributes:
        channel_multiple: the channels between the convolutions are padded to a multiple of this number: see
            `Backbone.pad_channels`.
        fused: the convolutions, "spatial" and "temporal", that `dclr.kernels.convolution` computes: see
            `Backbone.fuse`. The library computes the others.
        recomputes: whether `convolve` keeps only its input for the backward pass: see `Backbone.recompute`.
    """

    channel_multiple = 1
    fused: frozenset[str] = frozenset()
    recomputes = False

    def weights(self, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Return the weights of both convolutions, with zeros for the padded channels between them.

        Their number is a multiple of `channel_multiple` and of `multiple`.
        """
        space, time = cast(nn.Conv3d, self[0]), cast(nn.Conv3d, self[3])
        extra = -space.out_channels % math.lcm(self.channel_multiple, multiple)
        if not extra:
            return space.weight, time.weight
        return F.pad(space.weight, (0, 0) * 4 + (0, extra)), F.pad(time.weight, (0, 0) * 3 + (0, extra))

    def convolve(self, views: list[Clips], before: Before | None = None) -> tuple[list[Clips], BatchStatistics | None]:
        """Convolve in space, normalise, apply ReLU, and convolve in time. See `_layer`."""
        if not self.recomputes:
            return self._convolve(views, before)

        def compute(views: list[Clips], *statistics: Tensor) -> tuple[list[Clips], BatchStatistics | None]:
            given = cast(BatchStatistics | None, statistics or None)
            return self._convolve(views, before and before._replace(statistics=given))

        parts = [self] if before is None else [self, before.norm]
        return _recompute(parts, compute, views, *((before and before.statistics) or ()))

    def _convolve(self, views: list[Clips], before: Before | None) -> tuple[list[Clips], BatchStatistics | None]:
        space, between, _, time, *_ = cast(tuple[nn.Conv3d, BatchNorm, nn.Module, nn.Conv3d], tuple(self))
        to_inner, from_inner = self.weights(CHANNEL_MULTIPLE if self.fused else 1)
        in_frames = _stem_in_space if space.in_channels == 3 and space.kernel_size[1] == 7 else in_space
        views, statistics = _layer(views, before, space, to_inner, in_frames, "spatial" in self.fused)
        middle = Before(between, statistics, extra=to_inner.shape[0] - space.out_channels)
        return _layer(views, middle, time, from_inner, in_time, "temporal" in self.fused)


class Factored(SpaceThenTime, Conv2Plus1D):
    """torchvision's (2+1)D convolution."""


class FactoredStem(SpaceThenTime):
    """The plain stem factored into a convolution in space and one in time."""

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
        views, statistics = self.convolve(views)
        return cast(BatchNorm, self[4]).normalise(views, statistics=statistics)


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
        views, _ = _convolve(views, conv)
        return cast(BatchNorm, norm).normalise(views)


class Block(BasicBlock):
    """torchvision's residual block for several views, whose batch normalisation has joint statistics."""

    def apply_to(self, views: list[Clips]) -> list[Clips]:
        """Compute the block's output of each view."""
        (conv1, norm1, _), (conv2, norm2) = self.conv1, self.conv2
        inner, statistics = _convolve(views, conv1)
        inner, statistics = _convolve(inner, conv2, Before(cast(BatchNorm, norm1), statistics))
        if self.downsample is not None:
            conv, norm = self.downsample
            views, _ = _convolve(views, conv)
            views = cast(BatchNorm, norm).normalise(views, relu=False)
        shortcuts = [align(shortcut, main) for shortcut, main in zip(views, inner, strict=True)]
        return cast(BatchNorm, norm2).normalise(inner, shortcuts=shortcuts, statistics=statistics)


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
        self.recomputes = False
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
            if isinstance(module, SpaceThenTime):
                module.channel_multiple = multiple

    def fusible(self) -> dict[str, Tensor]:
        """Return the convolutions of stride 1 in (2+1)D convolutions. See `Backbone.fusible`."""
        found = {}
        for name, module in self.named_modules():
            if isinstance(module, SpaceThenTime):
                for number, weight in zip((0, 3), module.weights(CHANNEL_MULTIPLE), strict=True):
                    if cast(nn.Conv3d, module[number]).stride == (1, 1, 1):
                        found[f"{name}.{number}"] = weight
        return found

    def fuse(self, names: Collection[str]) -> None:
        """Let `dclr.kernels.convolution` compute these convolutions of `fusible`. See `Backbone.fuse`."""
        for name, module in self.named_modules():
            if isinstance(module, SpaceThenTime):
                kinds = {f"{name}.0": "spatial", f"{name}.3": "temporal"}
                module.fused = frozenset(kinds[convolution] for convolution in kinds.keys() & set(names))

    def recompute(self) -> bool:
        """Compute the stem, and each (2+1)D convolution or each block of 3-D convolutions, again. See `Backbone`.

        A (2+1)D convolution has more channels inside than its input and its output. So most of the memory is saved
        there, and the last convolution before a result that is kept is not computed again.
        """
        self.recomputes = True
        for module in self.modules():
            if isinstance(module, Factored):
                module.recomputes = True
        return True

    @property
    def takes_blocks(self) -> bool:
        """True if the weights expect ImageNet's statistics. Clips may then also come in blocks."""
        return self.statistics == IMAGENET

    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map: (B, 3, T, H, W) -> (B, 8 * width, T/8, H/16, W/16), each size rounded up.

        mc3_18 has no stride in time: its map is (B, 8 * width, T, H/16, W/16).
        """
        return self.feature_maps([x], x.shape[2])[0]

    def feature_maps(self, views: Sequence[Tensor], frames: int) -> list[Tensor]:
        """Compute the last feature map of each view, see `feature_map`. Equal frames are computed once."""
        clips = [as_clips(view, frames) for view in views]
        clips = _compute(self.stem, clips, self.recomputes)  # (B, width, T, H/2, W/2)
        # layer1 keeps this size. Each later stage halves T, H and W and doubles the channels.
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in cast(Sequence[Block], stage):
                inside = isinstance(block.conv1[0], Factored)  # its convolutions are computed again one by one
                clips = _compute(block, clips, self.recomputes and not inside)
        return [view.expand() for view in clips]


def _compute(module: FactoredStem | PlainStem | Block, views: list[Clips], again: bool) -> list[Clips]:
    """Return the output of a stem or of a block. `again`: it is computed again in the backward pass."""
    return _recompute([module], module.apply_to, views) if again else module.apply_to(views)


def _recompute(parts: Sequence[nn.Module], compute: Callable[..., Any], views: list[Clips], *others: Tensor) -> Any:
    """Return compute(views, *others), which is computed again in the backward pass. See `recompute`."""
    runs = [(view.repeated, view.times) for view in views]

    def of_frames(*tensors: Tensor) -> Any:
        clips = [Clips(frames, *run) for frames, run in zip(tensors[: len(runs)], runs, strict=True)]
        return compute(clips, *tensors[len(runs) :])

    return recompute(parts, of_frames, *(view.frames for view in views), *others)


def _convolve(
    views: list[Clips], conv: nn.Module, before: Before | None = None
) -> tuple[list[Clips], BatchStatistics | None]:
    """Apply a convolution of a block or of a stem to each view. See `_layer`."""
    if isinstance(conv, SpaceThenTime):
        return conv.convolve(views, before)
    conv = cast(nn.Conv3d, conv)
    return _layer(views, before, conv, conv.weight, _in_three, fused=False)


def _layer(
    views: list[Clips], before: Before | None, conv: nn.Conv3d, weight: Tensor, apply: Apply, fused: bool
) -> tuple[list[Clips], BatchStatistics | None]:
    """Normalise the views, apply ReLU, and convolve each view.

    Args:
        before: the normalisation; None convolves the views as they are.
        conv: gives the kernel, the stride and the padding in time.
        weight: the weight of `conv`, which may have padded channels.
        apply: the library's convolution of frames (B, C, D, H, W), by the weight and `conv`.
        fused: convolve by `dclr.kernels.convolution`, which normalises its input itself.

    Returns:
        The convolved views, which are not normalised, and their statistics if the convolution is fused.
    """
    if not fused:
        if before is not None:
            views = before.norm.normalise(views, extra=before.extra, statistics=before.statistics)
        return [convolve(view, conv, lambda x: apply(x, weight, conv)) for view in views], None
    normalisation = before and before.norm.normalisation(views, before.extra, before.statistics)
    weight = weight.to(views[0].frames.dtype)
    given = [before_convolution(view, conv) for view in views]
    results = [convolution.convolve(view.frames, weight, normalisation, view.repeated, view.times) for view in given]
    views = [view._replace(frames=result.frames) for view, result in zip(given, results, strict=True)]
    means, variances = [result.mean for result in results], [result.variance for result in results]
    return views, merge_statistics(views, means, variances)


def _in_three(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
    """Apply a 3-D convolution. The input of the stem may be pixels or blocks, see `_of_blocks`.

    On a CPU, clips of exactly two frames are padded with zeros in time before the convolution. If the convolution pads
    them itself, torch 2.11 computes a wrong weight gradient on CPUs with bfloat16: 100 % off, or infinite.
    """
    stride, padding = conv.stride, cast(tuple[int, ...], conv.padding)
    if conv.in_channels == 3 and (x := _as_blocks(x)).shape[1] == CHANNELS:
        weight, stride, padding = _of_blocks(weight), (conv.stride[0], 1, 1), (padding[0], 0, 0)
    if x.shape[2] == 2 and x.device.type == "cpu":
        x, padding = F.pad(x, (0, 0) * 2 + (padding[0], padding[0])), (0, *padding[1:])
    return F.conv3d(x, weight, None, stride, padding)


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
