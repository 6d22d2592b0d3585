"""How many training samples a second does one core read? Ours, the released code and torchcodec, in one run.

    python -m benchmarks.loader --data UCF-101 KINETICS     every data set with 1 and 2 workers
    python -m benchmarks.loader --data UCF-101 --quick      a trial with 1 worker and one short round
    python -m benchmarks.loader --data UCF-101 --minutes 5  begin no new cell (data set and workers) after 5 minutes

Time to expect: 2 minutes a cell. It needs no GPU. --data takes the same folders as train.py. The videos of the train
split are read. Result to expect on UCF101's clips: from videos 8 times the released code, from a store of planes 140
times.

A sample is what pretraining takes from a video: two windows of 16 frames at stride 2, and a still of each. All
providers read the same windows of the same videos in the same order, in batches of 8 (fewer where there are fewer
videos), by forked workers of torch's DataLoader.

Providers (benchmarks/loader_providers.py):
    as released     the steps of the released loader. For each window: open, seek by time, decode to its end with
                    default settings, convert all 32 frames to RGB. Then take every second frame and repeat the still 16
                    times, convert to float, crop to 112 x 112 by torchvision, default_collate. The released reader also
                    decodes audio, which is not done here
    torchcodec      its exact mode, all 34 frames of a sample in one call, RGB in uint8, default_collate. Skipped if not
                    installed (the wheel must match torch: 0.11 for 2.11) or if it does not find FFmpeg's libraries
    ours, videos    the loader of training: planes in uint8, and drawn augmentations
    ours, ... store the same from a store made by `train.py pack`: small videos (compact) or planes, from a warm disk
                    cache

Each provider returns what its training loop takes. The released loader crops, and ours leaves cropping to the GPU.

A core's samples/s divides the samples by the processor time of workers and main process, including the start and the
end of the workers. Other programs on the machine hardly change it. Samples/s by the clock is the rate of a loop that
only reads. Providers take turns in rounds of about 4 seconds. A speedup is the median of the rounds' ratios.

Before the rounds, the frames of each provider are checked. In up to 20 videos, two samples are compared with a decode
of the whole video, as small pictures. No other frame may be nearer than the wanted one. A row says in how many videos a
provider read a wrong frame.

Prints tables and writes loader.json and loader.png into results/DEVICE. --quick adds to the file names.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import RELEASED, Goal, Row
from benchmarks.loader_providers import (
    CONFIG,
    PROVIDERS,
    Reader,
    Source,
    frame_numbers,
    open_readers,
    open_source,
)
from dclr.data.decode import YuvFrames
from dclr.data.loader import BatchSampler
from dclr.report import cpu_name

WORKERS = (1, 2)
ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS, QUICK_SECONDS = 4.0, 0.5  # of a round
CHECKED_VIDEOS, CHECKED_SAMPLES = 20, 2
THUMBNAIL = (24, 32)  # height, width
TIE = 0.2
"""Grey levels by which another frame may be nearer, in a still scene or after re-encoding.

On 11 genuine videos, another frame was nearer than a right one by at most 0.01, and by at most 0.09 after re-encoding.
When the frames were shifted by one, at least one frame of every video was off by 0.8.
"""


def over_released(provider: str) -> Callable[[Row], float | None]:
    """Return the value of a goal: the samples that a core reads by `provider`, divided by the released code's."""
    return lambda row: row["providers"].get(provider, {}).get("times_released")


GOALS = (
    Goal(text="from videos 3 times the released code", value=over_released("ours, videos"), least=3),
    Goal(text="from a store 20 times the released code", value=over_released("ours, store"), least=20),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid."""

    folder: Path
    workers: int

    def __str__(self) -> str:
        return f"{self.folder.resolve().name}, {count_workers(self.workers)}"


def count_workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


# -------------------------------------------------------------------------------------------------------- right frames?


def count_wrong_videos(source: Source, readers: dict[str, Reader]) -> dict[str, int]:
    """Return by provider in how many of the checked videos it read a frame other than the wanted one."""
    wrong = dict.fromkeys(readers, 0)
    for index in checked_videos(source):
        rgb, luma = true_thumbnails(source.paths[index])
        pairs = [source.pair(epoch, index) for epoch in range(CHECKED_SAMPLES)]
        for name, reader in readers.items():
            for pair in pairs:
                frames = reader.frames(index, pair)
                truth = luma if isinstance(frames, YuvFrames) else rgb
                if not match(thumbnails(frames), frame_numbers(pair), truth):
                    wrong[name] += 1
                    break
    return wrong


def checked_videos(source: Source) -> list[int]:
    """Return the numbers of at most CHECKED_VIDEOS videos, evenly spread."""
    count = len(source.paths)
    return np.unique(np.linspace(0, count - 1, min(count, CHECKED_VIDEOS)).astype(int)).tolist()


def match(found: Tensor, wanted: np.ndarray, truth: Tensor) -> bool:
    """Return whether each picture is at least as near to the wanted frame as to any other frame, up to TIE.

    Args:
        found: (N, h, w) pictures that were read.
        wanted: (N,) their frame numbers.
        truth: (frames, h, w) pictures of the whole video.
    """
    distances = torch.cdist(found.flatten(1), truth.flatten(1), p=1) / found[0].numel()  # (N, frames) mean grey levels
    own = distances[torch.arange(len(wanted)), torch.from_numpy(wanted)]
    return bool((own <= distances.min(dim=1).values + TIE).all())


def true_thumbnails(path: Path) -> tuple[Tensor, Tensor]:
    """Decode a video from its first to its last frame. Return (frames, h, w) pictures from RGB and from the luma plane.

    The two differ in brightness by more than neighbouring frames of a still scene, so RGB is compared with RGB.
    """
    rgb, luma = [], []
    with av.open(str(path), metadata_errors="ignore") as container:
        for frame in container.decode(video=0):
            rgb.append(thumbnails(frame.to_ndarray(format="rgb24")[None]))
            planes = frame if frame.format.name in ("yuv420p", "yuvj420p") else frame.reformat(format="yuv420p")
            lines = np.frombuffer(memoryview(planes.planes[0]), np.uint8).reshape(frame.height, -1)
            luma.append(shrink(torch.from_numpy(lines[None, :, : frame.width].copy())))
    return torch.cat(rgb), torch.cat(luma)


def thumbnails(frames: np.ndarray | YuvFrames) -> Tensor:
    """Return (N, h, w) mean brightness, from RGB (N, H, W, 3) or from the luma plane."""
    if isinstance(frames, YuvFrames):
        return shrink(torch.from_numpy(frames.y))
    return shrink(torch.from_numpy(frames).float() @ torch.tensor([0.299, 0.587, 0.114]))


def shrink(grey: Tensor) -> Tensor:
    """Average (N, H, W) to (N, *THUMBNAIL)."""
    return F.adaptive_avg_pool2d(grey[:, None].float(), THUMBNAIL)[:, 0]


# -------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Round:
    """One pass of a provider over some epochs."""

    samples: int
    seconds: float  # by the clock
    processor_seconds: float  # of the workers and of this process


@lru_cache(maxsize=1)  # the cells of a data set follow each other
def open_checked(
    folder: Path, names: tuple[str, ...]
) -> tuple[Source, dict[str, Reader], dict[str, str], dict[str, int]]:
    """Return a data set, its readers, why providers are skipped, and in how many videos each reads wrong frames."""
    source = open_source(folder)
    readers, skipped = open_readers(source, names)
    return source, readers, skipped, count_wrong_videos(source, readers)


def read_epochs(source: Source, reader: Reader, workers: int, epochs: int) -> Round:
    """Read whole epochs. Workers start and end inside, because only ended processes count in `processor_seconds`."""
    sampler = BatchSampler(len(source.paths), source.batch_size, epochs)
    begin, processor_begin, batches = time.perf_counter(), processor_seconds(), 0
    for _ in reader.batches(sampler, workers):
        batches += 1
    seconds, used = time.perf_counter() - begin, processor_seconds() - processor_begin
    assert batches == len(sampler)
    return Round(batches * source.batch_size, seconds, used)


def processor_seconds() -> float:
    """Return user and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(cell: Cell, names: Sequence[str], rounds: int, seconds: float) -> Row:
    """Return one row of the results. `seconds`: about the length of a round."""
    source, readers, skipped, wrong = open_checked(cell.folder, tuple(names))
    epochs = {name: find_epochs(source, reader, cell.workers, seconds) for name, reader in readers.items()}
    found: dict[str, list[Round]] = {name: [] for name in readers}
    for name in harness.turns(list(readers), rounds):
        found[name].append(read_epochs(source, readers[name], cell.workers, epochs[name]))
    checked = len(checked_videos(source))
    providers: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in skipped:
            providers[name] = {"skipped": skipped[name]}
        else:
            checks = {"wrong_videos": wrong[name], "checked_videos": checked}
            providers[name] = figures(found[name], found.get(RELEASED)) | checks
    return {"data": source.name, "videos": len(source.paths), "workers": cell.workers, "providers": providers}


def find_epochs(source: Source, reader: Reader, workers: int, seconds: float) -> int:
    """Return how many epochs the provider reads in about that time.

    Trial runs measure it and also warm the provider up. They are long compared with the start of the workers.
    """
    epochs = 1
    while (taken := read_epochs(source, reader, workers, epochs).seconds) < seconds / 4:
        epochs *= 4
    return max(round(epochs * seconds / taken), 1)


def figures(rounds: list[Round], released: list[Round] | None) -> dict[str, Any]:
    """Return the quantiles of a provider over its rounds, and its speedups over the released code."""
    per_core = np.array([each.samples / each.processor_seconds for each in rounds])
    by_clock = np.array([each.samples / each.seconds for each in rounds])
    found: dict[str, Any] = {
        "core_samples_per_second": harness.quantiles(per_core),
        "clock_samples_per_second": harness.quantiles(by_clock),
        "processor_ms_per_sample": harness.quantiles(1e3 / per_core),
        "samples": sum(each.samples for each in rounds),
        "rounds": len(rounds),
        "times_released": None,
        "times_released_by_clock": None,
    }
    if released:
        core = [each.samples / each.processor_seconds for each in released]
        clock = [each.samples / each.seconds for each in released]
        found["times_released"] = float(np.median(per_core / core))
        found["times_released_by_clock"] = float(np.median(by_clock / clock))
    return found


# --------------------------------------------------------------------------------------------------------------- report


def name_cell(row: Row) -> str:
    return f"{row['data']}, {count_workers(row['workers'])}"


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Judge each goal by its worst row."""
    return [{"goal": goal.text} | harness.judge(rows, goal, name_cell) for goal in GOALS]


def cell_table(row: Row) -> str:
    """Return what was measured in one cell as a table, one provider a line."""
    columns = ["provider", "a core's samples/s (20 % to 80 %)", "speedup over released code", "processor ms a sample"]
    columns += ["samples/s by the clock", "videos with wrong frames"]
    lines = []
    for name, found in row["providers"].items():
        if "skipped" in found:
            lines.append([name, f"skipped: {found['skipped']}", "", "", "", ""])
            continue
        core, speedup = found["core_samples_per_second"], found["times_released"]
        lines.append([
            name,
            f"{rate(core['median'])} ({rate(core['low'])} to {rate(core['high'])})",
            "" if speedup is None else f"{speedup:.1f}",
            f"{found['processor_ms_per_sample']['median']:.3g}",
            rate(found["clock_samples_per_second"]["median"]),
            f"{found['wrong_videos']} of {found['checked_videos']}",
        ])  # fmt: skip
    return f"\n{name_cell(row)} ({row['videos']} videos)\n\n{harness.table(columns, lines)}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot a core's samples a second: one panel for each data set, one bar for each provider and number of workers."""
    names = list(rows[0]["providers"])
    sets = list(dict.fromkeys(row["data"] for row in rows))
    counts = sorted({row["workers"] for row in rows})
    height = 0.8 / len(counts)
    figure, panels = plt.subplots(
        1, len(sets), figsize=(2.5 + 4.5 * len(sets), 1.8 + 0.7 * len(names)), sharey=True, squeeze=False
    )
    for panel, name_of_set in zip(panels[0], sets, strict=True):
        ends = []
        for row in (row for row in rows if row["data"] == name_of_set):
            rank = counts.index(row["workers"])
            for position, name in enumerate(names):
                found, y = row["providers"][name], position - 0.4 + height * (rank + 0.5)
                if "skipped" in found:
                    where = panel.get_yaxis_transform()  # x from 0 to 1 across the panel
                    panel.text(0.02, y, "skipped", va="center", fontsize=7, color="dimgray", transform=where)
                    continue
                core = found["core_samples_per_second"]
                around = [[core["median"] - core["low"]], [core["high"] - core["median"]]]
                colour = "tab:red" if name.startswith("ours") else "tab:blue"
                shade = 1 - 0.45 * rank / max(len(counts) - 1, 1)
                panel.barh(y, core["median"], 0.9 * height, color=colour, alpha=shade, xerr=around)
                wrong = f", wrong in {found['wrong_videos']}" if found["wrong_videos"] else ""
                label = f"{rate(core['median'])}{wrong} ({count_workers(row['workers'])})"
                panel.annotate(label, (core["high"], y), (5, 0), textcoords="offset points", va="center", fontsize=7)
                ends += [core["low"], core["high"]]
        if ends:
            panel.set_xscale("log")
            panel.set_xlim(min(ends) / 2, max(ends) * (max(ends) / min(ends)) ** 0.5 * 2)  # room for labels
            harness.label_log_axis(panel.xaxis)
        panel.set_title(name_of_set, fontsize=10)
        panel.set_xlabel("samples a second of processor time")
        panel.grid(True, axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    harness.add_titles(figure, "Training samples that one core reads: 2 windows of 16 frames, 2 stills", caption)
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__, PROVIDERS)
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="DIR", help="data sets, as for train.py")
    parser.add_argument("--workers", nargs="+", type=int, metavar="N", help=f"default: {' '.join(map(str, WORKERS))}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="length of a round")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    workers = arguments.workers or WORKERS[: 1 if arguments.quick else None]
    names = arguments.providers or list(PROVIDERS)
    run = harness.Run("loader", argv, arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run.environment["processor"] = cpu_name()
    with suppress(PackageNotFoundError):
        run.environment["versions"]["torchcodec"] = version("torchcodec")
    print(f"{cpu_name()}, {run.environment['cores']} cores; median of {rounds} rounds of {seconds:g} s")
    cells = [Cell(folder=folder, workers=count) for folder in arguments.data for count in workers]
    run.measure(cells, lambda cell: measure(cell, names, rounds, seconds), cell_table)
    open_checked.cache_clear()  # deletes the packed stores

    verdicts = judge(run.rows)
    columns = {"goal": "goal", "worst": "worst", "worst_at": "where", "verdict": "verdict"}
    print(f"\nGoals, by a core's samples\n\n{harness.goal_table(verdicts, columns)}\n")
    content = {
        "question": "how many training samples a second does one core read?",
        "sample": f"2 windows of {CONFIG.clip_length} frames at stride {CONFIG.clip_stride}, 2 stills",
        "goals": verdicts,
    }
    reader = f"{cpu_name()}, av {run.environment['versions']['av']}"
    caption = run.caption(f"{reader}; median of {rounds} rounds, line: 20 % to 80 %")
    run.publish(plot(run.rows, caption), content)
    run.refuse_failures([])


if __name__ == "__main__":
    main()
