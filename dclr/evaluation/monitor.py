"""Measurements during training, on a fixed sample of videos: k-NN of features, or the accuracy of a classifier.

A measurement reads the middle test clip of each video of the sample. The videos are evenly spaced over their split. The
network is in evaluation mode and gets back its mode. So training gives the same result with and without measurements.

All ranks call a measurement. Each computes a share of the videos, with the network and the BatchNorm statistics of rank
0. Rank 0 gets the outputs and computes the values, so these do not depend on the number of ranks.

Letters: N training videos, Q test videos, D features, C classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclr import distributed
from dclr.config import DataConfig
from dclr.data.catalog import Catalog
from dclr.data.clips import evenly_spaced
from dclr.data.datasets import open_data
from dclr.data.loader import TestSampler
from dclr.data.samples import TEST_CLIPS, TestClips, merge_failures
from dclr.errors import UserError
from dclr.evaluation.features import (
    ClipOutputs,
    augment_slices,
    check_outputs,
    clip_batches,
    evaluation_mode,
    open_split,
)
from dclr.models import pool

TRAIN_VIDEOS, TEST_VIDEOS = 1000, 500
"""The most videos of a sample."""

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Weighted k-NN of Wu et al. (CVPR 2018, arXiv 1805.01978). They use 200 neighbours, for 1.3 million images."""

Monitor = Callable[[nn.Module], dict[str, float]]
"""Measures a network: name in the log -> value."""


class Sample:
    """The middle clips of some videos of a split.

    Attributes:
        videos: all videos of the split.
    """

    def __init__(self, catalog: Catalog, split: str, data: DataConfig, most: int, labelled: bool = True) -> None:
        """Raises UserError: there is no such split, or with `labelled`, its videos have no labels."""
        self.videos = open_split(catalog, split, data)
        if labelled and (self.videos.labels < 0).any():
            raise UserError(f"the {split} videos of {catalog.root} have no labels")
        self._samples = TestClips(self.videos, data)
        self._indices = evenly_spaced(len(self.videos), most)

    @torch.no_grad()
    def outputs(self, network: Callable[[Tensor], Tensor], device: torch.device) -> ClipOutputs:
        """Return the network's outputs for the readable videos, one clip each: `values` is (N, 1, D).

        All ranks call this. Only rank 0 gets the outputs.

        Args:
            network: clips (B, 3, T, h, w) -> (B, D).

        Raises:
            UserError: no video can be read, or an output is not finite.
        """
        own = distributed.on_all_ranks(lambda: self._outputs_of_share(network, device))
        everyone = distributed.gather_objects(own[1:])
        indices = torch.tensor([index for found, _ in everyone for index in found], dtype=torch.int64)
        if not len(indices):
            raise UserError(f"{self.videos.root}: not one of {len(self._indices)} videos can be read any more")
        values = distributed.gather_rows(own[0])[:, None]
        labels = torch.from_numpy(self.videos.labels)[indices]
        return ClipOutputs(values, labels, indices, merge_failures(failures for _, failures in everyone))

    def _outputs_of_share(
        self, network: Callable[[Tensor], Tensor], device: torch.device
    ) -> tuple[Tensor, list[int], dict[str, str]]:
        """Return the outputs (n, D) and the positions of the readable videos of this rank's share, and the failures."""
        side = self._samples.config.crop_size
        own = [self._indices[position] for position in distributed.own_share(len(self._indices))]
        sampler = TestSampler(self._samples, own, [TEST_CLIPS // 2])
        outputs, indices, failures = [torch.empty(0)], list[int](), dict[str, str]()
        for _, batch in clip_batches(self._samples, device, sampler) if own else ():
            failures |= batch.failures
            if not len(batch.indices):
                continue
            clips = augment_slices(batch.frames, batch.augmentation, (side, side))
            outputs.append(network(clips).float().cpu())
            indices += batch.indices.tolist()
            check_outputs(outputs[-1], [self.videos.path(index) for index in batch.indices.tolist()])
        return torch.cat(outputs[1:] or outputs), indices, failures


def open_knn(data: DataConfig, device: torch.device) -> Monitor:
    """Return a measurement of a backbone: how well the features of training videos predict the classes of test videos.

    Its values are `knn/top1` and `knn/recall_at_1`, see `knn`, and `knn/chance`, the recall at 1 of a random order.

    Raises:
        UserError: the data set has no test split or no labels.
    """
    catalog = open_data(data)
    train, test = Sample(catalog, "train", data, TRAIN_VIDEOS), Sample(catalog, "test", data, TEST_VIDEOS)
    classes = len(catalog.classes)  # `measure` must not keep the catalog, which may have a million videos

    def measure(backbone: nn.Module) -> dict[str, float]:
        with evaluating(backbone):
            gallery, queries = (sample.outputs(lambda x: pool(backbone(x)), device) for sample in (train, test))
        values = (gallery.values[:, 0], gallery.labels, queries.values[:, 0], queries.labels)
        top1, recall = distributed.on_rank_zero(lambda: knn(*values, classes))
        same_class = (gallery.labels[None] == queries.labels[:, None]).float().mean().item()
        return {"knn/top1": top1, "knn/recall_at_1": recall, "knn/chance": same_class}

    return measure


def open_accuracy(data: DataConfig, device: torch.device) -> Monitor:
    """Return a measurement of a classifier: `test/top1` on test videos, and `test/chance` of a uniform guess.

    Raises:
        UserError: the data set has no test split, or one without labels.
    """
    catalog = open_data(data)
    test, classes = Sample(catalog, "test", data, TEST_VIDEOS), len(catalog.classes)

    def measure(classifier: nn.Module) -> dict[str, float]:
        with evaluating(classifier):
            found = test.outputs(classifier, device)
        top1 = distributed.on_rank_zero(lambda: (found.values[:, 0].argmax(1) == found.labels).float().mean().item())
        return {"test/top1": top1, "test/chance": 1 / classes}

    return measure


def knn(
    gallery: Tensor,  # (N, D)
    gallery_labels: Tensor,  # (N,)
    queries: Tensor,  # (Q, D)
    query_labels: Tensor,  # (Q,)
    classes: int,
) -> tuple[float, float]:
    """Return the accuracy of weighted k-NN and the recall at 1, as shares of the queries.

    The mean of the gallery is subtracted from all features, and they are scaled to length 1. Each of the NEIGHBOURS
    nearest gallery videos votes for its class with the weight exp(cosine / TEMPERATURE).
    """
    mean = gallery.mean(0)
    cosine = F.normalize(queries - mean, dim=1) @ F.normalize(gallery - mean, dim=1).T  # (Q, N)
    nearest = cosine.sort(dim=1, descending=True, stable=True)
    k = min(NEIGHBOURS, len(gallery))
    labels, weights = gallery_labels[nearest.indices[:, :k]], (nearest.values[:, :k] / TEMPERATURE).exp()
    votes = torch.zeros(len(queries), classes).scatter_add_(1, labels, weights)
    hits = (votes.argmax(1) == query_labels).float().mean().item()
    return hits, (labels[:, 0] == query_labels).float().mean().item()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, with the buffers of rank 0. At the end, restore its modes and buffers."""
    with evaluation_mode(network), distributed.buffers_of_rank_zero(network):
        yield
