"""An encoder: a backbone that all views share, and one projection head for each embedding.

Letters: B clips in a batch, C channels, T frames, H W pixels, D embedding size. Small t h w are the sizes of a feature
map.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dclr.kernels import Views
from dclr.models import ProjectionHead, build_backbone, pool

if TYPE_CHECKING:  # dclr.config imports the methods' names
    from dclr.config import ModelConfig

# An embedding is named by two letters: the view it is pooled from, and the content it stands for. vs is the static
# content of the rgb clip; sv is the static view itself, compared with the rgb clip.
# A pair is named by its query. Its key stands for the same content, seen from the other view.
PAIRS = ("vv", "vs", "vd", "sv", "dv")
KEY_OF_PAIR = {"vv": "vv", "vs": "sv", "vd": "dv", "sv": "vs", "dv": "vd"}

ByLetter = dict[str, Tensor]
"""Feature maps or activation maps, by the letter of their view."""


def pairs_of(auxiliary: str) -> tuple[str, ...]:
    """Return the names of the pairs, in the order of PAIRS. `auxiliary`: the letters of the auxiliary views."""
    return tuple(name for name in PAIRS if set(name) <= set("v" + auxiliary))


def by_pair(pairs: Sequence[str], name: str, values: Tensor) -> dict[str, Tensor]:
    """Name the numbers (P,) of the pairs: name/pair."""
    return {f"{name}/{pair}": value for pair, value in zip(pairs, values, strict=True)}


class Encoder(nn.Module):
    """A backbone that all views share, and one projection head for each embedding."""

    def __init__(self, model: "ModelConfig", embedding_dim: int, pairs: Sequence[str] = PAIRS) -> None:
        super().__init__()
        self.backbone = build_backbone(model.backbone, model.width)
        self.heads = nn.ModuleDict({name: ProjectionHead(self.backbone.feature_dim, embedding_dim) for name in pairs})

    def embed(self, features: ByLetter, maps: ByLetter) -> dict[str, Tensor]:
        """Return the embeddings (B, D) by name.

        Args:
            features: feature maps (B, C, t, h, w) of the views.
            maps: activation maps (B, 1, t, h, w) that weigh the rgb features for vs and vd.
        """
        embeddings = {}
        for name, head in self.heads.items():
            view, content = name[0], name[1]
            weight = maps.get(content) if view == "v" else None  # vv has no weight
            embeddings[name] = head(pool(features[view], weight))
        return embeddings


def run_backbone(encoder: Encoder, views: Views, letters: str) -> ByLetter:
    """Return the feature maps (B, C, t, h, w) of some views, which share BatchNorm statistics.

    The dynamic view, a difference of frames, must be the last of `letters`. All frames of the static view are equal,
    so the backbone gets one of them.
    """
    tensors = {"v": views.rgb, "s": views.static[:, :, :1], "d": views.dynamic}
    maps = encoder.backbone.forward_views(
        [tensors[letter] for letter in letters], views.rgb.shape[2], differences=letters.endswith("d")
    )
    return dict(zip(letters, maps, strict=True))
