"""kernels/info_nce.py against float64 numpy written out row by row."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import info_nce, mine_positives

EPS = float(np.finfo(np.float32).eps)
EPS_BF16 = 2.0**-7  # spacing of bfloat16 at 1

# (P, B, K, D, M, temperature), and why it is there
CASES = [
    pytest.param(1, 1, 1, 32, 0, 0.07, id="everything one, no positives"),
    pytest.param(2, 1, 7, 32, 3, 0.07, id="batch of one"),
    pytest.param(2, 3, 1, 32, 1, 0.07, id="queue of one row, which is a positive: the loss is 0"),
    pytest.param(3, 5, 37, 64, 4, 0.07, id="ragged: nothing divides anything"),
    pytest.param(5, 40, 2048, 128, 5, 0.07, id="production: UCF101"),
    pytest.param(2, 6, 50, 128, 5, 0.01, id="extreme temperature: exp(100) overflows float32"),
    pytest.param(2, 6, 50, 256, 5, 1.0, id="mild temperature: nearly uniform"),
]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def case(P: int, B: int, K: int, D: int, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries near their keys (as trained ones are), random queue, random positives with a repeat and a missing one."""
    keys = unit(P, B, D, seed=1)
    queries = F.normalize(keys + unit(P, B, D, seed=2), dim=-1)
    queue = unit(P, K, D, seed=3)
    if M == 0:
        return queries, keys, queue, None
    positives = torch.randint(0, K, (P, B, M), generator=torch.Generator().manual_seed(4))
    if M > 2:
        positives[:, 0, 1] = positives[:, 0, 0]
        positives[:, -1, 2] = -1
    return queries, keys, queue, positives


def oracle(
    queries: Tensor, keys: Tensor, queue: Tensor, positives: Tensor | None, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (P,) and their gradient (P, B, D) with respect to the queries, one row of softmax probabilities at a time.

    With p the softmax over key and queue and r the same restricted to the positives and normalised there,
    d loss_i / d q_i = (sum_j p_j x_j - sum_j r_j x_j) / temperature.
    """
    q, k, z = (t.double().numpy() for t in (queries, keys, queue))
    P, B, D = q.shape
    losses, gradient = np.zeros(P), np.zeros((P, B, D))
    for p in range(P):
        for i in range(B):
            rows = np.vstack([k[p, i], z[p]])
            logits = rows @ q[p, i] / temperature
            weights = np.exp(logits - logits.max())
            probabilities = weights / weights.sum()
            chosen = {0}
            if positives is not None:
                chosen |= {1 + int(j) for j in positives[p, i] if j >= 0}
            share = np.array([probabilities[j] if j in chosen else 0.0 for j in range(len(rows))])
            losses[p] += -np.log(share.sum()) / B
            gradient[p, i] = rows.T @ (probabilities - share / share.sum()) / temperature / B
    return losses, gradient


@pytest.mark.parametrize(("P", "B", "K", "D", "M", "temperature"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradient(P: int, B: int, K: int, D: int, M: int, temperature: float, dtype: torch.dtype) -> None:
    queries, keys, queue, positives = case(P, B, K, D, M)
    queries, keys, queue = (t.to(dtype) for t in (queries, keys, queue))
    expected, expected_gradient = oracle(queries, keys, queue, positives, temperature)

    queries.requires_grad_()
    losses = info_nce(queries, keys, queue, positives, temperature)
    scale = torch.arange(1.0, P + 1)  # a different upstream gradient for each pair
    (losses * scale).sum().backward()
    assert queries.grad is not None

    # A logit is at most 1 / temperature, so its float32 rounding is EPS / temperature; four of them meet in a loss.
    assert losses.dtype == torch.float32
    rounding = 4 * EPS / min(temperature, 1)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=0, atol=rounding)

    # A probability's relative error is its logit's absolute one; the gradient then rounds to the queries' dtype.
    expected_gradient *= scale.numpy()[:, None, None]
    tolerance = P * rounding / temperature / B
    if dtype == torch.bfloat16:
        tolerance += EPS_BF16 * np.abs(expected_gradient).max()
    np.testing.assert_allclose(queries.grad.double().numpy(), expected_gradient, rtol=0, atol=tolerance)


def test_without_positives_it_is_cross_entropy() -> None:
    queries, keys, queue, _ = case(2, 4, 9, 32, 0)
    losses = info_nce(queries, keys, queue)
    for p in range(2):
        logits = torch.cat([(queries[p] * keys[p]).sum(1, keepdim=True), queries[p] @ queue[p].T], dim=1) / 0.07
        torch.testing.assert_close(losses[p], F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)))


def test_repeated_row_counts_once_and_negative_row_not_at_all() -> None:
    queries, keys, queue, _ = case(1, 2, 6, 32, 0)
    plain = info_nce(queries, keys, queue, torch.tensor([[[2, 5], [3, 0]]]))
    repeated = info_nce(queries, keys, queue, torch.tensor([[[2, 5, 2, 5, 2], [3, 0, 0, -1, -7]]]))
    assert torch.equal(plain, repeated)
    none = info_nce(queries, keys, queue)
    assert torch.equal(none, info_nce(queries, keys, queue, torch.full((1, 2, 3), -1)))
    assert torch.equal(none, info_nce(queries, keys, queue, torch.empty(1, 2, 0, dtype=torch.int64)))
    assert plain < none


def test_gradient_flows_to_queries_only() -> None:
    queries, keys, queue, positives = case(2, 3, 5, 32, 2)
    for tensor in (queries, keys, queue):
        tensor.requires_grad_()
    info_nce(queries, keys, queue, positives).sum().backward()
    assert queries.grad is not None
    assert queries.grad.abs().max() > 0
    assert keys.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enqueue_before_backward(dtype: torch.dtype) -> None:
    queries, keys, queue, positives = case(2, 3, 8, 32, 2)
    queries, keys, queue = (t.to(dtype) for t in (queries, keys, queue))

    before = queries.clone().requires_grad_()
    info_nce(before, keys, queue, positives).sum().backward()

    after = queries.clone().requires_grad_()
    losses = info_nce(after, keys, queue, positives)
    queue[:, :3] = keys
    losses.sum().backward()

    assert before.grad is not None
    assert after.grad is not None
    assert torch.equal(before.grad, after.grad)


def test_float32_under_autocast() -> None:
    queries, keys, queue, positives = case(2, 4, 33, 64, 3)
    queries.requires_grad_()
    expected = info_nce(queries, keys, queue, positives)
    many = unit(2048, 64, seed=7)  # so many that rounding to bfloat16 changes their order
    rows = mine_positives(queries[0], many, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (queries @ queue.transpose(1, 2)).dtype == torch.bfloat16  # autocast is on and would round
        assert torch.equal(info_nce(queries, keys, queue, positives), expected)
        assert torch.equal(mine_positives(queries[0], many, 20), rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(2, 3, 8, dtype=torch.float64)}, TypeError, "queries must be float32 or bfloat16"),
        ({"keys": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "keys must be float32 or bfloat16"),
        ({"queue": torch.zeros(2, 4, 8, dtype=torch.float16)}, TypeError, "queue must be float32 or bfloat16"),
        ({"queries": torch.zeros(3, 8)}, ValueError, r"queries must be \(P, B, D\)"),
        ({"keys": torch.zeros(2, 1, 8)}, ValueError, r"keys must be \(2, 3, 8\)"),
        ({"queue": torch.zeros(1, 4, 8)}, ValueError, r"queue must be \(2, K, 8\)"),
        ({"queue": torch.zeros(2, 4, 9)}, ValueError, r"queue must be \(2, K, 8\)"),
        ({"queue": torch.zeros(2, 0, 8)}, ValueError, "queue must be .* not empty"),
        ({"positives": torch.zeros(2, 3, 1)}, TypeError, "positives must be int64"),
        ({"positives": torch.zeros(2, 1, 1, dtype=torch.int64)}, ValueError, r"positives must be \(2, 3, M\)"),
        ({"positives": torch.full((2, 3, 1), 4)}, ValueError, "positives names row 4, but queue has rows 0 to 3"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be greater than 0"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    arguments: dict = {"queries": torch.zeros(2, 3, 8), "keys": torch.zeros(2, 3, 8), "queue": torch.zeros(2, 4, 8)}
    info_nce(**arguments)  # fits before the change
    with pytest.raises(error, match=message):
        info_nce(**{**arguments, **change})


@pytest.mark.parametrize(
    ("S", "B", "K", "m"),
    [
        pytest.param(1, 1, 1, 1, id="everything one"),
        pytest.param(1, 5, 33, 33, id="all rows"),
        pytest.param(1, 40, 2048, 5, id="production: one similarity"),
        pytest.param(2, 40, 2048, 5, id="production: the vv pair"),
        pytest.param(3, 4, 17, 0, id="none wanted"),
    ],
)
def test_mine_positives(S: int, B: int, K: int, m: int) -> None:
    features, queue = unit(S, B, 64, seed=5), unit(S, K, 64, seed=6)
    rows = mine_positives(features, queue, m) if S > 1 else mine_positives(features[0], queue[0], m)

    total = np.zeros((B, K))
    for f, z in zip(features.double().numpy(), queue.double().numpy(), strict=True):
        weights = np.exp(f @ z.T)
        total += weights / weights.sum(axis=1, keepdims=True)
    assert rows.dtype == torch.int64
    assert rows.shape == (B, m)
    np.testing.assert_array_equal(rows.numpy(), np.argsort(-total, axis=1)[:, :m])


def test_mine_positives_sums_softmaxes_not_similarities() -> None:
    """A row that one similarity likes very much beats one both like: true of sums of exponentials, not of sums."""
    features = torch.tensor([[[1.0, 0, 0]], [[1.0, 0, 0]]])  # (S=2, B=1, D)
    first = torch.tensor([[0.99, 0, 0], [0.5, 0, 0], [0.0, 1, 0]])  # similarity of rows 0, 1, 2: 0.99, 0.50, 0
    second = torch.tensor([[0.0, 1, 0], [0.5, 0, 0], [0.0, 1, 0]])  # 0, 0.50, 0
    assert mine_positives(features, torch.stack([first, second]), 2).tolist() == [[0, 1]]


def test_mine_positives_has_no_gradient() -> None:
    features = unit(3, 32).requires_grad_()
    assert not mine_positives(features, unit(9, 32, seed=1), 2).requires_grad


@pytest.mark.parametrize(
    ("features", "queue", "m", "error", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 8), 5, ValueError, "m must be between 0 and the 4 rows of queue, not 5"),
        (torch.zeros(2, 8), torch.zeros(4, 8), -1, ValueError, "m must be between"),
        (torch.zeros(8), torch.zeros(4, 8), 1, ValueError, "features must be"),
        (torch.zeros(2, 8), torch.zeros(4, 9), 1, ValueError, r"queue must be \(K, 8\)"),
        (torch.zeros(2, 2, 8), torch.zeros(3, 4, 8), 1, ValueError, r"queue must be \(2, K, 8\)"),
        (torch.zeros(2, 8), torch.zeros(2, 4, 8), 1, ValueError, r"queue must be \(K, 8\)"),
        (torch.zeros(2, 8).double(), torch.zeros(4, 8), 1, TypeError, "features must be float32 or bfloat16"),
        (torch.zeros(2, 8), torch.zeros(4, 8).double(), 1, TypeError, "queue must be float32 or bfloat16"),
    ],
)
def test_mine_positives_errors(features: Tensor, queue: Tensor, m: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mine_positives(features, queue, m)
