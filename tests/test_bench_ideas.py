"""benchmarks/step.py --ideas: every idea makes the step that ours makes, and does what its name says."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks import step, step_ideas, step_providers
from benchmarks.step_ideas import IDEAS, EqualFramesOnce
from benchmarks.step_providers import Cell, find_truth, make_inputs, unwatched
from dclr.errors import UserError
from dclr.method import DCLR
from dclr.models import Backbone, build_backbone

CPU = torch.device("cpu")
CELL = Cell(B=3, T=8, side=32, H=48, W=64, width=4)


@pytest.fixture(scope="module")
def inputs() -> step_providers.Inputs:
    return make_inputs(CELL, CPU)


@pytest.fixture(scope="module")
def truth(inputs: step_providers.Inputs) -> step_providers.Truth:
    return find_truth(CELL, inputs, CPU)


@pytest.fixture
def first_step(inputs, truth, one_process, float32, monkeypatch) -> Callable[[str], step_providers.Provider]:
    """A provider after its first step, which was right, in float32."""
    monkeypatch.setattr(step_providers, "DS_CONFIG", float32)

    def make(name: str) -> step_providers.Provider:
        provider, found = step.start(name, CELL, inputs, truth, CPU)
        assert found["precision"] == "ieee"
        assert found["right"], found
        return provider

    return make


def assert_same(changed: Backbone, plain: Backbone, x: Tensor) -> None:
    """In float64: features, gradients of all parameters, running statistics, and features in eval mode."""
    expected, found = plain(x), changed(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    for result in (expected, found):
        (result * direction).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9 * a.grad.abs().max().item(), msg=name)
    for (name, a), b in zip(plain.named_buffers(), changed.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(changed.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.fixture
def compiled(monkeypatch) -> list[dict[str, Any]]:
    """Compiles on a CPU too, by torch's tracer and partitioner, without the slow generation of code after it; what was asked for."""
    asked: list[dict[str, Any]] = []
    genuine = Backbone.compile

    def traced(backbone: Backbone, **settings: Any) -> None:
        asked.append(settings)
        genuine(backbone, dynamic=False, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(Backbone, "compile", traced)
    for module in (step_providers, step_ideas):
        monkeypatch.setattr(module, "settle_compile", lambda choice, device: (True, "compiled"))
    torch._dynamo.reset()
    counters.clear()
    return asked


# ------------------------------------------------------------------------------------------------------------------ ideas


@pytest.fixture
def convolved(monkeypatch) -> list[tuple[int, torch.Size]]:
    """Dimensions and weight of every convolution."""
    given: list[tuple[int, torch.Size]] = []

    def recorded(convolve: Any) -> Any:
        def call(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
            given.append((x.dim() - 2, weight.shape))
            return convolve(x, weight, *rest, **named)

        return call

    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(F, name, recorded(getattr(F, name)))
    return given


BETWEEN = [2, 9, 9, 14, 14, 28, 28, 57, 57]
"""torchvision's channels between space and time at width 4, in the order of the network."""


@pytest.mark.parametrize(
    ("name", "dimensions", "multiple"),
    [("ours", 2, 8), ("ours, 3-D convolutions", 3, 8), ("ours, 16 channels", 2, 16), ("ours, not padded", 2, 1)],
)
def test_convolutions_and_padding(name, dimensions, multiple, first_step, convolved):
    backbone = first_step(name).method.query.backbone.double()
    plain = build_backbone("r2plus1d_10", 4).double()
    plain.load_state_dict(backbone.state_dict())
    x = torch.randn(2, 3, 8, 24, 24, dtype=torch.float64)
    convolved.clear()
    backbone(x)
    in_space = [(dims, shape[0]) for dims, shape in convolved if shape[-1] in (3, 7)]
    assert in_space == [(dimensions, -(-channels // multiple) * multiple) for channels in BETWEEN]
    backbone.load_state_dict(plain.state_dict())
    assert_same(backbone, plain, x)


@pytest.mark.parametrize("size", [(24, 26), (25, 24)], ids=["even", "odd: the stem as it is"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_stem_on_12_channels_computes_the_same(first_step, convolved, size, multiple):
    backbone = first_step("ours, stem on 12 channels").method.query.backbone.double()
    plain = build_backbone("r2plus1d_10", 4).double()
    plain.load_state_dict(backbone.state_dict())
    for network in (backbone, plain):
        network.pad_channels(multiple)
    x = torch.randn(2, 3, 8, *size, dtype=torch.float64)
    convolved.clear()
    backbone(x)
    assert convolved[0][1][1:] == ((12, 4, 4) if size[0] % 2 == 0 else (3, 7, 7))
    backbone.load_state_dict(plain.state_dict())
    assert_same(backbone, plain, x)


def test_equal_frames_once_makes_the_same_step(first_step):
    once = first_step("ours, equal frames once")
    assert isinstance(once.method.query.backbone, EqualFramesOnce)
    assert isinstance(once.method.key.backbone, EqualFramesOnce)


@pytest.mark.parametrize(
    ("name", "T", "views", "multiple"),
    [
        pytest.param("r2plus1d_10", 16, 3, 8, id="recipe"),
        pytest.param("r2plus1d_10", 16, 2, 1, id="look at the query clip"),
        pytest.param("r2plus1d_10", 8, 3, 1, id="middle twice"),
        pytest.param("r2plus1d_10", 7, 2, 8, id="all frames differ in the end"),
        pytest.param("r2plus1d_10", 6, 3, 8, id="too short"),
        pytest.param("r2plus1d_18", 12, 3, 8, id="two blocks a stage"),
    ],
)
def test_equal_frames_once_is_exact(name, T, views, multiple):
    torch.manual_seed(0)
    plain, once = (build_backbone(name, 4).double() for _ in range(2))
    once.load_state_dict(plain.state_dict())
    once.pad_channels(multiple)
    once.__class__ = EqualFramesOnce
    once.clips = 2
    x = torch.randn(2 * views, 3, T, 24, 24, dtype=torch.float64)
    x[-4:-2] = x[-4:-2, :, :1].clone()
    assert_same(once, plain, x)


def test_equal_frames_once_saves_almost_half_of_a_static_view():
    def flops(kind: type[Backbone]) -> int:
        with torch.device("meta"):
            backbone = build_backbone("r2plus1d_10")
            backbone.__class__ = kind
            backbone.clips = 1
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                backbone(torch.empty(3, 3, 16, 112, 112))
        return counter.get_total_flops()

    whole, once = flops(Backbone), flops(EqualFramesOnce)
    assert (whole - once) / (whole / 3) == pytest.approx(0.44, abs=0.01)


def test_recomputing_keeps_less_for_the_backward_pass(first_step, compiled):
    """Also in a process that has compiled ours before: the graph of ours is not taken for it."""

    def kept(name: str) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        provider = first_step(name)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            provider.step(unwatched)
        return sum(sizes)

    whole, part = kept("ours"), kept("ours, recomputing")
    assert compiled == [{"dynamic": False, "fullgraph": True}] * 4
    assert counters["stats"]["unique_graphs"] == 6
    assert part < 0.75 * whole


def test_equal_frames_once_compiles_whole(compiled):
    backbone = build_backbone("r2plus1d_10", 4)
    backbone.__class__ = EqualFramesOnce
    backbone.clips = 1
    x = torch.randn(3, 3, 8, 16, 16)
    expected = backbone(x)
    backbone.compile()
    torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_not_compiled_and_cuda_graphs_ask_for_that(first_step, compiled, monkeypatch):
    begun: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    monkeypatch.setattr(Backbone, "compile", lambda backbone, **settings: compiled.append(settings))
    first_step("ours, not compiled")
    assert compiled == []
    first_step("ours, CUDA graphs")
    assert compiled[2:] == [{"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}] * 2
    assert len(begun) == 1


def test_keys_on_a_second_stream_wait_for_the_step_before_and_are_waited_for(first_step, monkeypatch):
    """The order of the calls, with streams that only tell what they are asked."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: str = "beside") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            order.append(f"{self.name} waits for {other.name}")

    current = [Stream("main")]

    @contextmanager
    def stream(inner: Stream):
        current.append(inner)
        yield
        current.pop()

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            order.append(f"{name} on {current[-1].name}")
            return function(*arguments, **named)

        return call

    fakes = SimpleNamespace(Stream=Stream, stream=stream, current_stream=lambda: current[-1])
    monkeypatch.setattr(step_ideas, "torch", SimpleNamespace(**vars(torch) | {"cuda": fakes}))
    genuine, idea = step_ideas.keys_beside, "ours, keys on a second stream"

    def configure(method: DCLR, device: torch.device) -> None:
        genuine(method, torch.device("cuda"))

    monkeypatch.setitem(IDEAS, idea, partial(step_providers.Ours, configure=configure))
    monkeypatch.setattr(step_providers, "settle_compile", lambda choice, device: (False, "not compiled"))
    provider = first_step(idea)
    method = provider.method
    for name, network in (("query", method.query.backbone), ("key", method.key.backbone)):
        monkeypatch.setattr(network, "forward", recorded(name, network.forward))
    monkeypatch.setattr("dclr.method.contrast", recorded("loss", kernels.contrast))
    order.clear()
    expected = [
        "beside waits for main",
        "key on beside",
        "key on beside",
        "query on main",
        "main waits for beside",
        "loss on main",
    ]
    provider.step(unwatched)
    assert order == expected
    with provider.watched(unwatched):  # nor does the watching undo it
        provider.step(unwatched)
    provider.step(unwatched)
    assert order == 3 * expected


# ---------------------------------------------------------------------------------------------------------------- measure


def test_what_cannot_run_on_a_cpu_says_why(inputs):
    for name in ("ours, not compiled", "ours, recomputing", "ours, CUDA graphs"):
        with pytest.raises(UserError, match=r"^ours is not compiled on cpu$"):
            IDEAS[name](CELL, inputs, CPU)
    with pytest.raises(UserError, match=r"^cpu has no streams$"):
        IDEAS["ours, keys on a second stream"](CELL, inputs, CPU)


def pair(ours: list[float], idea: list[float], **changed: Any) -> dict[str, Any]:
    def found(by_round: list[float], peak: int) -> dict[str, Any]:
        parts = {"views": 10.0}
        return {"ms_by_round": by_round, "median_ms": by_round[0], "parts": parts, "right": True, "peak_bytes": peak}

    return {"providers": {"ours": found(ours, 100), "ours, 16 channels": found(idea, 50) | changed}}


def test_ideas_are_compared_by_hand():
    def compare(*arguments: Any, **changed: Any) -> dict[str, Any]:
        return step.compare_ideas([pair(*arguments, **changed)])[0]

    faster = compare([110, 120], [60, 60])
    assert (faster["idea"], faster["verdict"]) == ("ours, 16 channels", "faster")
    assert (faster["value"], faster["without_views"], faster["memory"]) == (pytest.approx(23 / 12), 2, 0.5)
    assert compare([100, 120], [110, 130])["verdict"] == "slower"
    assert compare([100, 120], [110, 110])["verdict"] == "not told from ours by these rounds"
    assert compare([100, 100], [50, 50], right=False)["verdict"] == "computes something else"
    assert compare([100, 100], [50, 50], right=None)["verdict"] == "faster, not checked"
    assert compare([100, 100], [50, 50], skipped="out of memory")["verdict"] == "out of memory"


def test_a_run_of_ideas_at_tiny_size(one_process, monkeypatch, tmp_path, capsys):
    def broken(*arguments: Any) -> step_providers.Provider:
        raise RuntimeError("it broke")

    monkeypatch.setattr("dclr.training.engine.start_processes", lambda: one_process)
    monkeypatch.setitem(step.CELLS, "cpu", (CELL, Cell(**vars(CELL) | {"B": 4})))
    monkeypatch.setitem(IDEAS, "ours, 16 channels", broken)
    names = ["ours, not padded", "ours, 16 channels", "ours, CUDA graphs"]
    step.main(["--results", str(tmp_path), "--rounds", "2", "--ideas", *names])
    content = json.loads((tmp_path / "cpu" / "step_ideas.json").read_text())
    assert [list(row["providers"]) for row in content["rows"]] == [["ours", name] for name in names]
    assert [row["B"] for row in content["rows"]] == [3] * 3
    first, *others = content["ideas"]
    assert (first["idea"], len(first["by_round"])) == ("ours, not padded", 2)
    assert first["value"] > 0
    assert [of["verdict"] for of in others] == ["RuntimeError: it broke", "ours is not compiled on cpu"]
    assert "goals" not in content
    assert (tmp_path / "cpu" / "step_ideas.png").read_bytes().startswith(b"\x89PNG")
    assert "| ours, CUDA graphs |  |  |  |  | ours is not compiled on cpu |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step.main(["--ideas", "--providers", "ours"])
    assert step.make_parser().parse_args(["--ideas"]).ideas == []  # which is all
