"""The heartbeat: a run notices within a minute that one of its ranks has failed, and ends with an error that names it.

A killed process sends nothing, and the other ranks would wait for it in a collective operation: for ever with NCCL, and
until a connection breaks with gloo, whose error names only a port. So a thread of each rank writes a heartbeat to the
run's TCPStore. Rank 0 watches all other ranks, and the others watch rank 0. A rank that fails in Python leaves its
error message in the store.

The heartbeat begins before the process groups exist, so it also covers a rank that fails while the run starts. If the
machine that hosts the store vanishes, calls to the store hang for a quarter of an hour. So only the heartbeat's thread
calls the store, and a second thread ends the process when the first one has waited too long (deadline.py).
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from types import TracebackType

import torch.distributed as dist

from dclr.distributed import launched_rank
from dclr.errors import NotConnected, UserError
from dclr.programs import running
from dclr.training.connection import (
    Peer,
    connection_error,
    launcher_hosts_store,
    master,
    open_store,
    several_processes,
    start_timeout,
)
from dclr.training.deadline import RANK_ZERO_FIRST, STATUS, Deadline, end_process
from dclr.training.signals import Stopped

INTERVAL = 3.0
"""Seconds between two heartbeats."""

TIMEOUT = 30.0
"""Seconds without a heartbeat after which a rank counts as failed. The heartbeat thread runs while the main thread
computes, waits or writes. Only code that holds Python's lock for so long could look like a failed rank."""

_START_INTERVAL = 0.05
"""Seconds between two calls to the store while ranks wait for each other at the start and at the end."""

_PREFIX = "dclr/heartbeat"

_REMEDIES = {"train": "use --resume to continue from the last checkpoint", "eval": "repeat the command"}
"""What the user can do after a rank has failed, by program."""


class Heartbeat:
    """A context that is active while the ranks work together. With one process it does nothing.

    It begins when all ranks have connected to the run's store, and ends when all ranks have ended it.

    Args:
        interval: seconds between two heartbeats.
        timeout: seconds without a heartbeat after which a rank counts as failed.
        describe: returns what the other ranks should know of this rank's machine (Peer.about).

    Attributes:
        peers: all ranks, in rank order. Empty with one process.

    Raises:
        NotConnected: this rank cannot connect to the others.
        UserError: see open_store.
    """

    def __init__(
        self,
        interval: float = INTERVAL,
        timeout: float = TIMEOUT,
        describe: Callable[[], dict[str, str]] = lambda: {},
    ) -> None:
        self.peers: list[Peer] = []
        self._interval, self._timeout, self._describe_machine = interval, timeout, describe
        self._rank, self._ranks = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
        self._connected, self._leaving = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._message: dict[str, str | int] | None = None
        """Why this rank ends, for the other ranks."""

    def __enter__(self) -> "Heartbeat":
        if several_processes():
            self._host, self._port = master()
            self._start_timeout = start_timeout()
            store, peer = open_store(self._describe_machine())
            # torchrun keeps its store when it restarts all ranks.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"{_PREFIX}/{restart}", store)
            try:
                self._register(peer)
            except RuntimeError as error:  # rank 0 has ended since
                raise connection_error(error) from None
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
            self._connected.wait()  # or the thread ends the process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is not None and not isinstance(error, Stopped):
            if _lost_connection(error):
                # Another rank has failed. The thread finds out which, prints it and ends this process.
                self._thread.join(self._timeout + 3 * self._interval + RANK_ZERO_FIRST)
            self._message = self._describe(error)
        self._leaving.set()
        self._thread.join()

    def _register(self, peer: Peer) -> None:
        """Write this rank's description to the store.

        The port may belong to another run, whose ranks must not read messages of this one.
        """
        own = json.dumps(asdict(peer))
        if launcher_hosts_store():
            self._store.set(f"peer/{self._rank}", own)
        elif self._store.compare_set(f"peer/{self._rank}", "", own).decode() != own:
            raise NotConnected(
                f"another run uses {self._host}:{self._port}: choose another port, for example "
                f"deepspeed --master_port {self._port + 1} {running()}.py ..., or MASTER_PORT={self._port + 1} before "
                "srun"
            )

    def _describe(self, error: BaseException) -> dict[str, str | int]:
        if isinstance(error, UserError):
            return {"status": 2, "message": str(error)}
        reason = " ".join(str(error).split())[:300]
        name = type(error).__name__
        return {
            "status": STATUS,
            "message": f"rank {self._rank} has failed ({name}: {reason}); its own output says where",
        }

    def _run(self) -> None:
        """Send and check heartbeats until the main thread leaves the context."""
        silent = (
            f"{self._host}:{self._port}, where the ranks of this run connect, has not answered rank {self._rank} on "
            f"{socket.gethostname()} for {self._timeout:.0f} s: the machine of rank 0 or the network has failed; "
            f"{_REMEDIES[running()]}"
        )
        watched = range(1, self._ranks) if self._rank == 0 else range(1)
        self._last = dict.fromkeys(watched, ("", time.monotonic()))
        self._number = 0
        try:
            with Deadline(self._timeout, silent) as self._deadline:
                while not self._leaving.wait(self._interval if self._connected.is_set() else _START_INTERVAL):
                    self._exchange()
                    self._deadline.extend()
                self._leave()
        except RuntimeError:  # such as DistNetworkError: rank 0, or torchrun for it, hosts the store
            self._end(
                f"rank 0 has failed: it was killed, or its machine cannot be reached; {_REMEDIES[running()]}", STATUS
            )
        except Exception as error:  # without this thread, a failed rank would not be noticed
            self._end(f"the heartbeat of rank {self._rank} has failed ({type(error).__name__}: {error})", STATUS)

    def _exchange(self) -> None:
        """Send a heartbeat and read those of the watched ranks. End the process if a rank has failed."""
        self._send()
        if self._store.check(["end"]):
            self._store.set(f"left/{self._rank}", "")
            found = json.loads(self._store.get("end"))
            self._end(found["message"], found["status"])
        if not self._connected.is_set():
            self._read_peers()
        silent = []
        for rank, (last, since) in self._last.items():
            heartbeat = self._store.get(f"alive/{rank}").decode() if self._store.check([f"alive/{rank}"]) else ""
            if heartbeat != last or self._store.check([f"left/{rank}"]):
                self._last[rank] = heartbeat, time.monotonic()
            elif time.monotonic() - since > (self._timeout if heartbeat else self._start_timeout):
                silent.append(rank)
        if silent:
            message = self._describe_silent(silent)
            self._store.compare_set("end", "", json.dumps({"status": STATUS, "message": message}))
            self._end(message, STATUS, silent)

    def _send(self) -> None:
        self._number += 1
        self._store.set(f"alive/{self._rank}", f"{self._number} {os.getpid()} {socket.gethostname()}")

    def _read_peers(self) -> None:
        """Let the main thread continue if all ranks have connected."""
        keys = [f"peer/{rank}" for rank in range(self._ranks)]
        if self._store.check(keys):
            found = [json.loads(self._store.get(key)) for key in keys]
            # A rank of another version of dclr may send more. machines.check_machines refuses it.
            known = {field.name for field in fields(Peer)}
            self.peers = [Peer(**{name: peer[name] for name in known & peer.keys()}) for peer in found]
            self._connected.set()

    def _describe_silent(self, ranks: list[int]) -> str:
        missing = [str(rank) for rank in ranks if not self._last[rank][0]]
        if missing:
            return (
                f"rank {', '.join(missing)} of {self._ranks} did not connect to {self._host}:{self._port} within "
                f"{self._start_timeout:.0f} s: it failed at its start (its output says why), or its machine cannot "
                "reach this address; if a slow file system delays the start, set DCLR_START_TIMEOUT=300 (seconds)"
            )
        _, process, host = self._last[ranks[0]][0].split(" ", 2)
        return (
            f"rank {ranks[0]} has failed: process {process} on {host} has sent no heartbeat for {self._timeout:.0f} s. "
            f"It was killed (out of memory?), or its machine cannot be reached; {_REMEDIES[running()]}"
        )

    def _leave(self) -> None:
        """Tell the other ranks that this one ends. A rank without an error waits for all other ranks."""
        if self._message is not None:
            try:
                # If several ranks fail, the first message counts.
                self._store.compare_set("end", "", json.dumps(self._message))
                self._store.set(f"left/{self._rank}", "")
                self._keep_store("left")
            except RuntimeError:  # the store is gone, and rank 0 with it: no rank is left to read the message
                pass
            return
        self._store.set(f"left/{self._rank}", "")
        while not self._all_have("left", range(self._ranks)):
            self._exchange()
            self._deadline.extend()
            time.sleep(_START_INTERVAL)
        self._store.set(f"gone/{self._rank}", "")
        self._keep_store("gone")

    def _keep_store(self, state: str, failed: Iterable[int] = ()) -> None:
        """Let rank 0, which hosts the store, wait until the other ranks have reached `state`, for at most 2 intervals.

        They are then "left", and have read why the run ends, or "gone", and do not call the store again.
        """
        others = set(range(1, self._ranks)) - set(failed)
        end = time.monotonic() + 2 * self._interval
        while self._rank == 0 and others and not self._all_have(state, others) and time.monotonic() < end:
            time.sleep(_START_INTERVAL)

    def _all_have(self, state: str, ranks: Iterable[int]) -> bool:
        return bool(self._store.check([f"{state}/{rank}" for rank in ranks]))

    def _end(self, message: str, status: int, failed: Iterable[int] = ()) -> None:
        """End this process, unless its main thread ends it with an error of its own.

        The main thread may wait for a failed rank in a call that cannot be interrupted.
        """
        if self._rank > 0:
            self._deadline.extend(RANK_ZERO_FIRST)
            self._leaving.wait(RANK_ZERO_FIRST)
        if self._message is None:
            end_process(message, status, lambda: self._keep_store("left", failed))


def _lost_connection(error: BaseException) -> bool:
    """Return whether a collective operation failed because another rank is gone. torch has no error type for it."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "TCPStore", "Broken pipe")
    )
