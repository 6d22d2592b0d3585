"""A linear classifier on the pooled features of a backbone, with torchvision's parameter names."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from dclr.errors import UserError
from dclr.models.backbone import Backbone
from dclr.models.backbones import backbone_without_memory, build_backbone
from dclr.models.heads import pool
from dclr.models.tensor_file import read_tensors, write_safetensors
from dclr.models.weights import check_finite, check_fits

FILE_NAME = "classifier.safetensors"
"""The name of the classifier's file in a run's folder."""


class Classifier(nn.Module):
    """Backbone, `pool`, dropout and a linear layer `fc`.

    With `frozen` (the linear protocol) the backbone gets no gradient and stays in evaluation mode.
    """

    def __init__(self, backbone: Backbone, classes: int, dropout: float = 0.0, frozen: bool = False) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(backbone.feature_dim, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Classify clips: (B, 3, T, H, W) -> logits (B, classes) float32."""
        return self.fc(self.dropout(pool(self.backbone(x)))).float()


def save_classifier(classifier: Classifier, classes: tuple[str, ...], path: Path) -> None:
    """Write a classifier as safetensors, with the class names and the backbone's name and width as metadata.

    Raises:
        UserError: the weights are not finite. Nothing is written.
    """
    tensors = {**classifier.backbone.state_dict(), **{f"fc.{k}": v for k, v in classifier.fc.state_dict().items()}}
    check_finite(path, tensors)
    backbone = classifier.backbone
    metadata = {
        "format": "dclr",
        "backbone": backbone.name,
        "width": str(backbone.width),
        "classes": json.dumps(classes),
    }
    write_safetensors(tensors, metadata, path)


def load_classifier(path: Path) -> tuple[Classifier, tuple[str, ...]]:
    """Read a classifier and its class names from a file of `save_classifier`, or from the folder of a run.

    The metadata is not trusted. The network is built without memory first, and with memory only if the file's tensors
    have its shapes.

    Raises:
        UserError: the file does not exist, `save_classifier` did not write it, or its weights are not finite.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--checkpoint: no {file}; give the folder of a finetune or linear run, or its {FILE_NAME}")
    tensors, metadata = read_tensors(file)
    head = {name.removeprefix("fc."): tensor for name, tensor in tensors.items() if name.startswith("fc.")}
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    try:
        classes = json.loads(metadata["classes"])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are not a list of names")
        backbone = backbone_without_memory(metadata["backbone"], int(metadata["width"]))
        check_fits(file, body, backbone)
        shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
        if shapes != {"weight": (len(classes), backbone.feature_dim), "bias": (len(classes),)}:
            raise ValueError(f"fc does not have {len(classes)} classes by {backbone.feature_dim} features")
    except (KeyError, ValueError, RecursionError, UserError) as error:
        raise UserError(
            f"--checkpoint {file}: not a classifier written by train.py finetune or linear ({error})"
        ) from None
    check_finite(file, tensors)
    classifier = Classifier(build_backbone(backbone.name, backbone.width), len(classes))
    classifier.fc.load_state_dict(head)
    classifier.backbone.load_state_dict(body, strict=False)  # not strict: see load_backbone
    return classifier, tuple(classes)


def count_correct(logits: Tensor, labels: Tensor, k: int) -> int:
    """Count the rows of `logits` (N, classes) whose label (N,) is among their k highest logits."""
    best = torch.topk(logits, min(k, logits.shape[1]), dim=1).indices
    return int((best == labels[:, None]).any(1).sum())
