"""The numerical core of DCLR: contrastive loss, positive mining and view generation.

Each function is plain torch (and kornia) that a reader can check against the formula; it runs where its tensors are.
Nothing here knows of the rest of the project.
"""

from kernels.info_nce import info_nce, mine_positives
from kernels.view_generation import Augmentation, ViewParams, Views, Yuv420, augment, generate_views

__all__ = ["Augmentation", "ViewParams", "Views", "Yuv420", "augment", "generate_views", "info_nce", "mine_positives"]
