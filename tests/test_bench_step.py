"""Tests of benchmarks/step.py, sharding.py and baseline.py: the providers, their checks, sections, FLOP, and goals."""

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch

from benchmarks import baseline, harness, info_nce, sharding, step, step_providers
from benchmarks.step_providers import PROVIDERS, Cell, as_torchvision, find_truth, make_inputs, make_network, untimed
from dclr.config import OptimConfig
from dclr.methods.encoder import PAIRS

CPU = torch.device("cpu")
CELL = Cell(B=3, T=8, side=32, H=48, W=64, width=4)


@pytest.fixture(autouse=True)
def restored_budget() -> Iterator[None]:
    """Restore what "ours, recomputed" sets for torch.compile. The tests of other files compile in the same process."""
    with functorch.patch(activation_memory_budget=1.0):
        yield


@pytest.fixture(scope="module")
def inputs() -> step_providers.Inputs:
    return make_inputs(CELL, CPU)


@pytest.fixture(scope="module")
def truth(inputs: step_providers.Inputs) -> step_providers.Truth:
    return find_truth(CELL, inputs, CPU)


# ------------------------------------------------------------------------------------------------------------ providers


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_makes_a_training_step(name, inputs, truth, one_process):
    provider, found = step.start(name, CELL, inputs, truth, CPU)
    assert found["right"], found
    # It has the truth's own modules in float32, so only the order of sums may differ.
    if name == "as released":
        assert found["key_error"] < 2e-5
    assert (found["loss_error"] is None) == (name == "as released")

    network, views_through, inside = provider.network, {"query": 0, "key": 0}, []
    before = [p.detach().clone() for p in (*network.query.parameters(), *network.key.parameters())]
    written = int(network.enqueued)
    hooks = []
    for role, encoder in (("query", network.query), ("key", network.key)):

        def count(module: nn.Module, given: tuple[torch.Tensor], role: str = role) -> None:
            views_through[role] += 0 if inside else given[0].shape[0]

        def forward_views(views: Any, *arguments: Any, role: str = role, **named: Any) -> Any:
            views_through[role] += sum(len(view) for view in views)
            inside.append(role)
            maps = type(network.query.backbone).forward_views(
                getattr(network, role).backbone, views, *arguments, **named
            )
            inside.pop()
            return maps

        hooks.append(encoder.backbone.register_forward_pre_hook(count))
        encoder.backbone.forward_views = forward_views
    provider.step(untimed)
    for hook in hooks:
        hook.remove()
    # A forward pass is 1, a backward pass 2.
    assert 3 * views_through["query"] + views_through["key"] == provider.passes * CELL.B
    after = [*network.query.parameters(), *network.key.parameters()]
    changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert all(changed[: len(changed) // 2])  # every parameter of the query encoder has a gradient
    assert sum(changed[len(changed) // 2 :]) > len(changed) // 4
    assert int(network.enqueued) == written + CELL.B


def test_a_step_that_computes_something_else_is_seen(inputs, truth, one_process, monkeypatch):
    genuine = step_providers.make_network

    def other(cell: Cell):
        network = genuine(cell)
        with torch.no_grad():
            network.key.backbone.layer4[0].conv1[0][0].weight[0] += 0.5
        return network

    monkeypatch.setattr(step_providers, "make_network", other)
    for name in PROVIDERS:
        assert not step.start(name, CELL, inputs, truth, CPU)[1]["right"], name


def test_as_released_contrasts_the_same_embeddings(inputs, truth, monkeypatch):
    """Queries, keys and mining features are those of the method's own modules for the same views."""
    given: list[torch.Tensor] = []
    genuine = info_nce.as_released

    def as_released(*arguments: torch.Tensor):
        given.extend(argument.detach().clone() for argument in arguments)
        return genuine(*arguments)

    monkeypatch.setattr(info_nce, "as_released", as_released)
    released = PROVIDERS["as released"](CELL, inputs, CPU)
    released.step(untimed, (truth.query, truth.key))
    queries, keys, _, mining = given

    network = as_torchvision(make_network(CELL))
    with torch.no_grad():
        _, static, dynamic = network.key.backbone(torch.cat(truth.query)).chunk(3)
        maps = {"s": static.sum(1, keepdim=True), "d": dynamic.sum(1, keepdim=True)}
        features = network.query.backbone(torch.cat(truth.query)).chunk(3)
        embedded = network.query.embed(dict(zip("vsd", features, strict=True)), maps)
        expected = [network.key.heads[name](view.mean((2, 3, 4))) for name, view in (("sv", static), ("dv", dynamic))]
    torch.testing.assert_close(queries, torch.stack([embedded[name] for name in PAIRS]), rtol=0, atol=2e-5)
    torch.testing.assert_close(mining, torch.stack(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(keys, truth.keys, rtol=0, atol=2e-5)

    # It draws its own views in every step.
    first, second = (released.make_views(inputs.query) for _ in range(2))
    assert not torch.equal(first.rgb, second.rgb)
    assert torch.equal(first.static[:, :, 0], first.static[:, :, 1])
    torch.testing.assert_close(first.dynamic[:, :, 0], first.rgb[:, :, 0] - first.rgb[:, :, -1])


# -------------------------------------------------------------------------------------------------------------- figures


def test_flops_are_those_of_the_convolutions():
    assert step.view_flops(Cell(B=1)) == pytest.approx(39.4e9, rel=1e-3)  # the published figure, docs/method.md
    network, total = as_torchvision(make_network(CELL)), 0

    def count(module: nn.Module, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        nonlocal total
        total += 2 * result.numel() * module.weight[0].numel()

    for module in network.query.backbone.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    network.query.backbone(torch.randn(1, 3, CELL.T, CELL.side, CELL.side))
    assert step.view_flops(CELL) == total


@pytest.mark.parametrize("name", ["as released", "eager bf16", "ours"])
def test_sections_are_told_apart(name, inputs, truth, one_process, monkeypatch):
    """Each section is made slow by its own delay and shows it. The network is left as it was."""
    provider, _ = step.start(name, CELL, inputs, truth, CPU)
    network, backbone = provider.network, provider.network.query.backbone
    delays = {"query forward": 0.05, "keys": 0.1, "loss": 0.15}

    def slow(function: Any, section: str, calls: int = 1) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            time.sleep(delays[section] / calls)
            return function(*arguments, **named)

        return call

    for method in ("forward", "forward_views"):
        if hasattr(backbone, method):
            monkeypatch.setattr(backbone, method, slow(getattr(backbone, method), "query forward"))
    head = network.key.heads["sv"]  # called in each pass of the key encoder
    monkeypatch.setattr(head, "forward", slow(head.forward, "keys", calls=3 if name == "as released" else 2))
    monkeypatch.setattr(network, "_enqueue", slow(network._enqueue, "loss"))
    found = step.time_sections(provider, CPU, steps=1)
    assert list(found) == list(step.SECTIONS)
    for section, seconds in delays.items():
        assert found[section] >= 1e3 * seconds, found
    assert all(value > 0 for value in found.values()), found  # "other" is the rest, so nothing is counted twice
    assert network.query.backbone is backbone
    assert not {"_encode_key", "_look_at_query"} & vars(network).keys()
    assert "embed" not in vars(network.query)


def test_figures_by_hand():
    ceilings = harness.Ceilings(bytes_per_second=1.0, flops_per_second={"ieee": 1.0, "tf32": 1.0, "bf16": 1e14})
    found = {"precision": "bf16", "passes": 14}
    figures = step.figures([[100.0, 300.0], [200.0, 200.0]], found, Cell(B=10), 10**9, ceilings)
    assert (figures["median_ms"], figures["repetitions"], figures["ms_by_round"]) == (200, 4, [200, 200])
    assert figures["samples_per_second"] == pytest.approx(50)
    assert figures["flops_per_second"] == pytest.approx(14 * 10 * 1e9 / 0.2)
    assert figures["share_of_peak"] == pytest.approx(0.007)


# ---------------------------------------------------------------------------------------------------------------- goals


def row(times: dict[str, list[float]], cell: Cell | None = None, views_ms: float = 10.0) -> dict[str, Any]:
    """Return a row of the recipe's cell or another. A turn is one step."""
    cell = cell or Cell(B=128)
    providers = {}
    for name, by_round in times.items():
        found = {"precision": "bf16", "passes": 14, "right": True}
        found |= step.figures([[ms] for ms in by_round], found, cell, 10**9, None)
        providers[name] = found | {"parts": {"views": views_ms, "keys": found["median_ms"] - views_ms}}
    return vars(cell) | {"providers": providers}


def test_goals_on_a_gpu(monkeypatch):
    fast = row({"as released": [1400, 1600], "eager bf16": [300, 340], "ours": [200, 200]})
    rate, released, eager, *first_part, one, two = step.judge([fast, row({"ours": [9000.0]}, Cell(B=40))], "cuda")
    assert [(goal["value"], goal["verdict"]) for goal in first_part] == [(pytest.approx(640), "met"), (7.5, "met")]
    assert (rate["value"], rate["verdict"]) == (pytest.approx(640), "met")
    assert (released["value"], released["by_round"], released["verdict"]) == (7.5, [7, 8], "met")
    assert (eager["value"], eager["without_views"]) == (pytest.approx(1.6), pytest.approx(310 / 190))
    assert one["verdict"] == two["verdict"] == "not measured on this device"
    slow = step.judge([row({"as released": [1100.0], "eager bf16": [280.0], "ours": [250.0]})], "cuda")
    assert [goal["verdict"] for goal in slow[:5]] == [*["not met"] * 3, "met", "not met"]
    elsewhere = step.judge([row({"ours": [1.0]}, Cell(B=128, side=64))], "cuda")
    assert {goal["verdict"] for goal in elsewhere[:3]} == {"not measured in this run"}
    # benchmarks.views reads the time of this cell, if its views were made by the Triton kernels.
    assert step.goal_milliseconds([fast], CPU) is None
    monkeypatch.setattr(step, "runs_triton", lambda device: True)
    assert step.goal_milliseconds([fast], CPU) == 200


@pytest.mark.parametrize(
    ("provider", "found", "verdict"),
    [
        ("as released", {"skipped": "out of memory"}, "not measured: as released: out of memory"),
        ("ours", {"right": None}, "met, by a step that was not checked"),
        ("ours", {"right": False}, "not met: ours computes something else"),
        ("ours", {"skipped": "out of memory"}, "not met: ours: out of memory"),
    ],
)
def test_a_goal_whose_providers_failed(provider, found, verdict):
    fast = row({"as released": [1400, 1600], "ours": [200, 200]})
    fast["providers"][provider] = fast["providers"][provider] | found
    assert step.judge([fast], "cuda")[1]["verdict"] == verdict


def test_goals_on_a_cpu_are_judged_in_one_precision_and_at_the_defaults_by_the_worst_batch():
    rows = [
        row({"as released": [140.0], "ours": [50.0], "ours, float32": [100.0]}, Cell(B=2)),
        row({"as released": [120.0], "ours": [80.0], "ours, float32": [100.0]}, Cell(B=4)),
    ]
    *on_gpu, same, defaults = step.judge(rows, "cpu")
    assert (same["value"], same["verdict"]) == (pytest.approx(1.2), "not met")
    assert (defaults["value"], defaults["verdict"]) == (pytest.approx(1.5), "met")
    assert {goal["verdict"] for goal in on_gpu} == {"not measured on this device"}


def test_the_grid_begins_with_the_goals_cell():
    def cells(*flags: str, kind: str = "cuda") -> list[Cell]:
        return step.plan(step.make_parser().parse_args(flags), kind)

    whole = [Cell(backbone=name, B=B) for name in ("r2plus1d_10", "r2plus1d_18") for B in (128, 40, 256, 8)]
    assert cells() == whole
    assert cells("--quick") == [Cell(B=128)]
    assert cells("--backbones", "r2plus1d_18", "--batch-sizes", "8", "40") == [whole[5], whole[7]]
    assert cells(kind="cpu")[0] == Cell(B=2)


def test_a_run_of_steps(one_process, tmp_path, monkeypatch):
    """Float32 has no memory for the truth, and eager bf16 none for its step."""

    def too_large(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dclr.training.engine.start_processes", lambda: one_process)
    monkeypatch.setitem(step.CELLS, "cpu", (CELL,))
    monkeypatch.setitem(PROVIDERS, "eager bf16", too_large)
    monkeypatch.setattr(step, "find_truth", too_large)
    step.main(["--rounds", "2", "--results", str(tmp_path)])
    content = json.loads((tmp_path / "cpu" / "step.json").read_text())
    assert {"cudnn", "cudnn_benchmark"} <= content["convolutions"].keys()
    assert content["milliseconds_per_step"] is None
    (only,) = content["rows"]
    assert only["unchecked"] == "out of memory"
    assert list(only["providers"]) == list(PROVIDERS)
    assert only["providers"].pop("eager bf16") == {"skipped": "out of memory"}
    for found in only["providers"].values():
        assert 0 < found["low_ms"] <= found["median_ms"] <= found["high_ms"]
        assert (found["repetitions"], len(found["ms_by_round"])) == (2, 2)
        assert found["right"] is None
        assert list(found["parts"]) == list(step.SECTIONS)
    assert (tmp_path / "cpu" / "step.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- sharding

TASK = sharding.Task(width=4, T=8, side=16, batch=2, queue_length=16, steps=5, float32=True)


def test_ddp_and_all_stages_train_the_same_and_another_learning_rate_is_seen(one_process, monkeypatch):
    turns = {name: sharding.train(name, TASK, CPU) for name in sharding.DS_CONFIGS}
    for turn in turns.values():
        assert len(turn["ms"]) == TASK.steps
        assert len(turn["losses"]) == sharding.WARMUP + TASK.steps
        assert turn["precision"].startswith("float32")
        assert turn["peak_gib"] > 0
    losses = {name: turn["losses"] for name, turn in turns.items()}
    assert len(set(losses["DDP"])) > 1
    same = sharding.compare_losses(losses)
    assert same["agree"], same
    monkeypatch.setattr(sharding, "OptimConfig", lambda **settings: OptimConfig(**settings, lr=0.011))
    losses["ZeRO-1"] = sharding.train("ZeRO-1", TASK, CPU)["losses"]
    assert losses["ZeRO-1"][0] == losses["DDP"][0]
    assert not sharding.compare_losses(losses)["agree"]
    with pytest.raises(ArithmeticError, match="ZeRO-1: the loss is nan"):
        sharding.compare_losses(losses | {"ZeRO-1": [float("nan")] * 8})


@pytest.mark.launcher
@pytest.mark.slow
def test_a_launch_returns_what_two_processes_measured(clean_environment, monkeypatch):
    for name in set(sharding.os.environ) - set(clean_environment):
        monkeypatch.delenv(name)
    turn = sharding.launch("DDP", sharding.Task(**vars(TASK) | {"steps": 2}), processes=2)
    assert len(turn["ms"]) == 2
    assert all(loss > 0 for loss in turn["losses"])


def test_a_launch_that_fails_says_why(monkeypatch):
    said = "Traceback (most recent call last):\n  raise UserError\n"
    said += "dclr.errors.UserError: --width is 0, but must be at least 1\n"
    said += "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nRoot Cause\n"

    def run(command: list[str], **settings: Any) -> Any:
        assert command[command.index("--nproc_per_node") + 1] == "3"
        return sharding.subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(sharding.subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"a launch of ZeRO-1 failed: dclr\.errors\.UserError: --width is 0"):
        sharding.launch("ZeRO-1", TASK, processes=3)


def turn(ms: float, peak: float = 1.0, loss: float = 5.0) -> dict[str, Any]:
    return {"precision": "float32", "ms": [ms, ms, 9 * ms], "losses": [loss] * 11, "peak_gib": peak}


def test_a_provider_is_compared_with_ddp_round_by_round():
    turns = {"DDP": [turn(10), turn(20), turn(40)], "stage 0": [turn(11, 2.0), turn(22), turn(44)]}
    rows = sharding.summarise(turns, TASK, processes=2)
    assert rows["stage 0"]["ratio_by_round"] == pytest.approx([1.1, 1.1, 1.1])
    assert rows["stage 0"]["median_ms"] == 22
    assert rows["stage 0"]["samples_per_second"] == pytest.approx(4 / 0.022)
    assert rows["stage 0"]["peak_gib"] == 2.0


@pytest.mark.parametrize(
    ("stage_0", "zero_1", "verdict"),
    [
        ([10, 11], [20, 21], "fastest: DDP; of DeepSpeed's stages: stage 0. The default, ZeRO-1 (FILE), is slower"),
        ([30, 31], [20, 21], "fastest: DDP; of DeepSpeed's stages: ZeRO-1. The default, ZeRO-1 (FILE), is the fastest"),
        (
            [10, 12],
            [11.1, 11.5],
            "fastest: DDP; of DeepSpeed's stages: stage 0, not clearly faster than ZeRO-1. "
            "The default, ZeRO-1 (FILE), is not clearly slower",
        ),
    ],
)
def test_a_stage_is_faster_only_if_it_is_in_every_round(stage_0, zero_1, verdict, monkeypatch):
    config = sharding.RunConfig(ds_config="ds_configs/zero1.json")
    monkeypatch.setattr(sharding, "RunConfig", lambda: config)
    times = {"DDP": [5, 5], "stage 0": stage_0, "ZeRO-1": zero_1, "ZeRO-2": [40, 41]}
    turns = {name: [turn(ms) for ms in by_round] for name, by_round in times.items()}
    found = sharding.judge(sharding.summarise(turns, TASK, processes=2))
    assert found == verdict.replace("FILE", "ds_configs/zero1.json")


def test_a_run_of_sharding(tmp_path, monkeypatch):
    launched: list[tuple[str, bool]] = []

    def launch(name: str, task: sharding.Task, processes: int) -> dict[str, Any]:
        launched.append((name, task.float32))
        return turn(10.0 + len(name)) | {"precision": "float32" if task.float32 else "bfloat16 compute"}

    monkeypatch.setattr(sharding, "launch", launch)
    monkeypatch.setattr(sharding.torch.cuda, "is_available", lambda: False)
    names = list(sharding.DS_CONFIGS)
    sharding.main(["--rounds", "2", "--results", str(tmp_path)])
    timed = names + names[1:] + names[:1]
    assert launched == [(name, False) for name in timed] + [(name, True) for name in names]
    content = json.loads((tmp_path / "cpu" / "sharding.json").read_text())
    assert (content["processes"], content["task"]["batch"], list(content["rows"])) == (2, 16, names)
    assert content["agreement"]["agree"] is True
    assert (tmp_path / "cpu" / "sharding.png").read_bytes().startswith(b"\x89PNG")

    def other(name: str, task: sharding.Task, processes: int) -> dict[str, Any]:
        return turn(10.0, loss=6.0 if name == "ZeRO-2" else 5.0)

    monkeypatch.setattr(sharding, "launch", other)
    with pytest.raises(SystemExit, match="these are not the same steps"):
        sharding.main(["--rounds", "1", "--results", str(tmp_path)])
    monkeypatch.setattr(sharding.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="--processes is 2, but must be at most 1"):
        sharding.main(["--processes", "2"])


# ------------------------------------------------------------------------------------------------------------- baseline


def answers(*ms: float) -> list[dict[str, Any]]:
    return [{"ms": [value], "peak_bytes": None} for value in ms]


def test_the_speedup_over_a_baseline_by_hand():
    built = {"before": {"first_loss": 10.0, "precision": "ieee"}, "after": {"first_loss": 10.0005, "precision": "ieee"}}
    row = baseline.summarise(built, {"before": answers(30, 40, 60), "after": answers(20, 20, 50)}, size=4)
    assert row["speedup_by_round"] == [1.5, 2, 1.2]
    assert (row["speedup_median"], row["same"]) == (1.5, True)
    assert row["after"]["samples_per_second"] == 200
    row |= {"provider": "ours, float32", "commit_before": baseline.COMMIT}
    assert baseline.judge([row], "cpu")["verdict"] == "met"
    assert baseline.judge([row], "cuda")["verdict"] == "not measured on this device"
    assert baseline.judge([row, row | {"speedup_median": 1.1}], "cpu")["verdict"] == "not met"
    built["after"]["first_loss"] = 10.01
    other = baseline.summarise(built, {"before": answers(30), "after": answers(10)}, size=4)
    assert not other["same"]
    assert "different losses" in baseline.judge([row, row | other], "cpu")["verdict"]


@pytest.mark.slow
def test_two_trees_make_the_same_step(tmp_path):
    """The older tree is a copy of today's. A changed weight in it is seen."""
    for name in baseline.PATHS:
        shutil.copytree(harness.ROOT / name, tmp_path / "copy" / name, symlinks=True)
    cell = Cell(B=2, T=4, side=16, H=24, W=32, width=4)
    row = baseline.measure(cell, "ours, float32", rounds=2, steps=1, commit="copy", folder=tmp_path)
    assert row["before"]["first_loss"] == row["after"]["first_loss"]
    assert len(row["speedup_by_round"]) == 2
    file = tmp_path / "copy" / "benchmarks" / "step_providers.py"
    file.write_text(file.read_text().replace("torch.manual_seed(0)", "torch.manual_seed(1)"))
    assert not baseline.measure(cell, "ours, float32", rounds=1, steps=1, commit="copy", folder=tmp_path)["same"]
    file.write_text("raise ValueError('no such tree')")
    with pytest.raises(RuntimeError, match="commit copy: ValueError: no such tree"):
        baseline.measure(cell, "ours, float32", rounds=1, steps=1, commit="copy", folder=tmp_path)


def test_a_baseline_that_git_does_not_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as stop:
        baseline.main(["--commit", "no-such-commit"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--fill --commit no-such-commit` in a git checkout" in said
    with pytest.raises(SystemExit) as stop:
        baseline.main(["--rounds", "0"])
    assert (stop.value.code, capsys.readouterr().err) == (2, "--rounds is 0, but must be at least 1\n")
