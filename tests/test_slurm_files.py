"""The job files of examples/slurm, run by bash with programs in place of srun, scontrol, torchrun and python.

The srun here sets the variables that Slurm sets and starts the tasks. It forwards USR1 to them, and kills them if it
gets TERM. Slurm's srun did both (22.05, 2026-11-29).
"""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY

from dclr.commands import train
from dclr.commands.launcher import join_launch, port_of

FOLDER = REPOSITORY / "examples" / "slurm"
FILES = ["pretrain_srun.sh", "pretrain_torchrun.sh"]

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> srun.flags; shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST SLURM_STEP_NUM_NODES=2
export SLURM_STEP_NUM_TASKS=$((2 * TASKS_PER_NODE))
for node in 0 1; do
    for ((local = 0; local < TASKS_PER_NODE; local++)); do
        gtids=$(seq -s, $((node * TASKS_PER_NODE)) $(((node + 1) * TASKS_PER_NODE - 1)))
        SLURM_PROCID=$((node * TASKS_PER_NODE + local)) SLURM_LOCALID=$local SLURM_NODEID=$node SLURM_GTIDS=$gtids \\
            "$@" & tasks+=($!)
    done
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -KILL "${tasks[@]}"' TERM
echo "${tasks[@]}" > tasks.new && mv tasks.new tasks
highest=0
for task in "${tasks[@]}"; do
    while true; do
        wait "$task"; status=$?
        kill -0 "$task" 2> /dev/null || break
    done
    wait "$task"; status=$?
    ((status > highest)) && highest=$status
done
exit $highest
"""

SCONTROL = """#!/bin/bash
if [[ $1 == requeue ]]; then echo "$2" >> requeued; else printf 'node1\\nnode2\\n'; fi
"""

SCANCEL = """#!/bin/bash
if [[ $1 == --signal=TERM && $2 == 4711 ]]; then kill -TERM $(cat tasks); fi
"""

RANK = """#!/bin/bash
trap 'echo USR1 > signal.$SLURM_PROCID; exit 75' USR1
trap 'echo TERM > signal.$SLURM_PROCID; exit 1' TERM
printf '%s\\n' "$@" > arguments.$SLURM_PROCID
env > environment.$SLURM_PROCID
mv environment.$SLURM_PROCID started.$SLURM_PROCID
if [[ $END ]]; then exit "$END"; fi
while true; do sleep 0.02; done
"""


class Job:
    """A job on two machines with two GPUs each, in a folder of its own."""

    def __init__(self, file: str, folder: Path, **environment: str) -> None:
        programs = folder / "bin"
        programs.mkdir()
        texts = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "python": RANK, "torchrun": RANK}
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.folder, self.tasks = folder, 4 if file == "pretrain_srun.sh" else 2
        own = {
            "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_PROCID": "0",
            "SLURM_NTASKS": str(self.tasks), "TASKS_PER_NODE": str(self.tasks // 2), "DATA": "a b", "RUN": "runs/ucf",
        }  # fmt: skip
        self.process = subprocess.Popen(["bash", str(FOLDER / file)], cwd=folder, env={**own, **environment})

    def wait_until_started(self) -> None:
        end = time.monotonic() + 60
        while len(list(self.folder.glob("started.*"))) < self.tasks or not (self.folder / "tasks").exists():
            assert time.monotonic() < end
            assert self.process.poll() is None
            time.sleep(0.01)

    def requeued(self) -> str:
        file = self.folder / "requeued"
        return file.read_text() if file.exists() else ""


@pytest.mark.parametrize(
    ("file", "received", "status"), [("pretrain_srun.sh", "USR1", 75), ("pretrain_torchrun.sh", "TERM", 1)]
)
def test_the_warning_before_the_time_limit_reaches_all_ranks_and_the_job_is_requeued(tmp_path, file, received, status):
    job = Job(file, tmp_path)
    job.wait_until_started()
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(60) == status
    assert [(tmp_path / f"signal.{rank}").read_text() for rank in range(job.tasks)] == [f"{received}\n"] * job.tasks
    assert job.requeued() == "4711\n"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_keeps_its_status_and_is_not_requeued(tmp_path, file, status):
    job = Job(file, tmp_path, END=str(status))
    assert job.process.wait(60) == status
    assert job.requeued() == ""
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.flags").read_text().splitlines()


def test_the_tasks_of_srun_are_the_ranks_of_one_run_and_their_command_is_accepted(tmp_path):
    assert Job("pretrain_srun.sh", tmp_path, END="0").process.wait(60) == 0
    found = []
    for rank in range(4):
        lines = (tmp_path / f"started.{rank}").read_text().splitlines()
        environment = dict(line.split("=", 1) for line in lines if line.startswith("SLURM"))
        join_launch(environment, at_terminal=False)
        found.append([environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")])
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node1", port_of("4711.0"))
    assert found == [["0", "4", "0", "2"], ["1", "4", "1", "2"], ["2", "4", "0", "2"], ["3", "4", "1", "2"]]
    program, *flags = (tmp_path / "arguments.3").read_text().splitlines()
    assert program == "train.py"
    settings = train.parse(flags)
    assert (settings["command"], settings["data"], settings["resume"]) == ("pretrain", "a b", "auto")


def test_torchrun_gets_the_machines_the_gpus_and_the_address_of_the_first_machine(tmp_path):
    assert Job("pretrain_torchrun.sh", tmp_path, END="0").process.wait(60) == 0
    words = (tmp_path / "arguments.1").read_text().splitlines()
    own = words[: words.index("train.py")]
    assert dict(zip(own[::2], own[1::2], strict=True)) == {
        "--nnodes": "2", "--nproc_per_node": "2", "--rdzv_backend": "c10d", "--rdzv_id": "4711",
        "--rdzv_endpoint": "node1:24711",
    }  # fmt: skip
    assert train.parse(words[words.index("train.py") + 1 :])["out"] == "runs/ucf"


@pytest.mark.parametrize("file", FILES)
def test_a_job_file_is_warned_before_its_time_limit_and_may_be_started_again(file):
    lines = (FOLDER / file).read_text().splitlines()
    given = dict(shlex.split(line)[1].split("=") for line in lines if line.startswith("#SBATCH") and "=" in line)
    assert given["--signal"] == "B:USR1@300"  # B: the script gets the signal, and sends it to srun
    assert given["--open-mode"] == "append"
    assert "#SBATCH --requeue" in lines
    assert int(given["--ntasks-per-node"]) == (int(given["--gpus-per-node"]) if file == "pretrain_srun.sh" else 1)
