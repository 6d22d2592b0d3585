"""Generation of the three views of a clip from decoded frames and drawn parameters.

    rgb      the clip, cropped, resized, coloured, flipped, blurred and normalised; all frames have the same parameters
    static   one still frame, augmented with its own parameters, which stands for T equal frames
    dynamic  the frame difference of the finished rgb view, aligned with it pixel by pixel

Frames are packed RGB or the planes of YUV 4:2:0 that a decoder gives. `generate_views` and `augment` use Triton
(view_generation_triton.py) if `kernels.backend` chooses it. `generate_views_reference` and `augment_reference` compute
the same in torch and kornia.

Letters: B clips in a batch, T frames, H, W pixels of the padded buffer, h, w pixels of a view.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dclr.kernels.backend import check_same_device, runs_triton, to_device
from dclr.kernels.colour import yuv_box_to_rgb, yuv_coefficients
from dclr.kernels.space_to_depth import space_to_depth
from dclr.kernels.types import BLUR_KERNEL, MEAN, STD, Augmentation, Boundary, ViewParams, Views, Yuv420


def generate_views(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    stills: Tensor | Yuv420,  # (B, H', W', 3), or its planes
    params: ViewParams,
    *,
    boundary: Boundary = "wrap",
    dtype: torch.dtype = torch.float32,
    check_rows: bool | None = None,
    blocks: bool = False,
) -> Views:
    """Return the rgb, static and dynamic view of each clip.

    The dynamic view is d[t] = v[t] - v[t-1] of the rgb view v. The first frame has no frame before it, so `boundary`
    chooses d[0]:
        "wrap"       d[0] = v[0] - v[T-1], like the released code
        "zero"       d[0] = 0
        "replicate"  d[0] = d[1]
    A clip of one frame has d = 0.

    Args:
        frames: uint8 RGB or YUV 4:2:0. Clips of different sizes share a padded buffer.
        stills: uint8 in the same form, one still for each clip, with a padded buffer of their own.
        params: One row for each clip and one for its still.
        boundary: See above.
        dtype: Dtype of the views. The arithmetic, including the frame difference, is in float32 and rounded once at the
            end.
        check_rows: Same as in `augment`.
        blocks: True returns the views in the layout of `space_to_depth`, which a backbone's stem can read directly.

    Returns:
        Views, each (B, 3, T, h, w), or with `blocks` (B, 16, T, ceil(h / 2) + 3, ceil(w / 2) + 3), without gradient.
        The static view is one frame in memory, expanded over time: its stride along T is 0, and it cannot be written.

    Raises:
        TypeError, RuntimeError: Same as in `augment`.
        ValueError: Same as in `augment`, or the boundary is unknown.
    """
    _check_boundary(boundary)
    _check_stills(stills, frames)
    _check_augment(frames, params.clip, params.size, check_rows)
    _check_augment(_with_time(stills), params.still, params.size, check_rows, "still")
    if not runs_triton(_luma(frames).device):
        return generate_views_reference(frames, stills, params, boundary=boundary, dtype=dtype, blocks=blocks)

    from dclr.kernels.view_generation_triton import generate_views_op, table_of

    # One table for both, so that rows on the CPU need only one copy to the device.
    table = torch.cat([table_of(params.clip, frames), table_of(params.still, stills)])  # (2 B, C)
    table = to_device(table, _luma(frames).device)
    sources = (*_planes(frames), *_planes(stills))
    rgb, static, dynamic = generate_views_op(*sources, table, *params.size, boundary, dtype, blocks)
    return Views(rgb, _over_time(static, rgb.shape[2]), dynamic)


def augment(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    augmentation: Augmentation,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    check_rows: bool | None = None,
) -> Tensor:  # (B, 3, T, h, w)
    """Return one augmented, normalised view of each clip. All frames of a clip have the same parameters.

    The operations are applied in this order:
        1. crop the box, turn it upright by `orientation`, and resize it to `size` (bilinear, half-pixel centres, no
           antialiasing)
        2. convert to grayscale
        3. jitter the colours in the clip's own order
        4. flip
        5. blur with an 11 x 11 Gaussian kernel
        6. normalise with ImageNet's mean and standard deviation
    The colour operations are kornia's and clamp to 0..1 like its ColorJitter. Colour jitter has two forms:

        step         multiplicative                           additive
        brightness   factor * pixel                           pixel + (factor - 1)
        contrast     mean + factor * (pixel - mean)           factor * pixel
        saturation   luma + factor * (pixel - luma)           factor * the saturation of HSV
        hue          shift by `factor` turns of the circle    the same

    The mean is that of the frame's luma, and luma is that of the pixel. The multiplicative form is that of torchvision,
    and of kornia's ColorJitter since version 0.6.4. The additive form is that of kornia's ColorJitter before.

    The blur mirrors pixels at the border, like kornia's RandomGaussianBlur. A view with a side of 5 pixels or fewer has
    too few pixels to mirror, so the border pixels are repeated instead.

    Args:
        frames: uint8 RGB or YUV 4:2:0, each clip at the top left of the padded buffer.
        augmentation: One row for each clip, on the CPU or on the device of the frames.
        size: Height and width of the view.
        dtype: Dtype of the view. The arithmetic is in float32, also under autocast.
        check_rows: True raises an error for a row that cannot be applied. By default only rows on the CPU outside
            torch.compile are checked, because a check on a GPU makes the host wait for the device. The kernels clamp
            the box of an unchecked row to the buffer.

    Returns:
        (B, 3, T, h, w) in channels_last_3d memory, without gradient.

    Raises:
        TypeError: The frames are not uint8.
        ValueError: Shapes or devices do not match, or a checked row cannot be applied. The message names the row.
        RuntimeError: The backend is "triton", and it cannot run on this device.
    """
    _check_augment(frames, augmentation, size, check_rows)
    if not runs_triton(_luma(frames).device):
        return augment_reference(frames, augmentation, size, dtype)

    from dclr.kernels.view_generation_triton import augment_op, table_of

    table = to_device(table_of(augmentation, frames), _luma(frames).device)
    return augment_op(*_planes(frames), table, *size, dtype)


# ---------------------------------------------------------------- reference

# The functions of kornia.enhance for brightness, contrast, saturation and hue.
MULTIPLICATIVE = (
    "adjust_brightness_accumulative",
    "adjust_contrast_with_mean_subtraction",
    "adjust_saturation_with_gray_subtraction",
    "adjust_hue",
)
ADDITIVE = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


def generate_views_reference(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    stills: Tensor | Yuv420,  # (B, H', W', 3), or its planes
    params: ViewParams,
    *,
    boundary: Boundary = "wrap",
    dtype: torch.dtype = torch.float32,
    blocks: bool = False,
) -> Views:
    """Compute `generate_views` in torch and kornia, without its checks.

    The host waits for the device to read the rows.
    """
    rgb = augment_reference(frames, params.clip, params.size)  # (B, 3, T, h, w)
    still = augment_reference(_with_time(stills), params.still, params.size, dtype)  # (B, 3, 1, h, w)
    layout = space_to_depth if blocks else _channels_last
    return Views(
        rgb=layout(rgb.to(dtype)),
        static=_over_time(layout(still), rgb.shape[2]),
        dynamic=layout(_frame_difference(rgb, boundary).to(dtype)),
    )


@torch.no_grad()
def augment_reference(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    augmentation: Augmentation,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, 3, T, h, w)
    """Compute `augment` in torch and kornia, without its checks. The host waits for the device to read the rows."""
    from kornia.color import rgb_to_grayscale  # here and below, because the Triton kernels do without kornia

    rows = augmentation.to("cpu")
    B, T = _shape(frames)[:2]
    device = _luma(frames).device
    with torch.autocast(device.type, enabled=False):
        colours = yuv_coefficients(frames.bt709, frames.full_range).tolist() if isinstance(frames, Yuv420) else []
        images = torch.empty((B, T, 3, *size), device=device)  # like all images below
        for b, (box, orientation) in enumerate(zip(rows.box.tolist(), rows.orientation.tolist(), strict=True)):
            images[b] = _crop(frames, colours, box, orientation, b, size)
        images /= 255  # after the resize, which is linear and leaves fewer pixels to scale
        # Each operation runs once on all clips that it applies to, so the number of calls does not grow with the batch.
        images = _where(rows.grayscale, images, lambda some, _: rgb_to_grayscale(some).expand_as(some))
        for form in (MULTIPLICATIVE, ADDITIVE):
            jitter = partial(_jitter_clips, rows, form)
            images = _where(rows.jitter & (rows.additive == (form is ADDITIVE)), images, jitter)
        images = _where(rows.flip, images, lambda some, _: some.flip(4))
        images = _where(rows.sigma > 0, images, lambda some, b: gaussian_blur(some, rows.sigma[b]))
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        view = torch.empty((B, 3, T, *size), dtype=dtype, device=device, memory_format=torch.channels_last_3d)
        view.copy_(((images - mean) / std).transpose(1, 2))
    return view


def _where(
    applies: Tensor,  # (B,) bool, on the CPU
    images: Tensor,  # (B, T, 3, h, w)
    operation: Callable[[Tensor, Tensor], Tensor],  # takes the images of some clips and the indices of these clips
) -> Tensor:
    """Overwrite the clips that `operation` applies to with its result. The other clips stay exactly as they are."""
    numbers = applies.nonzero()[:, 0]
    if len(numbers):
        on_device = numbers.to(images.device)
        images[on_device] = operation(images[on_device], numbers)
    return images


def _crop(
    frames: Tensor | Yuv420,  # (B, T, H, W, 3), or its planes
    colours: list[list[float]],  # yuv_coefficients; unused for RGB frames
    box: list[int],
    orientation: int,
    b: int,
    size: tuple[int, int],
) -> Tensor:  # (T, 3, h, w), 0..255
    """Return the box of clip b, resized and turned upright. Turning moves whole pixels, so it comes last."""
    top, left, height, width = box
    if isinstance(frames, Yuv420):
        crop = yuv_box_to_rgb(frames, colours[b], b, top, left, height, width)  # (T, 3, height, width)
    else:
        crop = frames[b, :, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
    lying = size if orientation % 2 == 0 else size[::-1]  # height and width before the turn
    resized = F.interpolate(crop, lying, mode="bilinear", align_corners=False, antialias=False)
    if orientation == 0:
        return resized
    upright = torch.rot90(resized, -(orientation & 3), dims=(2, 3))
    return upright.flip(3) if orientation & 4 else upright


def _jitter_clips(rows: Augmentation, form: tuple[str, str, str, str], images: Tensor, numbers: Tensor) -> Tensor:
    """Jitter the colours of the clips with the indices `numbers`, each by its own row."""
    return colour_jitter(images, rows.factors[numbers], rows.order[numbers], form)


def colour_jitter(
    images: Tensor,  # (N, T, 3, h, w), 0..1
    factors: Tensor,  # (N, 4), on the CPU
    order: Tensor,  # (N, 4), on the CPU
    form: tuple[str, str, str, str],  # names of functions of kornia.enhance: MULTIPLICATIVE or ADDITIVE
) -> Tensor:
    """Jitter the colours with the given factors and order of each clip."""
    from kornia import enhance

    neutral = [1.0, 1.0, 1.0, 0.0]
    brightness, contrast, saturation, hue = factors.unbind(1)
    if form == ADDITIVE:
        brightness, neutral[0] = brightness - 1, 0.0
    values = (brightness, contrast, saturation, hue * 2 * math.pi)  # turns to radians
    images = images.clamp(0, 1)
    for position in range(4):
        now = order[:, position]
        for number, (name, value) in enumerate(zip(form, values, strict=True)):
            applies = (now == number) & (value != neutral[number])
            images = _where(applies, images, partial(_by_factor, getattr(enhance, name), value))
    return images.clamp(0, 1)


def _by_factor(operation: Callable[..., Tensor], factors: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """Apply `operation` to the clips with the indices `numbers`, each with its own factor."""
    return operation(images, factors[numbers])


def gaussian_blur(
    images: Tensor,  # (N, T, 3, h, w)
    sigma: Tensor,  # (N,) pixels, on the CPU
) -> Tensor:
    """Blur each clip with a Gaussian kernel of its own sigma."""
    from kornia.filters import gaussian_blur2d

    border = "reflect" if min(images.shape[3:]) > BLUR_KERNEL // 2 else "replicate"
    sigmas = sigma.to(images.device)[:, None].expand(-1, 2)
    return gaussian_blur2d(images.flatten(1, 2), BLUR_KERNEL, sigmas, border).view_as(images)


def _frame_difference(view: Tensor, boundary: Boundary) -> Tensor:
    """Return d[t] = v[t] - v[t-1] along the time dimension of a view v (B, 3, T, h, w)."""
    difference = torch.zeros_like(view)
    difference[:, :, 1:] = view[:, :, 1:] - view[:, :, :-1]
    if boundary == "wrap":
        difference[:, :, 0] = view[:, :, 0] - view[:, :, -1]
    elif boundary == "replicate":
        difference[:, :, :1] = difference[:, :, 1:2] if view.shape[2] > 1 else 0
    return difference


def _over_time(still: Tensor, T: int) -> Tensor:
    """Return the view (B, C, T, h, w) of one frame (B, C, 1, h, w) that stands for T equal frames, without a copy."""
    return still.expand(-1, -1, T, -1, -1)


def _channels_last(view: Tensor) -> Tensor:
    return view.contiguous(memory_format=torch.channels_last_3d)


# ---------------------------------------------------------------- packing and checks


def _luma(frames: Tensor | Yuv420) -> Tensor:
    """Return the luma plane, or the frames themselves if they are RGB."""
    return frames.y if isinstance(frames, Yuv420) else frames


def _shape(frames: Tensor | Yuv420) -> tuple[int, ...]:
    """Return (B, T, H, W), or (B, H, W) for stills."""
    return tuple(frames.y.shape if isinstance(frames, Yuv420) else frames.shape[:-1])


def _planes(frames: Tensor | Yuv420) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the tensors that the registered operators take."""
    return (frames.y, frames.u, frames.v) if isinstance(frames, Yuv420) else (frames, None, None)


def _with_time(stills: Tensor | Yuv420) -> Tensor | Yuv420:
    """Return stills as clips of one frame."""
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
        expected = f"({B}, H, W)" if dimensions == 3 else f"({B}, H, W, 3)"
        raise ValueError(f"stills must be {expected}, one for each clip, not {shape}")
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
    columns = (rows.size, rows.box, rows.order, rows.sigma, rows.orientation)
    table = zip(*(column.tolist() for column in columns), strict=True)
    for b, ((valid_height, valid_width), (top, left, height, width), order, sigma, orientation) in enumerate(table):
        if not (1 <= valid_height <= H and 1 <= valid_width <= W):
            raise ValueError(
                f"{kind} {b}: valid size {valid_height} x {valid_width} must be within the {H} x {W} buffer"
            )
        inside = top >= 0 and left >= 0 and top + height <= valid_height and left + width <= valid_width
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"{kind} {b}: box (top {top}, left {left}, height {height}, width {width}) "
                f"must be within the valid {valid_height} x {valid_width} frame and not empty"
            )
        if sorted(order) != [0, 1, 2, 3]:
            raise ValueError(f"{kind} {b}: order {order} must be a permutation of 0, 1, 2, 3")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"{kind} {b}: sigma {sigma} must be 0 (no blur) or a positive number")
        if not 0 <= orientation < 8:
            raise ValueError(f"{kind} {b}: orientation {orientation} must be 0 to 7")
