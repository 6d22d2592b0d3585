"""S3D (Xie et al., ECCV 2018, arXiv 1712.04851) without a classifier, built from torchvision's blocks.

Its inception blocks have convolutions in space followed by convolutions in time. It has 7.9 M parameters. Parameter
names are torchvision's, so torchvision's weights load strictly, except `classifier`.
"""

from torch import Tensor, nn
from torchvision.models.video import s3d

from dclr.errors import UserError
from dclr.models.backbone import Backbone, in_space, in_time, initialise
from dclr.models.batch_norm import replace_norms
from dclr.models.recompute import recompute

LEAST_FRAMES, LEAST_PIXELS = 5, 17
"""The smallest clip that the network takes. Its last pooling layer would get less than it needs from a smaller one."""


class SeparatedConv(nn.Conv3d):
    """A convolution in space or in time, computed in 2-D.

    Forward and backward of the network on a CPU in float32 take 0.75 of the time of the 3-D form. That form also has a
    fault in torch 2.11: the backward pass of a (7, 1, 1) convolution with stride 2 on 5 frames aborts the process.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (in_space if self.kernel_size[0] == 1 else in_time)(x, self.weight, self)


class S3D(Backbone):
    """torchvision's s3d. Its feature map has 1024 channels.

    Batch normalisation keeps torchvision's eps and momentum, both 0.001.
    """

    def __init__(self, width: int) -> None:
        if width != 64:
            raise UserError(f"--width is {width}, but s3d has only the width 64: pass --width 64")
        super().__init__(feature_dim=1024)
        self.recomputes = False
        self.features = s3d().features
        for module in self.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = SeparatedConv
            elif isinstance(module, nn.ReLU):
                module.inplace = False  # torch.compile returns batch normalisation's output as a view, which must stay
        replace_norms(self)
        initialise(self)

    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map: (B, 3, T, H, W) -> (B, 1024, T/8, H/32, W/32).

        All divisions by 2 round up, except the last one, which rounds down.

        Raises:
            UserError: the clips have less than LEAST_FRAMES frames or a side of less than LEAST_PIXELS pixels.
        """
        frames, height, width = x.shape[2:]
        if frames < LEAST_FRAMES or min(height, width) < LEAST_PIXELS:
            raise UserError(
                f"s3d takes clips of at least {LEAST_FRAMES} frames of {LEAST_PIXELS} x {LEAST_PIXELS} pixels, not "
                f"{frames} of {height} x {width}: raise --clip-length or --crop-size"
            )
        for layer in self.features:
            x = recompute([layer], layer, x) if self.recomputes else layer(x)
        return x

    def recompute(self) -> bool:
        """Compute each of the 16 layers again in the backward pass, from its input. See `Backbone.recompute`."""
        self.recomputes = True
        return True
