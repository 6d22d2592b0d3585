"""Accuracy of a finetuned or linear classifier on the test split, by video and by clip: `eval.py accuracy`.

The prediction for a video is the class with the highest mean of the logits over its test clips.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr.config import DataConfig
from dclr.data.datasets import open_data
from dclr.errors import UserError
from dclr.evaluation import figures
from dclr.evaluation.benchmark import Benchmark
from dclr.evaluation.features import ClipOutputs, check_classes, open_split, run_on_clips
from dclr.models import count_correct, load_classifier


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
    """Compute a classifier's accuracies on the test split. Return the entries of report.json.

    Prints a table and writes confusion.png to `folder`.

    Raises:
        UserError: see load_classifier, open_data, open_videos and Benchmark. The data set has other classes than the
            classifier, or a test video without a label.
    """
    classifier, classes = load_classifier(checkpoint)
    catalog = open_data(data)
    check_classes(checkpoint, classes, catalog)
    videos = open_split(catalog, "test", data)
    if (videos.labels < 0).any():
        raise UserError(f"--data {catalog.root}: some test videos have no label, which accuracy needs")
    benchmark = Benchmark(catalog, data, test=videos)
    outputs = run_on_clips(classifier.to(device).eval(), videos, data, device, "accuracy")
    benchmark.add_failures(outputs.failures)
    result = accuracy(outputs)

    clips = outputs.values.shape[1]
    print(f"\n{checkpoint} on {catalog.root}, {result.videos} test videos, {clips} clips each")
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
    figures.plot_confusion_matrix(result.confusion, classes, title, folder / "confusion.png")
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
