"""Embeddings of clips: pooled, motion and scene."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dclr.errors import UserError
from dclr.evaluation.embedding import KINDS, make_embedder
from dclr.models import ClipFormat, Pretrained, ProjectionHead, build_backbone, pool


def pretrained(heads: tuple[str, ...] = ("vv", "vs", "vd", "sv", "dv")) -> Pretrained:
    torch.manual_seed(0)
    backbone = build_backbone("r3d_10", 4).eval()
    made = nn.ModuleDict({name: ProjectionHead(32, 8) for name in heads})
    return Pretrained(backbone, ClipFormat(4, 1, 16), made, None, (), "made here", Path("weights.safetensors"))


def test_each_embedding_is_that_of_its_view_and_head() -> None:
    network, clips = pretrained(), torch.randn(2, 3, 4, 16, 16)
    with torch.no_grad():
        static = torch.stack([clips[:, :, 2]] * 4, dim=2)
        dynamic = torch.stack([clips[:, :, t] - clips[:, :, t - 1] for t in range(4)], dim=2)
        expected = {
            "pooled": pool(network.backbone(clips)),
            "motion": network.heads["dv"](pool(network.backbone(dynamic))),
            "scene": network.heads["sv"](pool(network.backbone(static))),
        }
    found = make_embedder(network, KINDS)(clips)
    assert {kind: tuple(values.shape) for kind, values in found.items()} == {
        "pooled": (2, 32),
        "motion": (2, 8),
        "scene": (2, 8),
    }
    for kind, values in found.items():
        assert torch.equal(values, expected[kind]), kind
        assert not values.requires_grad


def test_the_scene_does_not_depend_on_the_motion_and_the_motion_not_on_a_constant_background() -> None:
    network, clips = pretrained(), torch.randn(1, 3, 4, 16, 16)
    embed = make_embedder(network, ("motion", "scene"))
    frozen = clips[:, :, 2:3].expand_as(clips)
    assert torch.equal(embed(clips)["scene"], embed(frozen)["scene"])
    brighter = F.cosine_similarity(embed(clips)["motion"], embed(clips + 0.5)["motion"])
    assert brighter.item() > 0.999


@pytest.mark.parametrize(("heads", "words"), [((), "no projection heads"), (("vv",), "only the heads vv")])
def test_without_the_head_only_the_pooled_feature_is_possible(heads: tuple[str, ...], words: str) -> None:
    network = pretrained(heads)
    assert make_embedder(network, ["pooled"])(torch.zeros(1, 3, 4, 16, 16))["pooled"].shape == (1, 32)
    for kind in ("motion", "scene"):
        with pytest.raises(UserError, match=f"weights.safetensors has {words}, but the {kind} embedding"):
            make_embedder(network, [kind])
    with pytest.raises(ValueError, match="speed: no such embedding"):
        make_embedder(network, ["speed"])
