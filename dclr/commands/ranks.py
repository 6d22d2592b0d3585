"""The ranks of an evaluation: connect the processes that a launcher started, and choose the device of each."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from dclr import distributed
from dclr.training import connection, engine, machines
from dclr.training.heartbeat import Heartbeat
from dclr.training.signals import LauncherWatch

PATIENCE = timedelta(days=30)
"""Time that ranks wait for the slowest one. The heartbeat, and not this limit, notices a failed rank."""


@contextmanager
def connected_ranks() -> Iterator[torch.device]:
    """Connect the processes of this launch, if there are several, and give the device of this one.

    gloo connects them, also on GPUs: all that evaluation exchanges is on the CPU. Only rank 0 prints: the standard
    output of the other ranks is discarded. If a rank fails, the others end.

    Raises:
        UserError: the processes cannot connect; there are fewer GPUs than processes; the machines run other code or
            other packages.
    """
    if not connection.several_processes():
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    with ExitStack() as at_end, LauncherWatch(), Heartbeat(describe=machines.describe_machine) as heartbeat:
        warnings = machines.check_machines(heartbeat.peers)
        interface = connection.choose_interface(heartbeat.peers)
        device = engine.choose_device()
        if device.type == "cpu":
            distributed.share_cores()
        try:
            with connection.connection_timeout():
                dist.init_process_group("gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise connection.connection_error(error) from None
        at_end.callback(dist.destroy_process_group)  # after the heartbeat has ended on all ranks
        for line in warnings if distributed.rank() == 0 else []:
            print(f"warning: {line}", file=sys.stderr)
        with ExitStack() as silence:
            if interface and distributed.rank() == 0:
                print(interface, flush=True)
            if distributed.rank() > 0:
                silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
            yield device
