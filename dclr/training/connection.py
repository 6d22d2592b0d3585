"""How the processes of a run reach each other: the address of rank 0, and the network interface of this machine.

A launcher sets MASTER_ADDR and MASTER_PORT, the address of the TCPStore that rank 0 hosts (torchrun hosts the store
itself). Every rank connects to the store first. gloo and NCCL then connect the ranks with each other directly, and each
rank tells the others its own address. gloo takes the address to which the machine's name resolves. Debian writes
`127.0.1.1 name` into /etc/hosts, so another machine would then connect to itself. `choose_interface` prevents this.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch.distributed as dist

from dclr.distributed import launched_rank
from dclr.errors import NotConnected, UserError, first_line
from dclr.programs import running
from dclr.training.deadline import Deadline

_ATTEMPT = 3.0
"""Seconds that one attempt to connect may take."""


@dataclass(frozen=True)
class Peer:
    """What a rank tells the others when it connects."""

    process: int
    host: str
    machine: str
    """Identifies the network stack: ranks with the same value reach each other through the loopback interface."""
    master: str
    """The IP address under which this rank reaches MASTER_ADDR."""
    about: dict[str, str] = field(default_factory=dict)
    """What this rank runs with. See machines.describe_machine."""


def start_timeout() -> float:
    """Return the seconds that each step of the start may take: 50, unless DCLR_START_TIMEOUT is set.

    The steps are: reach rank 0, wait until all ranks have connected, connect the ranks with each other.

    Raises:
        UserError: DCLR_START_TIMEOUT is not a positive number.
    """
    given = os.environ.get("DCLR_START_TIMEOUT", "50")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"DCLR_START_TIMEOUT is {given!r}, but must be a positive number of seconds, such as 300")
    return seconds


def several_processes() -> bool:
    """Return whether the launcher started more than one process, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launcher_hosts_store() -> bool:
    """Return whether torchrun hosts the store. Otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def master() -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the launcher did not set them.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}, but with several processes they must be the address "
            "of rank 0: start with deepspeed, torchrun or srun, which set them"
        )
    return host, int(port)


def open_store(about: Mapping[str, str]) -> tuple[dist.TCPStore, Peer]:
    """Connect to the run's store. Rank 0 hosts the store, unless torchrun does.

    Args:
        about: what the other ranks should know of this rank's machine.

    Returns:
        The store, and what the other ranks should know of this one. The store's calls never wait for a key for
        longer than `start_timeout`, but a call can hang if the network fails.

    Raises:
        NotConnected: the port is in use, or this machine cannot reach rank 0.
        UserError: see master and start_timeout.
    """
    host, port = master()
    seconds = start_timeout()
    wait = timedelta(seconds=seconds)
    try:
        if launched_rank() == 0 and not launcher_hosts_store():
            # The process group of this process later shares this server (multi_tenant).
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True, timeout=wait
            )
            address = reach(host, port, seconds)
        else:
            address = reach(host, port, seconds)
            # If the port belongs to another program, the constructor waits for ever.
            with Deadline(seconds, f"{host}:{port} does not answer as a run does: another program may have that port"):
                store = dist.TCPStore(host, port, is_master=False, timeout=wait)
    except RuntimeError as error:
        raise connection_error(error) from None
    return store, Peer(os.getpid(), socket.gethostname(), _network_stack(), address, dict(about))


def reach(host: str, port: int, seconds: float) -> str:
    """Wait until `host` accepts a connection at `port`. Return the IP address under which it was reached.

    torch's TCPStore would wait too, but for up to twice as long, and it prints 20 lines for each attempt.

    Raises:
        NotConnected: `host` cannot be resolved, or accepted no connection within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(left, _ATTEMPT))) as connection:
                return str(connection.getpeername()[0])
        except socket.gaierror as error:
            raise NotConnected(
                f"MASTER_ADDR is {host}, which {socket.gethostname()} cannot resolve ({error.strerror}): give the "
                "address of rank 0's machine: deepspeed --master_addr 10.0.0.1, or MASTER_ADDR=10.0.0.1 before srun"
            ) from None
        except OSError as error:
            if left < _ATTEMPT / 10:
                raise NotConnected(
                    f"rank {launched_rank()} on {socket.gethostname()} cannot reach rank 0 at {host}:{port} within "
                    f"{seconds:.0f} s ({error.strerror or error}): rank 0 failed at its start (its output says why), "
                    f"MASTER_ADDR is wrong, or a firewall closes the port; {_MORE_TIME}"
                ) from None
            time.sleep(min(0.05, left))


def connection_error(error: RuntimeError) -> NotConnected:
    """Return the error in one line that replaces an error of torch, raised when the processes connect."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    reason, program = first_line(error)[:160], f"{running()}.py"
    if "EADDRINUSE" in str(error):
        return NotConnected(
            f"the processes of this run cannot connect at {host}:{port}: the port is in use (EADDRINUSE). An earlier "
            f"run may still be there: find it with pgrep -af {program} and end it. If it is another run, choose "
            f"another port: deepspeed --master_port {port + 1} {program} ..., or MASTER_PORT={port + 1} before srun or "
            "mpirun"
        )
    return NotConnected(
        f"rank {launched_rank()} on {socket.gethostname()} cannot connect to the other ranks through "
        f"{_interface_in_use()} ({reason}): the network or a firewall between the machines may refuse it; "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose another interface"
    )


def connection_timeout() -> Deadline:
    """Return a deadline for the time in which gloo or NCCL connect the ranks with each other."""
    seconds = start_timeout()
    return Deadline(
        seconds,
        f"rank {launched_rank()} on {socket.gethostname()} did not connect to the other ranks through "
        f"{_interface_in_use()} within {seconds:.0f} s: a firewall between the machines must let all ports pass; "
        f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose another interface; {_MORE_TIME}",
    )


def choose_interface(peers: list[Peer]) -> str:
    """Let gloo and NCCL use the network interface of this machine that reaches the other machines.

    A variable that the user has set stays. With one machine nothing is set: its ranks use the loopback interface.

    Args:
        peers: all ranks, in rank order. Empty with one process.

    Returns:
        One line that says what was chosen, or "" with one machine.
    """
    machines = len({peer.machine for peer in peers})
    if machines <= 1:
        return ""
    # MASTER_ADDR may be a name that is 127.0.1.1 on the machine of rank 0. The other machines know its real address.
    address = next((peer.master for peer in peers if not _is_loopback(peer.master)), None)
    name = interface_towards(address) if address else None
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # NCCL takes a prefix without "=". It knows no alias names such as eth0:1.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=" + name.partition(":")[0])
    return f"{machines} machines; rank {launched_rank()} on {socket.gethostname()} uses {_interface_in_use()}"


def interface_towards(address: str) -> str | None:
    """Return the name of the network interface that reaches an IP address. None: it cannot be found.

    If the address belongs to this machine, return the interface that has it.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # UDP: this chooses a route and sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        # A link-local address ends with %eth0.
        if any(found.address.partition("%")[0] == own.partition("%")[0] for found in addresses):
            return name
    return None


_MORE_TIME = "if a slow file system delays the start, set DCLR_START_TIMEOUT=300 (seconds)"


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


def _interface_in_use() -> str:
    return os.environ.get("GLOO_SOCKET_IFNAME") or "the default network interface"


def _network_stack() -> str:
    """Return a value that is the same for two processes if the loopback interface connects them."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()
