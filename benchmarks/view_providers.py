"""Nine ways to make the three views from decoded frames, their inputs, and the float64 views to compare them with.

benchmarks/views.py describes and measures them. This module is not run by itself.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.harness import RELEASED, NotAvailable
from dclr.data.augmentation import PRETRAIN, draw_augmentation, to_augmentation
from dclr.kernels import Augmentation, ViewParams, Views, Yuv420, generate_views
from dclr.kernels.colour import yuv_coefficients
from dclr.kernels.types import BLUR_KERNEL, MEAN, STD
from dclr.kernels.view_generation import generate_views_reference

Output = Literal["bf16", "float32"]
"""Precision of the finished views."""

Call = Callable[[], Views]
"""What a provider returns for its inputs and a precision: the call that is measured."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid."""

    precision: Output
    B: int
    T: int
    H: int
    W: int
    side: int

    def __str__(self) -> str:
        return f"{self.precision}, B {self.B}, {self.source}"

    @property
    def source(self) -> str:
        return f"{self.H} x {self.W}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


# --------------------------------------------------------------------------------------------------------------- inputs


class Inputs(NamedTuple):
    """Frames, stills and drawn augmentations. All are on the device but `host_params`."""

    frames: Tensor  # (B, T, H, W, 3) uint8
    stills: Tensor  # (B, H, W, 3) uint8
    planes: Yuv420  # the frames as planes
    still_planes: Yuv420
    params: ViewParams
    host_params: ViewParams  # params on the CPU


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Return frames with smooth moving shapes and noise, and a drawn augmentation for every clip and every still."""
    rng = np.random.default_rng(0)
    generator = torch.Generator(device).manual_seed(0)
    frames = torch.empty(cell.B, cell.T, cell.H, cell.W, 3, dtype=torch.uint8, device=device)
    stills = torch.empty(cell.B, cell.H, cell.W, 3, dtype=torch.uint8, device=device)
    for b in range(cell.B):
        coarse = torch.rand(1, 3, 4, cell.H // 16, cell.W // 16, generator=generator, device=device)
        smooth = F.interpolate(coarse, (cell.T + 1, cell.H, cell.W), mode="trilinear")[0].permute(1, 2, 3, 0)
        noise = torch.randn(smooth.shape, generator=generator, device=device)
        clip = (255 * smooth + 4 * noise).clamp(0, 255).to(torch.uint8)  # (T + 1, H, W, 3)
        frames[b], stills[b] = clip[: cell.T], clip[cell.T]
    clip_rows, still_rows = (
        to_augmentation([draw_augmentation(rng, cell.H, cell.W, PRETRAIN) for _ in range(cell.B)]) for _ in range(2)
    )
    params = ViewParams(clip_rows, still_rows, (cell.side, cell.side))
    return Inputs(frames, stills, to_yuv(frames), to_yuv(stills), params.to(device), params)


def to_yuv(frames: Tensor) -> Yuv420:  # (B, ..., H, W, 3) uint8
    """Return planes of BT.601 in full range. Chroma is that of every second pixel of every second line."""
    y = torch.empty_like(frames[..., 0])
    u, v = (torch.empty_like(frames[..., ::2, ::2, 0]) for _ in range(2))
    for b, clip in enumerate(frames):
        r, g, blue = clip.float().unbind(-1)
        luma = _luma(r, g, blue)
        y[b] = luma.round().to(torch.uint8)
        u[b] = ((blue - luma) / 1.772 + 128).round().clamp(0, 255).to(torch.uint8)[..., ::2, ::2]
        v[b] = ((r - luma) / 1.402 + 128).round().clamp(0, 255).to(torch.uint8)[..., ::2, ::2]
    flags = torch.ones(frames.shape[0], dtype=torch.bool, device=frames.device)
    return Yuv420(y, u, v, bt709=~flags, full_range=flags)


# ------------------------------------------------------------------------------------------------------------ providers


def as_released(inputs: Inputs, dtype: torch.dtype) -> Call:
    """Make views by the steps of the released loader and training loop, which draw one sigma for the whole run."""
    from kornia import augmentation as K  # here and below, so that a machine without kornia can make inputs

    T, size = inputs.frames.shape[1], inputs.params.size
    device, frames, stills = inputs.frames.device, inputs.frames.cpu(), inputs.stills.cpu()
    crop = v2.RandomResizedCrop(size, PRETRAIN.scale, PRETRAIN.ratio, antialias=False)
    augment = K.VideoSequential(*kornia_steps((1.0, 1.0)), data_format="BCTHW", same_on_frame=True)

    def load(clip: Tensor) -> Tensor:  # (T, H, W, 3) uint8 -> (3, T, h, w)
        return crop(clip.permute(3, 0, 1, 2).float() / 255)

    def call() -> Views:
        _refuse_capture(device)
        clips = torch.stack([load(clip) for clip in frames])
        repeated = torch.stack([load(still.expand(T, -1, -1, -1)) for still in stills])
        rgb, static = augment(clips.to(device)), augment(repeated.to(device))
        stacked = torch.stack([rgb, static, rgb - torch.roll(rgb, 1, 2)], dim=1)  # (B, 3, 3, T, h, w)
        return Views(*stacked.to(dtype).unbind(1))

    return call


def kornia_on_device(inputs: Inputs, dtype: torch.dtype) -> Call:
    from kornia import augmentation as K

    crop = K.RandomResizedCrop(
        inputs.params.size, PRETRAIN.scale, PRETRAIN.ratio, align_corners=False, cropping_mode="resample"
    )
    augment = K.VideoSequential(crop, *kornia_steps(PRETRAIN.sigma), data_format="BTCHW", same_on_frame=True)

    def call() -> Views:
        _refuse_capture(inputs.frames.device)
        rgb, static = (
            augment(images.permute(0, 1, 4, 2, 3).float() / 255).transpose(1, 2)
            for images in (inputs.frames, inputs.stills[:, None])
        )
        return _finished(rgb, static, dtype)

    return call


def reference(inputs: Inputs, dtype: torch.dtype) -> Call:
    def call() -> Views:
        _refuse_capture(inputs.frames.device)
        return generate_views_reference(inputs.frames, inputs.stills, inputs.host_params, dtype=dtype)

    return call


def torchvision_v2(inputs: Inputs, dtype: torch.dtype) -> Call:
    """Make views by torchvision's functionals, which differ from kornia's only in the weights of luma."""
    functional = v2.functional

    def view(frames: Tensor, rows: Augmentation, b: int) -> Tensor:  # (T, H, W, 3) uint8 -> (3, T, h, w)
        brightness, contrast, saturation, hue = rows.factors[b].tolist()
        steps = (
            partial(functional.adjust_brightness, brightness_factor=brightness),
            partial(functional.adjust_contrast, contrast_factor=contrast),
            partial(functional.adjust_saturation, saturation_factor=saturation),
            partial(functional.adjust_hue, hue_factor=hue),
        )
        top, left, height, width = rows.box[b].tolist()
        box = functional.crop(frames.permute(0, 3, 1, 2), top, left, height, width)  # before the cast: fewer pixels
        images = functional.resize(box.float() / 255, list(inputs.params.size), antialias=False)
        if rows.grayscale[b]:
            images = functional.rgb_to_grayscale(images, num_output_channels=3)
        if rows.jitter[b]:
            for step in rows.order[b].tolist():
                images = steps[step](images)
        if rows.flip[b]:
            images = functional.horizontal_flip(images)
        if rows.sigma[b] > 0:
            images = functional.gaussian_blur(images, [BLUR_KERNEL, BLUR_KERNEL], [float(rows.sigma[b])] * 2)
        return functional.normalize(images, list(MEAN), list(STD)).transpose(0, 1)

    def call() -> Views:
        _refuse_capture(inputs.frames.device)
        clip, still = inputs.host_params.clip, inputs.host_params.still
        rgb = torch.stack([view(frames, clip, b) for b, frames in enumerate(inputs.frames)])
        static = torch.stack([view(frame[None], still, b) for b, frame in enumerate(inputs.stills)])
        return _finished(rgb, static, dtype)

    return call


def triton_augment(inputs: Inputs, dtype: torch.dtype) -> Call:
    if inputs.frames.device.type != "cuda":
        raise NotAvailable("needs a GPU")
    os.environ.setdefault("TRITON_AUGMENT_SUPPRESS_FIRST_RUN_MESSAGE", "1")
    try:
        import triton_augment as package
    except ImportError as error:
        raise NotAvailable("not installed (pip install triton-augment)") from error
    augment = package.TritonFusedAugment(
        crop_size=inputs.params.size,
        horizontal_flip_p=PRETRAIN.flip,
        brightness=PRETRAIN.brightness,
        contrast=PRETRAIN.contrast,
        saturation=PRETRAIN.saturation,
        grayscale_p=PRETRAIN.grayscale,
        mean=MEAN,
        std=STD,
    )

    def view(frames: Tensor) -> Tensor:  # (B, T, H, W, 3) uint8 -> (B, 3, T, h, w); one draw for the frames of a clip
        images = augment(frames.permute(0, 1, 4, 2, 3).float() / 255)
        return images.reshape(*frames.shape[:2], 3, *inputs.params.size).transpose(1, 2)

    def call() -> Views:
        _refuse_capture(inputs.frames.device)  # the host waits for the device to know which steps apply
        return _finished(view(inputs.frames), view(inputs.stills[:, None]), dtype)

    return call


def batched_views(frames: Tensor, stills: Tensor, params: ViewParams, dtype: torch.dtype) -> Views:
    """Compute `generate_views_reference` for all clips at once, without branches. Sides must have over 5 pixels."""
    rgb = batched_augment(frames, params.clip, params.size)
    static = batched_augment(stills[:, None], params.still, params.size)
    return _finished(rgb, static, dtype)


def batched_augment(
    frames: Tensor,  # (B, T, H, W, 3)
    rows: Augmentation,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, 3, T, h, w) in channels_last_3d memory
    """Augment all clips at once in `dtype`. Where a step does not apply, its factors are neutral."""
    top, left, height, width = rows.box.unbind(1)  # (B,) each
    above, below, down = _taps(top, height, size[0], dtype)  # (B, h)
    before, after, right = (
        torch.where(rows.flip[:, None], tap.flip(1), tap) for tap in _taps(left, width, size[1], dtype)
    )  # (B, w)
    clip = torch.arange(frames.shape[0], device=frames.device).view(-1, 1, 1, 1)
    moment = torch.arange(frames.shape[1], device=frames.device).view(1, -1, 1, 1)

    def pixels(y: Tensor, x: Tensor) -> Tensor:  # (B, T, h, w, 3)
        return frames[clip, moment, y[:, None, :, None], x[:, None, None, :]].to(dtype)

    down, right = down[:, None, :, None, None], right[:, None, None, :, None]
    upper = pixels(above, before) * (1 - right) + pixels(above, after) * right
    lower = pixels(below, before) * (1 - right) + pixels(below, after) * right
    r, g, b = ((upper * (1 - down) + lower * down) / 255).unbind(4)  # (B, T, h, w) each, as below

    def per_clip(values: Tensor) -> Tensor:  # (B,) -> (B, 1, 1, 1)
        return values.view(-1, 1, 1, 1)

    gray, luma = per_clip(rows.grayscale), _luma(r, g, b)
    r, g, b = (torch.where(gray, luma, channel) for channel in (r, g, b))
    # Brightness, contrast and saturation are one formula. Its reference colour is black, the frame's mean luma, or the
    # pixel's luma.
    neutral = (torch.arange(4, device=frames.device) < 3).to(dtype)  # three factors of 1, and a hue of 0
    factors = torch.where(rows.jitter[:, None], rows.factors.to(dtype), neutral)
    for step in range(4):
        kind = per_clip(rows.order[:, step])
        factor = per_clip(factors.gather(1, rows.order[:, step : step + 1]))
        luma = _luma(r, g, b)
        mean = luma.mean(dim=(2, 3), keepdim=True)
        other = torch.where(kind == 1, mean, torch.where(kind == 2, luma, 0.0)) * (1 - factor)
        shifted = _shift_hue(r, g, b, factor)
        r, g, b = (
            torch.where(kind == 3, with_hue, (factor * channel + other).clamp(0, 1))
            for with_hue, channel in zip(shifted, (r, g, b), strict=True)
        )

    offsets = torch.arange(-(BLUR_KERNEL // 2), BLUR_KERNEL // 2 + 1, device=frames.device)
    sigma = rows.sigma[:, None].to(dtype)
    identity = (offsets == 0).to(dtype)
    weights = torch.where(sigma > 0, torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)) ** 2), identity)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, 11)
    views = []
    for c, channel in enumerate((r, g, b)):
        for dimension in (2, 3):
            channel = _blurred(channel, weights, dimension)
        views.append((channel - MEAN[c]) / STD[c])
    return torch.stack(views, dim=4).permute(0, 4, 1, 2, 3)


PROVIDERS: dict[str, Callable[[Inputs, torch.dtype], Call]] = {
    RELEASED: as_released,
    "kornia, all on device": kornia_on_device,
    "reference": reference,
    "torchvision v2": torchvision_v2,
    "triton-augment": triton_augment,
    "eager, batched": lambda inputs, dtype: partial(batched_views, *inputs[:2], inputs.params, dtype),
    "torch.compile": lambda inputs, dtype: partial(
        torch.compile(batched_views, fullgraph=True, dynamic=False), *inputs[:2], inputs.params, dtype
    ),
    "ours": lambda inputs, dtype: partial(generate_views, *inputs[:2], inputs.params, dtype=dtype),
    "ours, from YUV": lambda inputs, dtype: partial(generate_views, *inputs[2:4], inputs.params, dtype=dtype),
}
CLIP_BY_CLIP = (RELEASED, "reference", "torchvision v2")
OWN_DRAW = (RELEASED, "kornia, all on device", "triton-augment")


def _refuse_capture(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured. A graph would repeat one draw, from freed host memory."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the host draws, or reads, the augmentation")


def kornia_steps(sigma: tuple[float, float]) -> list[torch.nn.Module]:
    """Return kornia's modules for the steps after the crop. sigma: range of the blur's standard deviation in pixels."""
    from kornia import augmentation as K

    recipe = PRETRAIN
    return [
        K.RandomGrayscale(p=recipe.grayscale),
        K.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=recipe.jitter),
        K.RandomHorizontalFlip(p=recipe.flip),
        K.RandomGaussianBlur((BLUR_KERNEL, BLUR_KERNEL), sigma, p=recipe.blur),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ]


def _finished(rgb: Tensor, static: Tensor, dtype: torch.dtype) -> Views:
    """Return views in `dtype` from rgb (B, 3, T, h, w) and static (B, 3, 1, h, w), which are float32."""
    dynamic = rgb - torch.roll(rgb, 1, 2)
    repeated = static.to(dtype).expand(-1, -1, rgb.shape[2], -1, -1)
    rgb, dynamic = (view.to(dtype).contiguous(memory_format=torch.channels_last_3d) for view in (rgb, dynamic))
    return Views(rgb, repeated.contiguous(memory_format=torch.channels_last_3d), dynamic)


def _taps(start: Tensor, extent: Tensor, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return, along one axis of the view, the two source pixels around each pixel and the weight of the second.

    start, extent: (B,) int64, where the crop box begins and its length. Each result is (B, outputs).
    """
    position = torch.arange(outputs, device=start.device) + 0.5
    at = (position * (extent[:, None].to(dtype) / outputs) - 0.5).clamp(min=0)
    last = extent[:, None] - 1
    first = torch.minimum(at.long(), last)
    second = torch.minimum(first + 1, last)
    return start[:, None] + first, start[:, None] + second, at - first


def _luma(r: Tensor, g: Tensor, b: Tensor) -> Tensor:
    return 0.299 * r + 0.587 * g + 0.114 * b


def _shift_hue(r: Tensor, g: Tensor, b: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
    """Convert RGB to HSV, add `turns` to the hue, and convert back."""
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    )
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(sixths + 6 * turns + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return tuple(channels)


def _blurred(channel: Tensor, weights: Tensor, dimension: int) -> Tensor:
    """Blur (B, T, h, w) along one dimension with weights (B, 11). The image is mirrored about its border pixels."""
    size, radius = channel.shape[dimension], BLUR_KERNEL // 2
    mirrored = torch.arange(-radius, size + radius, device=channel.device).abs()
    mirrored = size - 1 - (size - 1 - mirrored).abs()
    padded = channel.index_select(dimension, mirrored)
    total = torch.zeros_like(channel)
    for i in range(BLUR_KERNEL):
        total = total + weights[:, i, None, None, None] * padded.narrow(dimension, i, size)
    return total


# ---------------------------------------------------------------------------------------------------------------- truth


@torch.no_grad()
def float64_views(inputs: Inputs, yuv: bool) -> Views:
    """Return the views in float64, clip by clip. The static view has one frame, which broadcasts."""
    params = inputs.params

    def augmented(frames: Tensor, rows: Augmentation, b: int) -> Tensor:  # (T, H, W, 3) -> (1, 3, T, h, w)
        one = Augmentation(**{name: tensor[b : b + 1] for name, tensor in vars(rows).items()})
        return batched_augment(frames[None], one, params.size, torch.float64)

    rgb, static = [], []
    for b in range(len(inputs.frames)):
        frames = to_rgb(inputs.planes, b) if yuv else inputs.frames[b]
        still = to_rgb(inputs.still_planes, b) if yuv else inputs.stills[b]
        rgb.append(augmented(frames, params.clip, b))
        static.append(augmented(still[None], params.still, b))
    clips = torch.cat(rgb)
    return Views(clips, torch.cat(static), clips - torch.roll(clips, 1, 2))


def to_rgb(planes: Yuv420, b: int) -> Tensor:  # (..., H, W, 3) float64, 0 to 255
    """Return clip or still b in RGB, not rounded. Chroma is repeated, as `Yuv420` says."""
    H, W = planes.y.shape[-2:]
    coefficients = yuv_coefficients(planes.bt709[b : b + 1], planes.full_range[b : b + 1])[0].double()
    offset, scale, red_v, green_u, green_v, blue_u = coefficients
    luma = (planes.y[b].double() - offset) * scale
    cb, cr = (
        plane[b].repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :H, :W].double() - 128
        for plane in (planes.u, planes.v)
    )
    rgb = [luma + red_v * cr, luma + green_u * cb + green_v * cr, luma + blue_u * cb]
    return torch.stack(rgb, dim=-1).clamp(0, 255)


def greatest_error(views: Views, truth: Views) -> float:
    """Return the greatest difference of any value of the views. Raises ArithmeticError if a value is not finite."""
    greatest = 0.0
    for view, true_view in zip(views, truth, strict=True):
        for b in range(view.shape[0]):  # clip by clip, because in float64 the views are large
            if not bool(view[b].isfinite().all()):
                raise ArithmeticError("the result is not finite")
            greatest = max(greatest, float((view[b].double() - true_view[b]).abs().max()))
    return greatest
