"""Runs of two ranks: equal replicas, a failed rank, signals, and checkpoints for another number of ranks."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    METHOD,
    MODEL,
    OPTIM,
    REPOSITORY,
    as_flags,
    assert_same_end,
    float32_config,
    fork,
    free_port,
    launcher_command,
    make_network,
    numbers,
    on_two_ranks,
    run_train,
    share,
    steps,
)

from dclr import distributed
from dclr.errors import UserError
from dclr.methods import DCLR
from dclr.training import batchnorm, checkpoint
from dclr.training.engine import Engine, start_processes, stop_processes
from dclr.training.heartbeat import Heartbeat
from dclr.training.replicas import check_replicas, checksums

# ---------------------------------------------------------------- equal and different replicas


def train_with_own_statistics(rank: int, folder: Path) -> None:
    device = start_processes()
    torch.manual_seed(rank)  # other weights, queue and buffers on each rank
    network = DCLR(MODEL, METHOD)
    with torch.no_grad():
        for buffer in batchnorm.running_statistics(network).values():
            buffer.add_(rank)
    own = Engine(network, float32_config(1), OPTIM, device)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    own.train()
    for step in range(3):
        own.backward(own(*share(network, (step, 10 + step), step), step).loss)
        own.step()
        network.update_key()
    check_replicas(network, 3)
    assert "torch._inductor.lowering" not in sys.modules  # no run loads torch's compiler unless it compiles
    exchange = distributed.DelayedSum()
    assert [exchange.add(rank, 1), exchange.add(5, 0), exchange.finish()] == [[0, 0], [1, 2], [10, 0]]
    own.save(folder, 3, {})
    torch.save((start, {k: v.clone() for k, v in network.state_dict().items()}), folder / f"rank{rank}.pt")

    with torch.no_grad():  # one bit of one weight of one rank
        if rank == 1:
            network.key.backbone.get_parameter("layer2.0.conv1.0.0.weight").view(torch.int32).flatten()[7] ^= 1
    try:
        check_replicas(network, 4)
    except UserError as error:
        (folder / f"difference{rank}").write_text(str(error))
    stop_processes()


def test_ranks_start_alike_save_the_statistics_of_all_and_notice_one_flipped_bit(tmp_path):
    assert on_two_ranks(train_with_own_statistics, tmp_path) == [0, 0]
    (start, end), (other_start, other_end) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert [name for name in start if not torch.equal(start[name], other_start[name])] == []
    different = {name for name in end if not torch.equal(end[name], other_end[name])}
    names = set(batchnorm.running_statistics(make_network()))
    assert different == names  # each rank has its own clips, so only the batch statistics differ

    tensors, state = checkpoint.read(tmp_path / "step-0000003.safetensors")
    assert state["processes"] == 2
    for name in end:
        expected = (end[name] + other_end[name]) / 2 if name in names else end[name]
        torch.testing.assert_close(tensors[f"model/{name}"], expected, rtol=1e-6, atol=1e-7)

    messages = {(tmp_path / f"difference{rank}").read_text() for rank in range(2)}
    (message,) = messages  # both ranks stop
    assert message.startswith(
        "rank 1 no longer holds the network of rank 0 at step 4: key.backbone.layer2.0.conv1.0.0.weight differs. "
    )


def test_a_checksum_changes_with_every_bit_of_every_kind_of_tensor():
    module = torch.nn.BatchNorm1d(3)
    before = checksums(module)
    assert before.keys() == {"weight", "bias", "num_batches_tracked"}
    for bit in range(32):
        with torch.no_grad():
            module.weight.view(torch.int32)[1] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
        assert checksums(module)["weight"] != before["weight"]
        with torch.no_grad():
            module.weight.view(torch.int32)[1] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert checksums(module) == before
    module.num_batches_tracked += 1
    assert checksums(module)["num_batches_tracked"] != before["num_batches_tracked"]


# ---------------------------------------------------------------- another number of ranks


def advance(own: Engine, network: DCLR, which: range) -> list[float]:
    """Train these steps on the same global batches for any number of ranks. Return each step's mean loss over ranks.

    BatchNorm is frozen, because its batch is the share of one rank.
    """
    own.train(False)
    losses = []
    for step in which:
        output = own(*share(network, (step, 10 + step), step), step)
        own.backward(output.loss)
        own.step()
        network.update_key()
        losses.append(distributed.mean_over_ranks(output.loss.detach()).item())
    return losses


def two_ranks_write(rank: int, folder: Path, stage: int) -> None:
    network = make_network_on(device := start_processes())
    own = Engine(network, float32_config(stage), OPTIM, device)
    advance(own, network, range(2))
    own.save(folder, 2, {})
    stop_processes()


def two_ranks_resume(rank: int, folder: Path, stage: int) -> None:
    torch.manual_seed(9)
    device = start_processes()
    network = DCLR(MODEL, METHOD)
    own = Engine(network, float32_config(stage), OPTIM, device)
    assert own.resume(folder)["processes"] == 1
    own.save(folder / "again", 2, {})
    losses = advance(own, network, range(2, 5))
    if rank == 0:
        torch.save((weights(network), losses), folder / "end.pt")
    stop_processes()


def make_network_on(device: torch.device) -> DCLR:
    return make_network().to(device)


def weights(network: DCLR) -> torch.Tensor:
    """Return all weights of the query encoder, as one vector."""
    return torch.cat([p.detach().flatten() for p in network.query.parameters()])


def assert_same_update(start: torch.Tensor, end: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two updates of the same weights.

    Rounding errors change the update of three steps by 1e-7 of its length. A momentum that is wrong by 0.1 % changes it
    by 1e-3. Losses show less: they are differences of logits, whose rounding errors are as large as such an effect.
    """
    assert (end - expected).norm() <= 1e-5 * (expected - start).norm()


def assert_same_momentum(first: Path, second: Path) -> None:
    ours, theirs = (
        {k: v for k, v in checkpoint.read(p)[0].items() if k.startswith("momentum/")} for p in (first, second)
    )
    assert ours.keys() == theirs.keys()
    assert any(tensor.abs().sum() > 0 for tensor in ours.values())
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 2)], ids=["ddp to zero1", "zero1 to zero2"])
def test_a_checkpoint_of_one_rank_resumes_on_two_with_its_momentum(tmp_path, one_process, before, after):
    network = make_network()
    own = Engine(network, float32_config(before), OPTIM, one_process)
    advance(own, network, range(2))
    own.save(tmp_path, 2, {})
    (tmp_path / "again").mkdir()
    start = weights(network)
    losses = advance(own, network, range(2, 5))
    assert on_two_ranks(two_ranks_resume, tmp_path, after) == [0, 0]
    assert_same_momentum(tmp_path / "again" / "step-0000002.safetensors", tmp_path / "step-0000002.safetensors")
    end, resumed_losses = torch.load(tmp_path / "end.pt")
    assert_same_update(start, end, weights(network))
    assert resumed_losses == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 0)], ids=["zero2 to zero1", "zero1 to ddp"])
def test_a_checkpoint_of_two_ranks_resumes_on_one_with_its_momentum(tmp_path, one_process, before, after):
    whole = make_network()
    losses = advance(Engine(whole, float32_config(0), OPTIM, one_process), whole, range(5))
    assert on_two_ranks(two_ranks_write, tmp_path, before) == [0, 0]
    torch.manual_seed(9)
    network = DCLR(MODEL, METHOD)
    own = Engine(network, float32_config(after), OPTIM, one_process)
    assert own.resume(tmp_path)["processes"] == 2
    (tmp_path / "again").mkdir()
    own.save(tmp_path / "again", 2, {})
    assert_same_momentum(tmp_path / "again" / "step-0000002.safetensors", tmp_path / "step-0000002.safetensors")
    start = weights(network)
    assert advance(own, network, range(2, 5)) == pytest.approx(losses[2:], rel=1e-2)
    assert_same_update(start, weights(network), weights(whole))


# ---------------------------------------------------------------- a failed rank


def run_until_failure(rank: int, folder: Path, failure: str) -> None:
    """Sum numbers over two ranks until rank 1 fails, or rank 0 for "killed, the first"."""
    sys.stderr = (folder / f"err{rank}").open("w", buffering=1)
    dist.init_process_group("gloo")
    failing = 0 if failure == "killed, the first" else 1
    with Heartbeat(interval=0.2, timeout=3.0):
        for number in range(1_000_000):
            if rank == failing and number == 20:
                if failure == "an error":
                    raise ValueError("a bug\nof two lines")
                if failure == "refused":
                    raise UserError("no such video")
                if failure == "fine":
                    time.sleep(4)  # longer than the limit, but the heartbeat's thread still runs
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            if failure == "fine" and number == 30:
                break
            distributed.mean_over_ranks(torch.ones(1))
            time.sleep(0.01)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("failure", "statuses", "messages"),
    [
        ("killed", {0: 1, 1: -9}, {0: "rank 1 has failed: process "}),
        ("killed, the first", {0: -9, 1: 1}, {1: "rank 0 has failed: "}),
        (
            "an error",
            {0: 1, 1: 1},
            {0: "rank 1 has failed (ValueError: a bug of two lines); its own output says where"},
        ),
        ("refused", {0: 2}, {0: "no such video"}),
        ("fine", {0: 0, 1: 0}, {}),
    ],
)
def test_a_failed_rank_ends_the_run_and_is_named(tmp_path, failure, statuses, messages):
    began = time.monotonic()
    found = dict(enumerate(on_two_ranks(run_until_failure, tmp_path, failure)))
    assert time.monotonic() - began < 60
    assert {rank: found[rank] for rank in statuses} == statuses
    for rank, message in messages.items():
        lines = [
            line for line in (tmp_path / f"err{rank}").read_text().splitlines() if line.startswith("train.py: error: ")
        ]
        assert len(lines) == 1
        assert lines[0].startswith("train.py: error: " + message)
    if not messages:
        assert "train.py" not in (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()


# ---------------------------------------------------------------- whole runs


def two_process_run(flags: dict, environment: dict[str, str], folder: Path) -> list[BaseProcess]:
    """Start train.py on two ranks without a launcher. Their outputs go to out0 and out1 in `folder`."""
    port, processes = str(free_port()), []
    for rank in range(2):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes.append(fork(run_train, ["pretrain", *as_flags(flags)], own, folder / f"out{rank}"))
    return processes


def exit_codes(processes: list[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for the processes and return their exit codes."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in numbers(run)):
            return
        time.sleep(0.01)
    pytest.fail(f"{run} did not reach step {step}")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_the_same_command_resumes_bit_for_bit(
    clean_environment, tiny_pretrain, tmp_path
):
    """The first signal comes in the middle of an epoch. The second is Ctrl-C, which workers get too."""
    flags = {**tiny_pretrain, "epochs": 10, "workers": 1, "resume": "auto"}
    whole = two_process_run({**flags, "out": tmp_path / "whole"}, clean_environment, tmp_path)
    assert exit_codes(whole, 200) == [0, 0]
    flags["out"] = tmp_path / "run"
    for step, stop in (
        (6, lambda p: os.kill(p[1].pid, signal.SIGUSR1)),
        (20, lambda p: [os.killpg(x.pid, signal.SIGINT) for x in p]),
    ):
        processes = two_process_run(flags, clean_environment, tmp_path)
        wait_for_step(tmp_path / "run", step)
        stop(processes)
        began = time.monotonic()
        codes, output = exit_codes(processes, 60), (tmp_path / "out0").read_text()
        assert codes == [75, 75], output
        assert time.monotonic() - began < 30
        assert f"asked to stop: checkpoint written at step {steps(tmp_path / 'run')[-1]}" in output
        assert "Traceback" not in output
    processes = two_process_run(flags, clean_environment, tmp_path)
    assert exit_codes(processes, 200) == [0, 0]
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize(("launcher", "number"), [("deepspeed", signal.SIGINT), ("torchrun", signal.SIGTERM)])
def test_a_signal_to_all_processes_of_a_launcher_leaves_a_checkpoint_within_30_seconds(
    clean_environment, tiny_pretrain, tmp_path, launcher, number
):
    flags = as_flags({**tiny_pretrain, "epochs": 200, "out": tmp_path / "run", "checkpoint_every": 100})
    start = launcher_command(launcher)
    process = subprocess.Popen(
        [*start, *flags], cwd=REPOSITORY, env={**clean_environment, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for_step(tmp_path / "run", 5)
        os.killpg(process.pid, number)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)  # until the last process of the run has closed it
        assert time.monotonic() - began < 30
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert len(steps(tmp_path / "run")) == 1, output
    assert "asked to stop: checkpoint written at step" in output
