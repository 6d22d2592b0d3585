"""What does DeepSpeed cost or save? Its stages 0, 1 and 2 are compared with torch's DistributedDataParallel.

    python -m benchmarks.sharding                   one process for each GPU; on a CPU two, with a small network
    python -m benchmarks.sharding --processes 4     another number; at most one for each GPU
    python -m benchmarks.sharding --rounds 5        more launches of each provider

Time to expect: 3 to 8 minutes on two cores, most of it the start of each launch. It has not run on GPUs yet. Result to
expect on two cores: the stages take 1.04 to 1.07 times as long as DDP.

Providers:
    DDP        DCLR under DistributedDataParallel, with torch.autocast and torch.optim.SGD. Buffers are not broadcast at
               every step, which would send the whole queue, and gradients are views of the buckets. These are its best
               settings for this network
    stage 0    the same network under dclr.training.engine with ds_configs/ddp.json: DeepSpeed without sharding
    ZeRO-1     with ds_configs/zero1.json: optimizer state sharded
    ZeRO-2     with ds_configs/zero2.json: gradients sharded too

A step is the exchange of key views between processes, forward, backward, SGD and the update of the key encoder. Views
are on the device before it, the same for all providers. Backbones are not compiled. Every turn of a provider is a
launch of its own (torchrun), so what DeepSpeed changes in a process does not affect another turn. A round is one turn
of each provider, and the order rotates. A ratio compares turns of one round. Peak memory is the most that any process
held: allocated memory on a GPU, resident memory with libraries on a CPU.

All providers must learn the same. Their losses, means over processes, are compared step by step in float32. If steps
are timed in bfloat16, each provider is launched once more for that.

Prints a table and the fastest provider, and writes sharding.json and sharding.png into results/DEVICE.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
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
from benchmarks.harness import ROOT, Row
from dclr import distributed
from dclr.config import MethodConfig, ModelConfig, OptimConfig, RunConfig
from dclr.kernels import Views
from dclr.methods import DCLR
from dclr.methods.dclr import Output
from dclr.report import peak_memory_gib
from dclr.training import engine
from dclr.training.engine import Engine, read_ds_config, resolve_precision
from dclr.training.exchange import send_views

DS_CONFIGS = {"DDP": "ddp.json", "stage 0": "ddp.json", "ZeRO-1": "zero1.json", "ZeRO-2": "zero2.json"}
"""The file in ds_configs/ that holds a provider's precision and sharding. DDP reads the precision only."""

ROUNDS = 3
WARMUP, CHECKED_STEPS = 3, 8
LOSS_TOLERANCE = 1e-4
"""Greatest relative difference in float32. The orders of sums differ, and rounding errors grow from step to step."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every provider trains."""

    backbone: str = "r2plus1d_10"
    width: int = 64
    T: int = 16
    side: int = 112
    batch: int = 40  # of one process
    queue_length: int = 2048
    steps: int = 30  # of a turn, without the warm-up
    float32: bool = False  # True overrides the DeepSpeed configuration


TASKS = {"cuda": Task(), "cpu": Task(width=16, T=8, side=32, batch=16, queue_length=512, steps=20)}


# ------------------------------------------------------------------------------------------------ in a launched process


def train(provider: str, task: Task, device: torch.device) -> dict[str, Any]:
    """Make this process's steps of a turn. Return milliseconds, losses (means over processes) and peak memory."""
    torch.manual_seed(0)
    network = DCLR(ModelConfig(backbone=task.backbone, width=task.width), MethodConfig(queue_length=task.queue_length))
    config = read_ds_config(ROOT / "ds_configs" / DS_CONFIGS[provider])
    if task.float32:
        config["torch_autocast"] = {"enabled": False}
    precision = resolve_precision(config, device)
    autocast = config["torch_autocast"]["enabled"]
    optim = OptimConfig(batch_size=task.batch * distributed.world_size())
    step = (ddp_step if provider == "DDP" else engine_step)(network, config, optim, device)
    network.enqueued.fill_(task.queue_length)  # queue entries are mined from the first step on
    query, key = make_views(task, device, torch.bfloat16 if autocast else torch.float32)

    losses: list[Tensor] = []

    def call() -> None:
        shuffle, keys = network.shuffle(task.batch, len(losses)), {"key": key}
        if shuffle is not None:
            keys = send_views(shuffle, keys, network.shuffled, network.auxiliary_views)
        losses.append(step(query, keys["key"], len(losses)))

    harness.time_consecutive(call, device, WARMUP)
    milliseconds = harness.time_consecutive(call, device, task.steps)
    return {
        "precision": precision,
        "ms": milliseconds,
        "losses": distributed.mean_over_ranks(torch.stack(losses).float()).tolist(),
        "peak_gib": max(distributed.gather_objects(peak_memory_gib(device))),
    }


Step = Callable[[Views, Views, int], Tensor]
"""A training step: views of the query clips, views of the key clips, number of the step -> loss."""


def ddp_step(network: DCLR, config: dict[str, Any], optim: OptimConfig, device: torch.device) -> Step:
    enabled = config["torch_autocast"]["enabled"]
    network.to(device)
    parallel = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(
        network.query.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )

    def step(query: Views, key: Views, number: int) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            output: Output = parallel(query, key, number)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        network.update_key()
        return output.loss.detach()

    return step


def engine_step(network: DCLR, config: dict[str, Any], optim: OptimConfig, device: torch.device) -> Step:
    own = Engine(network, config, optim, device)
    own.train()

    def step(query: Views, key: Views, number: int) -> Tensor:
        output = own(query, key, number)
        own.backward(output.loss)
        own.step()
        network.update_key()
        return output.loss.detach()

    return step


def make_views(task: Task, device: torch.device, dtype: torch.dtype) -> tuple[Views, Views]:
    """Return noise that differs between processes. A key clip is its query clip plus half as much noise."""
    generator = torch.Generator(device).manual_seed(distributed.rank())
    shape = (3, task.batch, 3, task.T, task.side, task.side)
    query = torch.randn(shape, generator=generator, device=device)
    key = query + 0.5 * torch.randn(shape, generator=generator, device=device)
    return tuple(  # type: ignore[return-value]
        Views(*(view.to(dtype).contiguous(memory_format=torch.channels_last_3d) for view in views))
        for views in (query, key)
    )


def work(provider: str, task: Task, out: Path) -> None:
    """Run a launched process. Rank 0 writes what `train` returns."""
    device = engine.start_processes()
    try:
        result = train(provider, task, device)
        if distributed.rank() == 0:
            out.write_text(json.dumps(result))
    finally:
        engine.stop_processes()


# --------------------------------------------------------------------------------------------------------------- launch


def launch(provider: str, task: Task, processes: int) -> dict[str, Any]:
    """Make a turn in new processes. Raises SystemExit with the error of a failed launch."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["--module", "benchmarks.sharding", "--worker", provider, json.dumps(asdict(task)), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not out.is_file():
            raise SystemExit(f"a launch of {provider} failed: {find_error(done.stderr)}")
        return json.loads(out.read_text())


def find_error(stderr: str) -> str:
    """Return the line of the error. torchrun prints many lines after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or lines or ["no message"])[-1][:300]


# --------------------------------------------------------------------------------------------------------------- report


def summarise(turns: dict[str, list[dict[str, Any]]], task: Task, processes: int) -> dict[str, Row]:
    """Return a row for each provider. turns: one for each round."""
    medians = {name: [statistics.median(turn["ms"]) for turn in own] for name, own in turns.items()}
    rows = {}
    for name, own in turns.items():
        ms = statistics.median(medians[name])
        ratios = [mine / ddp for mine, ddp in zip(medians[name], medians["DDP"], strict=True)]
        rows[name] = {
            "median_ms": ms,
            "ms_by_round": medians[name],
            "samples_per_second": task.batch * processes / (ms / 1e3),
            "peak_gib": max(turn["peak_gib"] for turn in own),
            "ratio_to_ddp": statistics.median(ratios),
            "ratio_by_round": ratios,
        }
    return rows


def compare_losses(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Return the greatest relative difference of any provider's loss from DDP's, over the first steps.

    Raises ArithmeticError if a loss is not finite.
    """
    worst = 0.0
    for name, own in losses.items():
        for mine, ddp in zip(own[:CHECKED_STEPS], losses["DDP"][:CHECKED_STEPS], strict=True):
            if not math.isfinite(mine):
                raise ArithmeticError(f"{name}: the loss is {mine}")
            worst = max(worst, abs(mine - ddp) / abs(ddp))
    shown = {name: own[:CHECKED_STEPS] for name, own in losses.items()}
    return {"losses": shown, "difference": worst, "tolerance": LOSS_TOLERANCE, "agree": worst <= LOSS_TOLERANCE}


def judge(rows: dict[str, Row]) -> str:
    """Return in words which provider and stage are fastest, how clearly, and how the default compares."""
    default = next(name for name, file in reversed(DS_CONFIGS.items()) if file == Path(RunConfig().ds_config).name)
    stages = {name: row for name, row in rows.items() if name != "DDP"}  # a run can choose among these
    order = sorted(stages, key=lambda name: stages[name]["median_ms"])
    fastest, overall = order[0], min(rows, key=lambda name: rows[name]["median_ms"])
    equal = [name for name in order[1:] if not clearly_faster(rows[fastest], rows[name])]
    text = f"fastest: {overall}; of DeepSpeed's stages: {fastest}"
    if equal:
        text += f", not clearly faster than {' and '.join(equal)}"
    place = "is the fastest" if default == fastest else "is not clearly slower" if default in equal else "is slower"
    return f"{text}. The default, {default} (ds_configs/{DS_CONFIGS[default]}), {place}"


def clearly_faster(row: Row, other: Row) -> bool:
    """Return whether a provider is faster than another in every round of at least two."""
    faster = [own < theirs for own, theirs in zip(row["ms_by_round"], other["ms_by_round"], strict=True)]
    return len(faster) > 1 and all(faster)


def table(rows: dict[str, Row]) -> str:
    lines = [
        [
            name,
            f"{row['median_ms']:.4g}",
            f"{row['samples_per_second']:.4g}",
            f"{row['peak_gib']:.2f} GiB",
            f"{row['ratio_to_ddp']:.3f}",
            ", ".join(f"{ratio:.3f}" for ratio in row["ratio_by_round"]),
        ]
        for name, row in rows.items()
    ]
    columns = ["provider", "ms a step", "samples/s", "peak memory of a process", "time relative to DDP", "by round"]
    return harness.table(columns, lines)


def plot(rows: dict[str, Row], title: str, caption: str) -> Figure:
    """Plot milliseconds of a step, one dot for each round, and peak memory by provider."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    colours = ["tab:gray", "tab:blue", "tab:red", "tab:orange"]
    left.barh(list(rows), [row["median_ms"] for row in rows.values()], 0.6, color=colours)
    for position, row in enumerate(rows.values()):
        left.plot(row["ms_by_round"], [position] * len(row["ms_by_round"]), "k.", markersize=5)
    right.barh(list(rows), [row["peak_gib"] for row in rows.values()], 0.6, color=colours)
    left.set_xlabel("milliseconds of a step; a dot is a round")
    right.set_xlabel("peak memory of a process, GiB")
    left.invert_yaxis()
    for panel in (left, right):
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    harness.add_titles(figure, title, caption)
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--processes", type=int, help="default: one for each GPU; without a GPU two")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch-size", type=int, help="clips of one process")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # a launched process: provider, task, file
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.worker:
        provider, task, out = arguments.worker
        return work(provider, Task(**json.loads(task)), Path(out))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpus = torch.cuda.device_count()
    processes = arguments.processes or gpus or 2
    if gpus and processes > gpus:
        raise SystemExit(f"--processes is {processes}, but must be at most {gpus}, the number of GPUs")
    given = {"batch": arguments.batch_size} if arguments.batch_size else {}
    task = Task(**asdict(TASKS[device.type]) | given)
    run = harness.Run("sharding", argv, arguments, device)
    print(f"{run.environment['device']}, torch {run.environment['versions']['torch']}, {processes} process(es)")

    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in DS_CONFIGS}
    for number in range(arguments.rounds):
        if number and run.out_of_time():
            print(f"stopped after {number} of {arguments.rounds} rounds, {run.stopped}")
            break
        for name in harness.turn(list(DS_CONFIGS), number):
            turn = launch(name, task, processes)
            turns[name].append(turn)
            print(f"  {name}: {statistics.median(turn['ms']):.4g} ms, {turn['precision']}", flush=True)
    precision = turns["DDP"][0]["precision"]
    checked = {name: own[0] for name, own in turns.items()}
    if not precision.startswith("float32"):
        in_float32 = Task(**asdict(task) | {"float32": True, "steps": CHECKED_STEPS})
        checked = {name: launch(name, in_float32, processes) for name in DS_CONFIGS}
    same = compare_losses({name: turn["losses"] for name, turn in checked.items()})
    rows = summarise(turns, task, processes)
    verdict = judge(rows)
    print(f"\n{table(rows)}\n\n{verdict}.")
    print(
        f"Greatest relative difference of a loss from DDP's, {CHECKED_STEPS} steps in float32: {same['difference']:.1e}"
    )

    content = {
        "question": "what do DeepSpeed's stages cost or save compared with plain DistributedDataParallel?",
        "processes": processes,
        "task": asdict(task),
        "precision": precision,
        "rounds": len(turns["DDP"]),
        "agreement": same,
        "verdict": verdict,
        "rows": rows,
    }
    caption = run.caption(f"deepspeed {run.environment['versions']['deepspeed']}; {precision}")
    title = f"{task.backbone}, width {task.width}, {processes} process(es), {task.batch} clips each"
    run.publish(plot(rows, title, caption), content)
    if not same["agree"]:
        raise SystemExit(f"the losses differ by more than {LOSS_TOLERANCE:g}: these are not the same steps")


if __name__ == "__main__":
    main()
