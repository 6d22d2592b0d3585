"""The backbones by name, and how one is built. docs/extend.md shows how to add another."""

from collections.abc import Callable
from functools import partial

import torch
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from dclr.errors import UserError
from dclr.models.backbone import Backbone
from dclr.models.s3d import S3D
from dclr.models.video_resnet import Factored, VideoResNet

BACKBONES: dict[str, Callable[[int], Backbone]] = {
    "r2plus1d_10": partial(VideoResNet, [Factored] * 4, 1),
    "r2plus1d_18": partial(VideoResNet, [Factored] * 4, 2),
    "r3d_10": partial(VideoResNet, [Conv3DSimple] * 4, 1),
    "r3d_18": partial(VideoResNet, [Conv3DSimple] * 4, 2),
    "mc3_18": partial(VideoResNet, [Conv3DSimple] + [Conv3DNoTemporal] * 3, 2),
    "s3d": S3D,
}
"""Name -> function that builds the backbone of a width with random weights. Flags, files and messages read this
dictionary when they need it, so an entry that is added before the command line is parsed counts everywhere."""

MAX_WIDTH = 1024
"""The largest width, 16 times that of the standard networks. A wrong width in a file must not fill the memory."""


def build_backbone(name: str, width: int = 64) -> Backbone:
    """Build a backbone with random weights.

    Raises:
        UserError: `name` is not in BACKBONES, `width` is not 1 to MAX_WIDTH, or the backbone has no such width.
    """
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}: choose one of {', '.join(BACKBONES)}")
    if not 1 <= width <= MAX_WIDTH:
        raise UserError(f"a backbone's width must be 1 to {MAX_WIDTH}, not {width}")
    backbone = BACKBONES[name](width)
    backbone.name, backbone.width = name, width
    return backbone


def backbone_without_memory(name: str, width: int) -> Backbone:
    """Build a backbone on torch's device "meta": it has names and shapes, but no values.

    Raises:
        UserError: see build_backbone.
    """
    with torch.device("meta"):
        return build_backbone(name, width)


@torch.no_grad()
def map_size(backbone: Backbone, frames: int, pixels: int) -> tuple[int, int, int]:
    """Return the size (T', H', W') of the feature map of a clip of `frames` frames of pixels x pixels.

    Args:
        backbone: see backbone_without_memory.

    Raises:
        UserError: the clip is too small for the backbone.
    """
    time, height, width = backbone.eval()(torch.empty(1, 3, frames, pixels, pixels, device="meta")).shape[2:]
    return time, height, width
