"""Random augmentations have the distributions of torchvision and kornia, and views are shown in the right colours."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia.augmentation.random_generator import ColorJitterGenerator
from torchvision.transforms import RandomResizedCrop

from dclr.data import augmentation, decode
from dclr.data.augmentation import (
    FINETUNE,
    PRETRAIN,
    AugmentRecipe,
    centre_crop,
    draw_augmentation,
    to_augmentation,
    view_grid,
)
from dclr.kernels import Augmentation, Views, augment
from dclr.kernels.types import AUGMENTATION, MEAN, STD
from dclr.kernels.view_generation import ADDITIVE, MULTIPLICATIVE, colour_jitter

N = 4000  # draws of a statistical test


def draws(recipe: AugmentRecipe = PRETRAIN, height: int = 120, width: int = 160, n: int = N) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([draw_augmentation(rng, height, width, recipe) for _ in range(n)])


def assert_same_distribution(a: np.ndarray, b: np.ndarray) -> None:
    """Assert that two samples have one distribution: Kolmogorov-Smirnov test at p = 0.001."""
    points = np.sort(np.concatenate([a, b]))
    distance = np.abs(
        np.searchsorted(np.sort(a), points, side="right") / len(a)
        - np.searchsorted(np.sort(b), points, side="right") / len(b)
    ).max()
    assert distance < 1.95 * np.sqrt(1 / len(a) + 1 / len(b))


def assert_probability(events: np.ndarray, p: float) -> None:
    """Assert that a share is within 3.3 standard deviations (p = 0.001) of the expected one."""
    assert abs(events.mean() - p) <= 3.3 * np.sqrt(p * (1 - p) / len(events))


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(120, 160, id="usual"),
        pytest.param(64, 64, id="square"),
        pytest.param(40, 200, id="so wide that many tries fail and some fall back"),
    ],
)
def test_box_is_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    expected = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(N)])
    got = draws(height=height, width=width)["box"]
    for column in range(4):
        assert_same_distribution(got[:, column], expected[:, column])
    assert_same_distribution(got[:, 2] * got[:, 3], expected[:, 2] * expected[:, 3])
    assert_same_distribution(got[:, 3] / got[:, 2], expected[:, 3] / expected[:, 2])


@pytest.mark.parametrize(("height", "width"), [(120, 160), (1, 1), (3, 500), (500, 3), (2, 3), (113, 97)])
def test_box_is_in_the_frame(height: int, width: int) -> None:
    rows = draws(height=height, width=width, n=500)
    top, left, box_height, box_width = rows["box"].T
    assert (rows["size"] == [height, width]).all()
    assert min(top.min(), left.min()) >= 0
    assert min(box_height.min(), box_width.min()) >= 1
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        pytest.param(60, 900, (0, 410, 60, 80), id="too wide"),
        pytest.param(900, 60, (410, 0, 80, 60), id="too tall"),
    ],
)
def test_box_falls_back_to_the_centre(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    """A crop of the whole area never fits these frames, so all ten tries fail, like torchvision's."""
    recipe = AugmentRecipe(scale=(1.0, 1.0))
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(draw_augmentation(np.random.default_rng(0), height, width, recipe)["box"]) == box == expected


def test_factors_are_kornias() -> None:
    torch.manual_seed(0)
    generator = ColorJitterGenerator(0.4, 0.4, 0.4, 0.1)
    generator.make_samplers(torch.device("cpu"), torch.float32)
    expected = generator.forward((N,))
    got = draws()["factors"]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert_same_distribution(got[:, column], expected[f"{name}_factor"].numpy())
    assert np.abs(np.corrcoef(got.T) - np.eye(4)).max() < 3.3 / np.sqrt(N)  # drawn independently


def test_order_is_a_uniform_permutation() -> None:
    order = draws()["order"]
    permutations, counts = np.unique(order, axis=0, return_counts=True)
    assert (np.sort(permutations, axis=1) == np.arange(4)).all()
    assert len(permutations) == 24
    chi_square = ((counts - N / 24) ** 2 / (N / 24)).sum()
    assert chi_square < 49.7  # p = 0.001 at 23 degrees of freedom


def test_probabilities_and_blur() -> None:
    rows = draws()
    assert_probability(rows["flip"], 0.5)
    assert_probability(rows["grayscale"], 0.2)
    assert_probability(rows["jitter"], 0.8)
    blurred = rows["sigma"] > 0
    assert_probability(blurred, 0.5)
    assert_same_distribution(rows["sigma"][blurred], np.random.default_rng(7).uniform(0.1, 2.0, N))
    assert_probability(rows["flip"] & rows["jitter"] & blurred, 0.5 * 0.8 * 0.5)  # drawn independently


def test_finetune_crops_and_flips_only() -> None:
    rows = draws(FINETUNE["crop"], n=500)
    assert_probability(rows["flip"], 0.5)
    assert not rows["grayscale"].any()
    assert not rows["jitter"].any()
    assert not rows["sigma"].any()
    assert len(np.unique(rows["box"], axis=0)) > 400


def test_the_released_finetuning_also_changes_colours() -> None:
    ours, released = draws(FINETUNE["crop"], n=N), draws(FINETUNE["released"], n=N)
    assert_probability(released["grayscale"], 0.2)
    assert_probability(released["jitter"], 0.8)
    assert released["additive"].all()
    assert not released["sigma"].any()
    for name in ("box", "flip", "factors"):  # the same draws of crop, flip and factors
        assert (ours[name] == released[name]).all()


def test_same_state_same_draw() -> None:
    first, second = draws(n=50), draws(n=50)
    assert (first == second).all()
    other = draw_augmentation(np.random.default_rng(2), 120, 160, PRETRAIN)
    assert (other["factors"] != first["factors"][0]).all()


def test_recipes_that_differ_in_a_probability_agree_in_all_else() -> None:
    always = replace(PRETRAIN, flip=1.0, blur=1.0)
    a, b = draws(n=50), draws(always, n=50)
    for name in ("box", "grayscale", "jitter", "factors", "order"):
        assert (a[name] == b[name]).all()
    assert b["flip"].all()
    assert (b["sigma"] > 0).all()
    assert (a["sigma"] == np.where(a["sigma"] > 0, b["sigma"], 0)).all()


def test_to_augmentation() -> None:
    rows = draws(n=6)
    for batch in (rows, list(rows), [rows[i] for i in range(6)]):
        tensors = to_augmentation(batch)
        for name in AUGMENTATION.names or ():
            assert (getattr(tensors, name).numpy() == rows[name]).all()
    nothing = to_augmentation(np.empty(0, AUGMENTATION))
    assert augment(torch.zeros(0, 2, 20, 30, 3, dtype=torch.uint8), nothing, (8, 8)).shape == (0, 3, 2, 8, 8)
    single = to_augmentation([draw_augmentation(np.random.default_rng(0), 20, 30, PRETRAIN)])
    dtypes = {name: getattr(single, name).dtype for name in Augmentation.__dataclass_fields__}
    assert dtypes == {
        "size": torch.int64,
        "box": torch.int64,
        "flip": torch.bool,
        "grayscale": torch.bool,
        "jitter": torch.bool,
        "factors": torch.float32,
        "order": torch.int64,
        "sigma": torch.float32,
        "orientation": torch.int64,
        "additive": torch.bool,
    }
    assert augment(torch.zeros(1, 2, 20, 30, 3, dtype=torch.uint8), single, (8, 8)).shape == (1, 3, 2, 8, 8)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (128, 171, (8, 29, 112, 112)),  # 112 pixels of frames scaled to a short side of 128
        (240, 320, (15, 55, 210, 210)),
        (171, 128, (29, 8, 112, 112)),
        (1, 5, (0, 2, 1, 1)),
    ],
)
def test_centre_crop(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    row = centre_crop(height, width)
    assert tuple(row["box"]) == box
    frames = torch.randint(0, 256, (1, 1, height, width, 3), dtype=torch.uint8)
    top, left, side, _ = box
    view = augment(frames, to_augmentation([row]), (side, side))
    pixels = view[0, :, 0].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
    crop = frames[0, 0, top : top + side, left : left + side]
    assert torch.equal((pixels * 255).round().to(torch.uint8), crop)  # and nothing else is done


def test_factors_of_a_wide_and_of_no_colour_jitter() -> None:
    wide = replace(PRETRAIN, brightness=1.6, contrast=1.6, saturation=1.6, hue=0.4)
    assert draws(wide, n=500)["factors"][:, :3].min() >= 0  # as kornia's, cut at 0
    additive = draws(replace(PRETRAIN, additive=True), n=20)
    assert additive["additive"].all()
    for name in set(AUGMENTATION.names or ()) - {"additive"}:
        assert (additive[name] == draws(n=20)[name]).all()  # the draws are those of the multiplicative form
    still = draws(replace(PRETRAIN, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0), n=5)["factors"]
    assert (still == [1, 1, 1, 0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 1.5}, "flip must be a probability"),
        ({"blur": -0.1}, "blur must be a probability"),
        ({"scale": (0.0, 1.0)}, "scale must be"),
        ({"ratio": (2.0, 1.0)}, "ratio must be"),
        ({"sigma": (0.0, 2.0)}, "sigma must be"),
        ({"contrast": -0.4}, "contrast must not be negative"),
        ({"hue": 0.6}, "hue must be 0 to 0.5"),
    ],
)
def test_recipe_refuses_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentRecipe(**change)


def test_view_grid() -> None:
    T, h, w = 15, 4, 6
    mean, std = torch.tensor(MEAN).view(3, 1, 1, 1), torch.tensor(STD).view(3, 1, 1, 1)
    shades = torch.arange(T).view(1, 1, T, 1, 1) / 16  # frame t has brightness t / 16
    rgb = ((shades - mean) / std).expand(3, 3, T, h, w)
    static = ((0.25 - mean) / std).expand(3, 3, T, h, w)
    dynamic = (0.5 / std).expand(3, 3, T, h, w)  # half of full scale brighter than the frame before
    picture = view_grid(Views(rgb, static, dynamic), clips=2)

    assert picture.dtype == np.uint8
    assert picture.shape == (2 * 3 * h, 8 * w, 3)
    for clip in range(2):
        rows = picture[clip * 3 * h : (clip + 1) * 3 * h]
        for column, t in enumerate([0, 2, 4, 6, 8, 10, 12, 14]):
            assert (rows[:h, column * w : (column + 1) * w] == round(t / 16 * 255)).all()
        assert (rows[h : 2 * h] == round(0.25 * 255)).all()
        assert (rows[2 * h :] == round(0.75 * 255)).all()


def test_view_grid_of_few_frames_clips_and_bfloat16() -> None:
    views = Views(*(torch.full((1, 3, 3, 4, 5), value).bfloat16() for value in (9.0, -9.0, 0.0)))
    picture = view_grid(views, clips=4)
    assert picture.shape == (3 * 4, 3 * 5, 3)
    assert (picture[:4] == 255).all()  # out of range is clipped, not wrapped
    assert (picture[4:8] == 0).all()
    assert (picture[8:] == 128).all()  # no change is grey


def test_jitter_of_another_strength():
    assert augmentation.pretrain_recipe(1.0) == PRETRAIN
    none = draws(augmentation.pretrain_recipe(0.0), n=200)
    assert (none["factors"] == np.array([1, 1, 1, 0], np.float32)).all()
    assert none["grayscale"].any()  # only the colour jitter is scaled
    videomoco = draws(augmentation.pretrain_recipe(1.0, "videomoco"), n=200)
    assert videomoco["jitter"].all()
    assert not videomoco["sigma"].any()
    assert np.abs(videomoco["factors"][:, 3]).max() > 0.3
    assert augmentation.pretrain_recipe(2.0, "videomoco").hue == 0.5  # a whole turn of the colour circle
    half = draws(augmentation.pretrain_recipe(0.5))["factors"]
    assert np.abs(half - [1, 1, 1, 0]).max(0) == pytest.approx([0.2, 0.2, 0.2, 0.05], rel=0.01)


def test_the_additive_form_changes_brightness_more_than_twice_as_much(genuine: Path) -> None:
    """The standard deviation of a frame's change of mean brightness: two frames of seven UCF101 videos, 120 draws each.

    With the released code's version of kornia it was 0.187.
    """
    frames = []
    for path in sorted((genuine / "ucf101_sample").rglob("*.avi")):
        record = decode.verify_video(path)
        frames.append(decode.rgb_of(decode.read_planes(path, record, [0, record.frames // 2]))[:, ::8, ::8])
    images = torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2).float() / 255  # (14, 3, 30, 40)
    images = images.repeat(120, 1, 1, 1)[:, None]
    rng = np.random.default_rng(0)
    rows = to_augmentation([draw_augmentation(rng, 30, 40, PRETRAIN) for _ in images])
    spread = {}
    for form in (MULTIPLICATIVE, ADDITIVE):
        change = colour_jitter(images, rows.factors, rows.order, form) - images
        spread[form] = torch.where(rows.jitter, change.mean(dim=(1, 2, 3, 4)), 0.0).std().item()
    assert spread[ADDITIVE] == pytest.approx(0.187, abs=0.005)
    assert spread[MULTIPLICATIVE] == pytest.approx(0.081, abs=0.004)
