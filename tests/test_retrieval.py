"""Retrieval against numpy, and chance against a count of every possible draw."""

import itertools
import math

import numpy as np
import pytest
import torch

from dclr.evaluation.features import ClipOutputs
from dclr.evaluation.retrieval import chance_of_hit, normalized, retrieval


def outputs(values, labels) -> ClipOutputs:
    """values: (N, clips, D)."""
    return ClipOutputs(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), torch.arange(len(labels)), {})


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
