"""The constants and tensor records that the kernels, their references and their callers share.

Letters: B clips in a batch, T frames, H, W pixels of the padded buffer that clips of different sizes share, h, w pixels
of a view, P contrastive pairs. For a convolution: C and C' channels before and after, D frames, H, W pixels.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

EMBEDDING_SIZES = (32, 64, 128, 256)
"""Embedding sizes that the Triton kernels support. The reference supports any size."""

# Means and standard deviations of ImageNet's RGB channels, for values between 0 and 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

BLUR_KERNEL = 11
"""Height and width of the Gaussian blur's kernel, in pixels."""

Boundary = Literal["wrap", "zero", "replicate"]
"""How the dynamic view treats the first frame, which has no frame before it.

`kernels.generate_views` defines each value.
"""


class Contrast(NamedTuple):
    """Contrastive losses of P pairs, with two mean similarities that show how training develops.

    All fields are float32. Only the losses carry a gradient.
    """

    losses: Tensor  # (P,)
    positive: Tensor  # (P,) mean over B of query . key
    hardest: Tensor  # (P,) mean over B of the greatest query . queue entry


class Views(NamedTuple):
    """Three views of B clips, each (B, 3, T, h, w) in channels_last_3d memory.

    `generate_views` writes one frame of the static view and expands it over time, so its stride along T is 0.
    """

    rgb: Tensor
    static: Tensor
    dynamic: Tensor


@dataclass(frozen=True)
class Yuv420:
    """Frames of B clips, or B stills, as uint8 planes of YUV 4:2:0.

    The luma plane has a value for every pixel. The chroma planes have a value for every square of 2 x 2 pixels.
    If height or width is odd, the frame's border cuts the last squares in half. Chroma is repeated, not interpolated.
    """

    y: Tensor  # (B, T, H, W); stills (B, H, W)
    u: Tensor  # (B, T, ceil(H / 2), ceil(W / 2)); stills without T
    v: Tensor  # same shape as u
    bt709: Tensor  # (B,) bool: True for the matrix of BT.709, False for BT.601
    full_range: Tensor  # (B,) bool: True for 0..255 in all planes, False for 16..235 in y and 16..240 in u and v

    def select(self, index: Any) -> "Yuv420":
        """Return the frames with `index` applied to y, u and v. The two flags stay as they are.

        `frames.select(np.s_[:, 3])` returns frame 3 of each clip as stills. The index must keep all B clips.
        """
        return Yuv420(self.y[index], self.u[index], self.v[index], self.bt709, self.full_range)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Yuv420":
        """Return these frames on `device`."""
        return Yuv420(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))


def _row(dtype: type, *shape: int) -> dict[str, Any]:
    """Describe the values that one clip has in a field of `Augmentation`."""
    return {"dtype": dtype, "shape": shape}


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of B clips: one row for each clip in each tensor.

    The fields declare names, dtypes and shapes once. `AUGMENTATION` and `TABLE_COLUMNS` follow from this declaration.
    """

    # (B, 2): valid height and width, at the top left of the padded buffer
    size: Tensor = field(metadata=_row(np.int64, 2))
    # (B, 4): top, left, height and width of the crop in pixels of the frame, before it is turned, within the valid part
    box: Tensor = field(metadata=_row(np.int64, 4))
    # (B,): True mirrors left and right
    flip: Tensor = field(metadata=_row(np.bool_))
    # (B,): True removes all colour
    grayscale: Tensor = field(metadata=_row(np.bool_))
    # (B,): True applies `factors` in the order `order`
    jitter: Tensor = field(metadata=_row(np.bool_))
    # (B,): standard deviation of the Gaussian blur in pixels of the view; 0 for no blur
    sigma: Tensor = field(metadata=_row(np.float32))
    # (B, 4): brightness, contrast, saturation (1 changes nothing) and hue in turns of the colour circle (0 changes
    # nothing)
    factors: Tensor = field(metadata=_row(np.float32, 4))
    # (B, 4): a permutation of 0..3, the order in which the four factors are applied
    order: Tensor = field(metadata=_row(np.int64, 4))
    # (B,): quarter turns clockwise that bring the crop upright, 0..3, plus 4 to mirror the turned crop left to right
    orientation: Tensor = field(metadata=_row(np.int64))
    # (B,): True jitters in the additive form, see `augment`
    additive: Tensor = field(metadata=_row(np.bool_))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Augmentation":
        """Return these parameters on `device`."""
        return Augmentation(
            *(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        )


AUGMENTATION = np.dtype([(f.name, f.metadata["dtype"], f.metadata["shape"]) for f in fields(Augmentation)])
"""The NumPy dtype of one clip's row of `Augmentation`, with the same field names. Data workers draw such records."""


def _table_columns() -> dict[str, int]:
    """Return the first column of each field in the table that the Triton kernels read.

    The table is (rows, C) float32, one column for each value. It has no column for `size`, because the kernels need
    only the box.
    """
    columns, end = {}, 0
    for name, width in [(f.name, int(np.prod(f.metadata["shape"]))) for f in fields(Augmentation) if f.name != "size"]:
        columns[name] = end
        end += width
    return {**columns, "yuv": end}


TABLE_COLUMNS = _table_columns()
"""First column of each field in the kernels' table of parameters. "yuv" is the first of 6 columns for YUV frames."""


@dataclass(frozen=True)
class ViewParams:
    """The parameters that turn B clips and their stills into views."""

    clip: Augmentation
    still: Augmentation
    size: tuple[int, int]  # h, w of every view

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewParams":
        """Return these parameters on `device`."""
        return ViewParams(self.clip.to(device, non_blocking), self.still.to(device, non_blocking), self.size)


CONVOLUTIONS = {"temporal": (3, 1, 1), "spatial": (1, 3, 3)}
"""The size of a convolution's kernel along time, height and width, by kind."""


class Normalisation(NamedTuple):
    """What a convolution first does to its input x: relu((x - mean) * scale + shift). Each is (C,) float32."""

    mean: Tensor
    scale: Tensor
    shift: Tensor


class Convolved(NamedTuple):
    """The result of a convolution, and its statistics over all clips, frames and pixels."""

    frames: Tensor  # (B, C', D, H, W) in channels_last_3d memory, with the dtype of the input
    mean: Tensor  # (C',) float32
    variance: Tensor  # (C',) float32, biased


def kind_of(weight: Tensor) -> str:
    """Return the kind of a convolution's weight, "temporal" or "spatial". Raises ValueError if it is neither."""
    for kind, size in CONVOLUTIONS.items():
        if weight.dim() == 5 and weight.shape[2:] == size:
            return kind
    raise ValueError(f"weight must be (C', C, 3, 1, 1) or (C', C, 1, 3, 3), not {tuple(weight.shape)}")
