"""The benchmarks measure what they say: providers against float64 numpy written out row by row, floors by hand, a run at tiny size."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import info_nce, timing

CPU = torch.device("cpu")
Oracle = tuple[np.ndarray, np.ndarray, np.ndarray]


def cell(
    mining: bool = True, backward: bool = True, B: int = 3, K: int = 200, precision: str = "ieee"
) -> info_nce.Cell:
    return info_nce.Cell(precision=precision, mining=mining, backward=backward, B=B, K=K)


def oracle(inputs: info_nce.Inputs) -> Oracle:
    """Losses (P,), mined rows (P, B, M), best first, and the gradient (P, B, D) of the summed losses, a query at a time."""
    q, k, z = (tensor.detach().double().numpy() for tensor in inputs[:3])
    pairs, size = q.shape[:2]
    losses, gradient = np.zeros(pairs), np.zeros(q.shape)
    rows = np.zeros((pairs, size, info_nce.M), dtype=int)
    for i in range(size):
        if inputs.features is not None:
            static, dynamic = (z[1 + s] @ inputs.features[s, i].double().numpy() for s in range(2))
            both = sum(np.exp(similarity) / np.exp(similarity).sum() for similarity in (static, dynamic))
            for p, similarity in enumerate((both, static, dynamic, static, dynamic)):
                rows[p, i] = np.argsort(-similarity)[: info_nce.M]
        for p in range(pairs):
            candidates = np.vstack([k[p, i], z[p]])
            mass = np.exp(candidates @ q[p, i] / info_nce.TEMPERATURE)
            positive = {0, *(1 + rows[p, i])} if inputs.features is not None else {0}
            among = np.array([mass[j] if j in positive else 0.0 for j in range(len(mass))])
            losses[p] -= np.log(among.sum() / mass.sum()) / size
            mean, positive_mean = mass @ candidates / mass.sum(), among @ candidates / among.sum()
            gradient[p, i] = (mean - positive_mean) / (info_nce.TEMPERATURE * size)
    return losses, rows, gradient


@pytest.mark.parametrize("mining", [True, False])
@pytest.mark.parametrize("provider", ["as released", "eager", "ours"])
def test_providers_agree_with_numpy(provider: str, mining: bool) -> None:
    inputs = info_nce.make_inputs(cell(mining), CPU)
    losses, rows, gradient = info_nce.run(info_nce.PROVIDERS[provider](), inputs, backward=True)
    true_losses, true_rows, true_gradient = oracle(inputs)
    np.testing.assert_allclose(losses.detach(), true_losses, rtol=1e-5, atol=1e-6)
    # The gradient is a difference of two means of rows, each divided by temperature and B: float32 rounds those.
    rounding = np.finfo(np.float32).eps / (info_nce.TEMPERATURE * inputs.queries.shape[1])
    assert np.abs(true_gradient).max() > 1000 * rounding
    np.testing.assert_allclose(gradient, true_gradient, rtol=1e-5, atol=4 * rounding)
    assert (rows is not None) == mining
    if mining:
        np.testing.assert_array_equal(rows, true_rows)


def test_the_gradient_is_computed_only_where_it_is_measured() -> None:
    inputs = info_nce.make_inputs(cell(), CPU)
    losses, _, gradient = info_nce.run(info_nce.eager, inputs, backward=False)
    assert gradient is None
    assert not losses.requires_grad


@pytest.mark.parametrize("queries_at_a_time", [2, 100])
def test_float64_agrees_with_numpy(queries_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce, "_queries_at_a_time", lambda K: queries_at_a_time)
    inputs = info_nce.make_inputs(cell(), CPU)
    true_losses, true_rows, true_gradient = oracle(inputs)
    rows = info_nce.float64_rows(inputs.features, inputs.queue)
    np.testing.assert_array_equal(rows, true_rows)
    losses, gradient = info_nce.float64_loss(inputs, rows)
    np.testing.assert_allclose(losses, true_losses, rtol=1e-12)
    np.testing.assert_allclose(gradient, true_gradient, rtol=1e-9, atol=1e-14)


def test_errors_are_seen() -> None:
    inputs = info_nce.make_inputs(cell(), CPU)
    losses, rows, gradient = info_nce.run(info_nce.eager, inputs, backward=True)
    exact = info_nce.accuracy(inputs, losses, rows, gradient)
    assert exact["loss_error"] < 1e-6
    assert exact["gradient_error"] < 1e-3
    assert exact["same_rows"] == 1
    wrong_rows = rows.clone()
    wrong_rows[1, 0, 0] = next(row for row in range(200) if row not in rows[1, 0])
    wrong = info_nce.accuracy(inputs, losses, wrong_rows, 1.1 * gradient)
    assert wrong["loss_error"] > 1e-4
    assert wrong["gradient_error"] > 0.05
    assert wrong["same_rows"] == pytest.approx(14 / 15)
    with pytest.raises(ArithmeticError, match="not finite"):
        info_nce.accuracy(inputs, losses * torch.nan, rows, gradient)


def test_floors_by_hand() -> None:
    # P 5, D 128: a row of 128 numbers is 512 bytes in float32, 256 in bfloat16. Here B 2, K 10.
    assert info_nce.floor_bytes(cell(False, False, 2, 10)) == (50 + 10 + 10) * 512 + 20
    assert info_nce.floor_bytes(cell(False, True, 2, 10)) == (50 + 10 + 10 + 10) * 512 + 20
    assert info_nce.floor_bytes(cell(True, True, 2, 10, "bf16")) == (50 + 10 + 10 + 10 + 4) * 256 + 20
    assert (
        info_nce.floor_flops(cell(False, False, 2, 10)) == 25_600
    )  # 5 x 2 x 10 x 128 multiplications and as many additions
    assert info_nce.floor_flops(cell(False, True, 2, 10)) == 51_200
    assert info_nce.floor_flops(cell(True, True, 2, 10)) == 61_440  # and two of 2 x 10 x 128
    slow_memory = timing.Ceilings(bytes_per_second=1e6, flops_per_second={"ieee": 1e12, "tf32": 1e12, "bf16": 1e12})
    slow_units = timing.Ceilings(bytes_per_second=1e12, flops_per_second={"ieee": 5.12e6, "tf32": 1e12, "bf16": 1e12})
    assert info_nce.floor_ms(cell(False, True, 2, 10), slow_memory) == pytest.approx(40.98)
    assert info_nce.floor_ms(cell(False, True, 2, 10), slow_units) == pytest.approx(10)


def test_interleaved_tells_slow_from_fast() -> None:
    calls: list[str] = []

    def provider(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            time.sleep(seconds)

        return call

    times = timing.interleaved({"slow": provider("slow", 0.01), "fast": provider("fast", 0.001)}, CPU, 6, warmup=1)
    assert calls == ["slow", "fast", *["slow", "fast", "fast", "slow"] * 3]
    for of_name in times.values():
        assert of_name.low_ms <= of_name.median_ms <= of_name.high_ms
        assert of_name.repetitions == 6
        assert of_name.captured is None
    assert times["slow"].median_ms >= 10
    assert 1 <= times["fast"].median_ms < times["slow"].median_ms


def test_precision_of_products_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    for precision, setting in (("tf32", "high"), ("bf16", "high"), ("ieee", "highest")):
        with timing.float32_products(precision):
            assert torch.get_float32_matmul_precision() == setting
        assert torch.get_float32_matmul_precision() == before


def measured(times: dict[str, float], B: int = 40, K: int = 2048, mining: bool = True) -> dict[str, Any]:
    providers = {name: {"median_ms": value, "peak_extra_bytes": 1} for name, value in times.items()}
    return {"precision": "bf16", "mining": mining, "backward": True, "B": B, "K": K, "providers": providers}


def test_a_goal_is_judged_by_its_worst_cell() -> None:
    good = measured({"as released": 9.0, "torch.compile": 4.0, "ours": 1.0})
    bad = measured({"as released": 7.0, "torch.compile": 4.0, "ours": 1.0}, mining=False)
    released, compiled, *_ = info_nce.judge([good, bad], genuine=True)
    assert (released["training_step"], released["worst"], released["verdict"]) == (9, 7, "not met")
    assert "without mining" in released["worst_at"]
    assert compiled["verdict"] == "met"
    verdicts = {row["goal"]: row["verdict"] for row in info_nce.judge([good], genuine=True)}
    assert verdicts["8 times as released at B 40, K 2048"] == "met"
    assert verdicts["8 times as released at B 128, K 65536"] == "not measured in this run"
    assert verdicts["never slower than torch.compile"] == "met"
    good["providers"]["ours"] = {"skipped": "RuntimeError: it broke"}
    assert info_nce.judge([good], genuine=True)[0]["verdict"] == "not met: ours failed"
    assert {row["verdict"] for row in info_nce.judge([bad], genuine=False)} == {"not measured on this device"}


def test_the_grid_covers_every_goal_in_every_default_precision() -> None:
    arguments = info_nce.make_parser().parse_args([])
    cells = info_nce.plan(arguments, "cuda")
    for precision in ("bf16", "tf32"):
        of_precision = {(c.B, c.K) for c in cells if c.precision == precision}
        assert {goal.size for goal in info_nce.GOALS if goal.size} <= of_precision
    assert {(c.B, c.K) for c in cells if c.precision == "bf16"} == {
        (B, K) for B in (5, 40, 128, 512, 1024) for K in (2048, 16384, 65536)
    }
    assert len(set(cells)) == len(cells)
    # 3 sizes, 2 precisions, with and without mining, with and without backward: measured even by a run that is cut short.
    assert {(c.B, c.K) for c in cells[:24]} == {goal.size for goal in info_nce.GOALS if goal.size}


def test_a_run_at_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Without torch.compile, which takes seconds a cell; a provider that fails in its place is recorded, and the run goes on."""

    def broken() -> info_nce.Step:
        raise torch.OutOfMemoryError("too large\nby far")

    monkeypatch.setitem(info_nce.PROVIDERS, "torch.compile", broken)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    sizes = ["--batch-sizes", "2", "3", "--queue-lengths", "16", "--repetitions", "4"]
    info_nce.main([*sizes, "--device", "cpu", "--results", str(tmp_path / "results")])
    folder = tmp_path / "results" / "cpu"
    content = json.loads((folder / "info_nce.json").read_text())
    assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    assert "reference" in content["implementation"]
    assert content["ceilings"] is None
    assert {goal["verdict"] for goal in content["goals"]} == {"not measured on this device"}
    assert len(content["rows"]) == 2 * 2 * 2
    for row in content["rows"]:
        assert row["floor_flops"] == info_nce.floor_flops(info_nce._cell(row))
        assert row["providers"]["torch.compile"] == {"skipped": "OutOfMemoryError: too large"}
        for name in ("as released", "eager", "ours"):
            found = row["providers"][name]
            assert 0 < found["low_ms"] <= found["median_ms"] <= found["high_ms"]
            assert found["repetitions"] == 4
            assert found["loss_error"] < 1e-5
            assert (found["gradient_error"] is not None) == row["backward"]
            assert (found["same_rows"] is not None) == row["mining"]
    for path in (folder, tmp_path / "out"):
        assert (path / "info_nce.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "info_nce.json").read_text() == (folder / "info_nce.json").read_text()
    assert "skipped: OutOfMemoryError" in capsys.readouterr().out


def test_a_run_out_of_time_says_so_and_one_where_ours_fails_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ["--quick", "--batch-sizes", "2", "--queue-lengths", "16", "--device", "cpu", "--results", str(tmp_path)]
    tiny += ["--providers", "eager", "ours", "--repetitions", "2"]
    calls = iter([0.0, 0.0, 1e6, 1e6])
    monkeypatch.setattr(info_nce.time, "monotonic", lambda: next(calls))
    info_nce.main([*tiny, "--minutes", "1"])
    content = json.loads((tmp_path / "cpu" / "info_nce_quick.json").read_text())
    assert (len(content["rows"]), len(content["not_reached"])) == (1, 3)
    monkeypatch.undo()

    def fails(*arguments: torch.Tensor) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setitem(info_nce.PROVIDERS, "ours", lambda: fails)
    with pytest.raises(SystemExit, match="ours failed"):
        info_nce.main(tiny)


def test_an_error_of_the_device_ends_a_run_that_still_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, cells = info_nce.measure, []

    def measure(of: info_nce.Cell, *arguments: Any) -> dict[str, Any]:
        cells.append(of)
        if len(cells) > 2:
            raise RuntimeError("an illegal memory access was encountered")
        return genuine(of, *arguments)

    monkeypatch.setattr(info_nce, "measure", measure)
    tiny = ["--batch-sizes", "2", "--queue-lengths", "16", "--device", "cpu", "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="error stopped the run"):
        info_nce.main([*tiny, "--providers", "eager", "--repetitions", "2"])
    content = json.loads((tmp_path / "cpu" / "info_nce.json").read_text())
    assert "illegal memory access" in content["stopped"]
    assert (len(content["rows"]), len(content["not_reached"])) == (2, 2)
