"""Video ResNets (Tran et al., CVPR 2018, arXiv 1711.11248) without a classifier, built from torchvision's blocks.

    r2plus1d_10  (2+1)D convolutions, one block a stage: 12.5 M parameters. DCLR's authors call it r2plus1d_18.
    r2plus1d_18  (2+1)D convolutions, two blocks a stage: torchvision's r2plus1d_18.
    r3d_10       3-D convolutions, one block a stage
    r3d_18       3-D convolutions, two blocks a stage: torchvision's r3d_18
    mc3_18       3-D convolutions in the first stage, 2-D ones after it: torchvision's mc3_18

Parameter names are torchvision's, so that its weights fit strictly but for `fc`.
"""

from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.errors import UserError

_Conv = type[Conv2Plus1D] | type[Conv3DSimple] | type[Conv3DNoTemporal]

# name -> the convolution of each of four stages, and the number of blocks in a stage
_STAGES: dict[str, tuple[list[_Conv], int]] = {
    "r2plus1d_10": ([Conv2Plus1D] * 4, 1),
    "r2plus1d_18": ([Conv2Plus1D] * 4, 2),
    "r3d_10": ([Conv3DSimple] * 4, 1),
    "r3d_18": ([Conv3DSimple] * 4, 2),
    "mc3_18": ([Conv3DSimple, Conv3DNoTemporal, Conv3DNoTemporal, Conv3DNoTemporal], 2),
}

BACKBONES = tuple(_STAGES)
"""The names that `build_backbone` knows."""


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
        self.stem = _factored_stem(width) if convs[0] is Conv2Plus1D else _plain_stem(width)
        self.layer1 = _stage(convs[0], width, width, blocks, stride=1)
        self.layer2 = _stage(convs[1], width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(convs[2], 2 * width, 4 * width, blocks, stride=2)
        self.layer4 = _stage(convs[3], 4 * width, 8 * width, blocks, stride=2)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the last feature map, (B, 8 * width, T/8, H/16, W/16), each size rounded up.

        mc3_18 has no stride in time: its map is (B, 8 * width, T, H/16, W/16).
        """
        x = self.stem(x)  # (B, width, T, H/2, W/2)
        x = self.layer1(x)  # (B, width, T, H/2, W/2)
        x = self.layer2(x)  # (B, 2 * width, T/2, H/4, W/4)
        x = self.layer3(x)  # (B, 4 * width, T/4, H/8, W/8)
        return self.layer4(x)  # (B, 8 * width, T/8, H/16, W/16)


def build_backbone(name: str, width: int = 64) -> Backbone:
    """A freshly initialised backbone: convolutions Kaiming normal by fan-out, batch normalisation 1 and 0.

    Raises:
        UserError: a name not in BACKBONES, or a width below 1.
    """
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}: choose one of {', '.join(BACKBONES)}")
    if width < 1:
        raise UserError(f"a backbone's width must be at least 1, not {width}")
    return Backbone(name, width)


def _plain_stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, width, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def _factored_stem(width: int) -> nn.Sequential:
    """The plain stem as a convolution in space, then one in time."""
    between = max(1, 45 * width // 64)  # torchvision's 45 channels at width 64
    return nn.Sequential(
        nn.Conv3d(3, between, kernel_size=(1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(between),
        nn.ReLU(inplace=True),
        nn.Conv3d(between, width, kernel_size=(3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


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
