"""Accuracy of a finetuned or linear classifier on the test split, by video and by clip: `eval.py accuracy`.

The prediction for a video is the class with the highest mean of the logits over its test clips.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr import distributed
from dclr.config import DataConfig
from dclr.data.videos import VideoSet
from dclr.evaluation import figures
from dclr.evaluation.benchmark import Benchmark
from dclr.evaluation.feature_table import MISSING
from dclr.evaluation.features import ClipOutputs, check_classes, check_labels, find_data, open_split, run_on_clips
from dclr.evaluation.predictions import Predictions, name_of_label, write_predictions
from dclr.evaluation.retrieval import middle_frame
from dclr.models import Classifier, count_correct, load_classifier
from dclr.programs import command_of

SHEET_MISTAKES = 24
"""Most mistakes that the sheet shows."""

WRITTEN_CLASSES = 5
"""Classes of a video in predictions.csv."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracies as shares from 0 to 1, and the confusion matrix."""

    top1_video: float
    top5_video: float
    top1_clip: float
    top5_clip: float
    chance_top1: float  # of a uniform guess among the classes
    chance_top5: float
    videos: int
    confusion: np.ndarray  # (classes, classes) int64: number of videos, true class by predicted class


def evaluate_accuracy(checkpoint: Path, data: DataConfig, device: torch.device, folder: Path) -> dict[str, Any]:
    """Compute a classifier's accuracies on the test split. Return the entries of report.json, on all ranks.

    Rank 0 prints a table. It writes predictions.csv to `folder`, and confusion.png and mistakes.png, a sheet of the
    most confident mistakes, to its folder `pictures`.

    Raises:
        UserError: see load_classifier, find_data, open_split and Benchmark. The data set has other classes than the
            classifier, or a test video without a label.
    """
    classifier, classes = load_classifier(checkpoint)
    catalog = find_data(data)
    check_classes(checkpoint, classes, catalog)
    videos = open_split(catalog, "test", data)
    without = f"; {command_of('eval')} predict needs no labels"
    check_labels(catalog, "test", videos, "accuracy", without)
    benchmark = Benchmark(catalog, data, test=videos)
    outputs = run_on_clips(classifier.to(device).eval(), videos, data, device, "accuracy")
    benchmark.add_failures(outputs.failures)
    return distributed.on_rank_zero(
        lambda: write_accuracy(checkpoint, classifier, classes, videos, outputs, benchmark, folder)
    )


def write_accuracy(
    checkpoint: Path,
    classifier: Classifier,
    classes: tuple[str, ...],
    videos: VideoSet,
    outputs: ClipOutputs,
    benchmark: Benchmark,
    folder: Path,
) -> dict[str, Any]:
    """Print the accuracies and write the files that `evaluate_accuracy` names. Return the entries of report.json."""
    result = accuracy(outputs)

    clips = outputs.values.shape[1]
    print(f"\n{checkpoint} on {benchmark.catalog.root}, {result.videos} test videos, {clips} clips each")
    print(f"{'':14}{'top-1':>8}{'top-5':>8}")
    for name, top1, top5 in (
        ("by video", result.top1_video, result.top5_video),
        ("by clip", result.top1_clip, result.top5_clip),
        ("chance", result.chance_top1, result.chance_top5),
    ):
        print(f"{name:14}{top1:8.1%}{top5:8.1%}")
    benchmark.print_faults()
    title = benchmark.title(
        checkpoint,
        f"top-1 accuracy by video {result.top1_video:.1%} (chance {result.chance_top1:.1%})",
        f"{result.videos} test videos",
    )
    figures.plot_confusion_matrix(result.confusion, classes, title, folder / "pictures" / "confusion.png")
    paths = [videos.path(index) for index in outputs.indices.tolist()]
    missing = {video.path: MISSING for video in benchmark.catalog.missing.get("test", ())}
    predictions = Predictions(
        paths,
        [name_of_label(classes, label) for label in outputs.labels.tolist()],
        ["test"] * len(paths),
        classes,
        outputs.values.mean(1),
        videos.unreadable | outputs.failures | missing,
    )
    write_predictions(predictions, folder / "predictions.csv", WRITTEN_CLASSES)
    mistakes = most_confident_mistakes(predictions)
    print(f"{len(mistakes)} of {result.videos} test videos are predicted wrongly: {folder / 'predictions.csv'}")
    title = benchmark.title(
        checkpoint,
        f"the {min(SHEET_MISTAKES, len(mistakes))} most confident of {len(mistakes)} mistakes, most confident first",
        f"{result.videos} test videos",
        "the probability is that of the predicted class",
    )
    plot_mistakes(mistakes[:SHEET_MISTAKES], predictions, outputs, videos, title, folder / "pictures" / "mistakes.png")
    return {
        "backbone": classifier.backbone.name,
        "width": classifier.backbone.width,
        "figures": {
            "top1_video": result.top1_video,
            "top5_video": result.top5_video,
            "top1_clip": result.top1_clip,
            "top5_clip": result.top5_clip,
            "chance_top1": result.chance_top1,
            "chance_top5": result.chance_top5,
        },
        "videos": result.videos,
        "left_out": {**videos.unreadable, **outputs.failures},
        **benchmark.report(),
        "classes": list(classes),
        "confusion": result.confusion.tolist(),
    }


def most_confident_mistakes(predictions: Predictions) -> list[int]:
    """Return the rows whose first class is not the label, those with the highest probability first."""
    best = [row[0] for row in predictions.best(1)]
    wrong = [row for row, (name, _) in enumerate(best) if name != predictions.labels[row]]
    return sorted(wrong, key=lambda row: -best[row][1])


def plot_mistakes(
    rows: list[int], predictions: Predictions, outputs: ClipOutputs, videos: VideoSet, title: str, path: Path
) -> None:
    """Plot the middle frame of the videos of these rows. Without rows, a sheet of an earlier evaluation is deleted."""
    best, cells = predictions.best(1), []
    for row in rows:
        frame = middle_frame(videos, int(outputs.indices[row]))
        if frame is not None:  # else the file has changed since its clips were read
            cells.append((frame, predictions.labels[row], *best[row][0]))
    if cells:
        figures.plot_mistakes(cells, title, path)
    else:
        path.unlink(missing_ok=True)


def accuracy(outputs: ClipOutputs) -> Accuracy:
    """Compute the accuracies of logits: `outputs.values` is (N, TEST_CLIPS, classes)."""
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
