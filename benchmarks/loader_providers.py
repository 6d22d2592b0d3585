"""The ways to read training samples from a data set.

benchmarks/loader.py describes and measures them. This module is not run by itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks import harness
from benchmarks.harness import RELEASED, NotAvailable
from dclr.config import DataConfig
from dclr.data import clips
from dclr.data.augmentation import PRETRAIN
from dclr.data.catalog import Catalog
from dclr.data.clips import ClipPair
from dclr.data.datasets import open_catalog
from dclr.data.decode import NO_PTS, VideoRecord, YuvFrames
from dclr.data.loader import Batches, BatchSampler
from dclr.data.manifest import load_manifest
from dclr.data.pack import pack
from dclr.data.samples import PairSamples
from dclr.data.videos import open_videos
from dclr.errors import UserError

SEED = 0
CONFIG = DataConfig()
WINDOW = CONFIG.clip_length * CONFIG.clip_stride  # source frames
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """The readable training videos of a data set, in the order of `open_videos`."""

    name: str
    catalog: Catalog
    paths: list[Path]
    records: list[VideoRecord]

    @property
    def batch_size(self) -> int:
        return min(BATCH_SIZE, len(self.paths))

    def pair(self, epoch: int, index: int) -> ClipPair:
        """Return the windows that training draws for a video in an epoch."""
        rng = clips.sample_rng(SEED, epoch, index)
        return clips.draw_pair(rng, self.records[index].frames, CONFIG.clip_length, CONFIG.clip_stride)


def open_source(folder: Path) -> Source:
    """Open a data set. Raises UserError if none of its training videos can be read."""
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


@dataclass(frozen=True)
class Reader:
    """A provider for a source."""

    frames: Callable[[int, ClipPair], np.ndarray | YuvFrames]
    """Reads a sample of video `index`: query clip, key clip and their stills, RGB (2 T + 2, H, W, 3) or planes."""
    batches: Callable[[BatchSampler, int], Iterable[Any]]
    """Yields the sampler's batches, read by a number of workers. This is measured."""
    folder: TemporaryDirectory[str] | None = None
    """The reader's own store, deleted with it."""


def as_released(source: Source) -> Reader:
    """Read windows of the sorted timestamps, as the released code does. In some files this is not the frames' order."""
    if short := sum(record.frames < WINDOW for record in source.records):
        raise NotAvailable(f"it cannot read videos of fewer than {WINDOW} frames, of which there are {short}")
    if untimed := sum(NO_PTS in record.pts for record in source.records):
        raise NotAvailable(f"it finds no frame without a timestamp, and {untimed} videos have such frames")
    timestamps = [np.sort(record.pts).tolist() for record in source.records]
    size = (CONFIG.crop_size, CONFIG.crop_size)
    crop = v2.RandomResizedCrop(size, PRETRAIN.scale, PRETRAIN.ratio, antialias=False)

    def window(index: int, start: int) -> np.ndarray:  # (WINDOW, H, W, 3) uint8
        own = timestamps[index]
        found = read_by_time(source.paths[index], own[start], own[start + WINDOW - 1])
        # The released loader fails where it finds too few frames by time. Here the last frame is repeated instead.
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

    return Reader(frames, sample_batches(source, sample))


def read_by_time(path: Path, first: int, last: int) -> np.ndarray:  # (N, H, W, 3) uint8
    """Read the frames from timestamp `first` to `last`, both included, sorted by time, as torchvision.io did."""
    found = {}
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        container.seek(first, stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None  # as_released refuses such videos
            found[frame.pts] = frame
            if frame.pts >= last:
                break
    return np.stack([found[pts].to_ndarray(format="rgb24") for pts in sorted(found) if first <= pts <= last])


def torchcodec(source: Source) -> Reader:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: FFmpeg's libraries are not found
        raise NotAvailable(f"cannot be imported ({harness.reason(error)})") from error
    if len({(record.height, record.width) for record in source.records}) > 1:
        raise NotAvailable("default_collate cannot stack frames of different sizes")

    def read(index: int, pair: ClipPair) -> Tensor:  # (2 T + 2, H, W, 3) uint8
        decoder = VideoDecoder(source.paths[index], dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=1)
        return decoder.get_frames_at(frame_numbers(pair).tolist()).data

    return Reader(lambda index, pair: read(index, pair).numpy(), sample_batches(source, read))


def ours(source: Source) -> Reader:
    return reader_of(source.catalog)


def ours_packed(source: Source, compact: bool) -> Reader:
    """Pack a store and read from it. The store is deleted with the reader."""
    folder = TemporaryDirectory()
    with redirect_stdout(StringIO()):
        pack(DataConfig(data=str(source.catalog.root)), out=folder.name, compact=compact)
    return replace(reader_of(open_catalog(Path(folder.name))), folder=folder)


def reader_of(catalog: Catalog) -> Reader:
    """Return the reader of training."""
    videos = open_videos(catalog, "train", workers=1, progress=False)
    samples = PairSamples(videos, CONFIG, SEED)
    return Reader(
        lambda index, pair: videos.read(index, frame_numbers(pair)),
        lambda sampler, workers: Batches(samples, sampler, workers),
    )


PROVIDERS: dict[str, Callable[[Source], Reader]] = {
    RELEASED: as_released,
    "torchcodec": torchcodec,
    "ours, videos": ours,
    "ours, compact store": partial(ours_packed, compact=True),
    "ours, store": partial(ours_packed, compact=False),
}


def open_readers(source: Source, names: Sequence[str]) -> tuple[dict[str, Reader], dict[str, str]]:
    """Return the providers that can read the source, and why the others cannot."""
    readers, skipped = {}, {}
    for name in names:
        try:
            readers[name] = PROVIDERS[name](source)
        except NotAvailable as error:
            skipped[name] = str(error)
    return readers, skipped


def frame_numbers(pair: ClipPair) -> np.ndarray:
    """Return the frame numbers (2 T + 2,) of query clip, key clip and their stills."""
    return np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])


class Samples(Dataset[Any]):
    """Samples by (epoch, position in the epoch's order), as in training."""

    def __init__(self, source: Source, sample: Callable[[int, ClipPair], Any]) -> None:
        self.source, self.sample = source, sample

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, position = key
        index = int(clips.epoch_order(SEED, epoch, len(self.source.paths))[position])
        return self.sample(index, self.source.pair(epoch, index))


def sample_batches(
    source: Source, sample: Callable[[int, ClipPair], Any]
) -> Callable[[BatchSampler, int], DataLoader[Any]]:
    def batches(sampler: BatchSampler, workers: int) -> DataLoader[Any]:
        context = "fork" if workers else None
        return DataLoader(
            Samples(source, sample), batch_sampler=sampler, num_workers=workers, multiprocessing_context=context
        )

    return batches
