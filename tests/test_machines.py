"""Runs of two machines: network namespaces with names and addresses of their own, joined by a cable that tests cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY

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


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machines:
    """Two network namespaces, A with rank 0 and B with rank 1. Each resolves its own name to 127.0.1.1, as Debian does.

    B resolves A's name to A's address.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"dclr{os.getpid()}{letter}" for letter in "ab"]
        self.processes: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "name", "cable1", "netns", second)
        for number, name in enumerate(self.names):
            own = f"127.0.0.1 localhost\n127.0.1.1 machine-{'ab'[number]}\n"
            (self.folder / f"hosts{number}").write_text(own + ("10.98.7.1 machine-a\n" if number else ""))
            ip("-n", name, "address", "add", f"10.98.7.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "address", "add", f"fd98::{number + 1}/64", "dev", f"cable{number}", "nodad")
            for interface in ("lo", f"cable{number}"):
                ip("-n", name, "link", "set", interface, "up")

    def start(self, environment: dict[str, str], master: str, program: str = PROGRAM) -> None:
        """Start a rank on each machine. Their outputs go to out0 and out1."""
        for rank, name in enumerate(self.names):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            own |= {
                "MASTER_ADDR": master,
                "MASTER_PORT": "29500",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
            }
            prepare = f'hostname machine-{"ab"[rank]}; mount --bind {self.folder}/hosts{rank} /etc/hosts; exec "$@"'
            command = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", prepare, "sh"]
            with (self.folder / f"out{rank}").open("w") as output:
                process = subprocess.Popen(
                    [*command, sys.executable, "-c", program], cwd=REPOSITORY, env=own, stdout=output, stderr=output
                )
            self.processes.append(process)

    def output(self, rank: int) -> str:
        return (self.folder / f"out{rank}").read_text()

    def wait_until_connected(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and all(process.poll() is None for process in self.processes):
            if all("connected" in self.output(rank) for rank in range(2)):
                return
            time.sleep(0.1)
        pytest.fail(f"not connected:\n{self.output(0)}\n{self.output(1)}")

    def cut(self) -> None:
        """Lose all packets in both directions, without an error on either side: they go to an address nobody has."""
        for number, name in enumerate(self.names):
            for address in (f"10.98.7.{2 - number}", f"fd98::{2 - number}"):
                ip("-n", name, "neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", f"cable{number}",
                   "nud", "permanent")  # fmt: skip

    def remove(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root and the programs ip and unshare")
    made = Machines(tmp_path)
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"cannot make network namespaces here: {error.stderr.decode().strip()}")
    yield made
    made.remove()


@pytest.mark.parametrize("master", ["machine-a", "fd98::1"])
def test_ranks_of_two_machines_connect_though_their_names_are_loopback_and_end_when_the_cable_is_cut(
    machines, clean_environment, master
):
    machines.start(clean_environment, master)
    machines.wait_until_connected()
    for rank in range(2):
        assert f"2 machines; rank {rank} on machine-{'ab'[rank]} uses cable{rank}" in machines.output(rank)
    machines.cut()
    began = time.monotonic()
    assert [process.wait(60) for process in machines.processes] == [1, 1]
    assert time.monotonic() - began < 60
    errors = [
        [line for line in machines.output(rank).splitlines() if line.startswith("train.py: error: ")]
        for rank in range(2)
    ]
    assert [len(lines) for lines in errors] == [1, 1]
    assert errors[0][0].startswith("train.py: error: rank 1 has failed: process ")
    assert "on machine-b has sent no heartbeat for 4 s" in errors[0][0]
    assert f"{master}:29500, where the ranks of this run connect, has not answered rank 1 on machine-b" in errors[1][0]


def test_without_the_chosen_interface_gloo_fails_and_each_machine_says_so_in_one_line(machines, clean_environment):
    machines.start({**clean_environment, "GLOO_SOCKET_IFNAME": "lo"}, "machine-a")
    assert all(process.wait(90) in (1, 2) for process in machines.processes)
    for rank in range(2):
        lines = machines.output(rank).splitlines()
        assert "Traceback" not in machines.output(rank)
        (line,) = [line for line in lines if line.startswith("train.py: error: ")]
        assert "connect to the other ranks through lo" in line
        assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose another interface" in line
