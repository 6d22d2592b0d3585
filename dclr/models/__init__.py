"""Networks: video backbones, projection heads and classifiers, and files of their weights."""

from dclr.models.backbone import Backbone
from dclr.models.backbones import BACKBONES, MAX_WIDTH, backbone_without_memory, build_backbone, map_size
from dclr.models.classifier import Classifier, count_correct, load_classifier, save_classifier
from dclr.models.heads import ProjectionHead, activation_map, pool
from dclr.models.weights import load_backbone, save_backbone

__all__ = [
    "BACKBONES",
    "MAX_WIDTH",
    "Backbone",
    "Classifier",
    "ProjectionHead",
    "activation_map",
    "backbone_without_memory",
    "build_backbone",
    "count_correct",
    "load_backbone",
    "load_classifier",
    "map_size",
    "pool",
    "save_backbone",
    "save_classifier",
]
