"""The stem's layout: every value at the place that its definition says, and the stem's convolution in that layout."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dclr.kernels.space_to_depth import depth_to_space, space_to_depth

SIZES = [(6, 8), (7, 8), (6, 5), (7, 9), (1, 2), (1, 1)]


def draw(size: tuple[int, int], frames: int = 3, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, frames, *size, generator=rng, dtype=torch.float64).to(dtype)


def by_definition(view: Tensor) -> Tensor:
    """Write each pixel of a view (B, 3, T, h, w) into its block.

    Two blocks of zeros come before the first pixel and one after the last. Block 2 holds pixels 0 and 1.
    """
    batch, _, frames, h, w = view.shape
    blocks = torch.zeros(batch, 16, frames, (h + 1) // 2 + 3, (w + 1) // 2 + 3, dtype=view.dtype)
    for y, x, c in itertools.product(range(h), range(w), range(3)):
        blocks[:, ((y % 2) * 2 + x % 2) * 3 + c, :, y // 2 + 2, x // 2 + 2] = view[:, c, :, y, x]
    return blocks


@pytest.mark.parametrize("size", SIZES)
def test_each_pixel_is_where_the_definition_says(size: tuple[int, int]) -> None:
    view = draw(size)
    blocks = space_to_depth(view)
    assert blocks.shape == (2, 16, 3, -(-size[0] // 2) + 3, -(-size[1] // 2) + 3)
    assert torch.equal(blocks, by_definition(view))
    assert blocks.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(depth_to_space(blocks, size), view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_stays(dtype: torch.dtype) -> None:
    view = draw((7, 6), dtype=dtype)
    blocks = space_to_depth(view)
    assert blocks.dtype == dtype
    assert torch.equal(blocks, by_definition(view))
    back = depth_to_space(blocks, (7, 6))
    assert back.dtype == dtype
    assert torch.equal(back, view)


def test_any_memory_order_is_read() -> None:
    one = draw((7, 6), frames=1)
    for view in (
        one.expand(-1, -1, 4, -1, -1),
        draw((7, 6)).contiguous(memory_format=torch.channels_last_3d),
        draw((9, 12))[:, :, ::2, 1:8, ::2],
        draw((6, 7)).transpose(3, 4),
    ):
        assert torch.equal(space_to_depth(view), by_definition(view))


@pytest.mark.parametrize("size", [(7, 9), (6, 8)])
def test_gradients_are_those_of_the_permutation(size: tuple[int, int]) -> None:
    view = draw(size, dtype=torch.float64).requires_grad_()
    weight = draw((1, 1), dtype=torch.float64).sum() * torch.arange(space_to_depth(view).numel(), dtype=torch.float64)
    (space_to_depth(view).flatten() * weight).sum().backward()
    assert view.grad is not None
    assert torch.equal(view.grad, depth_to_space(weight.view(space_to_depth(view).shape), size))


@pytest.mark.parametrize("size", SIZES)
def test_a_convolution_of_4_x_4_blocks_is_the_stems_of_7_x_7_pixels(size: tuple[int, int]) -> None:
    """Output o reads pixels 2o - 3 to 2o + 3, that is blocks o to o + 3 without pixel 2o - 4."""
    frame = draw(size, frames=1, dtype=torch.float64)
    weight = torch.randn(5, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_blocks = torch.zeros(5, 16, 4, 4, dtype=torch.float64)
    for y, x, c in itertools.product(range(7), range(7), range(3)):
        channel = (((y + 1) % 2) * 2 + (x + 1) % 2) * 3 + c
        of_blocks[:, channel, (y + 1) // 2, (x + 1) // 2] = weight[:, c, y, x]
    expected = F.conv2d(frame[:, :, 0], weight, stride=2, padding=3)
    torch.testing.assert_close(F.conv2d(space_to_depth(frame)[:, :, 0], of_blocks), expected, rtol=0, atol=1e-12)
