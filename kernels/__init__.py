"""The numerical core of DCLR: contrastive loss, positive mining, view generation, and convolutions.

Each function has two implementations. The reference uses plain torch and kornia, so that a reader can check it against
the formula. The Triton kernels compute the same values faster. By default CUDA tensors use the kernels and all other
tensors use the reference. `set_backend` chooses one implementation for all tensors. This package imports nothing from
the rest of the project.
"""

from dclr.kernels.backend import BACKENDS, describe, set_backend
from dclr.kernels.convolution import convolve
from dclr.kernels.info_nce import contrast, info_nce, mine_positives, mine_positives_by_each
from dclr.kernels.types import (
    EMBEDDING_SIZES,
    Augmentation,
    Contrast,
    Convolved,
    Normalisation,
    ViewParams,
    Views,
    Yuv420,
)
from dclr.kernels.view_generation import augment, generate_views

__all__ = [
    "BACKENDS",
    "EMBEDDING_SIZES",
    "Augmentation",
    "Contrast",
    "Convolved",
    "Normalisation",
    "ViewParams",
    "Views",
    "Yuv420",
    "augment",
    "contrast",
    "convolve",
    "describe",
    "generate_views",
    "info_nce",
    "mine_positives",
    "mine_positives_by_each",
    "set_backend",
]
