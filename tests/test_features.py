"""The protocols against figures counted by hand, in numpy, or by trying every order."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dclr.config import DataConfig
from dclr.data.catalog import open_catalog
from dclr.data.samples import TEST_CLIPS
from dclr.data.videos import open_videos
from dclr.errors import UserError
from dclr.evaluation.features import ClipOutputs, accuracy, chance_of_hit, normalized, retrieval, run_on_clips


def outputs(values, labels) -> ClipOutputs:
    """values: (N, clips, D)."""
    return ClipOutputs(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), torch.arange(len(labels)), {})


def test_accuracy_of_four_videos_counted_by_hand():
    """Two clips a video, three classes. Video 1's clips disagree, and their mean follows the surer one, which is wrong."""
    result = accuracy(
        outputs(
            [
                [[9, 0, 0], [9, 0, 0]],  # class 0, both clips right
                [[1, 0, 0], [0, 0, 9]],  # class 0, one clip right, by video 2
                [[0, 5, 0], [1, 0, 0]],  # class 1, one clip right, by video right
                [[0, 1, 0], [0, 1, 0]],  # class 2, never right
            ],
            [0, 0, 1, 2],
        )
    )
    assert (result.top1_video, result.top1_clip, result.videos) == (2 / 4, 4 / 8, 4)
    assert (result.top5_video, result.top5_clip, result.chance_top5) == (1, 1, 1)  # of three classes, five guesses hit
    assert result.chance_top1 == 1 / 3
    assert result.confusion.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]  # true by predicted


def test_accuracy_agrees_with_numpy_on_random_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 10, 12)), rng.integers(0, 12, 60)
    result = accuracy(outputs(logits, labels))

    def top(scores, truth, k):
        return np.mean([label in np.argsort(-row)[:k] for row, label in zip(scores, truth, strict=True)])

    video, clip, clip_labels = logits.mean(1), logits.reshape(600, 12), np.repeat(labels, 10)
    assert result.top1_video == pytest.approx(top(video, labels, 1))
    assert result.top5_video == pytest.approx(top(video, labels, 5))
    assert result.top1_clip == pytest.approx(top(clip, clip_labels, 1))
    assert result.top5_clip == pytest.approx(top(clip, clip_labels, 5))
    assert (result.chance_top1, result.chance_top5) == (1 / 12, 5 / 12)
    assert len({result.top1_video, result.top5_video, result.top1_clip, result.top5_clip}) == 4
    expected = np.zeros((12, 12), int)
    for truth, guess in zip(labels, video.argmax(1), strict=True):
        expected[truth, guess] += 1
    assert np.array_equal(result.confusion, expected)


def test_retrieval_agrees_with_numpy_on_random_features():
    rng = np.random.default_rng(1)
    gallery, queries = rng.normal(2, 1, (30, 4, 8)), rng.normal(-1, 1, (12, 4, 8))
    gallery_labels, query_labels = rng.integers(0, 6, 30), rng.integers(0, 6, 12)
    result = retrieval(outputs(gallery, gallery_labels), outputs(queries, query_labels))

    def unit(features):
        mean = features.mean(1)
        mean = mean - mean.mean(0)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    cosines = unit(queries) @ unit(gallery).T
    nearest = np.argsort(-cosines, axis=1)
    assert np.array_equal(result.nearest, nearest)
    assert np.allclose(result.similarity, np.take_along_axis(cosines, nearest, 1), atol=1e-6)
    assert list(result.recall) == list(result.chance) == [1, 5, 10, 20]  # 50 of 30 would mean nothing
    for k in result.recall:
        hits = [label in gallery_labels[row[:k]] for row, label in zip(nearest, query_labels, strict=True)]
        assert result.recall[k] == pytest.approx(np.mean(hits))
    assert 0 < result.recall[1] < result.recall[5] < 1


def test_each_split_loses_its_own_mean():
    """Features that a constant shifts, by another one in each split, retrieve as before."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(9, 2, 5))
    found = normalized(outputs(features, range(9)))
    assert torch.allclose(found, normalized(outputs(features + 100, range(9))), atol=1e-4)
    assert torch.allclose(found.norm(dim=1), torch.ones(9))
    result = retrieval(outputs(features + 100, range(9)), outputs(features - 7, range(9)))
    assert result.nearest[:, 0].tolist() == list(range(9))
    assert result.recall[1] == 1


@pytest.mark.parametrize(("of_class", "gallery"), [(0, 5), (1, 5), (2, 6), (3, 7), (5, 5)])
def test_chance_is_the_share_of_all_draws_that_hold_one_of_the_class(of_class, gallery):
    for k in range(1, gallery + 1):
        draws = list(itertools.combinations(range(gallery), k))
        share = sum(any(video < of_class for video in draw) for draw in draws) / len(draws)
        assert chance_of_hit(of_class, gallery, k) == pytest.approx(share, abs=1e-12)


def test_chance_averages_over_queries_of_classes_that_differ_in_size():
    """A gallery of 4: three of class 0, one of class 1; queries of class 0, 1 and 2, which the gallery lacks."""
    features = np.random.default_rng(3).normal(size=(7, 1, 4))
    result = retrieval(outputs(features[:4], [0, 0, 0, 1]), outputs(features[4:], [0, 1, 2]))
    assert result.chance == {1: pytest.approx((3 / 4 + 1 / 4 + 0) / 3)}
    big = math.comb(9537, 50)  # UCF101's gallery: exact integers, no overflow
    assert chance_of_hit(94, 9537, 50) == pytest.approx(1 - math.comb(9537 - 94, 50) / big)


# ---------------------------------------------------------------- running a network over the test clips


@pytest.fixture
def spoiled(demo_videos: Path, tmp_path: Path):
    """The 8 test videos, whose folder a test may spoil."""
    shutil.copytree(demo_videos, tmp_path / "data")
    return open_videos(open_catalog(tmp_path / "data"), "test", workers=1, progress=False)


CONFIG = DataConfig(clip_length=4, crop_size=32, workers=0)
CPU = torch.device("cpu")


def mean_colour(clip: torch.Tensor) -> torch.Tensor:
    return clip.mean((2, 3, 4))


def test_outputs_stand_in_the_order_of_the_videos_ten_clips_each(spoiled):
    found = run_on_clips(mean_colour, spoiled, CONFIG, CPU, "test")
    assert found.values.shape == (8, TEST_CLIPS, 3)
    assert found.labels.tolist() == spoiled.labels.tolist()
    assert found.indices.tolist() == list(range(8))
    assert found.failures == {}
    assert found.values.isfinite().all()
    assert len({tuple(row) for row in found.values[:, 0].tolist()}) == 8
    in_workers = run_on_clips(mean_colour, spoiled, DataConfig(clip_length=4, crop_size=32, workers=2), CPU, "test")
    assert torch.equal(in_workers.values, found.values)


def test_videos_that_fail_are_left_out_of_the_figures_and_named(spoiled, capsys):
    whole = run_on_clips(mean_colour, spoiled, CONFIG, CPU, "test")
    gone = (2, 6, 7)
    for index in gone:
        (spoiled.root / spoiled.path(index)).unlink()
    found = run_on_clips(mean_colour, spoiled, CONFIG, CPU, "test")
    kept = [index for index in range(8) if index not in gone]
    assert found.indices.tolist() == kept
    assert torch.equal(found.values, whole.values[kept])
    assert found.labels.tolist() == spoiled.labels[kept].tolist()
    assert found.failures == {spoiled.path(index): "no such file" for index in gone}
    said = capsys.readouterr().err
    assert "it is left out of the figures" in said
    assert "next video" not in said


def test_a_split_of_which_nothing_is_left_is_refused(spoiled):
    shutil.rmtree(spoiled.root)
    with pytest.raises(UserError, match="not one of 8 videos can be read any more"):
        run_on_clips(mean_colour, spoiled, CONFIG, CPU, "test")
