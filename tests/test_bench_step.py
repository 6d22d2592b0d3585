"""benchmarks/step.py and sharding.py: every provider makes the step it says, parts and FLOP are counted right, goals are judged by them."""

import json
import time
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import info_nce, sharding, step, step_providers, views
from benchmarks.step_providers import PROVIDERS, Cell, as_torchvision, find_truth, make_inputs, make_method, unwatched
from dclr.config import OptimConfig
from dclr.method import PAIRS

CPU = torch.device("cpu")
CELL = Cell(B=3, T=8, side=32, H=48, W=64, width=4)


@pytest.fixture(scope="module")
def inputs() -> step_providers.Inputs:
    return make_inputs(CELL, CPU)


@pytest.fixture(scope="module")
def truth(inputs: step_providers.Inputs) -> step_providers.Truth:
    return find_truth(CELL, inputs, CPU)


# -------------------------------------------------------------------------------------------------------------- providers


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_makes_a_training_step(name, inputs, truth, one_process):
    provider, found = step.start(name, CELL, inputs, truth, CPU)
    assert found["right"], found
    # Of the truth's own modules in float32, only the order of sums may differ.
    if name == "as released":
        assert found["key_error"] < 2e-5
    assert (found["loss_error"] is None) == (name == "as released")

    method, views_through = provider.method, {"query": 0, "key": 0}
    before = [p.detach().clone() for p in (*method.query.parameters(), *method.key.parameters())]
    written = int(method.enqueued)
    hooks = []
    for role, encoder in (("query", method.query), ("key", method.key)):

        def count(module: nn.Module, given: tuple[torch.Tensor], role: str = role) -> None:
            views_through[role] += given[0].shape[0]

        hooks.append(encoder.backbone.register_forward_pre_hook(count))
    provider.step(unwatched)
    for hook in hooks:
        hook.remove()
    # A pass forward is 1, a backward pass 2.
    assert 3 * views_through["query"] + views_through["key"] == provider.passes * CELL.B
    after = [*method.query.parameters(), *method.key.parameters()]
    moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert all(moved[: len(moved) // 2])  # of the query network every parameter has a gradient
    assert sum(moved[len(moved) // 2 :]) > len(moved) // 4
    assert int(method.enqueued) == written + CELL.B


def test_a_step_that_computes_something_else_is_seen(inputs, truth, one_process, monkeypatch):
    genuine = step_providers.make_method

    def other(cell: Cell):
        method = genuine(cell)
        with torch.no_grad():
            method.key.backbone.layer4[0].conv1[0][0].weight[0] += 0.5
        return method

    monkeypatch.setattr(step_providers, "make_method", other)
    for name in PROVIDERS:
        assert not step.start(name, CELL, inputs, truth, CPU)[1]["right"], name


def test_as_released_contrasts_the_same_embeddings(inputs, truth, monkeypatch):
    """Queries, keys and mining features by the method's own modules, from the same views, maps of a pass over all three."""
    given: list[torch.Tensor] = []
    genuine = info_nce.as_released

    def as_released(*arguments: torch.Tensor):
        given.extend(argument.detach().clone() for argument in arguments)
        return genuine(*arguments)

    monkeypatch.setattr(info_nce, "as_released", as_released)
    PROVIDERS["as released"](CELL, inputs, CPU).step(unwatched, (truth.query, truth.key))
    queries, keys, _, mining = given

    method = as_torchvision(make_method(CELL))
    with torch.no_grad():
        _, static, dynamic = method.key.backbone(torch.cat(truth.query)).chunk(3)
        maps = {"s": static.sum(1, keepdim=True), "d": dynamic.sum(1, keepdim=True)}
        features = method.query.backbone(torch.cat(truth.query)).chunk(3)
        embedded = method.query.embed(dict(zip("vsd", features, strict=True)), maps)
        expected = [method.key.heads[name](view.mean((2, 3, 4))) for name, view in (("sv", static), ("dv", dynamic))]
    torch.testing.assert_close(queries, torch.stack([embedded[name] for name in PAIRS]), rtol=0, atol=2e-5)
    torch.testing.assert_close(mining, torch.stack(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(keys, truth.keys, rtol=0, atol=2e-5)


def test_as_released_draws_anew_and_the_others_do_not(inputs):
    released = PROVIDERS["as released"](CELL, inputs, CPU)
    first, second = (released.make_views(inputs.query) for _ in range(2))
    assert not torch.equal(first.rgb, second.rgb)
    assert torch.equal(first.static[:, :, 0], first.static[:, :, 1])
    torch.testing.assert_close(first.dynamic[:, :, 0], first.rgb[:, :, 0] - first.rgb[:, :, -1])


# ---------------------------------------------------------------------------------------------------------------- measure


def test_flops_are_those_of_the_convolutions():
    assert step.flops_of_view(Cell(B=1)) == pytest.approx(39.4e9, rel=1e-3)  # the published figure, docs/method.md
    method, total = as_torchvision(make_method(CELL)), 0

    def count(module: nn.Module, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        nonlocal total
        total += 2 * result.numel() * module.weight[0].numel()

    for module in method.query.backbone.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    method.query.backbone(torch.randn(1, 3, CELL.T, CELL.side, CELL.side))
    assert step.flops_of_view(CELL) == total


@pytest.mark.parametrize("name", ["as released", "eager bf16", "ours"])
def test_parts_are_told_apart(name, inputs, truth, one_process, monkeypatch):
    """Each is made slow by a delay of its own, and shows it; nothing of the watching stays behind."""
    provider, _ = step.start(name, CELL, inputs, truth, CPU)
    method, backbone = provider.method, provider.method.query.backbone
    delays = {"query forward": 0.15, "keys": 0.3, "loss": 0.45}

    def slow(function: Any, part: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            time.sleep(delays[part])
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(backbone, "forward", slow(backbone.forward, "query forward"))
    head = method.key.heads["sv"]  # mining features: once a step in ours, embeddings of each pass
    calls = {"as released": 3, "eager bf16": 2, "ours": 2}[name]
    delays["keys"] /= calls
    monkeypatch.setattr(head, "forward", slow(head.forward, "keys"))
    monkeypatch.setattr(method, "_enqueue", slow(method._enqueue, "loss"))
    found = step.parts(provider, CPU, steps=1)
    assert list(found) == list(step.PARTS)
    for part, seconds in (("query forward", 0.15), ("keys", 0.3), ("loss", 0.45)):
        assert found[part] >= 1e3 * seconds, found
    assert all(value > 0 for value in found.values()), found  # "other" is what is left: nothing is counted twice
    assert method.query.backbone is backbone
    assert not {"_encode_key", "_look_at_query"} & vars(method).keys()
    assert "embed" not in vars(method.query)


def row(times: dict[str, list[float]], cell: Cell | None = None, views_ms: float = 10.0) -> dict[str, Any]:
    """Of the recipe's cell, or another; a turn is one step."""
    cell = cell or Cell(B=128)
    providers = {}
    for name, by_round in times.items():
        found = {"precision": "bf16", "passes": 14, "right": True}
        found |= step.numbers([[ms] for ms in by_round], found, cell, 10**9, None)
        providers[name] = found | {"parts": {"views": views_ms, "keys": found["median_ms"] - views_ms}}
    return vars(cell) | {"providers": providers}


def test_numbers_by_hand():
    ceilings = step.harness.Ceilings(bytes_per_second=1.0, flops_per_second={"ieee": 1.0, "tf32": 1.0, "bf16": 1e14})
    found = {"precision": "bf16", "passes": 14}
    numbers = step.numbers([[100.0, 300.0], [200.0, 200.0]], found, Cell(B=10), 10**9, ceilings)
    assert (numbers["median_ms"], numbers["repetitions"], numbers["ms_by_round"]) == (200, 4, [200, 200])
    assert numbers["samples_per_second"] == pytest.approx(50)
    assert numbers["flops_per_second"] == pytest.approx(14 * 10 * 1e9 / 0.2)
    assert numbers["share_of_peak"] == pytest.approx(0.007)


def test_goals_on_a_gpu():
    fast = row({"as released": [1400, 1600], "eager bf16": [300, 340], "ours": [200, 200]})
    rate, released, eager, *on_cpu = step.judge([fast, row({"ours": [9000.0]}, Cell(B=40))], "cuda")
    assert (rate["value"], rate["verdict"]) == (pytest.approx(640), "met")
    assert (released["value"], released["by_round"], released["verdict"]) == (7.5, [7, 8], "met")
    assert (eager["value"], eager["without_views"]) == (pytest.approx(1.6), pytest.approx(310 / 190))
    assert {goal["verdict"] for goal in on_cpu} == {"not measured on this device"}
    slow = step.judge([row({"as released": [1100.0], "eager bf16": [280.0], "ours": [250.0]})], "cuda")
    assert [goal["verdict"] for goal in slow[:3]] == ["not met"] * 3
    fast["providers"]["as released"] = {"skipped": "out of memory"}
    assert step.judge([fast], "cuda")[1]["verdict"] == "not measured: as released: out of memory"
    fast["providers"]["ours"]["right"] = None
    assert step.judge([fast], "cuda")[0]["verdict"] == "met, by a step that was not checked"
    fast["providers"]["ours"]["right"] = False
    assert {goal["verdict"] for goal in step.judge([fast], "cuda")[:3]} == {"not met: ours computes something else"}
    fast["providers"]["ours"] = {"skipped": "out of memory"}
    assert {goal["verdict"] for goal in step.judge([fast], "cuda")[:3]} == {"not met: ours: out of memory"}
    elsewhere = step.judge([row({"ours": [1.0]}, Cell(B=128, side=64))], "cuda")
    assert {goal["verdict"] for goal in elsewhere[:3]} == {"not measured in this run"}


def test_goals_on_a_cpu_are_judged_in_one_precision_and_as_it_is_run_by_the_worst_batch():
    rows = [
        row({"as released": [140.0], "ours": [50.0], "ours, float32": [100.0]}, Cell(B=2)),
        row({"as released": [120.0], "ours": [80.0], "ours, float32": [100.0]}, Cell(B=4)),
    ]
    *on_gpu, same, users = step.judge(rows, "cpu")
    assert (same["value"], same["verdict"]) == (pytest.approx(1.2), "not met")
    assert (users["value"], users["verdict"]) == (pytest.approx(1.5), "met")
    assert {goal["verdict"] for goal in on_gpu} == {"not measured on this device"}


def test_the_views_find_the_milliseconds_of_the_goals_step(tmp_path, monkeypatch):
    rows = [row({"ours": [9.0]}, Cell(B=40)), row({"ours": [200.0]})]
    assert step.goal_milliseconds(rows, CPU) is None  # ours without its kernels
    monkeypatch.setattr(step, "runs_triton", lambda device: True)
    content = {"milliseconds_per_step": step.goal_milliseconds(rows, CPU)}
    (tmp_path / "step.json").write_text(json.dumps(content))
    assert views.step_milliseconds(tmp_path) == 200
    assert step.goal_milliseconds(rows[:1], CPU) is None


def test_the_grid_begins_with_the_goals_cell():
    def cells(*flags: str, kind: str = "cuda") -> list[Cell]:
        return step.plan(step.make_parser().parse_args(flags), kind)

    whole = [Cell(backbone=name, B=B) for name in ("r2plus1d_10", "r2plus1d_18") for B in (128, 40, 256, 8)]
    assert cells() == whole
    assert cells("--quick") == [Cell(B=128)]
    assert cells("--backbones", "r2plus1d_18", "--batch-sizes", "8", "40") == [whole[5], whole[7]]
    assert cells(kind="cpu")[0] == Cell(B=2)


@pytest.fixture
def run_step(one_process, monkeypatch, tmp_path):
    """benchmarks/step.py on two tiny cells; returns what it wrote."""
    monkeypatch.setattr("dclr.training.engine.start_processes", lambda: one_process)
    monkeypatch.setitem(step.CELLS, "cpu", (CELL, Cell(**vars(CELL) | {"B": 2})))
    monkeypatch.setitem(step.ROUNDS, "cpu", (2, 2))

    def run(*flags: str) -> dict[str, Any]:
        step.main([*flags, "--results", str(tmp_path)])
        return json.loads((tmp_path / "cpu" / ("step_quick.json" if "--quick" in flags else "step.json")).read_text())

    return run


def test_a_run_of_steps_at_tiny_size(run_step, tmp_path, monkeypatch, capsys):
    def too_large(*arguments: Any) -> step_providers.Provider:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(PROVIDERS, "eager bf16", too_large)
    content = run_step("--batch-sizes", "3")
    assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    assert {"cudnn", "cudnn_benchmark"} <= content["convolutions"].keys()
    assert content["milliseconds_per_step"] is None
    assert [of["B"] for of in content["rows"]] == [3]
    for of_cell in content["rows"]:
        assert list(of_cell["providers"]) == list(PROVIDERS)
        assert of_cell["providers"]["eager bf16"] == {"skipped": "out of memory"}
        for name in ("as released", "ours", "ours, float32"):
            found = of_cell["providers"][name]
            assert 0 < found["low_ms"] <= found["median_ms"] <= found["high_ms"]
            assert (found["repetitions"], len(found["ms_by_round"])) == (4, 2)
            assert found["right"] is True
            assert list(found["parts"]) == list(step.PARTS)
    assert (tmp_path / "cpu" / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "skipped: out of memory" in capsys.readouterr().out


def test_a_run_of_steps_out_of_time_says_so_and_one_where_ours_fails_does_not_pass(run_step, monkeypatch):
    clock = iter([0.0, 0.0, 1e6, 1e6])

    def too_large(*arguments: Any) -> step_providers.Truth:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(step, "find_truth", too_large)
        patch.setattr(step.time, "monotonic", lambda: next(clock))
        content = run_step("--minutes", "1", "--providers", "as released", "--rounds", "1")
    assert (len(content["rows"]), content["not_reached"]) == (1, ["r2plus1d_10, B 2, 8 x 32 x 32"])
    assert content["rows"][0]["unchecked"] == "out of memory"
    assert content["rows"][0]["providers"]["as released"]["right"] is None

    def broken(*arguments: Any) -> step_providers.Provider:
        raise RuntimeError("it broke")

    monkeypatch.setitem(PROVIDERS, "ours", broken)
    with pytest.raises(SystemExit, match="ours failed"):
        run_step("--quick", "--providers", "as released", "ours")


# --------------------------------------------------------------------------------------------------------------- sharding

TASK = sharding.Task(width=4, T=8, side=32, batch=2, queue_length=16, steps=8, float32=True)


def test_ddp_and_all_stages_train_the_same_and_another_learning_rate_is_seen(one_process, monkeypatch):
    turns = {name: sharding.train(name, TASK, CPU) for name in sharding.DS_CONFIGS}
    for turn in turns.values():
        assert len(turn["ms"]) == TASK.steps
        assert len(turn["losses"]) == sharding.WARMUP + TASK.steps
        assert turn["precision"].startswith("float32")
        assert turn["peak_gib"] > 0
    losses = {name: turn["losses"] for name, turn in turns.items()}
    assert len(set(losses["DDP"])) > 1
    same = sharding.agreement(losses)
    assert same["agree"], same
    monkeypatch.setattr(sharding, "OptimConfig", lambda **settings: OptimConfig(**settings, lr=0.011))
    losses["ZeRO-1"] = sharding.train("ZeRO-1", TASK, CPU)["losses"]
    assert losses["ZeRO-1"][0] == losses["DDP"][0]
    assert not sharding.agreement(losses)["agree"]
    with pytest.raises(ArithmeticError, match="ZeRO-1: the loss is nan"):
        sharding.agreement(losses | {"ZeRO-1": [float("nan")] * 8})


@pytest.mark.launcher
def test_a_launch_brings_home_what_two_processes_measured(clean_environment, monkeypatch):
    for name in set(sharding.os.environ) - set(clean_environment):
        monkeypatch.delenv(name)
    turn = sharding.launch("DDP", sharding.Task(**vars(TASK) | {"steps": 2}), processes=2)
    assert len(turn["ms"]) == 2
    assert all(loss > 0 for loss in turn["losses"])


def test_a_launch_that_fails_says_why(monkeypatch):
    said = "Traceback (most recent call last):\n  raise UserError\ndclr.errors.UserError: --width is 0, but must be at least 1\n"
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


def test_the_verdict_tells_the_fastest_only_where_every_round_does(monkeypatch):
    def verdict(**rounds: list[float]) -> str:
        names = {"stage_0": "stage 0", "zero_1": "ZeRO-1", "zero_2": "ZeRO-2"}
        turns = {"DDP": [turn(5)] * len(rounds["stage_0"])} | {
            names[name]: [turn(ms) for ms in of] for name, of in rounds.items()
        }
        return sharding.verdict(sharding.summarise(turns, TASK, processes=2))

    config = sharding.RunConfig(ds_config="ds_configs/zero1.json")
    monkeypatch.setattr(sharding, "RunConfig", lambda: config)
    clear = verdict(stage_0=[10, 11], zero_1=[20, 21], zero_2=[30, 31])
    assert clear.startswith("fastest: DDP; of DeepSpeed's: stage 0. The default, ZeRO-1")
    assert clear.endswith("is slower")
    even = verdict(stage_0=[10, 12], zero_1=[11, 11.5], zero_2=[30, 31])
    assert "stage 0, not told from ZeRO-1 by these rounds" in even or "ZeRO-1, not told from stage 0" in even
    assert verdict(stage_0=[30, 31], zero_1=[20, 21], zero_2=[30, 31]).endswith("is the fastest")
    assert "not told from" in verdict(stage_0=[30], zero_1=[20], zero_2=[30])  # one round tells nothing


def test_a_run_of_sharding(tmp_path, monkeypatch, capsys):
    launched: list[tuple[str, bool]] = []
    precision = "bfloat16 compute"

    def launch(name: str, task: sharding.Task, processes: int) -> dict[str, Any]:
        launched.append((name, task.float32))
        return turn(10.0 + len(name)) | {"precision": "float32" if task.float32 else precision}

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
    assert "fastest: DDP" in capsys.readouterr().out

    def other(name: str, task: sharding.Task, processes: int) -> dict[str, Any]:
        return turn(10.0, loss=6.0 if name == "ZeRO-2" else 5.0)

    monkeypatch.setattr(sharding, "launch", other)
    with pytest.raises(SystemExit, match="these are not the same steps"):
        sharding.main(["--rounds", "1", "--results", str(tmp_path)])
    monkeypatch.setattr(sharding.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="--processes is 2, but this machine has 1 GPU"):
        sharding.main(["--processes", "2"])
