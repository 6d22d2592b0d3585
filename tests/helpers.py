"""Functions and settings that several test modules use."""

import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # for train.py and eval.py

from dclr import distributed  # noqa: E402
from dclr.commands import train  # noqa: E402
from dclr.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, PretrainConfig  # noqa: E402
from dclr.data.encode import write_video  # noqa: E402
from dclr.data.store import Store, load_index, open_store  # noqa: E402
from dclr.data.store_damage import check_sizes  # noqa: E402
from dclr.kernels import Views  # noqa: E402
from dclr.methods import DCLR, METHODS, Method  # noqa: E402
from dclr.training.checkpoint import newest, read  # noqa: E402
from dclr.training.engine import read_ds_config  # noqa: E402
from dclr.training.exchange import send_views  # noqa: E402

TIMES = ("milliseconds/", "samples_per_second", "data_wait_share", "memory/")  # metrics that differ between equal runs
CONFIGS = Path(__file__).parents[1] / "ds_configs"
MODEL = ModelConfig(backbone="r2plus1d_10", width=4)
METHOD = MethodConfig(queue_length=8, embedding_dim=32, mined_positives=2, key_momentum=0.5)
OPTIM = OptimConfig(batch_size=4, lr=0.1)


def children(process: int | str = "self") -> list[int]:
    """Return the ids of all running descendants of a process.

    multiprocessing's resource tracker and the server of `fork` are not included. They run until the end.
    """
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                helper = b"resource_tracker" in command or b"forkserver" in command
                if not helper and Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0] != "Z":
                    found += [child, *children(child)]
    return found


def crash() -> None:
    """End this process with SIGSEGV, as FFmpeg does on some faulty files."""
    os.kill(os.getpid(), signal.SIGSEGV)


def loop() -> None:
    while True:
        pass


def block() -> None:
    """Sleep in C and hold Python's lock, so that no other thread and no signal handler of the process can run."""
    ctypes.PyDLL(None).usleep(100_000_000)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Return the command line for settings by field name."""
    given = []
    for name, value in settings.items():
        flag = "--ds_config" if name == "ds_config" else ("--no-" if value is False else "--") + name.replace("_", "-")
        many = value if isinstance(value, list | tuple) else [] if isinstance(value, bool) else [value]
        given += [flag, *map(str, many)]
    return given


def read_store(folder: Path) -> Store:
    """Open the packed store in a folder as a run does: read its index, then check the sizes of its shards."""
    opened = open_store(folder, load_index(folder))
    check_sizes(opened)
    return opened


# ---------------------------------------------------------------- networks


def make_views(seed: int) -> Views:
    rng = torch.Generator().manual_seed(seed)
    rgb, static, dynamic = (torch.randn(4, 3, 8, 32, 32, generator=rng) for _ in range(3))
    return Views(rgb, static[:, :, :1].expand(-1, -1, 8, -1, -1), dynamic)


def share(network: Method, seeds: tuple[int, int], step: int) -> tuple[Views, Views]:
    """Return the views of `make_views` that this rank encodes: query clips of the first seed, key clips of the second.

    Clips that the network's method shuffles come from the ranks that have them.
    """
    size = 4 // distributed.world_size()
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    views = {
        kind: Views(*(view[own] for view in make_views(seed)))
        for kind, seed in zip(("query", "key"), seeds, strict=True)
    }
    shuffle = network.shuffle(size, step)
    if shuffle is not None:
        views |= send_views(shuffle, views, network.shuffled, ("static", "dynamic"))
    return views["query"], views["key"]


def make_network(**settings: Any) -> DCLR:
    """Return DCLR, or one of the methods that extend it, for the clips of `make_views`."""
    torch.manual_seed(0)
    method = replace(METHOD, **settings)
    config = PretrainConfig(data=DataConfig(clip_length=8), model=MODEL, method=method, optim=OPTIM)
    return cast(DCLR, METHODS[method.method].build(config))


def float32_config(stage: int) -> dict:
    config = read_ds_config(CONFIGS / ("ddp.json", "zero1.json", "zero2.json")[stage])
    config["torch_autocast"]["enabled"] = False
    return config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start work(*arguments) in a new process.

    The process is forked from a server that has imported everything once, because these imports take longer than most
    tests of several processes. The server itself computes nothing and starts no thread.
    """
    context = multiprocessing.get_context("forkserver")
    own = ["dclr.commands.train", "dclr.data.encode", "dclr.methods", "dclr.report", "dclr.training.engine"]
    own += ["dclr.evaluation.accuracy", "dclr.evaluation.background", "dclr.evaluation.predictions"]
    context.set_forkserver_preload([*own, "deepspeed", "pytest", "setuptools", "tensorboard.summary"])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def redirect_output(path: Path, errors: Path | None = None) -> None:
    """Let this process and the processes that it starts write their output to a file.

    Args:
        errors: the file for what is written to stderr; None writes it to the same file.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if errors else file, 2)


def run_train(arguments: list[str], environment: dict[str, str], output: Path | None) -> None:
    """Run train.py in this forked process, which leads a session of its own. Write the output to a file.

    With None, the output of this process stays as it is.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    if output is not None:
        redirect_output(output)
    sys.argv = ["train.py", *arguments]
    sys.exit(train.start())


def _run_program(words: list[str], environment: dict[str, str], folder: Path, output: Path, errors: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    redirect_output(output, errors)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def start_program(
    *words: str | Path, environment: dict[str, str], folder: Path = REPOSITORY, output: Path, errors: Path
) -> BaseProcess:
    """Start a Python program with its arguments in a forked process, on one thread. See `fork`.

    A new interpreter would do the same after 4 seconds of imports.
    """
    environment = {**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return fork(_run_program, [str(word) for word in words], environment, folder, output, errors)


def run_program(
    *words: str | Path, environment: dict[str, str], folder: Path = REPOSITORY, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end. See `start_program`."""
    with tempfile.TemporaryDirectory() as made:
        output, errors = Path(made) / "output", Path(made) / "errors"
        process = start_program(*words, environment=environment, folder=folder, output=output, errors=errors)
        process.join(timeout)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, output.read_text(), errors.read_text())


def _as_rank(rank: int, port: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, *arguments)


def on_two_ranks(work: Callable[..., None], *arguments: object) -> list[int | None]:
    """Run work(rank, ...) in two new processes and return their exit codes."""
    port = free_port()
    processes = [fork(_as_rank, rank, port, work, arguments) for rank in range(2)]
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    for process in processes:
        process.kill()  # a rank that waits for one that failed
        process.join()
    return [process.exitcode for process in processes]


def launcher_command(launcher: str) -> list[str]:
    """Return the command by which deepspeed or torchrun starts pretraining in two processes.

    deepspeed starts it without a subcommand and torchrun with one, so that both ways are tested.
    """
    program = str(Path(sys.executable).parent / launcher)
    processes = "--num_accelerators" if launcher == "deepspeed" else "--nproc_per_node"
    subcommand = [] if launcher == "deepspeed" else ["pretrain"]
    return [program, processes, "2", "--master_port", str(free_port()), "train.py", *subcommand]


# ---------------------------------------------------------------- runs


def numbers(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def board(run: Path) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")]


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*"))


def assert_same_end(run: Path, other: Path) -> None:
    """Check that two runs ended bit for bit alike: last checkpoint, metrics and TensorBoard.

    A checkpoint holds the network, the queue and its pointer, the batch statistics and the momentum.
    """
    (ours, state), (theirs, other_state) = (read(newest(r / "checkpoints")) for r in (run, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert state["step"] == other_state["step"]
    assert numbers(run) == numbers(other)
    assert board(run) == board(other)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the state of the newest checkpoint."""
    return read(newest(run / "checkpoints"))


def tensors_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the newest checkpoint's tensors under `model` or `momentum`, without that prefix."""
    return {key.removeprefix(name + "/"): tensor for key, tensor in saved(run)[0].items() if key.startswith(name + "/")}


# ---------------------------------------------------------------- data sets


def make_list(folder: Path, **splits: list[tuple[str, int]]) -> Path:
    """Write list files of (path, label), and a video of noise for each path that does not begin with "lost"."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = dict.fromkeys(path for entries in splits.values() for path, _ in entries)
    for seed, path in enumerate(paths):
        if not path.startswith("lost"):
            frames = np.random.default_rng(seed).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
            write_video(folder / path, frames)
    for split, entries in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"{path} {label}\n" for path, label in entries))
    (folder / "classes.txt").write_text("run\njump\nsit\n")
    return folder


def touch(root: Path, *paths: str) -> None:
    """Make empty files below a folder, with the folders that they need."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write_lines(root: Path, path: str, *lines: str) -> Path:
    """Write a text file below a folder and return its path."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("".join(f"{line}\n" for line in lines))
    return root / path


# ---------------------------------------------------------------- HTML pages


class PageReader(HTMLParser):
    """The content of an HTML page. Raises AssertionError if its elements are not nested and closed.

    Attributes:
        title: the text of its title.
        headings: the texts of h1 and h2.
        cells: the texts of th and td.
        sources: the addresses of all that the page shows or links to.
        descriptions: the texts in place of pictures.
    """

    WITHOUT_END = ("meta", "br", "img")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.title, self._open = "", list[str]()
        self.headings, self.cells = list[str](), list[str]()
        self.sources, self.descriptions = list[str](), list[str]()
        self.feed(content)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                self.sources.append(value or "")
            elif name == "alt":
                self.descriptions.append(value or "")
        if tag in self.WITHOUT_END:
            return
        self._open.append(tag)
        if tag in ("h1", "h2"):
            self.headings.append("")
        elif tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> inside of {self._open}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "title" in self._open:
            self.title += data
        if {"h1", "h2"} & set(self._open):
            self.headings[-1] += data
        if {"th", "td"} & set(self._open):
            self.cells[-1] += data
