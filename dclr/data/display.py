"""How the frames of a video are shown: turned upright, perhaps mirrored, with pixels that may not be square.

A file holds *coded* frames and says how to show them. Phones hold the camera upright and code a frame that lies on its
side. Camcorders and DVDs code pixels that are wider or narrower than high. Frames are read and stored as coded. Crops
are drawn in the *shown* frame and then expressed in coded pixels, so neither costs anything for each frame.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_ASPECT = 4.0
"""Largest ratio of a pixel's longer to its shorter side that is applied. Video formats in use reach 2.9. A larger
number comes from a wrong header and would leave a strip of a picture."""

LEAST_DIFFERENCE = 0.01
"""Pixels whose sides differ by this share or less are taken as square. Programs that resize videos round the size of
the frame and write 256:255 or 512:513 to compensate, less than two pixels on the width of a small video."""

Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""


class Display(NamedTuple):
    """What a file says about showing its frames."""

    orientation: int = 0
    """Quarter turns clockwise that bring a coded frame upright, 0 to 3, plus 4 if the turned frame is then mirrored
    left to right."""
    pixel_width: int = 1
    """Width of a coded pixel, in the unit of `pixel_height`."""
    pixel_height: int = 1
    """Height of a coded pixel."""

    @property
    def declared_aspect(self) -> float:
        """Width of a coded pixel divided by its height, as the file declares it."""
        return self.pixel_width / self.pixel_height

    @property
    def absurd(self) -> bool:
        """True if the declared aspect is outside 1:4 to 4:1. It is then ignored."""
        return not 1 / MOST_ASPECT <= self.declared_aspect <= MOST_ASPECT

    @property
    def aspect(self) -> float:
        """The aspect that is applied: the declared one, or 1 if that is absurd or almost 1."""
        square = abs(self.declared_aspect - 1) <= LEAST_DIFFERENCE
        return 1.0 if square or self.absurd else self.declared_aspect

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the shown frame in square pixels, given those of the coded frame.

        The longer side of a pixel is stretched, so no side loses pixels.
        """
        height, width = round(height * max(1.0, 1 / self.aspect)), round(width * max(1.0, self.aspect))
        return (width, height) if self.orientation % 2 else (height, width)

    def coded_box(self, box: Box, height: int, width: int) -> Box:
        """Return a box of the shown frame as a box of the coded frame, which has height x width pixels.

        Without pixel aspect the box holds exactly the same pixels. Otherwise its sides are rounded to coded pixels.
        """
        top, left, box_height, box_width = box
        shown_height, shown_width = self.size(height, width)
        if self.orientation & 4:
            left = shown_width - left - box_width
        for _ in range(self.orientation & 3):  # undo a quarter turn clockwise
            top, left, box_height, box_width = shown_width - left - box_width, top, box_width, box_height
            shown_height, shown_width = shown_width, shown_height
        top, box_height = _scaled(top, box_height, shown_height, height)
        left, box_width = _scaled(left, box_width, shown_width, width)
        return top, left, box_height, box_width

    def shown_box(self, box: Box, height: int, width: int) -> Box:
        """Return a box of the coded frame, which has height x width pixels, as a box of the shown frame."""
        top, left, box_height, box_width = box
        stretched_height, stretched_width = self._replace(orientation=0).size(height, width)
        top, box_height = _scaled(top, box_height, height, stretched_height)
        left, box_width = _scaled(left, box_width, width, stretched_width)
        for _ in range(self.orientation & 3):  # a quarter turn clockwise
            top, left, box_height, box_width = left, stretched_height - top - box_height, box_width, box_height
            stretched_height, stretched_width = stretched_width, stretched_height
        if self.orientation & 4:
            left = stretched_width - left - box_width
        return top, left, box_height, box_width


AS_CODED = Display()
"""Frames that are shown as they are coded."""


@dataclass(frozen=True)
class Displays:
    """What the files of N videos say about showing their frames."""

    values: np.ndarray
    """(N, 3) int64, the fields of each `Display`."""
    oblique: np.ndarray
    """(N,) bool, True if the file turns its frames by an angle that is not a multiple of 90 degrees."""
    interlaced: np.ndarray
    """(N,) bool, True if a frame is marked as interlaced."""

    def __getitem__(self, index: int) -> Display:
        """Return the display of one video."""
        return Display(*self.values[index].tolist())

    def select(self, rows: np.ndarray) -> "Displays":
        """Return the displays of some videos, given by their numbers."""
        return Displays(self.values[rows], self.oblique[rows], self.interlaced[rows])

    def unusual(self) -> dict[str, np.ndarray]:
        """Return the numbers of the videos that are not shown as coded, or not progressive, by what is unusual."""
        rows = np.flatnonzero((self.values != AS_CODED).any(axis=1))  # few, of perhaps a million videos
        each = [self[row] for row in rows.tolist()]
        return {
            "rotated": rows[[display.orientation != 0 for display in each]],
            "rotated_by_other_angle": np.flatnonzero(self.oblique),
            "pixels_not_square": rows[[display.aspect != 1 for display in each]],
            "pixel_aspect_ignored": rows[[display.absurd for display in each]],
            "interlaced": np.flatnonzero(self.interlaced),
        }


def collect_displays(records: Iterable[tuple[Display, bool, bool]]) -> Displays:
    """Return the displays of videos, given (display, oblique, interlaced) of each."""
    rows = list(records)
    return Displays(
        np.array([display for display, _, _ in rows], np.int64).reshape(-1, 3),
        np.array([oblique for _, oblique, _ in rows], bool),
        np.array([interlaced for _, _, interlaced in rows], bool),
    )


def are_displays(values: np.ndarray) -> bool:
    """Return whether numbers from a file, (N, 3), are displays: orientation 0 to 7, sides of a pixel 1 to 2^31 - 1."""
    return bool(((values >= [0, 1, 1]) & (values <= [7, 2**31 - 1, 2**31 - 1])).all())


def _scaled(start: int, extent: int, pixels: int, new_pixels: int) -> tuple[int, int]:
    """Return a section of an axis of `pixels` pixels on the same axis of `new_pixels` pixels. It is not empty."""
    new_extent = max(1, round(extent * new_pixels / pixels))
    return min(round(start * new_pixels / pixels), new_pixels - new_extent), new_extent


def orientation_of(matrix: np.ndarray) -> tuple[int, bool]:
    """Return the orientation of a display matrix (see `Display`), and whether it is exactly a multiple of 90 degrees.

    A matrix of another angle gives the nearest quarter turn. A matrix without a direction gives 0.

    Args:
        matrix: (9,) int32, FFmpeg's AV_PKT_DATA_DISPLAYMATRIX: a, b, u, c, d, v, x, y, w. The point (p, q) of the
            coded frame, q downwards, is shown at (a p + c q, b p + d q).
    """
    a, b, _, c, d = matrix[:5].tolist()
    mirrored = a * d - b * c < 0
    if a == b == 0:
        return 0, True
    angle = math.degrees(math.atan2(b, -a if mirrored else a))  # clockwise, of the turn before the mirroring
    turns = round(angle / 90)
    return turns % 4 + 4 * mirrored, abs(angle - 90 * turns) < 0.5


def turned(images: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of images (N, H, W, ...) in this orientation."""
    upright = np.rot90(images, -(orientation & 3), axes=(1, 2))
    return upright[:, :, ::-1] if orientation & 4 else upright


def turned_back(images: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of images (N, H, W, ...) that undoes `turned`."""
    unmirrored = images[:, :, ::-1] if orientation & 4 else images
    return np.rot90(unmirrored, orientation & 3, axes=(1, 2))


def shown(images: np.ndarray, display: Display) -> np.ndarray:
    """Return coded images (N, H, W, ...) as they are shown: upright and in square pixels, for pictures and masks.

    Pixels that are not square are repeated (nearest neighbour).
    """
    upright = turned(images, display.orientation)
    for axis, pixels in zip((1, 2), display.size(*images.shape[1:3]), strict=True):
        if upright.shape[axis] != pixels:
            upright = upright.take((2 * np.arange(pixels) + 1) * upright.shape[axis] // (2 * pixels), axis=axis)
    return upright
