"""Tests of benchmarks/convolution_model.py and benchmarks/convolutions.py, on a CPU."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import convolution_model, convolutions, gpu_layers, harness, layers, resources
from benchmarks.convolution_model import Code, Layer, count_instructions, kernel_ms, replaced_bytes, work_of
from benchmarks.step_providers import Cell
from dclr.kernels import Convolved, backend, set_backend
from dclr.kernels.convolution import reference
from dclr.kernels.convolution_triton import Settings

CPU = torch.device("cpu")
SPATIAL = Layer("spatial", 16, 48, (2, 3, 5), True)
PREDICTED = json.loads(convolution_model.RESULT.read_text())


# ---------------------------------------------------------------------------------------------------------------- model


def test_the_work_of_kernels_by_hand():
    layer, rows = Layer("temporal", 144, 64, (4, 8, 8), True), 1000
    forward = work_of("forward", layer, rows, Settings(256, 8, 2))
    # 4 programs of 256 rows; 144 + 16 channels fill no section; three taps.
    assert (forward.programs, forward.trips) == (4, 3)
    assert forward.flops == 2 * 1024 * 144 * 64 * 3
    assert forward.l2_bytes == 2 * 3 * (1024 * 144 + 4 * 144 * 64)
    assert forward.bytes == 2 * 1000 * (144 + 64) + 2 * 3 * 144 * 64 + 4 * 64 * 16
    gradient = work_of("input gradient", layer, rows, Settings(256, 8, 2))
    assert gradient.flops == forward.flops
    assert gradient.l2_bytes == 2 * 3 * (1024 * 64 + 4 * 144 * 64) + 2 * 1024 * 144  # and the input, for the mask
    assert gradient.bytes == 2 * 1000 * (144 + 64 + 144) + 2 * 3 * 144 * 64 + 4 * 144 * 16
    # 240 = 128 + 112 takes 128 + 128. Nine taps in three groups share 2 x 132 programs: 88 splits of 16 blocks each.
    wide = work_of("weight gradient", Layer("spatial", 128, 240, (1, 1, 1), True), 64 * 88 * 16, Settings(64, 8, 2, 3))
    assert (wide.programs, wide.trips) == (3 * 88, 16)
    assert wide.flops == 2 * 64 * 88 * 16 * 9 * 128 * 256
    assert wide.l2_bytes == 2 * 64 * 88 * 16 * (3 * 240 + 9 * 128)


def test_the_predicted_time_is_that_of_the_largest_part():
    work = convolution_model.Work(flops=632e9, bytes=7.8e9, l2_bytes=5.5e9, programs=1000, trips=9)
    code = Code(registers=1, local=0, shared=0, wgmma=True, once=100, in_loop=100)
    parts = kernel_ms(work, code, Settings(64, 8, 2))
    assert parts == pytest.approx({"arithmetic": 1, "memory": 2, "L2": 1, "issue": 1000 * 256 * 1000 / 29.6e9})


def test_instructions_of_a_loop_are_counted_apart():
    lines = ["MOV R1, c[0x0][0x28]", "IADD3 R2, R2, 0x1", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8]"]
    lines += ["@P0 BRA 0x10", "@!P1 BRA 0x50", "EXIT"]

    def sass(lines: list[str], *rest: str) -> str:
        end = f"{16 * len(lines):04x}"
        code = [*lines, f"BRA 0x{end}", "NOP", "NOP"]
        return "\n".join(
            f"        /*{16 * i:04x}*/                   {text} ;   /* 0x000 */" for i, text in enumerate(code)
        )

    assert count_instructions(sass(lines)) == (3, 3)
    assert count_instructions(sass([line for line in lines if "@P0" not in line])) == (5, 0)
    with pytest.raises(RuntimeError, match="2 loops"):
        count_instructions(sass([*lines, "@P0 BRA 0x10"]))


def test_what_a_kernel_replaces():
    plain = SPATIAL._replace(normalised=False)
    assert [replaced_bytes(kernel, SPATIAL) for kernel in convolution_model.KERNELS] == [4 * 16 + 2 * 48, 4 * 16, 0]
    assert [replaced_bytes(kernel, plain) for kernel in convolution_model.KERNELS] == [2 * 48, 0, 0]


def test_faults_of_a_binary():
    good = Code(registers=255, local=0, shared=resources.SHARED_LIMIT[90], wgmma=True, once=1, in_loop=0)
    assert not good.faults()
    bad = Code(**asdict(good) | {"local": 8, "wgmma": False, "shared": good.shared + 1})
    assert len(bad.faults()) == 3


def test_the_committed_predictions_are_of_these_kernels():
    """If this fails, run `python -m benchmarks.convolution_model` and then `python -m benchmarks.tables`."""
    chosen = {(row["kernel"], convolution_model.layer_of(row)): row for row in PREDICTED["rows"] if row["chosen"]}
    assert chosen.keys() == {
        (kernel, layer) for kernel in convolution_model.KERNELS for layer in convolution_model.all_layers()
    }
    used = {
        (usage["configuration"], usage["capability"]): usage
        for usage in json.loads(resources.RESULT.read_text())["kernels"]
    }
    for (kernel, layer), row in chosen.items():
        settings = convolution_model.chosen_settings(kernel, layer)
        assert row["settings"] == settings._asdict(), row["what"]
        assert row["faults"] == []
        work = work_of(kernel, layer, layer.rows(128), settings)
        assert row["parts_ms"] == pytest.approx(kernel_ms(work, Code(**row["code"]), settings))
        assert row["library_ms"] == pytest.approx(convolution_model.library_ms(kernel, layer, 128))
        usage = used[row["what"], 90]
        assert [row["code"][name] for name in ("registers", "local", "shared")] == [
            usage[name] for name in ("registers", "local", "shared")
        ], row["what"]


def test_a_step_is_predicted_from_its_kernels():
    """With kernels that take no time, a step of all kernels lacks all that they replace."""
    counts = layers.convolutions_of_step(Cell(B=2))
    library, own = (
        convolution_model.step_ms(counts, fused, lambda name, layer, rows: 0.0) - convolution_model.OTHER_MS
        for fused in ([], [layer[:3] for layer in convolution_model.all_layers()])
    )
    assert 0 < own < 0.5 * library
    taken = [conv for conv in counts if convolution_model.layers_of(conv)]
    assert {conv.weight[:2] for conv in taken} == {(64, 48), (144, 64), (64, 144), (232, 128), (128, 232)}


# ------------------------------------------------------------------------------------------------------------ benchmark


@pytest.fixture
def by_reference():
    set_backend("reference")
    yield
    set_backend("auto")


@pytest.mark.parametrize("layer", convolutions.TINY, ids=str)
def test_the_check_passes_right_convolutions_and_finds_wrong_ones(layer, monkeypatch, by_reference):
    torch.manual_seed(0)

    def greatest_error(convolve) -> float:
        monkeypatch.setattr(convolutions, "convolve", convolve)
        return max(convolutions.check_layer(layer, 4, CPU)["errors"].values())

    def without_counts(x, weight, normalisation, repeated, times):
        return reference(x, weight, normalisation, repeated, 1)

    def without_last_pixel(x, weight, normalisation, repeated, times):
        y, mean, variance = reference(x, weight, normalisation, repeated, times)
        return Convolved(y * (torch.arange(y.shape[4]) < y.shape[4] - 1), mean, variance)

    def of_neighbours(x, weight, normalisation, repeated, times):
        """The last clip's result reaches the first, as with 32-bit offsets."""
        y, mean, variance = reference(x, weight, normalisation, repeated, times)
        return Convolved(torch.cat([y[:1] + y[-1:], y[1:]]), mean, variance)

    assert greatest_error(reference) <= convolutions.TOLERANCE
    for wrong in (without_counts, without_last_pixel, of_neighbours):
        assert greatest_error(wrong) > convolutions.TOLERANCE, wrong.__name__


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter")
def test_kernels_are_timed_next_to_the_library_and_wrong_ones_are_found(tmp_path, monkeypatch):
    layer = SPATIAL._replace(size=(1, 2, 3))
    monkeypatch.setattr(convolutions, "TINY", (layer,))
    monkeypatch.setattr(convolutions, "settings_to_time", lambda kernel, layer: [Settings(16, 4, 2)])
    monkeypatch.setattr(convolutions, "compiled", lambda function, device: function)  # compiling takes seconds
    right = convolutions.kernel_call

    def call(kernel, given, settings):
        made = right(kernel, given, settings)
        return (lambda: [tensor * 1.05 for tensor in made()]) if kernel == "forward" else made

    monkeypatch.setattr(convolutions, "kernel_call", call)
    try:
        with pytest.raises(
            ArithmeticError, match=r"wrong: spatial 16 -> 48, forward, 16 rows, 4 warps, 2 stages, 1 taps$"
        ):
            convolutions.main(["kernels", "--results", str(tmp_path)])
    finally:
        set_backend("auto")
    rows = json.loads((tmp_path / "cpu" / "layers-convolution-kernels.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == list(convolution_model.KERNELS)
    forward, *gradients = rows
    assert "best" not in forward  # a wrong kernel wins nothing
    for row in gradients:
        assert row["best"] == "16 rows, 4 warps, 2 stages, 1 taps"
        assert row["providers"][row["best"]]["difference"] < 0.01


def test_each_choice_of_kernels_is_timed_in_a_step_and_winners_are_proposed(tmp_path, monkeypatch):
    """The first convolution of a network wins, the second does not."""
    monkeypatch.setitem(layers.CELLS, "cpu", Cell(B=1, T=4, side=32, H=48, W=64, width=4))
    ms = {"library": [30.0, 31.0, 32.0], "first": [20.0, 21.0, 23.0], "second": [20.0, 31.0, 33.0]}
    built = []

    class Step(layers.PlainStep):
        def __init__(self, cell, device, fused=()):
            super().__init__(cell, device, fused)
            inner = [module.fused for module in self.network.query.backbone.modules() if getattr(module, "fused", None)]
            assert bool(inner) == bool(fused)
            built.append(list(fused))
            self.values = iter(ms["library" if not fused else "second" if len(built) == 4 else "first"] * 9)

    def time_consecutive(call, device, count):
        return [next(call.values) for _ in range(count)] if count == 1 else []

    monkeypatch.setattr(layers, "PlainStep", Step)
    monkeypatch.setattr(convolutions.harness, "time_consecutive", time_consecutive)
    monkeypatch.setitem(convolutions.ROUNDS, "cpu", 3)
    convolutions.main(["step", "--results", str(tmp_path)])
    content = json.loads((tmp_path / "cpu" / "layers-convolution-step.json").read_text())
    library, everything, first, second = built
    assert library == []
    assert everything == [*first, *second]
    assert [row["what"].split()[0] for row in content["rows"]] == ["all", "only", "only"]
    assert [row["wins"] for row in content["rows"]] == [True, True, False]
    assert content["rows"][1]["gain_ms"] == 10
    assert json.loads((tmp_path / "cpu" / "convolution_choices.json").read_text()) == content["proposal"]
    assert content["proposal"] == {"cpu": [dict(zip(("kind", "in", "out"), first[0], strict=True))]}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", convolution_model.KERNELS)
def test_the_librarys_passes_compile(kernel, monkeypatch):
    given = convolutions.make_inputs(SPATIAL, 2, CPU)
    found = convolutions.library_call(kernel, SPATIAL, given, CPU)()
    monkeypatch.setattr(convolutions, "compiled", lambda function, device: function)
    plain = convolutions.library_call(kernel, SPATIAL, given, CPU)()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_step_with_fused_convolutions_runs():
    cell = Cell(B=1, T=4, side=32, H=48, W=64, width=4)
    row = convolutions.time_step("one", [("temporal", 16, 4)], layers.PlainStep(cell, CPU), CPU, cell)
    assert "skipped" not in row
    assert row["median_ms"] > 0


@pytest.mark.parametrize(("rate", "noted"), [(7.2e12, True), (6.8e12, False)])
def test_a_fast_l2_is_noted(tmp_path, rate, noted):
    rows = [{"what": "memcpy", "bytes_per_second": 9e12}, {"what": "L2 read, 8 MiB", "bytes_per_second": rate}]
    (tmp_path / "layers-ceilings.json").write_text(json.dumps({"rows": rows}))
    note = gpu_layers.note_about_l2(tmp_path)
    assert (note is not None and "7.2 TB/s" in note and "change the plan" in note) == noted
    assert gpu_layers.note_about_l2(tmp_path / "none") is None


@pytest.mark.slow
def test_parts_without_needs_do_without_deepspeed_kornia_and_av():
    """A GPU machine may have torch, torchvision and Triton only."""
    modules = {part.module for part in gpu_layers.PARTS if not part.needs}
    assert {"benchmarks.layers", "benchmarks.convolutions"} <= modules
    code = f"import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'kornia', 'av'))); import {', '.join(modules)}"
    made = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
