"""What does DeepSpeed cost or save? Its stages 0, 1 and 2 beside torch's DistributedDataParallel, on the same steps in the same run.

    python -m benchmarks.sharding                   a process for each GPU; without one, two processes and a small network
    python -m benchmarks.sharding --processes 4     other than that; at most one for each GPU
    python -m benchmarks.sharding --rounds 5        more launches of each

Time to expect: 5 to 8 minutes on two cores; on GPUs about 8 (an estimate: none has run it yet). Most of a launch is its start.

Providers:
    DDP        DCLR under DistributedDataParallel, with torch.autocast and torch.optim.SGD. Buffers are not broadcast at every step, which
               would send the whole queue, and gradients are views of the buckets: its best settings for this network
    stage 0    the same network under dclr.training.engine with ds_configs/ddp.json: DeepSpeed without sharding
    ZeRO-1     with ds_configs/zero1.json: optimizer state sharded
    ZeRO-2     with ds_configs/zero2.json: gradients sharded too

A step is forward, backward, SGD and the key network's update, on views that are on the device beforehand: the same for all. Backbones
are not compiled. Whatever DeepSpeed changes in a process is gone with it: every turn of a provider is a launch of its own (torchrun),
and a round is a turn of each, in an order that rotates. A ratio compares turns of one round. Peak memory is the most that any process
held: allocated on a GPU, resident on a CPU, with the libraries.

All must learn the same: their losses, means over processes, are compared step by step in float32; where steps are timed in bfloat16, in a
launch of each for that alone.

Prints a table and which is fastest, writes sharding.json and sharding.png into results/DEVICE.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from dclr import distributed
from dclr.config import MethodConfig, ModelConfig, OptimConfig, RunConfig
from dclr.method import DCLR, Output
from dclr.report import environment, peak_memory_gib
from dclr.training import engine
from dclr.training.engine import Engine, read_ds_config, settle_precision
from kernels import Views

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "ds_configs"
DS_CONFIGS = {"DDP": "ddp.json", "stage 0": "ddp.json", "ZeRO-1": "zero1.json", "ZeRO-2": "zero2.json"}
"""Providers, and where precision and sharding stand; DDP reads the precision only."""

WARMUP, CHECKED_STEPS = 3, 8
LOSS_TOLERANCE = 1e-4
"""Relative, in float32: providers add up gradients in other orders, and steps carry roundings on."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every provider trains."""

    backbone: str = "r2plus1d_10"
    width: int = 64
    T: int = 16
    side: int = 112
    batch: int = 40  # of one process
    queue_length: int = 2048
    steps: int = 30  # of a turn, after the first few
    float32: bool = False  # whatever the configuration says


TASKS = {"cuda": Task(), "cpu": Task(width=16, T=8, side=32, batch=16, queue_length=512, steps=20)}
ROUNDS = 3


# -------------------------------------------------------------------------------------------- what one launched process does


def train(provider: str, task: Task, device: torch.device) -> dict[str, Any]:
    """A turn: the task's steps by `provider` on this process's share; milliseconds by step, losses (means over processes), peak memory."""
    torch.manual_seed(0)
    method = DCLR(ModelConfig(backbone=task.backbone, width=task.width), MethodConfig(queue_length=task.queue_length))
    config = read_ds_config(CONFIGS / DS_CONFIGS[provider])
    if task.float32:
        config["torch_autocast"] = {"enabled": False}
    precision = settle_precision(config, device)
    autocast = config["torch_autocast"]["enabled"]
    optim = OptimConfig(batch_size=task.batch * distributed.world_size())
    step = (ddp_step if provider == "DDP" else engine_step)(method, config, optim, device)
    method.enqueued.fill_(task.queue_length)  # rows are mined from the first step on
    query, key = make_views(task, device, torch.bfloat16 if autocast else torch.float32)

    losses: list[Tensor] = []

    def call() -> None:
        losses.append(step(query, key, len(losses)))

    harness.consecutive(call, device, WARMUP)
    milliseconds = harness.consecutive(call, device, task.steps)
    return {
        "precision": precision,
        "ms": milliseconds,
        "losses": distributed.mean_over_ranks(torch.stack(losses).float()).tolist(),
        "peak_gib": max(distributed.gather_objects(peak_memory_gib(device))),
    }


Step = Callable[[Views, Views, int], Tensor]
"""A training step on the views of query and key clips, and its number; returns the loss."""


def ddp_step(method: DCLR, config: dict[str, Any], optim: OptimConfig, device: torch.device) -> Step:
    enabled = config["torch_autocast"]["enabled"]
    method.to(device)
    parallel = DistributedDataParallel(
        method,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    optimizer = torch.optim.SGD(
        method.query.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )

    def step(query: Views, key: Views, number: int) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            output: Output = parallel(query, key, number)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.update_key()
        return output.loss.detach()

    return step


def engine_step(method: DCLR, config: dict[str, Any], optim: OptimConfig, device: torch.device) -> Step:
    own = Engine(method, config, optim, device)
    own.train()

    def step(query: Views, key: Views, number: int) -> Tensor:
        output = own(query, key, number)
        own.backward(output.loss)
        own.step()
        method.update_key()
        return output.loss.detach()

    return step


def make_views(task: Task, device: torch.device, dtype: torch.dtype) -> tuple[Views, Views]:
    """Noise, other on each process; a key clip is its query clip with half as much noise again."""
    generator = torch.Generator(device).manual_seed(distributed.rank())
    shape = (3, task.batch, 3, task.T, task.side, task.side)
    query = torch.randn(shape, generator=generator, device=device)
    key = query + 0.5 * torch.randn(shape, generator=generator, device=device)
    return tuple(  # type: ignore[return-value]
        Views(*(view.to(dtype).contiguous(memory_format=torch.channels_last_3d) for view in views))
        for views in (query, key)
    )


def work(provider: str, task: Task, out: Path) -> None:
    """What a launched process runs; rank 0 writes what `train` returns."""
    device = engine.start_processes()
    try:
        result = train(provider, task, device)
        if distributed.rank() == 0:
            out.write_text(json.dumps(result))
    finally:
        engine.stop_processes()


# ----------------------------------------------------------------------------------------------------------------- launch


def launch(provider: str, task: Task, processes: int) -> dict[str, Any]:
    """A turn in processes of its own. Raises SystemExit, with the error's last line."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["--module", "benchmarks.sharding", "--worker", provider, json.dumps(asdict(task)), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not out.is_file():
            raise SystemExit(f"a launch of {provider} failed: {_last_words(done.stderr)}")
        return json.loads(out.read_text())


def _last_words(stderr: str) -> str:
    """The error itself; after it torchrun says at length that there was one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or lines or ["no message"])[-1][:300]


# ----------------------------------------------------------------------------------------------------------------- report


def summarise(turns: dict[str, list[dict[str, Any]]], task: Task, processes: int) -> dict[str, dict[str, Any]]:
    """A row for each provider, from its turns, one a round."""
    medians = {name: [statistics.median(turn["ms"]) for turn in of_name] for name, of_name in turns.items()}
    rows = {}
    for name, of_name in turns.items():
        ms = statistics.median(medians[name])
        ratios = [own / ddp for own, ddp in zip(medians[name], medians["DDP"], strict=True)]
        rows[name] = {
            "median_ms": ms,
            "ms_by_round": medians[name],
            "samples_per_second": task.batch * processes / (ms / 1e3),
            "peak_gib": max(turn["peak_gib"] for turn in of_name),
            "ratio_to_ddp": statistics.median(ratios),
            "ratio_by_round": ratios,
        }
    return rows


def agreement(losses: dict[str, list[float]]) -> dict[str, Any]:
    """The greatest relative difference of any provider's loss from DDP's, over the first steps. Raises ArithmeticError: not finite."""
    worst = 0.0
    for name, of_name in losses.items():
        for own, ddp in zip(of_name[:CHECKED_STEPS], losses["DDP"][:CHECKED_STEPS], strict=True):
            if not math.isfinite(own):
                raise ArithmeticError(f"{name}: the loss is {own}")
            worst = max(worst, abs(own - ddp) / abs(ddp))
    shown = {name: of_name[:CHECKED_STEPS] for name, of_name in losses.items()}
    return {"losses": shown, "difference": worst, "tolerance": LOSS_TOLERANCE, "agree": worst <= LOSS_TOLERANCE}


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """Which is fastest, whether by more than rounds differ, and where the default stands."""
    default = next(name for name, file in reversed(DS_CONFIGS.items()) if file == Path(RunConfig().ds_config).name)
    own = {name: row for name, row in rows.items() if name != "DDP"}  # a run can choose among these
    order = sorted(own, key=lambda name: own[name]["median_ms"])
    fastest, overall = order[0], min(rows, key=lambda name: rows[name]["median_ms"])
    even = [name for name in order[1:] if not _clearly_faster(rows[fastest], rows[name])]
    text = f"fastest: {overall}; of DeepSpeed's: {fastest}"
    if even:
        text += f", not told from {' and '.join(even)} by these rounds"
    place = "is the fastest" if default == fastest else "is not told from it" if default in even else "is slower"
    return f"{text}. The default, {default} (ds_configs/{DS_CONFIGS[default]}), {place}"


def _clearly_faster(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """In every round, of more than one."""
    faster = [own < theirs for own, theirs in zip(row["ms_by_round"], other["ms_by_round"], strict=True)]
    return len(faster) > 1 and all(faster)


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [harness.table_header(["provider", "ms a step", "samples/s", "peak memory", "time by DDP's", "by round"])]
    for name, row in rows.items():
        ratios = row["ratio_by_round"]
        columns = [
            f"{row['median_ms']:.4g}",
            f"{row['samples_per_second']:.4g}",
            f"{row['peak_gib']:.2f} GiB",
            f"{row['ratio_to_ddp']:.3f}",
            ", ".join(f"{ratio:.3f}" for ratio in ratios),
        ]
        lines.append(harness.table_line([name, *columns]))
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], title: str, caption: str) -> Figure:
    """Milliseconds of a step and peak memory by provider; a dot for each round."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    colours = ["tab:gray", "tab:blue", "tab:red", "tab:orange"]
    left.barh(list(rows), [row["median_ms"] for row in rows.values()], 0.6, color=colours)
    for place, row in enumerate(rows.values()):
        left.plot(row["ms_by_round"], [place] * len(row["ms_by_round"]), "k.", markersize=5)
    right.barh(list(rows), [row["peak_gib"] for row in rows.values()], 0.6, color=colours)
    left.set_xlabel("milliseconds of a step; a dot is a round")
    right.set_xlabel("peak memory of a process, GiB")
    left.invert_yaxis()
    for panel in (left, right):
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    figure.suptitle(title)
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


# ------------------------------------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="default: one for each GPU; without a GPU two")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch-size", type=int, help="clips of one process")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the devices' folders")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # provider, task, file: a launched process
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    if arguments.worker:
        provider, task, out = arguments.worker
        return work(provider, Task(**json.loads(task)), Path(out))
    begin = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpus = torch.cuda.device_count()
    processes = arguments.processes or gpus or 2
    if gpus and processes > gpus:
        raise SystemExit(f"--processes is {processes}, but this machine has {gpus} GPU(s), and each takes one process")
    given = {"batch": arguments.batch_size} if arguments.batch_size else {}
    task = Task(**asdict(TASKS[device.type]) | given)
    surroundings = environment(device)
    print(f"{surroundings['device']}, torch {surroundings['versions']['torch']}, {processes} process(es)")

    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in DS_CONFIGS}
    for name in harness.rounds(list(DS_CONFIGS), arguments.rounds):
        turns[name].append(launch(name, task, processes))
        turn = turns[name][-1]
        print(f"  {name}: {statistics.median(turn['ms']):.4g} ms, {turn['precision']}", flush=True)
    precision = turns["DDP"][0]["precision"]
    checked = {name: of_name[0] for name, of_name in turns.items()}
    if not precision.startswith("float32"):
        in_float32 = Task(**asdict(task) | {"float32": True, "steps": CHECKED_STEPS})
        checked = {name: launch(name, in_float32, processes) for name in DS_CONFIGS}
    same = agreement({name: turn["losses"] for name, turn in checked.items()})
    rows = summarise(turns, task, processes)
    last = verdict(rows)
    print(f"\n{table(rows)}\n\n{last}.")
    print(f"Losses of {CHECKED_STEPS} steps in float32: greatest relative difference from DDP {same['difference']:.1e}")

    content = {
        "question": "what do DeepSpeed's stages cost or save beside plain DistributedDataParallel?",
        "command": harness.command("sharding", argv),
        "environment": surroundings,
        "processes": processes,
        "task": asdict(task),
        "precision": precision,
        "rounds": arguments.rounds,
        "seconds": round(time.monotonic() - begin, 1),
        "agreement": same,
        "verdict": last,
        "rows": rows,
    }
    folder = harness.results_folder(device, arguments.results)
    caption = (
        f"{surroundings['device']}, {surroundings['date'][:10]}, torch {surroundings['versions']['torch']}, deepspeed "
        f"{surroundings['versions']['deepspeed']}, commit {surroundings['commit']}; {precision}"
    )
    title = f"{task.backbone}, width {task.width}, {processes} process(es), {task.batch} clips each"
    harness.write(folder, "sharding", content, plot(rows, title, caption))
    print(f"Wrote {folder / 'sharding'}.json and .png")
    if not same["agree"]:
        raise SystemExit(f"the losses differ by more than {LOSS_TOLERANCE:g}: these are not the same steps")


if __name__ == "__main__":
    main()
