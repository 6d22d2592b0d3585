"""The environment variables of deepspeed, torchrun, srun and mpirun: honoured, or refused in one line.

The variables of srun, sbatch and salloc are those that Slurm 22.05 sets, and those of mpirun those of Open MPI 5.0.
"""

import pytest
import torch

from dclr.commands import evaluate, train
from dclr.commands.launcher import first_machine, join_launch, port_of
from dclr.errors import UserError
from dclr.training import connection, engine

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7", "MASTER_PORT": "29500",
}  # fmt: skip
BATCH = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0",
    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "3,1",
}  # fmt: skip
SRUN = {
    **BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_GTIDS": "3", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}  # fmt: skip
SALLOC_SHELL = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-node1-14872@1",
}  # fmt: skip


def joined(environment: dict[str, str], at_terminal: bool = False) -> dict[str, str]:
    """Return the variables of torchrun that a process with this environment gets."""
    own = dict(environment)
    join_launch(own, at_terminal)
    return {name: own[name] for name in TORCHRUN if name in own}


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="no launcher"),
        pytest.param(BATCH, id="the batch script of sbatch"),
        pytest.param({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4"}, id="a shell of salloc on the login machine"),
        pytest.param(SALLOC_SHELL, id="a shell of salloc on a machine of the job"),
        pytest.param({**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, id="srun with one task"),
        pytest.param({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1"}, id="mpirun with one process"),
        pytest.param({**SRUN, **MPIRUN, "OMPI_COMM_WORLD_SIZE": "1"}, id="mpirun with one process in a job"),
        pytest.param({"PMI_RANK": "0", "PMI_SIZE": "1"}, id="another launcher with one process"),
    ],
)
def test_a_command_that_was_started_once_is_one_process(environment):
    for at_terminal in (False, True):
        assert joined(environment, at_terminal) == {}


def test_variables_of_the_machine_without_rank_and_world_size_start_one_process():
    environment = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    assert joined(environment) == environment
    assert joined({"WORLD_SIZE": "1"}) == {"WORLD_SIZE": "1"}


def test_srun_makes_one_run_of_all_tasks():
    expected = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node1", "MASTER_PORT": port_of("4711.0"),
    }  # fmt: skip
    assert joined(SRUN) == expected
    first = {**SRUN, "SLURM_PROCID": "0", "SLURM_GTIDS": "0,1,2", "SLURM_NODEID": "0"}
    assert joined(first) == {**expected, "RANK": "0", "LOCAL_WORLD_SIZE": "3"}
    assert joined({**SRUN, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    assert joined({**SRUN, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != expected["MASTER_PORT"]
    assert joined({**SRUN, "PMI_SIZE": "4", "PMI_RANK": "3"}) == expected
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29512"}
    assert joined({**SRUN, **chosen, "WORLD_SIZE": "4"}) == {**expected, **chosen}


def test_mpirun_makes_one_run_of_all_processes():
    expected = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port_of("prterun-node1-14872@1"),
    }  # fmt: skip
    assert joined(MPIRUN) == expected
    assert joined({**SRUN, **MPIRUN}) == expected  # in a Slurm job, srun starts one helper a machine for mpirun
    two_machines = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert joined({**two_machines, "MASTER_ADDR": "node1"}) == {
        **expected, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node1",
    }  # fmt: skip


def test_torchrun_and_deepspeed_inside_of_srun_and_mpirun_keep_their_own_ranks():
    assert joined({**SRUN, **MPIRUN, **TORCHRUN, "PMI_SIZE": "16"}, at_terminal=True) == TORCHRUN


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not: unset WORLD_SIZE to start one process, or start"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not: unset RANK to start one process, or start several"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2' and WORLD_SIZE is '2', but RANK must be a whole number from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1' and WORLD_SIZE is '2', but RANK must be a whole number"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one' and WORLD_SIZE is '2', but RANK must be a whole number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is '' and WORLD_SIZE is '2', but RANK must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "all"}, "RANK is '0' and WORLD_SIZE is 'all', but RANK must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "²"}, "RANK is '0' and WORLD_SIZE is '²', but RANK must be a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu' and LOCAL_WORLD_SIZE is '2', but LOCAL_RANK must be"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is '2' and LOCAL_WORLD_SIZE is '2', but LOCAL_RANK must be"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but 4 processes were started: unset WORLD_SIZE, which follows"),
        ({**SRUN, "SLURM_PROCID": "4"}, "RANK is '4' and WORLD_SIZE is '4', but RANK must be"),
        ({**SRUN, "SLURM_STEP_NODELIST": "node[a-b]"}, "SLURM_STEP_NODELIST is 'node[a-b]', whose first machine"),
        (
            {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "mpirun started 2 processes on several machines, but does not say where rank 0 runs: add -x MASTER_ADDR=N",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "PMI_SIZE is 4, so a launcher that is not supported has started several"),
        ({**SRUN, "PMI_SIZE": "8"}, "PMI_SIZE is 8, so a launcher that is not supported"),
        ({**SALLOC_SHELL, "PMI_SIZE": "8"}, "PMI_SIZE is 8, so a launcher that is not supported"),
    ],
)
def test_contradicting_and_incomplete_variables_are_refused(environment, message):
    with pytest.raises(UserError) as raised:
        joined(environment)
    assert str(raised.value).startswith(message)


def test_a_terminal_of_srun_with_several_tasks_says_how_to_start_one_process_and_how_to_start_all():
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=1 before .* for one process, or srun --overlap"):
        joined({**SRUN, "SLURM_PROCID": "0"}, at_terminal=True)
    assert joined({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, at_terminal=True) == {}


@pytest.mark.parametrize(
    ("machines", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-010,015]", "node003"),
        ("gpu-[7,9]-ib,login", "gpu-7-ib"),
        ("rack[1-2]node[01-16]", "rack1node01"),
        ("a.b.org,c[1-2]", "a.b.org"),
    ],
)
def test_the_first_machine_of_a_list_of_slurm(machines, first):
    assert first_machine({"SLURM_STEP_NODELIST": machines}) == first


@pytest.mark.parametrize("machines", ["", ",node1", "node[1", "node]", "[", "node[]", "node[1-2]x[", "two words"])
def test_a_list_of_slurm_in_another_form_is_refused_with_the_command_that_reads_it(machines):
    with pytest.raises(UserError, match=r"export MASTER_ADDR=\$\(scontrol show hostnames"):
        first_machine({"SLURM_STEP_NODELIST": machines})
    assert first_machine({"SLURM_STEP_NODELIST": machines, "MASTER_ADDR": "node1"}) == "node1"


def test_ports_are_below_those_of_outgoing_connections_and_differ_between_runs():
    ports = {int(port_of(f"{job}.{step}")) for job in range(1000, 1030) for step in range(3)}
    assert len(ports) > 85
    assert all(20000 <= port < 29000 for port in ports)


# ---------------------------------------------------------------- as the programs meet them


@pytest.mark.parametrize("program", [train, evaluate], ids=["train.py", "eval.py"])
def test_both_programs_refuse_wrong_variables_in_one_line_with_status_2(monkeypatch, capsys, program):
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dclr.progress.protect_output", lambda: None)
    assert program.start() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{program.__name__.rpartition('.')[2][:4]}" in line
    assert "RANK is 'zero' and WORLD_SIZE is '2'" in line


@pytest.mark.parametrize(
    ("main", "command", "name"),
    [
        (train.main, ["check", "--data", "videos"], "train.py check"),
        (train.main, ["pack", "--data", "videos"], "train.py pack"),
        (evaluate.main, ["export", "--checkpoint", "runs/a", "--out", "a.onnx"], "eval.py export"),
        (
            evaluate.main,
            ["search", "--checkpoint", "runs/a", "--features", "a.npz", "--query", "a.mp4"],
            "eval.py search --features",
        ),
    ],
)
def test_a_command_for_one_process_is_refused_for_several(monkeypatch, main, command, name):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=f"{name} runs in one process, but 4 were started: start it without deepspeed"):
        main(command)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is '' and MASTER_PORT is '29500'"),
        ({"MASTER_PORT": "ssh"}, "MASTER_ADDR is 'node7' and MASTER_PORT is 'ssh'"),
        ({"MASTER_PORT": "70000"}, "MASTER_ADDR is 'node7' and MASTER_PORT is '70000'"),
        ({"MASTER_PORT": "0"}, "MASTER_ADDR is 'node7' and MASTER_PORT is '0'"),
    ],
)
def test_processes_that_connect_need_the_address_of_rank_0(monkeypatch, changed, message):
    for name, value in {**TORCHRUN, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        connection.master()
    assert str(raised.value).startswith(message)


def test_processes_that_connect_need_their_number_on_the_machine(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert engine.local_rank() == 1
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="LOCAL_RANK is not set, but with several processes it must be the number of"):
        engine.local_rank()


def test_each_process_of_a_machine_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    for gpus in (8, 2, 1):  # 1: srun --gpus-per-task=1 shows each task its own GPU
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert engine.choose_device() == chosen[-1] == torch.device("cuda", 1 if gpus > 1 else 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2, counted from 0, finds 2 GPUs; .*--ntasks-per-node=2"):
        engine.choose_device()
