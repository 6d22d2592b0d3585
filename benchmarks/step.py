"""How fast is a whole training step of pretraining, and which part of it takes the time? The same step in three ways, in one run.

    python -m benchmarks.step                     on a GPU: r2plus1d_10, then r2plus1d_18, at 128, 40, 256 and 8 clips of 16 x 112 x 112
    python -m benchmarks.step --minutes 10        no new cell is begun after 10 minutes; the goals' cell, r2plus1d_10 at 128, comes first
    python -m benchmarks.step --quick             the first cell only, fewer rounds

Time to expect on one H100 or H200: 20 minutes, of which half is torch.compile.
Without a GPU it runs at 2 clips of that size and at smaller clips (about 5 minutes on two cores).

A sample is a video: two clips, and all views of both. A step makes the views, passes them through the query and the key network,
computes the loss and its gradient, takes a step of SGD, moves the key network and enqueues the keys. Frames are on the device
beforehand.

Providers (benchmarks/step_providers.py):
    as released      our own plain writing of what the authors released: float32 (tf32 on a GPU), three passes of the key network over
                     three views, kornia's VideoSequential over the batch, concatenated logits, convolutions' default memory. Its loader
                     crops and converts to float on the CPU: that is done beforehand here and costs it nothing. Faults that cost no time
                     are mended; its two further queues and its meters are left out
    eager bf16       our method, with two key passes, in plain torch: autocast, the reference's loss and views, clip by clip
    ours             as `train.py pretrain` runs it: DeepSpeed with the default configuration, Triton and compiled backbones on a GPU,
                     bfloat16 where the device is fast at it
    ours, float32    the same without bfloat16, so that a ratio is not bfloat16's doing; only on a CPU

FLOP are those of the method's convolutions, counted by torch on one view, padding excluded. A pass forward counts 1 and a backward pass
2: ours is 9 for the queries' three views and 2 + 3 for the keys, 14; as released is 9 + 3 x 3, 18. A share of the peak is a share of
what a large matrix product reaches in that precision in this run; only on a GPU. Peak memory is what a step holds at most, with
weights, without inputs.

A provider's first step is checked, with a queue that counts as empty (of two rows that tie either may be mined): its keys, and its loss
where the method is the same, against float32 without tf32. Then all stay in memory and take turns, rounds of a few steps. On a GPU a
turn begins with a step that is not measured, because memory of the last turn is given back before it, and times are the distances of
events on the stream, so that waiting for the host counts. Milliseconds by part come from further steps, with events between the parts.

Prints tables, writes step.json and step.png into results/DEVICE; --quick adds its name to the files'.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Ceilings
from benchmarks.step_providers import (
    DS_CONFIG,
    METHOD,
    OPTIM,
    PROVIDERS,
    Cell,
    Inputs,
    Provider,
    Truth,
    find_truth,
    make_inputs,
    unwatched,
)
from dclr.data.augmentation import PRETRAIN
from dclr.errors import UserError
from dclr.models import build_backbone
from dclr.report import Stopwatch, environment
from dclr.training import engine
from dclr.training.engine import read_ds_config, settle_precision
from kernels import describe
from kernels.backend import runs_triton

GOAL_BATCH = 128
OUT_OF_MEMORY = "out of memory"
PARTS = ("views", "query forward", "backward", "keys", "loss", "optimizer", "other")

DEFAULT_PROVIDERS = {"cuda": ("as released", "eager bf16", "ours"), "cpu": tuple(PROVIDERS)}
CELLS = {
    "cuda": tuple(
        Cell(backbone=name, B=B) for name in ("r2plus1d_10", "r2plus1d_18") for B in (GOAL_BATCH, 40, 256, 8)
    ),
    "cpu": (Cell(B=2), Cell(B=4, T=8, side=64, H=120, W=160), Cell(B=16, T=8, side=64, H=120, W=160)),
}
ROUNDS = {"cuda": (5, 4), "cpu": (3, 1)}  # rounds, steps a turn
QUICK_ROUNDS = (2, 1)
PROFILED_STEPS = {"cuda": 5, "cpu": 1}

ALLOWED = {"ieee": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""How far the first step's loss, relative, and any component of its keys (vectors of length 1) may be from float32's."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """On the recipe's clips and backbone: `ours` at least `least` times as fast as `against`, or at `least` samples a second."""

    text: str
    kind: str
    least: float
    ours: str = "ours"
    against: str | None = None
    B: int | None = None  # None: at every B that was measured


GOALS = (
    Goal(text="530 samples/s", kind="cuda", least=530, B=GOAL_BATCH),
    Goal(text="6 times as released", kind="cuda", least=6, against="as released", B=GOAL_BATCH),
    Goal(text="1.5 times eager bf16", kind="cuda", least=1.5, against="eager bf16", B=GOAL_BATCH),
    Goal(text="1.25 times as released, both float32", kind="cpu", least=1.25, ours="ours, float32", against="as released"),
    Goal(text="1.25 times as released, as users run it", kind="cpu", least=1.25, against="as released"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- measure


def flops_of_view(cell: Cell) -> int:
    """A pass forward of one view through the backbone as torchvision has it: 2 for each multiplication with its addition."""
    with torch.device("meta"):
        backbone = build_backbone(cell.backbone, cell.width)
        view = torch.empty(1, 3, cell.T, cell.side, cell.side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(view)
    return counter.get_total_flops()


def start(
    name: str, cell: Cell, inputs: Inputs, truth: Truth | None, device: torch.device
) -> tuple[Provider, dict[str, Any]]:
    """A provider after its first steps, with a full queue, and what these told. Raises ArithmeticError: its loss is not finite."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    provider = PROVIDERS[name](cell, inputs, device)
    began = time.perf_counter()
    given = (truth.query, truth.key) if truth and provider.own_draw else None
    loss = float(provider.step(unwatched, given))  # waits for the device
    first_s = time.perf_counter() - began
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    found: dict[str, Any] = {"precision": provider.precision, "passes": provider.passes, "first_step_s": first_s}
    found |= {"loss_error": None, "key_error": None, "right": None, "peak_bytes": None}
    if truth:
        found["key_error"] = float((provider.method.queue[:, : cell.B] - truth.keys).abs().max())
        if not provider.own_draw:
            found["loss_error"] = abs(loss - truth.loss) / abs(truth.loss)
        found["right"] = max(found["key_error"], found["loss_error"] or 0.0) <= ALLOWED[provider.precision]
    provider.method.enqueued.fill_(METHOD.queue_length)  # from here on rows are mined
    if device.type == "cuda":
        provider.step(unwatched)  # the first of its kind with its own views, and what it allocates once
        torch.cuda.reset_peak_memory_stats(device)
        provider.step(unwatched)
        torch.cuda.synchronize(device)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return provider, found


def take_turn(provider: Provider, device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each step."""
    settle(provider, device)
    return harness.consecutive(lambda: provider.step(unwatched), device, steps)


def settle(provider: Provider, device: torch.device) -> None:
    """What another provider's turn left in the allocator is given back, and a step finds the memory that this one needs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        provider.step(unwatched)
        torch.cuda.synchronize(device)


def parts(provider: Provider, device: torch.device, steps: int) -> dict[str, float]:
    """Mean milliseconds of a step by PARTS; "loss" is what forward does beside the networks, "other" what lies between all parts."""
    settle(provider, device)
    outer, inner = Stopwatch(device), Stopwatch(device)
    depth = 0

    @contextmanager
    def part(name: str) -> Iterator[None]:
        nonlocal depth
        depth += 1
        with (outer if depth == 1 else inner).section(name):
            yield
        depth -= 1

    with provider.watched(part):
        for _ in range(steps):
            provider.step(part)
            outer.step()
            inner.step()
    outside, within = outer.read(), inner.read()
    found = {name: outside.get(name, 0.0) for name in PARTS}
    found["query forward"] = within["query forward"]
    found["keys"] += within["keys"]
    found["loss"] = outside["forward"] - within["query forward"] - within["keys"]
    found["other"] = outside["total"] - sum(value for name, value in found.items() if name != "other")
    return found


def measure(
    cell: Cell,
    names: Sequence[str],
    device: torch.device,
    rounds: int,
    steps: int,  # a turn
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """One row of the results. A provider that fails, for memory or else, has the reason in place of its numbers."""
    torch._dynamo.reset()  # every cell compiles for its own sizes, and must not meet the limit on recompilations
    inputs = make_inputs(cell, device)
    truth, unchecked = None, None
    try:
        truth = find_truth(cell, inputs, device)
    except RuntimeError as failure:  # float32 takes the most memory of all
        unchecked = reason(failure)
    providers: dict[str, Provider] = {}
    found: dict[str, dict[str, Any]] = {}

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            work()
            return
        except Exception as failure:  # whatever it is: the other providers and cells are worth having
            found[name] = {"skipped": reason(failure)}
        providers.pop(name, None)
        gc.collect()  # what the failed step held; only now, outside of the handler, does nothing refer to it

    def begin(name: str) -> None:
        providers[name], found[name] = start(name, cell, inputs, truth, device)

    times: dict[str, list[list[float]]] = {name: [] for name in names}  # by round

    def time_turn(name: str) -> None:
        times[name].append(take_turn(providers[name], device, steps))

    def split(name: str) -> None:
        found[name]["parts"] = parts(providers[name], device, PROFILED_STEPS[device.type])

    for name in names:
        attempt(name, partial(begin, name))
    for name in harness.rounds(list(providers), rounds):
        if name in providers:
            attempt(name, partial(time_turn, name))
    for name in list(providers):
        attempt(name, partial(split, name))

    flops = flops_of_view(cell)
    for name in providers:
        found[name] |= numbers(times[name], found[name], cell, flops, ceilings)
    providers.clear()
    gc.collect()  # DeepSpeed's engines refer to themselves
    return asdict(cell) | {"flops_of_view": flops, "unchecked": unchecked, "providers": found}


def numbers(
    times: list[list[float]], found: dict[str, Any], cell: Cell, flops: int, ceilings: Ceilings | None
) -> dict[str, Any]:
    """What milliseconds, by round, come to."""
    every = [value for turn in times for value in turn]
    low, median, high = (float(value) for value in np.quantile(every, (0.2, 0.5, 0.8)))
    rate = found["passes"] * flops * cell.B / (median / 1e3)
    return {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "repetitions": len(every),
        "ms_by_round": [statistics.median(turn) for turn in times],
        "samples_per_second": cell.B / (median / 1e3),
        "flops_per_second": rate,
        "share_of_peak": None if ceilings is None else rate / ceilings.flops_per_second[found["precision"]],
    }


def reason(failure: Exception) -> str:
    if isinstance(failure, UserError):
        return str(failure)
    return OUT_OF_MEMORY if isinstance(failure, torch.OutOfMemoryError) else harness.reason(failure)


# ----------------------------------------------------------------------------------------------------------------- report


def judge(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Each goal, where it was measured; of several batches, by the worst. A ratio is the median of the rounds' ratios."""
    verdicts: list[dict[str, Any]] = []
    for goal in GOALS:
        where = str(Cell(B=goal.B)) if goal.B else "r2plus1d_10, any B, 16 x 112 x 112"
        verdict: dict[str, Any] = {"goal": goal.text, "where": where, "value": None, "by_round": None}
        verdict |= {"without_views": None, "verdict": "not measured on this device"}
        verdicts.append(verdict)
        if goal.kind != kind:
            continue
        there = [row for row in rows if _cell(row) == Cell(B=goal.B or row["B"])]
        verdict["verdict"] = "not measured in this run"
        for row in there:
            of_ours = row["providers"].get(goal.ours, {})
            other = row["providers"].get(goal.against, {}) if goal.against else {}
            if of_ours.get("right") is False:
                verdict |= {"value": None, "verdict": f"not met: {goal.ours} computes something else"}
                break
            if "skipped" in of_ours:
                verdict |= {"value": None, "verdict": f"not met: {goal.ours}: {of_ours['skipped']}"}
                break
            if "skipped" in other:
                verdict["verdict"] = f"not measured: {goal.against}: {other['skipped']}"
                continue
            if not of_ours or (goal.against and not other):
                continue
            found = _compare(of_ours, other) if goal.against else {"value": of_ours["samples_per_second"]}
            if verdict["value"] is None or found["value"] < verdict["value"]:
                met = "met" if of_ours["right"] else "met, by a step that was not checked"
                verdict |= found | {"verdict": met if found["value"] >= goal.least else "not met"}
    return verdicts


def _compare(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast ours is, and how many times without what the views of either took when watched."""
    by_round = [theirs / own for theirs, own in zip(other["ms_by_round"], ours["ms_by_round"], strict=True)]
    rests = [of["median_ms"] - of["parts"]["views"] for of in (other, ours)]
    return {"value": statistics.median(by_round), "by_round": by_round, "without_views": rests[0] / rests[1]}


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{field.name: row[field.name] for field in fields(Cell)})


def cell_table(row: dict[str, Any]) -> str:
    """What was measured in one cell, a provider a line, and its parts."""
    header = ["provider", "products", "samples/s", "ms (20 % to 80 %)", "TFLOP/s", "of the peak", "peak memory"]
    lines = [
        f"{_cell(row)}: {row['flops_of_view'] / 1e9:.1f} GFLOP a view",
        "",
        harness.table_header([*header, "first step", "loss error", "key error", ""]),
    ]
    second = ["", harness.table_header(["ms by part", *PARTS])]
    for name, of in row["providers"].items():
        if "skipped" in of:
            lines.append(harness.table_line([name, f"skipped: {of['skipped']}", *[""] * 9]))
            continue
        share, peak, right = of["share_of_peak"], of["peak_bytes"], of["right"]
        errors = ["" if of[key] is None else f"{of[key]:.0e}" for key in ("loss_error", "key_error")]
        columns = [
            name,
            of["precision"],
            f"{of['samples_per_second']:.3g}",
            f"{of['median_ms']:.4g} ({of['low_ms']:.4g} to {of['high_ms']:.4g})",
            f"{of['flops_per_second'] / 1e12:.3g}",
            "" if share is None else f"{share:.0%}",
            "" if peak is None else f"{peak / 2**30:.1f} GiB",
            f"{of['first_step_s']:.1f} s",
            *errors,
            "unchecked" if right is None else "right" if right else "WRONG",
        ]
        lines.append(harness.table_line(columns))
        second.append(harness.table_line([name, *(f"{of['parts'][part]:.3g}" for part in PARTS)]))
    return "\n".join(lines + second)


def goal_table(verdicts: Sequence[dict[str, Any]]) -> str:
    lines = [harness.table_header(["goal", "where", "value", "by round", "without views", ""])]
    for verdict in verdicts:
        value, rounds, rest = verdict["value"], verdict["by_round"], verdict["without_views"]
        columns = [
            "" if value is None else f"{value:.3g}",
            "" if rounds is None else f"{min(rounds):.3g} to {max(rounds):.3g}",
            "" if rest is None else f"{rest:.3g}",
        ]
        lines.append(harness.table_line([verdict["goal"], verdict["where"], *columns, verdict["verdict"]]))
    return "\n".join(lines)


COLOURS = {"as released": "tab:gray", "eager bf16": "tab:blue", "ours": "tab:red", "ours, float32": "tab:pink"}


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], title: str, caption: str) -> Figure:
    """Samples a second in every cell; beside it, the parts of a step in the first."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 1.8 + 0.3 * max(len(names) * (len(rows) + 0.7), 8)), width_ratios=(1, 1.1)
    )
    height = 0.8 / len(names)
    colours = {name: COLOURS.get(name, plt.get_cmap("viridis")(rank / len(names))) for rank, name in enumerate(names)}
    for place, row in enumerate(rows):
        for rank, name in enumerate(names):
            of, y = row["providers"][name], place - 0.4 + height * (rank + 0.5)
            if "skipped" in of:
                left.text(0.0, y, f"  {of['skipped'][:40]}", va="center", fontsize=7, color="dimgray")
                continue
            label = name if place == 0 else None
            left.barh(y, of["samples_per_second"], 0.9 * height, color=colours[name], label=label)
            left.text(of["samples_per_second"], y, f" {of['samples_per_second']:.3g}", va="center", fontsize=7)
    left.set_yticks(range(len(rows)), [str(_cell(row)).replace(", ", "\n") for row in rows], fontsize=8)
    left.margins(x=0.12)
    left.set_ylim(len(rows) - 0.5, -0.5)  # room for those that have no bar
    left.set_xlabel("samples a second")

    done = [name for name in names if "skipped" not in rows[0]["providers"][name]]
    starts = [0.0] * len(done)
    for number, part in enumerate(PARTS):
        widths = [max(rows[0]["providers"][name]["parts"][part], 0.0) for name in done]
        right.barh(done, widths, 0.6, left=starts, color=plt.get_cmap("tab10")(number), label=part)
        starts = [begin + width for begin, width in zip(starts, widths, strict=True)]
    right.invert_yaxis()
    right.set_xlabel(f"milliseconds of a step by part, {_cell(rows[0])}")
    for panel in (left, right):
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, y=0.985)
    figure.text(0.5, 0.012, caption, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.035 + 0.015 * caption.count("\n"), 1, 0.97))
    return figure


# ------------------------------------------------------------------------------------------------------------------- main


def plan(arguments: argparse.Namespace, kind: str) -> list[Cell]:
    """The cells to measure, the goals' first."""
    cells = [
        cell
        for cell in CELLS[kind]
        if cell.B in (arguments.batch_sizes or [cell.B]) and cell.backbone in (arguments.backbones or [cell.backbone])
    ]
    return cells[:1] if arguments.quick else cells


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first cell only, fewer rounds")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B", help="of the cells, only those")
    parser.add_argument("--backbones", nargs="+", help="of the cells, only those")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="only those")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new cell is begun after that")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the devices' folders")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    begin = time.monotonic()
    device = engine.start_processes()
    names = arguments.providers or DEFAULT_PROVIDERS[device.type]
    rounds, steps = QUICK_ROUNDS if arguments.quick else ROUNDS[device.type]
    rounds = arguments.rounds or rounds
    cells = plan(arguments, device.type)
    surroundings = environment(device)
    precision = settle_precision(read_ds_config(DS_CONFIG), device)
    implementation = f"ours is: {describe(device)}, {precision}"
    print(f"{surroundings['device']}, torch {surroundings['versions']['torch']}; {implementation}")
    ceilings = harness.ceilings(device)
    if ceilings is None:
        print("The ceilings of this device are not measured: no share of the peak, no peak memory.")
    else:
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings.flops_per_second.items())
        print(f"Measured ceilings of a product: {rates}")
    print(f"Median of {rounds} rounds of {steps} steps", flush=True)

    rows: list[dict[str, Any]] = []
    stopped, failed = None, False
    for cell in cells:
        if time.monotonic() - begin > 60 * arguments.minutes:
            stopped = f"{arguments.minutes:g} minutes were over"
            break
        try:
            rows.append(measure(cell, names, device, rounds, steps, ceilings))
        except RuntimeError as failure:  # after some errors a GPU does nothing more in this process
            stopped, failed = f"{cell}: {reason(failure)}", True
            break
        print(f"\n{cell_table(rows[-1])}", flush=True)
    if not rows:
        raise SystemExit(f"nothing was measured: {stopped or 'no cell is left of the grid'}")
    not_reached = [str(cell) for cell in cells[len(rows) :]]
    verdicts = judge(rows, device.type)
    print(f"\nGoals; those of a GPU are stated for an H200\n\n{goal_table(verdicts)}\n")
    if stopped:
        print(f"stopped, {stopped}; not measured: {len(not_reached)} of {len(cells)} cells")

    content = {
        "question": "how fast is a training step of pretraining, and which part of it takes the time?",
        "command": harness.command("step", argv),
        "environment": surroundings,
        "convolutions": convolutions(device),
        "implementation": implementation,
        "seconds": round(time.monotonic() - begin, 1),
        "recipe": {"method": asdict(METHOD), "optim": asdict(OPTIM), "views": asdict(PRETRAIN)},
        "ds_config": f"ds_configs/{DS_CONFIG.name}",
        "ceilings": None if ceilings is None else asdict(ceilings),
        "milliseconds_per_step": goal_milliseconds(rows, device),
        "goals": verdicts,
        "stopped": stopped,
        "not_reached": not_reached,
        "rows": rows,
    }
    name = "step_quick" if arguments.quick else "step"
    folder = harness.results_folder(device, arguments.results)
    caption = (
        f"{surroundings['device']}, {surroundings['date'][:10]}, torch {surroundings['versions']['torch']}, "
        f"commit {surroundings['commit']}; {implementation}\nmedian of {rounds} rounds of {steps} steps"
    )
    figure = plot(rows, list(rows[0]["providers"]), "A training step: two clips, all views", caption)
    harness.write(folder, name, content, figure)
    print(f"Wrote {folder / name}.json and .png")
    skipped = [
        of.get("skipped", OUT_OF_MEMORY) for row in rows for who, of in row["providers"].items() if "ours" in who
    ]
    if any(why != OUT_OF_MEMORY for why in skipped):
        raise SystemExit("ours failed somewhere: see above")
    if failed:
        raise SystemExit("an error stopped the run: see above")


def goal_milliseconds(rows: Sequence[dict[str, Any]], device: torch.device) -> float | None:
    """Of ours in the goals' cell, with its kernels: what benchmarks/views.py holds the views against."""
    for row in rows:
        if _cell(row) == Cell(B=GOAL_BATCH) and runs_triton(device):
            return row["providers"].get("ours", {}).get("median_ms")
    return None


def convolutions(device: torch.device) -> dict[str, Any]:
    """What decides how a convolution is computed; "as released" and "eager bf16" let cuDNN search, whatever stands here."""
    return {
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "onednn": torch.backends.mkldnn.is_available(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
