"""The three views of a clip: decoded frames and drawn parameters in, what the network sees out.

    rgb      the clip, cropped, coloured, flipped, blurred and normalised, every draw the same on all its frames
    static   one still of the same moment, augmented by its own draw, repeated T times
    dynamic  the frame difference of the finished rgb view, aligned with it pixel by pixel

Letters: B clips in a batch, T frames, H, W pixels of the padded buffer, h, w pixels of a view.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

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

# ImageNet's channel means and standard deviations, of RGB in 0 to 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

BLUR_KERNEL = 11  # pixels on a side

Boundary = Literal["wrap", "zero", "replicate"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to each of B clips: small tensors, one row a clip."""

    size: Tensor  # (B, 2) int64: valid height and width, at the top left of the padded buffer
    box: Tensor  # (B, 4) int64: top, left, height, width of the crop, within the valid part
    flip: Tensor  # (B,) bool: mirror left and right
    grayscale: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool: whether factors and order apply
    factors: Tensor  # (B, 4) float32: brightness, contrast, saturation (1 changes nothing), hue in turns (0 likewise)
    order: Tensor  # (B, 4) int64: a permutation of 0..3, the order in which the four factors are applied
    sigma: Tensor  # (B,) float32: standard deviation of the Gaussian blur in pixels of the view, 0 for none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Augmentation":
        """The same on another device."""
        return Augmentation(
            *(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        )


@dataclass(frozen=True)
class ViewParams:
    """What makes views of B clips and their stills."""

    clip: Augmentation
    still: Augmentation
    size: tuple[int, int]  # h, w of every view

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewParams":
        """The same on another device."""
        return ViewParams(self.clip.to(device, non_blocking), self.still.to(device, non_blocking), self.size)


class Views(NamedTuple):
    """Three views of B clips, each (B, 3, T, h, w) in channels_last_3d memory."""

    rgb: Tensor
    static: Tensor
    dynamic: Tensor


def generate_views(
    frames: Tensor,  # (B, T, H, W, 3)
    stills: Tensor,  # (B, H', W', 3)
    params: ViewParams,
    *,
    boundary: Boundary = "wrap",
    dtype: torch.dtype = torch.float32,
) -> Views:
    """The rgb, static and dynamic view of each clip.

    The dynamic view is d[t] = v[t] - v[t-1] of the rgb view v. At t = 0, which has no frame before it, `boundary`
    decides: "wrap" v[0] - v[T-1] (as the authors trained), "zero" 0, "replicate" d[1]. A clip of one frame has d = 0.

    Args:
        frames: uint8 RGB; clips of different sizes share a padded buffer.
        stills: uint8 RGB, one a clip, with a padded buffer of its own.
        params: one row a clip and a row for its still.
        boundary: see above.
        dtype: of the views; the arithmetic is in float32, the frame difference included, and rounded once at the end.

    Returns:
        Views, each (B, 3, T, h, w), without gradient.

    Raises:
        TypeError, ValueError: as `augment`; ValueError also for an unknown boundary.
    """
    if stills.dim() != 4 or stills.shape[0] != frames.shape[0]:
        raise ValueError(f"stills must be ({frames.shape[0]}, H, W, 3), one a clip, not {tuple(stills.shape)}")
    rgb = augment(frames, params.clip, params.size)  # (B, 3, T, h, w)
    still = augment(stills[:, None], params.still, params.size, dtype)  # (B, 3, 1, h, w)
    static = still.expand(-1, -1, rgb.shape[2], -1, -1)
    return Views(
        rgb=_channels_last(rgb.to(dtype)),
        static=_channels_last(static),
        dynamic=_channels_last(_frame_difference(rgb, boundary).to(dtype)),
    )


@torch.no_grad()
def augment(
    frames: Tensor,  # (B, T, H, W, 3)
    augmentation: Augmentation,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, 3, T, h, w)
    """One augmented, normalised view of each clip; every draw is the same on all frames of a clip.

    In this order: crop the box, resize it to `size` (bilinear, half-pixel centres, no antialiasing), to grayscale,
    colour jitter in the clip's own order, flip, Gaussian blur 11 x 11, ImageNet mean and standard deviation. The
    colour operations are kornia's, with the clamping to 0..1 of its ColorJitter; contrast is about the mean of each
    frame by itself.

    The blur mirrors pixels at the border, as kornia's RandomGaussianBlur; a view of 5 pixels or fewer on a side has
    too few to mirror, and its border pixels are repeated instead.

    Args:
        frames: uint8 RGB, each clip at the top left of the padded buffer.
        augmentation: one row a clip, on any device.
        size: height and width of the view.
        dtype: of the view; the arithmetic is in float32, also under autocast.

    Returns:
        (B, 3, T, h, w) in channels_last_3d memory, without gradient.

    Raises:
        TypeError: frames that are not uint8.
        ValueError: shapes that do not fit together, or a row of the augmentation that cannot be applied: it is named.
    """
    rows = augmentation.to("cpu")
    _check_augment(frames, rows, size)

    B, T = frames.shape[:2]
    view = torch.empty(
        (B, 3, T, *size), dtype=dtype, device=frames.device, memory_format=torch.channels_last_3d
    )  # (B, 3, T, h, w)
    with torch.autocast(frames.device.type, enabled=False):
        for b in range(B):
            view[b] = _augment_clip(frames[b], rows, b, size).transpose(0, 1)
    return view


def _augment_clip(
    frames: Tensor,  # (T, H, W, 3)
    rows: Augmentation,
    b: int,
    size: tuple[int, int],
) -> Tensor:  # (T, 3, h, w)
    """`augment` for clip b alone; operations that do not apply to it are skipped, not multiplied by one."""
    top, left, height, width = rows.box[b].tolist()
    crop = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2)  # (T, 3, height, width)
    # Scaled to 0..1 after the resize, which is linear, because there are then fewer pixels to scale.
    images = F.interpolate(crop.float(), size, mode="bilinear", align_corners=False, antialias=False) / 255
    images = images.contiguous()  # (T, 3, h, w)

    if rows.grayscale[b]:
        images = rgb_to_grayscale(images).repeat(1, 3, 1, 1)
    if rows.jitter[b]:
        images = _jitter(images, rows.factors[b].tolist(), rows.order[b].tolist())
    if rows.flip[b]:
        images = images.flip(3)
    if rows.sigma[b] > 0:
        images = _blur(images, float(rows.sigma[b]))

    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std


def _jitter(images: Tensor, factors: list[float], order: list[int]) -> Tensor:
    """kornia.augmentation.ColorJitter of (N, 3, h, w) images in 0..1 with given factors and order."""
    brightness, contrast, saturation, hue = factors
    images = images.clamp(0, 1)
    for step in order:
        if step == 0 and brightness != 1:
            images = adjust_brightness_accumulative(images, brightness)
        elif step == 1 and contrast != 1:
            images = adjust_contrast_with_mean_subtraction(images, contrast)
        elif step == 2 and saturation != 1:
            images = adjust_saturation_with_gray_subtraction(images, saturation)
        elif step == 3 and hue != 0:
            images = adjust_hue(images, hue * 2 * math.pi)  # turns to radians
    return images.clamp(0, 1)


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, 3, h, w) images."""
    border = "reflect" if min(images.shape[2:]) > BLUR_KERNEL // 2 else "replicate"
    return gaussian_blur2d(images, BLUR_KERNEL, (sigma, sigma), border)


def _frame_difference(view: Tensor, boundary: Boundary) -> Tensor:
    """d[t] = v[t] - v[t-1] along dimension 2 of (B, 3, T, h, w)."""
    difference = torch.zeros_like(view)
    difference[:, :, 1:] = view[:, :, 1:] - view[:, :, :-1]
    if boundary == "wrap":
        difference[:, :, 0] = view[:, :, 0] - view[:, :, -1]
    elif boundary == "replicate":
        difference[:, :, :1] = difference[:, :, 1:2] if view.shape[2] > 1 else 0
    elif boundary != "zero":
        raise ValueError(f'boundary must be "wrap", "zero" or "replicate", not {boundary!r}')
    return difference


def _channels_last(view: Tensor) -> Tensor:
    return view.contiguous(memory_format=torch.channels_last_3d)


def _check_augment(frames: Tensor, rows: Augmentation, size: tuple[int, int]) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8, not {frames.dtype}")
    if frames.dim() != 5 or frames.shape[4] != 3 or frames.shape[1] == 0:
        raise ValueError(f"frames must be (B, T, H, W, 3) with T >= 1, not {tuple(frames.shape)}")
    B, _, H, W, _ = frames.shape
    for field in fields(rows):
        if getattr(rows, field.name).shape[:1] != (B,):
            shape = tuple(getattr(rows, field.name).shape)
            raise ValueError(f"augmentation.{field.name} must have one row for each of {B} clips, not shape {shape}")
    if min(size) < 1:
        raise ValueError(f"size must be a height and width of at least 1, not {size}")

    table = zip(rows.size.tolist(), rows.box.tolist(), rows.order.tolist(), rows.sigma.tolist(), strict=True)
    for b, ((valid_height, valid_width), (top, left, height, width), order, sigma) in enumerate(table):
        if not (1 <= valid_height <= H and 1 <= valid_width <= W):
            raise ValueError(f"clip {b}: valid size {valid_height} x {valid_width} is not within the {H} x {W} buffer")
        inside = top >= 0 and left >= 0 and top + height <= valid_height and left + width <= valid_width
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"clip {b}: box (top {top}, left {left}, height {height}, width {width}) "
                f"is not within the valid {valid_height} x {valid_width} frame"
            )
        if sorted(order) != [0, 1, 2, 3]:
            raise ValueError(f"clip {b}: order {order} is not a permutation of 0, 1, 2, 3")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"clip {b}: sigma {sigma} must be 0 (no blur) or a positive number")
