"""The clips that a network was trained on: their size, and the mean and standard deviation of their channels.

All clips of this project are normalised with ImageNet's statistics. A backbone whose weights expect other statistics
converts its input itself: see backbone.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dclr.kernels.types import MEAN, STD

Channels = tuple[float, float, float]
"""One number for each of the channels red, green and blue, for values between 0 and 1."""


class Statistics(NamedTuple):
    """Mean and standard deviation of the channels. A clip is normalised by (value - mean) / std."""

    mean: Channels
    std: Channels


IMAGENET = Statistics(MEAN, STD)

KINETICS = Statistics((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
"""Statistics of Kinetics-400, with which torchvision's video weights were trained (torchvision.transforms._presets)."""

MAX_SIZE = 10_000
"""The largest length, stride and crop. A wrong number in a file must not fill the memory."""

MIN_STD = 1e-3
"""The smallest standard deviation. Values between 0 and 255 have 1 / 255 of the deviation of values between 0 and 1."""


@dataclass(frozen=True)
class ClipFormat:
    """The clips that a network was trained on. The defaults are the published recipe.

    Attributes:
        length: frames of a clip.
        stride: source frames from one frame of a clip to the next.
        crop: height and width in pixels.
        mean, std: statistics of the channels.

    Raises:
        ValueError: a value is outside its bounds. The values may come from a file of someone else.
    """

    length: int = 16
    stride: int = 2
    crop: int = 112
    mean: Channels = IMAGENET.mean
    std: Channels = IMAGENET.std

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("stride", 1), ("crop", 16)):
            if not least <= getattr(self, name) <= MAX_SIZE:
                raise ValueError(f"the clips' {name} must be from {least} to {MAX_SIZE}")
        for name, low, high in (("mean", -1.0, 1.0), ("std", MIN_STD, 10.0)):
            values = getattr(self, name)
            if len(values) != 3 or not all(low <= value <= high for value in values):  # also if a value is NaN
                raise ValueError(f"the clips' {name} must be three numbers from {low} to {high}")

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.mean, self.std)

    @property
    def settings(self) -> dict[str, int]:
        """The sizes, under the names of the settings of a run. Files of weights state them under the same names."""
        return {"clip_length": self.length, "clip_stride": self.stride, "crop_size": self.crop}
