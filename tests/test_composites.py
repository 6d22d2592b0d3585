"""Composites: masks against loops in numpy, clips with a known foreground, and colours converted by hand."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dclr.config import DataConfig
from dclr.data.datasets import open_catalog
from dclr.data.decode import YuvFrames, empty_planes
from dclr.data.encode import write_video
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import open_videos
from dclr.evaluation.composites import (
    LEAST_DIFFERENCE,
    CompositeClips,
    background_of,
    composite,
    draw_backgrounds,
    foreground_mask,
    frozen,
)
from dclr.evaluation.features import run_on_samples

CONFIG = DataConfig(clip_length=6, crop_size=16, workers=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread. Networks this small gain nothing from a second one (see conftest.one_process)."""
    torch.set_num_threads(1)


def grey(frames: np.ndarray, bt709: bool = False, full_range: bool = False) -> YuvFrames:
    """Return frames with this luma (T, H, W) and no colour."""
    planes = empty_planes(*frames.shape)
    for plane, values in zip(planes, (frames, 128, 128), strict=True):
        plane[...] = values
    return YuvFrames(*planes, bt709, full_range)


def walker(T: int = 8, H: int = 60, W: int = 80, side: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Return the luma of a textured square that moves 4 pixels per frame over a still texture, and the square's mask.

    Both are (T, H, W).
    """
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(40, 90, (1, H, W)), T, axis=0)
    square, inside = rng.integers(130, 230, (side, side)), np.zeros((T, H, W), bool)
    for t in range(T):
        region = np.s_[t, 20 : 20 + side, 10 + 4 * t : 10 + 4 * t + side]
        frames[region], inside[region] = square, True
    return frames.astype(np.uint8), inside


# ---------------------------------------------------------------- the mask


def test_the_mask_follows_a_moving_square_and_holds_little_else():
    frames, inside = walker()
    mask = foreground_mask(grey(frames))
    assert mask[inside].mean() > 0.9  # all but corners
    assert mask[~inside].mean() < 0.1
    for t in range(len(frames)):  # the first and last frame have one neighbour, so their mask is half a step off
        off = np.argwhere(mask[t]).mean(0)[1] - (10 + 4 * t + 6.5)
        assert off == pytest.approx({0: 2, 7: -2}.get(t, 0), abs=0.5)


def test_the_mask_equals_loops_in_numpy_also_for_odd_sizes():
    rng = np.random.default_rng(1)
    T, H, W = 4, 31, 45
    h, w = 16, 23
    planes = [rng.integers(100, 110, shape).astype(np.uint8) for shape in ((T, H, W), (T, h, w), (T, h, w))]
    planes[0][:, 8:20, 10:30] += rng.integers(0, 80, (T, 12, 20)).astype(np.uint8)
    planes[1][2, 3:6, 2:6] += 60

    pixels = np.zeros((T, 3, h, w))
    for y in range(h):
        for x in range(w):
            pixels[:, 0, y, x] = planes[0][:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
    pixels[:, 1], pixels[:, 2] = planes[1], planes[2]
    difference = np.zeros((T, h, w))
    for t in range(T):
        near = [other for other in (t - 1, t + 1) if 0 <= other < T]
        difference[t] = np.mean([np.abs(pixels[t] - pixels[other]).sum(0) for other in near], axis=0)
    sigma, smooth = 16 / 30, np.zeros((T, h, w))
    reach = round(3 * sigma)
    weights = {d: math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)}
    total = sum(weights.values()) ** 2
    for y in range(h):
        for x in range(w):
            for dy, a in weights.items():
                for dx, b in weights.items():
                    row, column = np.clip(y + dy, 0, h - 1), np.clip(x + dx, 0, w - 1)
                    smooth[:, y, x] += a * b / total * difference[:, row, column]
    threshold = 0.2 * smooth.max()
    assert np.abs(smooth - threshold).min() > 1e-4  # so rounding errors decide no pixel
    expected = np.array(
        [[[smooth[t, y // 2, x // 2] > threshold for x in range(W)] for y in range(H)] for t in range(T)]
    )

    mask = foreground_mask(YuvFrames(*planes, False, False))
    assert np.array_equal(mask, expected)
    assert 0.1 < mask.mean() < 0.6


def test_a_still_a_single_frame_and_coding_noise_have_no_foreground():
    still = np.repeat(np.random.default_rng(2).integers(0, 256, (1, 32, 32)), 6, axis=0)
    noisy = still + np.random.default_rng(3).integers(-1, 2, still.shape)
    for frames in (still, still[:1], noisy.clip(0, 255)):
        mask = foreground_mask(grey(frames.astype(np.uint8)))
        assert mask.shape == frames.shape
        assert not mask.any()
    # A difference just above the threshold is found, in a region that is large enough to survive the smoothing.
    still[::2, 8:24, 8:24] = 100
    still[1::2, 8:24, 8:24] = 100 + math.ceil(LEAST_DIFFERENCE) + 1
    assert foreground_mask(grey(still.astype(np.uint8))).any()


def test_a_change_of_colour_alone_is_foreground():
    frames = grey(np.full((4, 32, 32), 120, np.uint8))
    frames.v[1, 4:10, 4:10] = 180
    mask = foreground_mask(frames)
    assert mask[1, 8:20, 8:20].all()
    assert not mask[:, 26:, 26:].any()


# ---------------------------------------------------------------- backgrounds


def test_a_square_that_moves_through_the_picture_is_not_in_the_background():
    frames, _ = walker(T=20, W=120)
    planes = grey(frames)

    def read(index, wanted):
        assert (index, len(wanted), wanted[0], wanted[-1]) == (3, 25, 0, 19)
        return YuvFrames(planes.y[wanted], planes.u[wanted], planes.v[wanted], True, False)

    still = background_of(SimpleNamespace(frames=[0, 0, 0, 20], read=read), 3)
    scene = np.random.default_rng(0).integers(40, 90, (1, 60, 120))  # the first draw of `walker`
    assert np.array_equal(still.y, scene)
    assert (still.u == 128).all()
    assert (still.bt709, still.full_range) == (True, False)


def test_each_video_gets_a_background_of_another_class_and_always_the_same():
    labels = np.repeat(np.arange(5), 12)
    drawn = draw_backgrounds(labels)
    assert (labels[drawn] != labels).all()
    assert np.array_equal(drawn, draw_backgrounds(labels))
    assert len(set(drawn.tolist())) > 30  # 60 draws from 60 miss a share of 1/e, so about 38 are expected
    # With two classes, and one video in the first, the background of the second class is that video.
    assert set(draw_backgrounds(np.array([0, 1, 1]))[1:].tolist()) == {0}


def rgb_of_colour(y, u, v, bt709: bool, full_range: bool) -> np.ndarray:
    """Convert by the defining equations of ITU-R BT.601 and BT.709: (3,) RGB from 0 to 255."""
    red, blue = (0.2126, 0.0722) if bt709 else (0.299, 0.114)
    luma = y / 255 if full_range else (y - 16) / 219
    u, v = ((c - 128) / (255 if full_range else 224) for c in (u, v))
    r, b = luma + 2 * (1 - red) * v, luma + 2 * (1 - blue) * u
    return 255 * np.array([r, (luma - red * r - blue * b) / (1 - red - blue), b])


@pytest.mark.parametrize("size", [(32, 48), (20, 30), (57, 33)], ids=["same size", "smaller", "larger and odd"])
@pytest.mark.parametrize("space", [(False, False), (True, False), (False, True)], ids=["601", "709", "601 full range"])
def test_a_background_of_another_size_and_colour_space_keeps_its_colours_and_the_foreground_its_bytes(size, space):
    frames = grey(np.random.default_rng(4).integers(0, 256, (3, 32, 48)).astype(np.uint8))
    before = [plane.copy() for plane in (frames.y, frames.u, frames.v)]
    mask = np.zeros((3, 32, 48), bool)
    mask[:, 4:10, 6:20] = True
    colour = 120, 105, 150
    other = YuvFrames(*(np.full_like(p, c) for p, c in zip(empty_planes(1, *size), colour, strict=True)), *space)
    composite(frames, mask, other)
    for plane, old in zip((frames.y, frames.u, frames.v), before, strict=True):
        inside = mask if plane.shape == mask.shape else mask[:, ::2, ::2]
        assert np.array_equal(plane[inside], old[inside])
        assert len(set(plane[~inside].tolist())) == 1
    found = (int(plane[0, -1, -1]) for plane in (frames.y, frames.u, frames.v))
    # One level of chroma changes blue by up to 2 levels, and both conversions round all three planes.
    assert np.abs(rgb_of_colour(*found, False, False) - rgb_of_colour(*colour, *space)).max() < 4
    if space != (False, False):  # without conversion the same bytes would fail
        assert np.abs(rgb_of_colour(*colour, False, False) - rgb_of_colour(*colour, *space)).max() > 4


# ---------------------------------------------------------------- the clips


def mean_and_frozen(clip: torch.Tensor) -> torch.Tensor:
    return torch.stack([clip.mean((2, 3, 4)), frozen(clip).mean((2, 3, 4))], 1)


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory) -> Path:
    """Two classes of one video each, of different sizes: a bright square moves right, a dark square moves left."""
    folder = tmp_path_factory.mktemp("two")
    frames, _ = walker(T=24, W=120)
    for name, pixels in (("right", frames), ("left", (255 - frames[:, :40, ::-1]))):
        for split in ("train", "test"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            write_video(folder / split / name / f"{name}.mp4", np.repeat(pixels[..., None], 3, axis=-1))
    return folder


def test_clips_show_the_ordinary_foreground_on_the_other_background(two_sizes):
    videos = open_videos(open_catalog(two_sizes), "test", workers=1, progress=False)
    samples = CompositeClips(videos, CONFIG)
    assert samples.backgrounds.tolist() == [1, 0]
    for index in range(2):
        ordinary, composed = TestClips(videos, CONFIG).read(index), samples.read(index)
        assert composed.y.shape == (TEST_CLIPS * 6, videos.heights[index], videos.widths[index])
        other = background_of(videos, 1 - index).y[0]
        for number in range(TEST_CLIPS):
            own = slice(6 * number, 6 * number + 6)
            mask = foreground_mask(ordinary.select(own))
            assert samples.shares[index, number] == mask.mean() > 0.02
            assert np.array_equal(composed.y[own][mask], ordinary.y[own][mask])
            outside = composed.y[own][~mask]
            assert np.abs(outside.mean() - other.mean()) < 3  # dark became bright, or bright dark
            assert np.abs(outside.mean() - ordinary.y[own][~mask].mean()) > 60


def test_a_worker_process_gives_the_same_clips_and_shares(two_sizes):
    videos = open_videos(open_catalog(two_sizes), "test", workers=1, progress=False)
    found = []
    for workers in (0, 1):
        samples = CompositeClips(videos, DataConfig(clip_length=6, crop_size=16, workers=workers))
        outputs = run_on_samples(mean_and_frozen, samples, CPU, "test")
        found.append((outputs.values, samples.shares.copy()))
    assert found[0][0].shape == (2, TEST_CLIPS, 2, 3)
    assert torch.equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    assert (found[0][1] > 0).all()


def test_a_video_whose_background_cannot_be_read_is_skipped_and_both_are_named(two_sizes, tmp_path):
    shutil.copytree(two_sizes, tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "test" / "left", tmp_path / "data" / "test" / "third")
    shutil.copytree(tmp_path / "data" / "test" / "left", tmp_path / "data" / "train" / "third")
    videos = open_videos(open_catalog(tmp_path / "data"), "test", workers=1, progress=False)
    samples = CompositeClips(videos, CONFIG)
    samples.backgrounds[:] = 1, 2, 1
    (tmp_path / "data" / videos.path(2)).unlink()
    outputs = run_on_samples(mean_and_frozen, samples, CPU, "test")
    assert outputs.indices.tolist() == [0]
    assert outputs.failures == {
        videos.path(1): f"its background, {videos.path(2)}: no such file",
        videos.path(2): "no such file",
    }


def test_frozen_repeats_the_middle_frame():
    clip = torch.arange(5.0)[None, None, :, None, None].expand(2, 3, 5, 4, 4)
    assert frozen(clip).shape == clip.shape
    assert (frozen(clip) == 2).all()
    assert (frozen(clip[:, :, :4]) == 2).all()
