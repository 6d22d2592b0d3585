"""torch.compile of the backbones: one graph per shape, no recompilation, and the same results."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch

from dclr.config import make_config
from dclr.errors import UserError
from dclr.models import Backbone, build_backbone
from dclr.models.backbones import BACKBONES
from dclr.models.video_resnet import Factored, VideoResNet
from dclr.training import setup
from dclr.training.compile import (
    RECOMPUTED_BUDGET,
    compile_backbone,
    compile_seconds,
    resolve_compile,
    start_compiling,
)
from dclr.training.pretrain import pretrain

CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> None:
    torch.compiler.reset()
    counters.clear()


def stem_and_layer2(width: int) -> Backbone:
    """Build an r2plus1d_10 without layer1, layer3 and layer4. layer2 has every kind of layer that they have."""
    backbone = VideoResNet([Factored] * 4, 1, width)
    backbone.layer1, backbone.layer3, backbone.layer4 = (torch.nn.Sequential() for _ in range(3))
    backbone.feature_dim = 2 * width
    return backbone


def test_pretraining_compiles_each_shape_once_without_a_break(
    tiny_pretrain, one_process, tmp_path, monkeypatch, fresh, capfd
):
    """The backend "eager" runs what is traced. The tracer alone decides the graphs, and generating code is slow.

    Tracing the whole network three times would take half a minute. test_extend.py compiles it as one graph.
    """

    def traced(backbone):
        compile_backbone(backbone, backend="eager")

    monkeypatch.setattr(setup, "compile_backbone", traced)
    monkeypatch.setitem(BACKBONES, "r2plus1d_10", stem_and_layer2)
    settings = {**tiny_pretrain, "fill_steps": 2, "compile": "on", "pad_channels": 8}
    plain = pretrain(
        make_config("pretrain", {**settings, "compile": "off", "out": str(tmp_path / "plain")}), "demo", one_process
    )
    assert counters["stats"]["unique_graphs"] == 0
    folder = pretrain(make_config("pretrain", {**settings, "out": str(tmp_path / "run")}), "demo", one_process)
    assert capfd.readouterr().out.count("compiled in") == 1
    # The query encoder has one input shape: three views. The key encoder has two: two views of the query clip, and
    # three views of the key clip.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    losses = [[json.loads(line).get("loss") for line in (f / "metrics.jsonl").open()] for f in (plain, folder)]
    assert len(losses[0]) == 8
    assert losses[1][2:] == pytest.approx(losses[0][2:], rel=1e-3)
    assert json.loads((folder / "report.json").read_text())["compile_seconds"] > 0


def test_a_copy_of_a_compiled_backbone_uses_its_own_weights(fresh):
    backbone = build_backbone("r3d_10", 1).eval()
    backbone.layer2 = backbone.layer3 = backbone.layer4 = torch.nn.Sequential()
    compile_backbone(backbone, backend="eager")
    twin = copy.deepcopy(backbone)
    for parameter in twin.parameters():
        parameter.data.zero_()
    clip = torch.ones(1, 3, 2, 8, 8)
    for network in (backbone, twin):
        for maps in (network(clip), network.forward_views([clip], 2)[0]):
            assert bool(maps.any()) == (network is backbone)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_a_compiled_backbone_computes_the_same_and_keeps_its_names(fresh):
    clip = torch.randn(2, 3, 8, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, compiled = stem_and_layer2(4).double(), stem_and_layer2(4).double()
    compiled.load_state_dict(plain.state_dict())
    compiled.pad_channels(8)
    before = compile_seconds()
    compile_backbone(compiled)
    for network in (plain, compiled):
        network(clip).square().mean().backward()
    assert compile_seconds() > before
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9 * b.grad.abs().max().item(), msg=name)
    for (name, a), b in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(clip + 1)


@pytest.mark.slow
def test_a_backbone_with_fused_convolutions_compiles_as_one_graph(fresh):
    """The backend "aot_eager" traces the backward pass too, and generates no code. Stem and layer1 are enough."""
    rng = torch.Generator().manual_seed(0)
    clip, still = (torch.randn(2, 3, frames, 16, 16, dtype=torch.float64, generator=rng) for frames in (4, 1))
    plain, compiled = build_backbone("r2plus1d_10", 4).double(), build_backbone("r2plus1d_10", 4).double()
    compiled.load_state_dict(plain.state_dict())
    for network in (plain, compiled):
        network.layer2, network.layer3, network.layer4 = (torch.nn.Sequential() for _ in range(3))
    compiled.fuse(compiled.fusible())
    compile_backbone(compiled, backend="aot_eager")
    for network in (plain, compiled):
        sum(view.square().mean() for view in network.forward_views([clip, still], 4)).backward()
    assert counters["stats"]["unique_graphs"] == 1
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9 * b.grad.abs().max().item(), msg=name)
    for (name, a), b in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_message_says_if_backbones_are_compiled_and_why(monkeypatch):
    assert resolve_compile("auto", CPU) == (
        False,
        "backbones are not compiled: on a CPU that takes a minute and gains nothing (--compile on to try)",
    )
    assert resolve_compile("off", CPU)[0] is False
    assert resolve_compile("auto", torch.device("cuda"))[0] is True
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError,
        match=r"^--compile on: torch.compile needs no-such-compiler, which is not installed; "
        r"install it, or pass --compile off$",
    ):
        resolve_compile("on", CPU)


@pytest.mark.parametrize(("file", "tag"), [("ddp.json", "ZeRO 0"), ("zero1.json", "ZeRO 1"), ("zero2.json", "ZeRO 2")])
def test_compiled_code_is_not_shared_between_stages(tiny_pretrain, one_process, tmp_path, monkeypatch, file, tag):
    """ZeRO stages store weights differently. torch's compile cache ignores this, so its key needs a tag per stage."""
    from torch._inductor.codecache import FxGraphHashDetails

    monkeypatch.setattr(setup, "compile_backbone", lambda backbone: None)
    settings = {**tiny_pretrain, "compile": "on", "epochs": 1, "recompute": True, "out": str(tmp_path / "run")}
    settings["ds_config"] = str(Path(__file__).parents[1] / "ds_configs" / file)
    with torch.compiler.config.patch(cache_key_tag=""), functorch.patch(activation_memory_budget=1.0):
        pretrain(make_config("pretrain", settings), "demo", one_process)
        assert functorch.activation_memory_budget == RECOMPUTED_BUDGET
        graph = torch.fx.symbolic_trace(torch.nn.Identity())
        assert FxGraphHashDetails(graph, [], {}, []).cache_key_tag == tag
        start_compiling(0, recompute=False)
        assert functorch.activation_memory_budget == 1
