"""The random augmentation of clips, and views as pictures.

The augmentation of one clip is a row: one record of the NumPy dtype `kernels.types.AUGMENTATION`. Rows are cheap, so a
worker can draw thousands a second. `to_augmentation` converts a batch of rows to the tensors that
`kernels.generate_views` takes. Every function is pure: the same generator state gives the same row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dclr.data.clips import evenly_spaced
from dclr.data.display import AS_CODED, Box, Display
from dclr.kernels import Augmentation, Views
from dclr.kernels.types import AUGMENTATION, MEAN, STD

CENTRE = 112 / 128
"""Side of the test crop, as a fraction of the frame's short side: 112 pixels of frames scaled to 128."""


@dataclass(frozen=True, kw_only=True)
class AugmentRecipe:
    """The distribution of augmentations."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest fraction of the frame's area that the crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of the crop's width to its height."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    grayscale: float = 0.2
    """Probability that all colour is removed."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """The brightness factor is uniform within this distance of 1, but not negative."""
    contrast: float = 0.4
    """The same for the contrast factor."""
    saturation: float = 0.4
    """The same for the saturation factor."""
    hue: float = 0.1
    """The hue shift, in turns of the colour circle, is uniform within this distance of 0."""
    additive: bool = False
    """The form of colour jitter, see `kernels.augment`. True: the same brightness factor f adds f - 1."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""

    def __post_init__(self) -> None:
        for name in ("flip", "grayscale", "jitter", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, 0 to 1, not {getattr(self, name)}")
        for name in ("scale", "ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a smallest and a largest value above 0, not {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be 0 to 0.5 turns, not {self.hue}")


PRETRAIN = AugmentRecipe()
"""The recipe of the released pretraining code, but with the multiplicative form of the colour jitter."""


VIDEOMOCO = AugmentRecipe(jitter=1.0, hue=0.4, blur=0.0)
"""The recipe of VideoMoCo's released code: strong jitter of every clip, and no blur."""


def pretrain_recipe(jitter: float, name: str = "dclr", form: str = "multiplicative") -> AugmentRecipe:
    """Return a published recipe with another strength of colour jitter. 1 is the published strength, 0 turns it off.

    `name`: a value of --augmentation. `form`: a value of --jitter-form.
    """
    recipe = {"dclr": PRETRAIN, "videomoco": VIDEOMOCO}[name]
    scaled = {factor: jitter * getattr(recipe, factor) for factor in ("brightness", "contrast", "saturation", "hue")}
    return replace(recipe, **{**scaled, "hue": min(scaled["hue"], 0.5)}, additive=form == "additive")


FINETUNE = {
    "crop": AugmentRecipe(grayscale=0.0, jitter=0.0, blur=0.0),
    "released": AugmentRecipe(blur=0.0, additive=True),
}
"""The recipes of training on labels, by the values of --finetune-augmentation. "crop" has the crop and the flip only.
"released" is the recipe of the released code. It also removes the colour (probability 0.2) and jitters it (probability
0.8, additive form)."""


def draw_augmentation(
    rng: np.random.Generator, height: int, width: int, recipe: AugmentRecipe, display: Display = AS_CODED
) -> np.ndarray:
    """Draw the augmentation of a clip whose coded frames have height x width pixels and are shown by `display`.

    The crop is drawn in the shown frame: upright, in square pixels.

    The order is: the crop (see `_draw_box`), flip, grayscale, whether to jitter, the four factors (uniform, like
    kornia's ColorJitter), their order (a uniform permutation), whether to blur, sigma (uniform; 0 without blur).
    After the crop, the number of random numbers does not depend on their values. So two recipes that differ only in a
    probability agree in everything else.

    Returns:
        0-dimensional array of dtype AUGMENTATION.
    """
    row = np.zeros((), AUGMENTATION)
    row["size"] = height, width
    row["box"] = display.coded_box(_draw_box(rng, *display.size(height, width), recipe), height, width)
    row["orientation"] = display.orientation
    row["flip"] = rng.random() < recipe.flip
    row["grayscale"] = rng.random() < recipe.grayscale
    row["jitter"] = rng.random() < recipe.jitter
    row["additive"] = recipe.additive
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


def centre_crop(height: int, width: int, display: Display = AS_CODED) -> np.ndarray:
    """Return the row of the test protocol: `centre_box` of the shown frame, and no other augmentation.

    `height` and `width` are those of the coded frames, which are shown by `display`.

    Returns:
        0-dimensional array of dtype AUGMENTATION.
    """
    row = np.zeros((), AUGMENTATION)
    row["size"] = height, width
    row["box"] = display.coded_box(centre_box(*display.size(height, width)), height, width)
    row["orientation"] = display.orientation
    row["factors"] = 1, 1, 1, 0
    row["order"] = 0, 1, 2, 3
    return row


def centre_box(height: int, width: int) -> Box:
    """Return the centre square of 0.875 of the short side."""
    side = max(1, round(CENTRE * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


def to_augmentation(rows: np.ndarray | Sequence[np.ndarray]) -> Augmentation:
    """Convert B rows, a list or one array (B,) of dtype AUGMENTATION, to tensors."""
    table = rows if isinstance(rows, np.ndarray) else np.stack(rows)  # (B,)
    return Augmentation(**{name: torch.from_numpy(table[name].copy()) for name in AUGMENTATION.names or ()})


def _draw_box(rng: np.random.Generator, height: int, width: int, recipe: AugmentRecipe) -> Box:
    """Return a random resized crop, drawn like torchvision's RandomResizedCrop.

    The area is uniform, the ratio of width to height is log-uniform, and the position is uniform. If ten tries give no
    box that fits, the crop is the largest centred box with an allowed ratio.
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


GRID_FRAMES = 8
"""Most frames of a clip that a picture of the views shows."""


def view_grid(views: Views, clips: int) -> np.ndarray:
    """Return a picture of the views of the first clips, (3 * clips * h, columns * w, 3) uint8.

    Each clip has three rows: rgb, static and dynamic view. The columns are up to 8 evenly spaced frames.
    """
    shown = evenly_spaced(views.rgb.shape[2], GRID_FRAMES)
    rows = []
    for b in range(min(clips, views.rgb.shape[0])):
        # (T, h, w, 3) -> (h, columns * w, 3)
        rows += [np.concatenate(list(pixels[shown]), axis=1) for pixels in to_pixels(views, b)]
    return np.concatenate(rows)


def to_pixels(views: Views, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rgb, static and dynamic view of clip b as pictures, each (T, h, w, 3) uint8.

    The dynamic view is shown at half its contrast around mid-grey, so that a difference of -1 to 1 fits in 0 to 1.
    """
    std = torch.tensor(STD).view(3, 1, 1, 1)
    mean = torch.tensor(MEAN).view(3, 1, 1, 1)
    rgb, static, dynamic = (view[b].float().cpu() for view in views)  # (3, T, h, w) each
    images = (rgb * std + mean, static * std + mean, dynamic * std / 2 + 0.5)
    rgb, static, dynamic = ((i * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0) for i in images)
    return rgb.numpy(), static.numpy(), dynamic.numpy()
