"""Networks: video backbones, projection heads and classifiers, and files of their weights."""

from dclr.models.backbone import Backbone
from dclr.models.backbones import BACKBONES, MAX_WIDTH, backbone_without_memory, build_backbone, map_size
from dclr.models.classifier import Classifier, count_correct, save_classifier
from dclr.models.clip_format import IMAGENET, KINETICS, ClipFormat, Statistics
from dclr.models.heads import LinearHead, ProjectionHead, activation_map, pool
from dclr.models.pretrained import Pretrained, load_classifier, load_pretrained
from dclr.models.weights import load_backbone, save_backbone

__all__ = [
    "BACKBONES",
    "IMAGENET",
    "KINETICS",
    "MAX_WIDTH",
    "Backbone",
    "Classifier",
    "ClipFormat",
    "LinearHead",
    "Pretrained",
    "ProjectionHead",
    "Statistics",
    "activation_map",
    "backbone_without_memory",
    "build_backbone",
    "count_correct",
    "load_backbone",
    "load_classifier",
    "load_pretrained",
    "map_size",
    "pool",
    "save_backbone",
    "save_classifier",
]
