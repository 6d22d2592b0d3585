"""Steps with a non-finite loss, gradient or key, in one process and in two: they stop the run or are skipped."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, float32_config, make_views, on_two_ranks
from torch import Tensor, nn

from dclr import distributed
from dclr.config import MethodConfig, ModelConfig, OptimConfig, make_config
from dclr.errors import UserError
from dclr.kernels import Views
from dclr.methods import DCLR
from dclr.methods.encoder import PAIRS
from dclr.training import pretrain as pretraining
from dclr.training.checkpoint import newest, read
from dclr.training.engine import Engine, read_ds_config, start_processes, stop_processes
from dclr.training.nonfinite import MOST_SKIPPED_IN_A_ROW, NonfiniteGuard
from dclr.training.pretrain import pretrain

STAGES = pytest.mark.parametrize("stage", [0, 1, 2], ids=["ddp", "zero1", "zero2"])
ACCUMULATIONS = pytest.mark.parametrize("accumulation", [1, 2])
# A key momentum of 1 keeps the key encoder constant, so that a skipped step changes nothing.
METHOD = MethodConfig(queue_length=8, embedding_dim=32, mined_positives=2, key_momentum=1.0)
GRADIENT_ALONE, LOSS_ALONE = (1.0, 0.0), (1.0, math.inf)  # values of `bad` in take_step
ENDING = ". Nothing was updated and the last checkpoint is intact: lower --lr, or use --on-nonfinite skip"


class Spoiled(nn.Module):
    """A linear layer with batch statistics.

    A `root` of 0 gives a finite loss and an infinite gradient. A `root` of infinity gives an infinite loss and a finite
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, root: float = 1.0) -> Tensor:
        bent = (self.layer.weight[0, 0] - self.layer.weight[0, 0].detach() + root).sqrt()
        return self.layer(self.norm(x)).square().mean() + bent


def make_engine(stage: int, accumulation: int, device: torch.device, network: nn.Module | None = None) -> Engine:
    torch.manual_seed(0)
    config = {**float32_config(stage), "gradient_accumulation_steps": accumulation}
    ranks = distributed.world_size()
    engine = Engine(network or Spoiled(), config, OptimConfig(batch_size=4 * accumulation * ranks, lr=0.1), device)
    engine.train()
    return engine


def take_step(
    engine: Engine, guard: NonfiniteGuard, step: int, bad: dict[int, tuple[float, float]] | None = None
) -> None:
    """Train one step on random data that depends on the step. bad: micro-batch -> (factor of one input value, root)."""
    guard.begin(step)
    for micro_batch in range(engine.accumulation):
        generator = torch.Generator().manual_seed(step * 2 + micro_batch)
        x = torch.randn(4, 3, generator=generator).to(engine.device)
        value, root = (bad or {}).get(micro_batch, (1.0, 1.0))
        x[0, 0] *= value
        loss = engine(x, root)
        guard.see({"loss": loss}, torch.arange(4) + 10 * micro_batch + 100 * step)
        engine.backward(loss)
        engine.step()
    guard.end()


def weights_and_momentum(engine: Engine) -> list[Tensor]:
    groups = engine.sgd.param_groups
    momentum = [engine.sgd.state[p]["momentum_buffer"] for group in groups for p in group["params"]]
    return [tensor.detach().clone() for tensor in [*engine.module.parameters(), *momentum]]


def state_of(engine: Engine) -> list[Tensor]:
    """Return all tensors that a step changes."""
    return weights_and_momentum(engine) + [buffer.clone() for buffer in engine.module.buffers()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@STAGES
@ACCUMULATIONS
@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), LOSS_ALONE], ids=["nan", "inf", "loss alone"])
def test_a_nonfinite_loss_stops_before_weights_and_momentum_change(one_process, stage, accumulation, bad):
    engine = make_engine(stage, accumulation, one_process)
    guard = NonfiniteGuard(engine, "stop")
    take_step(engine, guard, 1)
    before = weights_and_momentum(engine)
    bad_micro_batch, value = accumulation - 1, "inf" if bad == LOSS_ALONE else "nan"
    first = 200 + 10 * bad_micro_batch
    samples = ", ".join(str(first + i) for i in range(4))
    with pytest.raises(UserError) as caught:
        take_step(engine, guard, 2, {bad_micro_batch: bad})
    assert str(caught.value) == f"non-finite values at step 2: loss {value} (samples {samples}){ENDING}"
    assert_same(weights_and_momentum(engine), before)


@STAGES
@ACCUMULATIONS
def test_a_nonfinite_gradient_stops_although_the_loss_is_finite(one_process, stage, accumulation):
    engine = make_engine(stage, accumulation, one_process)
    guard = NonfiniteGuard(engine, "stop")
    take_step(engine, guard, 1)
    before = weights_and_momentum(engine)
    named = "the gradient of layer.weight" if stage == 0 else "the gradient"
    indices = [100 * 2 + 10 * micro_batch + i for micro_batch in range(accumulation) for i in range(4)]
    samples = ", ".join(map(str, indices))
    with pytest.raises(UserError) as caught:
        take_step(engine, guard, 2, {0: GRADIENT_ALONE})
    assert str(caught.value) == f"non-finite values at step 2: {named} (a mean over samples {samples}){ENDING}"
    assert_same(weights_and_momentum(engine), before)


@STAGES
@ACCUMULATIONS
@pytest.mark.parametrize("bad_step", [1, 3])
@pytest.mark.parametrize("bad", [(math.nan, 1.0), GRADIENT_ALONE, LOSS_ALONE], ids=["nan", "gradient", "loss"])
def test_a_skipped_step_changes_nothing_bit_for_bit(one_process, stage, accumulation, bad_step, bad, capsys):
    """Weights, momentum and batch statistics stay, also when the first step is skipped, before any momentum exists."""
    engine, other = (make_engine(stage, accumulation, one_process) for _ in range(2))
    guard, expected = NonfiniteGuard(engine, "skip"), NonfiniteGuard(other, "skip")
    for step in range(1, 6):
        take_step(engine, guard, step, {accumulation - 1: bad} if step == bad_step else None)
        if step != bad_step:
            take_step(other, expected, step)
            assert_same(state_of(engine), state_of(other))
    assert (guard.skipped, expected.skipped) == (1, 0)
    assert guard.metrics() == {"nonfinite/skipped_steps": 1.0}
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"skipped: non-finite values at step {bad_step}: ") for line in lines] == [True]


@pytest.mark.parametrize(
    ("stage", "accumulation", "of"), [(0, 2, "key"), (1, 1, "key"), (1, 1, "query"), (1, 2, "query"), (2, 2, "key")]
)
def test_a_skipped_step_of_dclr_changes_neither_queue_nor_statistics(one_process, stage, accumulation, of):
    """Step 0 fills the queue and step 3 trains. Both are non-finite. The other run does not have these steps.

    The test above skips a step in every combination of stage and accumulation.
    """

    def run(bad_steps: set[int], omit: bool) -> list[Tensor]:
        network = DCLR(ModelConfig(backbone="r2plus1d_10", width=4), METHOD)
        engine = make_engine(stage, accumulation, one_process, network)
        guard = NonfiniteGuard(engine, "skip")
        for step in range(5):
            if step in bad_steps and omit:
                continue
            guard.begin(step)
            for micro_batch in range(accumulation):
                query, key = make_views(10 * step + 2 * micro_batch), make_views(10 * step + 2 * micro_batch + 1)
                if step in bad_steps and micro_batch == 0:
                    (query if of == "query" and step > 1 else key).rgb[1] = math.nan
                if step < 2:
                    guard.see(network.fill(query, key, step), torch.arange(4))
                    continue
                output = engine(query, key, step)
                guard.see(network.terms(output), torch.arange(4))
                engine.backward(output.loss)
                engine.step()
            guard.end()
            network.update_key()
        assert guard.skipped == (0 if omit else len(bad_steps))
        return state_of(engine)

    torch.manual_seed(0)
    found = run({0, 3}, False)
    torch.manual_seed(0)
    expected = run({0, 3}, True)
    assert all(tensor.isfinite().all() for tensor in found)
    assert_same(found, expected)


def test_a_diverged_network_is_not_skipped_without_limit(one_process, capsys):
    engine = make_engine(0, 1, one_process)
    guard = NonfiniteGuard(engine, "skip")
    for step in range(MOST_SKIPPED_IN_A_ROW - 1):
        take_step(engine, guard, step, {0: (math.nan, 1.0)})
    take_step(engine, guard, 50)  # one finite step resets the count
    for step in range(60, 60 + MOST_SKIPPED_IN_A_ROW - 1):
        take_step(engine, guard, step, {0: (math.nan, 1.0)})
    with pytest.raises(UserError, match=r"at step 99: .* The 19 steps before were skipped for the same reason"):
        take_step(engine, guard, 99, {0: (math.nan, 1.0)})


def test_steps_that_zero_itself_skips_are_detected(one_process):
    """If a DeepSpeed configuration makes ZeRO compute the norm, ZeRO skips its optimizer in a non-finite step."""
    config = {**float32_config(1), "gradient_clipping": 1.0}
    config["zero_optimization"] = {"stage": 1}
    torch.manual_seed(0)
    engine = Engine(Spoiled(), config, OptimConfig(batch_size=4, lr=0.1), one_process)
    guard = NonfiniteGuard(engine, "stop")
    take_step(engine, guard, 1)
    with pytest.raises(UserError, match="at step 2: the gradient"):
        take_step(engine, guard, 2, {0: GRADIENT_ALONE})


@STAGES
def test_steps_equal_those_of_plain_sgd(one_process, stage):
    """This includes the first step, for which the guard created the momentum."""
    engine = make_engine(stage, 1, one_process)
    plain = copy.deepcopy(engine.module)
    optim = engine.optim
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=optim.momentum, weight_decay=optim.weight_decay)
    guard = NonfiniteGuard(engine, "stop")
    for step in range(5):
        take_step(engine, guard, step)
        optimizer.zero_grad()
        plain(torch.randn(4, 3, generator=torch.Generator().manual_seed(step * 2))).backward()
        optimizer.step()
    for found, expected in zip(engine.module.parameters(), plain.parameters(), strict=True):
        # Each of the 5 steps has a few rounding errors, and one less on a processor with fused multiply-add.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def train_rank(rank: int, stage: int, mode: str, bad: tuple[float, float], folder: Path) -> None:
    """Train one of two ranks, with non-finite values on rank 1 in step 2. Save error, skipped steps and weights."""
    engine = make_engine(stage, 1, start_processes())
    guard, message = NonfiniteGuard(engine, mode), ""
    try:
        for step in (1, 2, 3):
            take_step(engine, guard, step, {0: bad} if rank == 1 and step == 2 else None)
    except UserError as error:
        message = str(error)
    weights = [parameter.detach() for parameter in engine.module.parameters()]
    torch.save((message, guard.skipped, weights), folder / f"{rank}.pt")
    stop_processes()


def run_two_ranks(stage: int, mode: str, bad: tuple[float, float], folder: Path) -> list[tuple[str, int, list[Tensor]]]:
    assert on_two_ranks(train_rank, stage, mode, bad, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@STAGES
def test_all_ranks_stop_for_one_rank_and_name_it_with_its_samples(tmp_path, stage):
    first, second = run_two_ranks(stage, "stop", LOSS_ALONE, tmp_path)
    message = f"non-finite values at step 2 on rank 1: loss inf (samples 200, 201, 202, 203){ENDING}"
    assert (first[0], second[0]) == (message, message)


def test_all_ranks_stop_for_a_gradient_that_only_one_holds_under_zero(tmp_path):
    first, second = run_two_ranks(1, "stop", GRADIENT_ALONE, tmp_path)
    assert first[0] == second[0]
    assert first[0].startswith("non-finite values at step 2: the gradient (a mean over samples 200, 201,")


def test_all_ranks_skip_for_one_rank(tmp_path):
    first, second = run_two_ranks(1, "skip", LOSS_ALONE, tmp_path)
    assert (first[:2], second[:2]) == (("", 1), ("", 1))
    assert_same(first[2], second[2])
    assert all(weight.isfinite().all() for weight in first[2])


@pytest.fixture
def run_tiny(tiny_pretrain, one_process, tmp_path):
    def run(resume: Path | None = None, **changes) -> Path:
        config = make_config("pretrain", {**tiny_pretrain, "out": str(tmp_path / "run"), **changes})
        return pretrain(config, "demo", one_process, resume)

    return run


def spoil_views(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, Views, Views], None]) -> None:
    """Call spoil(number of the micro-batch, counted from 1; its query views; its key views) on all views of a run."""
    real, calls = pretraining.make_views, []

    def spoiled(*arguments):
        query, key = real(*arguments)
        calls.append(1)
        spoil(len(calls), query, key)
        return query, key

    monkeypatch.setattr(pretraining, "make_views", spoiled)


def nan_at(*steps: int) -> Callable[[int, Views, Views], None]:
    return lambda step, query, key: key.rgb.fill_(math.nan) if step in steps else None


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_skips_counts_and_reports_steps_also_after_a_resume(run_tiny, train_main, monkeypatch, capsys):
    """Steps 2, 7 and 8 of 8 are skipped. The run is resumed after step 4, and step 8 is its last."""
    with monkeypatch.context() as patch:
        spoil_views(patch, nan_at(2))
        run = run_tiny(epochs=1, on_nonfinite="skip")
    assert json.loads((run / "report.json").read_text())["skipped_steps"] == 1
    with monkeypatch.context() as patch:
        spoil_views(patch, nan_at(3, 4))
        train_main("pretrain", resume=run, epochs=2)
    lines = lines_of(run)
    assert [line["nonfinite/skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 1, 2, 3]
    assert [line["loss"] is None for line in lines[1:]] == [True, False, False, False, False, True, True]
    assert [line["queue/filled_rows"] for line in lines] == [4, 4, 8, 12, 16, 18, 18, 18]
    report = json.loads((run / "report.json").read_text())
    assert report["skipped_steps"] == 3
    assert report["last"]["loss"] is None
    assert report["alignment_at_first_step"]["step"] == 3  # the first step with a finite loss
    reported = re.findall(r"skipped: non-finite values at step (\d)", capsys.readouterr().err)
    assert reported == ["2", "7", "8"]
    saved, _ = read(newest(run / "checkpoints"))
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert saved["model/enqueued"].item() == 5 * 4


def test_a_resumed_run_may_stop_where_it_skipped_before(run_tiny, train_main, monkeypatch):
    run = run_tiny(epochs=1, on_nonfinite="skip")
    spoil_views(monkeypatch, nan_at(2))
    with pytest.raises(UserError, match="non-finite values at step 6"):
        train_main("pretrain", resume=run, epochs=2, on_nonfinite="stop")


def test_nonfinite_keys_stop_a_run_that_fills_its_queue(run_tiny, monkeypatch):
    spoil_views(monkeypatch, nan_at(2))
    keys = ", ".join(f"key/{pair} nan" for pair in PAIRS)
    with pytest.raises(UserError, match=rf"^non-finite values at step 2: {keys} \(samples "):
        run_tiny(fill_steps=3)


@pytest.mark.gpu
@pytest.mark.parametrize("file", ["ddp.json", "zero1.json", "zero2.json"])
@pytest.mark.parametrize("bad", [(math.nan, 1.0), GRADIENT_ALONE], ids=["nan", "gradient"])
def test_on_a_gpu_a_skipped_step_changes_nothing_and_the_host_never_waits(one_process, file, bad):
    """The host learns of a skipped step two steps later, or when it calls check()."""
    config = read_ds_config(CONFIGS / file)
    config["torch_autocast"]["enabled"] = False
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        engines.append(Engine(Spoiled(), config, OptimConfig(batch_size=4, lr=0.1), one_process))
    guard, expected = (NonfiniteGuard(engine, "skip") for engine in engines)
    for step in (1, 2):
        for engine, own in zip(engines, (guard, expected), strict=True):
            take_step(engine, own, step)
    inputs = [torch.randn(4, 3, device=one_process) for _ in range(2)]
    inputs[0][0, 0] *= bad[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, (x, root) in enumerate(zip(inputs, (bad[1], 1.0), strict=True), 3):
            guard.begin(step)
            loss = engines[0](x, root)
            guard.see({"loss": loss}, torch.arange(4))
            engines[0].backward(loss)
            engines[0].step()
            guard.end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.skipped == 0
    guard.check()
    assert guard.skipped == 1
    expected.begin(4)
    loss = engines[1](inputs[1], 1.0)
    expected.see({"loss": loss}, torch.arange(4))
    engines[1].backward(loss)
    engines[1].step()
    expected.end()
    assert_same(state_of(engines[0]), state_of(engines[1]))
