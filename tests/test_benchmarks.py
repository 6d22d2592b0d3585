"""Tests of the benchmarks' harness, of benchmarks/info_nce.py and of benchmarks/views.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness, info_nce, view_providers, views
from benchmarks.harness import Goal, speedup
from dclr.kernels import ViewParams
from dclr.kernels.view_generation import generate_views_reference

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------------------------- harness


def make_run(folder: Path, *flags: str) -> harness.Run:
    arguments = harness.make_parser("", ["ours"]).parse_args([*flags, "--results", str(folder)])
    return harness.Run("tiny", flags, arguments, CPU)


def test_providers_take_turns_and_one_that_fails_is_skipped() -> None:
    calls: list[str] = []

    def prepare(name: str) -> tuple[harness.Call, dict[str, Any]]:
        if name == "broken":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return lambda: calls.append(name), {"error": 0.5}

    found = harness.check_and_time(["a", "broken", "b"], prepare, CPU, repetitions=4, warmup=1)
    assert calls == ["a", "b", *["a", "b", "b", "a"] * 2]
    assert list(found) == ["a", "broken", "b"]
    assert found["broken"] == {"skipped": "out of memory"}
    assert found["a"]["error"] == 0.5
    assert (found["a"]["repetitions"], found["a"]["captured"], found["a"]["peak_extra_bytes"]) == (4, None, None)
    assert 0 < found["a"]["low_ms"] <= found["a"]["median_ms"] <= found["a"]["high_ms"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (harness.NotAvailable("needs a GPU"), "needs a GPU"),
        (ValueError("bad\nsecond line"), "ValueError: bad"),
        (RuntimeError(), "RuntimeError: no message"),
    ],
)
def test_a_reason_is_one_line(error: Exception, text: str) -> None:
    assert harness.reason(error) == text


def test_the_precision_of_products_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    for precision, setting in (("tf32", "high"), ("bf16", "high"), ("ieee", "highest")):
        with harness.float32_products(precision):
            assert torch.get_float32_matmul_precision() == setting
        assert torch.get_float32_matmul_precision() == before


def row(B: int, ours: float | None, other: float = 9.0) -> harness.Row:
    """Return a measured row; ours None: skipped."""
    found = {"skipped": "out of memory"} if ours is None else {"median_ms": ours}
    return {"precision": "bf16", "B": B, "providers": {"other": {"median_ms": other}, "ours": found}}


def test_a_goal_is_judged_by_its_worst_row() -> None:
    goals = [
        Goal(text="4 times", value=speedup("other"), least=4),
        Goal(text="4 times at 8", value=speedup("other"), least=4, size={"B": 8}),
    ]

    def judge(rows: list[harness.Row], genuine: bool = True) -> list[tuple[Any, ...]]:
        typical = ("small", lambda row: row["B"] < 8)
        verdicts = harness.judge_kernels(rows, goals, lambda row: f"B {row['B']}", genuine, typical)
        return [tuple(verdict[key] for key in ("small", "worst", "worst_at", "verdict")) for verdict in verdicts]

    assert judge([row(2, 1.0), row(8, 3.0)]) == [(9, 3, "B 8", "not met"), (None, 3, "B 8", "not met")]
    assert judge([row(2, 1.0)]) == [(9, 9, "B 2", "met"), (None, None, None, "not measured in this run")]
    assert judge([row(2, 1.0), row(8, None)])[1] == (None, None, "B 8", "not met: ours failed")
    assert {verdict[-1] for verdict in judge([row(2, 1.0)], genuine=False)} == {"not measured on this device"}


def test_a_run_out_of_time_and_one_stopped_by_an_error_keep_what_they_have(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--minutes", "0")
    run.measure([1, 2, 3], lambda cell: {"providers": {}, "cell": cell}, str)
    assert ([each["cell"] for each in run.rows], run.not_reached) == ([1], ["2", "3"])
    assert run.stopped == "0 minutes were over"
    run.refuse_failures(["ours"])

    def measure(cell: int) -> harness.Row:
        if cell == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return {"providers": {}}

    run = make_run(tmp_path, "--quick")
    run.measure([1, 2, 3], measure, str)
    assert (len(run.rows), run.not_reached) == (1, ["2", "3"])
    figure = harness.plt.figure()
    run.publish(figure, {"question": "?"})
    content = json.loads((tmp_path / "cpu" / "tiny_quick.json").read_text())
    assert "illegal memory access" in content["stopped"]
    assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    with pytest.raises(SystemExit, match="an error stopped the run"):
        run.refuse_failures(["ours"])
    with pytest.raises(SystemExit, match="nothing was measured"):
        make_run(tmp_path).measure([2], measure, str)


def test_ours_may_be_skipped_only_for_an_allowed_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.rows = [row(2, None)]
    run.refuse_failures(["ours"], allowed="out of memory")
    with pytest.raises(SystemExit, match="ours failed: out of memory"):
        run.refuse_failures(["ours"])


def test_paths_are_not_published() -> None:
    assert harness.command("loader", ["--data", "/data/UCF-101"]) == "python -m benchmarks.loader --data UCF-101"


# ------------------------------------------------------------------------------------------------------------- info_nce


def loss_cell(
    mining: bool = True, backward: bool = True, B: int = 3, K: int = 200, precision: str = "ieee", decay: bool = False
) -> info_nce.Cell:
    return info_nce.Cell(precision=precision, mining=mining, backward=backward, B=B, K=K, decay=decay)


def oracle(inputs: info_nce.Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return losses (P,), mined entries (P, B, M) and the gradient (P, B, D), one query at a time in numpy."""
    q, k, z = (tensor.detach().double().numpy() for tensor in inputs[:3])
    if inputs.logit_scale is not None:
        z = z * inputs.logit_scale.double().numpy()[:, None]
    pairs, size = q.shape[:2]
    losses, gradient = np.zeros(pairs), np.zeros(q.shape)
    mined = np.zeros((pairs, size, info_nce.M), dtype=int)
    for i in range(size):
        if inputs.features is not None:
            static, dynamic = (z[1 + s] @ inputs.features[s, i].double().numpy() for s in range(2))
            both = sum(np.exp(similarity) / np.exp(similarity).sum() for similarity in (static, dynamic))
            for p, similarity in enumerate((both, static, dynamic, static, dynamic)):
                mined[p, i] = np.argsort(-similarity)[: info_nce.M]
        for p in range(pairs):
            candidates = np.vstack([k[p, i], z[p]])
            mass = np.exp(candidates @ q[p, i] / info_nce.TEMPERATURE)
            positive = {0, *(1 + mined[p, i])} if inputs.features is not None else {0}
            among = np.array([mass[j] if j in positive else 0.0 for j in range(len(mass))])
            losses[p] -= np.log(among.sum() / mass.sum()) / size
            mean, positive_mean = mass @ candidates / mass.sum(), among @ candidates / among.sum()
            gradient[p, i] = (mean - positive_mean) / (info_nce.TEMPERATURE * size)
    return losses, mined, gradient


@pytest.mark.parametrize(("mining", "decay"), [(True, False), (False, False), (False, True)])
def test_providers_and_float64_agree_with_numpy(mining: bool, decay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce, "_block_size", lambda K: 2)
    inputs = info_nce.make_inputs(loss_cell(mining, decay=decay), CPU)
    true_losses, true_mined, true_gradient = oracle(inputs)
    # The gradient is a difference of two means of rows, each divided by temperature and B: float32 rounds those.
    rounding = np.finfo(np.float32).eps / (info_nce.TEMPERATURE * inputs.queries.shape[1])
    assert np.abs(true_gradient).max() > 1000 * rounding
    for name in ("as released", "eager", "ours"):
        losses, mined, gradient = info_nce.run(info_nce.PROVIDERS[name](), inputs, backward=True)
        np.testing.assert_allclose(losses.detach(), true_losses, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, true_gradient, rtol=1e-5, atol=4 * rounding)
        assert (mined is not None) == mining
        if mining:
            np.testing.assert_array_equal(mined, true_mined)
    losses, gradient = info_nce.float64_loss(inputs, mined)
    np.testing.assert_allclose(losses, true_losses, rtol=1e-12)
    np.testing.assert_allclose(gradient, true_gradient, rtol=1e-9, atol=1e-14)
    if mining:
        np.testing.assert_array_equal(info_nce.float64_mined(inputs.features, inputs.queue), true_mined)
    losses, _, gradient = info_nce.run(info_nce.eager, inputs, backward=False)
    assert gradient is None
    assert not losses.requires_grad


def test_errors_of_the_loss_are_seen() -> None:
    inputs = info_nce.make_inputs(loss_cell(), CPU)
    losses, mined, gradient = info_nce.run(info_nce.eager, inputs, backward=True)
    exact = info_nce.accuracy(inputs, losses, mined, gradient)
    assert exact["loss_error"] < 1e-6
    assert exact["gradient_error"] < 1e-3
    assert exact["same_rows"] == 1
    wrong_mined = mined.clone()
    wrong_mined[1, 0, 0] = next(entry for entry in range(200) if entry not in mined[1, 0])
    wrong = info_nce.accuracy(inputs, losses, wrong_mined, 1.1 * gradient)
    assert wrong["loss_error"] > 1e-4
    assert wrong["gradient_error"] > 0.05
    assert wrong["same_rows"] == pytest.approx(14 / 15)
    with pytest.raises(ArithmeticError, match="not finite"):
        info_nce.accuracy(inputs, losses * torch.nan, mined, gradient)


def test_floors_by_hand() -> None:
    # P 5, D 128: an embedding of 128 numbers is 512 bytes in float32, 256 in bfloat16. Here B 2, K 10.
    assert info_nce.floor_bytes(loss_cell(False, False, 2, 10)) == (50 + 10 + 10) * 512 + 20
    assert info_nce.floor_bytes(loss_cell(False, True, 2, 10)) == (50 + 10 + 10 + 10) * 512 + 20
    assert info_nce.floor_bytes(loss_cell(True, True, 2, 10, "bf16")) == (50 + 10 + 10 + 10 + 4) * 256 + 20
    assert info_nce.floor_bytes(loss_cell(False, True, 2, 10, decay=True)) == (50 + 10 + 10 + 10) * 512 + 40 + 20
    # 5 x 2 x 10 x 128 multiplications and as many additions; twice that; and two of 2 x 10 x 128.
    assert info_nce.floor_flops(loss_cell(False, False, 2, 10)) == 25_600
    assert info_nce.floor_flops(loss_cell(False, True, 2, 10)) == 51_200
    assert info_nce.floor_flops(loss_cell(True, True, 2, 10)) == 61_440
    slow_memory = harness.Ceilings(bytes_per_second=1e6, flops_per_second={"ieee": 1e12, "tf32": 1e12, "bf16": 1e12})
    slow_units = harness.Ceilings(bytes_per_second=1e12, flops_per_second={"ieee": 5.12e6, "tf32": 1e12, "bf16": 1e12})
    assert info_nce.floor_ms(loss_cell(False, True, 2, 10), slow_memory) == pytest.approx(40.98)
    assert info_nce.floor_ms(loss_cell(False, True, 2, 10), slow_units) == pytest.approx(10)


def test_the_grid_begins_with_the_goals_sizes_in_every_precision() -> None:
    cells = info_nce.plan(info_nce.make_parser().parse_args([]), "cuda")
    sizes = {(goal.size["B"], goal.size["K"]) for goal in info_nce.GOALS if goal.size}
    # 3 sizes, 2 precisions, with and without mining, with and without backward, and with decay come first.
    assert {(c.B, c.K) for c in cells[:30]} == sizes
    for precision in ("bf16", "tf32"):
        assert sizes <= {(c.B, c.K) for c in cells if c.precision == precision}
    assert len(set(cells)) == len(cells) == 4 * (15 + 3) + 2 * 3
    assert sum(cell.decay for cell in cells) == 2 * 3


def test_a_run_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch.compile, which takes seconds a cell."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    flags = ["--batch-sizes", "2", "--queue-lengths", "16", "--repetitions", "2", "--results", str(tmp_path / "r")]
    info_nce.main([*flags, "--device", "cpu", "--providers", "as released", "eager", "ours"])
    folder = tmp_path / "r" / "cpu"
    content = json.loads((folder / "info_nce.json").read_text())
    assert "reference" in content["implementation"]
    assert content["ceilings"] is None
    assert {goal["verdict"] for goal in content["goals"]} == {"not measured on this device"}
    assert len(content["rows"]) == 5
    for each in content["rows"]:
        assert each["floor_flops"] == info_nce.floor_flops(harness.from_row(info_nce.Cell, each))
        for found in each["providers"].values():
            assert found["repetitions"] == 2
            assert found["loss_error"] < 1e-5
            assert (found["gradient_error"] is not None) == each["backward"]
            assert (found["same_rows"] is not None) == each["mining"]
    assert (folder / "info_nce.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "info_nce.json").read_text() == (folder / "info_nce.json").read_text()


# ---------------------------------------------------------------------------------------------------------------- views


def view_cell(B: int = 2) -> view_providers.Cell:
    """Return a cell with a source of odd width and views wider than a blur's radius."""
    return view_providers.Cell(precision="float32", B=B, T=2, H=32, W=43, side=16)


def test_the_batched_formula_is_that_of_the_reference() -> None:
    """48 draws: every kind of step, every order of at least two of them, clips with and without each."""
    inputs = view_providers.make_inputs(view_cell(B=24), CPU)
    rows = inputs.host_params
    for name in ("flip", "grayscale", "jitter"):
        for augmentation in (rows.clip, rows.still):
            assert 0 < getattr(augmentation, name).sum() < 24
    assert 0 < (rows.clip.sigma > 0).sum() < 24
    expected = generate_views_reference(inputs.frames, inputs.stills, inputs.params)
    # Positions between pixels are rounded to float32, a few of 43 pixels; then the steps, then the division by 0.225.
    rounding = 43 * 4 * np.finfo(np.float32).eps
    batched = view_providers.batched_views(*inputs[:2], inputs.params, torch.float32)
    for view, true_view in zip(batched, expected, strict=True):
        torch.testing.assert_close(view, true_view, rtol=0, atol=rounding)
        assert view.is_contiguous(memory_format=torch.channels_last_3d)
    error = view_providers.greatest_error
    truth = view_providers.float64_views(inputs, yuv=False)
    assert truth.rgb.dtype == torch.float64
    assert error(expected, truth) < rounding
    assert error(expected._replace(dynamic=expected.dynamic + 1e-3), truth) > 9e-4
    from_yuv = generate_views_reference(inputs.planes, inputs.still_planes, inputs.params)
    assert error(from_yuv, view_providers.float64_views(inputs, yuv=True)) < rounding
    with pytest.raises(ArithmeticError, match="not finite"):
        error(expected._replace(static=expected.static * torch.nan), truth)


@pytest.mark.parametrize("name", [name for name in views.PROVIDERS if name not in ("triton-augment", "torch.compile")])
def test_every_provider_of_views_does_the_work_it_says(name: str) -> None:
    inputs = view_providers.make_inputs(view_cell(), CPU)
    found = views.PROVIDERS[name](inputs, torch.bfloat16)()
    for view in found:
        assert view.shape == (2, 3, 2, 16, 16)
        assert view.dtype == torch.bfloat16
        assert view.isfinite().all()
    rgb, static, dynamic = (view.float() for view in found)
    assert (static[:, :, 0] == static[:, :, 1]).all()
    # Three rounding errors of values up to 4.
    torch.testing.assert_close(dynamic, rgb - rgb.roll(1, 2), rtol=0, atol=3 * 2**-7)
    if name in views.OWN_DRAW:
        again = views.PROVIDERS[name](inputs, torch.bfloat16)()
        assert not torch.equal(found.rgb, again.rgb)
    else:
        # torchvision's luma differs by 1e-4 of 0..1, and each bfloat16 by half a unit of values up to 8.
        truth = view_providers.float64_views(inputs, "YUV" in name)
        assert view_providers.greatest_error(found, truth) < 2**-6 + 2e-3


def test_planes_have_the_colours_of_the_frames() -> None:
    """Squares of 2 x 2 pixels have one colour; an odd width cuts the last square off."""
    colours = torch.randint(0, 256, (1, 1, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = colours.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :, :5].contiguous()
    rgb = view_providers.to_rgb(view_providers.to_yuv(frames), 0)
    torch.testing.assert_close(rgb, frames[0].double(), rtol=0, atol=2.0)  # planes are whole numbers


def test_bytes_that_views_move_by_hand() -> None:
    params = view_providers.make_inputs(view_cell(), CPU).host_params
    boxes = torch.tensor([[0, 0, 10, 20], [1, 2, 5, 4]])
    params.clip.box.copy_(boxes)  # 200 and 20 pixels
    params.still.box.copy_(boxes.flip(0) // 2)  # 2 x 2 and 5 x 10 pixels
    params = ViewParams(params.clip, params.still, (7, 8))
    pixels, values = 220 * 3 + 54, 2 * (3 + 1 + 3) * 3 * 7 * 8  # all frames of the static view are equal
    assert views.bytes_to_move(params, 3, torch.bfloat16) == 3 * pixels + 2 * values
    assert views.bytes_to_move(params, 3, torch.float32) == 3 * pixels + 4 * values
    assert views.bytes_to_move(params, 3, torch.float32, yuv=True) == 1.5 * pixels + 4 * values


def test_the_views_are_limited_by_bytes_or_by_instructions() -> None:
    ceilings = harness.Ceilings(bytes_per_second=1e9, flops_per_second={})
    pixels = int(views.LANE_RATE / views.INSTRUCTIONS_OF_A_PIXEL / 1e3)  # a millisecond
    found = {"median_ms": 4.0}
    by_bytes, by_instructions = (views.shares(moved, pixels, found, ceilings) for moved in (2e6, 0.5e6))
    assert by_bytes == pytest.approx({"share_of_bandwidth": 0.5, "share_of_limit": 0.5})
    assert by_instructions == pytest.approx({"share_of_bandwidth": 0.125, "share_of_limit": 0.25}, rel=1e-4)


def test_the_share_of_a_training_step(tmp_path: Path) -> None:
    rows = [{"precision": "bf16", "B": 128, "T": 16, "H": 240, "W": 320, "side": 112}]
    rows[0]["providers"] = {"ours": {"median_ms": 1.0}}

    def verdict(step_ms: float | None, genuine: bool = True) -> tuple[float | None, str]:
        found = views.judge(rows, genuine, step_ms)[-1]
        return found["worst"], found["verdict"]

    assert verdict(100.0) == (0.02, "met")  # two calls of 1 ms
    assert verdict(60.0)[1] == "not met"
    assert verdict(None) == (None, "not judged: run benchmarks.step first")
    assert verdict(100.0, genuine=False) == (None, "not measured on this device")
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


def test_a_run_of_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch.compile, which takes half a minute."""
    monkeypatch.setitem(views.VIEWS, "cpu", (2, 16))
    monkeypatch.setitem(views.SOURCES, "cpu", ((32, 43), (24, 32)))
    names = [name for name in views.PROVIDERS if name != "torch.compile"]
    flags = ["--batch-sizes", "1", "--repetitions", "5", "--device", "cpu", "--precision", "bf16"]
    views.main([*flags, "--results", str(tmp_path), "--providers", *names])
    content = json.loads((tmp_path / "cpu" / "views_bf16.json").read_text())
    assert (content["ceilings"], content["step_ms"]) == (None, None)
    assert [(each["B"], each["H"]) for each in content["rows"]] == [(1, 32), (1, 24)]
    for each in content["rows"]:
        assert list(each["providers"]) == names
        assert each["bytes_from_yuv"] < each["bytes"]
        assert 0 < each["rounding"] <= 2**-6
        assert each["providers"].pop("triton-augment") == {"skipped": "needs a GPU"}
        for name, found in each["providers"].items():
            assert found["repetitions"] == (2 if name in views.CLIP_BY_CLIP else 5)
            assert found["share_of_bandwidth"] is found["share_of_limit"] is None
            assert (found["error"] is None) == (name in views.OWN_DRAW)
    assert (tmp_path / "cpu" / "views_bf16.png").read_bytes().startswith(b"\x89PNG")
