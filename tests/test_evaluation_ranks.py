"""Evaluation on several ranks: equal to one rank bit for bit, with failed videos, and the end of all if one fails."""

import json
import os
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_list, on_two_ranks

from dclr import distributed, programs
from dclr.commands import evaluate as evaluation
from dclr.commands import ranks
from dclr.config import DataConfig
from dclr.data.datasets import open_catalog, open_data
from dclr.data.videos import VideoSet
from dclr.evaluation import figures, monitor
from dclr.evaluation.activation_maps import maps_of_share
from dclr.evaluation.background import run_on_composites
from dclr.evaluation.composites import CompositeClips
from dclr.evaluation.feature_table import Request, feature_table_of_ranks
from dclr.evaluation.features import mean_of_clips, open_split, run_on_clips
from dclr.evaluation.predictions import predict_videos
from dclr.evaluation.retrieval import retrieval
from dclr.models import Classifier, ClipFormat, build_backbone, load_pretrained, pool, save_classifier
from dclr.training.heartbeat import Heartbeat

CLIPS = ClipFormat(length=4, stride=1, crop=16)
CPU = torch.device("cpu")
FAILED = 3
"""The test video that fails, and that the second of two ranks reads."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training videos and five test videos of three classes."""
    splits = {split: [(f"{split}{number}.mp4", number % 3) for number in range(5)] for split in ("train", "test")}
    return make_list(tmp_path_factory.mktemp("data") / "videos", **splits)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A folder with the classifier of an untrained network of width 4."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    classifier = Classifier(build_backbone("r2plus1d_10", 4), 3)
    save_classifier(classifier, open_catalog(videos).classes, folder / "classifier.safetensors", CLIPS)
    return folder


def settings(videos: Path) -> DataConfig:
    return DataConfig(data=str(videos), clip_length=4, clip_stride=1, crop_size=16, workers=0)


def with_a_failure(videos: VideoSet) -> VideoSet:
    """Delete the file of one video, after all ranks have verified it."""
    if distributed.rank() == 0:
        (videos.root / videos.path(FAILED)).unlink(missing_ok=True)
    distributed.gather_objects(None)
    return videos


def results(run: Path, folder: Path) -> dict[str, Any]:
    """Return what each kind of evaluation gathers on rank 0. The last uses have lost a video."""
    data = settings(folder)
    catalog, pretrained = open_data(data), load_pretrained(run)
    assert pretrained.classifier is not None
    pretrained.classifier.eval()
    backbone = pretrained.backbone
    found: dict[str, Any] = {}
    train, test = (open_split(catalog, split, data) for split in ("train", "test"))
    found["maps"] = distributed.gather_on_rank_zero(maps_of_share({"": backbone}, test, data, "wrap", CPU)[0])
    found["maps"] = [(clip.path, clip.shares, clip.size) for share in found["maps"] for clip in share]
    table = feature_table_of_ranks(Request(catalog, pretrained, data), CPU)
    found["table"] = (table.paths, table.embeddings["pooled"], table.skipped) if table else None
    if distributed.rank() == 1:  # its own statistics, as ranks have in training
        for buffer in backbone.buffers():
            buffer.add_(1)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    found["knn"] = monitor.open_knn(data, CPU)(backbone)
    assert all(torch.equal(before[name], buffer) for name, buffer in backbone.named_buffers())
    if distributed.rank() == 1:
        for buffer in backbone.buffers():
            buffer.sub_(1)

    def features(clip: torch.Tensor) -> torch.Tensor:
        return pool(backbone(clip))

    gallery = run_on_clips(features, train, data, CPU, "", mean_of_clips)
    with_a_failure(test)
    queries = run_on_clips(features, test, data, CPU, "")
    found["test"] = (queries.values, queries.labels, queries.indices, queries.failures)
    if distributed.rank() == 0:
        looked_up = retrieval(gallery, queries)
        found["retrieval"] = (looked_up.nearest, looked_up.similarity, looked_up.recall, looked_up.chance)
    samples = CompositeClips(test, data)
    composites = run_on_composites(features, samples, CPU)
    found["composites"] = (composites.values, composites.failures, samples.shares.copy())
    predicted = predict_videos(pretrained.classifier, pretrained.classes, catalog, data, CPU)
    found["predicted"] = (predicted.paths, predicted.labels, predicted.logits, predicted.skipped)
    return found


def evaluate_accuracy(run: Path, videos: Path, folder: Path) -> None:
    """Do what `eval.py accuracy` does on this rank, without pictures, which take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_confusion_matrix", "plot_mistakes"):
            patch.setattr(figures, name, lambda *_: None)
        flags = {"data": str(videos), "workers": 0, "max_missing": 20.0}
        evaluation.evaluate("accuracy", run, flags, CPU, folder)


def on_a_rank(rank: int, run: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed._BYTES_AT_ONCE = 1000  # so that rows are sent in several messages
    sys.stdout = (folder / f"out{rank}").open("w")
    with ranks.connected_ranks():
        print("printed")
        found = results(run, folder / "videos")
        one = folder / "one"
        alone = run_on_clips(mean_colour, open_split(open_catalog(one), "train", settings(one)), settings(one), CPU, "")
        if rank == 0:
            torch.save(found | {"alone": alone.values}, folder / "found.pt")
        evaluate_accuracy(run, folder / "videos", folder / "accuracy")
    sys.stdout.close()


def mean_colour(clip: torch.Tensor) -> torch.Tensor:
    return clip.mean((2, 3, 4))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[name], theirs[name]) for name in ours)
    return bool(ours == theirs)


def test_two_ranks_give_the_results_of_one_bit_for_bit(run: Path, videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "one" / "train" / "a").mkdir(parents=True)  # fewer videos than ranks
    shutil.copy(next(videos.rglob("*.mp4")), tmp_path / "one" / "train" / "a")
    shutil.copytree(tmp_path / "videos", tmp_path / "again")
    torch.set_num_threads(1)
    expected = results(run, tmp_path / "again")
    assert list(expected["test"][3].values()) == ["no such file"]
    assert on_two_ranks(on_a_rank, run, tmp_path) == [0, 0]
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    one = tmp_path / "one"
    alone = run_on_clips(mean_colour, open_split(open_catalog(one), "train", settings(one)), settings(one), CPU, "")
    expected["alone"] = alone.values
    assert [name for name in expected if not same(found[name], expected[name])] == []

    evaluate_accuracy(run, tmp_path / "again", tmp_path / "alone")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("accuracy", "alone")]
    assert [report.pop("processes") for report in reports] == [2, 1]
    for name in ("figures", "confusion", "left_out", "coverage"):
        assert reports[0][name] == reports[1][name]
    tables = [(tmp_path / name / "predictions.csv").read_text() for name in ("accuracy", "alone")]
    assert tables[0] == tables[1]
    assert "printed" in (tmp_path / "out0").read_text()
    assert (tmp_path / "out1").read_text() == ""


def until_failure(rank: int, folder: Path, videos: Path, failure: str) -> None:
    """Run a network that fails on rank 1."""
    sys.stderr = (folder / f"err{rank}").open("w", buffering=1)
    programs.run_as("eval")
    ranks.Heartbeat = partial(Heartbeat, interval=0.1, timeout=1.0)  # type: ignore[misc,assignment]

    def network(clip: torch.Tensor) -> torch.Tensor:
        if distributed.rank() == 1 and failure == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return mean_colour(clip) * (torch.nan if distributed.rank() == 1 else 1)

    with ranks.connected_ranks():
        run_on_clips(network, open_split(open_catalog(videos), "test", settings(videos)), settings(videos), CPU, "")


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        ("killed", 1, r"rank 1 has failed: process \d+ on .*; repeat the command"),
        ("refused", 2, "the network's output for test.* is not finite or above 1e\\+15"),
    ],
)
def test_a_failed_rank_ends_the_evaluation_with_one_line(
    videos: Path, tmp_path: Path, failure: str, status: int, message: str
) -> None:
    assert on_two_ranks(until_failure, tmp_path, videos, failure)[0] == status
    (line,) = [line for line in (tmp_path / "err0").read_text().splitlines() if "error" in line]
    assert re.match(f"eval.py: error: {message}", line)
