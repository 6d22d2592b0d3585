"""Figures that others published for UCF101 and HMDB51, with their source and protocol. None of them is ours.

Top-1 accuracy and R@1 in percent, as printed by the source. A figure is here only if somebody on this project read it
there, or in the project's notes of that source (docs/method.md, "Figures of the field"). The table of DCLR's paper is
not here, because we could not read it in a primary source. Clips, crops, epochs and the number of splits differ between
the rows.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row: a method with its figures. A figure is None if the source does not give it."""

    method: str
    pretrained: str
    backbone: str
    """NOT_STATED if we do not know the network of these figures"""
    ucf101: float | None = None
    """top-1 accuracy of the whole network, finetuned on UCF101"""
    hmdb51: float | None = None
    """the same on HMDB51"""
    linear: float | None = None
    """top-1 accuracy of a linear classifier on the frozen network, on UCF101"""
    retrieval: float | None = None
    """R@1 on UCF101"""
    protocol: str
    """what the source says about its protocol; NOT_STATED if we do not know"""
    source: str


NOT_STATED = "not stated"
NOTES = "as in docs/method.md"
SEVERE = "SEVERE++, Thoker et al., arXiv 2504.05706, " + NOTES
ONE_PROTOCOL = "one protocol for the rows of this source"
RSPNET = "README of PeihaoChen/RSPNet (AAAI 2021)"
COCLR = "README of TengdaHan/CoCLR (NeurIPS 2020)"
PRP = "README of yuanyao366/PRP (CVPR 2020)"

ROWS = (
    Published(method="VCOP", pretrained="UCF101", backbone="R(2+1)D", ucf101=72.4, hmdb51=30.9,
              protocol=NOT_STATED, source="Xu et al., CVPR 2019, " + NOTES),
    Published(method="PRP", pretrained="UCF101, split 1", backbone="R(2+1)D", ucf101=72.1, hmdb51=35.0,
              protocol="pretrained 300 epochs", source=PRP),
    Published(method="Pace", pretrained="UCF101", backbone="R(2+1)D", ucf101=75.9, hmdb51=35.9,
              protocol=NOT_STATED, source="Wang, Jiao and Liu, ECCV 2020, " + NOTES),
    Published(method="Pace", pretrained="UCF101", backbone=NOT_STATED, retrieval=31.9,
              protocol=NOT_STATED, source="Wang, Jiao and Liu, ECCV 2020, " + NOTES),
    Published(method="InfoNCE (MoCo)", pretrained="UCF101", backbone="S3D", linear=46.8, retrieval=33.1,
              protocol="32 frames of 128 x 128; linear probe after 500 epochs, R@1 of the checkpoint of epoch 399",
              source=COCLR),
    Published(method="CoCLR", pretrained="UCF101", backbone="S3D", retrieval=51.8,
              protocol="32 frames of 128 x 128; the released checkpoint (the paper: 53.3)", source=COCLR),
    Published(method="TCLR", pretrained="UCF101", backbone="R3D-18", ucf101=82.4, hmdb51=52.9,
              protocol=NOT_STATED, source="Dave et al., CVIU 2022, " + NOTES),
    Published(method="TCLR", pretrained="UCF101", backbone=NOT_STATED, retrieval=56.2,
              protocol=NOT_STATED, source="Dave et al., CVIU 2022, " + NOTES),
    Published(method="TCLR, released code", pretrained="UCF101", backbone="R3D-18", ucf101=82.0, linear=69.9,
              retrieval=56.1, protocol=NOT_STATED, source="README of DAVEISHAN/TCLR"),
    Published(method="RSPNet", pretrained="Kinetics-400", backbone="R(2+1)D", ucf101=81.1, hmdb51=44.6,
              protocol="pretrained 200 epochs", source=RSPNET),
    Published(method="RSPNet", pretrained="Kinetics-400", backbone="S3D-G", ucf101=93.7, hmdb51=64.7,
              protocol="pretrained 1000 epochs", source=RSPNET),
    Published(method="CoCLR", pretrained="Kinetics-400", backbone="S3D", ucf101=87.89, retrieval=45.6,
              protocol="32 frames of 128 x 128; the released checkpoint", source=COCLR),
    Published(method="MoCo", pretrained="Kinetics-400", backbone="R(2+1)D-18", ucf101=83.3,
              protocol=ONE_PROTOCOL, source=SEVERE),
    Published(method="VideoMoCo", pretrained="Kinetics-400", backbone="R(2+1)D-18", ucf101=84.9,
              protocol=ONE_PROTOCOL, source=SEVERE),
    Published(method="TCLR", pretrained="Kinetics-400", backbone="R(2+1)D-18", ucf101=90.8,
              protocol=ONE_PROTOCOL, source=SEVERE),
    Published(method="Tubelet-Contrast", pretrained="Kinetics-400", backbone="R(2+1)D-18", ucf101=91.0,
              protocol=ONE_PROTOCOL, source=SEVERE),
    Published(method="supervised", pretrained="Kinetics-400", backbone="R(2+1)D-18", ucf101=91.4,
              protocol=ONE_PROTOCOL, source=SEVERE),
)  # fmt: skip
