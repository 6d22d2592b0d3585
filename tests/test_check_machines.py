"""What must be the same on every machine of a run, and the error that names both machines if it is not."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import fork, free_port, redirect_output

from dclr import distributed, programs
from dclr.commands import train
from dclr.config import as_flag, resolve
from dclr.errors import UserError
from dclr.training import engine, machines
from dclr.training.connection import Peer

ABOUT = {
    machines.SOURCES: "3fa2c1", "commit": "abc", "Python": "3.11.2", "torch": "2.11.0", "deepspeed": "0.19.8",
    "device": "a GPU", "GPU": "H200", "GPU identity": "0",
}  # fmt: skip


def peers(*abouts: dict[str, str]) -> list[Peer]:
    """Return a rank on node1 with ABOUT, and one on node2, node3, ... with ABOUT and each of these changes."""
    found = enumerate(({}, *abouts), start=1)
    return [Peer(1, f"node{number}", f"boot{number}", "10.0.0.1", {**ABOUT, **about}) for number, about in found]


@pytest.mark.parametrize(
    ("different", "message"),
    [
        (
            {machines.SOURCES: "9bd", "commit": "def"},
            "dclr's sources: 9bd of commit def on rank 2 on node3, but 3fa2c1",
        ),
        ({"torch": "2.12.0"}, "torch: 2.12.0 on rank 2 on node3, but 2.11.0 on rank 0 on node1: install the same"),
        ({"deepspeed": "not installed"}, "deepspeed: not installed on rank 2 on node3, but 0.19.8 on rank 0 on node1"),
        ({"Python": "3.12.1"}, "Python: 3.12.1 on rank 2 on node3, but 3.11.2 on rank 0 on node1"),
        ({"device": "no GPU"}, "device: no GPU on rank 2 on node3, but a GPU on rank 0 on node1: on the machine"),
        ({"problem": "more processes than GPUs on node3"}, "more processes than GPUs on node3"),
    ],
)
def test_a_machine_with_something_else_is_refused_and_both_machines_are_named(different, message):
    with pytest.raises(UserError) as raised:
        machines.check_machines(peers({}, different))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_machines_may_differ_in_commit_and_gpu_and_other_gpus_are_a_warning():
    assert machines.check_machines([]) == []
    assert machines.check_machines(peers({"commit": "abc+"})) == []  # the sources are compared themselves
    (warning,) = machines.check_machines(peers({}, {"GPU": "A100", "GPU identity": "9"}))
    assert warning.startswith("the machines have different GPUs: H200 (node2), A100 (node3): ")


def test_a_rank_of_a_version_that_does_not_describe_its_machine_is_refused():
    with pytest.raises(UserError, match="dclr's sources: unknown of commit unknown on rank 1 on node2, but 3fa2c1 of"):
        machines.check_machines([peers()[0], Peer(1, "node2", "boot2", "10.0.0.1")])


def test_two_processes_on_one_gpu_are_refused():
    first = peers()[0]
    with pytest.raises(UserError, match="ranks 0 and 1 on node1 use the same GPU"):
        machines.check_machines([first, first])
    other_gpu = replace(first, about={**ABOUT, "GPU identity": "1"})
    assert machines.check_machines([first, other_gpu, replace(first, machine="boot2")]) == []


def test_ranks_of_a_machine_that_do_not_follow_each_other_are_refused():
    """srun --distribution=cyclic and mpirun --map-by node give rank 0 to node1, rank 1 to node2, rank 2 to node1."""
    first, second = ([rank, replace(rank, about={**ABOUT, "GPU identity": "1"})] for rank in peers({}))
    assert machines.check_machines([*first, *second]) == []
    message = "^node1 has rank 0 and rank 2, but other machines have the ranks between them: give each machine ranks "
    with pytest.raises(UserError, match=message):
        machines.check_machines([first[0], second[0], first[1], second[1]])


def test_the_description_names_every_package_and_follows_each_file(monkeypatch, tmp_path):
    about = machines.describe_machine()
    assert {
        "Python",
        "torch",
        "torchvision",
        "triton",
        "deepspeed",
        "numpy",
        "commit",
        machines.SOURCES,
    } <= about.keys()
    assert about["device"] == ("a GPU" if torch.cuda.is_available() else "no GPU")
    assert about[machines.SOURCES] == machines.digest_of_sources()
    package = tmp_path / "dclr"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "kernels").mkdir()
    (package / "kernels").symlink_to(tmp_path / "kernels")
    monkeypatch.setattr("dclr.__file__", str(package / "__init__.py"))
    monkeypatch.setattr(programs, "_own", str(tmp_path / "own.py"))
    digests = []
    for number, file in enumerate(("own.py", "own.py", "dclr/training/loop.py", "kernels/a.py", "kernels/a.json")):
        (tmp_path / file).write_text(f"x = {number}")
        digests.append(machines.digest_of_sources())
    assert len(set(digests)) == 5
    (package / "training" / "loop.pyc").touch()
    assert machines.digest_of_sources() == digests[-1]
    monkeypatch.setattr(programs, "_own", "-c")
    assert machines.digest_of_sources() not in digests


def test_a_process_without_a_gpu_is_reported_to_the_others(monkeypatch):
    def refuse() -> torch.device:
        raise UserError("more processes than GPUs")

    monkeypatch.setattr(engine, "choose_device", refuse)
    assert machines.describe_machine() == {"problem": "more processes than GPUs"}


# ---------------------------------------------------------------- settings


@pytest.fixture
def gathered(monkeypatch):
    """Let this process be rank 0 of two. Return a function that changes what rank 1 on node2 sends."""
    changes: dict[str, object] = {}

    def gather(value):
        host, entries = value
        return [(host, entries), ("node2", {**entries, **{k: v for k, v in changes.items() if k in entries}})]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", gather)
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    return changes.update


def test_other_settings_are_refused_with_their_flag_and_both_machines(gathered):
    config = resolve("pretrain", "demo", {})
    machines.check_settings("pretrain", "demo", config, None)
    gathered({"--data": "/scratch/videos", "--workers": 3})  # may differ
    machines.check_settings("pretrain", "demo", config, None)
    gathered({"--lr": 0.5})
    with pytest.raises(UserError) as raised:
        machines.check_settings("pretrain", "demo", config, None)
    assert str(raised.value) == (
        f"--lr: 0.5 on rank 1 on node2, but {as_flag('lr', config.optim.lr)[5:]} on rank 0 on node1: "
        "start the ranks of all machines with the same command"
    )
    gathered({"run to continue": "none"})
    with pytest.raises(
        UserError, match="run to continue: none on rank 1 on node2, but runs/a on rank 0 on node1: the f"
    ):
        machines.check_settings("pretrain", "demo", config, Path("runs/a"))


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", None)
    machines.check_same({"--lr": 1.0}, "")


def test_an_error_of_one_rank_alone_names_its_machine(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def gather_with(problem):
        monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, problem])

    def fail() -> None:
        raise UserError("--data videos: no such folder")

    gather_with(("--data videos: no such folder", "node2"))
    with pytest.raises(UserError, match=r"--data videos: no such folder \(rank 1 on node2\)$"):
        distributed.on_all_ranks(lambda: None)
    with pytest.raises(UserError, match=r"--data videos: no such folder$"):
        distributed.on_all_ranks(fail)


# ---------------------------------------------------------------- two ranks


def run_rank(rank: int, port: int, output: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    redirect_output(output)
    if rank == 1:
        machines.report.package_versions = lambda: {"torch": "1.0"}
    os._exit(train.run(["pretrain", "--out", str(output.parent / "run")]))


def test_ranks_with_other_packages_end_with_one_line_and_status_2_before_they_connect(tmp_path):
    port = free_port()
    outputs = [tmp_path / f"rank{rank}" for rank in range(2)]
    ranks = [fork(run_rank, rank, port, output) for rank, output in enumerate(outputs)]
    ranks[0].join(60)
    assert ranks[0].exitcode == 2
    ranks[1].kill()  # it waits until a launcher ends it, so that rank 0 can print its line first
    ranks[1].join()
    (line,) = outputs[0].read_text().splitlines()
    assert line.startswith("train.py: error: torch: 1.0 on rank 1 on ")
    assert outputs[1].read_text() == ""
    assert not (tmp_path / "run").exists()


def test_a_peer_survives_the_way_through_the_store():
    (peer,) = peers()
    assert Peer(**json.loads(json.dumps(asdict(peer)))) == peer
