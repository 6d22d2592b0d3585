"""What asks a run to stop: signals, a terminal that goes away, and the end of the launcher."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import REPOSITORY, as_flags, children, fork, launcher_command, numbers, run_train, steps

from dclr.lock import start_time
from dclr.training.signals import LauncherWatch, StopRequest, find_launchers


@pytest.fixture
def hangup():
    """Restore the reaction to SIGHUP after the test. The tests may run under nohup."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_hangup_asks_to_stop_but_stays_ignored_under_nohup(hangup):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGHUP)
    assert request.asked
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGHUP)
    assert not request.asked
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---------------------------------------------------------------- the launcher

RANK = """
import signal, sys, time
from dclr.training.signals import LauncherWatch, StopRequest
with StopRequest() as request, LauncherWatch():
    print("ready", flush=True)
    while not request.asked:
        time.sleep(0.01)
print("asked", flush=True)
"""

LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
os.closerange(0, 3)  # only the rank holds the output
child.wait()
"""


def test_a_rank_of_open_mpi_watches_the_process_that_started_it(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_launchers(os.getpid()) == {}
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert find_launchers(os.getpid()) == {os.getpid(): start_time(os.getpid())}


def start_rank(*launchers: str, **environment: str) -> subprocess.Popen[str]:
    """Start a rank below processes whose command lines hold these words, from the outermost on."""
    command = [sys.executable, "-c", RANK]
    for name in reversed(launchers):
        command = [sys.executable, "-c", LAUNCHER, name, *command]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


INNER = "-m deepspeed.launcher.launch"


@pytest.mark.parametrize(
    ("launchers", "environment", "ended"),
    [
        (("bin/deepspeed", INNER), {}, 0),
        (("bin/deepspeed", INNER), {}, 1),
        (("sshd", f"bash {INNER}", INNER), {}, 0),
        (("bin/torchrun",), {"TORCHELASTIC_RUN_ID": "none"}, 0),
    ],
    ids=["deepspeed", "deepspeed's second launcher", "the ssh connection", "torchrun"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_is_asked_to_stop_when_its_launcher_ends(launchers, environment, ended, number):
    process = start_rank(*launchers, **environment)
    try:
        chain = [process.pid, *children(process.pid)]
        os.kill(chain[ended], number)
        output, errors = process.communicate(timeout=20)  # until the rank has closed it
        assert output == "asked\n"
        assert errors == f"train.py: the launcher (process {chain[ended]}) has ended, so the run stops\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_signal_to_all_processes_asks_a_rank_to_stop_though_its_launchers_end_of_it():
    """A scheduler sends SIGUSR1 to all processes of a job. deepspeed's launchers do not handle SIGUSR1."""
    process = start_rank("bin/deepspeed", INNER)
    try:
        os.killpg(process.pid, signal.SIGUSR1)
        output, errors = process.communicate(timeout=20)  # until the rank has closed it
        assert output == "asked\n"
        assert process.returncode == -signal.SIGUSR1
        ended = r"train.py: the launcher \(process \d+\) has ended, so the run stops\n"
        assert re.fullmatch(f"({ended})?", errors)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_without_a_launcher_nothing_is_watched(monkeypatch):
    """A run that a shell or another program started outlives it."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert find_launchers(os.getppid()) == {}
    with LauncherWatch() as watch:
        assert watch._thread is None


# ---------------------------------------------------------------- whole runs


def start(command: list[str], environment: dict[str, str], **streams) -> subprocess.Popen[str]:
    environment = {**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, text=True, **streams)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or all(line["step"] < step for line in numbers(run)):
        assert time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.launcher
def test_ranks_leave_a_checkpoint_when_deepspeed_ends_alone(clean_environment, tiny_pretrain, tmp_path):
    """SIGTERM to the outermost process, which it does not pass on.

    Ranks watch both launchers. The test above ends each of two that stand for them.
    """
    flags = as_flags({**tiny_pretrain, "epochs": 500, "out": tmp_path / "run", "checkpoint_every": 500})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start([*launcher_command("deepspeed"), *flags], clean_environment, **streams)
    try:
        wait_for_step(tmp_path / "run", 3)
        below = children(process.pid)
        (inner,) = (p for p in below if b"launcher.launch" in Path(f"/proc/{p}/cmdline").read_bytes())
        assert find_launchers(inner).keys() == {inner, process.pid}
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
        while any(map(is_running, below)):
            assert time.monotonic() - began < 30
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert len(steps(tmp_path / "run")) == 1, output
    assert "has ended, so the run stops" in output


def train_with_closed_pipe(arguments: list[str], environment: dict[str, str]) -> None:
    """Run train.py in this forked process, with an output that nobody can read."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    run_train(arguments, environment, None)


@pytest.mark.parametrize("output", ["a closed pipe", "a full disk"])
def test_a_run_whose_output_goes_nowhere_ends_as_usual(clean_environment, tiny_pretrain, tmp_path, output):
    """The full disk has a new interpreter, because an interpreter writes the rest of its output when it ends."""
    arguments = ["pretrain", *as_flags({**tiny_pretrain, "epochs": 1, "out": tmp_path / "run"})]
    if output == "a full disk":
        with open("/dev/full", "w") as full:
            process = start([sys.executable, "train.py", *arguments], clean_environment, stdout=full, stderr=full)
        assert process.wait(120) == 0
    else:
        forked = fork(train_with_closed_pipe, arguments, clean_environment)
        forked.join(120)
        assert forked.exitcode == 0
    assert (tmp_path / "run" / "report.json").exists()
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1, 2, 3, 4]


def test_of_two_runs_that_start_at_once_in_one_folder_one_is_refused(clean_environment, tiny_pretrain, tmp_path):
    flags = {**tiny_pretrain, "epochs": 500, "checkpoint_every": 500, "out": tmp_path / "run", "resume": "auto"}
    outputs = [tmp_path / "first", tmp_path / "second"]
    command = ["pretrain", *as_flags(flags)]
    processes = {fork(run_train, command, clean_environment, output): output for output in outputs}
    try:
        deadline = time.monotonic() + 120
        while all(process.exitcode is None for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        refused, other = sorted(processes, key=lambda process: process.exitcode is None)
        assert refused.exitcode == 2
        assert f"{tmp_path / 'run'} is being written by process {other.pid} on " in processes[refused].read_text()
        wait_for_step(tmp_path / "run", 2)
        os.kill(other.pid, signal.SIGTERM)
        other.join(60)
        assert other.exitcode == 75
        found = [line["step"] for line in numbers(tmp_path / "run")]
        assert found == list(range(1, len(found) + 1))
    finally:
        for process in processes:
            process.kill()
            process.join()
