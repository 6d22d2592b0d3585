"""A rank that counts the bytes it sends in training steps, for benchmarks/communication.py.

    cd TREE; RANK=... PYTHONPATH=TREE python -P .../communication_worker.py TASK OUT

It imports the code of TREE, an older commit or today's. So this file uses only what both have. TASK is JSON, see
communication.py. Rank 0 writes what all ranks counted to OUT, in JSON.

Linux counts the bytes of each TCP connection (TCP_INFO). The count of a section of a step is taken between two moments
at which the connections are silent. So the counts include gloo's headers, and no byte is missing.
"""

import json
import os
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dclr import distributed
from dclr.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, PretrainConfig
from dclr.data.augmentation import PRETRAIN, draw_augmentation, to_augmentation
from dclr.data.samples import PairBatch
from dclr.kernels import ViewParams, Yuv420
from dclr.methods import METHODS
from dclr.report import Stopwatch
from dclr.training.engine import Engine, read_ds_config, resolve_precision, start_processes, stop_processes
from dclr.training.heartbeat import Heartbeat
from dclr.training.pretrain import Pretraining

BEATS = 4
"""Heartbeats in the measurement of a heartbeat."""


def socket_bytes() -> int:
    """Return the bytes that this process has sent over its open TCP connections."""
    sent = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # not a socket, not TCP, or closed by now
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans in linux/tcp.h
            sent += total - again
    return sent


def silent_socket_bytes() -> int:
    """Return `socket_bytes` once nothing has been sent for 30 ms, because written bytes are sent with a delay."""
    before = socket_bytes()
    while True:
        time.sleep(0.03)
        now = socket_bytes()
        if now == before:
            return now
        before = now


class Counter:
    """Bytes that this rank sends, by kind."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = defaultdict(int)
        self.row_bytes: dict[str, float] = {}  # of one clip, in the last call
        self._inner = 0

    @contextmanager
    def section(self, kind: str) -> Iterator[None]:
        """Count under `kind` what is sent inside the context, except in inner sections."""
        begin, inner = silent_socket_bytes(), self._inner
        yield
        sent = silent_socket_bytes() - begin
        self.sent[kind] += sent - (self._inner - inner)
        self._inner = inner + sent

    def wrap(self, module: Any, name: str, kind: Callable[[Tensor], str]) -> None:
        """Count what a function of a module sends. Its first argument chooses the kind."""
        function = getattr(module, name, None)
        if function is None:
            return

        def counted(rows: Tensor, *others: Any) -> Any:
            self.row_bytes[kind(rows)] = rows.nbytes / len(rows)
            with self.section(kind(rows)):
                return function(rows, *others)

        setattr(module, name, counted)


def kind_of_rows(rows: Tensor) -> str:
    """Return what these rows are, by their shape: (B, P, D) keys, (B, S, t, h, w) maps, else clips."""
    if rows.dim() == 3:
        return "keys"
    return "maps" if rows.dim() == 5 and 3 not in (rows.shape[1], rows.shape[4]) else "clips"


def make_batch(task: dict[str, Any]) -> PairBatch:
    """Return a micro-batch of frames of one size with random pixels, with random augmentations."""
    rng = np.random.default_rng(distributed.rank())
    B, T, H, W = (task[name] for name in ("batch", "T", "H", "W"))
    planes = [(H, W), *[((H + 1) // 2, (W + 1) // 2)] * 2]
    y, u, v = (torch.from_numpy(rng.integers(0, 256, (B, 2 * T + 2, *size), np.uint8)) for size in planes)
    flags = torch.zeros(B, dtype=torch.bool)
    query, query_still, key, key_still = (
        to_augmentation([draw_augmentation(rng, H, W, PRETRAIN) for _ in range(B)]) for _ in range(4)
    )
    size = (task["side"], task["side"])
    params = ViewParams(query, query_still, size), ViewParams(key, key_still, size)
    return PairBatch(Yuv420(y, u, v, flags, flags), *params, torch.arange(B), {})


def key_boxes(batch: PairBatch) -> list[list[list[int]]]:
    """Return the boxes of each key clip and of its still: top, left, height and width."""
    return torch.stack([batch.key_params.clip.box, batch.key_params.still.box], dim=1).tolist()


def count(task: dict[str, Any], variant: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Make training steps of one variant and return the bytes that this rank sends in a step, means over the steps."""
    torch.manual_seed(0)
    config = PretrainConfig(
        data=DataConfig(clip_length=task["T"], crop_size=task["side"]),
        model=ModelConfig(backbone=task["backbone"], width=task["width"]),
        method=MethodConfig(method=variant["method"], queue_length=task["queue_length"], fill_steps=0),
        optim=OptimConfig(batch_size=task["batch"] * distributed.world_size()),
    )
    network = METHODS[config.method.method].build(config)
    ds_config = read_ds_config(Path("ds_configs", variant["ds_config"]))
    precision = resolve_precision(ds_config, device)
    engine = Engine(network, ds_config, config.optim, device)
    engine.train()
    samples: Any = SimpleNamespace(videos=range(config.optim.batch_size))
    form = {} if variant["form"] is None else {"crops": variant["form"] == "crops"}
    training = Pretraining(network, engine, config, samples, None, **form)
    batch, watch, exchange = make_batch(task), Stopwatch(device), distributed.DelayedSum()
    counter = Counter()
    for step in range(1 + task["steps"]):
        if step == 1:  # the first step also creates connections
            counter.sent.clear()
        training.begin_step(step)
        with counting(counter), counter.section("other"):
            _, loss = training.forward(batch, step, step, watch)
            assert loss is not None
            with counter.section("gradients"):
                engine.backward(loss)
            with counter.section("parameters" if "zero" in variant["ds_config"] else "gradients"):
                engine.step()
            training.after_update(watch)
            with counter.section("exchange"):
                exchange.add(0, 0)
                exchange.finish()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {
        "sent": {kind: total / task["steps"] for kind, total in counter.sent.items()},
        "row_bytes": counter.row_bytes,
        "key_boxes": key_boxes(batch),
        "parameters": parameters,
        "precision": precision,
        "view_itemsize": engine.view_dtype.itemsize,
    }


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Count what is sent inside the context by the functions that exchange clips, keys and maps."""
    names = ("gather_batch", "all_to_all")
    real = {name: getattr(distributed, name) for name in names if hasattr(distributed, name)}
    for name in real:
        counter.wrap(distributed, name, kind_of_rows)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(distributed, name, function)


def count_heartbeat(start: Callable[[], torch.device]) -> tuple[torch.device, float]:
    """Connect the ranks by `start` and return this rank's device, and the bytes that it sends for a heartbeat."""
    with Heartbeat(interval=0.5):
        device = start()
        time.sleep(1)  # until only heartbeats are sent
        begin = socket_bytes()
        time.sleep(0.5 * BEATS)
        return device, (socket_bytes() - begin) / BEATS


def main() -> None:
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    device, heartbeat = count_heartbeat(start_processes)
    heartbeats = distributed.gather_objects(heartbeat)
    variants = [
        variant | {"ranks": distributed.gather_objects(count(task, variant, device))} for variant in task["variants"]
    ]
    if distributed.rank() == 0:
        out.write_text(json.dumps({"heartbeat": heartbeats, "variants": variants}))
    stop_processes()


if __name__ == "__main__":
    main()
