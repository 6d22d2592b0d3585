"""The generator of VideoMoCo: it scores the frames of a clip, and the frames with the lowest scores are dropped.

Letters: B clips, C channels, T frames, H, W pixels.
Source: Pan et al., "VideoMoCo: Contrastive Video Representation Learning with Temporally Adversarial Examples", CVPR
2021 (arXiv 2103.05905), and its released code, from which the sizes below are taken.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DROPPED_SHARE = 4
"""One frame of this many is dropped, rounded down."""

SIDE = 13
"""Height and width of the last maps of a clip of 112 x 112 pixels. Other sizes are pooled to this size."""

HIDDEN = 64
"""Hidden units of each direction of the LSTM."""


class Generator(nn.Module):
    """A network that scores frames: clips (B, 3, T, H, W) -> scores (B, T) float32, which are above 0 and sum to 1.

    The frames of a clip are channels of its 2-D convolutions. As in the released code, the LSTM reads the T channels of
    the last maps in their order, and each block that appears three times is one block with one set of weights. For
    T = 32 the generator has 0.57 million parameters.
    """

    def __init__(self, frames: int) -> None:
        super().__init__()
        channels = 3 * frames
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, dilation=2, bias=False),
            nn.BatchNorm2d(channels, eps=1e-3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, stride=1, padding=1),
        )
        self.pyramid = Pyramid(channels)
        self.reduce = nn.Sequential(*layer(channels, frames))
        self.halve = nn.Sequential(*layer(frames, frames), *layer(frames, frames), nn.AvgPool2d(2))
        self.recurrent = nn.LSTM(SIDE * SIDE, HIDDEN, batch_first=True, bidirectional=True)
        self.score = nn.Linear(2 * HIDDEN, frames)

    def forward(self, clip: Tensor) -> Tensor:
        x = clip.transpose(1, 2).flatten(1, 2)  # (B, 3T, H, W), the three colours of a frame next to each other
        for _ in range(3):
            x = self.block(x)
        x = self.reduce(self.pyramid(x))
        for _ in range(3):
            x = self.halve(x)
        if x.shape[2:] != (SIDE, SIDE):
            x = F.adaptive_avg_pool2d(x, SIDE)
        # In float32 also under autocast: frames are ranked by small differences of their scores.
        with torch.autocast(x.device.type, enabled=False):
            found, _ = self.recurrent(x.float().flatten(2))  # (B, T, 2 * HIDDEN)
            return self.score(found[:, -1]).softmax(1)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: five views of a map (B, C, H, W) with growing fields, merged to (B, C, H, W).

    Source: Chen et al., arXiv 1706.05587. Here without batch normalisation, as in the released code of VideoMoCo.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.whole = nn.Conv2d(channels, channels, 1)
        self.point = nn.Conv2d(channels, channels, 1)
        self.dilated = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=distance, dilation=distance) for distance in (6, 12, 18)
        )
        self.merge = nn.Conv2d(5 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.merge(torch.cat([whole, self.point(x), *(convolution(x) for convolution in self.dilated)], dim=1))


def layer(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a 3 x 3 convolution that keeps the size, its batch normalisation and ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def dropped_count(frames: int) -> int:
    """Return how many of T frames are dropped: a quarter, rounded down."""
    return frames // DROPPED_SHARE


def lowest(scores: Tensor) -> Tensor:
    """Return a mask (B, T) bool that is True for the quarter of the frames with the lowest scores (B, T).

    Of equal scores, those of earlier frames count as lower.
    """
    order = scores.argsort(dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, : dropped_count(scores.shape[1])], True)


def fill_of(clip: Tensor, fill: str) -> Tensor:
    """Return the values (B, 1, T, 1, 1) that replace the frames of a clip (B, 3, T, H, W) if they are dropped.

    `fill`: "mean" for the mean of each frame, as in the released code, or "zero" for 0, as others describe the paper.
    """
    mean = clip.mean(dim=(1, 3, 4), keepdim=True, dtype=torch.promote_types(clip.dtype, torch.float32))
    return mean.to(clip.dtype) if fill == "mean" else torch.zeros_like(mean, dtype=clip.dtype)


def drop(clip: Tensor, dropped: Tensor, fill: str) -> Tensor:
    """Return the clip (B, 3, T, H, W) with the frames of the mask `dropped` (B, T) replaced. `fill`: see `fill_of`."""
    return torch.where(dropped[:, None, :, None, None], fill_of(clip, fill), clip)


def score_gradient(gradient: Tensor, clip: Tensor, fill: str, form: str) -> Tensor:
    """Return the gradient (B, T) with respect to the scores, given the gradient with respect to the dropped clip.

    The dropped clip is x~_t = m_t x_t + (1 - m_t) c_t, with m_t = 1 for a frame that is kept, and else 0. The
    straight-through estimator takes the gradient with respect to m_t for that of the score. With g = dL/dx~,
        exact:     sum over c, h, w of g_t (x_t - c_t), which is dL/dm_t
        released:  sum over c, h, w of g_t, as in the released code, which does not follow the effect of a frame

    Args:
        gradient, clip: (B, 3, T, H, W). The products are summed in float32, or in the dtype of the clip if that is
            wider.
        fill: see `fill_of`.
        form: "exact" or "released".
    """
    dtype = torch.promote_types(clip.dtype, torch.float32)
    if form == "released":
        return gradient.sum(dim=(1, 3, 4), dtype=dtype)
    difference = clip.to(dtype) - fill_of(clip, fill)
    return (gradient * difference).sum(dim=(1, 3, 4))
