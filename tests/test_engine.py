"""DeepSpeed compared with plain torch, two ranks compared with one, checkpoints, and refused configurations."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, METHOD, MODEL, OPTIM, float32_config, make_network, make_views, on_two_ranks, share
from torch.utils._python_dispatch import TorchDispatchMode

from dclr.config import OptimConfig
from dclr.errors import UserError
from dclr.kernels import Views
from dclr.methods import DCLR
from dclr.methods.dclr import Output
from dclr.models import BACKBONES
from dclr.training import checkpoint
from dclr.training.engine import (
    Engine,
    micro_batch_size,
    read_ds_config,
    resolve_precision,
    start_processes,
    stop_processes,
)
from dclr.training.nonfinite import NonfiniteGuard
from dclr.training.setup import find_ds_config


def plain_steps(
    count: int, **settings: str
) -> tuple[list[list[float]], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Train without DeepSpeed on the whole batch. Return losses, first gradients, last parameters and queue."""
    network = make_network(**settings).eval()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=OPTIM.lr, momentum=OPTIM.momentum, weight_decay=OPTIM.weight_decay)
    losses, gradients = [], []
    for step in range(count):
        optimizer.zero_grad()
        output = network(make_views(2 * step), make_views(2 * step + 1), step)
        loss = output.loss
        loss.backward()
        gradients = gradients or [p.grad.clone() for p in trained]
        optimizer.step()
        network.update_key()
        losses.append([loss.item(), key_map_alignment(output).item()])
    return losses, gradients, [p.detach().clone() for p in trained], network.queue.clone()


def key_map_alignment(output: Output) -> torch.Tensor:
    """Return the alignment with the key clips' maps, or 0 without maps. A map at the wrong clip changes the value."""
    return torch.zeros(()) if output.alignment_key_maps is None else output.alignment_key_maps


def train_rank(rank: int, stage: int, count: int, result: Path, settings: dict[str, str]) -> None:
    """Train one of two ranks on its share of the batch. Rank 0 saves the values that `plain_steps` returns."""
    device = start_processes()
    import deepspeed

    network = make_network(**settings)
    trained = [p for p in network.parameters() if p.requires_grad]
    own = Engine(network, float32_config(stage), OPTIM, device)
    own.train(False)  # frozen BatchNorm: batch statistics would differ between one rank and two
    losses, gradients = [], []
    for step in range(count):
        output = own(*share(network, (2 * step, 2 * step + 1), step), step)
        own.backward(output.loss)
        if not gradients:
            gradients = [deepspeed.utils.safe_get_full_grad(p).clone() for p in trained]
        own.step()
        network.update_key()
        total = torch.stack([output.loss.detach(), key_map_alignment(output)])
        torch.distributed.all_reduce(total)
        losses.append((total / 2).tolist())
    if rank == 0:
        torch.save((losses, gradients, [p.detach() for p in trained], network.queue), result)
    stop_processes()


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        pytest.param(0, {}, id="ddp"),
        pytest.param(1, {}, id="zero1"),
        pytest.param(2, {}, id="zero2"),
        pytest.param(0, {"static_pairs": False}, id="one auxiliary view: one map is exchanged"),
        pytest.param(0, {"method": "moco"}, id="moco: no map is exchanged"),
        # Not DCLR: its two directions give opposite gradients for a weight of the stem, so rounding errors remain.
        pytest.param(0, {"method": "moco", "symmetric_loss": True, "queue_length": 16}, id="moco: both directions"),
        pytest.param(
            0, {"method": "videomoco", "adversarial_from": 0, "decay_rate": 0.9}, id="videomoco: two losses, and decay"
        ),
        pytest.param(
            0, {"method": "videomoco", "adversarial_from": 0, "dropping": "random"}, id="videomoco: random frames"
        ),
        pytest.param(1, {"method": "videomoco"}, id="videomoco: the generator rests"),
    ],
)
def test_two_ranks_compute_the_same_as_one_on_the_same_global_batch(tmp_path, stage, settings):
    """Compare the first gradients, and the losses, parameters and queue of three steps, with frozen BatchNorm."""
    assert on_two_ranks(train_rank, stage, 3, tmp_path / "result.pt", settings) == [0, 0]
    losses, gradients, parameters, queue = torch.load(tmp_path / "result.pt")
    plain_losses, plain_gradients, plain_parameters, plain_queue = plain_steps(3, **settings)
    assert torch.allclose(torch.tensor(losses), torch.tensor(plain_losses), rtol=1e-5)
    for name, found, expected in zip(
        [n for n, p in make_network(**settings).named_parameters() if p.requires_grad],
        gradients,
        plain_gradients,
        strict=True,
    ):
        # Half-batch means are added in another order, so a few float32 rounding errors of the largest element remain.
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()), name
    for found, expected in zip(parameters, plain_parameters, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-7)
    assert torch.allclose(queue, plain_queue, atol=1e-5)


def test_a_resumed_run_continues_bit_for_bit(tmp_path, one_process):
    def run(own: Engine, network: DCLR, steps: range) -> list[float]:
        losses = []
        for step in steps:
            output = own(make_views(2 * step), make_views(2 * step + 1), step)
            own.backward(output.loss)
            own.step()
            network.update_key()
            losses.append(output.loss.item())
        return losses

    network = make_network()
    own = Engine(network, float32_config(1), OPTIM, one_process)
    run(own, network, range(2))
    own.save(tmp_path, 2, {"last": {"loss": 1.0}})
    expected = run(own, network, range(2, 5))

    torch.manual_seed(123)
    other = DCLR(MODEL, METHOD)  # other weights, which the checkpoint must replace
    again = Engine(other, float32_config(1), OPTIM, one_process)
    state = again.resume(tmp_path)
    assert (state["step"], state["last"]) == (2, {"loss": 1.0})
    assert run(again, other, range(2, 5)) == expected
    assert torch.equal(other.queue, network.queue)
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), network.state_dict().values(), strict=True)
    )


def resume_where_rank_1_sees_an_older_checkpoint(rank: int, folder: Path) -> None:
    own = Engine(torch.nn.Linear(2, 2), float32_config(0), OPTIM, start_processes())
    own.save(folder, 1, {})
    own.save(folder, 2, {})
    found = checkpoint.checkpoints_in
    checkpoint.checkpoints_in = lambda folder: found(folder)[: 2 - rank]
    (folder / f"step{rank}").write_text(str(own.resume(folder)["step"]))
    stop_processes()


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_sees(tmp_path):
    assert on_two_ranks(resume_where_rank_1_sees_an_older_checkpoint, tmp_path) == [0, 0]
    assert [(tmp_path / f"step{rank}").read_text() for rank in range(2)] == ["2", "2"]


def test_resuming_without_a_fitting_checkpoint_names_the_reason(tmp_path, one_process):
    own = Engine(torch.nn.Linear(2, 2), float32_config(0), OPTIM, one_process)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        own.resume(tmp_path)
    own.save(tmp_path, 1, {})
    with pytest.raises(UserError, match="holds another network"):
        Engine(torch.nn.Linear(3, 2), float32_config(0), OPTIM, one_process).resume(tmp_path)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(one_process):
    config = {**float32_config(1), "gradient_accumulation_steps": 2}
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    whole = copy.deepcopy(network)
    own = Engine(network, config, OptimConfig(batch_size=4, lr=0.1, momentum=0.0, weight_decay=0.0), one_process)
    assert (own.micro_batch, own.accumulation) == (2, 2)
    x = torch.randn(4, 3)
    for micro_batch in x.split(2):
        own.backward(own(micro_batch).square().mean())
        own.step()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    whole(x).square().mean().backward()
    optimizer.step()
    assert torch.allclose(network.weight, whole.weight, atol=1e-6)
    assert torch.allclose(network.bias, whole.bias, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"symmetric_loss": True, "queue_length": 16},
        {"method": "moco", "symmetric_loss": True, "queue_length": 16},
        {"method": "videomoco", "adversarial_from": 0, "decay_rate": 0.9},
    ],
)
def test_accumulation_averages_the_gradients_of_micro_batches_and_each_one_moves_the_queue(one_process, settings):
    import deepspeed

    network, plain = make_network(**settings), make_network(**settings).eval()
    config = {**float32_config(0), "gradient_accumulation_steps": 2}
    own = Engine(network, config, replace(OPTIM, batch_size=8), one_process)
    own.train(False)  # frozen BatchNorm, as in `plain`
    for micro_batch in range(2):
        views = make_views(2 * micro_batch), make_views(2 * micro_batch + 1)
        own.backward(own(*views, micro_batch).loss)
        (plain(*views, micro_batch).loss / 2).backward()
        if micro_batch == 0:
            own.step()
    for trained, expected in zip(network.parameters(), plain.parameters(), strict=True):
        if trained.requires_grad:
            found = deepspeed.utils.safe_get_full_grad(trained)
            assert torch.allclose(found, expected.grad, rtol=1e-4, atol=1e-5 * expected.grad.abs().max().item())
    assert torch.equal(network.queue, plain.queue)
    assert torch.equal(network.enqueued, plain.enqueued)


def test_bfloat16_views_change_nothing_that_autocast_computes(one_process):
    """The first convolution rounds float32 views to bfloat16, so the views can be written as bfloat16."""
    config = float32_config(1)
    assert Engine(make_network(), config, OPTIM, one_process).view_dtype == torch.float32
    config["torch_autocast"]["enabled"] = True
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        own = Engine(make_network(), config, OPTIM, one_process)
        assert own.view_dtype == torch.bfloat16
        query, key = (Views(*(view.to(dtype) for view in make_views(seed))) for seed in (0, 1))
        losses.append(own(query, key, 0).loss.item())
    assert losses[0] == losses[1]


def test_autocast_computes_in_bfloat16_and_keeps_parameters_and_statistics_in_float32(one_process):
    config = read_ds_config(CONFIGS / "zero1.json")
    network = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.BatchNorm3d(4))
    own = Engine(network, config, OPTIM, one_process)
    assert own(torch.randn(2, 3, 4, 8, 8)).dtype == torch.bfloat16
    with own.autocast():
        assert network[0](torch.randn(2, 3, 4, 8, 8)).dtype == torch.bfloat16
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_precision_falls_back_to_float32_where_a_cpu_has_no_fast_bfloat16_and_says_why(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast, "amx_tile": False})
    config = read_ds_config(CONFIGS / "zero1.json")
    message = resolve_precision(config, torch.device("cpu"))
    assert config["torch_autocast"]["enabled"] is fast
    assert message.startswith("bfloat16 compute" if fast else "float32: this CPU has no fast bfloat16")
    off = {"torch_autocast": {"enabled": False}}
    assert "off in the DeepSpeed configuration" in resolve_precision(off, torch.device("cpu"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"bf16": {"enabled": true}}', "use torch_autocast"),
        ('{"bfloat16": {"enabled": true}}', "use torch_autocast"),
        ('{"managed_gradient_accumulation": false}', "managed_gradient_accumulation must be true: remove it"),
        ('{"gradient_allreduce_op": "sum"}', 'gradient_allreduce_op must be "mean": remove it'),
        ('{"zero_optimization": {"offload_optimizer": {}}}', "offload_optimizer needs an optimizer of DeepSpeed"),
        ('{"optimizer": {}}', "has a section optimizer"),
        ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', "dtype must be bfloat16"),
        ('{"zero_optimization": {"stage": 3}}', "must be 0, 1 or 2"),
    ],
)
def test_a_bad_ds_config_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_ds_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_ds_config_that_is_a_folder_is_refused(name):
    """An empty name is what a shell gives for a variable that is not set."""
    with pytest.raises(UserError, match=r"^--ds_config [./]: Is a directory; ds_configs/ holds"):
        read_ds_config(find_ds_config(name))


def test_batch_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="--batch-size is 5, but must be a multiple of 2"):
        micro_batch_size({"gradient_accumulation_steps": 2}, 5)
    with pytest.raises(UserError, match="train_batch_size is 8, but --batch-size makes it 4"):
        micro_batch_size({"train_batch_size": 8}, 4)
    assert micro_batch_size({"train_batch_size": "auto", "gradient_accumulation_steps": 2}, 4) == 2


def test_shipped_configurations_differ_in_their_stage_only():
    configs = [json.loads((CONFIGS / name).read_text()) for name in ("ddp.json", "zero1.json", "zero2.json")]
    # DeepSpeed's norm of the gradients makes the host wait in every step. Stage 0 does not compute it.
    # In each step, ZeRO allocates a buffer for so many float32 numbers. DeepSpeed's default of 500 million takes 2 GB.
    more = {"compute_grad_norm": False, "reduce_bucket_size": 50_000_000}
    assert [config.pop("zero_optimization") for config in configs] == [
        {"stage": 0},
        {"stage": 1, **more},
        {"stage": 2, **more},
    ]
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_bucket_holds_all_gradients_of_a_backbone_and_its_heads(backbone):
    """Then ZeRO sums the gradients over the processes once in a step."""
    with torch.device("meta"):
        network = DCLR(replace(MODEL, backbone=backbone, width=64), replace(METHOD, embedding_dim=128), 0)
    gradients = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert gradients <= read_ds_config(CONFIGS / "zero1.json")["zero_optimization"]["reduce_bucket_size"]


class Waits(TorchDispatchMode):
    """Record every operation whose result the host needs before it continues. On a GPU the host waits for each."""

    OPERATIONS = frozenset({"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().removeprefix("aten::").split(".")[0] in self.OPERATIONS:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("accumulation", "on_nonfinite"), [(1, "stop"), (2, "skip")])
@pytest.mark.parametrize("file", ["ddp.json", "zero1.json", "zero2.json"])
def test_nothing_in_a_step_makes_the_host_wait(one_process, file, accumulation, on_nonfinite):
    """A step is forward, backward, the non-finite check, the optimizer, the key encoder and the queue.

    The steps use the shipped configurations. In the last steps the queue is full and mined. tests/test_gpu.py checks
    the same on a GPU with the CUDA driver's own detection.
    """
    config = {**read_ds_config(CONFIGS / file), "gradient_accumulation_steps": accumulation}
    network = make_network()
    engine = Engine(network, config, OptimConfig(batch_size=4 * accumulation, lr=0.01), one_process)
    engine.train()
    guard = NonfiniteGuard(engine, on_nonfinite)
    waits = Waits()
    for step in range(4):
        with waits:
            guard.begin(step + 1)
        for micro_batch in range(accumulation):
            query, key = make_views(2 * step), make_views(2 * step + 1)
            with waits:
                output = engine(query, key, step * accumulation + micro_batch)
                guard.see({"loss": output.loss}, torch.arange(4))
                engine.backward(output.loss)
                engine.step()
        with waits:
            guard.end()
            network.update_key()
    assert network.enqueued.item() == 16 * accumulation > METHOD.queue_length
    assert waits.found == []
    with waits:
        assert output.loss.item() > 0
    assert waits.found == ["aten::_local_scalar_dense"]
