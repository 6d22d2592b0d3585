"""The tables of docs/performance.md, made from the results committed under results/.

    python -m benchmarks.tables      writes them into docs/performance.md; run it after committing new results

A folder of results/ is a device. Without a GPU only ratios are told: they were measured in one run each, taking turns, and hold on other
machines far better than times do.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/tables.py -->\n", "<!-- end -->\n"  # the tables stand between them

Result = dict[str, Any]


def step_table(result: Result, gpu: bool) -> Iterator[str]:
    columns = ["network, batch, clip", "times as released", "times eager bf16", "times as released, both float32"]
    yield harness.table_header([*columns, *(["samples/s", "of the peak", "peak memory"] if gpu else [])])
    for row in result["rows"]:
        found = row["providers"]
        cell = f"{row['backbone']}, {row['B']}, {row['T']} x {row['side']} x {row['side']}"
        ratios = [
            _speedup(found, "ours", "as released"),
            _speedup(found, "ours", "eager bf16"),
            _speedup(found, "ours, float32", "as released"),
        ]
        ours = found.get("ours", {})
        absolute = [ours.get("skipped", "")[:40], "", ""]
        if "median_ms" in ours:
            absolute = [
                f"{ours['samples_per_second']:.0f}",
                f"{ours['share_of_peak']:.0%}" if gpu else "",
                f"{ours['peak_bytes'] / 2**30:.1f} GiB" if gpu else "",
            ]
        yield harness.table_line([cell, *ratios, *(absolute if gpu else [])])


def _speedup(found: Result, ours: str, other: str) -> str:
    """How many times as fast: the median of the rounds' ratios. Why not, where one of the two could not run."""
    rows = [found.get(name, {}) for name in (other, ours)]
    if not all("ms_by_round" in row for row in rows):
        return next((row["skipped"][:40] for row in rows if "skipped" in row), "")
    ratios = sorted(theirs / own for theirs, own in zip(*(row["ms_by_round"] for row in rows), strict=True))
    return f"{ratios[len(ratios) // 2]:.2g}"


def loader_table(result: Result, gpu: bool) -> Iterator[str]:
    names = [name for name in result["rows"][0]["providers"] if name != "as released"]
    yield harness.table_header(["data, workers", *names, "wrong frames as released"])
    for row in result["rows"]:
        found = row["providers"]
        cells = [f"{row['data']}, {row['workers']}"]
        for name in names:
            times = found[name].get("times_released")
            cells.append(found[name].get("skipped", "")[:40] if times is None else f"{times:.3g}")
        released = found["as released"]
        cells.append(f"in {released['wrong_videos']} of {released['checked_videos']} videos")
        yield harness.table_line(cells)


def train_table(result: Result, gpu: bool) -> Iterator[str]:
    columns = ["read from, processes", "waits for data", "times from videos", "times one process"]
    yield harness.table_header([*columns, *(["samples/s"] if gpu else [])])
    for row in result["rows"]:
        cells = [
            f"{row['source']}, {row['processes']}",
            f"{row['data_wait_share']:.1%}",
            f"{row['times_videos']:.2f}",
            f"{row['growth_from_one_process']:.2f}",
        ]
        yield harness.table_line([*cells, *([f"{row['samples_per_second']:.0f}"] if gpu else [])])


def sharding_table(result: Result, gpu: bool) -> Iterator[str]:
    yield harness.table_header(["", "time of a step by DDP's", "by round", "peak memory of a process"])
    for name, row in result["rows"].items():
        rounds = ", ".join(f"{ratio:.2f}" for ratio in row["ratio_by_round"])
        yield harness.table_line([name, f"{row['ratio_to_ddp']:.2f}", rounds, f"{row['peak_gib']:.2f} GiB"])


def goals_table(result: Result, gpu: bool) -> Iterator[str]:
    """Of the kernels: on a CPU they are the reference, and there is nothing to tell."""
    if gpu:
        yield harness.table_header(["goal", "precision", "worst", "where", ""])
        for goal in result["goals"]:
            worst = "" if goal["worst"] is None else f"{goal['worst']:.3g}"
            yield harness.table_line([goal["goal"], goal["precision"], worst, goal["worst_at"] or "", goal["verdict"]])


# file -> what its table is about, and how it is made
TABLES: dict[str, tuple[str, Callable[[Result, bool], Iterator[str]]]] = {
    "step": ("A training step: how many times as fast as the others ours is", step_table),
    "loader": ("Reading: samples a second of a core, times what is read as released", loader_table),
    "train": ("A whole run", train_table),
    "sharding": ("DeepSpeed's stages beside plain DistributedDataParallel", sharding_table),
    "info_nce": ("The loss", goals_table),
    "views": ("The views", goals_table),
}


def tables(results: Path = harness.RESULTS) -> str:
    """Of every device, in markdown."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        gpu = folder.name != "cpu"
        for name, (title, make) in TABLES.items():
            file = folder / f"{name}.json"
            if not file.is_file():
                continue
            result = json.loads(file.read_text())
            if lines := list(make(result, gpu)):
                environment = result["environment"]
                where = f"{environment['device']}, {environment['date'][:10]}, commit {environment['commit']}"
                picture = f"[picture](../benchmarks/results/{folder.name}/{name}.png)"
                parts.append(f"**{title}** ({where}; {picture})\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def with_tables(page: str, made: str) -> str:
    """The page with these tables in their place."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: f"\n{made}\n", page, flags=re.DOTALL)


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(), tables()))


if __name__ == "__main__":
    main()
