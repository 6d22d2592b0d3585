"""The three views of a clip: decoded frames and drawn parameters in, what the network sees out.

    rgb      the clip, cropped, coloured, flipped, blurred and normalised, every draw the same on all its frames
    static   one still of the same moment, augmented by its own draw, repeated T times
    dynamic  the frame difference of the finished rgb view, aligned with it pixel by pixel

Frames are packed RGB or the planes of YUV 4:2:0 that a decoder gives. `generate_views` and `augment` run in Triton where
`kernels.backend` says so (view_generation_triton.py); `generate_views_reference` and `augment_reference` are the same in torch and kornia.

Letters: B clips in a batch, T frames, H, W pixels of the padded buffer, h, w pixels of a view.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor

from kernels.backend import check_same_device, runs_triton, to_device
from kernels.colour import yuv_box_to_rgb, yuv_coefficients
from kernels.types import BLUR_KERNEL, MEAN, STD, Augmentation, Boundary, ViewParams, Views, Yuv420


def generate_views(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    stills: Tensor | Yuv420,  # (B, H', W', 3), or its planes
    params: ViewParams,
    *,
    boundary: Boundary = "wrap",
    dtype: torch.dtype = torch.float32,
    check_rows: bool | None = None,
) -> Views:
    """The rgb, static and dynamic view of each clip.

    The dynamic view is d[t] = v[t] - v[t-1] of the rgb view v. At t = 0, which has no frame before it, `boundary`
    decides: "wrap" v[0] - v[T-1] (as the authors trained), "zero" 0, "replicate" d[1]. A clip of one frame has d = 0.

    Args:
        frames: uint8 RGB or YUV 4:2:0; clips of different sizes share a padded buffer.
        stills: uint8 in the same form, one a clip, with a padded buffer of its own.
        params: one row a clip and a row for its still.
        boundary: see above.
        dtype: of the views; the arithmetic is in float32, the frame difference included, and rounded once at the end.
        check_rows: as `augment`.

    Returns:
        Views, each (B, 3, T, h, w), without gradient.

    Raises:
        TypeError, ValueError: as `augment`; ValueError also for an unknown boundary.
    """
    _check_boundary(boundary)
    _check_stills(stills, frames)
    _check_augment(frames, params.clip, params.size, check_rows)
    _check_augment(_with_time(stills), params.still, params.size, check_rows, "still")
    if not runs_triton(_luma(frames).device):
        return generate_views_reference(frames, stills, params, boundary=boundary, dtype=dtype)

    from kernels.view_generation_triton import generate_views_op, table_of

    # In one table, so that rows on the CPU take one copy to the device.
    table = torch.cat([table_of(params.clip, frames), table_of(params.still, stills)])  # (2 B, C)
    table = to_device(table, _luma(frames).device)
    return Views(*generate_views_op(*_planes(frames), *_planes(stills), table, *params.size, boundary, dtype))


def augment(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    augmentation: Augmentation,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    check_rows: bool | None = None,
) -> Tensor:  # (B, 3, T, h, w)
    """One augmented, normalised view of each clip; every draw is the same on all frames of a clip.

    In this order: crop the box, resize it to `size` (bilinear, half-pixel centres, no antialiasing), to grayscale,
    colour jitter in the clip's own order, flip, Gaussian blur 11 x 11, ImageNet mean and standard deviation. The
    colour operations are kornia's, with the clamping to 0..1 of its ColorJitter; contrast is about the mean of each
    frame by itself.

    The blur mirrors pixels at the border, as kornia's RandomGaussianBlur; a view of 5 pixels or fewer on a side has
    too few to mirror, and its border pixels are repeated instead.

    Args:
        frames: uint8 RGB or YUV 4:2:0, each clip at the top left of the padded buffer.
        augmentation: one row a clip, on the CPU or where the frames are.
        size: height and width of the view.
        dtype: of the view; the arithmetic is in float32, also under autocast.
        check_rows: whether to look for rows that cannot be applied. None: where the rows are on the CPU, because to look
            at rows on a GPU is to wait for it, and not in a compiled graph. A row that was not checked reads some pixel of the
            buffer instead of one outside.

    Returns:
        (B, 3, T, h, w) in channels_last_3d memory, without gradient.

    Raises:
        TypeError: frames that are not uint8.
        ValueError: shapes that do not fit together, or a row of the augmentation that cannot be applied: it is named.
    """
    _check_augment(frames, augmentation, size, check_rows)
    if not runs_triton(_luma(frames).device):
        return augment_reference(frames, augmentation, size, dtype)

    from kernels.view_generation_triton import augment_op, table_of

    table = to_device(table_of(augmentation, frames), _luma(frames).device)
    return augment_op(*_planes(frames), table, *size, dtype)


# --------------------------------------------------------------------------------------------------------------- reference


def generate_views_reference(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    stills: Tensor | Yuv420,  # (B, H', W', 3), or its planes
    params: ViewParams,
    *,
    boundary: Boundary = "wrap",
    dtype: torch.dtype = torch.float32,
) -> Views:
    """`generate_views` in torch and kornia, unchecked; waits for the device to read the rows."""
    rgb = augment_reference(frames, params.clip, params.size)  # (B, 3, T, h, w)
    still = augment_reference(_with_time(stills), params.still, params.size, dtype)  # (B, 3, 1, h, w)
    static = still.expand(-1, -1, rgb.shape[2], -1, -1)
    return Views(
        rgb=_channels_last(rgb.to(dtype)),
        static=_channels_last(static),
        dynamic=_channels_last(_frame_difference(rgb, boundary).to(dtype)),
    )


@torch.no_grad()
def augment_reference(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    augmentation: Augmentation,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, 3, T, h, w)
    """`augment` in torch and kornia, unchecked; waits for the device to read the rows."""
    rows = augmentation.to("cpu")
    B, T = _shape(frames)[:2]
    device = _luma(frames).device
    with torch.autocast(device.type, enabled=False):
        colours = yuv_coefficients(frames.bt709, frames.full_range).tolist() if isinstance(frames, Yuv420) else []
        images = torch.empty((B, T, 3, *size), device=device)  # as all below
        for b, box in enumerate(rows.box.tolist()):
            images[b] = _crop(frames, colours, box, b, size)
        images /= 255  # after the resize, which is linear, because there are then fewer pixels to scale
        # Each operation on the clips that it applies to: they are few calls, however many clips there are.
        images = _where(rows.grayscale, images, lambda some, _: rgb_to_grayscale(some).expand_as(some))
        images = _where(rows.jitter, images, lambda some, of: colour_jitter(some, rows.factors[of], rows.order[of]))
        images = _where(rows.flip, images, lambda some, _: some.flip(4))
        images = _where(rows.sigma > 0, images, lambda some, of: gaussian_blur(some, rows.sigma[of]))
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        view = torch.empty((B, 3, T, *size), dtype=dtype, device=device, memory_format=torch.channels_last_3d)
        view.copy_(((images - mean) / std).transpose(1, 2))
    return view


def _where(
    applies: Tensor,  # (B,) bool, on the CPU
    images: Tensor,  # (B, T, 3, h, w)
    operation: Callable[[Tensor, Tensor], Tensor],  # of some clips and of their numbers
) -> Tensor:
    """`operation` on the clips that it applies to, written over them; the others are left alone, not multiplied by one."""
    numbers = applies.nonzero()[:, 0]
    if len(numbers):
        on_device = numbers.to(images.device)
        images[on_device] = operation(images[on_device], numbers)
    return images


def _crop(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    colours: list[list[float]],  # yuv_coefficients, where there are planes
    box: list[int],
    b: int,
    size: tuple[int, int],
) -> Tensor:  # (T, 3, h, w), 0..255
    """The box of clip b, resized."""
    top, left, height, width = box
    if isinstance(frames, Yuv420):
        crop = yuv_box_to_rgb(frames, colours[b], b, top, left, height, width)  # (T, 3, height, width)
    else:
        crop = frames[b, :, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
    return F.interpolate(crop, size, mode="bilinear", align_corners=False, antialias=False)


def colour_jitter(
    images: Tensor,  # (N, T, 3, h, w), 0..1
    factors: Tensor,  # (N, 4), on the CPU, as below
    order: Tensor,  # (N, 4)
) -> Tensor:
    """kornia.augmentation.ColorJitter with given factors and order of each clip."""
    brightness, contrast, saturation, hue = factors.unbind(1)
    operations = (
        (adjust_brightness_accumulative, brightness, 1),
        (adjust_contrast_with_mean_subtraction, contrast, 1),
        (adjust_saturation_with_gray_subtraction, saturation, 1),
        (adjust_hue, hue * 2 * math.pi, 0),  # turns to radians
    )
    images = images.clamp(0, 1)
    for place in range(4):
        now = order[:, place]
        for number, (operation, factor, neutral) in enumerate(operations):
            applies = (now == number) & (factor != neutral)
            images = _where(applies, images, partial(_by_factor, operation, factor))
    return images.clamp(0, 1)


def _by_factor(operation: Callable[..., Tensor], factors: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """`operation` by each clip's own factor."""
    return operation(images, factors[numbers])


def gaussian_blur(
    images: Tensor,  # (N, T, 3, h, w)
    sigma: Tensor,  # (N,) pixels, on the CPU
) -> Tensor:
    """Gaussian blur, each clip with its own sigma."""
    border = "reflect" if min(images.shape[3:]) > BLUR_KERNEL // 2 else "replicate"
    sigmas = sigma.to(images.device)[:, None].expand(-1, 2)
    return gaussian_blur2d(images.flatten(1, 2), BLUR_KERNEL, sigmas, border).view_as(images)


def _frame_difference(view: Tensor, boundary: Boundary) -> Tensor:
    """d[t] = v[t] - v[t-1] along dimension 2 of (B, 3, T, h, w)."""
    difference = torch.zeros_like(view)
    difference[:, :, 1:] = view[:, :, 1:] - view[:, :, :-1]
    if boundary == "wrap":
        difference[:, :, 0] = view[:, :, 0] - view[:, :, -1]
    elif boundary == "replicate":
        difference[:, :, :1] = difference[:, :, 1:2] if view.shape[2] > 1 else 0
    return difference


def _channels_last(view: Tensor) -> Tensor:
    return view.contiguous(memory_format=torch.channels_last_3d)


# ------------------------------------------------------------------------------------------------------- packing and checks


def _luma(frames: Tensor | Yuv420) -> Tensor:
    return frames.y if isinstance(frames, Yuv420) else frames


def _shape(frames: Tensor | Yuv420) -> tuple[int, ...]:
    """B, T, H, W, or B, H, W of stills."""
    return tuple(frames.y.shape if isinstance(frames, Yuv420) else frames.shape[:-1])


def _planes(frames: Tensor | Yuv420) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return (frames.y, frames.u, frames.v) if isinstance(frames, Yuv420) else (frames, None, None)


def _with_time(stills: Tensor | Yuv420) -> Tensor | Yuv420:
    """Stills as frames of clips of length 1."""
    if isinstance(stills, Yuv420):
        return stills.select((slice(None), None))  # [:, None]
    return stills[:, None]


def _check_boundary(boundary: str) -> None:
    if boundary not in get_args(Boundary):
        raise ValueError(f'boundary must be "wrap", "zero" or "replicate", not {boundary!r}')


def _check_stills(stills: Tensor | Yuv420, frames: Tensor | Yuv420) -> None:
    if isinstance(stills, Yuv420) != isinstance(frames, Yuv420):
        raise ValueError("frames and stills must both be RGB or both be YUV 4:2:0")
    dimensions = 3 if isinstance(stills, Yuv420) else 4
    B, shape = _shape(frames)[0], tuple(_luma(stills).shape)
    if len(shape) != dimensions or shape[0] != B:
        raise ValueError(f"stills must be ({B}, H, W{', 3' if dimensions == 4 else ''}), one a clip, not {shape}")
    check_same_device("stills", _luma(stills), "frames", _luma(frames))


def _check_yuv(frames: Yuv420) -> None:
    B, T, H, W = frames.y.shape
    for name in ("u", "v"):
        plane: Tensor = getattr(frames, name)
        if plane.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, not {plane.dtype}")
        expected = (B, T, (H + 1) // 2, (W + 1) // 2)
        if tuple(plane.shape) != expected:
            raise ValueError(f"{name} must be {expected}, half of y {(B, T, H, W)}, not {tuple(plane.shape)}")
        check_same_device(name, plane, "y", frames.y)
    for name in ("bt709", "full_range"):
        flag: Tensor = getattr(frames, name)
        if flag.shape != (B,) or flag.dtype != torch.bool:
            raise ValueError(f"{name} must be ({B},) bool, not {tuple(flag.shape)} {flag.dtype}")


def _check_augment(
    frames: Tensor | Yuv420,
    rows: Augmentation,
    size: tuple[int, int],
    check_rows: bool | None,
    kind: str = "clip",
) -> None:
    luma = _luma(frames)
    if luma.dtype != torch.uint8:
        raise TypeError(f"{'frames' if kind == 'clip' else 'stills'} must be uint8, not {luma.dtype}")
    if isinstance(frames, Yuv420):
        if luma.dim() != 4 or luma.shape[1] == 0:
            raise ValueError(f"y must be (B, T, H, W) with T >= 1, not {tuple(luma.shape)}")
        _check_yuv(frames)
    elif luma.dim() != 5 or luma.shape[4] != 3 or luma.shape[1] == 0:
        raise ValueError(f"frames must be (B, T, H, W, 3) with T >= 1, not {tuple(luma.shape)}")
    B, _, H, W = _shape(frames)
    for field in fields(rows):
        if getattr(rows, field.name).shape[:1] != (B,):
            shape = tuple(getattr(rows, field.name).shape)
            raise ValueError(f"augmentation.{field.name} must have one row for each of {B} {kind}s, not shape {shape}")
    if min(size) < 1:
        raise ValueError(f"size must be a height and width of at least 1, not {size}")

    if check_rows is None:
        check_rows = rows.box.device.type == "cpu" and not torch.compiler.is_compiling()
    if check_rows:
        _check_rows(rows.to("cpu"), H, W, kind)


def _check_rows(rows: Augmentation, H: int, W: int, kind: str) -> None:
    table = zip(rows.size.tolist(), rows.box.tolist(), rows.order.tolist(), rows.sigma.tolist(), strict=True)
    for b, ((valid_height, valid_width), (top, left, height, width), order, sigma) in enumerate(table):
        if not (1 <= valid_height <= H and 1 <= valid_width <= W):
            raise ValueError(
                f"{kind} {b}: valid size {valid_height} x {valid_width} is not within the {H} x {W} buffer"
            )
        inside = top >= 0 and left >= 0 and top + height <= valid_height and left + width <= valid_width
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"{kind} {b}: box (top {top}, left {left}, height {height}, width {width}) "
                f"is not within the valid {valid_height} x {valid_width} frame"
            )
        if sorted(order) != [0, 1, 2, 3]:
            raise ValueError(f"{kind} {b}: order {order} is not a permutation of 0, 1, 2, 3")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"{kind} {b}: sigma {sigma} must be 0 (no blur) or a positive number")
