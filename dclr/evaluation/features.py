"""Run a network on the test clips of a split, and open the backbone and the labelled videos for it.

The test protocol is that of the released code: TEST_CLIPS = 10 clips per video, uniformly spaced, centre crop.

Each rank takes a share of the videos, and rank 0 gets the outputs of all. The clips of a video are computed together
and never with those of another video. So the outputs do not depend on the number of ranks.

Letters: B clips in a batch, N videos, T frames per clip, h, w pixels of the crop, D outputs of the network, R rows that
are kept of a video.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dclr import distributed
from dclr.config import DataConfig, ModelConfig
from dclr.data.catalog import Catalog, label_advice
from dclr.data.datasets import make_demo, open_data
from dclr.data.failures import Failures
from dclr.data.loader import Position, TestSampler, batches_ahead
from dclr.data.prefetch import batches_on
from dclr.data.samples import TEST_CLIPS, ClipBatch, TestClips, merge_failures
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.kernels import Augmentation, Yuv420, augment
from dclr.models import Backbone, build_backbone, load_backbone
from dclr.progress import ProgressBar

LARGEST_OUTPUT = 1e15
"""The largest absolute output of a network that figures are computed from. The squares of larger outputs can overflow
float32. A trained network's outputs are below 1,000."""

_PIXELS_AT_ONCE = 2**23
"""Pixels of a clip that are augmented at once on a CPU. The computation takes about 40 bytes for each of them."""

SKIPPED = "it is skipped in the figures"
"""The consequence that the message about an unreadable video names."""


@dataclass(frozen=True)
class ClipOutputs:
    """The outputs of a network on the test clips of the readable videos of a split."""

    values: Tensor  # (N, R, D) float32, on the CPU. Only rank 0 has them: N = 0 on the others
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64, positions in the VideoSet
    failures: dict[str, str]  # path -> reason: the videos that could not be read, which no result counts


Keep = Callable[[Tensor], Tensor]
"""What is kept of a video's outputs: (TEST_CLIPS, D) -> (R, D). Keeping less saves memory on rank 0."""


def all_clips(outputs: Tensor) -> Tensor:
    """Keep the outputs of all clips of a video."""
    return outputs


def mean_of_clips(outputs: Tensor) -> Tensor:
    """Keep the mean over the clips of a video: (TEST_CLIPS, D) -> (1, D)."""
    return outputs.mean(0, keepdim=True)


def run_on_clips(
    network: Callable[[Tensor], Tensor],  # clips (B, 3, T, h, w) -> (B, D)
    videos: VideoSet,
    config: DataConfig,
    device: torch.device,
    title: str,
    keep: Keep = all_clips,
) -> ClipOutputs:
    """Return the outputs of `network` on the test clips of every readable video. `title` labels the progress bar.

    Rank 0 warns if all outputs are equal.

    Raises:
        UserError: no video can be read, or an output is not finite.
    """
    outputs = run_on_samples(network, TestClips(videos, config), device, title, keep)
    values = outputs.values
    if len(values) > 1 and all((kept == values[0, 0]).all() for kept in values):  # stops at the first difference
        print("warning: the network gives the same output for every clip: figures have no meaning", file=sys.stderr)
    return outputs


def run_on_samples(
    network: Callable[[Tensor], Tensor],  # clips (B, 3, T, h, w) -> (B, ..., D)
    samples: TestClips,
    device: torch.device,
    title: str,
    keep: Keep = all_clips,
    consequence: str = SKIPPED,
) -> ClipOutputs:
    """Do what `run_on_clips` does, for a TestClips object that may change the clips, such as composites.CompositeClips.

    Args:
        consequence: what the figures do without an unreadable video, for the warning that names it.

    Raises:
        UserError: no video can be read, or an output is not finite.
    """
    videos, failures = samples.videos, Failures(consequence)
    own, found = distributed.own_share(len(videos)), list[int]()
    values = torch.empty(0)
    with ProgressBar(len(own), title, "video", shown=distributed.rank() == 0) as bar:
        results = embed_videos(lambda clips: {"": network(clips)}, samples, device, own)
        for index, result in zip(own, results, strict=True):
            bar.advance()
            if isinstance(result, str):
                failures.add({videos.path(index): result})
                continue
            kept = keep(result[""])
            if not found:  # memory for all videos, so that no second copy of it is needed at the end
                values = torch.empty(len(own), *kept.shape)
            values[len(found)] = kept
            found.append(index)
    everyone = distributed.gather_objects((found, failures.reasons))
    indices = torch.tensor([index for indices, _ in everyone for index in indices], dtype=torch.int64)
    if not len(indices):
        raise UserError(
            f"{videos.root}: not one of {len(videos)} videos can be read any more; was the folder moved or unmounted?"
        )
    values = distributed.gather_rows(values[: len(found)])
    labels = torch.from_numpy(videos.labels)[indices]
    return ClipOutputs(values, labels, indices, merge_failures(reasons for _, reasons in everyone))


def embed_videos(
    embed: Callable[[Tensor], dict[str, Tensor]],  # clips (B, 3, T, h, w) -> kind -> (B, ..., D)
    samples: TestClips,
    device: torch.device,
    indices: Sequence[int] | None = None,
) -> Iterator[dict[str, Tensor] | str]:
    """Yield the embeddings of the test clips of each video: kind -> (TEST_CLIPS, ..., D) float32, on the CPU.

    A video that cannot be read gives the reason in place of embeddings. The clips of a video are computed together, and
    never with those of another video. So the embeddings do not depend on which other videos are read.

    Args:
        indices: the videos, by default all.

    Raises:
        UserError: the frames are too large for the memory of the machine, or an embedding is not finite.
    """
    if indices is not None and not len(indices):
        return
    size = (samples.config.crop_size, samples.config.crop_size)
    found: list[dict[str, Tensor]] = []  # of the batches of one video
    reason = ""
    for positions, batch in clip_batches(samples, device, TestSampler(samples, indices)):
        reason = reason or next(iter(batch.failures.values()), "")
        if not reason:
            with torch.no_grad():
                embeddings = embed(augment_slices(batch.frames, batch.augmentation, size))
            found.append({kind: values.float().cpu() for kind, values in embeddings.items()})
            for values in found[-1].values():
                check_outputs(values, [samples.videos.path(positions[0][0])] * len(values))
        if positions[-1][1] == TEST_CLIPS - 1:
            yield reason or {kind: torch.cat([batch[kind] for batch in found]) for kind in found[0]}
            found, reason = [], ""


def clip_batches(
    samples: TestClips, device: torch.device, sampler: TestSampler
) -> Iterator[tuple[Sequence[Position], ClipBatch]]:
    """Yield the positions of each test batch, as `sampler` gives them, and the batch, on `device`.

    A batch is valid until the next one is requested.

    Raises:
        UserError: the frames are too large for the memory of the machine.
    """
    ahead = batches_ahead(samples, sampler)
    yield from zip(sampler, batches_on(device, samples, sampler, samples.config.workers, ahead=ahead), strict=True)


def augment_slices(frames: Yuv420, augmentation: Augmentation, size: tuple[int, int]) -> Tensor:
    """Return what `augment` does for test clips, (B, 3, T, h, w).

    On a CPU it computes large frames a few at a time, so that its memory does not grow with their size.
    """
    T, H, W = frames.y.shape[1:]
    at_once = max(1, _PIXELS_AT_ONCE // (H * W))
    if frames.y.device.type != "cpu" or at_once >= T:
        return augment(frames, augmentation, size)
    slices = [augment(frames.select(np.s_[:, t : t + at_once]), augmentation, size) for t in range(0, T, at_once)]
    return torch.cat(slices, 2).contiguous(memory_format=torch.channels_last_3d)


@contextmanager
def evaluation_mode(*modules: nn.Module | None) -> Iterator[None]:
    """Put modules in evaluation mode. At the end, give each submodule its own mode back: a training may continue."""
    modes = {module: module.training for root in modules if root is not None for module in root.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_outputs(outputs: Tensor, paths: Sequence[str]) -> None:
    """Raise UserError unless all outputs are finite and at most LARGEST_OUTPUT. `paths`: the video of each output."""
    for output, path in zip(outputs, paths, strict=True):
        if not (output.abs() <= LARGEST_OUTPUT).all():  # also if it is NaN
            raise UserError(
                f"the network's output for {path} is not finite or above {LARGEST_OUTPUT:g}, so there are no figures: "
                "the run diverged; give an earlier checkpoint"
            )


def load_features(checkpoint: Path, model: ModelConfig, seed: int) -> tuple[Backbone, str]:
    """Return a checkpoint's backbone and one line that says what was loaded.

    The word `random` as the checkpoint gives an untrained backbone, initialised with `seed`.

    Raises:
        UserError: see load_backbone.
    """
    torch.manual_seed(seed)
    backbone = build_backbone(model.backbone, model.width)
    if str(checkpoint) == "random":
        return backbone, f"random weights of {model.backbone} (width {model.width}), seed {seed}"
    return backbone, load_backbone(checkpoint, backbone)


def open_labelled(catalog: Catalog, data: DataConfig, command: str) -> tuple[VideoSet, VideoSet]:
    """Return the train split and the test split. `command` names the subcommand of eval.py in an error message.

    Raises:
        UserError: see open_videos; a video without a label; a split of one video.
    """
    train, test = (open_split(catalog, split, data) for split in ("train", "test"))
    for split, videos in (("train", train), ("test", test)):
        check_labels(catalog, split, videos, command)
        check_several(catalog, split, videos, command)
    return train, test


def check_several(catalog: Catalog, split: str, videos: VideoSet, command: str) -> None:
    """Raise UserError if a split has one video: its feature minus the mean of the split is zero.

    Args:
        command: the subcommand of eval.py, for the message.
    """
    if len(videos) < 2:
        raise UserError(
            f"--data {catalog.root}: the {split} split has one video. {command} subtracts the mean of a split from "
            "its features, so each split must have at least two videos"
        )


def check_labels(catalog: Catalog, split: str, videos: VideoSet, command: str, otherwise: str = "") -> None:
    """Raise UserError if a video has no label, with what is right for the layout.

    Args:
        command: the subcommand of eval.py, for the message.
        otherwise: what the user can do without labels.
    """
    bare = np.flatnonzero(videos.labels < 0).tolist()
    if bare:
        start = "its videos have" if len(bare) == len(videos) else f"{len(bare)} of {len(videos)} {split} videos have"
        raise UserError(
            f"--data {catalog.root}: {start} no labels, which {command} needs; "
            f"{label_advice(catalog)}, the first without one is {videos.path(bare[0])}{otherwise}"
        )


def find_data(data: DataConfig) -> Catalog:
    """Return the catalog of --data. Without --data, rank 0 renders the demo videos if they do not exist.

    Call it after the network is loaded, so that a wrong checkpoint is refused before anything is rendered.

    Raises:
        UserError: see open_data.
    """
    if not data.data:
        distributed.on_rank_zero(make_demo)
    return open_data(data)


def open_split(catalog: Catalog, split: str, data: DataConfig) -> VideoSet:
    """Return the readable videos of a split. One rank on each machine verifies them, and the others read its cache.

    Raises:
        UserError: on all ranks, see open_videos; the ranks do not see the same videos.
    """
    workers, timeout = max(1, data.workers), data.video_timeout
    videos = distributed.once_on_each_machine(
        lambda first: open_videos(catalog, split, workers, progress=first, timeout=timeout)
    )
    if distributed.world_size() > 1 and len(set(distributed.gather_objects(videos.fingerprint()))) > 1:
        raise UserError(
            f"--data {catalog.root}: the processes find different videos there; every machine must see the same files"
        )
    return videos


def check_classes(checkpoint: Path, classes: tuple[str, ...], catalog: Catalog) -> None:
    """Raise UserError unless the classes of a classifier are those of the data set, in the same order."""
    if catalog.classes != classes:
        different = sorted(set(catalog.classes) ^ set(classes))
        raise UserError(
            f"--checkpoint {checkpoint} knows {len(classes)} classes and {catalog.root} has {len(catalog.classes)}; "
            f"they must be the same ({', '.join(different[:3]) or 'their order differs'})"
        )
