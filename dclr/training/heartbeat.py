"""The heartbeat: a run notices within a minute that one of its ranks has failed, and ends with an error that names it.

A killed process sends nothing, and the other ranks would wait for it in a collective operation: for ever with NCCL, and
until a connection breaks with gloo, whose error names only a port. So a thread of each rank writes a heartbeat to the
TCPStore through which the ranks found each other. Rank 0 watches all other ranks, and the others watch rank 0. A rank
that fails in Python leaves its error message in the store.
"""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from dclr import distributed
from dclr.errors import UserError
from dclr.training.signals import Stopped

INTERVAL = 3.0
"""Seconds between two heartbeats."""

TIMEOUT = 30.0
"""Seconds without a heartbeat after which a rank counts as failed. The heartbeat thread runs while the main thread
computes, waits or writes. Only code that holds Python's lock for so long could look like a failed rank."""

STATUS = 1
"""Exit status of the ranks that remain."""

_RANK_ZERO_FIRST = 5.0
"""Seconds that the other ranks give rank 0 to print why the run ends. A launcher kills all ranks at the first exit."""

_PREFIX = "dclr/heartbeat"


class Heartbeat:
    """A context that is active while the ranks work together. With one process it does nothing.

    Args:
        interval: seconds between two heartbeats.
        timeout: seconds without a heartbeat after which a rank counts as failed.
    """

    def __init__(self, interval: float = INTERVAL, timeout: float = TIMEOUT) -> None:
        self._interval, self._timeout = interval, timeout
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        if distributed.world_size() > 1:
            # A connection of its own: a store's client serves one call at a time, and the main thread may wait in one.
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._timeout))
            # torchrun keeps its store when it restarts all ranks.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"{_PREFIX}/{restart}", store)
            self._write_heartbeat(0)
            distributed.gather_objects(None)  # waits until all ranks have written their first heartbeat
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None or isinstance(error, Stopped):
            # Rank 0 may host the store, so it must not leave before the other ranks have left.
            distributed.gather_objects(None)
        else:
            if _lost_connection(error):
                # Another rank has failed. The thread finds out which, prints it and ends this process.
                self._thread.join(self._timeout + 3 * self._interval + _RANK_ZERO_FIRST)
            self._leave_message(error)
        self._leaving.set()
        self._thread.join()

    def _write_heartbeat(self, number: int) -> None:
        self._store.set(f"alive/{distributed.rank()}", f"{number} {os.getpid()} {socket.gethostname()}")

    def _leave_message(self, error: BaseException) -> None:
        """Tell the other ranks why this rank ends. If several ranks fail, the first message counts."""
        if isinstance(error, UserError):
            message = {"status": 2, "message": str(error)}
        else:
            reason = " ".join(str(error).split())[:300]
            rank, name = distributed.rank(), type(error).__name__
            message = {
                "status": STATUS,
                "message": f"rank {rank} has failed ({name}: {reason}); its own output says where",
            }
        try:
            self._store.compare_set("end", "", json.dumps(message))
        except RuntimeError:  # the store is gone, and rank 0 with it: no rank is left to read the message
            return

    def _watch(self) -> None:
        watched = range(1, distributed.world_size()) if distributed.rank() == 0 else range(1)
        last, number = dict.fromkeys(watched, ("", time.monotonic())), 0
        while not self._leaving.wait(self._interval):
            number += 1
            try:
                self._write_heartbeat(number)
                if self._store.check(["end"]):
                    found = json.loads(self._store.get("end"))
                    self._end(found["message"], found["status"])
                for rank in watched:
                    heartbeat = self._store.get(f"alive/{rank}").decode()
                    if heartbeat != last[rank][0]:
                        last[rank] = heartbeat, time.monotonic()
                    elif time.monotonic() - last[rank][1] > self._timeout:
                        self._end(self._report_failed(rank, heartbeat), STATUS)
            except RuntimeError:  # such as DistNetworkError: rank 0, or torchrun for it, hosts the store
                if not self._leaving.is_set():
                    self._end(
                        "rank 0 has failed: it was killed, or its machine cannot be reached; use --resume to continue",
                        STATUS,
                    )

    def _report_failed(self, rank: int, heartbeat: str) -> str:
        _, process, host = heartbeat.split(" ", 2)
        message = (
            f"rank {rank} has failed: process {process} on {host} has sent no heartbeat for {self._timeout:.0f} s. "
            "It was killed (out of memory?), or its machine cannot be reached; use --resume to continue "
            "from the last checkpoint"
        )
        self._store.compare_set("end", "", json.dumps({"status": STATUS, "message": message}))
        return message

    def _end(self, message: str, status: int) -> None:
        """End this process, unless it ends by itself.

        Its main thread may wait for a failed rank in a call that cannot be interrupted.
        """
        if self._leaving.wait(0.0 if distributed.rank() == 0 else _RANK_ZERO_FIRST):
            return
        print(f"train.py: error: {message}", file=sys.stderr, flush=True)
        os._exit(status)


def _lost_connection(error: BaseException) -> bool:
    """Return whether a collective operation failed because another rank is gone. torch has no error type for it."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "TCPStore", "Broken pipe")
    )
