"""Do memory, open files and threads of a long run's processes stay constant?

    python -m benchmarks.soak --data WEIZMANN              an hour on two cores: two ranks with two workers each
    python -m benchmarks.soak --data WEIZMANN --minutes 3  a short trial

Pretrains the demo's network through the deepspeed launcher, with a checkpoint every ten epochs, and inspects all its
processes every ten seconds. The last quarter of the time ("late") is compared with the quarter after the first tenth
("early"). At the end the run gets SIGTERM, as from a scheduler, and must write a checkpoint.

Prints a table and writes soak.json and soak.png into results/cpu. Exit status 1: something grew by more than is
allowed, or the run did not stop as it should. Result to expect: a rank has 217 MiB of its own, early and late.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import ROOT, Row
from dclr.training import checkpoint

EVERY = 10.0  # seconds between two inspections
RANKS, WORKERS = 2, 2
STOPPED = "asked to stop"  # in the message of a run that wrote a checkpoint after SIGTERM
KINDS = ("rank", "worker", "decoder")  # each worker is a child of a rank and has one decoder process

# Allowed growth of a process. Memory may grow a little, because allocators fragment it. A leak of 1 KB a sample would
# be 40 MB in an hour.
ALLOWED = {"mib": 16.0, "files": 0, "threads": 0}

Usage = dict[str, dict[str, float]]
"""Kind of process -> `mib`, `files` and `threads` at one moment, the most of any process, and `count` of processes."""


def training_command(data: Path, out: Path) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)]
    what = ["--data", str(data), "--out", str(out), "--preset", "demo", "--batch-size", "16", "--fill-steps", "32"]
    how = ["--workers", str(WORKERS), "--epochs", "1000000", "--checkpoint-every", "10", "--log-every", "20"]
    return [*launcher, "train.py", "pretrain", *what, *how]


def children(process: int) -> list[int]:
    """Return the children of all threads of a process."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def ranks(launcher: int) -> list[int]:
    """Return the ranks among the launcher's descendants. Their children, with the same command, are not searched."""
    found, waiting = [], [launcher]
    while waiting:
        process = waiting.pop()
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if b"train.py" in words and b"--local_rank" in b" ".join(words) and b"deepspeed" not in b" ".join(words):
            found.append(process)
        else:
            waiting += children(process)
    return found


def inspect(process: int) -> dict[str, float]:
    """Return a process's own memory (a page that n processes share counts as 1/n), open files and threads."""
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    kilobytes = re.search(r"^Pss_Anon:\s+(\d+) kB$", rollup, re.MULTILINE)
    threads = re.search(r"^Threads:\s+(\d+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert kilobytes
    assert threads
    return {
        "mib": int(kilobytes[1]) / 1024,
        "files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(threads[1]),
    }


def inspect_all(launcher: int) -> Usage:
    """Return the usage of each kind of process."""
    by_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
    by_kind["rank"] = ranks(launcher)
    for rank in by_kind["rank"]:
        by_kind["worker"] += children(rank)
    for worker in by_kind["worker"]:
        by_kind["decoder"] += children(worker)
    found: Usage = {}
    for kind, processes in by_kind.items():
        each = [inspect(process) for process in processes]
        if each:
            found[kind] = {name: max(e[name] for e in each) for name in each[0]} | {"count": len(each)}
    return found


def summarise(usages: Sequence[tuple[float, Usage]], seconds: float) -> list[Row]:
    """Return a row for each kind: medians early (10 to 35 % of the time) and late (the last quarter).

    usages: each with its time in seconds, of `seconds` in all.
    """
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at, usage in usages:
        share = at / seconds
        period = "early" if 0.1 <= share < 0.35 else "late" if share >= 0.75 else ""
        for kind, figures in usage.items():
            for name, value in figures.items():
                if period:
                    values[kind, period][name].append(value)
    rows = []
    for kind in KINDS:
        early, late = values[kind, "early"], values[kind, "late"]
        if not early or not late:
            continue
        row: Row = {"kind": kind, "count": max(late["count"])}
        for name in ALLOWED:
            row |= {f"{name}_early": statistics.median(early[name]), f"{name}_late": statistics.median(late[name])}
        rows.append(row)
    return rows


def growth(rows: Sequence[Row]) -> list[str]:
    """Return a line for each figure that grew by more than is allowed."""
    return [
        f"{row['kind']}: {name} {row[f'{name}_early']:.1f} -> {row[f'{name}_late']:.1f}"
        for row in rows
        for name, allowed in ALLOWED.items()
        if row[f"{name}_late"] - row[f"{name}_early"] > allowed
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["kind"],
            f"{row['count']:.0f}",
            f"{row['mib_early']:.1f}, {row['mib_late']:.1f}",
            *(f"{row[f'{name}_early']:.0f}, {row[f'{name}_late']:.0f}" for name in ("files", "threads")),
        ]
        for row in rows
    ]
    columns = ["process", "how many", "MiB of its own, early, late", "open files", "threads"]
    return harness.table(columns, lines)


def plot(usages: Sequence[tuple[float, Usage]], caption: str) -> Figure:
    """Plot memory, open files and threads of each kind against time."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4))
    titles = {"mib": "memory of its own, MiB", "files": "open files", "threads": "threads"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for kind in KINDS:
            points = [(at / 60, usage[kind][name]) for at, usage in usages if kind in usage]
            if points:
                panel.plot(*zip(*points, strict=True), label=kind)
        panel.set(title=title, xlabel="minutes")
        panel.set_ylim(bottom=0)
    panels[0].legend()
    harness.add_titles(figure, "A long run: the largest process of each kind", caption)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a data set's folder")
    parser.set_defaults(minutes=60.0)
    arguments = parser.parse_args(argv)
    seconds = arguments.minutes * 60
    run = harness.Run("soak", argv, arguments, torch.device("cpu"))
    out = Path(tempfile.mkdtemp(prefix="dclr-soak-")) / "run"
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            training_command(arguments.data.resolve(), out), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(1)
        began, usages = time.monotonic(), []
        while process.poll() is None and (at := time.monotonic() - began) < seconds:
            usages.append((at, inspect_all(process.pid)))
            time.sleep(EVERY)
        if process.poll() is not None:
            raise SystemExit(f"the run ended early with exit status {process.returncode}: {log.read_text()[-1500:]}")
        stopping = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        while STOPPED not in log.read_text() and time.monotonic() - stopping < 30:
            time.sleep(0.1)
        stopped = time.monotonic() - stopping

    run.rows = summarise(usages, seconds)
    steps = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    faults = growth(run.rows)
    if checkpoint.newest(out / "checkpoints") is None or STOPPED not in log.read_text():
        faults.append(f"SIGTERM left no checkpoint: see {log}")
    print(table(run.rows))
    print(f"{steps} steps in {arguments.minutes:g} minutes; stopped {stopped:.1f} s after SIGTERM")
    content = {
        "question": "does a long run stay as small as it began?",
        "minutes": arguments.minutes,
        "ranks": RANKS,
        "workers_a_rank": WORKERS,
        "steps": steps,
        "samples": steps * 16,
        "seconds_to_stop": round(stopped, 1),
        "grown": faults,
    }
    run.publish(plot(usages, run.caption(f"{RANKS} ranks with {WORKERS} workers each, {steps} steps")), content)
    if faults:
        raise SystemExit("; ".join(faults))


if __name__ == "__main__":
    main()
