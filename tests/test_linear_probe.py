"""The linear probe: its optimality conditions in numpy, and a case that can be solved by hand."""

import numpy as np
import pytest
import torch

from dclr.evaluation import linear_probe as module
from dclr.evaluation.linear_probe import fit_probe


def clusters(videos: int, dim: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features with overlapping classes, whose scales differ by up to 1000 times, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, videos)
    features = rng.normal(size=(classes, dim))[labels] + rng.normal(size=(videos, dim))
    return features * np.geomspace(0.1, 100, dim) + 7, labels


def fit(features, labels, classes):
    return fit_probe(torch.tensor(features), torch.tensor(labels), classes)


def test_the_gradient_of_the_loss_is_zero_at_the_fitted_probe():
    """The loss sum(cross entropy) + |W|^2 / 2 has the gradient (p - y)^T x + W, and sum(p - y) for the biases."""
    features, labels = clusters(60, 9, 4, seed=0)
    probe = fit(features, labels, 4)
    x = (features - features.mean(0)) / features.std(0)
    logits = x @ probe.weight.numpy().T + probe.bias.numpy()
    assert np.allclose(logits, probe.logits(torch.tensor(features)).numpy(), atol=1e-12)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = chances - np.eye(4)[labels]
    assert np.abs(error.T @ x + probe.weight.numpy()).max() < 60 * 1e-6
    assert np.abs(error.sum(0)).max() < 60 * 1e-6
    assert probe.converged
    assert np.abs(probe.weight.numpy()).max() > 0.1  # and the probe learned something


def test_two_classes_on_one_feature_give_the_weight_found_by_bisection():
    """Class 0 has n videos at x = -1, class 1 has n at +1. By symmetry the weights are -w and w.

    A zero gradient means w = 2 n / (1 + exp(2 w)).
    """
    n = 5
    probe = fit(np.repeat([[3.0], [9.0]], n, axis=0), np.repeat([0, 1], n), 2)  # -1 and 1 when standardised
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 2 * n / (1 + np.exp(2 * middle)) else (low, middle)
    assert probe.weight.flatten().tolist() == pytest.approx([-low, low], abs=1e-5)
    assert probe.bias[0].item() == pytest.approx(probe.bias[1].item(), abs=1e-5)


def test_the_scale_of_features_does_not_matter_and_a_constant_feature_is_ignored():
    features, labels = clusters(50, 6, 3, seed=1)
    test, _ = clusters(40, 6, 3, seed=2)
    plain = fit(features, labels, 3).logits(torch.tensor(test))
    scale, shift = np.array([1e-3, 1e3, 2, 5, 1, 0.1]), np.arange(6)
    rescaled = fit(features * scale + shift, labels, 3).logits(torch.tensor(test * scale + shift))
    assert torch.allclose(plain, rescaled, atol=1e-4)
    constant = fit(np.hstack([features, np.full((50, 1), 4.2)]), labels, 3)
    assert torch.allclose(plain, constant.logits(torch.tensor(np.hstack([test, np.full((40, 1), 4.2)]))), atol=1e-4)


def test_the_same_features_give_the_same_bits_also_from_float32():
    features, labels = clusters(50, 6, 3, seed=3)
    features = torch.tensor(features, dtype=torch.float32)
    first, second = (fit_probe(features, torch.tensor(labels), 3) for _ in range(2))
    assert first.weight.dtype == torch.float64
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_a_class_without_a_video_is_never_predicted():
    features, labels = clusters(50, 6, 3, seed=4)
    logits = fit(features, labels, 5).logits(torch.tensor(features))
    assert logits.shape == (50, 5)
    assert logits.argmax(1).max() <= 2


def test_separable_classes_converge_and_too_few_steps_are_reported(monkeypatch):
    """Without the penalty the weights of separable classes would grow without limit."""
    features = np.random.default_rng(5).normal(size=(30, 100))
    labels = np.arange(30) % 3
    probe = fit(features, labels, 3)
    assert probe.converged
    assert probe.logits(torch.tensor(features)).argmax(1).tolist() == labels.tolist()
    assert 2 < probe.steps < module.MAX_STEPS
    monkeypatch.setattr(module, "MAX_STEPS", 2)
    cut = fit(features, labels, 3)
    assert (cut.converged, cut.steps) == (False, 2)
