"""A linear classifier on the pooled features of a backbone, with torchvision's parameter names."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dclr.models.backbone import Backbone
from dclr.models.clip_format import ClipFormat
from dclr.models.heads import NormalisedLinear, pool
from dclr.models.weights import save_weights


class Classifier(nn.Module):
    """Backbone, `pool`, dropout and a linear layer `fc`.

    With `frozen` (the linear protocol) the backbone gets no gradient and stays in evaluation mode. With `normalised`,
    `fc` scales each clip's pooled feature to length 1 first.
    """

    def __init__(
        self, backbone: Backbone, classes: int, dropout: float = 0.0, frozen: bool = False, normalised: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        self.dropout = nn.Dropout(dropout)
        self.fc = (NormalisedLinear if normalised else nn.Linear)(backbone.feature_dim, classes)
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


def save_classifier(
    classifier: Classifier, classes: tuple[str, ...], path: Path, clips: ClipFormat | None = None
) -> None:
    """Write a classifier as safetensors, with the names of its classes. Raises UserError: see save_weights.

    Finetuning changes the backbone, so the projection heads that it was pretrained with no longer fit and are dropped.
    """
    save_weights(path, classifier.backbone, clips, fc=classifier.fc, classes=classes)


def count_correct(logits: Tensor, labels: Tensor, k: int) -> int:
    """Count the rows of `logits` (N, classes) whose label (N,) is among their k highest logits."""
    best = torch.topk(logits, min(k, logits.shape[1]), dim=1).indices
    return int((best == labels[:, None]).any(1).sum())
