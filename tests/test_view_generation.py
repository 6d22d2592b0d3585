"""kernels/view_generation.py against kornia's augmentation classes, and numpy for crop, resize and frame difference."""

from dataclasses import replace

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import Augmentation, ViewParams, augment, generate_views
from kernels.view_generation import MEAN, STD, Boundary

# A value of 0..1 is rounded to EPS / 2 by each operation and then divided by a standard deviation of 0.22 or more.
EPS = float(np.finfo(np.float32).eps)
ONE_OPERATION = 4 * EPS / min(STD)
WHOLE_CHAIN = 4 * ONE_OPERATION

WIDE, TALL = (30, 41), (37, 24)  # height, width


def video(*shape: int, seed: int = 0) -> Tensor:
    """uint8 noise about a gradient, with whole black, white, red and grey patches, where hue and saturation branch."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    pixels[..., :4, :6, :] = 0
    pixels[..., 4:8, :6, :] = 255
    pixels[..., 8:12, :6, :] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    pixels[..., 12:16, :6, :] = 128
    return pixels


def neutral(sizes: list[tuple[int, int]]) -> Augmentation:
    """Whole frames of the given heights and widths, and no operation."""
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
    )


def images_of(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) -> float (T, 3, H, W) in 0..1, kornia's form."""
    return frames.permute(0, 3, 1, 2).float() / 255


def normalized(images: Tensor) -> Tensor:
    """(T, 3, h, w) -> (3, T, h, w), normalised by kornia's class."""
    return K.Normalize(torch.tensor(MEAN), torch.tensor(STD), p=1.0)(images).transpose(0, 1)


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
    """Bilinear, half-pixel centres, no antialiasing: (H, W, 3) -> (height, width, 3) in float64, a pixel at a time."""
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
def test_crop_and_resize(box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    frames = video(1, 2, *WIDE, 3)
    top, left, height, width = box
    got = augment(frames, replace(neutral([WIDE]), box=torch.tensor([box])), size)
    assert got.shape == (1, 3, 2, *size)
    for t in range(2):
        crop = frames[0, t, top : top + height, left : left + width].double().numpy() / 255
        expected = (numpy_resize(crop, *size) - MEAN) / STD
        # Source coordinates are float32 as well: up to 41 pixels, so 41 times a weight's rounding.
        np.testing.assert_allclose(got[0, :, t].permute(1, 2, 0), expected, rtol=0, atol=41 * ONE_OPERATION)


def test_grayscale() -> None:
    frames = video(1, 3, *WIDE, 3)
    got = augment(frames, replace(neutral([WIDE]), grayscale=torch.tensor([True])), WIDE)
    expected = normalized(K.RandomGrayscale(p=1.0)(images_of(frames[0])))
    torch.testing.assert_close(got[0], expected, rtol=0, atol=ONE_OPERATION)


def test_flip() -> None:
    frames = video(1, 3, *WIDE, 3)
    got = augment(frames, replace(neutral([WIDE]), flip=torch.tensor([True])), WIDE)
    expected = normalized(K.RandomHorizontalFlip(p=1.0)(images_of(frames[0])))
    torch.testing.assert_close(got[0], expected, rtol=0, atol=ONE_OPERATION)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(sigma: float) -> None:
    frames = video(1, 3, *WIDE, 3)
    got = augment(frames, replace(neutral([WIDE]), sigma=torch.tensor([sigma])), WIDE)
    torch.testing.assert_close(
        got[0], normalized(kornia_blur(images_of(frames[0]), sigma)), rtol=0, atol=WHOLE_CHAIN
    )  # a sum of 11 products, twice


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param([1.4, 1.0, 1.0, 0.0], id="brightness"),
        pytest.param([1.0, 0.6, 1.0, 0.0], id="contrast"),
        pytest.param([1.0, 1.0, 1.4, 0.0], id="saturation"),
        pytest.param([1.0, 1.0, 1.0, -0.1], id="hue"),
        pytest.param([0.6, 1.4, 1.3, 0.1], id="all four"),
        pytest.param([1.0, 1.0, 1.0, 0.0], id="neutral"),
    ],
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_jitter(factors: list[float], order: list[int]) -> None:
    frames = video(1, 3, *WIDE, 3)
    rows = replace(
        neutral([WIDE]),
        jitter=torch.tensor([True]),
        factors=torch.tensor([factors]),
        order=torch.tensor([order]),
    )
    expected = normalized(kornia_jitter(images_of(frames[0]), factors, order))
    torch.testing.assert_close(augment(frames, rows, WIDE)[0], expected, rtol=0, atol=ONE_OPERATION)
    # Without the flag, factors and order are not looked at.
    unused = augment(frames, replace(rows, jitter=torch.tensor([False])), WIDE)
    assert torch.equal(unused, augment(frames, neutral([WIDE]), WIDE))


def two_clips() -> tuple[Tensor, Augmentation]:
    """Two clips of different size in one buffer, every operation on both but grayscale on the second only."""
    frames = torch.full((2, 4, 40, 44, 3), 77, dtype=torch.uint8)  # 77: padding that must not be seen
    frames[0, :, : WIDE[0], : WIDE[1]] = video(4, *WIDE, 3, seed=1)
    frames[1, :, : TALL[0], : TALL[1]] = video(4, *TALL, 3, seed=2)
    rows = Augmentation(
        size=torch.tensor([WIDE, TALL]),
        box=torch.tensor([[2, 1, 25, 40], [0, 4, 37, 20]]),
        flip=torch.tensor([True, False]),
        grayscale=torch.tensor([False, True]),
        jitter=torch.tensor([True, True]),
        factors=torch.tensor([[0.7, 1.3, 1.4, 0.08], [1.2, 0.8, 0.6, -0.1]]),
        order=torch.tensor([[2, 0, 3, 1], [1, 3, 2, 0]]),
        sigma=torch.tensor([0.9, 1.7]),
    )
    return frames, rows


def test_whole_chain() -> None:
    frames, rows = two_clips()
    got = augment(frames, rows, (19, 23))
    for b in range(2):
        top, left, height, width = rows.box[b].tolist()
        images = images_of(frames[b, :, top : top + height, left : left + width])
        images = torch.nn.functional.interpolate(images, (19, 23), mode="bilinear", align_corners=False)
        if rows.grayscale[b]:
            images = K.RandomGrayscale(p=1.0)(images)
        images = kornia_jitter(images, rows.factors[b].tolist(), rows.order[b].tolist())
        if rows.flip[b]:
            images = K.RandomHorizontalFlip(p=1.0)(images)
        expected = normalized(kornia_blur(images, float(rows.sigma[b])))
        torch.testing.assert_close(got[b], expected, rtol=0, atol=WHOLE_CHAIN)


def test_clips_of_different_sizes_equal_themselves_alone() -> None:
    frames, rows = two_clips()
    together = augment(frames, rows, (19, 23))
    for b, (height, width) in enumerate((WIDE, TALL)):
        row = Augmentation(*(getattr(rows, name)[b : b + 1] for name in Augmentation.__dataclass_fields__))
        alone = augment(frames[b : b + 1, :, :height, :width], row, (19, 23))
        assert torch.equal(together[b : b + 1], alone)


def test_every_frame_has_the_same_draw() -> None:
    frames, rows = two_clips()
    frames[:] = frames[:, :1].clone()
    view = augment(frames, rows, (16, 16))
    assert torch.equal(view, view[:, :, :1].expand_as(view))


def test_blur_of_a_view_smaller_than_the_kernel() -> None:
    """A reflected border needs 6 pixels: at 6 kornia's class agrees, at 5 and fewer the border repeats."""
    frames = video(1, 2, 6, 9, 3)
    rows = replace(neutral([(6, 9)]), sigma=torch.tensor([1.5]))
    expected = normalized(kornia_blur(images_of(frames[0]), 1.5))
    torch.testing.assert_close(augment(frames, rows, (6, 9))[0], expected, rtol=0, atol=WHOLE_CHAIN)

    weights = np.exp(-(np.arange(-5.0, 6) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    small = frames[:, :, 3:, 4:].contiguous()  # 3 x 5, of which some are noise
    got = augment(small, replace(neutral([(3, 5)]), sigma=torch.tensor([1.5])), (3, 5))
    padded = np.pad(small[0].double().numpy() / 255, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="edge")
    rows_blurred = sum(weights[i] * padded[:, i : i + 3] for i in range(11))
    blurred = sum(weights[i] * rows_blurred[:, :, i : i + 5] for i in range(11))
    np.testing.assert_allclose(got[0].permute(1, 2, 3, 0), (blurred - MEAN) / STD, rtol=0, atol=WHOLE_CHAIN)


@pytest.mark.parametrize("boundary", ["wrap", "zero", "replicate"])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_generate_views(boundary: Boundary, T: int) -> None:
    frames, rows = two_clips()
    stills, still_rows = video(2, 20, 26, 3, seed=9), neutral([(20, 26), (15, 11)])
    params = ViewParams(clip=rows, still=still_rows, size=(13, 15))
    views = generate_views(frames[:, :T], stills, params, boundary=boundary)

    assert torch.equal(views.rgb, augment(frames[:, :T], rows, (13, 15)))

    still = augment(stills[:, None], still_rows, (13, 15))
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
    np.testing.assert_array_equal(views.dynamic, d)

    for view in views:
        assert view.shape == (2, 3, T, 13, 15)
        assert view.is_contiguous(memory_format=torch.channels_last_3d)
        assert view.stride(1) == 1  # channels innermost, which is_contiguous alone leaves open at T = 1
        assert not view.requires_grad


def test_bfloat16_is_float32_rounded_once() -> None:
    frames, rows = two_clips()
    stills, still_rows = video(2, 20, 26, 3, seed=9), neutral([(20, 26), (15, 11)])
    params = ViewParams(clip=rows, still=still_rows, size=(12, 12))
    exact = generate_views(frames, stills, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the arithmetic
        rounded = generate_views(frames, stills, params, dtype=torch.bfloat16)
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected.bfloat16())
        assert got.is_contiguous(memory_format=torch.channels_last_3d)


def test_params_move() -> None:
    _, rows = two_clips()
    moved = ViewParams(clip=rows, still=neutral([(5, 6)]), size=(3, 4)).to("meta", non_blocking=True)
    assert moved.size == (3, 4)
    assert {moved.clip.box.device.type, moved.still.sigma.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("box", [0, 0, 31, 41], r"clip 1: box \(top 0, left 0, height 31, width 41\) is not within the valid 30 x 41"),
        ("box", [0, 1, 30, 41], "clip 1: box"),
        ("box", [-1, 0, 5, 5], "clip 1: box"),
        ("box", [0, -1, 5, 5], "clip 1: box"),
        ("box", [3, 3, 0, 5], "clip 1: box"),
        ("box", [3, 3, 5, 0], "clip 1: box"),
        ("size", [33, 41], "clip 1: valid size 33 x 41 is not within the 32 x 44 buffer"),
        ("size", [30, 45], "clip 1: valid size 30 x 45"),
        ("order", [0, 1, 2, 2], r"clip 1: order \[0, 1, 2, 2\] is not a permutation"),
        ("sigma", -1.0, "clip 1: sigma -1.0"),
        ("sigma", float("nan"), "clip 1: sigma nan"),
    ],
)
def test_a_row_that_cannot_be_applied_is_named(field: str, value: object, message: str) -> None:
    frames = torch.zeros(2, 1, 32, 44, 3, dtype=torch.uint8)
    rows = neutral([WIDE, WIDE])
    augment(frames, rows, (8, 8))  # fits before the change
    getattr(rows, field)[1] = torch.as_tensor(value)
    with pytest.raises(ValueError, match=message):
        augment(frames, rows, (8, 8))


def test_other_errors() -> None:
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
    with pytest.raises(ValueError, match="boundary must be"):
        generate_views(frames, frames[:, 0], params, boundary="mirror")  # type: ignore[arg-type]
