"""Draws the augmentation of a clip.

A draw is one record of a numpy dtype, `kernels.types.AUGMENTATION`: light enough for a worker to make thousands a second, and
`to_augmentation` turns a batch of them into the tensors that `kernels.generate_views` takes.
Every function is pure: the same generator state gives the same draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels import Augmentation, Views
from kernels.types import AUGMENTATION, MEAN, STD

CENTRE = 112 / 128
"""Side of the test crop as a share of the frame's short side: 112 pixels of frames scaled to 128."""


@dataclass(frozen=True, kw_only=True)
class AugmentRecipe:
    """How augmentations are distributed."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the frame's area that the crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width of the crop over its height."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    grayscale: float = 0.2
    """Probability of losing all colour."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Its factor is uniform within this distance of 1, but not negative."""
    contrast: float = 0.4
    """As brightness."""
    saturation: float = 0.4
    """As brightness."""
    hue: float = 0.1
    """Its shift, in turns of the colour circle, is uniform within this distance of 0."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, in pixels of the view."""

    def __post_init__(self) -> None:
        for name in ("flip", "grayscale", "jitter", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, 0 to 1, not {getattr(self, name)}")
        for name in ("scale", "ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a least and a greatest value above 0, not {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be 0 to 0.5 turns, not {self.hue}")


PRETRAIN = AugmentRecipe()
"""The recipe of the authors' pretraining code."""


def pretrain_recipe(jitter: float) -> AugmentRecipe:
    """PRETRAIN with colour jitter of another strength: 1 as published, 0 none."""
    scaled = {name: jitter * getattr(PRETRAIN, name) for name in ("brightness", "contrast", "saturation", "hue")}
    return replace(PRETRAIN, **scaled)


FINETUNE = AugmentRecipe(grayscale=0.0, jitter=0.0, blur=0.0)
"""Crop and flip only."""


def draw_augmentation(rng: np.random.Generator, height: int, width: int, recipe: AugmentRecipe) -> np.ndarray:
    """One draw for a frame of height x width pixels: a 0-dimensional array of dtype AUGMENTATION.

    In this order: the crop (see `_draw_box`), flip, grayscale, whether to jitter, the four factors (uniform, as
    kornia's ColorJitter), their order (a uniform permutation), whether to blur, sigma (uniform; 0 where not blurred).
    Everything after the crop takes the same number of draws whatever the outcome, so two recipes that differ only in
    a probability agree in all else.
    """
    row = np.zeros((), AUGMENTATION)
    row["size"] = height, width
    row["box"] = _draw_box(rng, height, width, recipe)
    row["flip"] = rng.random() < recipe.flip
    row["grayscale"] = rng.random() < recipe.grayscale
    row["jitter"] = rng.random() < recipe.jitter
    row["factors"] = (
        rng.uniform(max(0.0, 1 - recipe.brightness), 1 + recipe.brightness),
        rng.uniform(max(0.0, 1 - recipe.contrast), 1 + recipe.contrast),
        rng.uniform(max(0.0, 1 - recipe.saturation), 1 + recipe.saturation),
        rng.uniform(-recipe.hue, recipe.hue),
    )
    row["order"] = rng.permutation(4)
    blurred = rng.random() < recipe.blur
    sigma = rng.uniform(*recipe.sigma)
    row["sigma"] = sigma if blurred else 0.0
    return row


def centre_crop(height: int, width: int) -> np.ndarray:
    """The test protocol: the centre square of 0.875 of the short side, and nothing else. Dtype AUGMENTATION."""
    side = max(1, round(CENTRE * min(height, width)))
    row = np.zeros((), AUGMENTATION)
    row["size"] = height, width
    row["box"] = (height - side) // 2, (width - side) // 2, side, side
    row["factors"] = 1, 1, 1, 0
    row["order"] = 0, 1, 2, 3
    return row


def to_augmentation(rows: np.ndarray | Sequence[np.ndarray]) -> Augmentation:
    """A batch of draws, as a list of them or one array (B,) of dtype AUGMENTATION, as tensors."""
    table = rows if isinstance(rows, np.ndarray) else np.stack(rows)  # (B,)
    return Augmentation(**{name: torch.from_numpy(table[name].copy()) for name in AUGMENTATION.names or ()})


def _draw_box(rng: np.random.Generator, height: int, width: int, recipe: AugmentRecipe) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random resized crop, as torchvision's RandomResizedCrop draws it.

    Area uniform, ratio of width to height log-uniform, position uniform; up to ten tries for a box that fits, then
    the largest centred box whose ratio is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*recipe.scale)
        ratio = math.exp(rng.uniform(math.log(recipe.ratio[0]), math.log(recipe.ratio[1])))
        box_height = round(math.sqrt(area / ratio))
        box_width = round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(0, height - box_height, endpoint=True))
            left = int(rng.integers(0, width - box_width, endpoint=True))
            return top, left, box_height, box_width

    box_height = min(height, max(1, round(width / recipe.ratio[0])))
    box_width = min(width, max(1, round(height * recipe.ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def view_grid(views: Views, clips: int) -> np.ndarray:
    """A picture of the first clips' views, (3 * clips * h, columns * w, 3) uint8.

    Three rows a clip: rgb, static, dynamic. Up to 8 columns: frames spread evenly from the first to the last. The
    dynamic view is shown at half its contrast about mid-grey, so that a difference of -1 to 1 fits in 0 to 1.
    """
    shown = spread(views.rgb.shape[2])
    rows = []
    for b in range(min(clips, views.rgb.shape[0])):
        # (T, h, w, 3) -> (h, columns * w, 3)
        rows += [np.concatenate(list(pixels[shown]), axis=1) for pixels in to_pixels(views, b)]
    return np.concatenate(rows)


def spread(T: int) -> list[int]:
    """Up to 8 frames of T, evenly from the first to the last."""
    return np.linspace(0, T - 1, min(T, 8)).round().astype(int).tolist()


def to_pixels(views: Views, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip b's rgb, static and dynamic view as pictures, each (T, h, w, 3) uint8; the dynamic one at half its contrast about mid-grey."""
    std = torch.tensor(STD).view(3, 1, 1, 1)
    mean = torch.tensor(MEAN).view(3, 1, 1, 1)
    rgb, static, dynamic = (view[b].float().cpu() for view in views)  # (3, T, h, w) each
    images = (rgb * std + mean, static * std + mean, dynamic * std / 2 + 0.5)
    rgb, static, dynamic = ((i * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0) for i in images)
    return rgb.numpy(), static.numpy(), dynamic.numpy()
