"""The numerical core of DCLR: contrastive loss, positive mining and view generation.

Each function has a plain reference (torch and kornia) that a reader can check against the formula, and Triton kernels that compute the
same faster. It runs where its tensors are: the kernels on a CUDA device, the reference elsewhere; `set_backend` forces one of them.
Nothing here knows of the rest of the project.
"""

from kernels.backend import BACKENDS, describe, set_backend
from kernels.info_nce import contrast, info_nce, mine_positives, mine_positives_by_each
from kernels.types import EMBEDDING_SIZES, Augmentation, Contrast, ViewParams, Views, Yuv420
from kernels.view_generation import augment, generate_views

__all__ = [
    "BACKENDS",
    "EMBEDDING_SIZES",
    "Augmentation",
    "Contrast",
    "ViewParams",
    "Views",
    "Yuv420",
    "augment",
    "contrast",
    "describe",
    "generate_views",
    "info_nce",
    "mine_positives",
    "mine_positives_by_each",
    "set_backend",
]
