"""The layout of a view in which a stem's 7 x 7 convolution of stride 2 becomes a 4 x 4 convolution of stride 1.

Letters: B clips, T frames, h, w pixels of a view.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 16
"""Channels of a block: 2 x 2 pixels of 3 channels, and 4 channels of zeros. Matrix units need a multiple of 8."""

BORDER = (2, 1)
"""Blocks of zeros before and after the view, along height and along width. They are the convolution's padding."""


def blocks_shape(h: int, w: int) -> tuple[int, int]:
    """Return how many blocks a view of h x w pixels has along its height and along its width."""
    return math.ceil(h / 2) + sum(BORDER), math.ceil(w / 2) + sum(BORDER)


def space_to_depth(view: Tensor) -> Tensor:
    """Return the blocks of 2 x 2 pixels of a view (B, 3, T, h, w).

    Returns:
        (B, 16, T, ceil(h / 2) + 3, ceil(w / 2) + 3) in channels_last_3d memory. Block (i, j) holds the pixels
        2 i - 4 .. 2 i - 3, 2 j - 4 .. 2 j - 3. The channel of a value is ((y % 2) * 2 + x % 2) * 3 + its channel in the
        view. Pixels outside the view and channels 12 to 15 are 0.
    """
    B, _, T, h, w = view.shape
    rows, columns = blocks_shape(h, w)
    before = 2 * BORDER[0]
    padded = F.pad(view, (before, 2 * columns - w - before, before, 2 * rows - h - before))
    blocks = padded.reshape(B, 3, T, rows, 2, columns, 2).permute(0, 2, 3, 5, 4, 6, 1)  # (B, T, i, j, 2, 2, 3)
    return F.pad(blocks.flatten(4), (0, CHANNELS - 12)).permute(0, 4, 1, 2, 3)


def depth_to_space(blocks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the view (B, 3, T, h, w) in channels_last_3d memory whose `space_to_depth` is `blocks`. `size`: h, w."""
    B, _, T, rows, columns = blocks.shape
    pixels = blocks[:, :12].unflatten(1, (2, 2, 3)).permute(0, 3, 4, 5, 1, 6, 2)  # (B, 3, T, i, 2, j, 2)
    view = pixels.reshape(B, 3, T, 2 * rows, 2 * columns)
    before = 2 * BORDER[0]
    view = view[..., before : before + size[0], before : before + size[1]]
    return view.contiguous(memory_format=torch.channels_last_3d)
