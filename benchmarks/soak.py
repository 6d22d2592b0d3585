"""Does a long run stay as small as it began: memory, open files and threads of every process?

    python -m benchmarks.soak --data WEIZMANN              an hour on two cores: two ranks with two workers each
    python -m benchmarks.soak --data WEIZMANN --minutes 3  whether it works

Pretrains the demo's network through the deepspeed launcher, with a checkpoint every ten epochs, and looks at all its processes every ten
seconds. What counts is what they hold in the last quarter of the time against the quarter after the first tenth. In the end it is stopped
as a scheduler would stop it, by SIGTERM, and must leave a checkpoint.

Prints a table, writes soak.json and soak.png into results/DEVICE. Exit status 1: something grew by more than is allowed, or it did not stop
as it should.
"""

import argparse
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
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import harness
from dclr.report import environment
from dclr.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
EVERY = 10.0  # seconds between two looks
RANKS, WORKERS = 2, 2
KINDS = ("rank", "worker", "decoder")  # a rank's children supervise one decoder each

# What a process may hold more of at the end. Memory: what allocators may spread over pages. A leak of 1 KB a sample would be 40 MB.
ALLOWED = {"mib": 16.0, "files": 0, "threads": 0}

Look = dict[str, dict[str, float]]
"""Kind -> what its processes hold at one moment: `mib`, `files` and `threads`, each the most of any of them, and their number `count`."""


def command(data: Path, out: Path) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)]
    what = ["--data", str(data), "--out", str(out), "--preset", "demo", "--batch-size", "16", "--fill-steps", "32"]
    how = ["--workers", str(WORKERS), "--epochs", "1000000", "--checkpoint-every", "10", "--log-every", "20"]
    return [*launcher, "train.py", "pretrain", *what, *how]


def children(process: int) -> list[int]:
    """Of all its threads."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def ranks(launcher: int) -> list[int]:
    """The training processes among its descendants: those that run train.py and whose parent does not."""
    found, waiting = [], [launcher]
    while waiting:
        process = waiting.pop()
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if b"train.py" in words and b"--local_rank" in b" ".join(words) and b"deepspeed" not in b" ".join(words):
            found.append(process)
        else:
            waiting += children(process)
    return found


def held(process: int) -> dict[str, float]:
    """Memory of its own (a page that n processes share counts as 1/n), open files, threads."""
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


def look(launcher: int) -> Look:
    of_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
    of_kind["rank"] = ranks(launcher)
    for rank in of_kind["rank"]:
        of_kind["worker"] += children(rank)
    for worker in of_kind["worker"]:
        of_kind["decoder"] += children(worker)
    found: Look = {}
    for kind, processes in of_kind.items():
        each = [held(process) for process in processes]
        if each:
            found[kind] = {name: max(e[name] for e in each) for name in each[0]} | {"count": len(each)}
    return found


def summarise(looks: Sequence[tuple[float, Look]], seconds: float) -> list[dict[str, Any]]:
    """Rows by kind: medians early (from a tenth to 35 % of the time) and late (the last quarter), and the growth."""
    parts: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at, found in looks:
        share = at / seconds
        part = "early" if 0.1 <= share < 0.35 else "late" if share >= 0.75 else ""
        for kind, figures in found.items():
            for name, value in figures.items():
                if part:
                    parts[kind, part][name].append(value)
    rows = []
    for kind in KINDS:
        early, late = parts[kind, "early"], parts[kind, "late"]
        if not early or not late:
            continue
        row: dict[str, Any] = {"kind": kind, "count": max(late["count"])}
        for name in ALLOWED:
            row |= {f"{name}_early": statistics.median(early[name]), f"{name}_late": statistics.median(late[name])}
        rows.append(row)
    return rows


def grown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What grew by more than is allowed, in words."""
    return [
        f"{row['kind']}: {name} {row[f'{name}_early']:.1f} -> {row[f'{name}_late']:.1f}"
        for row in rows
        for name, allowed in ALLOWED.items()
        if row[f"{name}_late"] - row[f"{name}_early"] > allowed
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [harness.table_header(["process", "how many", "MiB of its own, early, late", "open files", "threads"])]
    for row in rows:
        pairs = [f"{row[f'{name}_early']:.0f}, {row[f'{name}_late']:.0f}" for name in ("files", "threads")]
        memory = f"{row['mib_early']:.1f}, {row['mib_late']:.1f}"
        lines.append(harness.table_line([row["kind"], f"{row['count']:.0f}", memory, *pairs]))
    return "\n".join(lines)


def plot(looks: Sequence[tuple[float, Look]]) -> Figure:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    titles = {"mib": "memory of its own, MiB", "files": "open files", "threads": "threads"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for kind in KINDS:
            points = [(at / 60, found[kind][name]) for at, found in looks if kind in found]
            panel.plot(*zip(*points, strict=True), label=kind)
        panel.set(title=title, xlabel="minutes")
        panel.set_ylim(bottom=0)
    panels[0].legend()
    return figure


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set's folder")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    seconds = options.minutes * 60
    out = Path(tempfile.mkdtemp(prefix="dclr-soak-")) / "run"
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command(options.data.resolve(), out), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(1)
        began, looks = time.monotonic(), []
        while process.poll() is None and (at := time.monotonic() - began) < seconds:
            looks.append((at, look(process.pid)))
            time.sleep(EVERY)
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself with {process.returncode}: {log.read_text()[-1500:]}")
        stopping = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        while "asked to stop" not in log.read_text() and time.monotonic() - stopping < 30:
            time.sleep(0.1)
        stopped = time.monotonic() - stopping

    rows = summarise(looks, seconds)
    steps = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    last = checkpoint.newest(out / "checkpoints")
    faults = grown(rows)
    if last is None or "asked to stop" not in log.read_text():
        faults.append(f"SIGTERM left no checkpoint: see {log}")
    device = torch.device("cpu")
    content = {
        "question": "does a long run stay as small as it began?",
        "command": harness.command("soak", arguments),
        "minutes": options.minutes,
        "ranks": RANKS,
        "workers_a_rank": WORKERS,
        "steps": steps,
        "samples": steps * 16,
        "seconds_to_stop": round(stopped, 1),
        "rows": rows,
        "grown": faults,
        "environment": environment(device),
    }
    print(table(rows))
    print(f"{steps} steps in {options.minutes:g} minutes; stopped {stopped:.1f} s after SIGTERM")
    harness.write(harness.results_folder(device, options.results), "soak", content, plot(looks))
    if faults:
        raise SystemExit("; ".join(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
