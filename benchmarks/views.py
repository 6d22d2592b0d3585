"""How fast are the three views made from decoded frames? Nine implementations of one chain in one run.

    python -m benchmarks.views                        bfloat16 at 128, 40 and 8 clips, from 240 x 320 and 128 x 171; float32 at 40 clips
    python -m benchmarks.views --quick                bfloat16 at 128 clips only, fewer repetitions
    python -m benchmarks.views --precision float32    one precision, on the whole grid; also: bf16, or both
    python -m benchmarks.views --minutes 4            no new cell is begun after 4 minutes; 128 clips come first

Time to expect on one H100 or H200: 4 minutes for the first, of which most is torch.compile and what crops on the CPU; 1 for --quick. This
is an estimate: no GPU has run it yet. Without a GPU it runs at a small size (half a minute on two cores); ours is the reference there,
and the output says so.

Providers (views are 16 x 112 x 112, drawn by the pretraining recipe, dynamic with "wrap"):
    as released             the steps of the authors' loader and training loop: clip by clip on the CPU, a still repeated T times, to
                            float, torchvision's crop; then, on the device, kornia's VideoSequential, roll, subtract, stack. The CPU's
                            time counts: a loader would spread it over its workers, of which there are none here
    kornia, all on device   the same VideoSequential begins with RandomResizedCrop, which resamples the whole batch at once; a still is
                            augmented once and then repeated
    reference               kernels/view_generation.py's: kornia's functions, clip by clip, each with its own draw
    torchvision v2          its functionals, clip by clip, each with its own draw. Covers the whole chain, with a luma of its own (0.2989
                            for red, not 0.299), which the error shows
    triton-augment          its TritonFusedAugment, where it is installed (pip install triton-augment). Covers a crop of 112 x 112 without
                            resize, flip, grayscale, brightness, saturation, a contrast about 0.5, always and in one order, and
                            normalisation; no resize, hue, blur or random order: it does less than the others
    eager, batched          the reference's formula for all clips at once and without branches, as torch.compile needs it
    torch.compile           of that, with the sizes fixed
    ours                    `kernels.generate_views`
    ours, from YUV          the same from planes of YUV 4:2:0, half the bytes of a frame

Frames are uint8 on the device, except for "as released", which has them on the CPU. Providers that draw by themselves or look at the
draw on the host are not replayed from a CUDA graph ("no graph" in the tables), and those that go clip by clip are timed in a loop of
their own, with a fifth of the repetitions. Views are cast to the cell's precision at the end, arithmetic is float32. A provider that takes
the draw as given has an error: the greatest difference of any value of the three views from the reference's kornia functions in float64, to
be compared with the rounding of that truth to the cell's precision. The others draw likewise by themselves: as much work, other numbers.

Bytes that must move: the pixels of the crop boxes (3 bytes each, 1.5 as YUV), each read once, and three views written. (Of a box more than
twice as high as the view, bilinear resizing skips rows; they are counted.) A share of the bandwidth is those bytes by the time, as a
part of what a large copy reaches; only on a GPU.

Prints tables, writes views.json and views.png into results/DEVICE; --precision and --quick add their names to the files'. The share of a
training step, two calls of 128 clips, is judged if step.json is there too; if not, an estimate stands in its place.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from kornia import augmentation as K
from kornia.color import rgb_to_grayscale
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from torchvision.transforms import v2

from benchmarks import harness
from benchmarks.harness import Ceilings
from dclr.data.augmentation import PRETRAIN, draw_augmentation, to_augmentation
from dclr.report import environment
from kernels import Augmentation, ViewParams, Views, Yuv420, describe, generate_views
from kernels.backend import runs_triton
from kernels.colour import yuv_box_to_rgb, yuv_coefficients
from kernels.types import BLUR_KERNEL, MEAN, STD
from kernels.view_generation import colour_jitter, gaussian_blur, generate_views_reference

Output = Literal["bf16", "float32"]
"""What the views are cast to."""

BATCH_SIZES = {"cuda": (8, 40, 128), "cpu": (2,)}
SOURCES = {"cuda": ((240, 320), (128, 171)), "cpu": ((120, 160),)}  # H, W
VIEWS = {"cuda": (16, 112), "cpu": (4, 56)}  # T, and h = w
PRECISIONS: dict[str, tuple[Output, ...]] = {"cuda": ("bf16", "float32"), "cpu": ("float32",)}
REPETITIONS = {"cuda": 50, "cpu": 8}
QUICK_REPETITIONS = 10
GOAL_BATCH = 128
SECOND_BATCH = 40  # the only one of the second precision, unless that is asked for

ESTIMATED_STEP_MS = GOAL_BATCH / 530 * 1e3
"""Of 128 samples at the design's least goal of 530 samples a second: what a training step may take, not what it took."""

# A provider for some inputs and a precision: the call that is measured.
Call = Callable[[], Views]


class NotAvailable(Exception):
    """A provider cannot run here; the message says why."""


class Inputs(NamedTuple):
    frames: Tensor  # (B, T, H, W, 3) uint8
    stills: Tensor  # (B, H, W, 3) uint8
    planes: Yuv420  # of the frames
    still_planes: Yuv420
    params: ViewParams  # all above and these are on the device
    host_params: ViewParams  # the same on the CPU


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


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Ours is to be at least `least` times as fast as `against`, or to reach `least` of the copy bandwidth."""

    text: str
    least: float
    against: str | None = None


GOALS = (
    Goal(text="25 times kornia, all on device", against="kornia, all on device", least=25),
    Goal(text="3 times torch.compile", against="torch.compile", least=3),
    Goal(text="60 % of the copy bandwidth", least=0.6),
)
STEP_GOAL = 0.03  # of a training step at B 128


# -------------------------------------------------------------------------------------------------------------- providers


def as_released(inputs: Inputs, dtype: torch.dtype) -> Call:
    """The released loader's transforms and the head of its training loop; sigma is one for the whole run there."""
    T, size = inputs.frames.shape[1], inputs.params.size
    device, frames, stills = inputs.frames.device, inputs.frames.cpu(), inputs.stills.cpu()
    crop = v2.RandomResizedCrop(size, PRETRAIN.scale, PRETRAIN.ratio, antialias=False)
    augment = K.VideoSequential(*_kornia_steps((1.0, 1.0)), data_format="BCTHW", same_on_frame=True)

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
    crop = K.RandomResizedCrop(
        inputs.params.size, PRETRAIN.scale, PRETRAIN.ratio, align_corners=False, cropping_mode="resample"
    )
    augment = K.VideoSequential(crop, *_kornia_steps(PRETRAIN.sigma), data_format="BTCHW", same_on_frame=True)

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
    """Each of its functionals is kornia's but for the luma's weights: the chain is the reference's."""
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
        _refuse_capture(inputs.frames.device)  # it waits for the device to see which steps there are
        return _finished(view(inputs.frames), view(inputs.stills[:, None]), dtype)

    return call


def batched_views(frames: Tensor, stills: Tensor, params: ViewParams, dtype: torch.dtype) -> Views:
    """`generate_views_reference` for all clips at once, without branches; views of more than 5 pixels on a side."""
    rgb = batched_augment(frames, params.clip, params.size)
    static = batched_augment(stills[:, None], params.still, params.size)
    return _finished(rgb, static, dtype)


def batched_augment(frames: Tensor, rows: Augmentation, size: tuple[int, int]) -> Tensor:  # -> (B, 3, T, h, w)
    """Every step is computed for every clip, with factors that change nothing where it does not apply."""
    top, left, height, width = rows.box.unbind(1)  # (B,) each
    above, below, down = _taps(top, height, size[0])  # (B, h)
    before, after, right = (
        torch.where(rows.flip[:, None], tap.flip(1), tap) for tap in _taps(left, width, size[1])
    )  # (B, w)
    clip = torch.arange(frames.shape[0], device=frames.device).view(-1, 1, 1, 1)
    moment = torch.arange(frames.shape[1], device=frames.device).view(1, -1, 1, 1)

    def pixels(y: Tensor, x: Tensor) -> Tensor:  # (B, T, h, w, 3)
        return frames[clip, moment, y[:, None, :, None], x[:, None, None, :]].float()

    down, right = down[:, None, :, None, None], right[:, None, None, :, None]
    upper = pixels(above, before) * (1 - right) + pixels(above, after) * right
    lower = pixels(below, before) * (1 - right) + pixels(below, after) * right
    r, g, b = ((upper * (1 - down) + lower * down) / 255).unbind(4)  # (B, T, h, w) each, as below

    def of_clip(values: Tensor) -> Tensor:  # (B,) -> (B, 1, 1, 1)
        return values.view(-1, 1, 1, 1)

    gray, luma = of_clip(rows.grayscale), _luma(r, g, b)
    r, g, b = (torch.where(gray, luma, channel) for channel in (r, g, b))
    # Brightness, contrast and saturation are one formula: away from black, from the frame's mean luma, from the pixel's own luma.
    neutral = (torch.arange(4, device=frames.device) < 3).float()  # three factors of 1, and a hue of 0
    factors = torch.where(rows.jitter[:, None], rows.factors, neutral)
    for step in range(4):
        kind = of_clip(rows.order[:, step])
        factor = of_clip(factors.gather(1, rows.order[:, step : step + 1]))
        luma = _luma(r, g, b)
        mean = luma.mean(dim=(2, 3), keepdim=True)
        other = torch.where(kind == 1, mean, torch.where(kind == 2, luma, 0.0)) * (1 - factor)
        shifted = _shift_hue(r, g, b, factor)
        r, g, b = (
            torch.where(kind == 3, of_hue, (factor * channel + other).clamp(0, 1))
            for of_hue, channel in zip(shifted, (r, g, b), strict=True)
        )

    offsets = torch.arange(-(BLUR_KERNEL // 2), BLUR_KERNEL // 2 + 1, device=frames.device)
    sigma = rows.sigma[:, None]
    weights = torch.where(sigma > 0, torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)) ** 2), 1.0 * (offsets == 0))
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, 11)
    views = []
    for c, channel in enumerate((r, g, b)):
        for dimension in (2, 3):
            channel = _blurred(channel, weights, dimension)
        views.append((channel - MEAN[c]) / STD[c])
    return torch.stack(views, dim=4).permute(0, 4, 1, 2, 3)  # channels_last_3d memory


PROVIDERS: dict[str, Callable[[Inputs, torch.dtype], Call]] = {
    "as released": as_released,
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
CLIP_BY_CLIP = ("as released", "reference", "torchvision v2")
OWN_DRAW = ("as released", "kornia, all on device", "triton-augment")


def _refuse_capture(device: torch.device) -> None:
    """A graph would repeat one draw, and read it from host memory that is gone."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("it draws, or looks at the draw, on the host")


def _kornia_steps(sigma: tuple[float, float]) -> list[torch.nn.Module]:
    recipe = PRETRAIN
    return [
        K.RandomGrayscale(p=recipe.grayscale),
        K.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=recipe.jitter),
        K.RandomHorizontalFlip(p=recipe.flip),
        K.RandomGaussianBlur((BLUR_KERNEL, BLUR_KERNEL), sigma, p=recipe.blur),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ]


def _finished(rgb: Tensor, static: Tensor, dtype: torch.dtype) -> Views:
    """Views from rgb (B, 3, T, h, w) and static (B, 3, 1, h, w), in float32."""
    dynamic = rgb - torch.roll(rgb, 1, 2)
    repeated = static.to(dtype).expand(-1, -1, rgb.shape[2], -1, -1)
    rgb, dynamic = (view.to(dtype).contiguous(memory_format=torch.channels_last_3d) for view in (rgb, dynamic))
    return Views(rgb, repeated.contiguous(memory_format=torch.channels_last_3d), dynamic)


def _taps(start: Tensor, extent: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of the view along one axis: the two source pixels about it and the weight of the second, (B, outputs) each."""
    position = torch.arange(outputs, device=start.device) + 0.5
    at = (position * (extent[:, None].float() / outputs) - 0.5).clamp(min=0)
    last = extent[:, None] - 1
    first = torch.minimum(at.long(), last)
    second = torch.minimum(first + 1, last)
    return start[:, None] + first, start[:, None] + second, at - first


def _luma(r: Tensor, g: Tensor, b: Tensor) -> Tensor:
    return 0.299 * r + 0.587 * g + 0.114 * b


def _shift_hue(r: Tensor, g: Tensor, b: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
    """RGB to HSV, the hue moved by `turns`, and back."""
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
    """(B, T, h, w) blurred along one dimension with weights (B, 11); the border pixel is the mirror's axis."""
    size, radius = channel.shape[dimension], BLUR_KERNEL // 2
    mirrored = torch.arange(-radius, size + radius, device=channel.device).abs()
    mirrored = size - 1 - (size - 1 - mirrored).abs()
    padded = channel.index_select(dimension, mirrored)
    total = torch.zeros_like(channel)
    for i in range(BLUR_KERNEL):
        total = total + weights[:, i, None, None, None] * padded.narrow(dimension, i, size)
    return total


# ------------------------------------------------------------------------------------------------------------------ truth


@torch.no_grad()
def float64_augment(frames: Tensor | Yuv420, rows: Augmentation, size: tuple[int, int]) -> Tensor:  # (B, 3, T, h, w)
    """kernels.view_generation.augment_reference in float64: the same functions of kornia, on wider numbers; rows on the CPU."""
    views = []
    colours = yuv_coefficients(frames.bt709, frames.full_range).tolist() if isinstance(frames, Yuv420) else []
    for b, (top, left, height, width) in enumerate(rows.box.tolist()):
        if isinstance(frames, Yuv420):
            crop = yuv_box_to_rgb(frames, colours[b], b, top, left, height, width).double()
        else:
            crop = frames[b, :, top : top + height, left : left + width].permute(0, 3, 1, 2).double()
        images = F.interpolate(crop, size, mode="bilinear", align_corners=False) / 255
        if rows.grayscale[b]:
            images = rgb_to_grayscale(images).expand(-1, 3, -1, -1)
        if rows.jitter[b]:
            images = colour_jitter(images[None], rows.factors[b : b + 1], rows.order[b : b + 1])[0]
        if rows.flip[b]:
            images = images.flip(3)
        if rows.sigma[b] > 0:
            images = gaussian_blur(images[None], rows.sigma[b : b + 1])[0]
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        views.append(((images - mean) / std).transpose(0, 1))
    return torch.stack(views)


def float64_views(inputs: Inputs, yuv: bool) -> Views:
    """Views with a static view of one frame, which broadcasts."""
    params = inputs.host_params
    if yuv:
        planes = inputs.still_planes
        still = planes.select(np.s_[:, None])
        rgb = float64_augment(inputs.planes, params.clip, params.size)
        static = float64_augment(still, params.still, params.size)
    else:
        rgb = float64_augment(inputs.frames, params.clip, params.size)
        static = float64_augment(inputs.stills[:, None], params.still, params.size)
    return Views(rgb, static, rgb - torch.roll(rgb, 1, 2))


def error(views: Views, truth: Views) -> float:
    """The greatest of all. Raises ArithmeticError: not finite."""
    greatest = 0.0
    for view, true_view in zip(views, truth, strict=True):
        for b in range(view.shape[0]):  # clip by clip: in float64 they are large
            if not bool(view[b].isfinite().all()):
                raise ArithmeticError("the result is not finite")
            greatest = max(greatest, float((view[b].double() - true_view[b]).abs().max()))
    return greatest


# ------------------------------------------------------------------------------------------------------------------ bytes


def bytes_to_move(params: ViewParams, T: int, dtype: torch.dtype, yuv: bool = False) -> float:
    """Crop boxes of T frames of each clip and of each still, read once, and three views written once; rows on the CPU."""
    clip, still = (int((rows.box[:, 2] * rows.box[:, 3]).sum()) for rows in (params.clip, params.still))
    written = 3 * params.clip.box.shape[0] * T * 3 * math.prod(params.size) * dtype.itemsize
    return (clip * T + still) * (1.5 if yuv else 3) + written


# ---------------------------------------------------------------------------------------------------------------- measure


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Smooth shapes that drift, and noise, as frames have; a draw for every clip and every still."""
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


def to_yuv(frames: Tensor) -> Yuv420:  # (B, ..., H, W, 3)
    """Planes of BT.601 in full range; chroma of every second pixel."""
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


@torch.no_grad()
def measure(
    cell: Cell, names: Sequence[str], device: torch.device, repetitions: int, ceilings: Ceilings | None
) -> dict[str, Any]:
    """One row of the results. A provider that fails, for memory or else, has the reason in place of its numbers."""
    torch._dynamo.reset()  # every cell compiles for its own sizes, and must not meet the limit on recompilations
    inputs = make_inputs(cell, device)
    truths = {yuv: float64_views(inputs, yuv) for yuv in (False, True)}
    rounding = error(Views(*(view.to(cell.dtype) for view in truths[False])), truths[False])
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name in names:
        try:
            call = PROVIDERS[name](inputs, cell.dtype)
            views = call()
            found[name] = {"error": None if name in OWN_DRAW else error(views, truths["YUV" in name])}
            del views
            found[name]["peak_extra_bytes"] = harness.peak_extra_memory(call, device)
            calls[name] = call
        except Exception as failure:  # whatever it is: the other providers and cells are worth having
            found[name] = {"skipped": _reason(failure)}
    del truths

    for slow in (True, False):
        group = {name: call for name, call in calls.items() if (name in CLIP_BY_CLIP) == slow}
        times = {}
        try:
            if group and slow:
                times = harness.interleaved(group, device, max(repetitions // 5, 2), warmup=1)
            elif group:
                times = harness.interleaved(group, device, repetitions)
        except torch.OutOfMemoryError as failure:  # each fits alone, but not all graphs beside each other
            found |= {name: {"skipped": _reason(failure)} for name in group}
        for name, of_name in times.items():
            found[name] = asdict(of_name) | found[name] | {"share_of_bandwidth": None}
            if ceilings is not None:
                moved = bytes_to_move(inputs.host_params, cell.T, cell.dtype, yuv="YUV" in name)
                found[name]["share_of_bandwidth"] = moved / ceilings.bytes_per_second / (of_name.median_ms / 1e3)
    limits = {
        "bytes": bytes_to_move(inputs.host_params, cell.T, cell.dtype),
        "bytes_from_yuv": bytes_to_move(inputs.host_params, cell.T, cell.dtype, yuv=True),
        "rounding": rounding,
    }
    return asdict(cell) | limits | {"providers": found}


def _reason(failure: Exception) -> str:
    if isinstance(failure, NotAvailable):
        return str(failure)
    return harness.reason(failure)


# ----------------------------------------------------------------------------------------------------------------- report


def judge(rows: Sequence[dict[str, Any]], genuine: bool, step_ms: float | None) -> list[dict[str, Any]]:
    """Each goal in each precision, by the worst cell, with the worst at 128 clips beside it; and the share of a training step.

    Args:
        rows: what `measure` returned.
        genuine: ours were the kernels, on a GPU; otherwise no goal is judged.
        step_ms: a training step of 128 clips, from step.json; None if there is none.
    """
    verdicts: list[dict[str, Any]] = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        there = [row for row in rows if row["precision"] == precision]
        failed = [row for row in there if "skipped" in row["providers"].get("ours", {})]
        for goal in GOALS:
            verdict: dict[str, Any] = {"goal": goal.text, "precision": precision, "at_128": None, "worst": None}
            verdict |= {"worst_at": None, "verdict": "not measured on this device"}
            verdicts.append(verdict)
            if not genuine:
                continue
            if failed:
                verdict |= {"worst_at": str(_cell(failed[0])), "verdict": "not met: ours failed"}
                continue
            values = [(value, _cell(row)) for row in there if (value := _value(row, goal)) is not None]
            if not values:
                verdict["verdict"] = "not measured in this run"
                continue
            worst, cell = min(values, key=lambda pair: pair[0])
            verdict["at_128"] = min((value for value, cell in values if cell.B == GOAL_BATCH), default=None)
            verdict |= {"worst": worst, "worst_at": str(cell), "verdict": "met" if worst >= goal.least else "not met"}
    verdicts.append(_judge_step(rows, genuine, step_ms))
    return verdicts


def _judge_step(rows: Sequence[dict[str, Any]], genuine: bool, step_ms: float | None) -> dict[str, Any]:
    """A step makes the views of the query clips and of the key clips: two calls."""
    verdict: dict[str, Any] = {"goal": f"under {STEP_GOAL:.0%} of the training step at B 128", "precision": "bf16"}
    verdict |= {"at_128": None, "worst": None, "worst_at": None, "verdict": "not measured on this device"}
    there = [row for row in rows if (row["precision"], row["B"]) == ("bf16", GOAL_BATCH)]
    times = [
        (2 * ours["median_ms"], _cell(row))
        for row in there
        if "median_ms" in (ours := row["providers"].get("ours", {}))
    ]
    if not genuine:
        return verdict
    if not times:
        return verdict | {"verdict": "not measured in this run"}
    milliseconds, cell = max(times, key=lambda pair: pair[0])
    if step_ms is None:
        share = milliseconds / ESTIMATED_STEP_MS
        estimate = f"estimate: {share:.1%} of a step of {ESTIMATED_STEP_MS:.0f} ms, 530 samples a second"
        return verdict | {"worst_at": str(cell), "verdict": f"not measured: no step.json ({estimate})"}
    share = milliseconds / step_ms
    verdict |= {"at_128": share, "worst": share, "worst_at": str(cell)}
    return verdict | {"verdict": "met" if share < STEP_GOAL else "not met"}


def step_milliseconds(folder: Path) -> float | None:
    """Of a training step of 128 clips, as step.json in the device's folder has it."""
    path = folder / "step.json"
    value = json.loads(path.read_text()).get("milliseconds_per_step") if path.is_file() else None
    return float(value) if isinstance(value, int | float) else None


def _value(row: dict[str, Any], goal: Goal) -> float | None:
    ours = row["providers"].get("ours", {})
    if goal.against is None:
        return ours.get("share_of_bandwidth")
    times = [of_name.get("median_ms") for of_name in (row["providers"].get(goal.against, {}), ours)]
    return None if None in times else times[0] / times[1]


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in ("precision", "B", "T", "H", "W", "side")})


def cell_table(row: dict[str, Any]) -> str:
    """What was measured in one cell, a provider a line."""
    columns = ["provider", "ms (20 % to 80 %)", "share of the bandwidth", "peak extra memory", "error"]
    moved = f"{row['bytes'] / 1e6:.1f} MB must move, {row['bytes_from_yuv'] / 1e6:.1f} from YUV"
    lines = [
        f"{_cell(row)}: {moved}; rounding {row['rounding']:.1e}",
        "",
        harness.table_line(columns),
        "|" + "---|" * len(columns),
    ]
    for name, of_name in row["providers"].items():
        if "skipped" in of_name:
            lines.append(harness.table_line([name, f"skipped: {of_name['skipped']}", "", "", ""]))
            continue
        mark = " (no graph)" if of_name["captured"] is False else ""
        spread = f"{of_name['median_ms']:.3g} ({of_name['low_ms']:.3g} to {of_name['high_ms']:.3g}){mark}"
        share, peak, wrong = (of_name[key] for key in ("share_of_bandwidth", "peak_extra_bytes", "error"))
        share_text = "" if share is None else f"{share:.1%}"
        peak_text = "" if peak is None else f"{peak / 2**20:.0f} MiB"
        lines.append(
            harness.table_line([name, spread, share_text, peak_text, "own draw" if wrong is None else f"{wrong:.1e}"])
        )
    return "\n".join(lines)


def goal_table(verdicts: Sequence[dict[str, Any]]) -> str:
    columns = ["goal", "precision", "at B 128", "worst", "where", ""]
    lines = [harness.table_header(columns)]
    for verdict in verdicts:
        values = ["" if verdict[name] is None else f"{verdict[name]:.3g}" for name in ("at_128", "worst")]
        columns = [verdict["goal"], verdict["precision"], *values, verdict["worst_at"] or "", verdict["verdict"]]
        lines.append(harness.table_line(columns))
    return "\n".join(lines)


MARKERS = "o^sDv"


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], title: str, caption: str) -> Figure:
    """Milliseconds of each provider, a line for each B, a panel for each source size; of the precision of which most was measured."""
    counts = [row["precision"] for row in rows]
    precision = max(dict.fromkeys(counts), key=counts.count)
    rows = [row for row in rows if row["precision"] == precision]
    sources = list(dict.fromkeys(_cell(row).source for row in rows))
    batches = sorted({row["B"] for row in rows})
    height, with_floor = 0.8 / len(batches), False
    figure, panels = plt.subplots(
        1,
        len(sources),
        figsize=(3.5 + 4.5 * len(sources), 2.2 + 0.22 * len(names) * (1 + len(batches))),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for panel, source in zip(panels[0], sources, strict=True):
        for row in (row for row in rows if _cell(row).source == source):
            rank = batches.index(row["B"])
            for place, name in enumerate(names):
                of_name, y = row["providers"][name], place - 0.4 + height * (rank + 0.5)
                if "skipped" in of_name:
                    where = panel.get_yaxis_transform()  # x from 0 to 1 across the panel
                    panel.text(0.02, y, "skipped", va="center", fontsize=7, color="dimgray", transform=where)
                    continue
                low, median, high = (of_name[key] for key in ("low_ms", "median_ms", "high_ms"))
                colour = "tab:red" if name.startswith("ours") else "tab:blue"
                panel.plot([low, high], [y, y], color=colour, linewidth=1.5)
                panel.plot(median, y, MARKERS[rank % len(MARKERS)], color=colour, markersize=4.5)
                offset = {"xytext": (6, 0), "textcoords": "offset points"}
                panel.annotate(f"{median:.3g}", (high, y), va="center", fontsize=7, **offset)
                if (share := of_name["share_of_bandwidth"]) is not None:
                    panel.plot([share * median] * 2, [y - height / 2, y + height / 2], color="black", linewidth=1.2)
                    with_floor = True
        panel.set_title(f"from {source}", fontsize=10)
        panel.set_xlabel("milliseconds")
        panel.set_xscale("log")
        panel.margins(x=0.12)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="x", labelrotation=60, labelsize=8)
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_yticks(range(len(names)), names)
        for border in range(1, len(names)):
            panel.axhline(border - 0.5, color="lightgray", linewidth=0.6)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        plt.Line2D([], [], color="gray", marker=MARKERS[rank % len(MARKERS)], linestyle="", label=f"B = {B}")
        for rank, B in enumerate(batches)
    ]
    if with_floor:
        label = "the bytes at a copy's bandwidth"
        handles.append(plt.Line2D([], [], color="black", marker="|", linestyle="", markersize=10, label=label))
    figure.suptitle(f"{title}, {precision}", y=0.985)
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=len(handles), frameon=False, fontsize=9
    )
    figure.text(0.5, 0.012, caption, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.035 + 0.015 * caption.count("\n"), 1, 0.94))
    return figure


# ------------------------------------------------------------------------------------------------------------------- main


def plan(arguments: argparse.Namespace, kind: str) -> list[Cell]:
    """The cells to measure, large batches first."""
    T, side = VIEWS[kind]
    precisions = arguments.precision or PRECISIONS[kind][: 1 if arguments.quick else None]
    batches = sorted(arguments.batch_sizes or BATCH_SIZES[kind], reverse=True)
    cells = []
    for number, precision in enumerate(precisions):
        those = batches
        if arguments.quick:
            those = batches[:1]
        elif number > 0 and not arguments.precision:
            those = [B for B in batches if B == SECOND_BATCH] or batches[:1]
        cells += [Cell(precision=precision, B=B, T=T, H=H, W=W, side=side) for B in those for H, W in SOURCES[kind]]
    return cells


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=get_args(Output), help="each on the whole grid")
    parser.add_argument("--quick", action="store_true", help="the largest batch in bfloat16 only, fewer repetitions")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new cell is begun after that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the devices' folders")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    begin = time.monotonic()
    device, names = torch.device(arguments.device), arguments.providers
    repetitions = arguments.repetitions or (QUICK_REPETITIONS if arguments.quick else REPETITIONS[device.type])
    cells = plan(arguments, device.type)
    surroundings = environment(device)
    genuine = device.type == "cuda" and runs_triton(device)
    implementation = f"ours is: {describe(device)}"
    print(f"{surroundings['device']}, torch {surroundings['versions']['torch']}; {implementation}")
    ceilings = harness.ceilings(device)
    if ceilings is None:
        print("The ceilings of this device are not measured: no share of the bandwidth, no peak memory.")
    else:
        print(f"Measured ceiling: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s")

    print(f"Median of {repetitions}; of a fifth of that where clips are made one by one", flush=True)
    rows: list[dict[str, Any]] = []
    stopped, failed = None, False
    for cell in cells:
        if time.monotonic() - begin > 60 * arguments.minutes:
            stopped = f"{arguments.minutes:g} minutes were over"
            break
        try:
            rows.append(measure(cell, names, device, repetitions, ceilings))
        except RuntimeError as failure:  # after some errors a GPU does nothing more in this process
            stopped, failed = f"{cell}: {_reason(failure)}", True
            break
        print(f"\n{cell_table(rows[-1])}", flush=True)
    if not rows:
        raise SystemExit(f"nothing was measured: {stopped}")
    not_reached = [str(cell) for cell in cells[len(rows) :]]
    folder = harness.results_folder(device, arguments.results)
    step_ms = step_milliseconds(folder)
    verdicts = judge(rows, genuine, step_ms)
    print(f"\nGoals, stated for an H200: times as fast as the other, or shares\n\n{goal_table(verdicts)}\n")
    if stopped:
        print(f"stopped, {stopped}; not measured: {len(not_reached)} of {len(cells)} cells")

    content = {
        "question": "how fast are the three views made from decoded frames?",
        "command": harness.command("views", argv),
        "environment": surroundings,
        "implementation": implementation,
        "seconds": round(time.monotonic() - begin, 1),
        "recipe": asdict(PRETRAIN),
        "ceilings": None if ceilings is None else asdict(ceilings),
        "goals": verdicts,
        "step_ms": step_ms,
        "stopped": stopped,
        "not_reached": not_reached,
        "rows": rows,
    }
    name = "_".join(["views", *(arguments.precision or []), *(["quick"] if arguments.quick else [])])
    caption = (
        f"{surroundings['device']}, {surroundings['date'][:10]}, torch {surroundings['versions']['torch']}, "
        f"commit {surroundings['commit']}; {implementation}\nmedian, line: 20 to 80 %"
    )
    T, side = VIEWS[device.type]
    harness.write(folder, name, content, plot(rows, names, f"Three views of {T} x {side} x {side}", caption))
    print(f"Wrote {folder / name}.json and .png")
    if any("skipped" in row["providers"].get(ours, {}) for row in rows for ours in ("ours", "ours, from YUV")):
        raise SystemExit("ours failed somewhere: see above")
    if failed:
        raise SystemExit("an error stopped the run: see above")


if __name__ == "__main__":
    main()
