"""How fast is a training step of pretraining, and which section of it takes the time? The same step in three ways.

    python -m benchmarks.step                 on a GPU: r2plus1d_10, then r2plus1d_18, at 128, 40, 256 and 8 clips of
                                              16 x 112 x 112
    python -m benchmarks.step --minutes 10    begin no new cell after 10 minutes; r2plus1d_10 at 128 clips comes first
    python -m benchmarks.step --quick         the first cell only, fewer rounds

Time to expect: on an H200, 143 seconds for r2plus1d_10 at 128 clips, most of it torch.compile. Without a GPU it runs at
2 clips of that size and at smaller clips, 5 minutes on two cores. Result to expect on an H200 at 128 clips: 301
samples/s, 4.0 times the released code, 2.6 times eager bf16.

A sample is a video: two clips with all their views. A step makes the views, passes them through the query encoder and
the key encoder, computes the loss and its gradient, takes a step of SGD, updates the key encoder and enqueues the keys.
Frames are on the device before the step.

Providers (benchmarks/step_providers.py):
    as released      our own plain version of the released code: float32 (tf32 on a GPU), three passes of the key
                     encoder over three views, kornia's VideoSequential over the batch, concatenated logits,
                     convolutions in their default memory format. Its loader crops and converts on the CPU, which is
                     done before the step here and not timed. Errors that cost no time are fixed. Its two queues for
                     mining and its meters are omitted
    eager bf16       our method, with two passes of the key encoder, in plain torch: autocast, the reference loss, and
                     the reference views, clip by clip
    ours             what `train.py pretrain` runs: DeepSpeed with the default configuration; on a GPU Triton kernels
                     and compiled backbones; bfloat16 where the device is fast at it
    ours, float32    the same without bfloat16, to compare like with like; on a CPU only
    ours, recomputed ours with --recompute; on a GPU only if --providers names it

FLOP are those of the method's convolutions, counted by torch on one view, without padding. A forward pass counts 1 and
a backward pass 2. Ours costs 14 passes of a view: 9 in the query encoder and 2 + 3 in the key encoder. The released
code costs 18: 9 + 3 x 3. The share of the peak compares the rate with that of a large matrix product of this run in the
same precision. It is measured on a GPU only. Peak memory is the most that a step holds, with weights, without inputs.

The first step of each provider is checked. Nothing is mined in it, because the choice between two equally similar queue
entries is arbitrary. Its keys are compared with those of a float32 step without tf32, and so is its loss if the method
is the same. Then all providers stay in memory and take turns of a few steps. On a GPU each turn begins with a step that
is not measured, because cached memory of the turn before is released first. Times are the distances of events on the
stream, so waiting for the host counts. Milliseconds by section come from further steps, with events between the
sections.

Prints tables and writes step.json and step.png into results/DEVICE. --quick adds to the file names.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch._functorch import config as functorch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import RELEASED, Ceilings, Row
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
    untimed,
)
from dclr.data.augmentation import PRETRAIN
from dclr.kernels.backend import runs_triton
from dclr.models import build_backbone
from dclr.report import Stopwatch
from dclr.training import engine
from dclr.training.engine import read_ds_config, resolve_precision

GOAL_BATCH = 128
SECTIONS = ("views", "query forward", "backward", "keys", "loss", "optimizer", "other")

DEFAULT_PROVIDERS = {"cuda": (RELEASED, "eager bf16", "ours"), "cpu": tuple(PROVIDERS)}
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
"""Greatest allowed difference from float32: of the first loss (relative) and of keys' components (unit vectors)."""


@dataclass(frozen=True, kw_only=True)
class StepGoal:
    """A least speedup over another provider, or a least rate in samples/s, on the recipe's clips and r2plus1d_10."""

    text: str
    kind: str  # cuda or cpu
    least: float
    provider: str = "ours"
    over: str | None = None
    B: int | None = None  # None: every B that was measured


GOALS = (
    StepGoal(text="530 samples/s (final goal)", kind="cuda", least=530, B=GOAL_BATCH),
    StepGoal(text="6 times the released code (final goal)", kind="cuda", least=6, over=RELEASED, B=GOAL_BATCH),
    StepGoal(text="1.5 times eager bf16", kind="cuda", least=1.5, over="eager bf16", B=GOAL_BATCH),
    StepGoal(text="390 samples/s (without own convolution kernels)", kind="cuda", least=390, B=GOAL_BATCH),
    StepGoal(
        text="5.2 times the released code (without own convolution kernels)",
        kind="cuda",
        least=5.2,
        over=RELEASED,
        B=GOAL_BATCH,
    ),
    StepGoal(
        text="1.25 times the released code, both in float32",
        kind="cpu",
        least=1.25,
        provider="ours, float32",
        over=RELEASED,
    ),
    StepGoal(text="1.25 times the released code, ours at its defaults", kind="cpu", least=1.25, over=RELEASED),
)


# -------------------------------------------------------------------------------------------------------------- measure


def view_flops(cell: Cell) -> int:
    """Return the FLOP of one view's forward pass without padding. A multiplication with its addition counts 2."""
    with torch.device("meta"):
        backbone = build_backbone(cell.backbone, cell.width)
        view = torch.empty(1, 3, cell.T, cell.side, cell.side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(view)
    return counter.get_total_flops()


@functorch.patch(activation_memory_budget=1.0)  # what a provider sets is restored after its first steps
def start(
    name: str, cell: Cell, inputs: Inputs, truth: Truth | None, device: torch.device
) -> tuple[Provider, dict[str, Any]]:
    """Return a provider after its first steps, with a queue that counts as full, and the check of its first step.

    Raises ArithmeticError if the loss is not finite.
    """
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    provider = PROVIDERS[name](cell, inputs, device)
    began = time.perf_counter()
    given = (truth.query, truth.key) if truth and provider.own_draw else None
    loss = float(provider.step(untimed, given))  # waits for the device
    first_s = time.perf_counter() - began
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    found: dict[str, Any] = {"precision": provider.precision, "passes": provider.passes, "first_step_s": first_s}
    found |= {"loss_error": None, "key_error": None, "right": None, "peak_bytes": None}
    if truth:
        found["key_error"] = float((provider.network.queue[:, : cell.B] - truth.keys).abs().max())
        if not provider.own_draw:
            found["loss_error"] = abs(loss - truth.loss) / abs(truth.loss)
        found["right"] = max(found["key_error"], found["loss_error"] or 0.0) <= ALLOWED[provider.precision]
    provider.network.enqueued.fill_(METHOD.queue_length)  # from here on queue entries are mined
    if device.type == "cuda":
        provider.step(untimed)  # allocates what later steps reuse
        torch.cuda.reset_peak_memory_stats(device)
        provider.step(untimed)
        torch.cuda.synchronize(device)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return provider, found


def time_turn(provider: Provider, device: torch.device, steps: int) -> list[float]:
    """Return the milliseconds of each step of a turn."""
    warm_up(provider, device)
    return harness.time_consecutive(lambda: provider.step(untimed), device, steps)


def warm_up(provider: Provider, device: torch.device) -> None:
    """Release the memory that another provider has left cached, and make one step, which allocates its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        provider.step(untimed)
        torch.cuda.synchronize(device)


def time_sections(provider: Provider, device: torch.device, steps: int) -> dict[str, float]:
    """Return the mean milliseconds of a step by SECTIONS.

    "loss" is the forward pass without the encoders. "other" is the time outside of all sections.
    """
    warm_up(provider, device)
    outer, inner = Stopwatch(device), Stopwatch(device)
    depth = 0

    @contextmanager
    def section(name: str) -> Iterator[None]:
        nonlocal depth
        depth += 1
        with (outer if depth == 1 else inner).section(name):
            yield
        depth -= 1

    with provider.encoders_timed(section):
        for _ in range(steps):
            provider.step(section)
            outer.step()
            inner.step()
    outside, within = outer.read(), inner.read()
    found = {name: outside.get(name, 0.0) for name in SECTIONS}
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
) -> Row:
    """Return one row of the results. It has the reason instead of figures for a provider that fails."""
    # Each cell compiles for its own sizes. Without a reset torch would reach its recompilation limit.
    torch.compiler.reset()
    inputs = make_inputs(cell, device)
    truth, unchecked = None, None
    try:
        truth = find_truth(cell, inputs, device)
    except RuntimeError as error:  # float32 takes the most memory of all
        unchecked = harness.reason(error)
    providers: dict[str, Provider] = {}
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[list[float]]] = {name: [] for name in names}  # by round

    def attempt(name: str, work: Callable[[str], None]) -> None:
        try:
            work(name)
            return
        except Exception as error:  # of any kind, because the other providers and cells are still worth measuring
            found[name] = {"skipped": harness.reason(error)}
        providers.pop(name, None)
        gc.collect()  # frees the failed step's memory, which the handler above still referred to

    def begin(name: str) -> None:
        providers[name], found[name] = start(name, cell, inputs, truth, device)

    def take_turn(name: str) -> None:
        times[name].append(time_turn(providers[name], device, steps))

    def split(name: str) -> None:
        found[name]["parts"] = time_sections(providers[name], device, PROFILED_STEPS[device.type])

    for name in names:
        attempt(name, begin)
    for name in harness.turns(list(providers), rounds):
        if name in providers:
            attempt(name, take_turn)
    for name in list(providers):
        attempt(name, split)

    flops = view_flops(cell)
    for name in providers:
        found[name] |= figures(times[name], found[name], cell, flops, ceilings)
    providers.clear()
    gc.collect()  # DeepSpeed's engines refer to themselves
    return asdict(cell) | {"flops_of_view": flops, "unchecked": unchecked, "providers": found}


def figures(
    times: list[list[float]], found: dict[str, Any], cell: Cell, flops: int, ceilings: Ceilings | None
) -> dict[str, Any]:
    """Return the quantiles of the milliseconds, and the rates that follow. times: by round. flops: those of a view."""
    every = [value for turn in times for value in turn]
    times_ms = harness.milliseconds(every)
    median_s = times_ms["median_ms"] / 1e3
    rate = found["passes"] * flops * cell.B / median_s
    return {
        **times_ms,
        "repetitions": len(every),
        "ms_by_round": [statistics.median(turn) for turn in times],
        "samples_per_second": cell.B / median_s,
        "flops_per_second": rate,
        "share_of_peak": None if ceilings is None else rate / ceilings.flops_per_second[found["precision"]],
    }


# --------------------------------------------------------------------------------------------------------------- report


def cell_of(row: Row) -> Cell:
    return harness.from_row(Cell, row)


def judge(rows: Sequence[Row], kind: str) -> list[dict[str, Any]]:
    """Judge each goal by its worst batch. A speedup is the median of the rounds' ratios. kind: "cuda" or "cpu"."""
    verdicts: list[dict[str, Any]] = []
    for goal in GOALS:
        where = str(Cell(B=goal.B)) if goal.B else "r2plus1d_10, any B, 16 x 112 x 112"
        verdict: dict[str, Any] = {"goal": goal.text, "where": where, "value": None, "by_round": None}
        verdict |= {"without_views": None, "verdict": "not measured on this device"}
        if goal.kind == kind:
            verdict |= judge_goal(goal, [row for row in rows if cell_of(row) == Cell(B=goal.B or row["B"])])
        verdicts.append(verdict)
    return verdicts


def judge_goal(goal: StepGoal, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the worst value of the rows and the verdict."""
    worst: dict[str, Any] = {"value": None, "verdict": "not measured in this run"}
    for row in rows:
        own = row["providers"].get(goal.provider, {})
        other = row["providers"].get(goal.over, {}) if goal.over else {}
        if own.get("right") is False:
            return {"value": None, "verdict": f"not met: {goal.provider} computes something else"}
        if "skipped" in own:
            return {"value": None, "verdict": f"not met: {goal.provider}: {own['skipped']}"}
        if "skipped" in other:
            worst["verdict"] = f"not measured: {goal.over}: {other['skipped']}"
            continue
        if not own or (goal.over and not other):
            continue
        found = compare(own, other) if goal.over else {"value": own["samples_per_second"]}
        if worst["value"] is None or found["value"] < worst["value"]:
            met = "met" if own["right"] else "met, by a step that was not checked"
            worst |= found | {"verdict": met if found["value"] >= goal.least else "not met"}
    return worst


def compare(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the speedup over `other`: the median over rounds, by round, and without the time of the views."""
    by_round = [theirs / mine for theirs, mine in zip(other["ms_by_round"], own["ms_by_round"], strict=True)]
    rests = [found["median_ms"] - found["parts"]["views"] for found in (other, own)]
    return {"value": statistics.median(by_round), "by_round": by_round, "without_views": rests[0] / rests[1]}


def cell_table(row: Row) -> str:
    """Return two tables of one cell, one provider a line: what was measured, and the sections of a step."""
    columns = ["provider", "products", "samples/s", "ms (20 % to 80 %)", "TFLOP/s", "of the peak rate", "peak memory"]
    columns += ["first step", "loss error", "key error", "check"]
    lines, sections = [], []
    for name, found in row["providers"].items():
        if "skipped" in found:
            lines.append([name, harness.spread(found), *[""] * 9])
            continue
        share, peak, right = found["share_of_peak"], found["peak_bytes"], found["right"]
        lines.append([
            name,
            found["precision"],
            f"{found['samples_per_second']:.3g}",
            harness.spread(found),
            f"{found['flops_per_second'] / 1e12:.3g}",
            "" if share is None else f"{share:.0%}",
            "" if peak is None else f"{peak / 2**30:.1f} GiB",
            f"{found['first_step_s']:.1f} s",
            *("" if found[key] is None else f"{found[key]:.0e}" for key in ("loss_error", "key_error")),
            "unchecked" if right is None else "right" if right else "WRONG",
        ])  # fmt: skip
        sections.append([name, *(f"{found['parts'][section]:.3g}" for section in SECTIONS)])
    title = f"{cell_of(row)}: {row['flops_of_view'] / 1e9:.1f} GFLOP a view"
    second = harness.table(["ms by section", *SECTIONS], sections)
    return f"\n{title}\n\n{harness.table(columns, lines)}\n\n{second}"


def goal_table(verdicts: Sequence[dict[str, Any]]) -> str:
    lines = []
    for verdict in verdicts:
        value, rounds, rest = verdict["value"], verdict["by_round"], verdict["without_views"]
        lines.append([
            verdict["goal"],
            verdict["where"],
            "" if value is None else f"{value:.3g}",
            "" if rounds is None else f"{min(rounds):.3g} to {max(rounds):.3g}",
            "" if rest is None else f"{rest:.3g}",
            verdict["verdict"],
        ])  # fmt: skip
    return harness.table(["goal", "where", "value", "by round", "without views", "verdict"], lines)


COLOURS = {RELEASED: "tab:gray", "eager bf16": "tab:blue", "ours": "tab:red", "ours, float32": "tab:pink"}
COLOURS["ours, recomputed"] = "tab:orange"


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot samples a second in every cell, and the sections of a step in the first cell."""
    names = list(rows[0]["providers"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 1.8 + 0.3 * max(len(names) * (len(rows) + 0.7), 8)), width_ratios=(1, 1.1)
    )
    height = 0.8 / len(names)
    for position, row in enumerate(rows):
        for rank, name in enumerate(names):
            found, y = row["providers"][name], position - 0.4 + height * (rank + 0.5)
            if "skipped" in found:
                left.text(0.0, y, f"  {found['skipped'][:40]}", va="center", fontsize=7, color="dimgray")
                continue
            label = name if position == 0 else None
            left.barh(y, found["samples_per_second"], 0.9 * height, color=COLOURS[name], label=label)
            left.text(found["samples_per_second"], y, f" {found['samples_per_second']:.3g}", va="center", fontsize=7)
    left.set_yticks(range(len(rows)), [str(cell_of(row)).replace(", ", "\n") for row in rows], fontsize=8)
    left.margins(x=0.12)
    left.set_ylim(len(rows) - 0.5, -0.5)  # leaves room for providers without a bar
    left.set_xlabel("samples a second")

    done = [name for name in names if "skipped" not in rows[0]["providers"][name]]
    starts = [0.0] * len(done)
    for number, section in enumerate(SECTIONS):
        widths = [max(rows[0]["providers"][name]["parts"][section], 0.0) for name in done]
        right.barh(done, widths, 0.6, left=starts, color=plt.get_cmap("tab10")(number), label=section)
        starts = [begin + width for begin, width in zip(starts, widths, strict=True)]
    right.invert_yaxis()
    right.set_xlabel(f"milliseconds of a step by section, {cell_of(rows[0])}")
    for panel in (left, right):
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)
    harness.add_titles(figure, "A training step: two clips, all views", caption)
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def plan(arguments: argparse.Namespace, kind: str) -> list[Cell]:
    """Return the cells to measure, the goals' cell first. kind: "cuda" or "cpu"."""
    cells = [
        cell
        for cell in CELLS[kind]
        if cell.B in (arguments.batch_sizes or [cell.B]) and cell.backbone in (arguments.backbones or [cell.backbone])
    ]
    return cells[:1] if arguments.quick else cells


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__, PROVIDERS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B", help="measure only cells of these sizes")
    parser.add_argument("--backbones", nargs="+", help="measure only cells of these backbones")
    parser.add_argument("--rounds", type=int)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    device = engine.start_processes()
    names = arguments.providers or DEFAULT_PROVIDERS[device.type]
    rounds, steps = QUICK_ROUNDS if arguments.quick else ROUNDS[device.type]
    rounds = arguments.rounds or rounds
    run = harness.Run("step", argv, arguments, device)
    run.show_device(f", {resolve_precision(read_ds_config(DS_CONFIG), device)}")
    cells = plan(arguments, device.type)
    run.measure(cells, lambda cell: measure(cell, names, device, rounds, steps, run.ceilings), cell_table)
    verdicts = judge(run.rows, device.type)
    print(f"\nGoals; those of a GPU are for an H200\n\n{goal_table(verdicts)}\n")
    content = {
        "question": "how fast is a training step of pretraining, and which section of it takes the time?",
        "convolutions": convolutions(device),
        "recipe": {"method": asdict(METHOD), "optim": asdict(OPTIM), "views": asdict(PRETRAIN)},
        "ds_config": f"ds_configs/{DS_CONFIG.name}",
        "milliseconds_per_step": goal_milliseconds(run.rows, device),
        "goals": verdicts,
    }
    caption = run.caption(f"{run.implementation}; median of {rounds} rounds of {steps} steps")
    run.publish(plot(run.rows, caption), content)
    run.refuse_failures(["ours", "ours, float32"], allowed="out of memory")


def goal_milliseconds(rows: Sequence[Row], device: torch.device) -> float | None:
    """Return the milliseconds of ours in the goals' cell if it ran Triton kernels, for benchmarks.views."""
    for row in rows:
        if cell_of(row) == Cell(B=GOAL_BATCH) and runs_triton(device):
            return row["providers"].get("ours", {}).get("median_ms")
    return None


def convolutions(device: torch.device) -> dict[str, Any]:
    """Return the settings of convolutions. "as released" and "eager bf16" always set cudnn.benchmark."""
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
