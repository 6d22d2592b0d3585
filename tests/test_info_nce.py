"""The reference and the Triton kernels of kernels/info_nce.py, compared with a float64 NumPy oracle.

On a CPU the kernels run in Triton's interpreter. On a GPU (`-m gpu`) the same tests run the compiled kernels, in
float32 and in tf32.
"""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dclr import kernels
from dclr.kernels import backend, contrast, info_nce, mine_positives

EPS = float(np.finfo(np.float32).eps)
EPS_BF16 = 2.0**-7  # spacing of bfloat16 at 1

COMPILER = "inductor" if shutil.which("g++") else "aot_eager"  # inductor writes C++ for a CPU

# (P, B, K, D, M, temperature); the id says why the case is here
CASES = [
    pytest.param(1, 1, 1, 32, 0, 0.07, id="all sizes 1, no positives"),
    pytest.param(2, 1, 7, 32, 3, 0.07, id="batch of one"),
    pytest.param(2, 3, 1, 32, 1, 0.07, id="queue of one entry, which is a positive: the loss is 0"),
    pytest.param(3, 5, 37, 64, 4, 0.07, id="ragged: no size divides another"),
    pytest.param(5, 40, 2048, 128, 5, 0.07, id="production: UCF101"),
    pytest.param(2, 6, 50, 128, 5, 0.01, id="extreme temperature: exp(100) overflows float32"),
    pytest.param(2, 6, 50, 256, 5, 1.0, id="mild temperature: nearly uniform"),
]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def case(P: int, B: int, K: int, D: int, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return queries near their keys, like trained ones, a random queue, and random positives.

    One positive is repeated and one is missing.
    """
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
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    positives: Tensor | None,
    temperature: float,
    logit_scale: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return losses (P,) and their gradient (P, B, D) with respect to the queries, computed query by query.

    p is the softmax over key and queue. r is p restricted to the positives and normalised there. Then
    d loss_i / d q_i = (sum_j p_j x_j - sum_j r_j x_j) / temperature. A logit scale multiplies the queue entries.
    """
    q, k, z = (t.double().numpy() for t in (queries, keys, queue))
    if logit_scale is not None:
        z = z * logit_scale.double().numpy()[:, None]
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


def eager_and_compiled(cases: list[Any], compiled: tuple[str, ...]) -> list[Any]:
    """Return all cases for eager mode, and those whose id begins with a word of `compiled` for torch.compile too.

    The value for the fixture `run` comes first. Compiled code calls the same op, so a few shapes are enough.
    """
    chosen = [("compiled", case) for case in cases if str(case.id).startswith(compiled)]
    pairs = [*(("eager", case) for case in cases), *chosen]
    return [pytest.param(mode, *case.values, id=f"{mode}-{case.id}") for mode, case in pairs]


@pytest.fixture(params=["eager", "compiled"])
def run(request: pytest.FixtureRequest, device: torch.device) -> Callable[[Callable], Callable]:
    """Return a function that leaves another function eager or compiles it with torch.compile in one graph.

    The op is opaque to the compiler. On a CPU a compiler that only traces is therefore enough. `test_inductor` uses the
    full compiler.
    """
    if request.param == "eager":
        return lambda function: function
    torch.compiler.reset()
    return lambda function: torch.compile(
        function, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"
    )


@pytest.mark.parametrize(
    ("run", "P", "B", "K", "D", "M", "temperature"), eager_and_compiled(CASES, ("all", "ragged")), indirect=["run"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_similarities_and_gradient(
    P: int, B: int, K: int, D: int, M: int, temperature: float, dtype: torch.dtype, device: torch.device, run: Callable
) -> None:
    queries, keys, queue, positives = case(P, B, K, D, M)
    queries, keys, queue = (t.to(dtype) for t in (queries, keys, queue))
    expected, expected_gradient = oracle(queries, keys, queue, positives, temperature)

    leaf, *others = (None if t is None else t.to(device, copy=True) for t in (queries, keys, queue, positives))
    for tensor in (leaf, *others[:2]):
        tensor.requires_grad_()
    found = run(contrast)(leaf, *others, temperature)
    scale = torch.arange(1.0, P + 1)  # a different upstream gradient for each pair
    (found.losses * scale.to(device)).sum().backward()

    # A logit is at most 1 / temperature, so its float32 rounding error is EPS / temperature. A loss has four of them.
    assert found.losses.dtype == torch.float32
    rounding = 4 * EPS / min(temperature, 1)
    np.testing.assert_allclose(found.losses.detach().cpu().numpy(), expected, rtol=0, atol=rounding)

    assert not found.positive.requires_grad
    assert not found.hardest.requires_grad
    q, k, z = (t.double().numpy() for t in (queries, keys, queue))
    for p in range(P):
        positive = np.mean([q[p, i] @ k[p, i] for i in range(B)])
        hardest = np.mean([(z[p] @ q[p, i]).max() for i in range(B)])
        assert abs(float(found.positive[p]) - positive) < 4 * EPS
        assert abs(float(found.hardest[p]) - hardest) < 4 * EPS

    # The relative error of a probability is the absolute error of its logit. The gradient then rounds to the queries'
    # dtype.
    expected_gradient *= scale.numpy()[:, None, None]
    tolerance = P * rounding / temperature / B
    if dtype == torch.bfloat16:
        tolerance += EPS_BF16 * np.abs(expected_gradient).max()
        if backend.runs_triton(device):
            # The kernels round the weights, whose sum is 1, by half a spacing. Below 1 the spacing is half as wide.
            tolerance += P * EPS_BF16 / 4 * float(queue.abs().max()) / temperature / B
    assert leaf.grad.dtype == dtype
    np.testing.assert_allclose(leaf.grad.double().cpu().numpy(), expected_gradient, rtol=0, atol=tolerance)


SCALED = [
    pytest.param(1, 1, 1, 32, 0, torch.float32, id="all sizes 1"),
    pytest.param(3, 5, 37, 64, 4, torch.float32, id="ragged, with positives"),
    pytest.param(2, 18, 130, 32, 0, torch.float32, id="several tiles"),
    pytest.param(2, 18, 130, 32, 3, torch.bfloat16, id="several tiles, bfloat16"),
]


@pytest.mark.parametrize(("P", "B", "K", "D", "M", "dtype"), SCALED)
def test_a_logit_scale_multiplies_the_logits_of_queue_entries_only(
    P: int, B: int, K: int, D: int, M: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Each of three planted faults would exceed the tolerance."""
    queries, keys, queue, positives = case(P, B, K, D, M)
    queries, keys, queue = (t.to(dtype) for t in (queries, keys, queue))
    queue[:, 0] = queries[:, 0]  # an entry with a large logit, so that its scale counts
    scale = torch.linspace(0.3, 1.2, K)
    expected, expected_gradient = oracle(queries, keys, queue, positives, 0.07, scale)

    leaf, *others = (None if t is None else t.to(device, copy=True) for t in (queries, keys, queue, positives))
    own_scale = scale.to(device, copy=True)
    leaf.requires_grad_()
    own_scale.requires_grad_()
    found = contrast(leaf, *others, logit_scale=own_scale)
    found.losses.sum().backward()
    # A fifth rounding error comes from the multiplication by the scale.
    rounding = 5 * EPS / 0.07
    gradient_tolerance = rounding / 0.07 / B
    if dtype == torch.bfloat16:  # as in the test without a scale
        gradient_tolerance += EPS_BF16 * np.abs(expected_gradient).max() + EPS_BF16 / 4 / 0.07 / B
    np.testing.assert_allclose(found.losses.detach().cpu().numpy(), expected, rtol=0, atol=rounding)
    gradient = leaf.grad.double().cpu().numpy()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=gradient_tolerance)
    assert own_scale.grad is None
    hardest = (queries.double() @ queue.double().transpose(1, 2) * scale).amax(2).mean(1)
    np.testing.assert_allclose(found.hardest.cpu().numpy(), hardest.numpy(), rtol=0, atol=4 * EPS)

    without, without_gradient = oracle(queries, keys, queue, positives, 0.07)
    assert np.abs(without - expected).max() > 10 * rounding
    assert np.abs(without_gradient - expected_gradient).max() > 2 * gradient_tolerance
    key_too, _ = oracle(queries, keys * 0.9, queue, positives, 0.07, scale)
    assert np.abs(key_too - expected).max() > 10 * rounding
    one_entry_late, _ = oracle(queries, keys, queue, positives, 0.07, scale.roll(1) if K > 1 else scale * 0.9)
    assert np.abs(one_entry_late - expected).max() > 10 * rounding
    ones = info_nce(*(queries.to(device), *others), logit_scale=torch.ones(K, device=device))
    assert torch.equal(ones, info_nce(queries.to(device), *others))


def to_tf32(x: Tensor) -> Tensor:
    """Round to the nearest number with 10 bits after the point, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("P", "B", "K", "D", "M", "temperature"), CASES)
def test_tf32(P: int, B: int, K: int, D: int, M: int, temperature: float) -> None:
    """If torch may round products to tf32, the kernels round too.

    Their error is at most four times the error of torch's own products or of rounding each factor to the nearest tf32
    number, whichever is greater. (torch uses float32 for small products.)
    """
    queries, keys, queue, positives = case(P, B, K, D, M)
    expected, expected_gradient = oracle(queries, keys, queue, positives, temperature)
    rounded = oracle(to_tf32(queries), to_tf32(keys), to_tf32(queue), positives, temperature)
    on_gpu = [None if t is None else t.cuda() for t in (queries, keys, queue, positives)]
    on_gpu[0].requires_grad_()
    pairs = zip(rounded, (expected, expected_gradient), strict=True)
    errors = {"rounding": [np.abs(found - true).max() for found, true in pairs]}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for name in ("reference", "triton"):
            kernels.set_backend(name)
            losses = info_nce(*on_gpu, temperature)
            (gradient,) = torch.autograd.grad(losses.sum(), on_gpu[0])
            errors[name] = [
                np.abs(found.detach().double().cpu().numpy() - true).max()
                for found, true in ((losses, expected), (gradient, expected_gradient))
            ]
    finally:
        kernels.set_backend("auto")
        torch.set_float32_matmul_precision(before)
    rounding = 4 * EPS / min(temperature, 1)
    least = rounding, rounding / temperature / B
    for own, torchs, nearest, float32s in zip(
        *(errors[of] for of in ("triton", "reference", "rounding")), least, strict=True
    ):
        assert own <= 4 * max(torchs, nearest) + float32s


@pytest.mark.parametrize(
    ("B", "K", "D", "M", "scaled"), [(18, 130, 32, 3, False), (18, 130, 64, 0, True), (70, 96, 32, 0, False)]
)
def test_three_bfloat16_products_are_far_more_exact_than_tf32(
    B: int, K: int, D: int, M: int, scaled: bool, kernel_device: torch.device
) -> None:
    """Their error is at most a tenth of that of tf32, in the loss and in the gradient.

    The error without one of the three products would be greater than that of tf32.
    """
    if backend.compute_capability(kernel_device) != 90:
        pytest.skip("three bfloat16 products are for Hopper")
    queries, keys, queue, positives = case(1, B, K, D, M)
    scale = torch.linspace(0.3, 1.2, K) if scaled else None
    expected = oracle(queries, keys, queue, positives, 0.07, scale)
    leaf, *others = (None if t is None else t.to(kernel_device, copy=True) for t in (queries, keys, queue, positives))
    leaf.requires_grad_()
    torch.set_float32_matmul_precision("high")
    try:
        losses = info_nce(leaf, *others, logit_scale=None if scale is None else scale.to(kernel_device))
    finally:
        torch.set_float32_matmul_precision("highest")
    losses.sum().backward()

    def errors(found: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return np.array([np.abs(f - e).max() for f, e in zip(found, expected, strict=True)])

    own = errors((losses.detach().double().cpu().numpy(), leaf.grad.double().cpu().numpy()))
    tf32 = errors(oracle(to_tf32(queries), keys, to_tf32(queue), positives, 0.07, scale))
    float32 = 5 * EPS / 0.07 * np.array([1, 1 / 0.07 / B])
    assert (own <= tf32 / 10 + float32).all()
    one_product_less = errors(oracle(queries.bfloat16().float(), keys, queue, positives, 0.07, scale))
    assert (one_product_less > tf32 / 10 + float32).all()


def test_matmul_precision_is_followed() -> None:
    assert backend.float32_precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    assert backend.float32_precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert backend.float32_precision() == "ieee"


def test_without_positives_it_is_cross_entropy(device: torch.device) -> None:
    queries, keys, queue = (t.to(device) for t in case(2, 4, 9, 32, 0)[:3])
    losses = info_nce(queries, keys, queue)
    for p in range(2):
        logits = torch.cat([(queries[p] * keys[p]).sum(1, keepdim=True), queries[p] @ queue[p].T], dim=1) / 0.07
        torch.testing.assert_close(losses[p], F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device=device)))


def test_repeated_entry_counts_once_and_negative_number_not_at_all(device: torch.device) -> None:
    queries, keys, queue = (t.to(device) for t in case(1, 2, 6, 32, 0)[:3])
    plain = info_nce(queries, keys, queue, torch.tensor([[[2, 5], [3, 0]]], device=device))
    repeated = info_nce(queries, keys, queue, torch.tensor([[[2, 5, 2, 5, 2], [3, 0, 0, -1, -7]]], device=device))
    assert torch.equal(plain, repeated)
    none = info_nce(queries, keys, queue)
    assert torch.equal(none, info_nce(queries, keys, queue, torch.full((1, 2, 3), -1, device=device)))
    assert torch.equal(none, info_nce(queries, keys, queue, torch.empty(1, 2, 0, dtype=torch.int64, device=device)))
    assert plain < none


def test_unchecked_number_outside_the_queue_is_no_positive(device: torch.device) -> None:
    queries, keys, queue = (t.to(device) for t in case(1, 2, 6, 32, 0)[:3])
    outside = torch.tensor([[[2, 6], [2**40, 0]]], device=device)
    inside = torch.tensor([[[2, -1], [-1, 0]]], device=device)
    assert torch.equal(
        info_nce(queries, keys, queue, outside, check_rows=False), info_nce(queries, keys, queue, inside)
    )
    with pytest.raises(ValueError, match=f"positives names queue entry {2**40}, but queue has entries 0 to 5"):
        info_nce(queries, keys, queue, outside, check_rows=True)


def test_gradient_flows_to_queries_only(device: torch.device) -> None:
    queries, keys, queue, positives = (t.to(device) for t in case(2, 3, 5, 32, 2))
    for tensor in (queries, keys, queue):
        tensor.requires_grad_()
    info_nce(queries, keys, queue, positives).sum().backward()
    assert queries.grad is not None
    assert queries.grad.abs().max() > 0
    assert keys.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enqueue_before_backward(dtype: torch.dtype, device: torch.device, run: Callable) -> None:
    """The backward pass must not read the queue, because the step's keys may already be in it.

    That error would be silent.
    """
    queries, keys, queue, positives = (t.to(device) for t in case(2, 3, 8, 32, 2))
    queries, keys, queue = (t.to(dtype) for t in (queries, keys, queue))
    info_nce = run(kernels.info_nce)

    before = queries.clone().requires_grad_()
    info_nce(before, keys, queue, positives).sum().backward()

    after = queries.clone().requires_grad_()
    losses = info_nce(after, keys, queue, positives)
    queue[:, :3] = keys
    losses.sum().backward()

    assert before.grad is not None
    assert after.grad is not None
    assert torch.equal(before.grad, after.grad)


def test_float32_under_autocast(device: torch.device) -> None:
    queries, keys, queue, positives = (t.to(device) for t in case(2, 4, 33, 64, 3))
    queries.requires_grad_()
    expected = info_nce(queries, keys, queue, positives)
    many = unit(2048, 64, seed=7).to(device)  # rounding to bfloat16 changes the order of this many
    rows = mine_positives(queries[0], many, 20)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert (queries @ queue.transpose(1, 2)).dtype == torch.bfloat16  # autocast is on and would round
        assert torch.equal(info_nce(queries, keys, queue, positives), expected)
        assert torch.equal(mine_positives(queries[0], many, 20), rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(2, 3, 32, dtype=torch.float64)}, TypeError, "queries must be float32 or bfloat16"),
        ({"keys": torch.zeros(2, 3, 32, dtype=torch.int64)}, TypeError, "keys must be float32 or bfloat16"),
        ({"queue": torch.zeros(2, 4, 32, dtype=torch.float16)}, TypeError, "queue must be float32 or bfloat16"),
        ({"queries": torch.zeros(3, 32)}, ValueError, r"queries must be \(P, B, D\)"),
        ({"keys": torch.zeros(2, 1, 32)}, ValueError, r"keys must be \(2, 3, 32\)"),
        ({"queue": torch.zeros(1, 4, 32)}, ValueError, r"queue must be \(2, K, 32\)"),
        ({"queue": torch.zeros(2, 4, 33)}, ValueError, r"queue must be \(2, K, 32\)"),
        ({"queue": torch.zeros(2, 0, 32)}, ValueError, "queue must be .* not empty"),
        ({"positives": torch.zeros(2, 3, 1)}, TypeError, "positives must be int64"),
        ({"positives": torch.zeros(2, 1, 1, dtype=torch.int64)}, ValueError, r"positives must be \(2, 3, M\)"),
        (
            {"positives": torch.full((2, 3, 1), 4)},
            ValueError,
            "positives names queue entry 4, but queue has entries 0 to 3",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
        ({"logit_scale": torch.ones(4).double()}, TypeError, "logit_scale must be float32, not torch.float64"),
        ({"logit_scale": torch.ones(3)}, ValueError, r"logit_scale must be \(4,\), not \(3,\)"),
        ({"temperature": float("nan")}, ValueError, "temperature must be greater than 0"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str, device: torch.device) -> None:
    arguments: dict = {"queries": torch.zeros(2, 3, 32), "keys": torch.zeros(2, 3, 32), "queue": torch.zeros(2, 4, 32)}
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    for function in (info_nce, contrast):
        function(**arguments)  # valid before the change
        change = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in change.items()}
        with pytest.raises(error, match=message):
            function(**{**arguments, **change}, check_rows=True)


@pytest.mark.parametrize("name", ["keys", "queue", "positives"])
def test_errors_name_the_argument_on_another_device(name: str, device: torch.device) -> None:
    arguments: dict = {"queries": torch.zeros(2, 3, 32), "keys": torch.zeros(2, 3, 32), "queue": torch.zeros(2, 4, 32)}
    arguments["positives"] = torch.zeros(2, 3, 1, dtype=torch.int64)
    arguments = {n: t.to("meta" if n == name else device) for n, t in arguments.items()}
    with pytest.raises(ValueError, match=f"{name} must be on {device.type}.* like queries, not on meta"):
        info_nce(**arguments)


def test_embedding_sizes(device: torch.device) -> None:
    """The kernels support four sizes. The reference supports any size."""
    queries, keys, queue = torch.zeros(1, 2, 48), torch.zeros(1, 2, 48), torch.zeros(1, 3, 48)
    queries, keys, queue = queries.to(device), keys.to(device), queue.to(device)
    if backend.runs_triton(device):
        with pytest.raises(ValueError, match="an embedding size of 48 is not one of 32, 64, 128 and 256"):
            info_nce(queries, keys, queue)
        with pytest.raises(ValueError, match="an embedding size of 48"):
            mine_positives(queries[0], queue[0], 1)
    else:
        assert info_nce(queries, keys, queue).isfinite().all()


MINED = [
    pytest.param(1, 1, 1, 32, 1, id="all sizes 1"),
    pytest.param(1, 5, 33, 64, 33, id="all entries"),
    pytest.param(2, 3, 70, 32, 70, id="all entries of several tiles, by two similarities"),
    pytest.param(1, 40, 2048, 128, 5, id="production: one similarity"),
    pytest.param(2, 40, 2048, 128, 5, id="production: the vv pair"),
    pytest.param(2, 17, 70, 256, 3, id="ragged, the largest embedding"),
    pytest.param(3, 4, 17, 64, 0, id="none wanted"),
    pytest.param(3, 4, 17, 64, 2, id="three similarities"),
]


@pytest.mark.parametrize(
    ("run", "S", "B", "K", "D", "m"), eager_and_compiled(MINED, ("all sizes", "ragged", "none")), indirect=["run"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mine_positives(
    S: int, B: int, K: int, D: int, m: int, dtype: torch.dtype, device: torch.device, run: Callable
) -> None:
    features, queue = unit(S, B, D, seed=5).to(dtype), unit(S, K, D, seed=6).to(dtype)
    on_device = (features.to(device), queue.to(device)) if S > 1 else (features[0].to(device), queue[0].to(device))
    rows = run(mine_positives)(*on_device, m).cpu()

    total = np.zeros((B, K))
    for f, z in zip(features.double().numpy(), queue.double().numpy(), strict=True):
        weights = np.exp(f @ z.T)
        total += weights / weights.sum(axis=1, keepdims=True) if S > 1 else f @ z.T
    assert rows.dtype == torch.int64
    assert rows.shape == (B, m)
    # Two entries may swap places if their scores differ by no more than their rounding error, a few EPS.
    best = -np.sort(-total, axis=1)[:, :m]
    chosen = np.take_along_axis(total, rows.numpy(), axis=1)
    np.testing.assert_allclose(chosen, best, rtol=8 * EPS if S > 1 else 0, atol=0 if S > 1 else 4 * EPS)
    assert all(len(set(line)) == m for line in rows.tolist())


MINED_BY_EACH = [
    pytest.param(2, 17, 300, 5, id="static, dynamic, both: several tiles, ragged"),
    pytest.param(3, 2, 9, 9, id="three similarities, all entries"),
    pytest.param(1, 3, 8, 2, id="one, and one together"),
    pytest.param(2, 3, 8, 0, id="none wanted"),
]


@pytest.mark.parametrize(
    ("run", "S", "B", "K", "m"), eager_and_compiled(MINED_BY_EACH, ("one", "none")), indirect=["run"]
)
def test_mining_by_each_is_mining_by_one_at_a_time(
    S: int, B: int, K: int, m: int, device: torch.device, run: Callable
) -> None:
    features, queue = unit(S, B, 32, seed=5).to(device), unit(S, K, 32, seed=6).to(device)
    rows = run(kernels.mine_positives_by_each)(features, queue, m)
    assert rows.shape == (S + 1, B, m)
    for s in range(S):
        assert torch.equal(rows[s], mine_positives(features[s], queue[s], m))
    assert torch.equal(rows[S], mine_positives(features, queue, m))


def test_mining_by_each_needs_similarities() -> None:
    with pytest.raises(ValueError, match=r"features must be \(S, B, D\), not \(2, 32\)"):
        kernels.mine_positives_by_each(torch.zeros(2, 32), torch.zeros(4, 32), 1)
    with pytest.raises(ValueError, match="m must be between 0 and the 4 entries of queue, not 5"):
        kernels.mine_positives_by_each(torch.zeros(1, 2, 32), torch.zeros(1, 4, 32), 5)


def test_equal_entries_rank_by_number(device: torch.device) -> None:
    """The result is therefore the same in every run. The reference, torch.topk, promises no order of equal values."""
    if not backend.runs_triton(device):
        pytest.skip("tests the kernels only")
    # Entry j is equal to entries j + 3, j + 6, ... Products of halves are exact, so the order of summation does not
    # matter. In the interpreter, NumPy's library may sum the last columns of a block in another order than the first
    # (seen with OPENBLAS_CORETYPE=Zen). The similarities of equal entries would then differ.
    queue = F.pad(torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -0.5], [0.5, -0.5, -0.5, -0.5]]), (0, 28))
    queue = queue.repeat(50, 1).to(device)
    rows = mine_positives(queue[:3], queue, 60)
    for i in range(3):
        assert rows[i, :50].tolist() == list(range(i, 150, 3))


def test_equal_entries_at_the_floor_rank_by_number(device: torch.device) -> None:
    """Only the first of 37 equal best entries are wanted. They lie in all splits, so the floor is their score."""
    if not backend.runs_triton(device):
        pytest.skip("tests the kernels only")
    queue = F.pad(torch.tensor([[-0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]), (0, 28)).repeat(200, 1)
    best = torch.arange(3, 400, 11)
    queue[best] = F.pad(torch.tensor([1.0, 0.0, 0.0, 0.0]), (0, 28))
    features = best.new_zeros(2, 3, 32).float()
    features[..., 0] = 1
    rows = kernels.mine_positives_by_each(features.to(device), torch.stack([queue, queue]).to(device), 7)
    assert torch.equal(rows.cpu(), best[:7].expand(3, 3, 7))


def test_negative_and_zero_similarities_are_ranked(device: torch.device) -> None:
    features = torch.zeros(1, 32)
    features[0, 0] = 1
    queue = torch.zeros(5, 32)
    queue[:, 0] = torch.tensor([-0.5, 0.0, -1.0, 0.25, -0.25])
    assert mine_positives(features.to(device), queue.to(device), 5).tolist() == [[3, 1, 4, 0, 2]]


def test_mine_positives_sums_softmaxes_not_similarities(device: torch.device) -> None:
    """A high score in one similarity beats a medium score in both: true for a sum of exponentials, not for a sum."""
    features = F.pad(torch.tensor([[[1.0, 0, 0]], [[1.0, 0, 0]]]), (0, 29)).to(device)  # (S=2, B=1, D)
    first = torch.tensor([[0.99, 0, 0], [0.5, 0, 0], [0.0, 1, 0]])  # similarity of entries 0, 1, 2: 0.99, 0.50, 0
    second = torch.tensor([[0.0, 1, 0], [0.5, 0, 0], [0.0, 1, 0]])  # 0, 0.50, 0
    queue = F.pad(torch.stack([first, second]), (0, 29)).to(device)
    assert mine_positives(features, queue, 2).tolist() == [[0, 1]]


def test_mine_positives_has_no_gradient(device: torch.device) -> None:
    features = unit(3, 32).to(device).requires_grad_()
    assert not mine_positives(features, unit(9, 32, seed=1).to(device), 2).requires_grad


@pytest.mark.parametrize(
    ("features", "queue", "m", "error", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 8), 5, ValueError, "m must be between 0 and the 4 entries of queue, not 5"),
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


def test_mine_positives_names_the_argument_on_another_device(device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"queue must be on {device.type}.* like features, not on meta"):
        mine_positives(torch.zeros(2, 32, device=device), torch.zeros(4, 32, device="meta"), 1)


# ---------------------------------------------------------------- tests of the kernels only


@pytest.fixture
def kernel_device(device: torch.device) -> torch.device:
    if not backend.runs_triton(device):
        pytest.skip("tests the kernels only")
    return device


def test_bitwise_the_same_from_run_to_run(kernel_device: torch.device) -> None:
    inputs = [t.to(kernel_device) for t in case(3, 20, 500, 64, 4)]
    inputs[0].requires_grad_()
    runs = []
    for _ in range(3):
        found = contrast(*inputs)
        runs.append([*found, *torch.autograd.grad(found.losses.sum(), inputs[0])])
        torch.rand(1000, 1000, device=kernel_device)  # changes addresses and timing
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_order_of_the_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On a GPU programs run in any order, and any of them may be the last. The interpreter has one order."""
    if not backend.INTERPRETED or not backend.runs_triton(device):
        pytest.skip("tests the interpreter's order")
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    choose = builder.set_grid_idx
    inputs = case(2, 5, 200, 32, 3)
    inputs[0].requires_grad_()
    found = []
    for order in (lambda x, count: x, lambda x, count: count - 1 - x, lambda x, count: (x + count // 2) % count):
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, y, z, order=order: choose(order(x, builder.grid_dim[0]), y, z)
        )
        contrasts = contrast(*inputs)
        gradient = torch.autograd.grad(contrasts.losses.sum(), inputs[0])
        rows = kernels.mine_positives_by_each(inputs[1], inputs[2], 4)
        found.append([*contrasts, *gradient, rows])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_counters_are_zero_after_each_launch(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """The next launch on the stream uses the same counters. A counter that is not zero would hide the last program."""
    from dclr.kernels import info_nce_triton

    counters = torch.zeros(8, dtype=torch.int32, device=kernel_device)
    monkeypatch.setattr(info_nce_triton, "arrival_counters", lambda count, _: counters[:count])
    inputs = [t.to(kernel_device) for t in case(2, 3, 200, 32, 2)]
    found = []
    for _ in range(2):
        found.append((info_nce(*inputs), kernels.mine_positives_by_each(inputs[1], inputs[2], 3)))
        assert not counters.any()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_each_stream_and_each_captured_launch_has_counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dclr.kernels import info_nce_triton

    stream, capturing, zeros = SimpleNamespace(cuda_stream=1), False, torch.zeros
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "zeros", lambda count, dtype, device: zeros(count, dtype=dtype))
    monkeypatch.setattr(info_nce_triton, "_counters", {})
    monkeypatch.setattr(info_nce_triton, "_spare_counters", {})

    kept = []

    def take(count: int) -> tuple[int, int]:
        counters = info_nce_triton.arrival_counters(count, torch.device("cuda"))
        assert not counters.any()
        assert len(counters) >= count
        kept.append(counters)  # freed memory would be handed out again
        return counters.data_ptr(), counters.data_ptr() + 4 * len(counters)

    first = take(5)
    assert take(5) == first
    stream = SimpleNamespace(cuda_stream=2)
    second = take(5)
    capturing = True
    taken = [first, second, take(5), take(5), take(4096), take(4096)]
    stream = SimpleNamespace(cuda_stream=3)
    taken.append(take(5))
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))


def test_one_split_and_many_agree(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    from dclr.kernels import info_nce_triton

    inputs = [t.to(kernel_device) for t in case(2, 3, 700, 32, 2)]
    inputs[0].requires_grad_()
    found = []
    for count in (1, 7, 1000):  # 1 split, 7 splits, and the most splits
        monkeypatch.setattr(info_nce_triton, "multiprocessors", lambda _, count=count: count)
        losses = info_nce(*inputs)
        found.append((losses.detach(), *torch.autograd.grad(losses.sum(), inputs[0])))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * EPS / 0.07**2)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """Allocated memory is filled with NaN, or -2 for row numbers, before the kernels write. None may be left."""
    inputs = [t.to(kernel_device) for t in case(2, 5, 70, 32, 3)]
    inputs[0].requires_grad_()
    allocate = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        tensor = allocate(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -2)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = contrast(*inputs)
    for tensor in (*found, *torch.autograd.grad(found.losses.sum(), inputs[0])):
        assert tensor.isfinite().all()
    assert (kernels.mine_positives_by_each(inputs[1], inputs[2], 4) >= 0).all()


def test_queue_is_neither_copied_nor_written(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """The queue may be a slice of a larger buffer."""
    queries, keys, queue, positives = (t.to(kernel_device) for t in case(2, 3, 40, 32, 2))
    buffer = torch.full((2, 50, 64), float("nan"), device=kernel_device)
    window = buffer[:, 5:45, :32]
    window.copy_(queue)
    before = buffer.clone()
    monkeypatch.setattr(Tensor, "contiguous", lambda t, **_: t if t.is_contiguous() else pytest.fail("copied"))
    assert torch.equal(info_nce(queries, keys, window, positives), info_nce(queries, keys, queue, positives))
    assert torch.equal(mine_positives(queries, window, 3), mine_positives(queries, queue, 3))
    assert torch.equal(buffer.view(torch.int32), before.view(torch.int32))


def test_other_memory_layouts(kernel_device: torch.device) -> None:
    queries, keys, queue, positives = (t.to(kernel_device) for t in case(2, 3, 40, 32, 2))

    def scattered(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    expected = info_nce(queries, keys, queue, positives)
    assert torch.equal(info_nce(*map(scattered, (queries, keys, queue, positives))), expected)
    assert torch.equal(mine_positives(scattered(queries), scattered(queue), 3), mine_positives(queries, queue, 3))


def test_mixed_dtypes_are_widened(kernel_device: torch.device) -> None:
    queries, keys, queue, positives = (t.to(kernel_device) for t in case(2, 3, 40, 32, 2))
    queries, keys = queries.bfloat16().requires_grad_(), keys.bfloat16()
    expected, expected_gradient = oracle(queries.detach().cpu(), keys.cpu(), queue.cpu(), positives.cpu(), 0.07)
    losses = info_nce(queries, keys, queue, positives)
    np.testing.assert_allclose(losses.detach().cpu().numpy(), expected, rtol=0, atol=4 * EPS / 0.07)
    losses.sum().backward()
    assert queries.grad.dtype == torch.bfloat16
    atol = EPS_BF16 / 2 * np.abs(expected_gradient).max()
    np.testing.assert_allclose(queries.grad.double().cpu().numpy(), expected_gradient, rtol=0, atol=atol)


def test_normalisers_and_floors(kernel_device: torch.device) -> None:
    """At least m entries reach each floor, and few others do. Without that the search would be right, but slow."""
    from dclr.kernels import info_nce_triton

    m = 4
    features, queue = unit(2, 3, 128, seed=5).to(kernel_device), unit(2, 1500, 128, seed=6).to(kernel_device)
    launch, found = info_nce_triton.floor_launch(features, queue, m, True, "ieee")
    launch()
    similarities = features.double().cpu() @ queue.double().cpu().transpose(1, 2)  # (S, B, K)
    totals = similarities.exp().sum(dim=2)
    torch.testing.assert_close(found.tops.double().cpu(), similarities.amax(dim=2), rtol=0, atol=4 * EPS)
    shares = found.shares.double().cpu() * torch.exp(-found.tops.double().cpu())
    torch.testing.assert_close(shares, 1 / totals, rtol=16 * EPS, atol=0)
    together = (similarities.exp() / totals[..., None]).sum(dim=0, keepdim=True)
    scores = torch.cat([similarities, together])  # (R, B, K)
    assert (found.floors.double().cpu() <= scores.topk(m, dim=2).values[..., -1]).all()
    assert not found.counts.any()
    launch, _ = info_nce_triton.rank_launch(features, queue, found, m, True, "ieee")
    launch()
    assert (found.counts >= m).all()
    assert (found.counts <= 3 * m).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_rows_of_features_that_are_not_numbers_lie_in_the_queue(kernel_device: torch.device) -> None:
    """A diverged network must end in an error about its loss, not in a read outside of the queue."""
    features, queue = unit(2, 3, 32).to(kernel_device), unit(2, 90, 32, seed=1).to(kernel_device)
    features[0, 1] = float("nan")
    queue[1, 7] = float("inf")
    rows = kernels.mine_positives_by_each(features, queue, 4)
    assert ((rows >= 0) & (rows < 90)).all()


def test_many_positives_and_repeats_far_apart(kernel_device: torch.device) -> None:
    """Positives are read in groups of 8. A repeat in a later group counts once too."""
    queries, keys, queue = (t.to(kernel_device) for t in case(1, 3, 40, 32, 0)[:3])
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:19].expand(1, 3, -1)
    far = torch.cat([rows, rows[..., :9], -torch.ones_like(rows[..., :2]), rows[..., 10:11]], dim=2)
    expected, _ = oracle(queries.cpu(), keys.cpu(), queue.cpu(), rows, 0.07)
    for positives in (rows, far):
        losses = info_nce(queries, keys, queue, positives.to(kernel_device))
        np.testing.assert_allclose(losses.cpu().numpy(), expected, rtol=0, atol=4 * EPS / 0.07)


def test_without_gradient_none_is_computed(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from dclr.kernels import info_nce_triton

    computed = []
    launch = info_nce_triton.loss_launch
    monkeypatch.setattr(info_nce_triton, "loss_launch", lambda *a: computed.append(a[5]) or launch(*a))
    inputs = [t.to(kernel_device) for t in case(2, 3, 40, 32, 2)]
    frozen = info_nce(*inputs)
    inputs[0].requires_grad_()
    with torch.no_grad():
        unwatched = info_nce(*inputs)
    watched = info_nce(*inputs)
    assert computed == [False, False, True]
    assert torch.equal(frozen, unwatched)
    assert torch.equal(frozen, watched.detach())


def test_a_second_derivative_is_refused(kernel_device: torch.device) -> None:
    inputs = [t.to(kernel_device) for t in case(1, 2, 8, 32, 1)]
    inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), inputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(dtype: torch.dtype, gradient: bool, kernel_device: torch.device) -> None:
    from dclr.kernels import info_nce_triton

    queries, keys, queue, positives = (t.to(kernel_device) for t in case(2, 3, 20, 32, 2))
    queries, keys, queue = (t.to(dtype) for t in (queries, keys, queue))
    leaf = queries.clone().requires_grad_(gradient)
    for mined, scale in ((positives, None), (None, torch.ones(20, device=kernel_device))):
        torch.library.opcheck(info_nce_triton.info_nce_op, (leaf, keys, queue, mined, 0.07, gradient, scale))
    torch.library.opcheck(info_nce_triton.mine_positives_op, (queries, queue, 3, True))
    if gradient:
        partials = info_nce_triton.info_nce_op(leaf, keys, queue, positives, 0.07, True)[2:]
        upstream = torch.ones(2, device=kernel_device)
        arguments = (*(tensor.detach() for tensor in partials), upstream, 0.07, dtype)
        torch.library.opcheck(info_nce_triton.info_nce_backward_op, arguments)


@pytest.mark.slow
def test_inductor(kernel_device: torch.device) -> None:
    """A training step with mining, loss, gradient and update of the queue compiles to one graph."""
    queries, keys, queue, _ = (t.to(kernel_device) for t in case(2, 3, 64, 32, 2))

    def step(queries: Tensor, keys: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        rows = mine_positives(keys, queue, 2)
        losses = info_nce(queries * 1.0, keys, queue, torch.stack([rows, rows]))
        queue[:, :3] = keys
        return losses, rows

    torch.compiler.reset()
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend=COMPILER)):
        leaf, own_queue = queries.clone().requires_grad_(), queue.clone()
        losses, rows = function(leaf, keys, own_queue)
        losses.sum().backward()
        found.append((losses.detach(), rows, leaf.grad, own_queue))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_and_nothing_waits() -> None:
    queries, keys, queue, _ = (t.cuda() for t in case(5, 40, 2048, 128, 5))
    queries.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        rows = mine_positives(keys[:2].detach(), queue[:2], 5)
        losses = info_nce(queries, keys, queue, rows.expand(5, -1, -1))
        return losses, torch.autograd.grad(losses.sum(), queries)[0]

    expected = [tensor.detach() for tensor in step()]  # a living graph would tie the leaf to this stream
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for _ in range(2):  # an eager step between two replays uses other counters
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        for a, b in zip(expected, captured, strict=True):
            assert torch.equal(a, b)
        step()


def test_the_backend_is_named_and_refused() -> None:
    cpu = torch.device("cpu")
    kernels.set_backend("auto")
    assert kernels.describe(cpu) == "reference (plain torch and kornia; the device is cpu)"
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, not 'cuda'"):
        kernels.set_backend("cuda")
    try:
        kernels.set_backend("reference")
        assert kernels.describe(cpu) == "reference (plain torch and kornia; as chosen)"
        kernels.set_backend("triton")
        if backend.INTERPRETED:
            assert kernels.describe(cpu) == "Triton in its interpreter: slow, for tests only"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "INTERPRETED", False)
            with pytest.raises(
                RuntimeError, match='backend "triton" cannot run on cpu: use a CUDA device, set TRITON_INTERPRET=1'
            ):
                info_nce(*case(1, 1, 1, 32, 0))
    finally:
        kernels.set_backend("auto")
