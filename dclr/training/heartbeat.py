"""A run notices within a minute that one of its processes is gone, and ends by naming it.

A process that is killed says nothing, and the others would wait for it in a collective: with NCCL for ever, with gloo until a connection
breaks, by an error that names a port. So a thread of every rank gives a sign of life to the store that the ranks met at. Rank 0's watches
all others and theirs watch rank 0; whoever fails in Python leaves its last words there.
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

BEAT = 3.0
"""Seconds between two signs of life."""

LIMIT = 30.0
"""Seconds without one after which a rank counts as dead. Threads get their turn while the main thread computes, waits or writes; only
what keeps Python's lock for so long could be mistaken for death."""

STATUS = 1
"""The exit status of the ranks that are left."""

_COURTESY = 5.0
"""Seconds that the other ranks leave to rank 0 to say why the run ends: a launcher kills all at the first exit."""


class Lifeline:
    """Entered while the ranks work together. With one process it does nothing."""

    def __init__(self, beat: float = BEAT, limit: float = LIMIT) -> None:
        self._beat, self._limit = beat, limit
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lifeline":
        if distributed.world_size() > 1:
            # A connection of its own: a store's client serves one call at a time, and the main thread may wait in one.
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._limit))
            # torchrun keeps its store when it starts all ranks anew.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"dclr/lifeline/{restart}", store)
            self._sign(0)
            distributed.gather_objects(None)  # all have given their first one
            self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None or isinstance(error, Stopped):
            distributed.gather_objects(None)  # rank 0, which may keep the store, must not leave before the others have
        else:
            if _lost_connection(error):
                # Somebody else is gone: the thread finds out who, says so and ends this process.
                self._thread.join(self._limit + 3 * self._beat + _COURTESY)
            self._last_words(error)
        self._leaving.set()
        self._thread.join()

    def _sign(self, number: int) -> None:
        self._store.set(f"alive/{distributed.rank()}", f"{number} {os.getpid()} {socket.gethostname()}")

    def _last_words(self, error: BaseException) -> None:
        """For the other ranks. Of several, the first counts."""
        if isinstance(error, UserError):
            words = {"status": 2, "message": str(error)}
        else:
            reason = " ".join(str(error).split())[:300]
            rank, name = distributed.rank(), type(error).__name__
            words = {
                "status": STATUS,
                "message": f"rank {rank} has failed ({name}: {reason}); its own output says where",
            }
        try:
            self._store.compare_set("end", "", json.dumps(words))
        except RuntimeError:  # the store is gone, and with it rank 0: there is nobody to tell
            return

    def _watch(self) -> None:
        watched = range(1, distributed.world_size()) if distributed.rank() == 0 else range(1)
        last, number = dict.fromkeys(watched, ("", time.monotonic())), 0
        while not self._leaving.wait(self._beat):
            number += 1
            try:
                self._sign(number)
                if self._store.check(["end"]):
                    words = json.loads(self._store.get("end"))
                    self._end(words["message"], words["status"])
                for rank in watched:
                    sign = self._store.get(f"alive/{rank}").decode()
                    if sign != last[rank][0]:
                        last[rank] = sign, time.monotonic()
                    elif time.monotonic() - last[rank][1] > self._limit:
                        self._end(self._obituary(rank, sign), STATUS)
            except RuntimeError:  # DistNetworkError and its kin: rank 0 keeps the store, or torchrun for it
                if not self._leaving.is_set():
                    self._end(
                        "rank 0 is gone: it was killed, or its machine cannot be reached; --resume goes on", STATUS
                    )

    def _obituary(self, rank: int, sign: str) -> str:
        _, process, host = sign.split(" ", 2)
        message = (
            f"rank {rank} is gone: process {process} on {host} has given no sign of life for {self._limit:.0f} s; "
            "it was killed (for want of memory?), or its machine cannot be reached; --resume goes on from the last checkpoint"
        )
        self._store.compare_set("end", "", json.dumps({"status": STATUS, "message": message}))
        return message

    def _end(self, message: str, status: int) -> None:
        """Ends this process, unless it leaves by itself: its main thread may wait for a rank that is gone, and cannot be interrupted."""
        if self._leaving.wait(0.0 if distributed.rank() == 0 else _COURTESY):
            return
        print(f"train.py: error: {message}", file=sys.stderr, flush=True)
        os._exit(status)


def _lost_connection(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone: torch has no type of its own for that on every backend."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "TCPStore", "Broken pipe")
    )
