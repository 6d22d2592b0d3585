"""Is today's training step faster than that of an older commit? Both are measured in one run, in turns.

    python -m benchmarks.baseline                     on a CPU: r2plus1d_10 at 2 clips of 16 x 112 x 112 and 4 clips of
                                                      8 x 64 x 64, in float32 and at the defaults; on a GPU: 128 clips
    python -m benchmarks.baseline --commit 22c1ddd    compare with another commit
    python -m benchmarks.baseline --fill              only write the older commit's files to .baseline/COMMIT

Time to expect: 6 minutes on two cores. `git archive` writes the older commit's files to .baseline/COMMIT once. A copy
of the project without git needs this folder from a checkout.

Each of the two trees has its own process (benchmarks/baseline_worker.py), which builds the provider "ours" or
"ours, float32" of the tree's benchmarks/step_providers.py. Both begin with the same weights, queue, frames and seeds.
The losses of their first steps are compared. Only one process works at a time. Each turn begins with a step that is
not measured. On a GPU a process releases its cached memory after each turn.

The speedup of a round is the older commit's median step time divided by today's. The result is the median of the
rounds. Prints a table and writes baseline.json into results/DEVICE, after each cell.
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.step_providers import Cell
from dclr import report
from dclr.errors import UserError

COMMIT = "64aabb1"
"""The last commit before the step was made faster. On a GPU its step is that of 22c1ddd and of results/nvidia-h200. On
a CPU in float32, 22c1ddd sums batch statistics in float32 and 64aabb1 in float64, so their times differ."""

FOLDER = harness.ROOT / ".baseline"
PATHS = ("benchmarks", "dclr", "ds_configs", "kernels")

CELLS = {
    "cuda": (Cell(B=128),),
    "cpu": (Cell(B=2), Cell(B=4, T=8, side=64, H=120, W=160)),
}
PROVIDERS = {"cuda": ("ours",), "cpu": ("ours, float32", "ours")}
ROUNDS = {"cuda": (5, 4), "cpu": (5, 2)}  # rounds, measured steps a turn

ALLOWED = {"ieee": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Greatest allowed relative difference of the first steps' losses. The two steps sum in different orders, so their
rounding errors differ."""

GOAL = 1.15
"""The least speedup in float32 on a CPU, in every cell."""


# --------------------------------------------------------------------------------------------------------- older commit


def fill(commit: str, folder: Path | None = None) -> Path:
    """Return the folder of a commit's files. Write it from git if it does not exist yet.

    Raises UserError if git does not have the commit.
    """
    folder = folder or FOLDER
    target = folder / commit
    if target.is_dir():
        return target
    try:
        made = subprocess.run(["git", "-C", str(harness.ROOT), "archive", commit, *PATHS], capture_output=True)
        why = made.stderr.decode().strip().splitlines()[-1:] or [f"status {made.returncode}"]
        failed = made.returncode != 0
    except OSError as error:
        why, failed = [str(error)], True
    if failed:
        raise UserError(
            f"{target} does not exist, and git cannot write it ({why[0]}): "
            f"run `python -m benchmarks.baseline --fill --commit {commit}` in a git checkout, and copy .baseline"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
            archive.extractall(Path(unfinished) / "tree", filter="data")
        (Path(unfinished) / "tree").rename(target)
    return target


# -------------------------------------------------------------------------------------------------------------- measure


class Tree:
    """The process of one source tree. Error messages contain the tree's `name`."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request to the process and return its answer. Raises RuntimeError if the process failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended, so the next line reads nothing
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"the process of {self.name} ended: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer


@contextmanager
def start(name: str, tree: Path) -> Iterator[Tree]:
    """Start the process of a source tree. It ends with the context."""
    worker = Path(__file__).with_name("baseline_worker.py")
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", str(worker)],
                env=variables | {"PYTHONPATH": str(tree)},
                cwd=tree,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        try:
            yield Tree(name, process, log)
        finally:
            process.kill()
            process.communicate()


def measure(
    cell: Cell, provider: str, rounds: int, steps: int, commit: str = COMMIT, folder: Path | None = None
) -> Row:
    """Return what was measured in one cell: milliseconds, peak memory and first loss of both trees, and the speedup.

    Args:
        provider: "ours" or "ours, float32".
        steps: measured steps of a turn.
        commit: the older commit.
        folder: the folder of the older commits' files. None: .baseline.

    Raises:
        UserError: the older commit's files are missing.
        RuntimeError: one of the processes failed.
    """
    with ExitStack() as stack:
        trees = {
            "before": stack.enter_context(start(f"commit {commit}", fill(commit, folder))),
            "after": stack.enter_context(start("today's tree", harness.ROOT)),
        }
        built = {key: tree.ask(do="build", cell=asdict(cell), provider=provider) for key, tree in trees.items()}
        turns: dict[str, list[dict[str, Any]]] = {key: [] for key in trees}
        for key in harness.turns(list(trees), rounds):
            turns[key].append(trees[key].ask(do="turn", steps=steps))
    return asdict(cell) | {"provider": provider, "commit_before": commit} | summarise(built, turns, cell.B)


def summarise(built: dict[str, dict[str, Any]], turns: dict[str, list[dict[str, Any]]], size: int) -> Row:
    """Return the figures of both trees, keys "before" and "after", and the speedup by round with its quantiles."""
    row: Row = {}
    for key, answers in turns.items():
        times = harness.milliseconds(ms for answer in answers for ms in answer["ms"])
        row[key] = built[key] | times | {"ms_by_round": [statistics.median(answer["ms"]) for answer in answers]}
        row[key]["samples_per_second"] = size / times["median_ms"] * 1e3
        row[key]["peak_bytes"] = max((answer["peak_bytes"] for answer in answers if answer["peak_bytes"]), default=None)
    pairs = zip(row["before"]["ms_by_round"], row["after"]["ms_by_round"], strict=True)
    by_round = [before / after for before, after in pairs]
    before, after = (built[key]["first_loss"] for key in ("before", "after"))
    error = abs(after - before) / abs(before)
    row["loss_error"] = error if math.isfinite(error) else None
    row["same"] = (
        built["before"]["precision"] == built["after"]["precision"] and error <= ALLOWED[built["before"]["precision"]]
    )
    row["speedup_by_round"] = by_round
    return row | {f"speedup_{name}": value for name, value in harness.quantiles(by_round).items()}


# --------------------------------------------------------------------------------------------------------------- report


def judge(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """Judge the goal by the worst cell. kind: "cuda" or "cpu"."""
    verdict: dict[str, Any] = {"goal": f"{GOAL} times the step of {COMMIT}, both in float32 on a CPU", "worst": None}
    these = [row for row in rows if row["provider"] == "ours, float32" and row["commit_before"] == COMMIT]
    if kind != "cpu":
        return verdict | {"verdict": "not measured on this device"}
    if not these:
        return verdict | {"verdict": "not measured in this run"}
    worst = min(row["speedup_median"] for row in these)
    if not all(row["same"] for row in these):
        return verdict | {"worst": worst, "verdict": "not met: the two steps have different losses"}
    return verdict | {"worst": worst, "verdict": "met" if worst >= GOAL else "not met"}


def table(rows: Sequence[Row]) -> str:
    columns = ["cell", "provider", "ms before", "ms today", "samples/s today", "speedup", "by round", "first losses"]
    lines = []
    for row in rows:
        lines.append([
            str(harness.from_row(Cell, row)),
            row["provider"],
            f"{row['before']['median_ms']:.4g}",
            f"{row['after']['median_ms']:.4g}",
            f"{row['after']['samples_per_second']:.4g}",
            f"{row['speedup_median']:.3f}",
            f"{min(row['speedup_by_round']):.3f} to {max(row['speedup_by_round']):.3f}",
            "equal" if row["same"] else "DIFFERENT",
        ])  # fmt: skip
    return harness.table(columns, lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=COMMIT, help=f"the older commit (default {COMMIT})")
    parser.add_argument("--fill", action="store_true", help="only write the older commit's files to .baseline/COMMIT")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B", help="measure only cells of these sizes")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS["cpu"], help="measure only these")
    parser.add_argument("--rounds", type=int, help="turns of each tree")
    parser.add_argument("--steps", type=int, help="measured steps of a turn")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder that holds one folder a device")
    return parser


def run(arguments: argparse.Namespace) -> None:
    for name in ("rounds", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, but must be at least 1")
    print(f"The older commit's files are in {fill(arguments.commit)}")
    if arguments.fill:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds, steps = ROUNDS[device.type]
    rounds, steps = arguments.rounds or rounds, arguments.steps or steps
    cells = [cell for cell in CELLS[device.type] if cell.B in (arguments.batch_sizes or [cell.B])]
    if arguments.batch_sizes and not cells:
        raise UserError(f"--batch-sizes: choose from {', '.join(str(cell.B) for cell in CELLS[device.type])}")
    environment, rows = report.environment(device), list[Row]()
    for cell in cells:
        for provider in arguments.providers or PROVIDERS[device.type]:
            rows.append(measure(cell, provider, rounds, steps, arguments.commit))
            print(table(rows[-1:]), flush=True)
            publish(rows, environment, device, arguments.results)
    verdict = judge(rows, device.type)
    print(f"\nGoal: {verdict['goal']}: {verdict['verdict']}")
    different = [row for row in rows if not row["same"]]
    if different:
        raise RuntimeError(f"{len(different)} of {len(rows)} pairs of first steps have different losses")


def publish(rows: Sequence[Row], environment: dict[str, Any], device: torch.device, results: Path) -> None:
    """Write baseline.json. If the environment variable OUT names a folder, write a copy there."""
    content = {
        "question": "is today's training step faster than that of an older commit?",
        "environment": environment,
        "rows": list(rows),
        "goals": [judge(rows, device.type)],
    }
    folder = harness.results_folder(device, results)
    for target in (folder, *([Path(out)] if (out := os.environ.get("OUT")) else [])):
        target.mkdir(parents=True, exist_ok=True)
        report.write_json(target / "baseline.json", content)


def main(argv: Sequence[str] | None = None) -> None:
    harness.run_command(make_parser(), run, argv)


if __name__ == "__main__":
    main()
