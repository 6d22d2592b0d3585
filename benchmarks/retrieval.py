"""What does retrieval cost in time and memory? Ours is compared with a full sort, torch.topk of chunks, and faiss.

    python -m benchmarks.retrieval                                   all cells on one core: 11 minutes
    python -m benchmarks.retrieval --quick                           the first cell only, one round: half a minute
    python -m benchmarks.retrieval --faiss-python VENV/bin/python    another environment's Python for faiss

faiss (pip install faiss-cpu) is not a dependency of dclr. Without it, its rows say that it is not installed.

Providers:
    ours               dclr.evaluation.retrieval: exact sums in float64, chunks, ties in the order of the gallery
    full sort          the matrix of all cosines in float32, sorted by a stable sort: what ours did before
    topk of chunks     the same chunks as ours in float32, with torch.topk, and ties in any order
    faiss IndexFlatIP  the exact index of faiss, in float32

Each finds the 50 nearest of G gallery videos for each of Q queries, from features of 512 numbers. The features are
synthetic: a mean for each of 400 classes plus noise, in the order of the classes. Subtracting the mean and scaling to
length 1 are part of the time. Every turn is a process of its own with one thread. A round is one turn of each provider,
and the order rotates. A ratio compares turns of one round. Peak memory is the most that the process held, with
libraries, features and results.

The sizes are those of UCF101, split 1, of a tenth of Kinetics-400's validation videos, and of 20,000 of them. In the
last cell only ours runs, once, because the others would take ten times as long as in the second cell. The goal there is
a peak below 4 GiB.

Prints a table, and writes retrieval.json and retrieval.png into results/cpu.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import ROOT, NotAvailable, Row
from benchmarks.retrieval_worker import PROVIDERS

FEATURES, DEPTH = 512, 50
ROUNDS = 3
GOAL_GIB = 4.0
LARGEST_SORT_GIB = 8.0
"""Memory above which the full sort is skipped. It needs 20 bytes for each pair of a query and a gallery video."""


@dataclass(frozen=True)
class Cell:
    """One size."""

    Q: int  # queries
    G: int  # gallery videos
    alone: bool = False  # True: only ours runs, once

    def __str__(self) -> str:
        return f"{self.Q:,} queries, {self.G:,} gallery videos"


CELLS = (Cell(3_783, 9_537), Cell(2_000, 240_000), Cell(20_000, 240_000, alone=True))


def turn(provider: str, cell: Cell, python: str, folder: Path) -> dict[str, Any]:
    """Run a provider once in a new process and return its seconds, its peak memory and the rows that it found."""
    if provider == "full sort" and 20 * cell.Q * cell.G > LARGEST_SORT_GIB * 2**30:
        raise NotAvailable(f"needs {20 * cell.Q * cell.G / 2**30:.0f} GiB")
    out = folder / "nearest.npy"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    numbers = map(str, (cell.Q, cell.G, FEATURES, DEPTH, out))
    script = str(ROOT / "benchmarks" / "retrieval_worker.py")
    done = subprocess.run([python, script, provider, *numbers], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NotAvailable("not installed" if "No module named 'faiss'" in last else last)
    return {**json.loads(done.stdout.splitlines()[-1]), "nearest": np.load(out)}


def measure(cell: Cell, rounds: int, pythons: dict[str, str]) -> Row:
    """Return the row of a cell. It has each provider's seconds by round, peak memory and agreement with ours."""
    names = ["ours"] if cell.alone else list(PROVIDERS)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as made:
        for number in range(1 if cell.alone else rounds):
            for name in harness.turn(names, number):
                if name in skipped:
                    continue
                try:
                    turns[name].append(turn(name, cell, pythons.get(name, sys.executable), Path(made)))
                    print(f"  {name}: {turns[name][-1]['seconds']:.1f} s", flush=True)
                except NotAvailable as error:
                    skipped[name] = str(error)
    nearest = turns["ours"][0]["nearest"] if turns["ours"] else None
    providers: dict[str, dict[str, Any]] = {}
    for name, own in turns.items():
        if name in skipped or nearest is None:
            providers[name] = {"skipped": skipped.get(name, "ours failed")}
            continue
        seconds = [each["seconds"] for each in own]
        ratios = [other["seconds"] / each["seconds"] for each, other in zip(turns["ours"], own, strict=True)]
        providers[name] = {
            "seconds_by_round": seconds,
            "seconds": statistics.median(seconds),
            "time_relative_to_ours": statistics.median(ratios),
            "ratio_by_round": ratios,
            "peak_gib": max(each["peak_gib"] for each in own),
            "same_rows": float((own[0]["nearest"] == nearest).mean()),
        }
    return {**asdict(cell), "providers": providers}


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of a table without times, for every row and provider."""
    made = []
    for row in rows:
        for name, found in row["providers"].items():
            if "skipped" in found:
                columns = [f"skipped: {found['skipped']}", "", "", ""]
            else:
                by_round = ", ".join(f"{ratio:.2f}" for ratio in found["ratio_by_round"])
                same = f"{found['same_rows']:.4%}"
                columns = [f"{found['time_relative_to_ours']:.2f}", by_round, f"{found['peak_gib']:.2f} GiB", same]
            made.append([str(Cell(row["Q"], row["G"])), name, *columns])
    return made


COLUMNS = ["size", "provider", "time relative to ours", "by round", "peak memory", "same nearest rows as ours"]


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot the peak memory of each provider, a group of bars for each size."""
    figure, panel = plt.subplots(figsize=(9, 4))
    names = [
        (f"{name}\n{Cell(row['Q'], row['G'])}", found["peak_gib"])
        for row in rows
        for name, found in row["providers"].items()
        if "peak_gib" in found
    ]
    panel.barh([name for name, _ in names], [peak for _, peak in names], 0.6, color="tab:blue")
    panel.axvline(GOAL_GIB, color="tab:red", linewidth=1)
    panel.set_xlabel("peak memory of the process, GiB; red: the goal for ours")
    panel.tick_params(axis="y", labelsize=7)
    panel.invert_yaxis()
    harness.add_titles(figure, "Retrieval: peak memory", caption)
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="measure the first cell only, in one round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--faiss-python", metavar="FILE", help="Python of an environment with faiss and numpy")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    run = harness.Run("retrieval", argv, arguments, torch.device("cpu"))
    pythons = {"faiss IndexFlatIP": arguments.faiss_python} if arguments.faiss_python else {}
    cells, rounds = (CELLS[:1], 1) if arguments.quick else (CELLS, arguments.rounds)

    def show(row: Row) -> str:
        return harness.table(COLUMNS, lines([row]))

    run.measure(cells, lambda cell: measure(cell, rounds, pythons), show)
    goal = harness.Goal(
        text=f"ours stays below {GOAL_GIB:g} GiB for 20,000 queries and 240,000 gallery videos",
        least=1.0,
        value=lambda row: GOAL_GIB / row["providers"]["ours"].get("peak_gib", float("inf")),
        size={"Q": 20_000, "G": 240_000},
    )
    verdict = {"goal": goal.text, **harness.judge(run.rows, goal, lambda row: str(Cell(row["Q"], row["G"])))}
    print(f"\n{verdict['goal']}: {verdict['verdict']}")
    content = {
        "question": "what does retrieval cost in time and memory, next to what users would otherwise use?",
        "features": FEATURES,
        "depth": DEPTH,
        "threads": 1,
        "rounds": rounds,
        "goals": [verdict],
    }
    run.publish(plot(run.rows, run.caption(f"{FEATURES} numbers a video, the {DEPTH} nearest")), content)
    run.refuse_failures(["ours"])


if __name__ == "__main__":
    main()
