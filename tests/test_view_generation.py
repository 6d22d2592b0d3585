"""The reference and the Triton kernels of kernels/view_generation.py, compared with independent oracles.

The oracles are kornia's augmentation classes for colours, flip and blur, and NumPy for crop, resize, YUV and frame
difference. Without a GPU the kernels run in Triton's interpreter.
"""

import colorsys
import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from kornia.color import yuv420_to_rgb
from torch import Tensor

from dclr import kernels
from dclr.kernels import Augmentation, ViewParams, Views, Yuv420
from dclr.kernels.backend import HAS_TRITON, runs_triton
from dclr.kernels.colour import yuv_coefficients
from dclr.kernels.space_to_depth import depth_to_space
from dclr.kernels.types import AUGMENTATION, MEAN, STD, TABLE_COLUMNS, Boundary
from dclr.kernels.view_generation import generate_views_reference

# Oracles compute in float64. Each operation rounds a value of 0..1 by at most EPS / 2. The value is then divided by a
# standard deviation of 0.22 or more. At these sizes a mean over pixels adds no more than one such rounding error,
# whatever the order of its sums.
EPS = float(np.finfo(np.float32).eps)
ONE_OPERATION = 4 * EPS / min(STD)
# kornia's hue is an angle of up to 2 pi, with 8 times the rounding error: its float32 result is 7 EPS from its float64
# result.
HUE = 8 * EPS / min(STD)
ALL_STEPS = 2 * HUE  # contrast and saturation each multiply an error of hue by up to 1.4
WHOLE_CHAIN = 4 * ONE_OPERATION

WIDE, TALL, SMALL = (30, 41), (37, 24), (17, 23)  # height, width


_device = torch.device("cpu")  # device of the two functions below; the fixture `backend` sets it


@pytest.fixture
def backend(device: torch.device) -> Iterator[str]:
    """Run a test with the reference, with the interpreted kernels and, with `-m gpu`, with the kernels on a GPU."""
    global _device
    _device = device
    yield "triton" if runs_triton(device) else "reference"
    _device = torch.device("cpu")


@pytest.fixture
def triton(backend: str) -> None:
    if backend != "triton":
        pytest.skip("tests the kernels only")


def augment(frames: Tensor | Yuv420, *arguments: Any, **named: Any) -> Tensor:
    return kernels.augment(frames.to(_device), *arguments, **named).cpu()


def generate_views(frames: Tensor | Yuv420, stills: Tensor | Yuv420, *arguments: Any, **named: Any) -> Views:
    views = kernels.generate_views(frames.to(_device), stills.to(_device), *arguments, **named)
    return Views(*(view.cpu() for view in views))


def video(*shape: int, seed: int = 0) -> Tensor:
    """Return uint8 noise with black, white, red and grey patches, for which hue and saturation take other branches."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    pixels[..., :4, :6, :] = 0
    pixels[..., 4:8, :6, :] = 255
    pixels[..., 8:12, :6, :] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    pixels[..., 12:16, :6, :] = 128
    return pixels


def neutral(sizes: list[tuple[int, int]]) -> Augmentation:
    """Return the augmentation that keeps whole frames of the given heights and widths and changes nothing."""
    B = len(sizes)
    return Augmentation(
        size=torch.tensor(sizes),
        box=torch.tensor([(0, 0, height, width) for height, width in sizes]),
        flip=torch.zeros(B, dtype=torch.bool),
        grayscale=torch.zeros(B, dtype=torch.bool),
        jitter=torch.zeros(B, dtype=torch.bool),
        factors=torch.tensor([[1.0, 1.0, 1.0, 0.0]] * B),
        order=torch.tensor([[0, 1, 2, 3]] * B),
        sigma=torch.zeros(B),
        orientation=torch.zeros(B, dtype=torch.int64),
        additive=torch.zeros(B, dtype=torch.bool),
    )


def images_of(frames: Tensor) -> Tensor:
    """Convert uint8 (T, H, W, 3) to float64 (T, 3, H, W) in 0..1, the form that kornia uses."""
    return frames.permute(0, 3, 1, 2).double() / 255


def assert_close(got: Tensor, expected: Tensor, atol: float) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


def normalized(images: Tensor) -> Tensor:
    """Normalise images (T, 3, h, w) with kornia's class. Return (3, T, h, w)."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return K.Normalize(mean, std, p=1.0)(images).transpose(0, 1)


def kornia_jitter(images: Tensor, factors: list[float], order: list[int]) -> Tensor:
    jitter = K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)
    params = jitter.forward_parameters(images.shape)
    for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors, strict=True):
        params[f"{name}_factor"] = torch.full((len(images),), factor)
    params["order"] = torch.tensor(order)
    return jitter(images, params=params)


def kornia_blur(images: Tensor, sigma: float) -> Tensor:
    blur = K.RandomGaussianBlur((11, 11), (0.1, 2.0), p=1.0)
    params = blur.forward_parameters(images.shape)
    params["sigma"] = torch.full((len(images),), sigma)
    return blur(images, params=params)


def numpy_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) to (height, width, 3), float64, pixel by pixel. Bilinear, with half-pixel centres."""
    H, W = image.shape[:2]
    out = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * H / height - 0.5, 0)
            u = max((x + 0.5) * W / width - 0.5, 0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
            a, b = v - top, u - left
            above = (1 - b) * image[top, left] + b * image[top, right]
            below = (1 - b) * image[bottom, left] + b * image[bottom, right]
            out[y, x] = (1 - a) * above + a * below
    return out


@pytest.mark.parametrize(
    ("box", "size"),
    [
        pytest.param((0, 0, 30, 41), (30, 41), id="whole frame, no resize"),
        pytest.param((3, 5, 20, 30), (9, 13), id="smaller, odd"),
        pytest.param((22, 33, 8, 8), (21, 17), id="larger, from the bottom right corner"),
        pytest.param((7, 9, 1, 1), (5, 3), id="one pixel"),
        pytest.param((2, 4, 25, 3), (1, 1), id="to one pixel"),
    ],
)
def test_crop_and_resize(backend: str, box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    frames = video(1, 2, *WIDE, 3)
    top, left, height, width = box
    got = augment(frames, replace(neutral([WIDE]), box=torch.tensor([box])), size)
    assert got.shape == (1, 3, 2, *size)
    for t in range(2):
        crop = frames[0, t, top : top + height, left : left + width].double().numpy() / 255
        expected = (numpy_resize(crop, *size) - MEAN) / STD
        # Source coordinates are float32 too. They are up to 41, so their error is 41 times that of a weight.
        np.testing.assert_allclose(got[0, :, t].permute(1, 2, 0), expected, rtol=0, atol=41 * ONE_OPERATION)


def test_grayscale(backend: str) -> None:
    frames = video(1, 3, *WIDE, 3)
    got = augment(frames, replace(neutral([WIDE]), grayscale=torch.tensor([True])), WIDE)
    expected = normalized(K.RandomGrayscale(p=1.0)(images_of(frames[0])))
    assert_close(got[0], expected, ONE_OPERATION)


def test_flip(backend: str) -> None:
    frames = video(1, 3, *WIDE, 3)
    got = augment(frames, replace(neutral([WIDE]), flip=torch.tensor([True])), WIDE)
    expected = normalized(K.RandomHorizontalFlip(p=1.0)(images_of(frames[0])))
    assert_close(got[0], expected, ONE_OPERATION)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(backend: str, sigma: float) -> None:
    frames = video(1, 3, *WIDE, 3)
    got = augment(frames, replace(neutral([WIDE]), sigma=torch.tensor([sigma])), WIDE)
    expected = normalized(kornia_blur(images_of(frames[0]), sigma))
    assert_close(got[0], expected, WHOLE_CHAIN)  # a sum of 11 products, twice


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param([1.4, 1.0, 1.0, 0.0], id="brightness"),
        pytest.param([1.0, 0.6, 1.0, 0.0], id="contrast"),
        pytest.param([1.0, 1.0, 1.4, 0.0], id="saturation"),
        pytest.param([1.0, 1.0, 1.0, -0.1], id="hue"),
        pytest.param([0.6, 1.4, 1.3, 0.1], id="all four"),
        pytest.param([1.0, 1.0, 1.0, 0.0], id="neutral"),
        pytest.param([1.0, 1.0, 1.0, 0.5], id="hue to the opposite, both ends of its range"),
        pytest.param([0.0, 1.0, 1.0, -0.5], id="brightness to black"),
    ],
)
@pytest.mark.parametrize(
    "order",
    [
        pytest.param([0, 1, 2, 3], id="as named"),
        pytest.param([3, 2, 1, 0], id="reversed"),
        pytest.param([1, 3, 0, 2], id="contrast first, no step before the mean"),
    ],
)
def test_jitter(backend: str, factors: list[float], order: list[int]) -> None:
    frames = video(1, 2, *SMALL, 3)
    rows = replace(
        neutral([SMALL]),
        jitter=torch.tensor([True]),
        factors=torch.tensor([factors]),
        order=torch.tensor([order]),
    )
    expected = normalized(kornia_jitter(images_of(frames[0]), factors, order))
    tolerance = ONE_OPERATION if factors[3] == 0 else HUE if factors[:3] == [1, 1, 1] else ALL_STEPS
    assert_close(augment(frames, rows, SMALL)[0], expected, tolerance)
    # Without the flag, factors and order are not used.
    unused = augment(frames, replace(rows, jitter=torch.tensor([False])), SMALL)
    assert torch.equal(unused, augment(frames, neutral([SMALL]), SMALL))


def test_all_orders_of_the_jitter_steps(backend: str) -> None:
    """A batch of 24 clips has one clip of each order. A program must not use the order of another clip."""
    orders = list(itertools.permutations(range(4)))
    size, factors = (4, 10), [1.3, 0.7, 1.4, 0.08]
    frames = video(1, 1, *size, 3).expand(24, -1, -1, -1, -1)
    rows = replace(
        neutral([size] * 24),
        jitter=torch.ones(24, dtype=torch.bool),
        factors=torch.tensor([factors] * 24),
        order=torch.tensor(orders),
    )
    got = augment(frames, rows, size)
    for b, order in enumerate(orders):
        expected = normalized(kornia_jitter(images_of(frames[b]), factors, list(order)))
        assert_close(got[b], expected, ALL_STEPS)


def jitter_of_hsv(images: Tensor, factors: list[float], order: list[int]) -> Tensor:
    """Jitter images (T, 3, h, w) in the additive form, pixel by pixel in float64. colorsys computes HSV."""
    brightness, contrast, saturation, hue = factors

    def jitter(pixel: np.ndarray) -> np.ndarray:
        for step in order:
            if step == 0:
                pixel = np.clip(pixel + (brightness - 1), 0, 1)
            elif step == 1:
                pixel = np.clip(contrast * pixel, 0, 1)
            else:
                h, s, v = colorsys.rgb_to_hsv(*pixel)
                h, s = ((h + hue) % 1, s) if step == 3 else (h, min(saturation * s, 1))
                pixel = np.array(colorsys.hsv_to_rgb(h, s, v))
        return pixel

    return torch.from_numpy(np.apply_along_axis(jitter, 1, images.numpy()))


def test_additive_jitter(backend: str) -> None:
    """Each step is once at each position. Some factors clamp the saturation to 1, and colours to 0 and 1."""
    orders = [(0, 1, 2, 3), (1, 3, 0, 2), (2, 0, 3, 1), (3, 2, 1, 0), (2, 3, 0, 1), (0, 2, 1, 3)]
    factors = [[1.3, 0.7, 1.4, 0.08], [0.5, 1.9, 3.0, -0.1], [0.8, 0.6, 0.5, 0.0]]
    size, B = (6, 8), len(orders)
    frames = video(B, 1, *size, 3)
    rows = replace(
        neutral([size] * B),
        jitter=torch.ones(B, dtype=torch.bool),
        factors=torch.tensor([factors[b % 3] for b in range(B)]),
        order=torch.tensor(orders),
        sigma=torch.where(torch.arange(B) == 4, 0.8, 0.0),
        additive=torch.arange(B) != 5,  # a batch may have clips of both forms
    )
    got = augment(frames, rows, size)
    for b, order in enumerate(orders):
        jitter = jitter_of_hsv if rows.additive[b] else kornia_jitter
        images = jitter(images_of(frames[b]), factors[b % 3], list(order))
        images = kornia_blur(images, 0.8) if b == 4 else images
        # Contrast and saturation multiply an error by up to 1.9 * 3.
        assert_close(got[b], normalized(images), 6 * ALL_STEPS)


def two_clips() -> tuple[Tensor, Augmentation]:
    """Return two clips of different size in one buffer: one in colour with blur, one in grey without blur."""
    frames = torch.full((2, 3, 40, 44, 3), 77, dtype=torch.uint8)  # 77 is padding that no view may contain
    frames[0, :, : WIDE[0], : WIDE[1]] = video(3, *WIDE, 3, seed=1)
    frames[1, :, : TALL[0], : TALL[1]] = video(3, *TALL, 3, seed=2)
    rows = Augmentation(
        size=torch.tensor([WIDE, TALL]),
        box=torch.tensor([[2, 1, 25, 40], [0, 4, 37, 20]]),
        flip=torch.tensor([True, False]),
        grayscale=torch.tensor([False, True]),
        jitter=torch.tensor([True, True]),
        factors=torch.tensor([[0.7, 1.3, 1.4, 0.08], [1.2, 0.8, 0.6, -0.1]]),
        order=torch.tensor([[2, 0, 3, 1], [1, 3, 2, 0]]),
        sigma=torch.tensor([0.9, 0.0]),
        orientation=torch.zeros(2, dtype=torch.int64),
        additive=torch.zeros(2, dtype=torch.bool),
    )
    return frames, rows


def test_whole_chain(backend: str) -> None:
    frames, rows = two_clips()
    got = augment(frames, rows, (8, 11))
    for b in range(2):
        top, left, height, width = rows.box[b].tolist()
        images = images_of(frames[b, :, top : top + height, left : left + width])
        images = torch.nn.functional.interpolate(images, (8, 11), mode="bilinear", align_corners=False)
        if rows.grayscale[b]:
            images = K.RandomGrayscale(p=1.0)(images)
        images = kornia_jitter(images, rows.factors[b].tolist(), rows.order[b].tolist())
        if rows.flip[b]:
            images = K.RandomHorizontalFlip(p=1.0)(images)
        if rows.sigma[b] > 0:
            images = kornia_blur(images, float(rows.sigma[b]))
        assert_close(got[b], normalized(images), WHOLE_CHAIN)


def test_clips_of_different_sizes_equal_themselves_alone(backend: str) -> None:
    frames, rows = two_clips()
    frames = frames[:, :2]
    together = augment(frames, rows, (8, 11))
    for b, (height, width) in enumerate((WIDE, TALL)):
        row = Augmentation(*(getattr(rows, name)[b : b + 1] for name in Augmentation.__dataclass_fields__))
        alone = augment(frames[b : b + 1, :, :height, :width], row, (8, 11))
        assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize("yuv", [False, True], ids=["RGB", "YUV"])
def test_turned_and_mirrored_clips(backend: str, yuv: bool) -> None:
    """Eight clips of odd size, one of each orientation, with another flip, blur, colours and box each.

    The oracle turns the crop as an array, before it resizes it. Chroma is repeated before the turn.
    """
    H, W, size = 17, 23, (8, 11)
    source: Tensor | Yuv420 = yuv_video(H, W, B=8, T=1) if yuv else video(8, 1, H, W, 3)
    rng = np.random.default_rng(0)
    boxes = torch.tensor(
        [(top, 5 - top, 9 + top, 18) for top in range(5)] + [(1, 1, 15, 7), (0, 3, 17, 19), (16, 22, 1, 1)]
    )
    rows = replace(
        neutral([(H, W)] * 8),
        box=boxes,
        orientation=torch.arange(8),
        flip=torch.tensor([b in (1, 2, 5, 7) for b in range(8)]),
        sigma=torch.tensor([0.0, 0.8, 1.4] * 3)[:8],
        jitter=torch.tensor([b % 2 == 0 for b in range(8)]),
        factors=torch.from_numpy(rng.uniform(0.7, 1.3, (8, 4)) - [0, 0, 0, 1]).float().clamp(-0.1, 1.3),
        order=torch.from_numpy(np.stack([rng.permutation(4) for _ in range(8)])),
    )
    got = augment(source, rows, size)
    for b in range(8):
        top, left, height, width = rows.box[b].tolist()
        rgb = numpy_rgb(source, b) if isinstance(source, Yuv420) else source[b].double().numpy() / 255
        crop = np.rot90(rgb[:, top : top + height, left : left + width], -(b % 4), axes=(1, 2))
        crop = crop[:, :, ::-1] if b >= 4 else crop
        images = torch.from_numpy(crop.copy()).permute(0, 3, 1, 2)
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        if rows.jitter[b]:
            images = kornia_jitter(images, rows.factors[b].tolist(), rows.order[b].tolist())
        if rows.flip[b]:
            images = K.RandomHorizontalFlip(p=1.0)(images)
        if rows.sigma[b] > 0:
            images = kornia_blur(images, float(rows.sigma[b]))
        assert_close(got[b], normalized(images), 2 * WHOLE_CHAIN)


def upright_clip() -> tuple[Tensor, Tensor, ViewParams]:
    frames, stills, params = small_batch()
    clip, still = (
        Augmentation(*(getattr(rows, field.name)[:1] for field in fields(rows))) for rows in (params.clip, params.still)
    )
    return frames[:1, :, :30, :41], stills[:1], ViewParams(clip, still, (8, 10))


@cache
def upright_views(device: torch.device, backend: str) -> Views:
    """Return the views of the upright clip. The arguments say where and how they are computed."""
    return generate_views(*upright_clip())


@pytest.mark.parametrize("orientation", range(8))
def test_views_of_a_turned_clip_are_those_of_the_upright_clip(backend: str, orientation: int) -> None:
    """Frames, still and boxes are turned back together. Views must not change, down to the rounding of the resize."""
    frames, stills, params = upright_clip()
    clip, still = params.clip, params.still
    lying = []
    for images, rows in ((frames, clip), (stills[:, None], still)):
        marked = torch.zeros(images.shape[2:4])
        top, left, height, width = rows.box[0].tolist()
        marked[top : top + height, left : left + width] = 1
        turn = lambda image: torch.rot90(image.flip(1) if orientation & 4 else image, orientation & 3, dims=(0, 1))  # noqa: E731
        rows_in, columns_in = (turn(marked).amax(axis).nonzero()[:, 0] for axis in (1, 0))
        box = [rows_in.min(), columns_in.min(), len(rows_in), len(columns_in)]
        coded = torch.stack([turn(image) for image in images[0]])[None]
        turned = replace(rows, size=torch.tensor([coded.shape[2:4]]), box=torch.tensor([box]))
        lying.append((coded, replace(turned, orientation=torch.tensor([orientation]))))
    (frames, clip), (stills, still) = lying
    got = generate_views(frames, stills[:, 0], ViewParams(clip, still, (8, 10)))
    for view, same in zip(got, upright_views(_device, backend), strict=True):
        torch.testing.assert_close(view, same, rtol=0, atol=41 * ONE_OPERATION)


def test_every_frame_has_the_same_parameters(backend: str) -> None:
    frames, rows = two_clips()
    frames[:] = frames[:, :1].clone()
    view = augment(frames, rows, (7, 7))
    assert torch.equal(view, view[:, :, :1].expand_as(view))


def test_blur_of_a_view_smaller_than_the_kernel(backend: str) -> None:
    """A mirrored border needs 6 pixels.

    With 6 pixels kornia's class agrees. With 5 or fewer the border pixel repeats.
    """
    frames = video(1, 2, 6, 9, 3)
    rows = replace(neutral([(6, 9)]), sigma=torch.tensor([1.5]))
    expected = normalized(kornia_blur(images_of(frames[0]), 1.5))
    assert_close(augment(frames, rows, (6, 9))[0], expected, WHOLE_CHAIN)

    weights = np.exp(-(np.arange(-5.0, 6) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    small = frames[:, :, 3:, 4:].contiguous()  # 3 x 5 pixels, some of them noise
    got = augment(small, replace(neutral([(3, 5)]), sigma=torch.tensor([1.5])), (3, 5))
    padded = np.pad(small[0].double().numpy() / 255, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="edge")
    rows_blurred = sum(weights[i] * padded[:, i : i + 3] for i in range(11))
    blurred = sum(weights[i] * rows_blurred[:, :, i : i + 5] for i in range(11))
    np.testing.assert_allclose(got[0].permute(1, 2, 3, 0), (blurred - MEAN) / STD, rtol=0, atol=WHOLE_CHAIN)


@pytest.mark.parametrize(
    ("boundary", "T"), [("wrap", 3), ("zero", 2), ("replicate", 2), ("wrap", 1), ("zero", 1), ("replicate", 1)]
)
def test_generate_views(backend: str, boundary: Boundary, T: int) -> None:
    frames, rows = two_clips()
    stills, still_rows = video(2, 20, 26, 3, seed=9), neutral([(20, 26), (15, 11)])
    params = ViewParams(clip=rows, still=still_rows, size=(6, 9))
    views = generate_views(frames[:, :T], stills, params, boundary=boundary)

    assert torch.equal(views.rgb, augment(frames[:, :T], rows, (6, 9)))

    still = augment(stills[:, None], still_rows, (6, 9))
    for t in range(T):
        assert torch.equal(views.static[:, :, t], still[:, :, 0])

    v = views.rgb.numpy()
    d = np.zeros_like(v)
    for t in range(1, T):
        d[:, :, t] = v[:, :, t] - v[:, :, t - 1]
    if boundary == "wrap":
        d[:, :, 0] = v[:, :, 0] - v[:, :, T - 1]
    if boundary == "replicate" and T > 1:
        d[:, :, 0] = d[:, :, 1]
    if backend == "reference":
        np.testing.assert_array_equal(views.dynamic, d)
    else:  # on a GPU a fused multiply-add may round once less
        np.testing.assert_allclose(views.dynamic, d, rtol=0, atol=ONE_OPERATION)

    for view in views:
        assert view.shape == (2, 3, T, 6, 9)
        assert view.stride(1) == 1  # channels are innermost; is_contiguous does not decide this for T = 1
        assert not view.requires_grad
    for view in (views.rgb, views.static[:, :, :1], views.dynamic):
        assert view.is_contiguous(memory_format=torch.channels_last_3d)
    assert T == 1 or views.static.stride(2) == 0  # one frame in memory


def test_bfloat16_is_float32_rounded_once(backend: str) -> None:
    frames, rows = two_clips()
    stills, still_rows = video(2, 20, 26, 3, seed=9), neutral([(20, 26), (15, 11)])
    params = ViewParams(clip=rows, still=still_rows, size=(8, 7))
    frames = frames[:, :2]
    exact = generate_views(frames, stills, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not change the arithmetic
        rounded = generate_views(frames, stills, params, dtype=torch.bfloat16)
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected.bfloat16())
    for view in (rounded.rgb, rounded.static[:, :, :1], rounded.dynamic):
        assert view.is_contiguous(memory_format=torch.channels_last_3d)


def test_params_move() -> None:
    _, rows = two_clips()
    moved = ViewParams(clip=rows, still=neutral([(5, 6)]), size=(3, 4)).to("meta", non_blocking=True)
    assert moved.size == (3, 4)
    assert {moved.clip.box.device.type, moved.still.sigma.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("box", [0, 0, 31, 41], r"clip 1: box \(top 0, left 0, height 31, width 41\) must be within the valid 30 x 41"),
        ("box", [0, 1, 30, 41], "clip 1: box"),
        ("box", [-1, 0, 5, 5], "clip 1: box"),
        ("box", [0, -1, 5, 5], "clip 1: box"),
        ("box", [3, 3, 0, 5], "clip 1: box"),
        ("box", [3, 3, 5, 0], "clip 1: box"),
        ("size", [33, 41], "clip 1: valid size 33 x 41 must be within the 32 x 44 buffer"),
        ("size", [30, 45], "clip 1: valid size 30 x 45"),
        ("order", [0, 1, 2, 2], r"clip 1: order \[0, 1, 2, 2\] must be a permutation"),
        ("sigma", -1.0, "clip 1: sigma -1.0"),
        ("sigma", float("nan"), "clip 1: sigma nan"),
        ("orientation", 8, "clip 1: orientation 8 must be 0 to 7"),
        ("orientation", -1, "clip 1: orientation -1 must be 0 to 7"),
    ],
)
def test_a_row_that_cannot_be_applied_is_named(field: str, value: object, message: str) -> None:
    frames = torch.zeros(2, 1, 32, 44, 3, dtype=torch.uint8)
    rows = neutral([WIDE, WIDE])
    augment(frames, rows, (8, 8))  # valid before the change
    getattr(rows, field)[1] = torch.as_tensor(value)
    with pytest.raises(ValueError, match=message):
        augment(frames, rows, (8, 8))


def test_other_errors(backend: str) -> None:
    frames, rows = torch.zeros(2, 1, 32, 44, 3, dtype=torch.uint8), neutral([WIDE, WIDE])
    with pytest.raises(TypeError, match="frames must be uint8"):
        augment(frames.float(), rows, (8, 8))
    with pytest.raises(ValueError, match=r"frames must be \(B, T, H, W, 3\)"):
        augment(frames[0], rows, (8, 8))
    with pytest.raises(ValueError, match=r"augmentation\.size must have one row for each of 2 clips"):
        augment(frames, neutral([WIDE]), (8, 8))
    with pytest.raises(ValueError, match="size must be"):
        augment(frames, rows, (0, 8))
    params = ViewParams(clip=rows, still=rows, size=(8, 8))
    with pytest.raises(ValueError, match="stills must be"):
        generate_views(frames, frames[:1, 0], params)
    outside = replace(rows, box=torch.tensor([[0, 0, 8, 8], [30, 0, 3, 8]]))
    with pytest.raises(ValueError, match="still 1: box"):
        generate_views(frames, frames[:, 0], ViewParams(clip=rows, still=outside, size=(8, 8)))
    with pytest.raises(ValueError, match="boundary must be"):
        generate_views(frames, frames[:, 0], params, boundary="mirror")  # type: ignore[arg-type]


# ---------------------------------------------------------------- YUV


def yuv_video(H: int, W: int, B: int = 2, T: int = 2, seed: int = 0, bt709: bool = False, full: bool = True) -> Yuv420:
    """Return noise in all planes. Some of its colours are far outside the range of RGB."""
    rng = torch.Generator().manual_seed(seed)
    half = (B, T, (H + 1) // 2, (W + 1) // 2)
    y = torch.randint(0, 256, (B, T, H, W), generator=rng, dtype=torch.uint8)
    u, v = (torch.randint(0, 256, half, generator=rng, dtype=torch.uint8) for _ in range(2))
    return Yuv420(y, u, v, torch.full((B,), bt709), torch.full((B,), full))


def numpy_rgb(frames: Yuv420, b: int) -> np.ndarray:
    """Return clip b as RGB, (T, H, W, 3) float64 in 0..1. It inverts the standards' matrix from RGB to Y, Cb, Cr."""
    kr, kb = (0.2126, 0.0722) if frames.bt709[b] else (0.299, 0.114)
    luma = np.array([kr, 1 - kr - kb, kb])
    to_yuv = np.stack([luma, ([0, 0, 1] - luma) / (2 * (1 - kb)), ([1, 0, 0] - luma) / (2 * (1 - kr))])
    H, W = frames.y.shape[2:]
    planes = [frames.y[b].double().numpy()]
    for plane in (frames.u[b], frames.v[b]):
        planes.append(plane.double().numpy().repeat(2, axis=1).repeat(2, axis=2)[:, :H, :W])
    yuv = np.stack(planes, axis=-1)
    yuv = (yuv - [0, 128, 128]) / 255 if frames.full_range[b] else (yuv - [16, 128, 128]) / [219, 224, 224]
    return (yuv @ np.linalg.inv(to_yuv).T).clip(0, 1)


@pytest.mark.parametrize("bt709", [False, True], ids=["BT.601", "BT.709"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("H", "W"), [pytest.param(12, 16, id="even"), pytest.param(11, 15, id="odd, the last chroma square is cut off")]
)
def test_yuv(backend: str, bt709: bool, full: bool, H: int, W: int) -> None:
    frames = yuv_video(H, W, bt709=bt709, full=full)
    got = augment(frames, neutral([(H, W)] * 2), (H, W))
    for b in range(2):
        expected = normalized(torch.from_numpy(numpy_rgb(frames, b)).permute(0, 3, 1, 2))
        assert_close(got[b], expected, 2 * ONE_OPERATION)  # chroma is weighted by up to 2.1


def test_yuv_of_full_range_bt601_is_kornias() -> None:
    """kornia's U and V are those of BT.470. They reach 0.436 and 0.615, while Cb and Cr reach 0.5.

    kornia's matrix has three decimals.
    """
    frames = yuv_video(12, 16)
    uv = torch.stack([frames.u[0], frames.v[0]], dim=1).double() - 128  # (T, 2, 6, 8)
    scale = torch.tensor([0.436, 0.615]).double().view(2, 1, 1) * 2 / 255
    expected = yuv420_to_rgb(frames.y[0, :, None].double() / 255, uv * scale).clamp(0, 1)
    got = augment(frames, neutral([(12, 16)] * 2), (12, 16))[0]
    assert_close(got, normalized(expected), 3e-3 / min(STD))


def test_yuv_goes_through_the_whole_chain(backend: str) -> None:
    """The boxes begin at odd rows and columns, each clip has its own matrix, and the stills have another size."""
    frames, stills = yuv_video(21, 27, seed=3), yuv_video(15, 18, seed=4)
    frames.bt709[1], frames.full_range[0] = True, False
    stills = replace(stills.select(np.s_[:, 0]), full_range=~stills.full_range)
    rows = two_clips()[1]
    rows.size[:], rows.box[:] = torch.tensor([21, 27]), torch.tensor([[1, 3, 17, 21], [0, 5, 21, 22]])
    params = ViewParams(rows, neutral([(15, 18)] * 2), (7, 9))
    got = generate_views(frames, stills, params)
    rgb = torch.stack([torch.from_numpy(numpy_rgb(frames, b)) for b in range(2)])  # (B, T, H, W, 3)
    for b in range(2):
        top, left, height, width = rows.box[b].tolist()
        images = rgb[b, :, top : top + height, left : left + width].permute(0, 3, 1, 2)
        images = torch.nn.functional.interpolate(images, (7, 9), mode="bilinear", align_corners=False)
        if rows.grayscale[b]:
            images = K.RandomGrayscale(p=1.0)(images)
        images = kornia_jitter(images, rows.factors[b].tolist(), rows.order[b].tolist())
        if rows.flip[b]:
            images = K.RandomHorizontalFlip(p=1.0)(images)
        if rows.sigma[b] > 0:
            images = kornia_blur(images, float(rows.sigma[b]))
        assert_close(got.rgb[b], normalized(images), 2 * WHOLE_CHAIN)
    assert (got.static == got.static[:, :, :1]).all()


@pytest.mark.parametrize(
    ("yuv", "size"),
    [
        pytest.param(False, (12, 13), id="RGB, smaller"),
        pytest.param(True, (12, 13), id="YUV, smaller"),
        pytest.param(False, (18, 17), id="RGB, larger"),
        pytest.param(False, (1, 1), id="RGB, one pixel"),
    ],
)
def test_mean_before_contrast(backend: str, yuv: bool, size: tuple[int, int]) -> None:
    """A contrast of 0 leaves nothing but the mean luma. Each clip has another orientation and other steps before it.

    The steps before contrast multiply the mean luma in all clips but the last. The kernels then sum over source rows if
    a crop has at most twice as many rows as the view.
    """
    factors, orders = zip(
        ([1.0, 0.0, 1.0, 0.0], [1, 3, 0, 2]),
        ([0.6, 0.0, 1.0, 0.0], [0, 1, 2, 3]),
        ([0.5, 0.0, 0.7, 0.0], [2, 0, 1, 3]),
        ([0.8, 0.0, 1.4, 0.1], [3, 2, 0, 1]),  # the clip is grey
        ([1.0, 0.0, 1.0, 0.0], [0, 2, 3, 1]),
        ([1.4, 0.0, 1.0, 0.0], [0, 1, 2, 3]),
        strict=True,
    )
    boxes = [(0, 0, 17, 23), (1, 3, 15, 16), (5, 2, 2, 9), (3, 4, 11, 1), (16, 22, 1, 1), (0, 0, 17, 22)]
    B = len(boxes)
    rows = replace(
        neutral([SMALL] * B),
        box=torch.tensor(boxes),
        grayscale=torch.arange(B) == 3,
        jitter=torch.ones(B, dtype=torch.bool),
        factors=torch.tensor(factors),
        order=torch.tensor(orders),
        orientation=torch.arange(B),
    )
    source: Tensor | Yuv420 = yuv_video(*SMALL, B=B, T=1) if yuv else video(B, 1, *SMALL, 3)
    got = augment(source, rows, size)
    for b in range(B):
        top, left, height, width = rows.box[b].tolist()
        rgb = numpy_rgb(source, b) if isinstance(source, Yuv420) else source[b].double().numpy() / 255
        crop = np.rot90(rgb[0, top : top + height, left : left + width], -(b % 4))
        image = torch.from_numpy(numpy_resize(crop[:, ::-1] if b >= 4 else crop, *size)).permute(2, 0, 1)[None]
        if rows.grayscale[b]:
            image = K.RandomGrayscale(p=1.0)(image)
        assert_close(got[b], normalized(kornia_jitter(image, factors[b], orders[b])), WHOLE_CHAIN)


def test_yuv_refuses_by_name() -> None:
    frames, rows = yuv_video(11, 15), neutral([(11, 15)] * 2)
    with pytest.raises(ValueError, match=r"u must be \(2, 2, 6, 8\), half of y"):
        augment(replace(frames, u=frames.u[:, :, :5]), rows, (8, 8))
    with pytest.raises(TypeError, match="v must be uint8"):
        augment(replace(frames, v=frames.v.float()), rows, (8, 8))
    with pytest.raises(ValueError, match=r"bt709 must be \(2,\) bool"):
        augment(replace(frames, bt709=frames.bt709[:1]), rows, (8, 8))
    with pytest.raises(ValueError, match="y must be"):
        augment(replace(frames, y=frames.y[0]), rows, (8, 8))
    with pytest.raises(ValueError, match="both be RGB or both be YUV"):
        generate_views(frames, torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ViewParams(rows, rows, (8, 8)))


# ---------------------------------------------------------------- Triton


def small_batch(T: int = 2) -> tuple[Tensor, Tensor, ViewParams]:
    """Return two clips with every operation, one of them blurred, and their stills."""
    frames, rows = two_clips()
    stills, still_rows = video(2, 20, 26, 3, seed=9), neutral([(20, 26), (15, 11)])
    still_rows.sigma[0], still_rows.jitter[1] = 0.9, True
    still_rows.factors[1] = torch.tensor([1.2, 0.8, 1.1, 0.05])
    return frames[:, :T], stills, ViewParams(rows, still_rows, (8, 10))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("boundary", "size", "T"),
    [
        pytest.param("wrap", (8, 10), 2, id="usual"),
        pytest.param("zero", (3, 130), 1, id="too few rows to mirror, wider than a program's columns"),
        pytest.param("replicate", (60, 2), 1, id="more rows than a program's, no second frame"),
    ],
)
def test_triton_agrees_with_the_reference(boundary: Boundary, size: tuple[int, int], T: int) -> None:
    frames, stills, params = small_batch(T)
    params = replace(params, size=size)
    expected = generate_views_reference(frames, stills, params, boundary=boundary)
    got = generate_views(frames, stills, params, boundary=boundary)
    for view, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(view, reference, rtol=0, atol=WHOLE_CHAIN)
        assert view.stride() == reference.stride()


def blocks_by_hand(view: Tensor) -> Tensor:
    """Return the blocks (B, 16, T, ceil(h / 2) + 3, ceil(w / 2) + 3) of a view, pixel by pixel."""
    B, _, T, h, w = view.shape
    blocks = torch.zeros(B, 16, T, (h + 1) // 2 + 3, (w + 1) // 2 + 3, dtype=view.dtype)
    for y, x in itertools.product(range(h), range(w)):
        first = (y % 2 * 2 + x % 2) * 3
        blocks[:, first : first + 3, :, (y + 4) // 2, (x + 4) // 2] = view[..., y, x]
    return blocks


@pytest.mark.parametrize(
    ("boundary", "size", "T", "dtype"),
    [
        pytest.param("wrap", (7, 10), 2, torch.float32, id="odd height"),
        pytest.param("zero", (6, 9), 2, torch.bfloat16, id="odd width"),
        pytest.param("replicate", (1, 1), 2, torch.bfloat16, id="one pixel"),
        pytest.param("replicate", (24, 26), 1, torch.float32, id="several programs, one frame"),
    ],
)
def test_views_as_blocks(
    backend: str,
    boundary: Boundary,
    size: tuple[int, int],
    T: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames, stills, params = small_batch(T)
    params = replace(params, size=size)
    plain = generate_views(frames, stills, params, boundary=boundary, dtype=dtype)
    if backend == "triton":  # a value that is not written shows
        from dclr.kernels import view_generation_triton

        empty = view_generation_triton._empty_view
        monkeypatch.setattr(
            view_generation_triton, "_empty_view", lambda *arguments: empty(*arguments).fill_(torch.nan)
        )
    blocks = generate_views(frames, stills, params, boundary=boundary, dtype=dtype, blocks=True)
    for got, view in zip(blocks, plain, strict=True):
        assert torch.equal(got, blocks_by_hand(view))
        assert got.stride(1) == 1
        assert torch.equal(depth_to_space(got, size), view)
    assert T == 1 or blocks.static.stride(2) == 0


def test_padding_is_not_seen_and_sums_are_in_a_fixed_order(backend: str) -> None:
    """A second run with other padding gives the same bits."""
    frames, stills, params = small_batch()
    expected = generate_views(frames, stills, params)
    poisoned = frames.clone()
    for b, (height, width) in enumerate((WIDE, TALL)):
        poisoned[b, :, height:] = 255
        poisoned[b, :, :, width:] = 255
    for view, same in zip(generate_views(poisoned, stills, params), expected, strict=True):
        assert torch.equal(view, same)


@pytest.mark.usefixtures("triton")
def test_a_row_that_is_not_checked_reads_within_the_buffer() -> None:
    """The frame lies in the middle of a white buffer, so a read outside the frame would show."""
    buffer = torch.full((3, 1, 6, 7, 3), 255, dtype=torch.uint8)
    buffer[1] = 0
    rows = replace(neutral([(6, 7)]), box=torch.tensor([[-50, 900, 70, -3]]))
    view = augment(buffer[1:2], rows, (5, 4), check_rows=False)
    with pytest.raises(ValueError, match="clip 0: box"):
        augment(buffer[1:2], rows, (5, 4), check_rows=True)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(view, black.view(1, 3, 1, 1, 1).expand(1, 3, 1, 5, 4), rtol=0, atol=ONE_OPERATION)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("yuv", [False, True], ids=["RGB", "YUV"])
def test_registered_operators(yuv: bool) -> None:
    from dclr.kernels.view_generation_triton import augment_op, generate_views_op

    planes = (video(1, 1, 8, 9, 3), None, None)
    stills = (video(1, 7, 6, 3), None, None)
    if yuv:
        source = yuv_video(8, 9, B=1, T=1)
        planes = stills = (source.y, source.u, source.v)
        stills = (source.y[:, 0], source.u[:, 0], source.v[:, 0])
    table = torch.zeros(2, 24 if yuv else 18)
    table[:, 2:4] = torch.tensor([5.0, 6.0])
    planes, stills = (tuple(None if t is None else t.to(_device) for t in each) for each in (planes, stills))
    table = table.to(_device)
    for blocks in (False, True):
        torch.library.opcheck(generate_views_op, (*planes, *stills, table, 4, 5, "wrap", torch.bfloat16, blocks))
    torch.library.opcheck(augment_op, (*planes, table[:1], 4, 5, torch.float32))
    with pytest.raises(ValueError, match="table has shape"):  # one row too many
        augment_op(*planes, table, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="table has shape"):  # one column too few
        augment_op(*planes, table[:1, :-1], 4, 5, torch.float32)


@pytest.mark.usefixtures("triton")
def test_compiles_without_a_graph_break() -> None:
    frames, stills, params = small_batch(T=1)
    params = replace(params, size=(5, 6))
    compiled = torch.compile(kernels.generate_views, fullgraph=True, backend="aot_eager")
    frames, stills = frames.to(_device), stills.to(_device)
    eager = kernels.generate_views(frames, stills, params)
    for got, expected in zip(compiled(frames, stills, params), eager, strict=True):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()


@pytest.mark.usefixtures("triton")
def test_launches_do_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from dclr.kernels import view_generation_triton

    launched: list[str] = []
    monkeypatch.setattr(
        view_generation_triton.Launch, "__call__", lambda launch: launched.append(launch.kernel.fn.__name__)
    )
    frames, stills, params = small_batch(T=1)
    generate_views(frames, stills, params)
    assert launched == ["_means", "_columns", "_finish"]
    launched.clear()
    eight = [frames.repeat(4, 1, 1, 1, 1), stills.repeat(4, 1, 1, 1)]
    clip, still = (
        Augmentation(
            *(
                getattr(rows, field.name).repeat(4, *[1] * (getattr(rows, field.name).dim() - 1))
                for field in fields(rows)
            )
        )
        for rows in (params.clip, params.still)
    )
    generate_views(*eight, ViewParams(clip, still, params.size))
    assert launched == ["_means", "_columns", "_finish"]


def test_the_record_the_tensors_and_the_table_agree() -> None:
    """The NumPy record, the tensors and the kernels' columns have the same names, dtypes and widths."""
    _, rows = two_clips()
    assert AUGMENTATION.names == tuple(field.name for field in fields(Augmentation))
    for name in AUGMENTATION.names:
        values = getattr(rows, name).numpy()
        record = np.zeros(2, AUGMENTATION)[name]
        assert (values.dtype, values.shape) == (record.dtype, record.shape), name
    names = ["box", "flip", "grayscale", "jitter", "sigma", "factors", "order", "orientation", "additive", "yuv"]
    assert list(TABLE_COLUMNS) == names
    assert list(TABLE_COLUMNS.values()) == [0, 4, 5, 6, 7, 8, 12, 16, 17, 18]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_table_of_parameters_has_the_kernels_columns() -> None:
    from dclr.kernels.view_generation_triton import table_of

    _, rows = two_clips()
    table = table_of(rows, yuv_video(40, 44))
    assert table.shape == (2, 24)
    assert table.dtype == torch.float32
    assert torch.equal(table[:, :18], table_of(rows, torch.empty(0)))
    for name in AUGMENTATION.names[1:]:  # all but the size
        values = getattr(rows, name).float().view(2, -1)
        column = TABLE_COLUMNS[name]
        assert torch.equal(table[:, column : column + values.shape[1]], values), name
    coefficients = yuv_coefficients(torch.tensor([False] * 2), torch.tensor([True] * 2))
    assert torch.equal(table[:, TABLE_COLUMNS["yuv"] :], coefficients)
    # The coefficients of BT.601 in full range from ITU-T T.871 (JFIF), to five decimals.
    torch.testing.assert_close(
        coefficients[0], torch.tensor([0, 1, 1.402, -0.34414, -0.71414, 1.772]), rtol=0, atol=1e-5
    )


@pytest.mark.usefixtures("triton")
def test_production_size() -> None:
    """This size has more than one strip of rows, 49 programs a clip, and sums over many pixels."""
    frames, stills = video(1, 1, 128, 171, 3, seed=5), video(1, 40, 50, 3, seed=6)
    rows = replace(
        neutral([(128, 171)]),
        box=torch.tensor([[5, 9, 117, 150]]),
        jitter=torch.tensor([True]),
        factors=torch.tensor([[0.8, 1.4, 1.3, -0.07]]),
        order=torch.tensor([[3, 0, 1, 2]]),
    )
    params = ViewParams(rows, neutral([(40, 50)]), (112, 112))
    rows.sigma[0] = 1.1
    expected = generate_views_reference(frames, stills, params)
    got = generate_views(frames, stills, params)
    for view, reference in zip(got, expected, strict=True):
        # Source coordinates of up to 150 have a rounding error of 150 EPS, and neighbouring pixels of noise differ by
        # up to 1.
        torch.testing.assert_close(view, reference, rtol=0, atol=2 * 150 * EPS / min(STD))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_graph_captures_it() -> None:
    frames, stills, params = small_batch()
    expected = kernels.generate_views(frames.cuda(), stills.cuda(), params)
    frames, stills, on_gpu = frames.cuda(), stills.cuda(), params.to("cuda")
    kernels.generate_views(frames, stills, on_gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.generate_views(frames, stills, params)
        kernels.generate_views(frames, stills, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.generate_views(frames, stills, on_gpu)
    for view in captured:
        view[:, :, :1].fill_(float("nan"))
    graph.replay()
    for view, same in zip(captured, expected, strict=True):
        assert torch.equal(view, same)
