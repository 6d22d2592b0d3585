"""Sections of the page of a run that need its weights and its data set: views, neighbours, scores, accuracy.

Features are of the middle clip of at most 1,000 training and 500 test videos, as --knn-every measures them. A section
that cannot be made says why in one sentence.

Letters: N videos, D features.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dclr.config import DataConfig, ModelConfig, PretrainConfig
from dclr.data.catalog import Catalog
from dclr.data.clips import evenly_spaced
from dclr.data.datasets import open_data
from dclr.data.decode import UnreadableVideo
from dclr.errors import UserError
from dclr.evaluation import figures
from dclr.evaluation.accuracy import accuracy
from dclr.evaluation.background import Scores, evaluate_features, evaluate_scenes, groups_of, why_no_scenes
from dclr.evaluation.features import (
    ClipOutputs,
    check_classes,
    check_labels,
    check_several,
    load_features,
    open_split,
)
from dclr.evaluation.monitor import TEST_VIDEOS, TRAIN_VIDEOS, Sample, evaluating
from dclr.evaluation.page import Html, picture, section, table
from dclr.evaluation.retrieval import middle_frame, nearest_rows, normalized
from dclr.evaluation.run_page import shown_name
from dclr.evaluation.view_sheet import plot_sample
from dclr.models import load_classifier, pool

SHOWN_QUERIES, SHOWN_NEAREST = 6, 5

SAMPLE = f"One clip of each video, its middle one, of at most {TRAIN_VIDEOS:,} training and {TEST_VIDEOS} test videos"

NO_GPU_MEMORY = (
    "the GPU has no free memory: write the page again when the run has ended, or put CUDA_VISIBLE_DEVICES= before the "
    "command to use the CPU"
)
"""Why a section is missing if the GPU is full.

torch's allocator then raises OutOfMemoryError. CUDA itself, such as for the memory of a context, gives an
AcceleratorError with the message "CUDA error: out of memory". No other error of the GPU is caught."""


@dataclass(frozen=True)
class Measured:
    """A run whose weights and data set are measured for its page.

    Attributes:
        folder: of the run, which holds the weights, also those of a run that still trains.
        data, model: the data set and the network.
        seed: of the untrained network that the run is compared with.
        missing: why the data set cannot be opened; empty if it can be tried.
        device: where the network runs.
        pictures: a folder for temporary files.
    """

    folder: Path
    data: DataConfig
    model: ModelConfig
    seed: int
    device: torch.device
    pictures: Path
    missing: str = ""

    @cached_property
    def catalog(self) -> Catalog:
        """The data set. Raises UserError."""
        if self.missing:
            raise UserError(self.missing)
        return open_data(self.data)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """The samples of the train split and, if there is one, of the test split. Raises UserError."""
        most = {"train": TRAIN_VIDEOS, "test": TEST_VIDEOS}
        splits = [split for split in most if split == "train" or split in self.catalog.splits]
        return {split: Sample(self.catalog, split, self.data, most[split], labelled=False) for split in splits}

    @cached_property
    def features(self) -> dict[str, ClipOutputs]:
        """The run's features of the samples, by split: (N, 1, D). Raises UserError."""
        return self.features_of(self.folder)

    def features_of(self, checkpoint: Path) -> dict[str, ClipOutputs]:
        """Return the features of the samples by a run's backbone, or by an untrained one if `checkpoint` is random."""
        samples = self.samples
        backbone, _ = load_features(checkpoint, self.model, self.seed)
        with evaluating(backbone.to(self.device)):
            return {
                split: sample.outputs(lambda clips: pool(backbone(clips)), self.device)
                for split, sample in samples.items()
            }

    # ---------------------------------------------------------------- sections

    def views(self, config: PretrainConfig, same_frames: bool) -> Html:
        """Return the views of the first video's first training sample."""

        def make() -> list[str]:
            videos, out = open_split(self.catalog, "train", self.data), self.pictures / "views.png"
            try:
                plot_sample(
                    Path(videos.path(0)).name,
                    int(videos.frames[0]),
                    lambda numbers: videos.read(0, numbers),
                    config,
                    out,
                    same_frames,
                )
            except UnreadableVideo as error:
                raise UserError(f"{videos.path(0)}: {error}") from None
            used = ", ".join(("rgb", *config.method.auxiliary_views))
            return [
                f"Two clips of the first training video as the run augments them in epoch 0. The method uses: {used}.",
                picture(out, "source frames and the rgb, static and dynamic view of two clips"),
            ]

        return self._section("Views", make)

    def neighbours(self) -> Html:
        """Return some videos, each with the training videos whose features are nearest."""

        def make() -> list[str]:
            for name, sample in self.samples.items():
                check_several(self.catalog, name, sample.videos, "This section")
            gallery = self.features["train"]
            split = "test" if "test" in self.features else "train"
            queries = self.features[split]
            shown, out = evenly_spaced(len(queries.indices), SHOWN_QUERIES), self.pictures / "nearest.png"
            depth = min(SHOWN_NEAREST + 1, len(gallery.indices))
            rows, cosines = nearest_rows(normalized(queries)[shown], normalized(gallery), depth)
            blocks = []
            for query, found, similar in zip(shown, rows.tolist(), cosines.tolist(), strict=True):
                near = [
                    (row, cosine) for row, cosine in zip(found, similar, strict=True) if split == "test" or row != query
                ]
                label = int(queries.labels[query])
                cells = [
                    (
                        *self._cell("train", gallery, row, f"{cosine:.2f}"),
                        _colour(label, int(gallery.labels[row])),
                    )
                    for row, cosine in near[:SHOWN_NEAREST]
                ]
                blocks.append((self._cell(split, queries, query, "query"), cells))
            figures.plot_search_sheet(blocks, f"{split} videos and their nearest training videos", out)
            return [
                f"The training videos nearest to {len(shown)} {split} videos, by the cosine of features. {SAMPLE}.",
                picture(out, f"{len(shown)} videos, each with its nearest training videos"),
            ]

        return self._section("Nearest neighbours", make)

    def _cell(self, split: str, outputs: ClipOutputs, row: int, words: str) -> tuple[np.ndarray | None, str]:
        """Return the middle frame of a video, None if it cannot be read, and its caption."""
        videos, index = self.samples[split].videos, int(outputs.indices[row])
        label = int(videos.labels[index])
        name = videos.classes[label] if label >= 0 else Path(videos.path(index)).name
        return middle_frame(videos, index), f"{words}\n{name}"

    def motion_and_scene(self) -> Html:
        """Return how well linear probes and neighbours predict the class and the scene of test videos."""

        def make() -> list[str]:
            for split in ("train", "test"):
                videos = self._sample(split).videos
                check_labels(self.catalog, split, videos, "this section")
                check_several(self.catalog, split, videos, "This section")
            scored = {
                "this run": self._scores(self.features),
                "untrained network": self._scores(self.features_of(Path("random"))),
            }
            (ours, no_scene), _ = scored.values()
            head = ["network", *(f"{label}, {way}" for label in ours for way in ("linear probe", "nearest video"))]
            rows = [
                [name, *(f"{share:.1%}" for score in scores.values() for share in (score.probe, score.nearest))]
                for name, (scores, _) in scored.items()
            ]
            rows.append(["chance", *(f"{score.chance:.1%}" for score in ours.values() for _ in range(2))])
            train, test = (len(self.features[split].labels) for split in ("train", "test"))
            lines = [
                f"Accuracy on {test} test videos, with frozen features. Probes are fitted to {train} training videos. "
                "Motion is the class of a video, scene is its group. "
                f"{SAMPLE}. The figures to report are those of eval.py bias, with ten clips of every video.",
                table(head, rows, numbers=head[1:]),
            ]
            return [*lines, f"Not measured: the scene. {no_scene}."] if no_scene else lines

        return self._section("What the features know of motion and scene", make)

    def _sample(self, split: str) -> Sample:
        self.catalog.videos(split)  # raises UserError if there is no such split
        return self.samples[split]

    def _scores(self, features: dict[str, ClipOutputs]) -> tuple[dict[str, Scores], str]:
        """Return the scores by kind of label, and why there are none of the scene, or an empty text."""
        train, test = features["train"], features["test"]
        groups = [groups_of(self.catalog, split, self.samples[split].videos, features[split]) for split in features]
        scores = {"motion": evaluate_features(train, test, len(self.catalog.classes))}
        no_scene = why_no_scenes(groups[0], train.labels.tolist(), groups[1])
        if not no_scene:
            scores["scene"] = evaluate_scenes(train, test, *groups)
        return scores, no_scene

    def accuracy(self) -> Html:
        """Return the accuracy of a finetuned or linear classifier on test videos, and its confusion matrix."""

        def make() -> list[str]:
            classifier, classes = load_classifier(self.folder)
            check_classes(self.folder, classes, self.catalog)
            sample = Sample(self.catalog, "test", self.data, TEST_VIDEOS)
            with evaluating(classifier.to(self.device)):
                result = accuracy(sample.outputs(classifier, self.device))
            out = self.pictures / "confusion.png"
            figures.plot_confusion_matrix(result.confusion, classes, f"{result.videos} test videos", out)
            head = ["classifier", "top-1", "top-5"]
            rows = [
                ["this run", f"{result.top1_video:.1%}", f"{result.top5_video:.1%}"],
                ["chance", f"{result.chance_top1:.1%}", f"{result.chance_top5:.1%}"],
            ]
            return [
                f"One clip of each of {result.videos} test videos, its middle one. The figures to report are those of "
                "eval.py accuracy, with ten clips of every video.",
                table(head, rows, numbers=head[1:]),
                picture(out, "confusion matrix: true class by predicted class"),
            ]

        return self._section("Accuracy", make)

    def _section(self, heading: str, make: Callable[[], Sequence[str]]) -> Html:
        """Return a section with the parts that `make` returns, or with the reason why there are none.

        The reason shows the data set and the run without their folders, see shown_name.
        """
        try:
            return section(heading, *make())
        except UserError as error:
            reason = str(error)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error):
                raise
            reason = NO_GPU_MEMORY
        data = self.data.data.rstrip("/")
        for path in sorted((data, os.path.dirname(data), str(self.folder)), key=len, reverse=True):
            if name := shown_name(path):
                reason = reason.replace(path, name)
        return section(heading, f"This section is missing: {reason}.")


def _colour(query: int, found: int) -> str:
    """Return the colour of a video's border: of the query's class, of another class, or not known (-1)."""
    if query < 0 or found < 0:
        return figures.UNKNOWN
    return figures.RIGHT if query == found else figures.WRONG
