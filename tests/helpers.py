"""What several test modules share."""

import ctypes
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # for train.py and eval.py

from dclr.config import MethodConfig, ModelConfig, OptimConfig  # noqa: E402
from dclr.data.store import Store, check_sizes, load_index, open_store  # noqa: E402
from dclr.method import DCLR  # noqa: E402
from dclr.training.checkpoint import newest, read  # noqa: E402
from dclr.training.engine import read_ds_config  # noqa: E402
from kernels import Views  # noqa: E402

TIMES = ("milliseconds/", "samples_per_second", "data_wait_share", "memory/")  # what differs from run to run
CONFIGS = Path(__file__).parents[1] / "ds_configs"
MODEL = ModelConfig(backbone="r2plus1d_10", width=4)
METHOD = MethodConfig(queue_length=8, embedding_dim=32, mined_positives=2, key_momentum=0.5)
OPTIM = OptimConfig(batch_size=4, lr=0.1)


def children(process: int | str = "self") -> list[int]:
    """Processes that this one, or another, has started and that still run, whoever knows of them, and what those have started; without
    multiprocessing's own helper, which stays for good once a test has spawned a process."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                helper = b"resource_tracker" in Path(f"/proc/{child}/cmdline").read_bytes()
                if not helper and Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0] != "Z":
                    found += [child, *children(child)]
    return found


def crash() -> None:
    """As FFmpeg does on a file it cannot bear."""
    os.kill(os.getpid(), signal.SIGSEGV)


def loop() -> None:
    while True:
        pass


def block() -> None:
    """In C, with Python's lock held: no thread and no signal handler of the process gets a turn."""
    ctypes.PyDLL(None).usleep(100_000_000)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings by field name -> command line."""
    given = []
    for name, value in settings.items():
        flag = "--ds_config" if name == "ds_config" else ("--no-" if value is False else "--") + name.replace("_", "-")
        many = value if isinstance(value, list | tuple) else [] if isinstance(value, bool) else [value]
        given += [flag, *map(str, many)]
    return given


def read_store(folder: Path) -> Store:
    """Open the packed store in a folder as a run does: read its index, then compare the sizes of its shards."""
    opened = open_store(folder, load_index(folder))
    check_sizes(opened)
    return opened


# ---------------------------------------------------------------- networks


def make_views(seed: int) -> Views:
    rng = torch.Generator().manual_seed(seed)
    return Views(*(torch.randn(4, 3, 8, 32, 32, generator=rng) for _ in range(3)))


def make_method(**settings: Any) -> DCLR:
    torch.manual_seed(0)
    return DCLR(MODEL, replace(METHOD, **settings))


def float32_config(stage: int) -> dict:
    config = read_ds_config(CONFIGS / ("ddp.json", "zero1.json", "zero2.json")[stage])
    config["torch_autocast"]["enabled"] = False
    return config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------- runs


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without what is measured by the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def board(run: Path) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")]


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*"))


def assert_same_end(run: Path, other: Path) -> None:
    """Network, queue and pointer, batch statistics, momentum, numbers, TensorBoard: bit for bit."""
    (ours, state), (theirs, other_state) = (read(newest(r / "checkpoints")) for r in (run, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert state["step"] == other_state["step"]
    assert numbers(run) == numbers(other)
    assert board(run) == board(other)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and state of the newest checkpoint."""
    return read(newest(run / "checkpoints"))


def tensors_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: its `model` or its `momentum`."""
    return {key.removeprefix(name + "/"): tensor for key, tensor in saved(run)[0].items() if key.startswith(name + "/")}
