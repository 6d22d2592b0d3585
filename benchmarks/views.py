"""How fast are the three views made from decoded frames? Nine implementations of the same steps, in one run.

    python -m benchmarks.views                        bfloat16 at 128, 40 and 8 clips, from 240 x 320 and 128 x 171;
                                                      float32 at 40 clips
    python -m benchmarks.views --quick                bfloat16 at 128 clips only, fewer repetitions
    python -m benchmarks.views --precision float32    one precision on the whole grid; also bf16, or both
    python -m benchmarks.views --minutes 4            begin no new cell after 4 minutes; 128 clips come first

Time to expect: on an H200, 62 seconds for the first of 8 cells, most of it torch.compile and the providers that work
clip by clip. Without a GPU the grid is one small cell: 20 seconds on two cores. There "ours" is the reference, and the
output says so. Result to expect on an H200, 128 clips from 240 x 320 in bfloat16: 0.93 ms, 24.6 times kornia on the
device.

Providers (benchmarks/view_providers.py). Views are 16 x 112 x 112, drawn by the pretraining recipe, with a dynamic view
whose first frame is the difference from the last ("wrap"):
    as released             the steps of the released loader and training loop. On the CPU, clip by clip: repeat a still
                            T times, convert to float, crop by torchvision. On the device: kornia's VideoSequential,
                            roll, subtract, stack. The CPU's time counts; a loader would spread it over its workers
    kornia, all on device   the same VideoSequential after a RandomResizedCrop that resamples the whole batch at once. A
                            still is augmented once and then repeated
    reference               the reference in kernels/view_generation.py: kornia's functions, each clip with its own draw
    torchvision v2          torchvision's functionals, clip by clip, each with its own draw. Its luma weighs red by
                            0.2989 where the others have 0.299, which the error shows
    triton-augment          its TritonFusedAugment, if installed (pip install triton-augment). It does less than the
                            others: no resize, hue, blur or random order, and contrast about 0.5
    eager, batched          the formula of the reference for all clips at once and without branches, as torch.compile
                            needs
    torch.compile           the batched provider, compiled for fixed sizes
    ours                    `kernels.generate_views`
    ours, from YUV          the same from planes of YUV 4:2:0, which have half the bytes

Frames are uint8 on the device, those of "as released" on the CPU. A provider that draws, or reads the draw, on the host
is not replayed from a CUDA graph ("no graph" in the tables). Providers that work clip by clip are timed in a loop of
their own, with a fifth of the repetitions. Arithmetic is in float32, and views are rounded to the cell's precision at
the end.

The error is the greatest difference of any value of the three views from the same formula in float64. "Rounding" is the
error of the float64 views rounded to the cell's precision. Providers that draw their own augmentations do as much work
on other numbers, so they have no error.

The least bytes to move: each pixel of the crop boxes is read once (3 bytes, 1.5 as YUV), and three views are written,
of the static view one frame. If a box is more than twice as high as the view, bilinear resizing skips rows, which are
counted all the same. The share of the bandwidth is the rate of these bytes divided by the rate of a large copy. The
share of the limit also counts instructions: it is the larger of the time of these bytes and the time of the
instructions, divided by the measured time. Both shares are measured on a GPU only.

Prints tables and writes views.json and views.png into results/DEVICE. --precision and --quick add to the file names.
The share of a training step (two calls of 128 clips) is judged if that folder holds step.json.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import Ceilings, Goal, Row, speedup
from benchmarks.view_providers import (
    CLIP_BY_CLIP,
    OWN_DRAW,
    PROVIDERS,
    Call,
    Cell,
    Output,
    float64_views,
    greatest_error,
    make_inputs,
)
from dclr.data.augmentation import PRETRAIN
from dclr.kernels import ViewParams, Views

BATCH_SIZES = {"cuda": (8, 40, 128), "cpu": (2,)}
SOURCES = {"cuda": ((240, 320), (128, 171)), "cpu": ((120, 160),)}  # H, W
VIEWS = {"cuda": (16, 112), "cpu": (4, 56)}  # T, and h = w
PRECISIONS: dict[str, tuple[Output, ...]] = {"cuda": ("bf16", "float32"), "cpu": ("float32",)}
REPETITIONS = {"cuda": 50, "cpu": 8}
QUICK_REPETITIONS = 10
GOAL_BATCH = 128
SECOND_BATCH = 40  # the only batch of the second precision, unless --precision asks for it


INSTRUCTIONS_OF_A_PIXEL = 805
"""Lane instructions of the view kernels of commit 64aabb1 for each pixel of a clip, with all three of its views. The
number is an estimate from the machine code for sm_90. It does not change, so that a goal means the same time."""

LANE_RATE = 132 * 128 * 1.755e9
"""Lane instructions per second that an H200 can issue: multiprocessors, lanes of each, clock rate."""


def share_of_limit(row: Row) -> float | None:
    return row["providers"].get("ours", {}).get("share_of_limit")


GOALS = (
    Goal(text="25 times kornia, all on device", value=speedup("kornia, all on device"), least=25),
    Goal(text="3 times torch.compile", value=speedup("torch.compile"), least=3),
    Goal(text="60 % of the limit by bytes and instructions", value=share_of_limit, least=0.6),
)
STEP_GOAL = 0.03  # share of a training step of 128


# -------------------------------------------------------------------------------------------------------------- measure


def bytes_to_move(params: ViewParams, T: int, dtype: torch.dtype, yuv: bool = False) -> float:
    """Return the bytes of the crop boxes of T frames and a still, read once, and of three views. params: on the CPU."""
    clip, still = (int((rows.box[:, 2] * rows.box[:, 3]).sum()) for rows in (params.clip, params.still))
    frames = params.clip.box.shape[0] * (2 * T + 1)  # all frames of the static view are equal
    written = frames * 3 * math.prod(params.size) * dtype.itemsize
    return (clip * T + still) * (1.5 if yuv else 3) + written


def shares(moved: float, pixels: int, found: dict[str, Any], ceilings: Ceilings | None) -> dict[str, float | None]:
    """Return the shares of the bandwidth and of the limit. moved: bytes. pixels: those of all frames of the clips."""
    if ceilings is None:
        return {"share_of_bandwidth": None, "share_of_limit": None}
    median_s, of_bytes_s = found["median_ms"] / 1e3, moved / ceilings.bytes_per_second
    limit_s = max(of_bytes_s, INSTRUCTIONS_OF_A_PIXEL * pixels / LANE_RATE)
    return {"share_of_bandwidth": of_bytes_s / median_s, "share_of_limit": limit_s / median_s}


@torch.no_grad()
def measure(cell: Cell, names: Sequence[str], device: torch.device, repetitions: int, ceilings: Ceilings | None) -> Row:
    """Return one row of the results."""
    # Each cell compiles for its own sizes. Without a reset torch would reach its recompilation limit.
    torch.compiler.reset()
    inputs = make_inputs(cell, device)
    truths = {yuv: float64_views(inputs, yuv) for yuv in (False, True)}
    rounding = greatest_error(Views(*(view.to(cell.dtype) for view in truths[False])), truths[False])

    def prepare(name: str) -> tuple[Call, dict[str, Any]]:
        call = PROVIDERS[name](inputs, cell.dtype)
        views = call()
        return call, {"error": None if name in OWN_DRAW else greatest_error(views, truths["YUV" in name])}

    slow = [name for name in names if name in CLIP_BY_CLIP]
    fast = [name for name in names if name not in CLIP_BY_CLIP]
    found = harness.check_and_time(slow, prepare, device, max(repetitions // 5, 2), warmup=1)
    found |= harness.check_and_time(fast, prepare, device, repetitions)
    for name, provider in found.items():
        if "median_ms" in provider:
            moved = bytes_to_move(inputs.host_params, cell.T, cell.dtype, yuv="YUV" in name)
            provider |= shares(moved, cell.B * cell.T * math.prod(inputs.host_params.size), provider, ceilings)
    limits = {
        "bytes": bytes_to_move(inputs.host_params, cell.T, cell.dtype),
        "bytes_from_yuv": bytes_to_move(inputs.host_params, cell.T, cell.dtype, yuv=True),
        "rounding": rounding,
    }
    return asdict(cell) | limits | {"providers": {name: found[name] for name in names}}


# --------------------------------------------------------------------------------------------------------------- report


def name_cell(row: Row) -> str:
    return str(harness.from_row(Cell, row))


def judge(rows: Sequence[Row], genuine: bool, step_ms: float | None) -> list[dict[str, Any]]:
    """Judge the goals and the share of a training step. Rows of 128 clips are typical.

    step_ms: milliseconds of a training step of 128 samples, None if unknown.
    """
    typical = ("at_128", lambda row: row["B"] == GOAL_BATCH)
    return [*harness.judge_kernels(rows, GOALS, name_cell, genuine, typical), judge_step(rows, genuine, step_ms)]


def judge_step(rows: Sequence[Row], genuine: bool, step_ms: float | None) -> dict[str, Any]:
    """Judge the share of a training step, which makes views twice: of the query clips and of the key clips."""
    verdict: dict[str, Any] = {"goal": f"under {STEP_GOAL:.0%} of the training step at B 128", "precision": "bf16"}
    verdict |= {"at_128": None, "worst": None, "worst_at": None}
    times = [
        (2 * ours["median_ms"], name_cell(row))
        for row in rows
        if (row["precision"], row["B"]) == ("bf16", GOAL_BATCH)
        and "median_ms" in (ours := row["providers"].get("ours", {}))
    ]
    if not genuine:
        return verdict | {"verdict": "not measured on this device"}
    if not times:
        return verdict | {"verdict": "not measured in this run"}
    if step_ms is None:
        return verdict | {"verdict": "not judged: run benchmarks.step first"}
    milliseconds, where = max(times)
    share = milliseconds / step_ms
    verdict |= {"at_128": share, "worst": share, "worst_at": where}
    return verdict | {"verdict": "met" if share < STEP_GOAL else "not met"}


def step_milliseconds(folder: Path) -> float | None:
    """Return the milliseconds of a training step of 128 samples from the device's step.json, None if it has none."""
    path = folder / "step.json"
    value = json.loads(path.read_text()).get("milliseconds_per_step") if path.is_file() else None
    return float(value) if isinstance(value, int | float) else None


def cell_table(row: Row) -> str:
    """Return what was measured in one cell as a table, one provider a line."""
    moved = f"{row['bytes'] / 1e6:.1f} MB must move, {row['bytes_from_yuv'] / 1e6:.1f} MB from YUV"
    lines = []
    for name, found in row["providers"].items():
        if "skipped" in found:
            lines.append([name, harness.spread(found), "", "", ""])
            continue
        share, peak, error = (found[key] for key in ("share_of_bandwidth", "peak_extra_bytes", "error"))
        lines.append([
            name,
            harness.spread(found),
            "" if share is None else f"{share:.1%}",
            "" if peak is None else f"{peak / 2**20:.0f} MiB",
            "own draw" if error is None else f"{error:.1e}",
        ])  # fmt: skip
    table = harness.table(
        ["provider", "ms (20 % to 80 %)", "share of the bandwidth", "peak extra memory", "error"], lines
    )
    return f"\n{name_cell(row)}: {moved}; rounding {row['rounding']:.1e}\n\n{table}"


MARKERS = "o^sDv"


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot milliseconds of each provider, one line for each B, one panel for each source size.

    Only the precision that most rows have is shown.
    """
    rows = harness.most_measured(rows)
    names = list(rows[0]["providers"])
    sources = list(dict.fromkeys(harness.from_row(Cell, row).source for row in rows))
    batches = sorted({row["B"] for row in rows})
    height, with_floor = 0.8 / len(batches), False
    figure, panels = plt.subplots(
        1,
        len(sources),
        figsize=(3.5 + 4.5 * len(sources), 2.2 + 0.22 * len(names) * (1 + len(batches))),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for panel, source in zip(panels[0], sources, strict=True):
        for row in (row for row in rows if harness.from_row(Cell, row).source == source):
            rank = batches.index(row["B"])
            for position, name in enumerate(names):
                found, y = row["providers"][name], position - 0.4 + height * (rank + 0.5)
                if "skipped" in found:
                    where = panel.get_yaxis_transform()  # x from 0 to 1 across the panel
                    panel.text(0.02, y, "skipped", va="center", fontsize=7, color="dimgray", transform=where)
                    continue
                low, median, high = (found[key] for key in ("low_ms", "median_ms", "high_ms"))
                colour = "tab:red" if name.startswith("ours") else "tab:blue"
                panel.plot([low, high], [y, y], color=colour, linewidth=1.5)
                panel.plot(median, y, MARKERS[rank % len(MARKERS)], color=colour, markersize=4.5)
                offset = {"xytext": (6, 0), "textcoords": "offset points"}
                panel.annotate(f"{median:.3g}", (high, y), va="center", fontsize=7, **offset)
                if (share := found["share_of_bandwidth"]) is not None:
                    panel.plot([share * median] * 2, [y - height / 2, y + height / 2], color="black", linewidth=1.2)
                    with_floor = True
        panel.set_title(f"from {source}", fontsize=10)
        panel.set_xlabel("milliseconds")
        panel.set_xscale("log")
        panel.margins(x=0.12)
        harness.label_log_axis(panel.xaxis)
        panel.tick_params(axis="x", labelrotation=60, labelsize=8)
        panel.grid(True, axis="x", alpha=0.3)
        panel.set_yticks(range(len(names)), names)
        for border in range(1, len(names)):
            panel.axhline(border - 0.5, color="lightgray", linewidth=0.6)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        plt.Line2D([], [], color="gray", marker=MARKERS[rank % len(MARKERS)], linestyle="", label=f"B = {B}")
        for rank, B in enumerate(batches)
    ]
    if with_floor:
        label = "the bytes at a copy's bandwidth"
        handles.append(plt.Line2D([], [], color="black", marker="|", linestyle="", markersize=10, label=label))
    T, side, precision = (rows[0][key] for key in ("T", "side", "precision"))
    title = f"Three views of {T} x {side} x {side}, {precision}"
    harness.add_titles(figure, title, caption, handles=handles, ncols=len(handles))
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def plan(arguments: argparse.Namespace, kind: str) -> list[Cell]:
    """Return the cells to measure, large batches first. kind: "cuda" or "cpu"."""
    T, side = VIEWS[kind]
    precisions = arguments.precision or PRECISIONS[kind][: 1 if arguments.quick else None]
    batches = sorted(arguments.batch_sizes or BATCH_SIZES[kind], reverse=True)
    cells = []
    for number, precision in enumerate(precisions):
        chosen = batches
        if arguments.quick:
            chosen = batches[:1]
        elif number > 0 and not arguments.precision:
            chosen = [B for B in batches if B == SECOND_BATCH] or batches[:1]
        cells += [Cell(precision=precision, B=B, T=T, H=H, W=W, side=side) for B in chosen for H, W in SOURCES[kind]]
    return cells


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__, PROVIDERS)
    harness.add_kernel_options(parser, get_args(Output))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    device, names = torch.device(arguments.device), arguments.providers or list(PROVIDERS)
    repetitions = arguments.repetitions or (QUICK_REPETITIONS if arguments.quick else REPETITIONS[device.type])
    run = harness.Run("views", argv, arguments, device)
    run.show_device()
    cells = plan(arguments, device.type)
    run.measure(cells, lambda cell: measure(cell, names, device, repetitions, run.ceilings), cell_table)
    step_ms = step_milliseconds(run.folder)
    verdicts = judge(run.rows, run.genuine, step_ms)
    columns = {"goal": "goal", "precision": "precision", "at_128": "at B 128", "worst": "worst", "worst_at": "where"}
    columns |= {"verdict": "verdict"}
    table = harness.goal_table(verdicts, columns)
    print(f"\nGoals for an H200: speedup of ours over the other, or a share\n\n{table}\n")
    content = {
        "question": "how fast are the three views made from decoded frames?",
        "recipe": asdict(PRETRAIN),
        "goals": verdicts,
        "step_ms": step_ms,
    }
    caption = run.caption(f"{run.implementation}; median of {repetitions}, line: 20 % to 80 %")
    run.publish(plot(run.rows, caption), content)
    run.refuse_failures(["ours", "ours, from YUV"])


if __name__ == "__main__":
    main()
