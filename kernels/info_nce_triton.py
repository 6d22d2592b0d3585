"""The contrastive loss and the search for positives in Triton: one pass over the queue, no logits in memory.

Keys and queue receive no gradient, so the forward pass can compute the queries' gradient too. With logits
l_ij = q_i . x_j / temperature, where x_0 is the query's key and x_1 .. x_K are the queue entries,

    loss_i = log sum_j exp(l_ij) - log sum_(j positive) exp(l_ij)
    d loss_i / d q_i = (sum_j p_ij x_j - sum_(j positive) r_ij x_j) / temperature

where p_i is the softmax over all j and r_i is the softmax over the positives. The first sum is attention with the queue
as both keys and values. The online softmax of FlashAttention (Dao et al., arXiv 2205.14135) therefore computes this sum
together with the loss. The backward pass only multiplies by the upstream gradient, so the queue may be overwritten
between the two passes.

Letters: P pairs, B clips, D embedding size, K queue entries, M positives of a query, S similarities ranked together,
N splits (consecutive ranges of queue entries that different programs read).
Logits are stored in units of log 2, called bits, because a GPU has an instruction for exp2.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dclr.kernels.backend import INTERPRETED, float32_precision, multiprocessors
from dclr.kernels.launch import Launch
from dclr.kernels.types import EMBEDDING_SIZES

_BITS = math.log2(math.e)  # exp(x) = exp2(x * _BITS)
# Register limit of a thread; a program of 8 warps cannot have more. Without a limit, ptxas (CUDA 12.8) tries to run
# more programs at once. It then moves 8 to 24 bytes that a loop does not use to local memory, even in kernels of 40
# registers. With this limit it does not.
_REGISTERS = 255
_MOST_SPLITS = 64  # one tile merges the partial results of a query
_LOWEST = tl.constexpr(-(2**63))  # marks a missing candidate: lower than every candidate
_BITS_IN = tl.constexpr(_BITS)
_LN2 = tl.constexpr(math.log(2))


# ---------------------------------------------------------------- kernels


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return a @ b + acc in float32.

    WIDEN converts bfloat16 to float32 first, because the interpreter of Triton 3.6 multiplies the bit patterns of
    bfloat16. The result is the same, because a product of two bfloat16 numbers is exact in float32. The interpreter
    does not round to tf32.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a = _to_tf32(a)
        b = _to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _to_tf32(x):
    """Round x to the nearest tf32 number.

    The matrix units would drop the 13 bits that tf32 does not have, which makes every product too small. On an H200 the
    error of a loss was then 1e-3, compared with 7e-6 in torch (docs/LOG.md).
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _stream_queue(
    queries, queue, peaks, masses, sums, pid, stride_pair, stride_row, scale, B, K, row_blocks, splits, rows_per_split,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    GRADIENT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the online softmax of BLOCK_B queries of one pair over one split of its queue.

    Pointers as in `_partial_kernel`.
    """
    block = pid % row_blocks  # changes fastest, so that neighbouring programs read the same queue entries
    split = pid // row_blocks % splits
    pair = (pid // (row_blocks * splits)).to(tl.int64)

    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, D)
    q = tl.load(queries + (pair * B + b)[:, None] * D + d[None, :], mask=(b < B)[:, None], other=0.0).to(DTYPE)

    peak = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_B,), tl.float32)
    acc = tl.zeros((BLOCK_B, D), tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, K), BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        offsets = rows.to(tl.int64)[:, None] * stride_row + d[None, :]
        x = tl.load(queue + pair * stride_pair + offsets, mask=(rows < K)[:, None], other=0.0).to(DTYPE)
        bits = _dot(q, tl.trans(x), tl.zeros((BLOCK_B, BLOCK_K), tl.float32), PRECISION, WIDEN) * scale
        bits = tl.where((rows < K)[None, :], bits, float("-inf"))
        higher = tl.maximum(peak, tl.max(bits, 1))
        weights = tl.exp2(bits - higher[:, None])
        rescale = tl.exp2(peak - higher)
        mass = mass * rescale + tl.sum(weights, 1)
        if GRADIENT:
            acc = _dot(weights.to(DTYPE), x, acc * rescale[:, None], PRECISION, WIDEN)
        peak = higher

    out = (pair * B + b) * splits + split
    tl.store(peaks + out, peak, mask=b < B)
    tl.store(masses + out, mass, mask=b < B)
    if GRADIENT:
        tl.store(sums + out[:, None] * D + d[None, :], acc, mask=(b < B)[:, None])


@triton.jit
def _gather_positives(
    queries, keys, queue, positives, key_bits, positive_bits, positive_means, pid, stride_pair, stride_row, scale,
    B, K, M,
    D: tl.constexpr, BLOCK_R: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute the online softmax of BLOCK_R queries of one pair over their key and their positives.

    The key is the first value of the softmax. Pointers as in `_partial_kernel`.
    """
    blocks = tl.cdiv(B, BLOCK_R)
    pair = (pid // blocks).to(tl.int64)
    b = pid % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D)
    valid_b = b < B
    row = (pair * B + b)[:, None] * D + d[None, :]
    q = tl.load(queries + row, mask=valid_b[:, None], other=0.0).to(tl.float32)
    acc = tl.load(keys + row, mask=valid_b[:, None], other=0.0).to(tl.float32)
    peak = tl.sum(q * acc, 1) * scale
    tl.store(key_bits + pair * B + b, peak, mask=valid_b)
    mass = tl.full((BLOCK_R,), 1.0, tl.float32)

    own = positives + (pair * B + b) * M
    for t in range(M):
        j = tl.load(own + t, mask=valid_b, other=-1)
        is_positive = (j >= 0) & (j < K)
        for earlier in range(t):
            is_positive = is_positive & (tl.load(own + earlier, mask=valid_b, other=-1) != j)
        x = tl.load(
            queue + pair * stride_pair + tl.where(is_positive, j, 0)[:, None] * stride_row + d[None, :],
            mask=is_positive[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        bits = tl.where(is_positive, tl.sum(q * x, 1) * scale, float("-inf"))
        higher = tl.maximum(peak, bits)
        weight = tl.exp2(bits - higher)
        rescale = tl.exp2(peak - higher)
        mass = mass * rescale + weight
        acc = acc * rescale[:, None] + weight[:, None] * x
        peak = higher

    tl.store(positive_bits + pair * B + b, peak + tl.log2(mass), mask=valid_b)
    if GRADIENT:
        tl.store(positive_means + row, acc / mass[:, None], mask=valid_b[:, None])


@triton.jit
def _partial_kernel(
    queries,  # (P, B, D)
    keys,  # (P, B, D)
    queue,  # (P, K, D), with stride_pair between pairs and stride_row between entries
    positives,  # (P, B, M) int64
    peaks,  # output (P, B, N): greatest logit of the split, in bits
    masses,  # output (P, B, N): sum of exp2(logit - peak)
    sums,  # output (P, B, N, D): sum of exp2(logit - peak) x
    key_bits,  # output (P, B): logit of the key, in bits
    positive_bits,  # output (P, B): log2 of the sum of exp2(logit) over key and positives
    positive_means,  # output (P, B, D): mean of key and positives, weighted by exp2(logit)
    stride_pair, stride_row, scale, B, K, M, row_blocks, splits, rows_per_split, stream_programs,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GRADIENT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the partial results of each split and the results of the positives.

    Each of the first `stream_programs` programs owns BLOCK_B queries of one pair and one split. Each other program owns
    BLOCK_R queries of one pair and reads their key and positives. No program waits for another, so all can run at once.
    """
    pid = tl.program_id(0)
    if pid < stream_programs:
        _stream_queue(
            queries, queue, peaks, masses, sums, pid, stride_pair, stride_row, scale, B, K, row_blocks, splits,
            rows_per_split, D, BLOCK_B, BLOCK_K, GRADIENT, DTYPE, PRECISION, WIDEN,
        )  # fmt: skip
    else:
        _gather_positives(
            queries, keys, queue, positives, key_bits, positive_bits, positive_means, pid - stream_programs,
            stride_pair, stride_row, scale, B, K, M, D, BLOCK_R, GRADIENT,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    keys,  # (P, B, D)
    peaks, masses, sums, key_bits, positive_bits, positive_means,  # the outputs of _partial_kernel
    losses,  # output (P,)
    similarities,  # output (2, P): mean over B of query . key, and of the greatest query . queue entry
    gradient,  # output (P, B, D): gradient of the mean loss with respect to the queries
    scale, B, splits,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Merge the splits into losses, similarities and gradient.

    Program (0, p) owns the loss and the similarities of pair p. Program (1 + b, p) owns the gradient of query b of pair
    p. Every program adds the splits in the same order, so the result is the same in every run.
    """
    pair = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    if tl.program_id(0) == 0:
        loss = tl.zeros((BLOCK_R,), tl.float32)
        similar = tl.zeros((BLOCK_R,), tl.float32)
        hardest = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, B, BLOCK_R):
            b = start + tl.arange(0, BLOCK_R)
            here = (b < B)[:, None] & (n < splits)[None, :]
            at = (pair * B + b)[:, None] * splits + n[None, :]
            peak = tl.load(peaks + at, mask=here, other=float("-inf"))
            mass = tl.load(masses + at, mask=here, other=0.0)
            key = tl.load(key_bits + pair * B + b, mask=b < B, other=0.0)
            highest = tl.max(peak, 1)
            top = tl.maximum(highest, key)
            total = tl.sum(mass * tl.exp2(peak - top[:, None]), 1) + tl.exp2(key - top)
            positive = tl.load(positive_bits + pair * B + b, mask=b < B, other=0.0)
            loss += tl.where(b < B, top + tl.log2(total) - positive, 0.0)
            similar += key
            hardest += tl.where(b < B, highest, 0.0)
        tl.store(losses + pair, tl.sum(loss, 0) / B * _LN2)
        tl.store(similarities + pair, tl.sum(similar, 0) / B / scale)
        tl.store(similarities + tl.num_programs(1) + pair, tl.sum(hardest, 0) / B / scale)
    else:
        row = pair * B + tl.program_id(0) - 1
        d = tl.arange(0, D)
        peak = tl.load(peaks + row * splits + n, mask=n < splits, other=float("-inf"))
        mass = tl.load(masses + row * splits + n, mask=n < splits, other=0.0)
        at = (row * splits + n)[:, None] * D + d[None, :]
        partial = tl.load(sums + at, mask=(n < splits)[:, None], other=0.0)
        key = tl.load(key_bits + row)
        top = tl.maximum(tl.max(peak, 0), key)
        weight = tl.exp2(peak - top)
        key_weight = tl.exp2(key - top)
        total = tl.sum(mass * weight, 0) + key_weight
        k = tl.load(keys + row * D + d).to(tl.float32)
        mean = (tl.sum(partial * weight[:, None], 0) + key_weight * k) / total
        positive_mean = tl.load(positive_means + row * D + d)
        # The gradient at the top of this file: mean is sum_j p_ij x_j and positive_mean is sum_(j positive) r_ij x_j.
        # 1 / temperature = scale ln 2, and 1 / B comes from the mean over B queries.
        tl.store(gradient + row * D + d, (mean - positive_mean) * (scale * _LN2 / B))


@triton.jit
def _rank_kernel(
    features,  # (S, B, D)
    queue,  # (S, K, D), with stride_pair between similarities and stride_row between entries
    peaks, masses,  # (S, B, N), outputs of _partial_kernel at temperature 1; unused without SOFTMAX
    candidates,  # output (R, B, tiles, kept) int64: best candidates of each tile of the queue, best first
    stride_pair, stride_row, first_ranking, row_blocks, S, B, K, splits, tiles, kept,
    SOFTMAX: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Select the best queue entries of each tile, for every feature and ranking.

    A program owns BLOCK_B features, one tile of BLOCK_K queue entries and one of R rankings. Ranking r < S uses
    similarity r. Ranking S uses the sum of the S softmaxes over the queue, and only exists with SOFTMAX. The first
    ranking is `first_ranking`.

    A candidate is an int64. Its upper half has the order of the scores. Its lower half is the row number, reversed, so
    that of two equal scores the lower row number is the greater candidate. No two candidates are equal. The next best
    is therefore the greatest candidate below the last one, without sorting.
    """
    tile = tl.program_id(0) // row_blocks  # neighbouring programs read the same queue entries
    b = tl.program_id(0) % row_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    ranking = first_ranking + tl.program_id(1)
    together = ranking == S
    score = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    # This loop is not unrolled, because the tiles of two similarities do not fit into registers at once.
    for s in range(tl.where(together, 0, ranking), tl.where(together, S, ranking + 1)):
        q = tl.load(features + (s * B + b)[:, None] * D + d[None, :], mask=(b < B)[:, None], other=0.0).to(DTYPE)
        offsets = rows.to(tl.int64)[:, None] * stride_row + d[None, :]
        x = tl.load(
            queue + (tl.zeros((), tl.int64) + s) * stride_pair + offsets, mask=(rows < K)[:, None], other=0.0
        ).to(DTYPE)
        similarity = _dot(q, tl.trans(x), tl.zeros((BLOCK_B, BLOCK_K), tl.float32), PRECISION, WIDEN)
        if SOFTMAX and together:
            here = (b < B)[:, None] & (n < splits)[None, :]
            at = (s * B + b)[:, None] * splits + n[None, :]
            peak = tl.load(peaks + at, mask=here, other=float("-inf"))
            mass = tl.load(masses + at, mask=here, other=0.0)
            top = tl.where(b < B, tl.max(peak, 1), 0.0)
            total = tl.where(b < B, tl.sum(mass * tl.exp2(peak - top[:, None]), 1), 1.0)
            score += tl.exp2(similarity * _BITS_IN - top[:, None]) / total[:, None]
        else:
            score = similarity

    pattern = score.to(tl.int32, bitcast=True)
    # The bit patterns of negative floats are in reverse order.
    pattern = tl.where(pattern >= 0, pattern, pattern ^ 0x7FFFFFFF)
    candidate = (pattern.to(tl.int64) << 32) | (0x7FFFFFFF - rows).to(tl.int64)[None, :]
    candidate = tl.where((rows < K)[None, :], candidate, _LOWEST)
    out = candidates + ((tl.program_id(1).to(tl.int64) * B + b) * tiles + tile) * kept
    best = tl.max(candidate, 1)
    tl.store(out, best, mask=b < B)
    for t in range(1, kept):
        best = tl.max(tl.where(candidate < best[:, None], candidate, _LOWEST), 1)
        tl.store(out + t, best, mask=b < B)


@triton.jit
def _select_kernel(
    candidates,  # (R, B, C) int64, output of _rank_kernel; C = tiles * kept
    rows,  # output (R, B, m) int64: row numbers of queue entries, best first
    C, m,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Select the m greatest candidates, one after another. A program owns one query in one ranking."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for t in range(m):
        best = tl.full((), _LOWEST, tl.int64)
        for start in range(0, C, BLOCK_C):
            candidate = tl.load(candidates + b * C + start + c, mask=start + c < C, other=_LOWEST)
            best = tl.maximum(best, tl.max(tl.where(candidate < last, candidate, _LOWEST), 0))
        tl.store(rows + b * m + t, 0x7FFFFFFF - (best & 0x7FFFFFFF))
        last = best


# ---------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Blocks:
    """The block sizes of the pass over the queue.

    They are fixed, because an automatic search would make runs differ.
    """

    b: int  # queries of a program
    k: int  # queue entries read at once
    num_warps: int
    num_stages: int


def choose_blocks(B: int, D: int, dtype: torch.dtype, precision: str) -> Blocks:
    """Return large blocks that spill no register on sm_80 and sm_90. tests/test_resources.py compiles all of them."""
    b = 16 if B <= 16 else 64  # 16 is the smallest size of a matrix unit
    if dtype == torch.float32 and precision == "ieee":
        return Blocks(16, 32, 8, 2)
    if dtype == torch.float32:  # rounding to tf32 needs registers, and 64 queries of 256 numbers would spill
        return Blocks(32 if b == 64 and D == 256 else b, 32, 8, 2)
    return Blocks(b, 64 if D <= 128 else 32, 8 if b == 16 or D == 256 else 4, 3)


def _products(precision: str, D: int) -> str:
    """Return the precision of float32 products in Triton's terms, from the precision that torch allows.

    Exact products ("ieee") do not use the matrix units. The sum of three tf32 products ("tf32x3") is about as exact and
    takes half the time. On an H200 with B 128 and K 65536 the error of a loss was 9e-7, compared with 6e-7 for exact
    products. The error of a gradient was 1e-7 for both (docs/LOG.md). With D = 256, tf32x3 would spill registers.
    """
    return "tf32x3" if precision == "ieee" and D <= 128 else precision


def _dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype to which the kernels convert both tensors when they read them."""
    return torch.promote_types(a.dtype, b.dtype)


def _rows_contiguous(queue: Tensor) -> Tensor:
    """Return the queue itself if the numbers of each entry are contiguous, or else a contiguous copy.

    Entries may have gaps between them.
    """
    return queue if queue.stride(-1) == 1 else queue.contiguous()


class _Partials:
    """The outputs of `_partial_kernel`, with the shapes given there.

    Without gradient, `sums` and `positive_means` are empty.
    """

    def __init__(self, queries: Tensor, splits: int, gradient: bool) -> None:
        P, B, D = queries.shape

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=queries.device)

        self.peaks, self.masses = empty(P, B, splits), empty(P, B, splits)
        self.sums = empty(P, B, splits, D) if gradient else empty(0)
        self.key_bits, self.positive_bits = empty(P, B), empty(P, B)
        self.positive_means = empty(P, B, D) if gradient else empty(0)


def partial_launch(
    queries: Tensor,  # (P, B, D)
    keys: Tensor | None,  # (P, B, D); None to read the queue only
    queue: Tensor,  # (P, K, D)
    positives: Tensor,  # (P, B, M)
    temperature: float,
    gradient: bool,
    precision: str,  # precision of float32 products: "ieee" or "tf32"
) -> tuple[Launch, _Partials]:
    """Return the launch of `_partial_kernel` and its outputs."""
    P, B, D = queries.shape
    K, M = queue.shape[1], positives.shape[2]
    dtype = _dtype(queries, queue)
    blocks = choose_blocks(B, D, dtype, precision)
    row_blocks, tiles = triton.cdiv(B, blocks.b), triton.cdiv(K, blocks.k)
    # Two programs for each multiprocessor, if there are enough tiles.
    splits = max(1, min(2 * multiprocessors(queries.device) // (P * row_blocks), tiles, _MOST_SPLITS))
    tiles_per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, tiles_per_split)
    stream_programs = P * row_blocks * splits
    block_r = max(1, 1024 // D)
    gather_programs = 0 if keys is None else P * triton.cdiv(B, block_r)
    out = _Partials(queries, splits, gradient)
    launch = Launch(
        _partial_kernel,
        (stream_programs + gather_programs,),
        {
            "queries": queries, "keys": queries if keys is None else keys, "queue": queue, "positives": positives,
            "peaks": out.peaks, "masses": out.masses, "sums": out.sums, "key_bits": out.key_bits,
            "positive_bits": out.positive_bits, "positive_means": out.positive_means,
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1), "scale": _BITS / temperature,
            "B": B, "K": K, "M": M,
            "row_blocks": row_blocks, "splits": splits, "rows_per_split": tiles_per_split * blocks.k,
            "stream_programs": stream_programs,
        },
        {
            "D": D, "BLOCK_B": blocks.b, "BLOCK_K": blocks.k, "BLOCK_R": block_r, "GRADIENT": gradient,
            "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, "PRECISION": _products(precision, D),
            "WIDEN": INTERPRETED,
        },
        blocks.num_warps,
        blocks.num_stages,
        _REGISTERS,
    )  # fmt: skip
    return launch, out


def merge_launch(
    keys: Tensor,  # (P, B, D)
    partials: _Partials,
    temperature: float,
    gradient: bool,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """Return the launch of `_merge_kernel` and its losses, similarities and gradient (empty if not computed)."""
    P, B, D = keys.shape
    splits = partials.peaks.shape[2]
    losses = torch.empty(P, dtype=torch.float32, device=keys.device)
    similarities = torch.empty(2, P, dtype=torch.float32, device=keys.device)
    result = torch.empty((P, B, D) if gradient else (0,), dtype=torch.float32, device=keys.device)
    block_n = triton.next_power_of_2(splits)
    launch = Launch(
        _merge_kernel,
        (1 + B if gradient else 1, P),
        {
            "keys": keys, "peaks": partials.peaks, "masses": partials.masses, "sums": partials.sums,
            "key_bits": partials.key_bits, "positive_bits": partials.positive_bits,
            "positive_means": partials.positive_means, "losses": losses, "similarities": similarities,
            "gradient": result, "scale": _BITS / temperature, "B": B, "splits": splits,
        },
        {"D": D, "BLOCK_N": block_n, "BLOCK_R": max(1, 2048 // block_n)},
        num_warps=8 if block_n * D > 4096 else 4,
        num_stages=1,
        max_registers=_REGISTERS,
    )  # fmt: skip
    return launch, (losses, similarities, result)


def rank_launch(
    features: Tensor,  # (S, B, D)
    queue: Tensor,  # (S, K, D)
    peaks: Tensor,  # (S, B, N)
    masses: Tensor,  # (S, B, N)
    m: int,
    each: bool,  # rank by each similarity alone
    together: bool,  # rank by the sum of all softmaxes
    precision: str,
) -> tuple[Launch, Tensor]:
    """Return the launch of `_rank_kernel` and its candidates."""
    S, B, D = features.shape
    K, splits = queue.shape[1], peaks.shape[2]
    dtype = _dtype(features, queue)
    ieee, tf32 = (dtype == torch.float32 and precision == name for name in ("ieee", "tf32"))
    block_b, block_k, num_warps = 16 if ieee or B <= 16 else 32, 64, 8
    if ieee or (tf32 and D > 128):
        block_k = 32 if tf32 or D <= 128 else 16
    row_blocks, tiles = triton.cdiv(B, block_b), triton.cdiv(K, block_k)
    kept = min(m, block_k)
    rankings = (S if each else 0) + (1 if together else 0)
    candidates = torch.empty((rankings, B, tiles, kept), dtype=torch.int64, device=features.device)
    launch = Launch(
        _rank_kernel,
        (row_blocks * tiles, rankings),  # a GPU allows 2^31 programs along the first axis, 65535 along the second
        {
            "features": features, "queue": queue, "peaks": peaks, "masses": masses, "candidates": candidates,
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1),
            "first_ranking": 0 if each else S, "row_blocks": row_blocks, "S": S, "B": B, "K": K,
            "splits": splits, "tiles": tiles, "kept": kept,
        },
        {
            "SOFTMAX": together, "D": D, "BLOCK_B": block_b, "BLOCK_K": block_k,
            "BLOCK_N": triton.next_power_of_2(splits),
            "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, "PRECISION": _products(precision, D),
            "WIDEN": INTERPRETED,
        },
        num_warps,
        num_stages=1,
        max_registers=_REGISTERS,
    )  # fmt: skip
    return launch, candidates


def select_launch(candidates: Tensor, m: int) -> tuple[Launch, Tensor]:
    """Return the launch of `_select_kernel` on candidates (R, B, tiles, kept), and its row numbers (R, B, m)."""
    R, B, tiles, kept = candidates.shape
    C = tiles * kept
    rows = torch.empty((R, B, m), dtype=torch.int64, device=candidates.device)
    block_c = min(triton.next_power_of_2(C), 2048)
    arguments: dict[str, Tensor | int | float] = {"candidates": candidates, "rows": rows, "C": C, "m": m}
    return Launch(_select_kernel, (R * B,), arguments, {"BLOCK_C": block_c}, num_stages=1), rows


# ---------------------------------------------------------------- registered ops


@torch.library.custom_op("dclr::info_nce", mutates_args=())
def info_nce_op(
    queries: Tensor, keys: Tensor, queue: Tensor, positives: Tensor | None, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (P,), the similarities (2, P) and the gradient of each pair's loss with respect to its queries.

    The gradient is (P, B, D) float32, or an empty tensor if `gradient` is False. `_merge_kernel` describes the outputs.
    """
    P, B, _ = queries.shape
    queries, keys, queue = queries.contiguous(), keys.contiguous(), _rows_contiguous(queue)
    if positives is None:
        positives = torch.empty((P, B, 0), dtype=torch.int64, device=queries.device)
    launch, partials = partial_launch(
        queries, keys, queue, positives.contiguous(), temperature, gradient, float32_precision()
    )
    launch()
    launch, results = merge_launch(keys, partials, temperature, gradient)
    launch()
    return results


@info_nce_op.register_fake
def _(queries, keys, queue, positives, temperature, gradient):
    P = queries.shape[0]

    def empty(*shape):
        return queries.new_empty(shape, dtype=torch.float32)

    return empty(P), empty(2, P), empty(*queries.shape) if gradient else empty(0)


@torch.library.custom_op("dclr::info_nce_backward", mutates_args=())
def info_nce_backward_op(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient (P, B, D) times upstream (P,), rounded once to dtype.

    It is a separate op for two reasons. It multiplies and rounds in one kernel. It has no derivative, so a second
    derivative is an error instead of silently wrong.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream[:, None, None], out=out)


@info_nce_backward_op.register_fake
def _(gradient, upstream, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # otherwise autograd writes zeros for the outputs without gradient
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, losses_gradient, similarities_gradient, gradient_gradient):
    (gradient,) = ctx.saved_tensors
    if losses_gradient is None:
        return None, None, None, None, None, None
    return torch.ops.dclr.info_nce_backward(gradient, losses_gradient, ctx.dtype), None, None, None, None, None


info_nce_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dclr::mine_positives", mutates_args=())
def mine_positives_op(features: Tensor, queue: Tensor, m: int, each: bool, together: bool) -> Tensor:
    """Return the row numbers (R, B, m) of the m >= 1 queue entries most similar to each feature.

    features are (S, B, D) and queue is (S, K, D). The R rankings are one for each similarity if `each` is True, then
    one for all similarities together if `together` is True.
    """
    features, queue = features.contiguous(), _rows_contiguous(queue)
    S, B, _ = features.shape
    if not together:
        peaks = masses = torch.empty((S, B, 1), dtype=torch.float32, device=features.device)
    else:
        none = torch.empty((S, B, 0), dtype=torch.int64, device=features.device)
        launch, partials = partial_launch(features, None, queue, none, 1.0, False, float32_precision())
        launch()
        peaks, masses = partials.peaks, partials.masses
    launch, candidates = rank_launch(features, queue, peaks, masses, m, each, together, float32_precision())
    launch()
    launch, rows = select_launch(candidates, m)
    launch()
    return rows


@mine_positives_op.register_fake
def _(features, queue, m, each, together):
    S, B, _ = features.shape
    return features.new_empty(((S if each else 0) + (1 if together else 0), B, m), dtype=torch.int64)


def launches_to_compile() -> list[tuple[str, Launch]]:
    """Return every kernel in every configuration that the launchers choose, with a label, to be compiled ahead of time.

    The tensors are on the meta device, so they have no memory.
    """
    P, K, M = 5, 2048, 5
    kinds = (
        ("bfloat16", torch.bfloat16, "tf32"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    )

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launches = []
    for D in EMBEDDING_SIZES:
        for name, dtype, precision in kinds:
            queue = meta(P, K, D, dtype=dtype)
            for B in (16, 40):
                label = f"D {D}, {name}, B {'to 16' if B == 16 else 'above 16'}"
                queries, positives = meta(P, B, D, dtype=dtype), meta(P, B, M, dtype=torch.int64)
                for gradient in (True, False):
                    launch, partials = partial_launch(queries, queries, queue, positives, 0.07, gradient, precision)
                    launches.append((f"{label}{', gradient' if gradient else ''}", launch))
                most = _Partials(queries[:2], _MOST_SPLITS, gradient=False)
                for each, together in ((True, False), (True, True)):
                    launch, candidates = rank_launch(
                        queries[:2], queue[:2], most.peaks, most.masses, M, each, together, precision
                    )
                    launches.append((f"{label}, each{' and all' if together else ''}", launch))
        # The middle number of splits makes the largest tile of 4 warps.
        for splits in sorted({1, min(4096 // D, _MOST_SPLITS), _MOST_SPLITS}):
            partials = _Partials(queries, splits, gradient=True)
            launches.append((f"D {D}, {splits} split(s)", merge_launch(queries, partials, 0.07, True)[0]))
    for name, dtype, precision in kinds:
        # Triton compiles an integer argument of 1 as a constant.
        one, rows = meta(1, 1, 32, dtype=dtype), meta(1, 1, 1, dtype=torch.int64)
        label = f"D 32, {name}, all sizes 1"
        launch, partials = partial_launch(one, one, one, rows, 0.07, True, precision)
        launches += [(label, launch), (label, merge_launch(one, partials, 0.07, True)[0])]
        launch, candidates = rank_launch(one, one, partials.peaks, partials.masses, 1, True, True, precision)
        launches += [(label, launch), (label, select_launch(candidates, 1)[0])]
    for tiles in (1, 1024):
        candidates = meta(3, 40, tiles, M, dtype=torch.int64)
        launches.append((f"{tiles} tile(s)", select_launch(candidates, M)[0]))
    return launches
