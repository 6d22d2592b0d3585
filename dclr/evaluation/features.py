"""The downstream protocols: accuracy by clip and by video, and retrieval.

Ten clips a video, uniformly spaced, centre crop. Accuracy takes the mean of the logits; retrieval the mean of the features, minus
the split's mean, L2-normalised, by cosine, with the train split as the gallery and the test split as the queries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dclr.config import DataConfig
from dclr.data.failures import Failures
from dclr.data.loader import test_loader
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from dclr.models import count_correct
from kernels import augment

RETRIEVAL_RANKS = (1, 5, 10, 20, 50)
VIDEOS_A_BATCH = 2


@dataclass(frozen=True)
class ClipOutputs:
    """A network's outputs on the test clips of a split's readable videos."""

    values: Tensor  # (N, TEST_CLIPS, D) float32, on the CPU
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64 into the VideoSet
    failures: dict[str, str]  # path -> reason: left out of every figure


def run_on_clips(
    network: Callable[[Tensor], Tensor], videos: VideoSet, config: DataConfig, device: torch.device, title: str
) -> ClipOutputs:
    """`network` on (B, 3, T, h, w) clips -> (B, D), for every video of the set."""
    return run_on_samples(network, TestClips(videos, config), device, title)


@torch.no_grad()
def run_on_samples(
    network: Callable[[Tensor], Tensor], samples: TestClips, device: torch.device, title: str
) -> ClipOutputs:
    """The same for test clips that are not the videos' own frames alone (see foreground.py); the network may give (B, ..., D)."""
    videos, config = samples.videos, samples.config
    loader = test_loader(samples, VIDEOS_A_BATCH, config.workers, pin=device.type == "cuda")
    size, failures = (config.crop_size, config.crop_size), Failures("it is left out of the figures")
    values, labels, indices = [], [], []
    with tqdm(total=len(videos), desc=title, unit="video", dynamic_ncols=True, mininterval=1.0) as bar:
        for batch in loader:
            failures.add(batch.failures)
            bar.update(VIDEOS_A_BATCH)
            if len(batch.labels) == 0:
                continue
            clip = augment(batch.frames.to(device, non_blocking=True), batch.augmentation, size)
            output = network(clip).float().cpu()
            values.append(output.unflatten(0, (-1, TEST_CLIPS)))
            labels.append(batch.labels[::TEST_CLIPS])
            indices.append(batch.indices[::TEST_CLIPS])
    if not values:
        raise UserError(
            f"{videos.root}: not one of {len(videos)} videos can be read any more; was the folder moved or unmounted?"
        )
    return ClipOutputs(torch.cat(values), torch.cat(labels), torch.cat(indices), failures.reasons)


@dataclass(frozen=True)
class Accuracy:
    """Shares of the test videos and of their clips; `confusion` counts videos, true by predicted class."""

    top1_video: float
    top5_video: float
    top1_clip: float
    top5_clip: float
    chance_top1: float  # of guessing a class evenly
    chance_top5: float
    videos: int
    confusion: np.ndarray  # (classes, classes) int64


def accuracy(outputs: ClipOutputs) -> Accuracy:
    """From logits (N, TEST_CLIPS, classes)."""
    count, clips, classes = outputs.values.shape
    video, clip = outputs.values.mean(1), outputs.values.flatten(0, 1)
    clip_labels = outputs.labels.repeat_interleave(clips)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (outputs.labels.numpy(), video.argmax(1).numpy()), 1)
    return Accuracy(
        top1_video=count_correct(video, outputs.labels, 1) / count,
        top5_video=count_correct(video, outputs.labels, 5) / count,
        top1_clip=count_correct(clip, clip_labels, 1) / len(clip),
        top5_clip=count_correct(clip, clip_labels, 5) / len(clip),
        chance_top1=1 / classes,
        chance_top5=min(5, classes) / classes,
        videos=count,
        confusion=confusion,
    )


@dataclass(frozen=True)
class Retrieval:
    """`recall[k]`: share of queries with a video of their class among the k nearest of the gallery; `chance[k]`: the same for a
    gallery in random order; `nearest`: gallery rows by query, nearest first."""

    recall: dict[int, float]
    chance: dict[int, float]
    nearest: np.ndarray  # (queries, min(50, gallery)) int64
    similarity: np.ndarray  # the same shape: cosines


def retrieval(gallery: ClipOutputs, queries: ClipOutputs) -> Retrieval:
    """From features (N, TEST_CLIPS, D)."""
    found = (normalized(queries) @ normalized(gallery).T).sort(dim=1, descending=True, stable=True)
    depth = min(max(RETRIEVAL_RANKS), found.indices.shape[1])
    nearest = found.indices[:, :depth]
    hits = gallery.labels[nearest] == queries.labels[:, None]  # (queries, depth)
    ranks = [k for k in RETRIEVAL_RANKS if k <= len(gallery.labels)]
    of_class = (gallery.labels[None] == queries.labels[:, None]).sum(1).tolist()
    return Retrieval(
        recall={k: hits[:, :k].any(1).float().mean().item() for k in ranks},
        chance={k: sum(chance_of_hit(n, len(gallery.labels), k) for n in of_class) / len(of_class) for k in ranks},
        nearest=nearest.numpy(),
        similarity=found.values[:, :depth].numpy(),
    )


def normalized(outputs: ClipOutputs) -> Tensor:
    """A video's mean feature, minus the split's mean, at length 1: (N, D)."""
    features = outputs.values.mean(1)
    return torch.nn.functional.normalize(features - features.mean(0), dim=1)


def chance_of_hit(of_class: int, gallery: int, k: int) -> float:
    """Probability that k videos drawn from `gallery` without replacement hold one of the `of_class`: 1 - C(G - n, k) / C(G, k)."""
    return 1 - math.comb(gallery - of_class, k) / math.comb(gallery, k)
