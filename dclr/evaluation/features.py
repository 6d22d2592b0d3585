"""Run a network on the test clips of a split, and open the backbone and the labelled videos for it.

The test protocol is that of the released code: TEST_CLIPS = 10 clips per video, uniformly spaced, centre crop.

Letters: B clips in a batch, N videos, T frames per clip, h, w pixels of the crop, D outputs of the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dclr.config import DataConfig, ModelConfig
from dclr.data.catalog import Catalog
from dclr.data.failures import Failures
from dclr.data.loader import test_loader
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.models import Backbone, build_backbone, load_backbone
from dclr.progress import ProgressBar
from kernels import augment

VIDEOS_PER_BATCH = 2

LARGEST_OUTPUT = 1e15
"""The largest absolute output of a network that figures are computed from. The squares of larger outputs can overflow
float32. A trained network's outputs are below 1,000."""

SKIPPED = "it is skipped in the figures"
"""The consequence that the message about an unreadable video names."""


@dataclass(frozen=True)
class ClipOutputs:
    """The outputs of a network on the test clips of the readable videos of a split."""

    values: Tensor  # (N, TEST_CLIPS, D) float32, on the CPU
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64, positions in the VideoSet
    failures: dict[str, str]  # path -> reason: the videos that could not be read, which no result counts


def run_on_clips(
    network: Callable[[Tensor], Tensor],  # clips (B, 3, T, h, w) -> (B, D)
    videos: VideoSet,
    config: DataConfig,
    device: torch.device,
    title: str,
) -> ClipOutputs:
    """Return the outputs of `network` on the test clips of every readable video. `title` labels the progress bar.

    Raises:
        UserError: no video can be read, or an output is not finite.
    """
    return run_on_samples(network, TestClips(videos, config), device, title)


@torch.no_grad()
def run_on_samples(
    network: Callable[[Tensor], Tensor],  # clips (B, 3, T, h, w) -> (B, ..., D)
    samples: TestClips,
    device: torch.device,
    title: str,
) -> ClipOutputs:
    """Do what `run_on_clips` does, for a TestClips object that may change the clips, such as composites.CompositeClips.

    Raises:
        UserError: no video can be read, or an output is not finite.
    """
    videos, config = samples.videos, samples.config
    loader = test_loader(samples, VIDEOS_PER_BATCH, config.workers, pin=device.type == "cuda")
    size, failures = (config.crop_size, config.crop_size), Failures(SKIPPED)
    values, labels, indices = [], [], []
    with ProgressBar(len(videos), title, "video") as bar:
        for batch in loader:
            failures.add(batch.failures)
            bar.advance(min(VIDEOS_PER_BATCH, len(videos) - bar.count))
            if len(batch.labels) == 0:
                continue
            clip = augment(batch.frames.to(device, non_blocking=True), batch.augmentation, size)
            output = network(clip).float().cpu()
            check_outputs(output, [videos.path(index) for index in batch.indices.tolist()])
            values.append(output.unflatten(0, (-1, TEST_CLIPS)))
            labels.append(batch.labels[::TEST_CLIPS])
            indices.append(batch.indices[::TEST_CLIPS])
    if not values:
        raise UserError(
            f"{videos.root}: not one of {len(videos)} videos can be read any more; was the folder moved or unmounted?"
        )
    return ClipOutputs(torch.cat(values), torch.cat(labels), torch.cat(indices), failures.reasons)


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
        UserError: see open_videos; a video without a label.
    """
    train, test = (open_split(catalog, split, data) for split in ("train", "test"))
    if any((videos.labels < 0).any() for videos in (train, test)):
        raise UserError(f"--data {catalog.root}: its videos have no labels, which {command} needs; use class folders")
    return train, test


def open_split(catalog: Catalog, split: str, data: DataConfig) -> VideoSet:
    """Return the readable videos of a split. Raises UserError: see open_videos."""
    return open_videos(catalog, split, max(1, data.workers), timeout=data.video_timeout)


def check_classes(checkpoint: Path, classes: tuple[str, ...], catalog: Catalog) -> None:
    """Raise UserError unless the classes of a classifier are those of the data set, in the same order."""
    if catalog.classes != classes:
        different = sorted(set(catalog.classes) ^ set(classes))
        raise UserError(
            f"--checkpoint {checkpoint} knows {len(classes)} classes and {catalog.root} has {len(catalog.classes)}; "
            f"they must be the same ({', '.join(different[:3]) or 'their order differs'})"
        )
