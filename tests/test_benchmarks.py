"""The benchmarks measure what they say: providers against float64 numpy written out row by row, floors by hand, a run at tiny size."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness, info_nce, views
from kernels import ViewParams
from kernels.view_generation import generate_views_reference

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
    slow_memory = harness.Ceilings(bytes_per_second=1e6, flops_per_second={"ieee": 1e12, "tf32": 1e12, "bf16": 1e12})
    slow_units = harness.Ceilings(bytes_per_second=1e12, flops_per_second={"ieee": 5.12e6, "tf32": 1e12, "bf16": 1e12})
    assert info_nce.floor_ms(cell(False, True, 2, 10), slow_memory) == pytest.approx(40.98)
    assert info_nce.floor_ms(cell(False, True, 2, 10), slow_units) == pytest.approx(10)


def test_interleaved_tells_slow_from_fast() -> None:
    calls: list[str] = []

    def provider(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            time.sleep(seconds)

        return call

    times = harness.interleaved({"slow": provider("slow", 0.01), "fast": provider("fast", 0.001)}, CPU, 6, warmup=1)
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
        with harness.float32_products(precision):
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


# ------------------------------------------------------------------------------------------------------------------ views


def tiny_views(B: int = 2, precision: views.Output = "float32") -> views.Cell:
    """Source of odd width, views of more than a blur's radius."""
    return views.Cell(precision=precision, B=B, T=2, H=32, W=43, side=16)


def test_views_without_branches_are_the_reference() -> None:
    """48 draws: every kind of step, every order of at least two of them, clips with and without each."""
    inputs = views.make_inputs(tiny_views(B=24), CPU)
    rows = inputs.host_params
    for name in ("flip", "grayscale", "jitter"):
        for augmentation in (rows.clip, rows.still):
            assert 0 < getattr(augmentation, name).sum() < 24
    assert 0 < (rows.clip.sigma > 0).sum() < 24
    expected = generate_views_reference(inputs.frames, inputs.stills, inputs.params)
    # Positions between pixels are rounded to float32, a few of 43 pixels; then the steps, then the division by 0.225.
    rounding = 43 * 4 * np.finfo(np.float32).eps
    for view, true_view in zip(views.batched_views(*inputs[:2], inputs.params, torch.float32), expected, strict=True):
        torch.testing.assert_close(view, true_view, rtol=0, atol=rounding)
        assert view.stride() == true_view.stride()
    true_views = views.float64_views(inputs, yuv=False)
    assert true_views.rgb.dtype == torch.float64
    assert views.error(expected, true_views) < rounding
    assert views.error(expected._replace(dynamic=expected.dynamic + 1e-3), true_views) > 9e-4
    with pytest.raises(ArithmeticError, match="not finite"):
        views.error(expected._replace(static=expected.static * torch.nan), true_views)


@pytest.mark.parametrize("name", [name for name in views.PROVIDERS if name not in ("triton-augment", "torch.compile")])
def test_every_provider_of_views_does_the_work_it_says(name: str) -> None:
    inputs = views.make_inputs(tiny_views(), CPU)
    found = views.PROVIDERS[name](inputs, torch.bfloat16)()
    for view in found:
        assert view.shape == (2, 3, 2, 16, 16)
        assert view.dtype == torch.bfloat16
        assert view.isfinite().all()
    rgb, static, dynamic = (view.float() for view in found)
    assert (static[:, :, 0] == static[:, :, 1]).all()
    torch.testing.assert_close(
        dynamic, rgb - rgb.roll(1, 2), rtol=0, atol=3 * 2**-7
    )  # three roundings of values up to 4
    if name in views.OWN_DRAW:
        again = views.PROVIDERS[name](inputs, torch.bfloat16)()
        assert not torch.equal(found.rgb, again.rgb)
    else:
        # torchvision's luma differs by 1e-4 of 0..1, and each bfloat16 by half a unit of values up to 8.
        assert views.error(found, views.float64_views(inputs, "YUV" in name)) < 2**-6 + 2e-3


def test_a_provider_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(views.NotAvailable, match="needs a GPU"):
        views.triton_augment(views.make_inputs(tiny_views(), CPU), torch.float32)


def test_bytes_that_views_move_by_hand() -> None:
    params = views.make_inputs(tiny_views(), CPU).host_params
    boxes = torch.tensor([[0, 0, 10, 20], [1, 2, 5, 4]])
    params.clip.box.copy_(boxes)  # 200 and 20 pixels
    params.still.box.copy_(boxes.flip(0) // 2)  # 2 x 2 and 5 x 10 pixels
    params = ViewParams(params.clip, params.still, (7, 8))
    pixels, values = 220 * 3 + 54, 3 * 2 * 3 * 3 * 7 * 8
    assert views.bytes_to_move(params, 3, torch.bfloat16) == 3 * pixels + 2 * values
    assert views.bytes_to_move(params, 3, torch.float32) == 3 * pixels + 4 * values
    assert views.bytes_to_move(params, 3, torch.float32, yuv=True) == 1.5 * pixels + 4 * values


def test_planes_have_the_colours_of_the_frames() -> None:
    """Where a square of 2 x 2 has one colour; an odd width cuts the last square off."""
    colours = torch.randint(0, 256, (1, 1, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = colours.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :, :5].contiguous()
    planes = views.to_yuv(frames)
    (matrix,) = views.yuv_coefficients(planes.bt709, planes.full_range).tolist()
    rgb = views._rgb_of_yuv(planes, matrix, 0, 0, 0, 6, 5)[0].permute(1, 2, 0)
    torch.testing.assert_close(rgb, frames[0, 0].float(), rtol=0, atol=2.0)  # planes are whole numbers


def measured_views(times: dict[str, float], share: float, B: int = 128, precision: str = "bf16") -> dict[str, Any]:
    providers: dict[str, Any] = {name: {"median_ms": value} for name, value in times.items()}
    providers["ours"]["share_of_bandwidth"] = share
    return {"precision": precision, "B": B, "T": 16, "H": 240, "W": 320, "side": 112, "providers": providers}


def test_goals_of_views() -> None:
    large = measured_views({"kornia, all on device": 30.0, "torch.compile": 4.0, "ours": 1.0}, 0.7)
    small = measured_views({"kornia, all on device": 20.0, "torch.compile": 4.0, "ours": 1.0}, 0.5, B=8)
    kornia, compiled, bandwidth, step = views.judge([large, small], genuine=True, step_ms=100.0)
    assert (kornia["at_128"], kornia["worst"], kornia["verdict"]) == (30, 20, "not met")
    assert "B 8" in kornia["worst_at"]
    assert (compiled["worst"], compiled["verdict"]) == (4, "met")
    assert (bandwidth["at_128"], bandwidth["worst"], bandwidth["verdict"]) == (0.7, 0.5, "not met")
    assert (step["worst"], step["verdict"]) == (0.02, "met")  # two calls of 1 ms
    assert views.judge([large], genuine=True, step_ms=60.0)[-1]["verdict"] == "not met"
    assert {row["verdict"] for row in views.judge([large], genuine=True, step_ms=100.0)} == {"met"}
    estimated = views.judge([large], genuine=True, step_ms=None)[-1]
    assert estimated["worst"] is None
    assert estimated["verdict"].startswith("not measured: no step.json (estimate: 0.8% of a step of 242 ms")
    assert views.judge([small], genuine=True, step_ms=100.0)[-1]["verdict"] == "not measured in this run"
    del small["providers"]["torch.compile"]
    assert views.judge([small], genuine=True, step_ms=None)[1]["verdict"] == "not measured in this run"
    large["providers"]["ours"] = {"skipped": "RuntimeError: it broke"}
    assert views.judge([large], genuine=True, step_ms=None)[0]["verdict"] == "not met: ours failed"
    assert {row["verdict"] for row in views.judge([small], False, 100.0)} == {"not measured on this device"}


def test_a_step_is_read_from_its_results(tmp_path: Path) -> None:
    assert views.step_milliseconds(tmp_path) is None
    (tmp_path / "step.json").write_text('{"milliseconds_per_step": 240}')
    assert views.step_milliseconds(tmp_path) == 240
    (tmp_path / "step.json").write_text("{}")
    assert views.step_milliseconds(tmp_path) is None


def test_the_grid_of_views() -> None:
    def cells(*flags: str) -> list[tuple[str, int, str]]:
        planned = views.plan(views.make_parser().parse_args(flags), "cuda")
        return [(cell.precision, cell.B, cell.source) for cell in planned]

    sources = ("240 x 320", "128 x 171")
    whole = [("bf16", B, source) for B in (128, 40, 8) for source in sources]
    assert cells() == [*whole, *(("float32", 40, source) for source in sources)]
    assert cells("--quick") == whole[:2]
    assert cells("--precision", "float32") == [("float32", B, source) for _, B, source in whole]


def test_a_run_of_views_at_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without torch.compile, which takes half a minute; a provider that fails in its place is recorded, and the run goes on."""

    def broken(*arguments: Any) -> views.Call:
        raise torch.OutOfMemoryError("too large\nby far")

    monkeypatch.setitem(views.PROVIDERS, "torch.compile", broken)
    monkeypatch.setitem(views.VIEWS, "cpu", (2, 16))
    monkeypatch.setitem(views.SOURCES, "cpu", ((32, 43), (24, 32)))
    tiny = ["--batch-sizes", "1", "2", "--repetitions", "5", "--device", "cpu", "--results", str(tmp_path)]
    views.main([*tiny, "--precision", "bf16"])
    content = json.loads((tmp_path / "cpu" / "views_bf16.json").read_text())
    assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    assert "reference" in content["implementation"]
    assert (content["ceilings"], content["step_ms"], content["stopped"]) == (None, None, None)
    assert {goal["verdict"] for goal in content["goals"]} == {"not measured on this device"}
    assert [(row["B"], row["H"]) for row in content["rows"]] == [(2, 32), (2, 24), (1, 32), (1, 24)]
    for row in content["rows"]:
        assert list(row["providers"]) == list(views.PROVIDERS)
        assert row["bytes_from_yuv"] < row["bytes"]
        assert 0 < row["rounding"] <= 2**-6
        assert row["providers"]["torch.compile"] == {"skipped": "OutOfMemoryError: too large"}
        assert row["providers"]["triton-augment"] == {"skipped": "needs a GPU"}
        for name in set(views.PROVIDERS) - {"torch.compile", "triton-augment"}:
            found = row["providers"][name]
            assert 0 < found["low_ms"] <= found["median_ms"] <= found["high_ms"]
            assert found["repetitions"] == (2 if name in views.CLIP_BY_CLIP else 5)
            assert found["share_of_bandwidth"] is None
            assert (found["error"] is None) == (name in views.OWN_DRAW)
    assert (tmp_path / "cpu" / "views_bf16.png").read_bytes().startswith(b"\x89PNG")
    assert "skipped: OutOfMemoryError" in capsys.readouterr().out

    monkeypatch.setitem(views.PROVIDERS, "ours", broken)
    with pytest.raises(SystemExit, match="ours failed"):
        views.main([*tiny, "--providers", "reference", "ours", "--quick"])
    times = iter([0.0, 0.0, 1e6, 1e6])
    monkeypatch.setattr(views.time, "monotonic", lambda: next(times))
    views.main([*tiny, "--providers", "reference", "--minutes", "1"])
    content = json.loads((tmp_path / "cpu" / "views.json").read_text())
    assert (len(content["rows"]), len(content["not_reached"])) == (1, 3)
