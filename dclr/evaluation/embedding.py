"""The embeddings of a clip: the pooled feature, and the embeddings of its motion and of its scene.

DCLR trains projection heads on the clip's dynamic view (its frame difference) and on its static view (one frame,
repeated). Only a DCLR checkpoint with its heads gives them, but every checkpoint gives the pooled feature.

The heads vd and vs embed the motion and the scene of the rgb clip, but they do not separate the two: among the ten
nearest videos by vd, 11.8 % have the query's motion, compared with 27.5 % by dv and 12.2 % by chance (docs/use.md).

Letters: B clips, T frames, h, w pixels, D numbers of an embedding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dclr.errors import UserError
from dclr.models import Pretrained, pool

POOLED, MOTION, SCENE = "pooled", "motion", "scene"
KINDS = (POOLED, MOTION, SCENE)

HEADS = {MOTION: "dv", SCENE: "sv"}
"""The head that gives an embedding. dv is trained on dynamic views, sv on static views."""

Embedder = Callable[[Tensor], dict[str, Tensor]]
"""A function from clips (B, 3, T, h, w) to embeddings (B, D) float32 by kind."""


def make_embedder(pretrained: Pretrained, kinds: Sequence[str]) -> Embedder:
    """Return the function that computes the embeddings of `kinds`. It runs where the network's weights are.

    The clips are normalised with ImageNet's statistics, as `dclr.kernels.augment` returns them.
        pooled  the backbone's feature map, averaged over time and space: D is backbone.feature_dim
        motion  the head dv on the backbone's features of the dynamic view: D is the size of the head's output, 128
        scene   the head sv on the backbone's features of the static view, the clip's middle frame in all T frames
    Each kind needs one pass through the backbone. The dynamic view is d[t] = v[t] - v[t-1] and d[0] = v[0] - v[T-1],
    as in training by default.

    Raises:
        ValueError: a kind is not one of KINDS.
        UserError: the file has no head for a kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"{kind}: no such embedding; the kinds are {', '.join(KINDS)}")
        check_head(pretrained, kind)

    @torch.no_grad()
    def embed(clips: Tensor) -> dict[str, Tensor]:
        embeddings = {}
        for kind in kinds:
            features = pool(pretrained.backbone(view_for(kind, clips), differences=kind == "motion"))
            embeddings[kind] = pretrained.heads[HEADS[kind]](features) if kind in HEADS else features
        return embeddings

    return embed


def check_head(pretrained: Pretrained, kind: str) -> None:
    """Raise UserError if the embedding needs a projection head that the file does not have."""
    head = HEADS.get(kind)
    if head is None or head in pretrained.heads:
        return
    found = f"only the heads {' '.join(pretrained.heads)}" if pretrained.heads else "no projection heads"
    raise UserError(
        f"{pretrained.file} has {found}, but the {kind} embedding needs the head {head}: "
        "give the run of a DCLR pretraining, or use the pooled feature"
    )


def view_for(kind: str, clips: Tensor) -> Tensor:
    """Return the view (B, 3, T, h, w) of the clips that an embedding is computed from."""
    match kind:
        case "motion":
            return clips - clips.roll(1, dims=2)
        case "scene":
            middle = clips.shape[2] // 2
            return clips[:, :, middle : middle + 1].expand_as(clips)
        case _:
            return clips
