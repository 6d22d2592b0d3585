"""Pretraining methods, one class in one file each. A method says what a training step computes."""

from dclr.methods.dclr import DCLR
from dclr.methods.encoder import Encoder
from dclr.methods.method import QUEUE_SETTINGS, VIEW_SETTINGS, Method
from dclr.methods.moco import MoCo
from dclr.methods.simclr import SimCLR
from dclr.methods.simsiam import SimSiam
from dclr.methods.videomoco import VideoMoCo

__all__ = [
    "DCLR",
    "METHODS",
    "QUEUE_SETTINGS",
    "VIEW_SETTINGS",
    "Encoder",
    "Method",
    "MoCo",
    "SimCLR",
    "SimSiam",
    "VideoMoCo",
]

METHODS: dict[str, type[Method]] = {
    "dclr": DCLR,
    "moco": MoCo,
    "dclr-simclr": SimCLR,
    "simsiam": SimSiam,
    "videomoco": VideoMoCo,
}
"""Name -> class of every method. Flags and files read this dictionary when they need it, so an entry that is added
before the command line is parsed counts everywhere."""
