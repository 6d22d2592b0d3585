"""What eval.py does with a checkpoint: run a protocol, print its table, draw its pictures, return what report.json holds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr.config import DataConfig, ModelConfig
from dclr.data.catalog import Catalog
from dclr.data.datasets import open_data
from dclr.data.decode import rgb_of
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.evaluation import features, figures
from dclr.models import Backbone, build_backbone, load_backbone, load_classifier, pool

SHEET_QUERIES, SHEET_NEAREST = 8, 5


def measure_accuracy(checkpoint: Path, data: DataConfig, device: torch.device, folder: Path) -> dict[str, Any]:
    """Raises UserError: see load_classifier and open_catalog; classes that are not the classifier's."""
    classifier, classes = load_classifier(checkpoint)
    catalog = open_data(data)
    check_classes(checkpoint, classes, catalog)
    videos = open_videos(catalog, "test", max(1, data.workers), timeout=data.video_timeout)
    network = classifier.to(device).eval()
    outputs = features.run_on_clips(network, videos, data, device, "accuracy")
    result = features.accuracy(outputs)

    print(f"\n{checkpoint} on {catalog.root}, {result.videos} test videos, {features.TEST_CLIPS} clips each")
    print(f"{'':14}{'top-1':>8}{'top-5':>8}")
    for name, top1, top5 in (
        ("by video", result.top1_video, result.top5_video),
        ("by clip", result.top1_clip, result.top5_clip),
        ("chance", result.chance_top1, result.chance_top5),
    ):
        print(f"{name:14}{top1:8.1%}{top5:8.1%}")
    title = f"{checkpoint}: top-1 by video {result.top1_video:.1%} of {result.videos} (chance {result.chance_top1:.1%})"
    figures.confusion_matrix(result.confusion, classes, title, folder / "confusion.png")
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
        "classes": list(classes),
        "confusion": result.confusion.tolist(),
    }


def measure_retrieval(
    checkpoint: Path, data: DataConfig, model: ModelConfig, seed: int, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Raises UserError: see load_backbone and open_catalog; a data set without labels."""
    backbone, loaded = load_features(checkpoint, model, seed)
    catalog = open_data(data)
    gallery_videos, query_videos = open_labelled(catalog, data, "retrieval")
    backbone.to(device).eval()
    gallery, queries = (
        features.run_on_clips(lambda clip: pool(backbone(clip)), videos, data, device, title)
        for videos, title in ((gallery_videos, "gallery"), (query_videos, "queries"))
    )
    result = features.retrieval(gallery, queries)

    print(
        f"\n{loaded}\non {catalog.root}: {len(queries.labels)} test videos looked up among {len(gallery.labels)} train videos"
    )
    print("".join([f"{'':10}", *(f"{f'R@{k}':>8}" for k in result.recall)]))
    print("".join([f"{'retrieval':10}", *(f"{value:8.1%}" for value in result.recall.values())]))
    print("".join([f"{'chance':10}", *(f"{value:8.1%}" for value in result.chance.values())]))
    draw_sheet(
        result,
        gallery,
        queries,
        gallery_videos,
        query_videos,
        f"{loaded}: R@1 {result.recall[1]:.1%}",
        folder / "retrieval.png",
    )
    return {
        "weights": loaded,
        "backbone": model.backbone,
        "width": model.width,
        "figures": {
            **{f"recall_at_{k}": value for k, value in result.recall.items()},
            **{f"chance_at_{k}": value for k, value in result.chance.items()},
        },
        "gallery": len(gallery.labels),
        "queries": len(queries.labels),
        "left_out": {**gallery_videos.unreadable, **query_videos.unreadable, **gallery.failures, **queries.failures},
    }


def load_features(checkpoint: Path, model: ModelConfig, seed: int) -> tuple[Backbone, str]:
    """A checkpoint's backbone, or an untrained one for the word random, and one line that says which.

    Raises UserError: see load_backbone.
    """
    torch.manual_seed(seed)
    backbone = build_backbone(model.backbone, model.width)
    if str(checkpoint) == "random":
        return backbone, f"random weights of {model.backbone} (width {model.width}), seed {seed}"
    return backbone, load_backbone(checkpoint, backbone)


def open_labelled(catalog: Catalog, data: DataConfig, command: str) -> tuple[VideoSet, VideoSet]:
    """The train and the test split. Raises UserError: see open_videos; videos without labels."""
    train, test = (
        open_videos(catalog, split, max(1, data.workers), timeout=data.video_timeout) for split in ("train", "test")
    )
    if any((videos.labels < 0).any() for videos in (train, test)):
        raise UserError(f"--data {catalog.root}: its videos have no labels, which {command} needs; use class folders")
    return train, test


def check_classes(checkpoint: Path, classes: tuple[str, ...], catalog: Catalog) -> None:
    """Raises UserError: the classes that a classifier knows are not the data set's."""
    if catalog.classes != classes:
        odd = sorted(set(catalog.classes) ^ set(classes))
        raise UserError(
            f"--checkpoint {checkpoint} knows {len(classes)} classes and {catalog.root} has {len(catalog.classes)}; "
            f"they must be the same ({', '.join(odd[:3]) or 'their order differs'})"
        )


def draw_sheet(
    result: features.Retrieval,
    gallery: features.ClipOutputs,
    queries: features.ClipOutputs,
    gallery_videos: VideoSet,
    query_videos: VideoSet,
    title: str,
    path: Path,
) -> None:
    """Queries spread evenly over the test split, so over its classes, each with its nearest train videos."""
    classes = gallery_videos.classes
    count = len(queries.labels)
    rows = []
    for row in sorted({round(i * (count - 1) / max(SHEET_QUERIES - 1, 1)) for i in range(SHEET_QUERIES)}):
        label = int(queries.labels[row])
        nearest = [
            (
                middle_frame(gallery_videos, int(gallery.indices[g])),
                f"{classes[gallery.labels[g]]} {similarity:.2f}",
                int(gallery.labels[g]) == label,
            )
            for g, similarity in zip(result.nearest[row][:SHEET_NEAREST], result.similarity[row], strict=False)
        ]
        rows.append(((middle_frame(query_videos, int(queries.indices[row])), f"query: {classes[label]}"), nearest))
    figures.retrieval_sheet(rows, title, path)


def middle_frame(videos: VideoSet, index: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    return rgb_of(videos.read(index, np.array([videos.frames[index] // 2])))[0]
