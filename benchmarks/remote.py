"""What does reading from a server cost? A packed store and WebDataset's shards are compared with a local store.

    python -m benchmarks.remote --data UCF101            both latencies
    python -m benchmarks.remote --data UCF101 --quick    a trial: the first latency, one short round

Time to expect: 1 minute to pack, then 3 minutes for each latency. It needs no GPU. Result to expect: from the cache, a
store on a server is read at 0.8 of the speed of a local one. From planes, WebDataset fetches 2.7 times the bytes of the
wanted frames.

Videos of the train split of DATA are linked again and again until there are VIDEOS links. The links are packed into a
store of planes and a compact store. The videos of each store are also written into tar files of TAR videos each, as
WebDataset takes them. A web server on this machine, in a process of its own, serves all of them. Each answer waits for
the latency before its first byte. The bandwidth of a network is not modelled, but the tables give a sample's bytes.

A sample is what pretraining takes: two windows of 16 frames at stride 2, and a still of each. Two worker processes read
batches of 8. A round of the first epoch starts with an empty cache and reads every video once. Other rounds read
epochs for some seconds. Providers take turns. A ratio is the median of the rounds' ratios. The rate by the clock is
counted from the arrival of the second batch on, when both workers have started. The processor time is that of this
process and of the workers, with their start and end, and without the server.

    store, ...           ours: the loader of training, its batches in shared memory
    ... local            the store's folder
    ... from the cache   the store's URL; the cache holds it
    ... first epoch      the store's URL; the cache is empty and takes it
    ... without cache    the store's URL and DCLR_CACHE_GB=0: only wanted frames are fetched, in every epoch
    WebDataset, ...      webdataset reads the tar files in order, each fetched whole by curl, and shuffles SHUFFLE
                         samples; the same frames are taken from each video, and torch's DataLoader collates them.
                         Skipped if not installed

Prints tables and writes remote.json and remote.png into results/cpu. --quick adds to the file names.
"""

import argparse
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import NotAvailable, Row
from benchmarks.loader import processor_seconds
from benchmarks.range_server import RangeServer, serve_in_process
from benchmarks.train import link_videos
from dclr.config import DataConfig
from dclr.data import clips
from dclr.data.datasets import open_data
from dclr.data.decode import read_planes
from dclr.data.encode import compact_record
from dclr.data.loader import Batches, BatchSampler
from dclr.data.pack import pack
from dclr.data.samples import PairSamples
from dclr.data.store import Selection, Store
from dclr.data.store_files import file_name
from dclr.data.video_cache import FOLDER, SIZE
from dclr.data.videos import VideoSet, open_videos
from dclr.report import cpu_name

VIDEOS, TAR, SHUFFLE = 96, 8, 16
WORKERS, BATCH_SIZE = 2, 8
STARTING = 2  # batches whose time is not counted, because the workers start
LATENCIES_MS = (0, 20)
ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS, QUICK_SECONDS = 3.0, 0.5
CONFIG = DataConfig()
LOCAL = "store, local"


@dataclass(frozen=True)
class Reader:
    """A provider at one latency."""

    batches: Callable[[int], Iterable[Any]]
    """Yields the batches of a number of epochs."""
    before: Callable[[], None] = lambda: None
    """Called before each round."""
    one_epoch: bool = False
    """True if a round is always one epoch."""


@dataclass(frozen=True)
class Place:
    """Where the providers of one latency read."""

    root: Path
    """The folder of planes, compact, planes-tars and compact-tars."""
    server: RangeServer
    caches: Path
    """The folder of the providers' caches."""


def ours(place: Place, kind: str, how: str) -> Reader:
    cache = place.caches / f"{kind}-{how}"
    os.environ |= {FOLDER: str(cache), SIZE: "0" if how == "without cache" else "50"}
    data = place.root / kind if how == "local" else f"{place.server.url}/{kind}"
    videos = open_videos(open_data(DataConfig(data=str(data))), "train", workers=1, progress=False)
    samples = PairSamples(videos, CONFIG, 0)

    def batches(epochs: int) -> Batches:
        return Batches(samples, BatchSampler(len(videos), BATCH_SIZE, epochs), WORKERS)

    if how != "first epoch":
        return Reader(batches)
    return Reader(batches, partial(shutil.rmtree, cache, ignore_errors=True), one_epoch=True)


def webdataset(place: Place, kind: str) -> Reader:
    try:
        from webdataset import WebDataset, WebLoader
    except ImportError as error:
        raise NotAvailable("not installed") from error
    tars = sorted(path.name for path in (place.root / f"{kind}-tars").iterdir())
    urls = [f"{place.server.url}/{kind}-tars/{name}" for name in tars]

    def batches(epochs: int) -> Iterable[Any]:
        shards = WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        frames = shards.shuffle(SHUFFLE).map(partial(take_frames, kind)).batched(BATCH_SIZE).repeat(epochs)
        return WebLoader(frames, batch_size=None, num_workers=WORKERS)

    return Reader(batches)


def take_frames(kind: str, sample: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Return planes of as many frames as training takes from a video, given the video as WebDataset reads it."""
    about = json.loads(sample["json"])
    frames, height, width = about["frames"], about["height"], about["width"]
    pair = clips.draw_pair(np.random.default_rng(), frames, CONFIG.clip_length, CONFIG.clip_stride)
    wanted = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
    if kind == "compact":
        descriptor = os.memfd_create("video")
        with open(descriptor, "wb", buffering=0) as file:
            file.write(sample["avi"])
            found = read_planes(Path(f"/proc/self/fd/{descriptor}"), compact_record(frames, height, width), wanted)
        return found.y, found.u, found.v
    video = np.frombuffer(sample["yuv"], np.uint8).reshape(frames, -1)[wanted]
    luma, half = height * width, ((height + 1) // 2, (width + 1) // 2)
    chroma = half[0] * half[1]
    return (
        video[:, :luma].reshape(-1, height, width),
        video[:, luma : luma + chroma].reshape(-1, *half),
        video[:, luma + chroma :].reshape(-1, *half),
    )


PROVIDERS: dict[str, Callable[[Place], Reader]] = {
    LOCAL: partial(ours, kind="planes", how="local"),
    "store, from the cache": partial(ours, kind="planes", how="from the cache"),
    "store, first epoch": partial(ours, kind="planes", how="first epoch"),
    "store, without cache": partial(ours, kind="planes", how="without cache"),
    "WebDataset, planes": partial(webdataset, kind="planes"),
    "compact store, local": partial(ours, kind="compact", how="local"),
    "compact store, from the cache": partial(ours, kind="compact", how="from the cache"),
    "compact store, first epoch": partial(ours, kind="compact", how="first epoch"),
    "compact store, without cache": partial(ours, kind="compact", how="without cache"),
    "WebDataset, compact videos": partial(webdataset, kind="compact"),
}


# ---------------------------------------------------------------------------------------------------------------- data


def make_data(data: Path, folder: Path) -> None:
    """Write the two stores, and the tar files with the same videos."""
    links = link_videos(data, VIDEOS, folder / "videos")
    for kind in ("planes", "compact"):
        with redirect_stdout(io.StringIO()):
            pack(DataConfig(data=str(links), workers=WORKERS), out=str(folder / kind), compact=kind == "compact")
        videos = open_videos(open_data(DataConfig(data=str(folder / kind))), "train", workers=1, progress=False)
        write_tars(videos, folder / f"{kind}-tars")


def write_tars(videos: VideoSet, folder: Path) -> None:
    """Write the videos of a store into tar files of TAR videos each: of each video a .json and its stored bytes."""
    folder.mkdir()
    source = videos.source
    assert isinstance(source, Selection)
    for first in range(0, len(videos), TAR):
        with tarfile.open(folder / f"{first // TAR:04d}.tar", "w") as tar:
            for index in range(first, min(first + TAR, len(videos))):
                frames, height, width = (int(of[index]) for of in (videos.frames, videos.heights, videos.widths))
                about = {"index": index, "frames": frames, "height": height, "width": width}
                suffix = "avi" if source.store.compact else "yuv"
                content = stored_bytes(source.store, int(source.rows[index]))
                for name, part in (("json", json.dumps(about).encode()), (suffix, content)):
                    entry = tarfile.TarInfo(f"{index:06d}.{name}")
                    entry.size = len(part)
                    tar.addfile(entry, io.BytesIO(part))


def stored_bytes(store: Store, row: int) -> bytes:
    """Return the bytes of a video of a local store."""
    with (store.folder / file_name(store.shards, row, store.compact)).open("rb") as file:
        file.seek(int(store.offsets[row]))
        return file.read(int(store.sizes[row]))


# ------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Round:
    """One pass of a provider over some epochs."""

    samples: int
    samples_per_second: float
    processor_seconds: float
    requests: int
    bytes_sent: int


def read_epochs(place: Place, reader: Reader, epochs: int) -> Round:
    """Read epochs. The workers start and end inside."""
    reader.before()
    requests, sent, processor = place.server.requests, place.server.bytes_sent, processor_seconds()
    arrivals, counts = [], []
    for batch in reader.batches(epochs):
        arrivals.append(time.perf_counter())
        counts.append(len(batch.indices if hasattr(batch, "indices") else batch[0]))
    rate = sum(counts[STARTING:]) / (arrivals[-1] - arrivals[STARTING - 1])
    used = processor_seconds() - processor
    return Round(sum(counts), rate, used, place.server.requests - requests, place.server.bytes_sent - sent)


def find_epochs(place: Place, reader: Reader, seconds: float) -> int:
    """Return how many epochs the provider reads in about that time. This also fills the cache."""
    read_epochs(place, reader, 1)
    if reader.one_epoch:
        return 1
    found = read_epochs(place, reader, 2)
    return max(round(found.samples_per_second * seconds / VIDEOS), 1)


def measure(latency_ms: int, root: Path, names: Sequence[str], rounds: int, seconds: float) -> Row:
    """Return one row of the results: every provider at one latency."""
    providers: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        caches = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = Place(root, stack.enter_context(serve_in_process(root, latency_ms / 1000)), caches)
        readers: dict[str, Reader] = {}
        for name in names:
            try:
                readers[name] = PROVIDERS[name](place)
            except NotAvailable as error:
                providers[name] = {"skipped": str(error)}
        epochs = {name: find_epochs(place, reader, seconds) for name, reader in readers.items()}
        found: dict[str, list[Round]] = {name: [] for name in readers}
        for name in harness.turns(list(readers), rounds):
            found[name].append(read_epochs(place, readers[name], epochs[name]))
    for name, each in found.items():
        providers[name] = figures(each, found.get(LOCAL))
    return {
        "latency_ms": latency_ms,
        "videos": VIDEOS,
        "workers": WORKERS,
        "providers": {name: providers[name] for name in names},
    }


def figures(rounds: Sequence[Round], local: Sequence[Round] | None) -> dict[str, Any]:
    """Return the figures of a provider over its rounds."""
    rates = np.array([each.samples_per_second for each in rounds])
    samples = sum(each.samples for each in rounds)
    ratios = rates / [each.samples_per_second for each in local] if local else None
    return {
        "samples_per_second": harness.quantiles(rates),
        "times_local": None if ratios is None else float(np.median(ratios)),
        "times_local_by_round": None if ratios is None else [round(float(ratio), 3) for ratio in ratios],
        "processor_ms_per_sample": harness.quantiles(1e3 * each.processor_seconds / each.samples for each in rounds),
        "bytes_per_sample": sum(each.bytes_sent for each in rounds) / samples,
        "requests_per_sample": sum(each.requests for each in rounds) / samples,
        "rounds": len(rounds),
    }


# -------------------------------------------------------------------------------------------------------------- report


def cell_table(row: Row) -> str:
    """Return what was measured at one latency as a table, one provider a line."""
    columns = ["read from", "samples/s (20 % to 80 %)", "relative to local", "processor ms a sample"]
    columns += ["MB a sample", "requests a sample"]
    lines = []
    for name, found in row["providers"].items():
        if "skipped" in found:
            lines.append([name, f"skipped: {found['skipped']}", "", "", "", ""])
            continue
        rate, ratio = found["samples_per_second"], found["times_local"]
        lines.append([
            name,
            f"{rate['median']:.0f} ({rate['low']:.0f} to {rate['high']:.0f})",
            "" if ratio is None else f"{ratio:.2g}",
            f"{found['processor_ms_per_sample']['median']:.1f}",
            f"{found['bytes_per_sample'] / 1e6:.2f}",
            f"{found['requests_per_sample']:.2f}",
        ])  # fmt: skip
    return f"\nlatency {row['latency_ms']} ms ({row['videos']} videos)\n\n{harness.table(columns, lines)}"


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot the speed of each provider, one colour for each latency: median, and 20 % to 80 % quantile of the rounds."""
    names = list(rows[0]["providers"])
    figure, panel = plt.subplots(figsize=(9, 1.5 + 0.5 * len(names)))
    for number, row in enumerate(rows):
        measured = [
            (i, row["providers"][name]) for i, name in enumerate(names) if "skipped" not in row["providers"][name]
        ]
        rates = [found["samples_per_second"] for _, found in measured]
        panel.errorbar(
            [rate["median"] for rate in rates],
            [i + (number - (len(rows) - 1) / 2) * 0.6 / len(rows) for i, _ in measured],
            xerr=[[rate["median"] - rate["low"] for rate in rates], [rate["high"] - rate["median"] for rate in rates]],
            fmt="o",
            capsize=2,
            label=f"{row['latency_ms']} ms",
        )
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xscale("log")
    harness.label_log_axis(panel.xaxis)
    panel.set_xlabel("samples a second: median of the rounds, line: 20 % to 80 %")
    panel.grid(True, axis="x", alpha=0.3)
    panel.legend(title="latency of the server", fontsize=8)
    harness.add_titles(figure, "Training samples that two workers read from a server on this machine", caption)
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__, PROVIDERS)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set of videos, as for train.py")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="length of a round")
    return parser


def measure_all(arguments: argparse.Namespace) -> None:
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    names = arguments.providers or list(PROVIDERS)
    run = harness.Run("remote", arguments.argv, arguments, torch.device("cpu"))
    run.environment["processor"] = cpu_name()
    for package in ("webdataset", "fsspec", "aiohttp"):
        try:
            run.environment["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    with tempfile.TemporaryDirectory() as folder:
        make_data(arguments.data, Path(folder))
        latencies = LATENCIES_MS[: 1 if arguments.quick else None]
        run.measure(latencies, lambda each: measure(each, Path(folder), names, rounds, seconds), cell_table)
    detail = f"{cpu_name()}; {WORKERS} workers; median of {rounds} rounds"
    content = {
        "question": "what does reading from a server cost, next to a local store and to WebDataset's shards?",
        "sample": f"2 windows of {CONFIG.clip_length} frames at stride {CONFIG.clip_stride}, 2 stills",
    }
    run.publish(plot(run.rows, run.caption(detail)), content)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    parser.set_defaults(argv=argv)
    harness.run_command(parser, measure_all, argv)


if __name__ == "__main__":
    main()
