"""Tests of benchmarks/counts.py: FLOP and bytes by hand, and the frames that are computed once."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counts, counts_worker
from benchmarks.step_providers import Cell
from dclr.kernels import backend
from dclr.models import build_backbone

CELL = {"backbone": "r2plus1d_10", "B": 2, "T": 8, "side": 32, "width": 8, "static_once": True}


@pytest.fixture(scope="module")
def key_pass() -> dict:
    """Return the counts of the key encoder's pass over three views, all of 8 frames."""
    return counts_worker.count_eager(CELL | {"static_once": False}, "vsd", backward=False)


def test_the_hook_counts_what_torch_counts(key_pass):
    with torch.device("meta"):
        backbone = build_backbone("r2plus1d_10", 8)
        view = torch.empty(6, 3, 8, 32, 32)
    backbone.pad_channels(8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(view)
    # Equal frames computed once save FLOP, and nothing else may change them but the stem's wider kernel.
    whole = counter.get_total_flops()
    assert sum(key_pass["flops"].values()) > 0.4 * whole
    assert {key.split(", ")[0] for key in key_pass["flops"]} == set(counts.PARTS)


def test_the_bytes_of_an_operation_by_hand():
    frame = torch.empty(2, 3, 1, 4, 4, dtype=torch.bfloat16)
    assert counts_worker.nbytes(frame) == 2 * 3 * 16 * 2
    assert counts_worker.nbytes(frame.expand(-1, -1, 8, -1, -1)) == 2 * 3 * 16 * 2
    layer = nn.Module()
    layer.stem = nn.Conv2d(2, 4, 1, bias=False)
    given = torch.empty(1, 2, 5, 5)
    with torch.no_grad(), counts_worker.Hook(layer) as hook:
        torch.relu(nn.functional.conv2d(given, layer.stem.weight))
    assert hook.bytes == {("stem", "convolution"): 4 * (50 + 8 + 100), ("stem", "normalisation"): 4 * (100 + 100)}
    assert hook.flops == {("stem", "convolution"): 2 * 2 * 4 * 25}
    assert hook.largest == 100


def test_a_gradient_belongs_to_the_part_of_the_activations():
    assert counts_worker.combine([(1, False), (2, False)]) == (2, False)
    assert counts_worker.combine([(4, True), (2, False)]) == (2, True)
    assert counts_worker.combine([(4, True), (3, True)]) == (3, True)


# The shapes of r2plus1d_10 for one view of 16 frames, width 1 and 8 pixels: part, input, weight, output.
SHAPES: list[counts.Convolution] = [
    ("stem", [16, 3, 8, 8], [1, 3, 7, 7], [16, 1, 4, 4]),
    ("stem", [1, 1, 16, 16], [1, 1, 3, 1], [1, 1, 16, 16]),
    *[
        ("layer1", [16, 1, 4, 4], [2, 1, 3, 3], [16, 2, 4, 4]),
        ("layer1", [1, 2, 16, 16], [1, 2, 3, 1], [1, 1, 16, 16]),
    ]
    * 2,
    ("layer2", [16, 1, 4, 4], [2, 1, 3, 3], [16, 2, 2, 2]),
    ("layer2", [1, 2, 16, 4], [2, 2, 3, 1], [1, 2, 8, 4]),
    ("layer2", [8, 2, 2, 2], [2, 2, 3, 3], [8, 2, 2, 2]),
    ("layer2", [1, 2, 8, 4], [2, 2, 3, 1], [1, 2, 8, 4]),
    ("layer2", [1, 1, 16, 4, 4], [2, 1, 1, 1, 1], [1, 2, 8, 2, 2]),
]


def test_the_frames_that_are_computed_once():
    """The distinct frames are those of the design: 1, 3, 5, 7 of 16, then 5 and 7 of 8; the shortcut has 4 of 8."""
    whole = counts.frames_computed(SHAPES, 16, None)
    assert [row[:2] for row in whole[:3]] == [(16, 16)] * 3
    once = counts.frames_computed(SHAPES, 16, "layer2")
    expected = [(1, 1), (1, 3), (3, 3), (3, 5), (5, 5), (5, 7), (7, 7), (7, 5), (5, 5), (5, 7), (7, 4)]
    assert [row[:2] for row in once] == expected
    first = counts.frames_computed(SHAPES, 16, "layer1")
    assert [row[:2] for row in first] == [*expected[:6], (16, 16), (16, 8), (8, 8), (8, 8), (16, 8)]
    # Clips shorter than the reach of the convolutions have no equal frames left.
    assert counts.canonical([(None, 0), (0, 0), (0, 0), (0, None)]) == [0, 1, 1, 2]


def test_the_static_view_costs_less_if_equal_frames_are_computed_once():
    cell = Cell(B=1, T=16, side=8, width=1)
    never, layer1, layer2, *_ = (counts.static_view_cost(SHAPES, cell, last) for last in (None, "layer1", "layer2"))
    assert never["flops"] > layer1["flops"] > layer2["flops"]
    assert never["bytes"] > layer1["bytes"] > layer2["bytes"]
    stem_only = counts.static_view_cost(SHAPES[:1], cell, None)
    assert stem_only["flops"] == pytest.approx(5 * 2 * 16 * 16 * 147 / 3)


def test_the_stem_s_layouts_by_hand():
    found = counts.stem_layouts(Cell(B=1, T=1, side=2))
    # 3 frames of a query clip and 3 of a key clip are written; 3, 3 and 2 go through a pass. A frame has 3 x 2 x 2 or
    # 16 x 4 x 4 values.
    assert found["plain"]["view_kernels"] == 6 * 12 * 2
    assert found["blocks"]["view_kernels"] == 6 * 256 * 2
    assert found["plain"]["rearranging"] == 8 * (12 + 256) * 2
    assert found["plain"]["convolution"] == found["blocks"]["convolution"] == 11 * 256 * 2


def test_counts_of_a_commit_that_git_does_not_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.baseline.FOLDER", tmp_path)
    with pytest.raises(SystemExit) as stop:
        counts.main(["--commit", "no-such-commit"])
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def only_stem_and_layer1(monkeypatch, fused: bool = False) -> None:
    """Let counts be those of a backbone without layer2, layer3 and layer4. Compiling them would take longest."""
    make = counts_worker.make_backbone

    def make_short(*arguments):
        backbone = make(*arguments)
        backbone.layer2, backbone.layer3, backbone.layer4 = (nn.Sequential() for _ in range(3))
        if fused:
            backbone.fuse(backbone.fusible())
        return backbone

    monkeypatch.setattr(counts_worker, "make_backbone", make_short)


@pytest.mark.slow
def test_the_bytes_of_compiled_batch_normalisation(monkeypatch):
    """The kernels that torch.compile plans for batch normalisation with ReLU move at most 16 bytes an element.

    The stem's first one, of 48 channels, has no residual sum. Forward it reads its input for the statistics (2 bytes)
    and once more (2), and writes its output (2). Backward, each of two kernels reads the output's gradient (2) and the
    input (2), and the second one writes the input's gradient (2). Neither reads the output or a mask.
    """
    only_stem_and_layer1(monkeypatch)
    cell = CELL | {"B": 4, "T": 8, "side": 64, "width": 64}
    kernels = counts_worker.count_pass(cell, "v", backward=True)["kernels"]
    elements = 4 * 8 * 32 * 32 * 48
    found = {"forward": 0.0, "backward": 0.0}
    for kernel in kernels:
        sizes = [*kernel["reads"].values(), *kernel["writes"].values()]
        large = [size / elements for size in sizes if size >= elements]
        # Tensors of 64 channels have more elements, and those of other parts fewer or more.
        if (
            kernel["part"] == "stem"
            and kernel["kind"] == "normalisation"
            and large
            and all(s in (1, 2, 4) for s in large)
        ):
            found[kernel["graph"]] += sum(large)
    assert found == pytest.approx({"forward": 6, "backward": 10})


@pytest.mark.slow
def test_the_compiled_backward_pass_of_fused_convolutions_stores_no_gradient_in_float32(monkeypatch):
    """The stem's last normalisation takes the statistics of three views from a convolution. layer1 follows it."""
    if not backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    monkeypatch.setattr(backend, "_backend", "triton")
    only_stem_and_layer1(monkeypatch, fused=True)
    kernels = counts_worker.count_pass(CELL | {"width": 16}, "vsd", backward=True)["kernels"]
    assert any("convolve" in name for kernel in kernels for name in kernel["operations"])
    elements = 2 * 16 * 8 * 16 * 16  # of the stem's output for a view
    written = [size for kernel in kernels if kernel["graph"] == "backward" for size in kernel["writes"].values()]
    assert 2 * elements in written
    assert 4 * elements not in written
