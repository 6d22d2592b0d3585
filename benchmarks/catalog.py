"""How long does a run take to its first batch, and how much memory does a rank need, with a million videos?

    python -m benchmarks.catalog --data DIR                      10,000, 100,000 and 1,000,000 videos: 10 minutes
    python -m benchmarks.catalog --data DIR --entries 10000      one size: a minute

Makes a data set with lists, names and folders like those of Kinetics in a temporary folder, and removes it at the end.
Every video is a file of its own, with a size like those of Kinetics. But only the videos of the first batches have
content: copies of the videos of DIR. The cache of verified videos is made from the findings about the videos of DIR,
because verifying a million videos takes hours. The verification of DIR is timed instead, and the time to verify all
videos is computed from its rate.

Then two ranks start a pretraining run with a small network, up to its first batch (benchmarks/catalog_worker.py). The
reference is a run on 64 videos. Goals: at most 60 s to the first batch, and at most 300 MB more for a rank than in the
reference.

Prints a table, and writes catalog.json and catalog.png into results/cpu. Exit status 1: a goal is not reached.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import ROOT, Row
from dclr.data.clips import epoch_order
from dclr.data.decode import VideoRecord, verify_video
from dclr.data.file_content import DIGEST_BYTES, find_status
from dclr.data.findings import Findings, save_findings
from dclr.data.manifest import cache_file, load_manifest
from dclr.data.records import Records, collect_records
from dclr.data.string_array import pack_strings
from dclr.data.tree import read_tree
from dclr.errors import UserError

REFERENCE = 64
"""Videos of the reference."""
RANKS = 2
REAL = 64
"""Videos at the start of the first epoch that have content."""
SECONDS, MEGABYTES = 60.0, 300.0
"""The goals."""
CLASSES = 400
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def make_data(folder: Path, count: int, sources: Sequence[Path]) -> list[str]:
    """Write a data set in the layout of Kinetics and return the paths of its videos, in the order of its list."""
    rng = random.Random(0)
    classes = [f"class number {number:03d}" for number in range(CLASSES)]
    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
    paths, lines = [], ["label,youtube_id,time_start,time_end,split\n"]
    for _ in range(count):
        name, video, start = rng.choice(classes), "".join(rng.choices(LETTERS, k=11)), rng.randrange(300)
        paths.append(f"train/{name}/{video}_{start:06d}_{start + 10:06d}.mp4")
        lines.append(f"{name},{video},{start},{start + 10},train\n")
        descriptor = os.open(folder / paths[-1], os.O_CREAT | os.O_WRONLY)
        os.ftruncate(descriptor, int(rng.lognormvariate(13.6, 0.6)))  # a sparse file, on average 0.97 MB
        os.close(descriptor)
    (folder / "train.csv").write_text("".join(lines))
    for number, index in enumerate(epoch_order(0, 0, count)[:REAL].tolist()):
        shutil.copyfile(sources[number % len(sources)], folder / paths[index])
    return paths


def make_cache(folder: Path, paths: Sequence[str], records: Sequence[VideoRecord], file: Path) -> None:
    """Write the findings about a data set of `make_data`. Every file has a digest of its own."""
    numbers = np.arange(len(paths)) % len(records)
    real = epoch_order(0, 0, len(paths))[:REAL]
    numbers[real] = np.arange(len(real)) % len(records)
    found: Records = collect_records(records).select(numbers)
    findings = Findings(
        paths=pack_strings(paths),
        stamps=find_status(folder, paths).stamps,
        readable=np.ones(len(paths), bool),
        reasons=pack_strings([]),
        digests=np.random.default_rng(0).integers(0, 256, (len(paths), DIGEST_BYTES), np.uint8),
        records=found,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    save_findings(file, findings)


def start_run(data: Path, cache: Path, results: Path) -> list[Row]:
    """Start a run on a data set and return what each rank found."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randrange(20_000, 60_000)),
    }
    files = [results / f"{data.name}-{rank}.json" for rank in range(RANKS)]
    started = str(time.time())
    processes = []
    for rank, file in enumerate(files):
        command = [sys.executable, "-m", "benchmarks.catalog_worker", str(data), str(file), started]
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment | numbers, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [process.communicate()[0].decode() for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank on {data} ended with status {process.returncode}: {output[-2000:]}")
    return [json.loads(file.read_text()) for file in files]


def measure(count: int, sources: Sequence[Path], records: Sequence[VideoRecord], work: Path) -> Row:
    """Make a data set, start a run on it, and remove the data set."""
    folder, cache = work / f"videos-{count}", work / "cache"
    try:
        paths = make_data(folder, count, sources)
        file = cache / "dclr" / "manifests" / cache_file(folder).name
        make_cache(folder, paths, records, file)
        return {"videos": count, "cache_mb": file.stat().st_size / 1e6, "ranks": start_run(folder, cache, work)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verification_rate(sources: Sequence[Path], work: Path) -> float:
    """Return how many videos a second one worker verifies. Each source is verified three times."""
    folder = work / "sources"
    folder.mkdir()
    for number, source in enumerate([*sources] * 3):
        shutil.copyfile(source, folder / f"{number:04d}{source.suffix}")
    names = sorted(os.listdir(folder))
    began = time.monotonic()
    load_manifest(folder, names, workers=1, progress=False, cache_dir=work / "verified")
    return len(names) / (time.monotonic() - began)


def summarise(row: Row, reference: Row, rate: float) -> Row:
    """Return the figures of the table: those of the rank that needs most, and by how much they exceed the reference."""

    def most(found: Row, group: str, kind: str) -> float:
        return max(rank[group][kind] for rank in found["ranks"]) * 2**20 / 1e6

    figures: Row = {
        "videos": row["videos"],
        "seconds": max(rank["seconds"]["first_batch"] for rank in row["ranks"]),
        "seconds_more": max(rank["seconds"]["first_batch"] for rank in row["ranks"])
        - max(rank["seconds"]["first_batch"] for rank in reference["ranks"]),
        "cold_hours_one_worker": row["videos"] / rate / 3600,
        "peak_more_mb": most_peak(row) - most_peak(reference),
        "cache_mb": row["cache_mb"],
    }
    for kind in ("own", "pss"):
        rank = most(row, "rank", kind)
        figures[f"rank_{kind}_mb"] = rank
        figures[f"rank_{kind}_more_mb"] = rank - most(reference, "rank", kind)
        figures[f"worker_{kind}_more_mb"] = (most(row, "with_worker", kind) - rank) - (
            most(reference, "with_worker", kind) - most(reference, "rank", kind)
        )
    return figures


def most_peak(row: Row) -> float:
    return max(rank["peak"] for rank in row["ranks"]) * 2**20 / 1e6


def plot(rows: Sequence[Row], caption: str) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    counts = [row["videos"] for row in rows]
    for axis, name, goal, label in (
        (axes[0], "seconds", SECONDS, "seconds to the first batch"),
        (axes[1], "rank_pss_more_mb", MEGABYTES, "MB of a rank more than with 64 videos"),
    ):
        axis.plot(counts, [row[name] for row in rows], marker="o")
        axis.axhline(goal, color="gray", linestyle="--", label="goal")
        axis.set_xscale("log")
        axis.set_xlabel("videos")
        axis.set_ylabel(label)
        axis.legend(frameon=False)
    harness.add_titles(figure, "The start of a run by the number of its videos", caption)
    return figure


def run(arguments: Namespace, argv: Sequence[str] | None) -> None:
    folder = Path(arguments.data)
    sources = [folder / path for path in read_tree(folder).videos]
    if not sources:
        raise UserError(f"--data {folder} holds no videos")
    results = harness.Run("catalog", argv, arguments, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="dclr-catalog-") as name:
        work = Path(name)
        rate = verification_rate(sources, work)
        print(f"verification: {rate:.1f} videos/s with one worker")
        records = [verify_video(source) for source in sources]
        reference = measure(REFERENCE, sources, records, work)
        results.measure(
            arguments.entries,
            lambda count: summarise(measure(count, sources, records, work), reference, rate),
            lambda row: f"{row['videos']:,} videos: {row['seconds']:.1f} s, {row['rank_pss_more_mb']:.0f} MB more",
        )
    print(table(results.rows))
    figure = plot(
        results.rows, results.caption("Two ranks with one worker each; names and sizes like those of Kinetics")
    )
    most = summarise(reference, reference, rate)
    results.publish(figure, {"verified_a_second": rate, "reference": most})
    missed = [row for row in results.rows if row["seconds"] > SECONDS or row["rank_pss_more_mb"] > MEGABYTES]
    if missed:
        raise RuntimeError(f"a goal is not reached with {', '.join(str(row['videos']) for row in missed)} videos")


def table(rows: Sequence[Row]) -> str:
    """Return the table of docs/performance.md. Memory is that of the rank that needs most."""
    columns = [
        "videos",
        "seconds to the first batch",
        "a rank: MB more than with 64 videos",
        "of these, not read from a file",
        "its peak: MB more",
        "its worker: MB more",
        "cache file, MB",
        "verification before, hours of one worker",
    ]
    lines = [
        [
            f"{row['videos']:,}",
            f"{row['seconds']:.1f} ({row['seconds_more']:.1f} more)",
            f"{row['rank_pss_more_mb']:.0f}",
            f"{row['rank_own_more_mb']:.0f}",
            f"{row['peak_more_mb']:.0f}",
            f"{row['worker_pss_more_mb']:.0f}",
            f"{row['cache_mb']:.0f}",
            f"{row['cold_hours_one_worker']:.1f}",
        ]
        for row in rows
    ]
    return harness.table(columns, lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--data", required=True, help="a folder with some real videos")
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    harness.run_command(parser, lambda arguments: run(arguments, argv), argv)


if __name__ == "__main__":
    main()
