"""How many training samples a second does one core read? Ours, what the authors released, and torchcodec, in one run.

    python -m benchmarks.loader --data UCF-101 KINETICS     every data set with 1 and 2 workers
    python -m benchmarks.loader --data UCF-101 --quick      with 1 worker, one short round
    python -m benchmarks.loader --data UCF-101 --minutes 5  no new cell (a data set, a number of workers) is begun after 5 minutes

Time to expect: 2 minutes a cell. It needs no GPU. --data takes what train.py takes; the videos of the train split are read.

A sample is what pretraining takes from a video: two windows of 16 frames at stride 2, and a still of each. All providers read the same
windows of the same videos in the same order, in batches of 8 (fewer where there are fewer videos), by forked workers of torch's DataLoader.

Providers:
    as released     the steps of the authors' loader. Each window by itself: open, seek by time, decode to its end with the reader's default
                    settings, all 32 frames to RGB; then every second one, and the still repeated 16 times, to float and through
                    torchvision's RandomResizedCrop to 112 x 112; default_collate. Audio, which their reader decodes too, is left out
    torchcodec      its exact mode, all 34 frames of a sample in one call, RGB in uint8, default_collate; where it is installed (the wheel
                    must match torch: 0.11 for 2.11) and finds FFmpeg's libraries
    ours, videos    the loader of training: planes in uint8, with parameters drawn for the views
    ours, ... store the same from what `train.py pack` makes of the videos: small videos (compact), or planes; from a warm cache of the disk

They hand over different things, each what its training loop takes: as released has cropped already, which ours leaves to the GPU.

"A core's samples" are those of a second of processor time, of workers and main process together, starting and ending the workers
included: they hold still when the machine is busy with other things. "By the clock" is what a loop that does nothing else sees. Rounds
rotate through the providers, each of about 4 seconds; a ratio is the median of the rounds' ratios. Before that, a provider must read the
right frames: of up to 20 videos, those of two samples are compared with a decode of the whole video, as small pictures, and no other frame
may be nearer than the one that was wanted. A row says in how many videos a provider had wrong ones.

Prints tables, writes loader.json and loader.png into results/DEVICE; --quick adds its name to the files'.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks import harness
from dclr.config import DataConfig
from dclr.data import clips
from dclr.data.augmentation import PRETRAIN
from dclr.data.catalog import Catalog, open_catalog
from dclr.data.clips import ClipPair
from dclr.data.decode import NO_PTS, VideoRecord, YuvFrames
from dclr.data.loader import BatchSampler, TrainBatches
from dclr.data.manifest import load_manifest
from dclr.data.pack import pack
from dclr.data.samples import PairSamples
from dclr.data.videos import open_videos
from dclr.errors import UserError
from dclr.report import cpu_name, environment

SEED = 0
CONFIG = DataConfig()
WINDOW = CONFIG.clip_length * CONFIG.clip_stride  # source frames
BATCH_SIZE = 8
WORKERS = (1, 2)
ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS, QUICK_SECONDS = 4.0, 0.5  # of a round
CHECKED_VIDEOS, CHECKED_SAMPLES = 20, 2
THUMBNAIL = (24, 32)  # height, width
TIE = 0.2
"""Grey levels by which another frame may be nearer, in a still scene or after compressing anew. On 11 genuine videos right frames stayed
within 0.01, re-encoded ones within 0.09; frames that were each the next one instead had at least one off by 0.8 in every video."""


class NotAvailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The readable videos of a data set's train split, in the order of `open_videos`."""

    name: str
    catalog: Catalog
    paths: list[Path]
    records: list[VideoRecord]

    @property
    def batch_size(self) -> int:
        return min(BATCH_SIZE, len(self.paths))

    def pair(self, epoch: int, index: int) -> ClipPair:
        """What training draws for a video in an epoch."""
        rng = clips.sample_rng(SEED, epoch, index)
        return clips.draw_pair(rng, self.records[index].frames, CONFIG.clip_length, CONFIG.clip_stride)


@dataclass(frozen=True)
class Reader:
    """A provider for a source."""

    frames: Callable[[int, ClipPair], np.ndarray | YuvFrames]
    """The frames of a sample of video `index` as it reads them: query clip, key clip, their stills; RGB (2 T + 2, H, W, 3), or planes."""
    batches: Callable[[BatchSampler, int], Iterable[Any]]
    """What is measured: the schedule's batches, by so many workers."""
    folder: TemporaryDirectory[str] | None = None
    """What it reads from, if that is its own."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A core is to read at least `least` times as many samples by `provider` as by `AS_RELEASED`."""

    text: str
    provider: str
    least: float


AS_RELEASED = "as released"
GOALS = (
    Goal(text="from videos 3 times as released", provider="ours, videos", least=3),
    Goal(text="from a store 20 times as released", provider="ours, store", least=20),
)


# -------------------------------------------------------------------------------------------------------------- providers


def as_released(source: Source) -> Reader:
    """Their clips are windows of a list of timestamps in increasing order, which is the order of decoding in plain files only."""
    if short := sum(record.frames < WINDOW for record in source.records):
        raise NotAvailable(f"it has no clips of videos of fewer than {WINDOW} frames, of which there are {short}")
    if untimed := sum(NO_PTS in record.pts for record in source.records):
        raise NotAvailable(f"it finds no frame without a timestamp, and {untimed} videos have such frames")
    timestamps = [np.sort(record.pts).tolist() for record in source.records]
    size = (CONFIG.crop_size, CONFIG.crop_size)
    crop = v2.RandomResizedCrop(size, PRETRAIN.scale, PRETRAIN.ratio, antialias=False)

    def window(index: int, start: int) -> np.ndarray:  # (WINDOW, H, W, 3) uint8
        own = timestamps[index]
        found = read_by_time(source.paths[index], own[start], own[start + WINDOW - 1])
        # Theirs ends with an error where time does not find as many frames as there are: the last one again, so that the run goes on.
        return found[np.minimum(np.arange(WINDOW), len(found) - 1)]

    def windows(index: int, pair: ClipPair) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # kept frames, still
        for kept, still in ((pair.query, pair.query_still), (pair.key, pair.key_still)):
            whole = window(index, int(kept[0]))
            yield whole[:: CONFIG.clip_stride], whole[still - int(kept[0])]

    def frames(index: int, pair: ClipPair) -> np.ndarray:
        (query, query_still), (key, key_still) = windows(index, pair)
        return np.concatenate([query, key, [query_still, key_still]])

    def view(images: Tensor) -> Tensor:  # (T, H, W, 3) uint8 -> (3, T, h, w) float32
        return crop(images.permute(3, 0, 1, 2).float() / 255)

    def sample(index: int, pair: ClipPair) -> list[Tensor]:
        views = []
        for kept, still in windows(index, pair):
            repeated = torch.from_numpy(still).expand(CONFIG.clip_length, -1, -1, -1)
            views += [view(torch.from_numpy(kept)), view(repeated)]
        return views

    return Reader(frames, of_samples(source, sample))


def read_by_time(path: Path, first: int, last: int) -> np.ndarray:  # (N, H, W, 3) uint8
    """The frames from one timestamp to another, both included, in the order of time: how torchvision read clips, while it did."""
    found = {}
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        container.seek(first, stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None  # see as_released
            found[frame.pts] = frame
            if frame.pts >= last:
                break
    return np.stack([found[pts].to_ndarray(format="rgb24") for pts in sorted(found) if first <= pts <= last])


def torchcodec(source: Source) -> Reader:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # the last: FFmpeg's libraries are not found
        raise NotAvailable(f"cannot be imported ({harness.reason(error)})") from error
    if len({(record.height, record.width) for record in source.records}) > 1:
        raise NotAvailable("default_collate cannot stack frames of different sizes")

    def read(index: int, pair: ClipPair) -> Tensor:  # (2 T + 2, H, W, 3) uint8
        decoder = VideoDecoder(source.paths[index], dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=1)
        return decoder.get_frames_at(numbers(pair).tolist()).data

    return Reader(lambda index, pair: read(index, pair).numpy(), of_samples(source, read))


def ours(source: Source) -> Reader:
    return ours_of(source.catalog)


def ours_packed(source: Source, compact: bool) -> Reader:
    """From a store that is packed for it, and deleted with it."""
    folder = TemporaryDirectory()
    with redirect_stdout(StringIO()):
        pack(DataConfig(data=str(source.catalog.root)), out=folder.name, compact=compact)
    reader = ours_of(open_catalog(Path(folder.name)))
    return replace(reader, folder=folder)


def ours_of(catalog: Catalog) -> Reader:
    videos = open_videos(catalog, "train", workers=1, progress=False)
    samples = PairSamples(videos, CONFIG, SEED)
    return Reader(
        lambda index, pair: videos.read(index, numbers(pair)),
        lambda schedule, workers: TrainBatches(samples, schedule, workers),
    )


PROVIDERS: dict[str, Callable[[Source], Reader]] = {
    AS_RELEASED: as_released,
    "torchcodec": torchcodec,
    "ours, videos": ours,
    "ours, compact store": partial(ours_packed, compact=True),
    "ours, store": partial(ours_packed, compact=False),
}


def numbers(pair: ClipPair) -> np.ndarray:
    """(2 T + 2,) the frame numbers of query clip, key clip and their stills."""
    return np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])


class Samples(Dataset[Any]):
    """Samples by (epoch, place in the epoch's order), as the loader of training has them."""

    def __init__(self, source: Source, sample: Callable[[int, ClipPair], Any]) -> None:
        self.source, self.sample = source, sample

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, place = key
        index = int(clips.epoch_order(SEED, epoch, len(self.source.paths))[place])
        return self.sample(index, self.source.pair(epoch, index))


def of_samples(
    source: Source, sample: Callable[[int, ClipPair], Any]
) -> Callable[[BatchSampler, int], DataLoader[Any]]:
    def batches(schedule: BatchSampler, workers: int) -> DataLoader[Any]:
        return DataLoader(
            Samples(source, sample), batch_sampler=schedule, num_workers=workers, multiprocessing_context="fork"
        )

    return batches


# ---------------------------------------------------------------------------------------------------- are the frames right?


def videos_read_wrongly(source: Source, readers: dict[str, Reader]) -> dict[str, int]:
    """By provider, in how many of the checked videos a frame is another one than it should be."""
    wrong = dict.fromkeys(readers, 0)
    for index in checked_videos(source):
        rgb, luma = true_thumbnails(source.paths[index])
        pairs = [source.pair(epoch, index) for epoch in range(CHECKED_SAMPLES)]
        for name, reader in readers.items():
            for pair in pairs:
                frames = reader.frames(index, pair)
                truth = luma if isinstance(frames, YuvFrames) else rgb
                if not are(thumbnails(frames), numbers(pair), truth):
                    wrong[name] += 1
                    break
    return wrong


def checked_videos(source: Source) -> list[int]:
    count = len(source.paths)
    return np.unique(np.linspace(0, count - 1, min(count, CHECKED_VIDEOS)).astype(int)).tolist()


def are(found: Tensor, wanted: np.ndarray, truth: Tensor) -> bool:
    """Whether each picture `found` (N, h, w) is as near to the one of `truth` (frames, h, w) that `wanted` (N,) says as to any other."""
    distances = torch.cdist(found.flatten(1), truth.flatten(1), p=1) / found[0].numel()  # (N, frames) mean grey levels
    own = distances[torch.arange(len(wanted)), torch.from_numpy(wanted)]
    return bool((own <= distances.min(dim=1).values + TIE).all())


def true_thumbnails(path: Path) -> tuple[Tensor, Tensor]:
    """(frames, h, w) each: all frames, by a decode from the first to the last, as RGB and as planes. The two are not to be compared:
    conversion to RGB moves brightness by more than what a frame of a still scene differs from the next."""
    rgb, luma = [], []
    with av.open(str(path), metadata_errors="ignore") as container:
        for frame in container.decode(video=0):
            rgb.append(thumbnails(frame.to_ndarray(format="rgb24")[None]))
            planes = frame if frame.format.name in ("yuv420p", "yuvj420p") else frame.reformat(format="yuv420p")
            lines = np.frombuffer(memoryview(planes.planes[0]), np.uint8).reshape(frame.height, -1)
            luma.append(small(torch.from_numpy(lines[None, :, : frame.width].copy())))
    return torch.cat(rgb), torch.cat(luma)


def thumbnails(frames: np.ndarray | YuvFrames) -> Tensor:
    """(N, h, w) brightness, averaged: alike for frames that were made smaller. Of RGB (N, H, W, 3) or of the planes' luma."""
    if isinstance(frames, YuvFrames):
        return small(torch.from_numpy(frames.y))
    return small(torch.from_numpy(frames).float() @ torch.tensor([0.299, 0.587, 0.114]))


def small(grey: Tensor) -> Tensor:
    """(N, H, W) -> (N, *THUMBNAIL)."""
    return F.adaptive_avg_pool2d(grey[:, None].float(), THUMBNAIL)[:, 0]


# ---------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Round:
    """One pass of a provider over some epochs."""

    samples: int
    seconds: float  # by the clock
    processor_seconds: float  # of the workers and of this process


def open_source(folder: Path) -> Source:
    catalog = open_catalog(folder)
    listed = catalog.videos("train")
    manifest = load_manifest(catalog.root, [video.path for video in listed], workers=1)
    readable = [video.path for video in listed if video.path in manifest.records]
    if not readable:
        raise UserError(f"--data {folder}: none of its {len(listed)} training videos can be read; see train.py check")
    return Source(
        name=folder.resolve().name,
        catalog=catalog,
        paths=[catalog.root / path for path in readable],
        records=[manifest.records[path] for path in readable],
    )


def open_readers(source: Source, names: Sequence[str]) -> tuple[dict[str, Reader], dict[str, str]]:
    """The providers that can read the source, and of the others the reason why not."""
    readers, skipped = {}, {}
    for name in names:
        try:
            readers[name] = PROVIDERS[name](source)
        except NotAvailable as reason:
            skipped[name] = str(reason)
    return readers, skipped


def run(source: Source, reader: Reader, workers: int, epochs: int) -> Round:
    """Workers are started and ended within: only what has ended is in the processor time of children."""
    schedule = BatchSampler(len(source.paths), source.batch_size, epochs)
    begin, processor_begin, batches = time.perf_counter(), processor_seconds(), 0
    for _ in reader.batches(schedule, workers):
        batches += 1
    seconds, used = time.perf_counter() - begin, processor_seconds() - processor_begin
    assert batches == len(schedule)
    return Round(batches * source.batch_size, seconds, used)


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    source: Source, readers: dict[str, Reader], workers: int, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Figures of each provider: medians and quantiles over rounds of about so many seconds."""
    epochs = {name: epochs_in(source, reader, workers, seconds) for name, reader in readers.items()}
    found: dict[str, list[Round]] = {name: [] for name in readers}
    names = list(readers)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(run(source, readers[name], workers, epochs[name]))
    return {name: figures(own, found.get(AS_RELEASED)) for name, own in found.items()}


def epochs_in(source: Source, reader: Reader, workers: int, seconds: float) -> int:
    """How many a provider reads in about that time. Tried out, which warms it up, in runs long enough for starting workers not to count."""
    epochs = 1
    while (taken := run(source, reader, workers, epochs).seconds) < seconds / 4:
        epochs *= 4
    return max(round(epochs * seconds / taken), 1)


def figures(rounds: list[Round], released: list[Round] | None) -> dict[str, Any]:
    per_core = np.array([r.samples / r.processor_seconds for r in rounds])
    by_clock = np.array([r.samples / r.seconds for r in rounds])
    found: dict[str, Any] = {
        "core_samples_per_second": spread(per_core),
        "clock_samples_per_second": spread(by_clock),
        "processor_ms_per_sample": spread(1e3 / per_core),
        "samples": sum(r.samples for r in rounds),
        "rounds": len(rounds),
        "times_released": None,
        "times_released_by_clock": None,
    }
    if released:
        core = [r.samples / r.processor_seconds for r in released]
        clock = [r.samples / r.seconds for r in released]
        found["times_released"] = float(np.median(per_core / core))
        found["times_released_by_clock"] = float(np.median(by_clock / clock))
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = (float(value) for value in np.quantile(values, (0.2, 0.5, 0.8)))
    return {"median": median, "low": low, "high": high}


# ----------------------------------------------------------------------------------------------------------------- report


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal by the worst row, of data sets and numbers of workers."""
    verdicts = []
    for goal in GOALS:
        values = [
            (own["times_released"], f"{row['data']}, {number_of_workers(row['workers'])}")
            for row in rows
            if (own := row["providers"].get(goal.provider, {})).get("times_released") is not None
        ]
        worst, where = min(values, default=(None, None))
        verdict = "not measured in this run" if worst is None else "met" if worst >= goal.least else "not met"
        verdicts.append({"goal": goal.text, "worst": worst, "worst_at": where, "verdict": verdict})
    return verdicts


def cell_table(row: dict[str, Any]) -> str:
    """What was measured of a data set with some workers, a provider a line."""
    columns = [
        "provider", "a core's samples/s (20 % to 80 %)", "times as released", "processor ms a sample", "samples/s by the clock",
        "videos with wrong frames",
    ]  # fmt: skip
    lines = [
        f"{row['data']} ({row['videos']} videos), {number_of_workers(row['workers'])}",
        "",
        harness.table_header(columns),
    ]
    for name, own in row["providers"].items():
        if "skipped" in own:
            lines.append(harness.table_line([name, f"skipped: {own['skipped']}", "", "", "", ""]))
            continue
        core, times = own["core_samples_per_second"], own["times_released"]
        lines.append(
            harness.table_line(
                [
                    name,
                    f"{rate(core['median'])} ({rate(core['low'])} to {rate(core['high'])})",
                    "" if times is None else f"{times:.1f}",
                    f"{own['processor_ms_per_sample']['median']:.3g}",
                    rate(own["clock_samples_per_second"]["median"]),
                    f"{own['wrong_videos']} of {own['checked_videos']}",
                ]
            )
        )
    return "\n".join(lines)


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number_of_workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


def goal_table(verdicts: Sequence[dict[str, Any]]) -> str:
    lines = [harness.table_header(["goal", "worst", "where", ""])]
    for verdict in verdicts:
        worst = "" if verdict["worst"] is None else f"{verdict['worst']:.2f}"
        lines.append(harness.table_line([verdict["goal"], worst, verdict["worst_at"] or "", verdict["verdict"]]))
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], caption: str) -> Figure:
    """A core's samples a second, a panel a data set, a bar a provider and number of workers."""
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
            for place, name in enumerate(names):
                own, y = row["providers"][name], place - 0.4 + height * (rank + 0.5)
                if "skipped" in own:
                    where = panel.get_yaxis_transform()  # x from 0 to 1 across the panel
                    panel.text(0.02, y, "skipped", va="center", fontsize=7, color="dimgray", transform=where)
                    continue
                core = own["core_samples_per_second"]
                around = [[core["median"] - core["low"]], [core["high"] - core["median"]]]
                colour = "tab:red" if name.startswith("ours") else "tab:blue"
                shade = 1 - 0.45 * rank / max(len(counts) - 1, 1)
                panel.barh(y, core["median"], 0.9 * height, color=colour, alpha=shade, xerr=around)
                wrong = f", wrong in {own['wrong_videos']}" if own["wrong_videos"] else ""
                label = f"{rate(core['median'])}{wrong} ({number_of_workers(row['workers'])})"
                panel.annotate(label, (core["high"], y), (5, 0), textcoords="offset points", va="center", fontsize=7)
                ends += [core["low"], core["high"]]
        if ends:
            panel.set_xscale("log")
            panel.set_xlim(min(ends) / 2, max(ends) * (max(ends) / min(ends)) ** 0.5 * 2)  # room for labels
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(name_of_set, fontsize=10)
        panel.set_xlabel("samples a second of processor time")
        panel.grid(True, axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle("Training samples that one core reads: 2 windows of 16 frames, 2 stills")
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


# ------------------------------------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", type=Path, required=True, metavar="DIR", help="data sets, as train.py takes"
    )
    parser.add_argument("--workers", nargs="+", type=int, metavar="N", help=f"default: {' '.join(map(str, WORKERS))}")
    parser.add_argument("--quick", action="store_true", help="1 worker, one short round")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of a round")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new cell is begun after that")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the devices' folders")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    begin = time.monotonic()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    worker_counts = arguments.workers or WORKERS[: 1 if arguments.quick else None]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    surroundings = environment(device) | {"processor": cpu_name()}
    with suppress(PackageNotFoundError):
        surroundings["versions"]["torchcodec"] = version("torchcodec")
    print(f"{surroundings['processor']}, {surroundings['cores']} cores; median of {rounds} rounds of {seconds:g} s")

    rows: list[dict[str, Any]] = []
    not_reached: list[str] = []
    for folder in arguments.data:
        source = open_source(folder)
        readers, skipped = open_readers(source, arguments.providers)
        wrong = videos_read_wrongly(source, readers)
        for workers in worker_counts:
            if rows and time.monotonic() - begin > 60 * arguments.minutes:
                not_reached.append(f"{source.name}, {number_of_workers(workers)}")
                continue
            measured = measure(source, readers, workers, rounds, seconds)
            providers: dict[str, dict[str, Any]] = {}
            for name in arguments.providers:
                if name in skipped:
                    providers[name] = {"skipped": skipped[name]}
                    continue
                checks = {"wrong_videos": wrong[name], "checked_videos": len(checked_videos(source))}
                providers[name] = measured[name] | checks
            rows.append({"data": source.name, "videos": len(source.paths), "workers": workers, "providers": providers})
            print(f"\n{cell_table(rows[-1])}", flush=True)

    verdicts = judge(rows)
    print(f"\nGoals, by a core's samples\n\n{goal_table(verdicts)}\n")
    if not_reached:
        print(f"stopped, {arguments.minutes:g} minutes were over; not measured: {'; '.join(not_reached)}")
    folder = harness.results_folder(device, arguments.results)
    name = "loader_quick" if arguments.quick else "loader"
    content = {
        "question": "how many training samples a second does one core read?",
        "command": harness.command("loader", argv),
        "environment": surroundings,
        "seconds": round(time.monotonic() - begin, 1),
        "sample": f"2 windows of {CONFIG.clip_length} frames at stride {CONFIG.clip_stride}, 2 stills",
        "goals": verdicts,
        "not_reached": not_reached,
        "rows": rows,
    }
    caption = (
        f"{surroundings['processor']}, {surroundings['date'][:10]}, av {surroundings['versions']['av']}, "
        f"commit {surroundings['commit']}; median of {rounds} rounds, line: 20 to 80 %"
    )
    harness.write(folder, name, content, plot(rows, arguments.providers, caption))
    print(f"Wrote {folder / name}.json and .png")


if __name__ == "__main__":
    main()
