"""The heartbeat at the start of a run, and when the store does not answer."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import REPOSITORY, fork, free_port, redirect_output

from dclr import programs
from dclr.commands import train
from dclr.errors import NotConnected, UserError
from dclr.training import connection
from dclr.training.connection import Peer, choose_interface, interface_towards, reach, start_timeout
from dclr.training.heartbeat import Heartbeat


def run_rank(work: Callable[[], None], environment: dict[str, str], output: Path) -> None:
    """Run `work` with a heartbeat in place of train.main and end as train.py does. Write the output to a file."""
    os.environ |= environment
    redirect_output(output)

    def main(arguments: list[str]) -> None:
        with Heartbeat(0.2, 3.0):
            work()

    train.main = main
    sys.exit(train.run([]))


class Rank:
    """A rank in a process of its own. Errors are printed as train.py prints them."""

    def __init__(
        self, work: Callable[[], None], rank: int, port: int, output: Path, ranks: int = 2, limit: str = "100"
    ) -> None:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DCLR_START_TIMEOUT": limit}
        self.output = output / f"rank{rank}"
        self.process = fork(run_rank, work, own, self.output)

    def end(self) -> tuple[int, str]:
        """Wait for the end of the process and return its exit status and its error line."""
        self.process.join(60)
        assert self.process.exitcode is not None
        output = self.output.read_text()
        assert "Traceback" not in output
        lines = [line for line in output.splitlines() if line.startswith("train.py: error: ")]
        assert len(lines) <= 1, output
        return self.process.exitcode, "".join(lines).removeprefix("train.py: error: ")


def do_nothing() -> None:
    pass


def wait_4_seconds() -> None:
    time.sleep(4)


def wait_300_seconds() -> None:
    print("connected", flush=True)
    time.sleep(300)


def refuse() -> None:
    raise UserError("no such preset")


# ---------------------------------------------------------------- a rank that fails while the run starts


def test_a_rank_that_never_connects_is_named(tmp_path):
    status, error = Rank(do_nothing, 0, free_port(), tmp_path, ranks=3, limit="2").end()
    assert status == 1
    assert error.startswith("rank 1, 2 of 3 did not connect to 127.0.0.1:")


def test_the_other_ranks_end_if_rank_0_never_connects(tmp_path):
    status, error = Rank(do_nothing, 1, free_port(), tmp_path, limit="2").end()
    assert status == 2
    assert error.startswith(f"rank 1 on {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:")
    assert "within 2 s (Connection refused): rank 0 failed at its start" in error


def test_an_error_before_the_process_groups_exist_reaches_the_other_ranks(tmp_path):
    """Rank 0 waits in a call that cannot be interrupted, as init_process_group is one."""
    port = free_port()
    first = Rank(wait_300_seconds, 0, port, tmp_path)
    second = Rank(refuse, 1, port, tmp_path)
    found = first.end()
    second.process.kill()  # it waits until a launcher ends it
    second.process.join()
    assert found == (2, "no such preset")


def test_ranks_that_end_without_error_wait_for_each_other(tmp_path):
    port = free_port()
    ranks = [Rank(work, rank, port, tmp_path) for rank, work in enumerate((do_nothing, wait_4_seconds))]
    assert [rank.end() for rank in ranks] == [(0, ""), (0, "")]


def test_a_rank_of_another_run_at_the_same_port_is_refused_and_leaves_no_message(monkeypatch):
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    store.set("dclr/heartbeat/0/peer/1", "a rank of the other run")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotConnected, match=f"another run uses 127.0.0.1:{port}: choose another port"), Heartbeat():
        pass
    assert not store.check(["dclr/heartbeat/0/end"])


def test_a_port_in_use_is_reported_with_how_to_find_an_earlier_run(monkeypatch):
    programs.run_as("train")  # another test of this process may have run eval.py
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(NotConnected, match=rf"port is in use.*pgrep -af train.py.*--master_port {port + 1}"):
            connection.open_store({})


def test_a_program_at_the_port_that_is_no_store_does_not_hold_a_rank(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:  # accepts connections and never answers
        status, error = Rank(do_nothing, 1, other.getsockname()[1], tmp_path, limit="2").end()
    assert status == 1
    assert "does not answer as a run does: another program may have that port" in error


# ---------------------------------------------------------------- a store that does not answer


class Relay:
    """Forward connections to a port of this machine, until `silent` is set. Then connections stay open without data."""

    def __init__(self, port: int) -> None:
        self._target, self.silent = port, threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            reach("127.0.0.1", self._target, 100)
            store = socket.create_connection(("127.0.0.1", self._target))
            for source, target in ((client, store), (store, client)):
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # a process has ended
            while data := source.recv(65536):
                if not self.silent.is_set():
                    target.sendall(data)
        if not self.silent.is_set():
            target.close()


def test_a_rank_ends_when_the_store_stops_answering_while_its_main_thread_waits(tmp_path):
    port = free_port()
    relay = Relay(port)
    first = Rank(wait_300_seconds, 0, port, tmp_path)
    second = Rank(wait_300_seconds, 1, relay.port, tmp_path)
    while not second.output.exists() or "connected" not in second.output.read_text():
        assert second.process.exitcode is None
        time.sleep(0.05)
    relay.silent.set()
    began = time.monotonic()
    (status, error), (other_status, other_error) = first.end(), second.end()
    assert time.monotonic() - began < 40
    assert (status, other_status) == (1, 1)
    assert error.startswith("rank 1 has failed: process ")
    assert f"127.0.0.1:{relay.port}, where the ranks of this run connect, has not answered rank 1" in other_error


BLOCKED = """
import os, threading, time
from dclr.training import heartbeat
class Blocked:
    def __getattr__(self, name):
        return lambda *arguments: threading.Event().wait()
os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
heartbeat.open_store = lambda about: (None, None)
heartbeat.dist.PrefixStore = lambda prefix, store: Blocked()
heartbeat.Heartbeat._register = lambda self, peer: None
with heartbeat.Heartbeat(0.1, 1.0):
    pass
"""


def test_a_rank_ends_if_a_call_to_the_store_never_returns(clean_environment):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], env={**clean_environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: error: 127.0.0.1:29500, where the ranks of this run connect, has not")


# ---------------------------------------------------------------- addresses and interfaces


def test_a_name_that_cannot_be_resolved_is_reported_at_once():
    with pytest.raises(NotConnected, match=r"MASTER_ADDR is no\.such\.machine\.invalid, which .* cannot resolve"):
        reach("no.such.machine.invalid", 29500, 60)


def test_reaching_rank_0_waits_until_it_listens():
    port = free_port()
    servers: list[socket.socket] = []
    timer = threading.Timer(0.5, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    timer.start()
    assert reach("127.0.0.1", port, 30) == "127.0.0.1"
    timer.join()
    servers[0].close()


def peers(*machines: tuple[str, str]) -> list[Peer]:
    return [Peer(1, "host", machine, master) for machine, master in machines]


@pytest.fixture
def no_interface(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str | None]]:
    """Unset the variables; they are restored at the end. Return a function that reads them."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda: [os.environ.get(name) for name in names]


def test_one_machine_keeps_the_default_interface(no_interface):
    assert choose_interface([]) == ""
    assert choose_interface(peers(("a", "127.0.0.1"), ("a", "127.0.0.1"))) == ""
    assert no_interface() == [None, None]


def test_several_machines_use_the_interface_that_reaches_rank_0_also_where_its_name_is_loopback(
    no_interface, monkeypatch
):
    monkeypatch.setattr(connection, "interface_towards", {"10.0.0.1": "eth1:0"}.get)
    said = choose_interface(peers(("a", "127.0.1.1"), ("a", "127.0.1.1"), ("b", "10.0.0.1")))
    assert said.startswith("2 machines; rank ")
    assert said.endswith(" uses eth1:0")
    assert no_interface() == ["eth1:0", "=eth1"]


def test_an_interface_that_the_user_chose_stays(no_interface, monkeypatch):
    monkeypatch.setattr(connection, "interface_towards", {"10.0.0.1": "eth1"}.get)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert choose_interface(peers(("a", "10.0.0.1"), ("b", "10.0.0.1"))).endswith(" uses ib0")
    assert no_interface() == ["ib0", "=eth1"]


def test_an_address_that_no_rank_reaches_but_by_loopback_changes_nothing(no_interface):
    assert choose_interface(peers(("a", "127.0.0.1"), ("b", "::1"))).endswith(" uses the default network interface")
    assert no_interface() == [None, None]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_interface_of_an_address_of_this_machine_is_found(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.socket(family, socket.SOCK_DGRAM).connect((address, 9))
    except OSError:
        pytest.skip(f"this machine has no {address}")
    name = interface_towards(address)
    assert name in [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "1e99", "soon"])
def test_a_wrong_start_timeout_is_refused(monkeypatch, value):
    monkeypatch.setenv("DCLR_START_TIMEOUT", value)
    with pytest.raises(UserError, match=r"DCLR_START_TIMEOUT is .* must be a positive number of seconds"):
        start_timeout()
