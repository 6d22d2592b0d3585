"""MoCo, the baseline of DCLR (He et al., CVPR 2020, arXiv 1911.05722)."""

from dclr.methods.dclr import DCLR
from dclr.methods.method import VIEW_SETTINGS


class MoCo(DCLR):
    """DCLR without auxiliary views: only rgb clips, one pair and one queue (He et al., CVPR 2020)."""

    settings = DCLR.settings - VIEW_SETTINGS
    auxiliary_views = ()
