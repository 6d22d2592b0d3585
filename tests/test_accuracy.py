"""Accuracy against numbers counted by hand and in numpy."""

import numpy as np
import pytest
import torch

from dclr.evaluation.accuracy import accuracy
from dclr.evaluation.features import ClipOutputs


def outputs(values, labels) -> ClipOutputs:
    """Return the outputs of N videos. `values`: (N, clips, D)."""
    return ClipOutputs(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), torch.arange(len(labels)), {})


def test_accuracy_of_four_videos_counted_by_hand():
    """Two clips per video, three classes. The clips of video 1 disagree, and the mean follows the wrong clip."""
    result = accuracy(
        outputs(
            [
                [[9, 0, 0], [9, 0, 0]],  # class 0, both clips right
                [[1, 0, 0], [0, 0, 9]],  # class 0, one clip right, predicted as class 2
                [[0, 5, 0], [1, 0, 0]],  # class 1, one clip right, the video right
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
