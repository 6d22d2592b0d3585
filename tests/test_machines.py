"""Runs of two machines: namespaces with own names, addresses and processes, joined by a cable that the tests cut."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, as_flags, assert_same_end, children, numbers, steps

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys, time
import torch
from dclr.commands import train
from dclr import distributed
from dclr.training import connection, engine
from dclr.training.heartbeat import Heartbeat

def main(arguments):
    with Heartbeat(interval=0.5, timeout=4.0) as heartbeat:
        print(connection.choose_interface(heartbeat.peers), flush=True)
        engine.start_processes()
        print("connected", flush=True)
        while True:
            distributed.mean_over_ranks(torch.ones(1))
            time.sleep(0.05)

train.main = main
sys.exit(train.run([]))
"""

SSH_CONFIG = """Host *
BatchMode yes
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 10
ServerAliveCountMax 3
ConnectTimeout 20
"""
"""With the options of docs/clusters.md, by which pdsh notices a machine that has vanished."""

SSHD_CONFIG = """HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PidFile none
UsePAM no
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machines:
    """Two machines, A and B: each has a network, a host name, mounts and processes of its own, and an sshd.

    They share the file system. Each resolves its own name to 127.0.1.1, as Debian does, and the other's name to the
    other's address.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"dclr{os.getpid()}{letter}" for letter in "ab"]
        self.power: list[subprocess.Popen[bytes] | None] = [None, None]
        """The process that holds the machine: the parent of its process 1."""
        self.processes: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "name", "cable1", "netns", second)
        for number, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.98.7.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "address", "add", f"fd98::{number + 1}/64", "dev", f"cable{number}", "nodad")
            for interface in ("lo", f"cable{number}"):
                ip("-n", name, "link", "set", interface, "up")
            other = f"10.98.7.{2 - number} machine-{'ba'[number]}\n"
            (self.folder / f"hosts{number}").write_text(
                f"127.0.0.1 localhost\n127.0.1.1 machine-{'ab'[number]}\n{other}"
            )
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", self.folder / "key"], check=True)
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        for number in range(2):
            self.boot(number)

    def boot(self, number: int) -> None:
        """Start a machine: its process 1 is its sshd."""
        prepare = (
            f"hostname machine-{'ab'[number]} && mount --bind {self.folder}/hosts{number} /etc/hosts && "
            f"mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config && mount -t tmpfs tmpfs /run && "
            f"mkdir /run/sshd && exec {shutil.which('sshd')} -D -f {self.folder}/sshd_config"
        )
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", prepare]
        command = ["ip", "netns", "exec", self.names[number], *own]
        with (self.folder / f"boot{number}").open("wb") as output:
            power = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.power[number] = power
        end = time.monotonic() + 20
        while subprocess.run([*self.inside(number), "ssh", "localhost", "true"], capture_output=True).returncode:
            if power.poll() is not None or time.monotonic() > end:
                raise OSError(f"machine {number} does not start: {(self.folder / f'boot{number}').read_text()}")
            time.sleep(0.05)

    def inside(self, number: int) -> list[str]:
        """Return the beginning of a command that runs on a machine."""
        power = self.power[number]
        first = children(power.pid) if power else []
        spaces = ["--net", "--uts", "--mount", "--pid", f"--wdns={self.folder}"]
        return ["nsenter", f"--target={first[0]}", *spaces] if first else ["false"]

    def start(self, number: int, command: list[str], environment: dict[str, str], name: str) -> subprocess.Popen[str]:
        """Start a command on a machine, in the common folder. Its output goes to the file `name`."""
        with (self.folder / name).open("w") as output:
            process = subprocess.Popen([*self.inside(number), *command], env=environment, stdout=output, stderr=output)
        self.processes.append(process)
        return process

    def start_ranks(self, environment: dict[str, str], master: str) -> list[subprocess.Popen[str]]:
        """Start PROGRAM as one rank on each machine. Their outputs go to out0 and out1."""
        own = {**environment, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        own |= {"MASTER_ADDR": master, "MASTER_PORT": "29500", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", PROGRAM]
        return [self.start(rank, command, {**own, "RANK": str(rank)}, f"out{rank}") for rank in range(2)]

    def output(self, name: str) -> str:
        return (self.folder / name).read_text()

    def commands(self) -> list[str]:
        """Return the command lines of all processes on the machines, with spaces between the words."""
        found = []
        for power in filter(None, self.power):
            for process in children(power.pid):
                with suppress(OSError):
                    found.append(Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def cut(self) -> None:
        """Lose all packets in both directions, without an error on either side: they go to an address nobody has."""
        for number, name in enumerate(self.names):
            for address in (f"10.98.7.{2 - number}", f"fd98::{2 - number}"):
                ip("-n", name, "neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", f"cable{number}",
                   "nud", "permanent")  # fmt: skip

    def repair(self) -> None:
        """Undo `cut`."""
        for number, name in enumerate(self.names):
            for address in (f"10.98.7.{2 - number}", f"fd98::{2 - number}"):
                ip("-n", name, "neigh", "del", address, "dev", f"cable{number}")

    def switch_off(self, number: int) -> None:
        """Kill all processes of a machine at once."""
        power = self.power[number]
        if power is not None:
            power.kill()  # and with it process 1 of the machine, whose end kills all others
            power.wait()
        self.power[number] = None

    def remove(self) -> None:
        for number in range(2):
            self.switch_off(number)
        for process in self.processes:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    missing = [program for program in ("ip", "unshare", "nsenter", "ssh", "sshd") if not shutil.which(program)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"namespaces need root and the programs {', '.join(missing) or 'ip, unshare and sshd'}")
    made = Machines(tmp_path)
    try:
        made.build()
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        pytest.skip(f"cannot make machines of namespaces here: {error} {getattr(error, 'stderr', '')}")
    yield made
    made.remove()


def wait_until(condition: Callable[[], bool], seconds: float, *running: subprocess.Popen[str]) -> None:
    """Wait until the condition holds. Fail after `seconds`, or if a process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        assert all(process.poll() is None for process in running), "a process has ended"
        time.sleep(0.02)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if "train.py: error: " in line]


# ---------------------------------------------------------------- connecting


def test_ranks_of_two_machines_connect_over_ipv6_and_end_when_the_cable_is_cut(machines, clean_environment):
    ranks = machines.start_ranks(clean_environment, "fd98::1")
    wait_until(lambda: all("connected" in machines.output(f"out{rank}") for rank in range(2)), 120, *ranks)
    for rank in range(2):
        assert f"2 machines; rank {rank} on machine-{'ab'[rank]} uses cable{rank}" in machines.output(f"out{rank}")
    machines.cut()
    began = time.monotonic()
    assert [process.wait(60) for process in ranks] == [1, 1]
    assert time.monotonic() - began < 60
    (first,), (second,) = (errors(machines.output(f"out{rank}")) for rank in range(2))
    assert first.startswith("train.py: error: rank 1 has failed: process ")
    assert "on machine-b has sent no heartbeat for 4 s" in first
    assert "fd98::1:29500, where the ranks of this run connect, has not answered rank 1 on machine-b" in second


def test_without_the_chosen_interface_gloo_fails_and_each_machine_says_so_in_one_line(machines, clean_environment):
    ranks = machines.start_ranks({**clean_environment, "GLOO_SOCKET_IFNAME": "lo"}, "machine-a")
    assert all(process.wait(90) in (1, 2) for process in ranks)
    for rank in range(2):
        assert "Traceback" not in machines.output(f"out{rank}")
        (line,) = errors(machines.output(f"out{rank}"))
        assert "connect to the other ranks through lo" in line
        assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose another interface" in line


# ---------------------------------------------------------------- whole runs


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def torchrun(machines: int, flags: list[str]) -> list[str]:
    """Return the torchrun command of one of the machines. Two ranks together, which meet at machine A.

    torchrun compares the name in --rdzv_endpoint with the machine's own name. An address would not do: machine A would
    not recognise it as its own, because its name resolves to 127.0.1.1.
    """
    meeting = ["--rdzv_backend=c10d", "--rdzv_endpoint=machine-a:29600", "--rdzv_id=run"] if machines == 2 else []
    nodes = ["--nnodes", str(machines), "--nproc_per_node", str(2 // machines)]
    return [program("torchrun"), *nodes, *meeting, str(REPOSITORY / "train.py"), "pretrain", *flags]


@pytest.mark.launcher
@pytest.mark.timeout(600)
def test_a_run_of_two_machines_is_stopped_loses_a_machine_and_ends_as_a_run_of_one_machine(
    machines, clean_environment, tiny_pretrain: dict[str, Any], tmp_path
):
    if not shutil.which("pdsh"):
        pytest.skip("deepspeed --hostfile needs pdsh")
    environment = {**clean_environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    # Of its environment, deepspeed gives other machines only PYTHON... and this file.
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    (tmp_path / "hosts").write_text("machine-a slots=1\nmachine-b slots=1\n")

    def flags(run: str) -> list[str]:
        return as_flags({**tiny_pretrain, "epochs": 12, "checkpoint_every": 1, "resume": "auto", "out": tmp_path / run})

    deepspeed = [program("deepspeed"), "--hostfile", "hosts", str(REPOSITORY / "train.py"), *flags("run")]

    def reached(step: int) -> bool:
        return max(steps(tmp_path / "run"), default=0) >= step

    # All at once on one machine.
    whole = machines.start(0, torchrun(1, flags("whole")), environment, "whole.log")
    assert whole.wait(200) == 0, machines.output("whole.log")

    # SIGTERM to the outermost process reaches both ranks, which write a checkpoint.
    outermost = machines.start(0, deepspeed, environment, "stopped.log")
    wait_until(lambda: reached(4), 120, outermost)
    assert "2 machines; rank 0 on machine-a uses cable0" in machines.output("stopped.log")
    os.kill(children(outermost.pid)[0], signal.SIGTERM)
    wait_until(lambda: not any("train.py" in command for command in machines.commands()), 60)
    stopped_at = max(steps(tmp_path / "run"))  # pdsh has ended before the ranks, so their last line is lost
    assert stopped_at == numbers(tmp_path / "run")[-1]["step"]

    # A machine vanishes: its processes and its packets.
    outermost = machines.start(0, deepspeed, environment, "lost.log")
    wait_until(lambda: reached(stopped_at + 8), 120, outermost)
    machines.cut()
    machines.switch_off(1)
    began = time.monotonic()
    wait_until(lambda: "rank 1 has failed" in machines.output("lost.log"), 60)
    assert outermost.wait(60) != 0
    assert time.monotonic() - began < 60
    (line,) = errors(machines.output("lost.log"))
    assert "rank 1 has failed: process " in line
    assert "on machine-b has sent no heartbeat for 30 s" in line
    lost_at = max(steps(tmp_path / "run"))
    assert stopped_at + 8 <= lost_at < 48
    shutil.copytree(tmp_path / "run", tmp_path / "alone")

    # The run continues on the machine that is left, and on two machines again.
    alone = machines.start(0, torchrun(1, flags("alone")), environment, "alone.log")
    assert alone.wait(200) == 0, machines.output("alone.log")
    machines.repair()
    machines.boot(1)
    both = [machines.start(number, torchrun(2, flags("run")), environment, f"both{number}.log") for number in range(2)]
    assert [process.wait(200) for process in both] == [0, 0], machines.output("both0.log")
    assert "2 machines; rank 0 on machine-a uses cable0" in machines.output("both0.log")
    for run in ("alone", "run"):
        assert_same_end(tmp_path / run, tmp_path / "whole")
