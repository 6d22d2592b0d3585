"""Tests of `make gpu-layers`: benchmarks/gpu_layers.py, layers.py, l2_read.py and gpu_tests.py, on a CPU."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline, gpu_layers, gpu_tests, harness, l2_read, layers, tables
from benchmarks.gpu_layers import PARTS, Part
from benchmarks.layers import Convolution, Rates
from benchmarks.step_providers import Cell
from dclr.kernels import backend
from dclr.models import build_backbone

CPU = torch.device("cpu")
CELL = Cell(B=1, T=4, side=32, H=48, W=64, width=4)


# --------------------------------------------------------------------------------------------------------------- runner


def python(name: str, code: str, minutes: float = 1.0, **settings: Any) -> Part:
    """Return a part that runs Python code, by a module of the standard library that runs its argument."""
    arguments = ("-n", "1", "-r", "1", code)
    return Part(name=name, minutes=minutes, module="timeit", arguments=arguments, **settings)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_no_part_stops_the_next_and_what_was_measured_is_kept(tmp_path, monkeypatch, capsys):
    """One part fails, one hangs with a child process, one lacks a package, and the next one still runs."""
    results, pid = tmp_path / "results", tmp_path / "pid"
    hang = (
        f"import pathlib, subprocess, time; folder = pathlib.Path({str(results / 'cpu')!r}); "
        "folder.mkdir(parents=True, exist_ok=True); (folder / 'layers-slow.json').write_text('{}'); "
        f"pathlib.Path({str(pid)!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid)); time.sleep(60)"
    )
    parts = (
        python("wrong", "raise ValueError('no such kernel')"),
        python("slow", hang, minutes=1.5 / 60),
        python("absent", "pass", needs=("no_such_package",)),
        python("good", "import os; print('OUT' in os.environ, os.environ['CHOICE'])", variables={"CHOICE": "b"}),
    )
    monkeypatch.setattr(gpu_layers, "PARTS", parts)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    begin = time.monotonic()
    assert gpu_layers.main(["--results", str(results), "--logs", str(tmp_path / "logs")]) == 1
    assert time.monotonic() - begin < 30
    content = json.loads((results / "cpu" / "layers.json").read_text())
    rows = {row["part"]: row for row in content["rows"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "wrong": "failed", "slow": "stopped", "absent": "skipped", "good": "passed",
    }  # fmt: skip
    assert rows["wrong"]["reason"] == "exit status 1: ValueError: no such kernel"
    assert rows["slow"]["reason"] == "it took longer than its limit of 2 s"
    assert rows["absent"]["reason"] == "no_such_package is not installed"
    assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    assert not alive(int(pid.read_text()))
    said = capsys.readouterr().out
    assert "[4 of 4, 30.0 minutes left] good: at most 60 s" in said
    assert "False b\n" in said  # children write nothing to OUT by themselves
    with tarfile.open(tmp_path / "out" / "gpu-layers.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"layers.json", "layers-slow.json", "wrong.log", "good.log"} <= names


def test_a_part_without_time_left_is_skipped_and_the_status_is_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_layers, "PARTS", (python("first", "pass"), python("second", "pass")))
    folders = ["--results", str(tmp_path), "--logs", str(tmp_path / "logs")]
    assert gpu_layers.main(["--minutes", "0.1", "--parts", "second", *folders]) == 0
    (row,) = json.loads((tmp_path / "cpu" / "layers.json").read_text())["rows"]
    assert (row["part"], row["outcome"]) == ("second", "skipped")
    assert row["reason"].endswith("s are left")
    for flags, said in (
        (["--data", str(tmp_path / "none")], f"--data {tmp_path / 'none'}: no such folder\n"),
        (["--minutes", "0"], "--minutes is 0, but must be above 0\n"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            gpu_layers.main(flags)
        assert (stop.value.code, capsys.readouterr().err) == (2, said)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_command_is_one_that_its_program_takes(kind, tmp_path):
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        _, _, module, *arguments = part.command(tmp_path, tmp_path, kind)
        assert not any("{" in word for word in arguments)
        if module != "benchmarks.gpu_tests":  # pytest's arguments: test_all_parts_run
            program = importlib.import_module(module)
            parser = program.make_parser(kind) if module == "benchmarks.train" else program.make_parser()
            assert parser.parse_args(arguments).results == tmp_path


def test_a_part_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path / ".baseline")
    part = next(part for part in PARTS if part.name == "baseline")
    assert part.missing(None) == f".baseline/{baseline.COMMIT} is missing: run `make gpu-baseline` in a checkout"
    (tmp_path / ".baseline" / baseline.COMMIT).mkdir(parents=True)
    assert part.missing(None) is None
    whole = next(part for part in PARTS if part.name == "whole-run")
    assert whole.missing(None) == "no data set is given: make gpu-layers DATA=DIR"
    assert whole.missing(tmp_path) is None


def test_the_outcome_of_each_test_is_written_at_once(tmp_path, monkeypatch):
    (tmp_path / "test_these.py").write_text(
        "import json, pathlib, pytest\npytestmark = pytest.mark.gpu\n"
        f"def test_a():\n    found = json.loads(pathlib.Path({str(tmp_path)!r}, 'layers-tests-x.json').read_text())\n"
        "    assert [each['outcome'] for each in found['tests'].values()] == ['running']\n"
        "def test_b():\n    assert 1 == 2, 'one\\ntwo'\n"
        "@pytest.mark.skip(reason='needs more')\ndef test_c():\n    pass\n"
    )
    path = tmp_path / "layers-tests-x.json"
    outcomes = gpu_tests.Outcomes(path, {})
    options = ["-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "no:randomly"]
    with pytest.MonkeyPatch.context() as patch:  # the inner run must not find this run's settings
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        pytest.main([*options, "-W", "ignore", str(tmp_path / "test_these.py")], plugins=[outcomes])
    content = json.loads(path.read_text())
    assert content["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    found = {name.rpartition("::")[2]: test for name, test in content["tests"].items()}
    assert found["test_b"]["reason"] == "AssertionError: one"
    assert found["test_c"]["reason"] == "Skipped: needs more"


def test_every_test_of_the_gpu_is_run_by_a_part():
    names = re.findall(r"^def (test_\w+)", (harness.ROOT / "tests" / "test_gpu.py").read_text(), re.MULTILINE)
    chosen = [part.arguments[-1] for part in PARTS if part.arguments[-2:-1] == ("-k",)]

    def selects(expression: str, name: str) -> bool:
        files = ("ddp", "zero1", "zero2")  # in the names of the cases
        words = re.sub(
            r"\w+", lambda w: w[0] if w[0] in ("and", "or") else str(w[0] in name or w[0] in files), expression
        )
        return bool(eval(words))

    assert all(any(selects(expression, name) for expression in chosen) for name in names)
    assert all(any(selects(expression, name) for name in names) for expression in chosen)


@pytest.mark.slow
def test_parts_of_each_kind_run_end_to_end(tmp_path, demo_videos):
    """Each part takes 10 s to import what it needs, so this test runs one of each kind, in their own processes.

    All measurements run in test_a_measurement_runs_and_is_written. Without a GPU the tests are skipped one by one.
    """
    names = ["step-search", "tests-zero1", "whole-run"]
    folders = ["--results", str(tmp_path), "--logs", str(tmp_path / "logs")]
    command = [sys.executable, "-m", "benchmarks.gpu_layers", "--data", str(demo_videos), *folders]
    variables = {name: value for name, value in os.environ.items() if name != "OUT"}
    made = subprocess.run(
        [*command, "--parts", *names, "--minutes", "4"],
        cwd=harness.ROOT, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    rows = json.loads((tmp_path / "cpu" / "layers.json").read_text())["rows"]
    assert [(row["part"], row["outcome"]) for row in rows] == [(name, "passed") for name in names]
    step, skipped, whole = (
        json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
        for name in ("layers-step-search", "layers-tests-zero1", "train_store")
    )
    for content in (step, skipped, whole):
        assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    assert step["finished"]
    assert step["settings"]["cudnn_benchmark"]
    assert skipped["counts"] == {"skipped": 2}
    assert whole["steps_an_epoch"] == 2


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("what", layers.MEASUREMENTS)
def test_a_measurement_runs_and_is_written(what, tmp_path, monkeypatch, one_process):
    monkeypatch.setattr("dclr.training.engine.start_processes", lambda: one_process)
    monkeypatch.setitem(layers.CELLS, "cpu", CELL)
    monkeypatch.setitem(layers.BATCH_SIZES, "cpu", (2,))
    layers.main([what, "--results", str(tmp_path), "--save-as", "x"])
    content = json.loads((tmp_path / "cpu" / "layers-x.json").read_text())
    assert content["finished"]
    assert not any("skipped" in row for row in content["rows"])
    names = [row.get("what") or row["kernel"] for row in content["rows"]]
    assert len(names) >= 2
    if what == "step":
        assert {row["provider"] for row in content["rows"]} == {"without DeepSpeed", "ours"}
    if what == "ceilings":
        assert tables.ceilings_table(content, gpu=True).count("\n") == 1 + len(names)
    if what == "convolutions":
        assert tables.convolutions_table(content, gpu=True).count("\n") == 2 + len(names)
        assert len(set(names)) == len(names) == content["shapes"]
        assert content["ms_of_step"]["measured"] > content["ms_of_step"]["model"] > 0
    if what == "stem":
        assert content["greatest_relative_difference"] < 1e-5
    if what == "equal-frames":
        assert content["relative_difference"] < 1e-5


def test_rows_are_kept_when_a_measurement_is_killed(tmp_path, monkeypatch):
    def work(device: torch.device, record: layers.Record, arguments: Any) -> None:
        record.add({"what": "first", "ms": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setitem(layers.MEASUREMENTS, "stem", work)
    with pytest.raises(KeyboardInterrupt):
        layers.main(["stem", "--results", str(tmp_path)])
    content = json.loads((tmp_path / "cpu" / "layers-stem.json").read_text())
    assert content["rows"] == [{"what": "first", "ms": 1.0}]
    assert "finished" not in content


def test_the_convolutions_of_a_step_have_the_flop_of_its_backbone():
    found = layers.convolutions_of_step(CELL)
    backbone = build_backbone(CELL.backbone, CELL.width)
    backbone.pad_channels(8)
    views = [torch.randn(1, 3, frames, CELL.side, CELL.side) for frames in (4, 1, 4)]
    with FlopCounterMode(display=False) as counter:
        maps = backbone.forward_views(views, 4, differences=True)
    query = sum(count * conv.flops for conv, (_, count) in found.items())
    assert query == counter.get_total_flops()
    # The key encoder passes three views and two: more than once again and less than twice.
    assert 2 * query < sum(count * conv.flops for conv, (count, _) in found.items()) < 3 * query
    assert len(maps) == 3


def test_the_models_of_a_convolution_by_hand():
    conv = Convolution((2, 64, 8, 8), (144, 64, 3, 3), (1, 1), (1, 1))
    assert conv.result == (2, 144, 8, 8)
    assert conv.flops == 2 * 2 * 144 * 64 * 64 * 9
    assert conv.bytes == 2 * (2 * 64 * 64 + 144 * 64 * 9 + 2 * 144 * 64)
    rates = Rates(flops=1e12, bytes=1e9, l2_bytes=1e30)
    assert layers.models(conv, rates)["roofline_ms"] == pytest.approx(conv.bytes / 1e9 * 1e3)
    # Tiles of 64 x 64 waste least: 2 x 3 tiles of depth 576.
    arithmetic = 2 * 2 * 3 * 64 * 64 * 576 / (0.8 * 1e12) * 1e3
    assert layers.gemm_ms(128, 144, 576, 9, 0, rates) == pytest.approx(arithmetic)
    # By L2 alone larger tiles read less: 1 x 1 of 128 x 256 read 384 rows of depth 576.
    narrow = Rates(flops=1e30, bytes=1e30, l2_bytes=1e9)
    assert layers.gemm_ms(128, 144, 576, 9, 0, narrow) == pytest.approx(384 * 576 * 2 / 1e9 * 1e3)
    # Each of nine taps of 16 channels is padded to 64.
    assert layers.gemm_ms(64, 64, 144, 9, 0, narrow) == pytest.approx(128 * 576 * 2 / 1e9 * 1e3)


def test_the_weight_on_blocks_does_what_the_7_x_7_weight_does():
    view, weight = torch.randn(2, 3, 10, 12, dtype=torch.float64), torch.randn(5, 3, 7, 7, dtype=torch.float64)
    blocks = F.pixel_unshuffle(F.pad(view, (4, 2, 4, 2)), 2)  # colour, row, column
    blocks = blocks.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)  # row, column, colour
    found = F.conv2d(F.pad(blocks, (0, 0, 0, 0, 0, 4)), layers.as_blocks_weight(weight))
    torch.testing.assert_close(found, F.conv2d(view, weight, stride=2, padding=3))


def test_groups_of_kernels():
    names = ("sm90_xmma_fprop_implicit_gemm", "triton_red_fused__native_batch_norm", "Memcpy DtoD", "_rank_kernel")
    assert [layers.group_of(name) for name in names] == [
        "convolutions and matrix products", "Triton and Inductor", "memory", "other",
    ]  # fmt: skip


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter")
def test_reads_from_l2_sum_the_right_blocks():
    source = torch.randn(3 * l2_read.BLOCK)
    blocks = source.view(3, -1)
    found = l2_read.sum_blocks(source, programs=2, rounds=4)
    for program in range(2):
        expected = sum(blocks[(61 * program + number) % 3] for number in range(4))
        torch.testing.assert_close(found[program], expected)
