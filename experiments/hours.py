"""Expected hours of the stages of an experiment on GPUs, estimated from one measured run.

Measured on one H200: a whole pretraining run of DCLR, read from a store, in samples a second
(benchmarks/results/nvidia-h200/train.json). It includes reading, logging and checkpoints, with 128 samples a step.

Estimates, each of which may be wrong by a factor of two:

- Other work takes time in proportion to its arithmetic: a method's GFLOP a sample (docs/methods.md), three forward
  passes to finetune on a clip, one to train a linear classifier on it or to evaluate it. Steps with fewer samples are
  as efficient.
- A 24 GB card is an RTX 4090. Its peak in bfloat16 and its memory bandwidth are 0.167 and 0.210 of an H200's, and the
  smaller ratio counts. If a step does not fit its memory by the count of benchmarks/memory.py, it runs with
  --recompute, and takes 1.2 times as long (docs/performance.md).
- Eight H200 share a batch. The time of the communication, from the model in benchmarks/communication.py, is added to
  the time of a share. Steps of 8 samples a GPU have not been measured, and are probably less efficient than steps of
  128 samples.
- Each core decodes as many videos a second as were measured on Kinetics clips (benchmarks/results/cpu/catalog.json).
  Each video is decoded once for the check and once for the store.
- Each command takes half a minute more, to start and to compile the network.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks import communication, harness, memory

GFLOP = {"moco": 157, "dclr": 444, "dclr-simclr": 580, "videomoco": 247, "simsiam": 235}
"""GFLOP of a pretraining sample of 16 x 112 x 112 with r2plus1d_10, forward and backward, as in docs/methods.md."""
FORWARD_GFLOP = 39.4
"""GFLOP of one forward pass of a clip."""

START_S = 30.0
"""Seconds that a command takes in addition to its work (an assumption)."""
RECOMPUTE = 1.2
"""Time of a step with --recompute relative to one without (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs that run a command."""

    name: str
    gpus: int
    speed: float
    """relative to an H200"""
    gigabytes: int
    """memory of a GPU"""
    cores: int


RTX_4090 = min(165.2 / 989, 1.008 / 4.8)
"""Speed of an RTX 4090 relative to an H200: the smaller ratio of their peaks, bfloat16 products without sparsity in
TFLOP/s and memory bandwidth in TB/s, from NVIDIA's data sheets."""

MACHINES = (
    Machine(name="one H200", gpus=1, speed=1.0, gigabytes=140, cores=16),
    Machine(name="one 24 GB card", gpus=1, speed=RTX_4090, gigabytes=24, cores=16),
    Machine(name="eight H200", gpus=8, speed=1.0, gigabytes=140, cores=128),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a command computes."""

    samples: int = 0
    """pretraining samples, or clips"""
    gflop: float = 0.0
    """GFLOP of a sample"""
    batch: int = 0
    """samples of a training step on all GPUs; 0 for a command that does not train"""
    network: str = ""
    """the row of benchmarks/results/memory.json: DCLR, MoCo or finetune; "" without a backward pass"""
    decoded: int = 0
    """videos to decode"""


@cache
def result(path: str) -> Any:
    return json.loads((harness.RESULTS / path).read_text())


def measured_rate() -> float:
    """Return the samples a second of the measured run."""
    (row,) = (row for row in result("nvidia-h200/train.json")["rows"] if row["source"] == "store")
    return row["samples_per_second"]


def machine_here(gpus: int) -> Machine:
    """Return this machine. Its speed is that of an H200, or of an RTX 4090 if its GPU has at most 40 GB."""
    import torch

    gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 140
    speed = 1.0 if gigabytes > 40 else RTX_4090
    return Machine(
        name="here", gpus=gpus, speed=speed, gigabytes=int(gigabytes), cores=len(os.sched_getaffinity(0))
    )  # fmt: skip


def recomputes(work: Work, machine: Machine) -> bool:
    """Return whether a step needs --recompute to fit into the memory of a GPU, by the count of benchmarks/memory.py."""
    if not work.network or not work.batch:
        return False
    counted = result("memory.json")
    wanted = {"backbone": "r2plus1d_10", "method": work.network, "recompute": False}
    (row,) = (row for row in counted["rows"] if wanted.items() <= row.items())
    return -(-work.batch // machine.gpus) > memory.largest_batch(row, machine.gigabytes, memory.margin(counted))


def communication_seconds(work: Work, machine: Machine) -> float:
    """Return the seconds that the GPUs of one machine exchange data in a step, by the model of communication.py."""
    if machine.gpus == 1 or not work.batch:
        return 0.0
    counted = result("cpu/communication.json")
    clip, clips = counted["clip_bytes"], work.batch / machine.gpus
    pretrains = work.network != "finetune" and bool(work.network)
    sent = communication.sent_bytes(
        machine.gpus, 1, clip=clips * clip["crops"], key=clips * clip["key"], maps=clips * clip["maps"],
        parameters=counted["parameters"], zero=False,
    )  # fmt: skip
    kinds = ("clips", "keys", "maps", "gradients") if pretrains else ("gradients",)
    network = communication.NETWORKS["InfiniBand"]  # not used within one machine
    return sum(communication.transfer_seconds(kind, sent[kind], machine.gpus, network) for kind in kinds)


def seconds(work: Work, machine: Machine) -> float:
    """Return the expected seconds of a command. See the top of the file."""
    rate = measured_rate() * GFLOP["dclr"] * machine.speed * machine.gpus  # GFLOP a second
    computing = work.samples * work.gflop / rate * (RECOMPUTE if recomputes(work, machine) else 1.0)
    exchanging = work.samples / work.batch * communication_seconds(work, machine) if work.batch else 0.0
    decoding = work.decoded / (result("cpu/catalog.json")["verified_a_second"] * machine.cores)
    return START_S + computing + exchanging + decoding


def hours(works: Sequence[Work], machine: Machine) -> float:
    """Return the expected hours of commands that run one after the other."""
    return sum(seconds(work, machine) for work in works) / 3600
