"""The contrastive loss and the mining of positives in Triton, without logits in memory.

The loss. Keys and queue receive no gradient, so the forward pass can compute the queries' gradient too. With logits
l_ij = q_i . x_j / temperature, where x_0 is the query's key and x_1 .. x_K are the queue entries,

    loss_i = log sum_j exp(l_ij) - log sum_(j positive) exp(l_ij)
    d loss_i / d q_i = (sum_j p_ij x_j - sum_(j positive) r_ij x_j) / temperature

where p_i is the softmax over all j and r_i is the softmax over the positives. With a logit scale s_j for each queue
entry, l_ij is s_j times as large, and x_j in both sums becomes s_j x_j. The first sum is attention with the queue as
both keys and values. The online softmax of FlashAttention (Dao et al., arXiv 2205.14135) therefore computes this sum
together with the loss. One launch reads the queue once and leaves one partial result for each split of the queue. The
last program of each pair merges the loss of the pair. The backward launch merges the gradient and multiplies it by the
upstream gradient. It does not read the queue, so the queue may be overwritten between the two passes.

Mining. One launch computes the softmax normalisers and a floor for each ranking: a score that at least m queue entries
reach. The next launch reads the queue once more, ranks it by all similarities at once, and keeps the few entries that
reach the floor. `_rank_kernel` explains why the result is exact.

Letters: P pairs, B clips, D embedding size, K queue entries, M positives of a query, m positives to mine,
S similarities ranked together, R rankings (S, and one more for the sum of the softmaxes),
N splits (consecutive ranges of queue entries that different programs read).
A query has N + 1 slots for partial results: one for each split, and the last one for its key.
Logits are divided by log 2 and then called bits, because a GPU has an instruction for exp2.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from dclr.kernels.backend import INTERPRETED, compute_capability, float32_precision, multiprocessors
from dclr.kernels.launch import Launch
from dclr.kernels.rounding_triton import rounded
from dclr.kernels.types import EMBEDDING_SIZES

_BITS = math.log2(math.e)  # exp(x) = exp2(x * _BITS)
# The most registers that a thread can have. Without a limit, ptxas (CUDA 12.8) tries to run more programs at once. It
# then moves 8 to 24 bytes that a loop does not use to local memory, even in kernels of 40 registers. With this limit it
# does not.
_REGISTERS = 255
_MOST_SLOTS = 64  # of a query, because one tile merges them
_MOST_PEAKS = 128  # splits in mining, which merges two numbers of each split, and no embedding
_POSITIVES = 8  # positives of a query that are loaded at once
_LOWEST = tl.constexpr(-(2**63))  # marks a missing candidate: lower than every candidate
_BITS_IN = tl.constexpr(_BITS)
_LN2 = tl.constexpr(math.log(2))
_SLACK = tl.constexpr(1e-4)  # by which _merge_floors lowers a floor


# ---------------------------------------------------------------- kernels: products and arrivals


@triton.jit
def _operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Convert a tile that was read from memory to an operand of `tl.dot`.

    WIDEN converts bfloat16 to float32, because the interpreter of Triton 3.6 multiplies the bit patterns of bfloat16.
    The result is the same, because a product of two bfloat16 numbers is exact in float32. The interpreter does not
    round to tf32.
    """
    x = x.to(DTYPE)
    if WIDEN:
        x = x.to(tl.float32)
    elif PRECISION == "tf32" and x.dtype == tl.float32:
        x = _to_tf32(x)
    return x


@triton.jit
def _to_tf32(x):
    """Round x to the nearest tf32 number.

    The matrix units would drop the 13 bits that tf32 does not have, which makes every product too small. On an H200 the
    error of a loss was then 1e-3, compared with 7e-6 in torch (docs/LOG.md).
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _read_rows(start, rows, end, stride_row, D: tl.constexpr):
    """Return rows (BLOCK, D) of a matrix at `start`. Rows from `end` on are 0."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + tl.arange(0, D)[None, :]
    return tl.load(start + offsets, mask=(rows < end)[:, None], other=0.0)


@triton.jit
def _terms(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return a tuple of operands for `_add_product`, whose sum is x.

    Precision "bf16x3" has two: x rounded to bfloat16, and what the rounding leaves. They are converted once for all
    products of a tile. Triton's own "bf16x3" would convert them again for each product.
    """
    if PRECISION == "bf16x3":
        x = x.to(tl.float32)
        high = rounded(x, tl.bfloat16, WIDEN)
        low = rounded(x - high.to(tl.float32), tl.bfloat16, WIDEN)
        return _operand(high, tl.bfloat16, PRECISION, WIDEN), _operand(low, tl.bfloat16, PRECISION, WIDEN)
    else:
        return (_operand(x, DTYPE, PRECISION, WIDEN),)


@triton.jit
def _add_product(a, b, acc, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a b in float32, or acc + a b^T with TRANSPOSED. a and b are tuples from `_terms`.

    Precision "bf16x3" omits the product of the two small terms, which is at most 2^-16 of the whole.
    """
    if PRECISION == "bf16x3":
        acc = tl.dot(a[1], tl.trans(b[0]) if TRANSPOSED else b[0], acc)
        acc = tl.dot(a[0], tl.trans(b[1]) if TRANSPOSED else b[1], acc)
        acc = tl.dot(a[0], tl.trans(b[0]) if TRANSPOSED else b[0], acc)
    else:
        acc = tl.dot(a[0], tl.trans(b[0]) if TRANSPOSED else b[0], acc, input_precision=PRECISION)
    return acc


@triton.jit
def _similarities(q, x, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """Return the products (BLOCK_B, BLOCK_K) of queries (BLOCK_B, D) and queue entries (BLOCK_K, D) in float32."""
    return tl.dot(q, tl.trans(x), tl.zeros((BLOCK_B, BLOCK_K), tl.float32), input_precision=PRECISION)


@triton.jit
def _arrives_last(arrivals, programs):
    """Count this program as arrived. Return True in the last of `programs` programs, and set the counter to 0 there.

    The last program sees what every other program wrote before it arrived. Reasons: the barrier orders the writes of
    this program's threads before its atomic operation. That operation releases these writes to the device and acquires
    those of earlier arrivals. The next launch on the stream finds the counter at 0 again.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


# ---------------------------------------------------------------- kernels: the loss


@triton.jit
def _stream_queue(
    queries, queue, logit_scale, peaks, masses, sums, pair, block, split, stride_pair, stride_row, scale, B, K, slots,
    rows_per_split,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the online softmax of BLOCK_B queries of one pair over one split of its queue.

    Pointers as in `_loss_kernel`.
    """
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, D)
    q = _terms(_read_rows(queries + pair * B * D, b, B, D, D), DTYPE, PRECISION, WIDEN)

    peak = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_B,), tl.float32)
    acc = tl.zeros((BLOCK_B, D), tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, K), BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        x = _terms(_read_rows(queue + pair * stride_pair, rows, K, stride_row, D), DTYPE, PRECISION, WIDEN)
        bits = _add_product(q, x, tl.zeros((BLOCK_B, BLOCK_K), tl.float32), True, PRECISION) * scale
        if SCALED:
            scales = tl.load(logit_scale + rows, mask=rows < K, other=0.0)
            bits *= scales[None, :]
        bits = tl.where((rows < K)[None, :], bits, float("-inf"))
        higher = tl.maximum(peak, tl.max(bits, 1))
        weights = tl.exp2(bits - higher[:, None])
        rescale = tl.exp2(peak - higher)
        mass = mass * rescale + tl.sum(weights, 1)
        if GRADIENT:
            if SCALED:
                weights *= scales[None, :]
            weights = _terms(weights, DTYPE, PRECISION, WIDEN)
            acc = _add_product(weights, x, acc * rescale[:, None], False, PRECISION)
        peak = higher

    out = (pair * B + b) * slots + split
    tl.store(peaks + out, peak, mask=b < B)
    tl.store(masses + out, mass, mask=b < B)
    if GRADIENT:
        tl.store(sums + out[:, None] * D + d[None, :], acc, mask=(b < B)[:, None])


@triton.jit
def _gather_positives(
    queries, keys, queue, positives, logit_scale, peaks, masses, sums, positive_bits, positive_means, pair, block,
    stride_pair, stride_row, scale, B, K, M, slots,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Compute the online softmax of BLOCK_R queries of one pair over their key and their positives.

    BLOCK_M positives are read at once. The key is the first value of the softmax. It is also the only entry of the last
    slot of `peaks`, `masses` and `sums`. Pointers as in `_loss_kernel`.
    """
    b = block * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D)
    t = tl.arange(0, BLOCK_M)
    valid_b = b < B
    row = (pair * B + b)[:, None] * D + d[None, :]
    q = tl.load(queries + row, mask=valid_b[:, None], other=0.0).to(tl.float32)
    acc = tl.load(keys + row, mask=valid_b[:, None], other=0.0).to(tl.float32)
    peak = tl.sum(q * acc, 1) * scale
    mass = tl.full((BLOCK_R,), 1.0, tl.float32)
    key_slot = (pair * B + b) * slots + slots - 1
    tl.store(peaks + key_slot, peak, mask=valid_b)
    tl.store(masses + key_slot, mass, mask=valid_b)
    if GRADIENT:
        tl.store(sums + key_slot[:, None] * D + d[None, :], acc, mask=valid_b[:, None])

    own = positives + (pair * B + b)[:, None] * M + t[None, :]  # (BLOCK_R, BLOCK_M)
    for start in range(0, M, BLOCK_M):
        j = tl.load(own + start, mask=valid_b[:, None] & (start + t < M)[None, :], other=-1)
        repeated = _is_among(j, j, t[None, :] < t[:, None])
        for before in range(0, start, BLOCK_M):
            earlier = tl.load(own + before, mask=valid_b[:, None], other=-1)
            repeated = repeated | _is_among(j, earlier, t[None, :] < BLOCK_M)
        is_positive = (j >= 0) & (j < K) & (repeated == 0)
        x = tl.load(
            queue + pair * stride_pair + tl.where(is_positive, j, 0)[:, :, None] * stride_row + d[None, None, :],
            mask=is_positive[:, :, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        bits = tl.sum(q[:, None, :] * x, 2) * scale
        if SCALED:
            scales = tl.load(logit_scale + j, mask=is_positive, other=0.0)
            bits *= scales
        bits = tl.where(is_positive, bits, float("-inf"))
        higher = tl.maximum(peak, tl.max(bits, 1))
        weights = tl.exp2(bits - higher[:, None])
        rescale = tl.exp2(peak - higher)
        mass = mass * rescale + tl.sum(weights, 1)
        if GRADIENT:
            if SCALED:
                weights *= scales
            acc = acc * rescale[:, None] + tl.sum(weights[:, :, None] * x, 1)
        peak = higher

    tl.store(positive_bits + pair * B + b, peak + tl.log2(mass), mask=valid_b)
    if GRADIENT:
        tl.store(positive_means + row, acc / mass[:, None], mask=valid_b[:, None])


@triton.jit
def _is_among(j, others, compared):
    """Return 1 for each number of j (R, M) that is among the `others` (R, M) of its row, and 0 for the rest.

    compared (M, M) or (1, M): False for pairs of positions that are not compared.
    """
    equal = (j[:, :, None] == others[:, None, :]) & compared[None, :, :]
    return tl.max(equal.to(tl.int32), 2)


@triton.jit
def _merge_losses(
    peaks, masses, positive_bits, losses, similarities, pair, pairs, scale, B, slots,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Merge the slots of all queries of one pair into the loss and the two similarities of the pair.

    Pointers as in `_loss_kernel`.
    """
    n = tl.arange(0, BLOCK_N)
    loss = tl.zeros((BLOCK_R,), tl.float32)
    similar = tl.zeros((BLOCK_R,), tl.float32)
    hardest = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, B, BLOCK_R):
        b = start + tl.arange(0, BLOCK_R)
        here = (b < B)[:, None] & (n < slots)[None, :]
        at = (pair * B + b)[:, None] * slots + n[None, :]
        peak = tl.load(peaks + at, mask=here, other=float("-inf"))
        mass = tl.load(masses + at, mask=here, other=0.0)
        positive = tl.load(positive_bits + pair * B + b, mask=b < B, other=0.0)
        top = tl.where(b < B, tl.max(peak, 1), 0.0)
        total = tl.where(b < B, tl.sum(mass * tl.exp2(peak - top[:, None]), 1), 1.0)
        loss += top + tl.log2(total) - positive
        is_key = (n == slots - 1)[None, :]
        similar += tl.sum(tl.where(is_key & here, peak, 0.0), 1)
        hardest += tl.where(b < B, tl.max(tl.where(is_key, float("-inf"), peak), 1), 0.0)
    tl.store(losses + pair, tl.sum(loss, 0) / B * _LN2)
    tl.store(similarities + pair, tl.sum(similar, 0) / B / scale)
    tl.store(similarities + pairs + pair, tl.sum(hardest, 0) / B / scale)


@triton.jit
def _loss_kernel(
    queries,  # (P, B, D)
    keys,  # (P, B, D)
    queue,  # (P, K, D), with stride_pair between pairs and stride_row between entries
    positives,  # (P, B, M) int64
    logit_scale,  # (K,) float32, read with SCALED only
    peaks,  # output (P, B, N + 1): greatest logit of each split, in bits; the last slot holds the key alone
    masses,  # output (P, B, N + 1): sum of exp2(logit - peak)
    sums,  # output (P, B, N + 1, D): sum of exp2(logit - peak) x, or of exp2(logit - peak) logit_scale x with SCALED
    positive_bits,  # output (P, B): log2 of the sum of exp2(logit) over key and positives
    positive_means,  # output (P, B, D): mean of key and positives, weighted by exp2(logit); with SCALED also scaled
    losses,  # output (P,)
    similarities,  # output (2, P): mean over B of query . key, and of the greatest (scaled) query . queue entry
    arrivals,  # (P,) int32: 0 before and after
    stride_pair, stride_row, scale, B, K, M, pairs, row_blocks, splits, rows_per_split, gather_blocks,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MERGE_R: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the partial results of each split, the results of the positives, and the losses.

    The first P * row_blocks * splits programs own BLOCK_B queries of one pair and one split. Each other program owns
    BLOCK_R queries of one pair and reads their key and positives. No program waits for another. The last program of a
    pair to arrive merges the pair's loss. It adds the splits in the order of their numbers, whichever program arrives
    last, so the result is the same in every run.
    """
    pid = tl.program_id(0)
    of_a_pair = row_blocks * splits
    if pid < pairs * of_a_pair:
        pair = (pid // of_a_pair).to(tl.int64)
        # The block changes fastest, so that neighbouring programs read the same queue entries.
        _stream_queue(
            queries, queue, logit_scale, peaks, masses, sums, pair, pid % row_blocks, pid // row_blocks % splits,
            stride_pair, stride_row, scale, B, K, splits + 1, rows_per_split,
            D, BLOCK_B, BLOCK_K, GRADIENT, SCALED, DTYPE, PRECISION, WIDEN,
        )  # fmt: skip
    else:
        pid -= pairs * of_a_pair
        pair = (pid // gather_blocks).to(tl.int64)
        _gather_positives(
            queries, keys, queue, positives, logit_scale, peaks, masses, sums, positive_bits, positive_means, pair,
            pid % gather_blocks, stride_pair, stride_row, scale, B, K, M, splits + 1,
            D, BLOCK_R, BLOCK_M, GRADIENT, SCALED,
        )  # fmt: skip
    if _arrives_last(arrivals + pair, of_a_pair + gather_blocks):
        _merge_losses(
            peaks, masses, positive_bits, losses, similarities, pair, pairs, scale, B, splits + 1, BLOCK_N, MERGE_R
        )


@triton.jit
def _gradient_kernel(
    peaks, masses, sums, positive_means,  # outputs of _loss_kernel
    upstream,  # (P,), with `stride` between pairs: gradient with respect to the losses
    gradient,  # output (P, B, D): gradient with respect to the queries
    stride, scale, B, slots,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the slots of one query into its gradient. Program (b, p) owns query b of pair p."""
    pair = tl.program_id(1).to(tl.int64)
    row = pair * B + tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    peak = tl.load(peaks + row * slots + n, mask=n < slots, other=float("-inf"))
    mass = tl.load(masses + row * slots + n, mask=n < slots, other=0.0)
    partial = tl.load(
        sums + (row * slots + n)[:, None] * D + d[None, :], mask=(n < slots)[:, None], other=0.0
    )  # fmt: skip
    weight = tl.exp2(peak - tl.max(peak, 0))
    mean = tl.sum(partial * weight[:, None], 0) / tl.sum(mass * weight, 0)
    positive_mean = tl.load(positive_means + row * D + d)
    # The gradient at the top of this file: mean is sum_j p_ij x_j and positive_mean is sum_(j positive) r_ij x_j.
    # 1 / temperature = scale ln 2, and 1 / B comes from the mean over B queries.
    own = (mean - positive_mean) * (scale * _LN2 / B)
    tl.store(gradient + row * D + d, own * tl.load(upstream + pair * stride))


# ---------------------------------------------------------------- kernels: mining


@triton.jit
def _read_tiles(
    queue, rows, end, stride_pair, stride_row,
    S: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return the same rows of each of S matrices, a tuple of S operands (BLOCK, D). Rows from `end` on are 0."""
    tiles = ()
    for s in tl.static_range(S):
        start = queue + (tl.zeros((), tl.int64) + s) * stride_pair
        x = _read_rows(start, rows, end, stride_row, D)
        tiles += (_operand(x, DTYPE, PRECISION, WIDEN),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _floor_kernel(
    features,  # (S, B, D)
    queue,  # (S, K, D), with stride_pair between similarities and stride_row between entries
    peaks,  # scratch (R, B, N): greatest similarity of each split; the last ranking has the greatest sum of S
    masses,  # scratch (S, B, N): sum of exp(similarity - peak)
    tops,  # output (S, B): greatest similarity
    shares,  # output (S, B): 1 / sum of exp(similarity - top) over the queue
    floors,  # output (R, B): a score that at least m queue entries reach
    counts,  # output (R, B) int32: zeros, for _rank_kernel
    arrivals,  # (row_blocks,) int32: 0 before and after
    stride_pair, stride_row, B, K, m, row_blocks, splits, rows_per_split,
    TOGETHER: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute what `_rank_kernel` needs to know about the whole queue: softmax normalisers and floors.

    A program owns BLOCK_B features and one split of all S queues. The last program of a block of features merges the
    splits.

    The splits have different greatest entries. At least m entries therefore reach the m-th greatest of the N peaks,
    which is the floor of a similarity. If N < m, the floor is minus infinity. For the sum of softmaxes, with L_s the
    logarithm of the sum of exp(similarity_s) over the queue, the inequality of arithmetic and geometric means says

        sum_s exp(similarity_s - L_s)  >=  S exp(sum_s (similarity_s - L_s) / S)

    so the m-th greatest of the N peaks of sum_s similarity_s gives that floor.
    """
    block = tl.program_id(0) % row_blocks  # neighbouring programs read the same queue entries
    split = tl.program_id(0) // row_blocks
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    q = _read_tiles(features, b, B, B * D, D, S, D, DTYPE, PRECISION, WIDEN)
    peak = (tl.full((BLOCK_B,), float("-inf"), tl.float32),) * S
    mass = (tl.zeros((BLOCK_B,), tl.float32),) * S
    peak_of_sum = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, K), BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        x = _read_tiles(queue, rows, K, stride_pair, stride_row, S, D, DTYPE, PRECISION, WIDEN)
        total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        peak_now = ()
        mass_now = ()
        for s in tl.static_range(S):
            similarity = _similarities(q[s], x[s], BLOCK_B, BLOCK_K, PRECISION)
            similarity = tl.where((rows < K)[None, :], similarity, float("-inf"))
            higher = tl.maximum(peak[s], tl.max(similarity, 1))
            peak_now += (higher,)  # type: ignore[assignment]
            if TOGETHER:
                weights = tl.exp2((similarity - higher[:, None]) * _BITS_IN)
                rescaled = mass[s] * tl.exp2((peak[s] - higher) * _BITS_IN)
                mass_now += (rescaled + tl.sum(weights, 1),)  # type: ignore[assignment]
                total += similarity
        peak = peak_now
        if TOGETHER:
            mass = mass_now
            peak_of_sum = tl.maximum(peak_of_sum, tl.max(total, 1))

    out = b.to(tl.int64) * splits + split
    for s in tl.static_range(S):
        tl.store(peaks + s * B * splits + out, peak[s], mask=b < B)
        if TOGETHER:
            tl.store(masses + s * B * splits + out, mass[s], mask=b < B)
    if TOGETHER:
        tl.store(peaks + S * B * splits + out, peak_of_sum, mask=b < B)

    if _arrives_last(arrivals + block, splits):
        _merge_floors(peaks, masses, tops, shares, floors, counts, b, B, m, splits, TOGETHER, S, BLOCK_N)


@triton.jit
def _merge_floors(
    peaks, masses, tops, shares, floors, counts, b, B, m, splits, TOGETHER: tl.constexpr, S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the splits of the features b into normalisers and floors. Pointers as in `_floor_kernel`."""
    n = tl.arange(0, BLOCK_N)
    here = (b < B)[:, None] & (n < splits)[None, :]
    at = b.to(tl.int64)[:, None] * splits + n[None, :]
    normalisers = tl.zeros(b.shape, tl.float32)  # sum over s of L_s, in bits
    for s in tl.static_range(S):
        peak = tl.load(peaks + s * B * splits + at, mask=here, other=float("-inf"))
        floor = _mth_greatest(peak, m, splits)
        # _rank_kernel may round a similarity differently.
        tl.store(floors + s * B + b, floor - _SLACK * (1 + tl.abs(floor)), mask=b < B)
        tl.store(counts + s * B + b, tl.zeros(b.shape, tl.int32), mask=b < B)
        if TOGETHER:
            mass = tl.load(masses + s * B * splits + at, mask=here, other=0.0)
            top = tl.where(b < B, tl.max(peak, 1), 0.0)
            total = tl.where(b < B, tl.sum(mass * tl.exp2((peak - top[:, None]) * _BITS_IN), 1), 1.0)
            tl.store(tops + s * B + b, top, mask=b < B)
            tl.store(shares + s * B + b, 1 / total, mask=b < B)
            normalisers += top * _BITS_IN + tl.log2(total)
    if TOGETHER:
        peak = tl.load(peaks + S * B * splits + at, mask=here, other=float("-inf"))
        floor = S * tl.exp2((_mth_greatest(peak, m, splits) * _BITS_IN - normalisers) / S)
        tl.store(floors + S * B + b, floor * (1 - _SLACK), mask=b < B)
        tl.store(counts + S * B + b, tl.zeros(b.shape, tl.int32), mask=b < B)


@triton.jit
def _mth_greatest(peaks, m, splits):
    """Return the m-th greatest number of each row of peaks (BLOCK_B, BLOCK_N). Equal numbers count once.

    It is minus infinity for a row of fewer different numbers.
    """
    floor = tl.max(peaks, 1)
    for _ in range(1, tl.minimum(m, splits + 1)):
        floor = tl.max(tl.where(peaks < floor[:, None], peaks, float("-inf")), 1)
    return floor


@triton.jit
def _rank_kernel(
    features,  # (S, B, D)
    queue,  # (S, K, D), with stride_pair between similarities and stride_row between entries
    tops, shares, floors,  # outputs of _floor_kernel
    candidates,  # scratch (R, B, most) int64: entries that reach the floor, in any order
    counts,  # scratch (R, B) int32: 0 before; number of candidates
    rows_found,  # output (R, B, m) int64: indices of queue entries, best first
    arrivals,  # (row_blocks,) int32: 0 before and after
    stride_pair, stride_row, B, K, m, row_blocks, splits, rows_per_split, kept, most,
    TOGETHER: tl.constexpr, AHEAD: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Find the m best queue entries of every feature in each of R rankings, in one pass over the queue.

    A program owns BLOCK_B features and one split of all S queues. For each tile of BLOCK_K queue entries it computes
    the S similarities once. Each is the score of its own ranking. The sum of their softmaxes is the score of the last
    ranking, which only exists with TOGETHER. Entries that reach the feature's floor become candidates
    (`_append_candidates`). The last program of a block of features selects the m best candidates
    (`_select_candidates`).

    The result is exact. At least m entries reach the floor, so each of the m best entries does. Few others do. With 64
    splits and m = 5, 5.2 of 65,536 random entries reach the floor of a similarity on average. So most tiles of a query
    add no candidate.

    With AHEAD, the tiles of the next iteration are read before the current ones are used. The compiler does not do this
    in a loop that contains another loop.
    """
    block = tl.program_id(0) % row_blocks  # neighbouring programs read the same queue entries
    split = tl.program_id(0) // row_blocks
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, K)
    rows = first + tl.arange(0, BLOCK_K)
    q = _read_tiles(features, b, B, B * D, D, S, D, DTYPE, PRECISION, WIDEN)
    if AHEAD:
        x = _read_tiles(queue, rows, end, stride_pair, stride_row, S, D, DTYPE, PRECISION, WIDEN)
    for start in range(first, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        if AHEAD:
            ahead = _read_tiles(queue, rows + BLOCK_K, end, stride_pair, stride_row, S, D, DTYPE, PRECISION, WIDEN)
        else:
            x = _read_tiles(queue, rows, end, stride_pair, stride_row, S, D, DTYPE, PRECISION, WIDEN)
        together = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for s in tl.static_range(S):
            similarity = _similarities(q[s], x[s], BLOCK_B, BLOCK_K, PRECISION)
            _append_candidates(similarity, s, floors, candidates, counts, b, rows, B, K, kept, most)
            if TOGETHER:
                top = tl.load(tops + s * B + b, mask=b < B, other=0.0)
                share = tl.load(shares + s * B + b, mask=b < B, other=0.0)
                together += tl.exp2((similarity - top[:, None]) * _BITS_IN) * share[:, None]
        if TOGETHER:
            _append_candidates(together, S, floors, candidates, counts, b, rows, B, K, kept, most)
        if AHEAD:
            x = ahead

    if _arrives_last(arrivals + block, splits):
        for ranking in tl.static_range(S + TOGETHER):
            _select_candidates(ranking, candidates, counts, rows_found, b, B, m, most, BLOCK_C)


@triton.jit
def _append_candidates(score, ranking, floors, candidates, counts, b, rows, B, K, kept, most):
    """Append the entries of a tile whose score (BLOCK_B, BLOCK_K) reaches the floor: the `kept` best of each feature.

    A candidate is an int64. Its upper half orders candidates by score. Its lower half is the index of the entry,
    reversed, so that of two equal scores the lower index is the greater candidate. No two candidates are equal. The
    next best is therefore the greatest candidate below the last one, without sorting. Pointers as in `_rank_kernel`.
    """
    floor = tl.load(floors + ranking * B + b, mask=b < B, other=float("inf"))
    # NaN reaches every floor, so that with a diverged network every feature has candidates.
    reaches = ((score < floor[:, None]) == 0) & (b < B)[:, None] & (rows < K)[None, :]
    if tl.max(tl.max(reaches.to(tl.int32), 1), 0) > 0:
        pattern = score.to(tl.int32, bitcast=True)
        # The bit patterns of negative floats are in reverse order.
        pattern = tl.where(pattern >= 0, pattern, pattern ^ 0x7FFFFFFF)
        candidate = (pattern.to(tl.int64) << 32) | (0x7FFFFFFF - rows).to(tl.int64)[None, :]
        candidate = tl.where(reaches, candidate, _LOWEST)
        best = tl.max(candidate, 1)
        own = ranking * B + b.to(tl.int64)
        taken = 0
        while (taken < kept) & (tl.max(best, 0) > _LOWEST):
            place = tl.atomic_add(counts + own, 1, mask=best > _LOWEST, sem="relaxed", scope="gpu")
            tl.store(candidates + own * most + place, best, mask=best > _LOWEST)
            candidate = tl.where(candidate < best[:, None], candidate, _LOWEST)
            best = tl.max(candidate, 1)
            taken += 1


@triton.jit
def _select_candidates(ranking, candidates, counts, rows_found, b, B, m, most, BLOCK_C: tl.constexpr):
    """Select the m greatest candidates of BLOCK_B features, one after another. Pointers as in `_rank_kernel`.

    Candidates are all different, so the order in which programs appended them does not matter.
    """
    c = tl.arange(0, BLOCK_C)
    own = ranking * B + b.to(tl.int64)
    count = tl.load(counts + own, mask=b < B, other=0)
    longest = tl.max(count, 0)
    last = tl.full(b.shape, 0x7FFFFFFFFFFFFFFF, tl.int64)
    for t in range(m):
        best = tl.full(b.shape, _LOWEST, tl.int64)
        for start in range(0, longest, BLOCK_C):
            candidate = tl.load(
                candidates + own[:, None] * most + start + c[None, :],
                mask=(start + c)[None, :] < count[:, None], other=_LOWEST,
            )  # fmt: skip
            best = tl.maximum(best, tl.max(tl.where(candidate < last[:, None], candidate, _LOWEST), 1))
        tl.store(rows_found + own * m + t, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=b < B)
        last = best


# ---------------------------------------------------------------- launches


@dataclass(frozen=True)
class Blocks:
    """The block sizes of a pass over the queue.

    They are fixed, because an automatic search would make runs differ.
    """

    b: int  # queries of a program
    k: int  # queue entries read at once
    num_warps: int
    num_stages: int


def choose_blocks(
    P: int,
    B: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    scaled: bool,  # with a logit scale
) -> Blocks:
    """Return large blocks that spill no register on sm_80 and sm_90. tests/test_resources.py compiles all of them."""
    b = 16 if B <= 16 else 64  # 16 is the smallest size of a matrix unit
    fits = D <= 128  # D = 256 leaves registers and shared memory for half as many queue entries
    if INTERPRETED:  # the interpreter has no registers, and large blocks make it fast
        return Blocks(b, 64, 4, 1)
    if precision == "bf16x3":
        if B > 64:  # every group of 4 warps owns 64 queries, and both groups share the conversion of a tile
            return Blocks(128, 64, 8, 2)
        return Blocks(64, 32, 4, 2) if D == 128 else Blocks(64, 64, 8, 2)
    if dtype == torch.float32 and precision == "ieee":
        return Blocks(16, 32, 8, 2)
    if dtype == torch.float32:  # rounding to tf32 needs registers, and 64 queries of 256 numbers would spill
        return Blocks(b, 32 if scaled else 64, 8, 2) if fits else Blocks(min(b, 32), 32, 8, 2)
    if fits and not scaled and P * triton.cdiv(B, b) * triton.cdiv(K, 64) <= 2 * multiprocessors(device):
        return Blocks(b, 128, 8, 2)  # with one tile a program, larger tiles leave half as many partial results
    return Blocks(b, 64 if fits else 32, 8 if b == 16 or D == 256 else 4, 3)


def choose_mining_blocks(
    S: int, B: int, K: int, D: int, dtype: torch.dtype, precision: str, device: torch.device
) -> tuple[Blocks, Blocks]:
    """Return the blocks of `_floor_kernel` and of `_rank_kernel`, which own equally many features.

    Large blocks read the queue less often. Small blocks let a small input use more multiprocessors. For one or two
    similarities the blocks spill no register on sm_80 and sm_90.
    """
    fits = D <= 128  # D = 256 leaves registers and shared memory for half as many queue entries
    if INTERPRETED:  # as in `choose_blocks`
        floor, rank = Blocks(64, 64, 4, 1), Blocks(64, 64, 4, 1)
    elif dtype == torch.float32 and precision == "ieee":
        floor, rank = Blocks(16, 32, 8, 2), Blocks(16, 32, 8, 1)
    elif dtype == torch.float32:
        b = 64 if fits else 32
        floor, rank = Blocks(b, 32, 8, 2), Blocks(b, 32 if fits else 16, 8, 1)
    else:
        # With 4 warps, a warp has whole rows of 64 queries, so a row's maximum needs no exchange between warps.
        floor, rank = Blocks(64, 64 if fits else 32, 4, 2), Blocks(64, 32 if fits else 16, 4, 1)
    if S > 2:  # the tiles of all similarities must fit into shared memory together
        return Blocks(16, 16, 8, 2), Blocks(16, 16, 8, 1)
    if triton.cdiv(B, floor.b) * triton.cdiv(K, floor.k) < multiprocessors(device):
        if dtype == torch.bfloat16:
            rank = Blocks(16, 64 if fits else 32, 8, 1)
        return replace(floor, b=16), replace(rank, b=16)
    return floor, rank


def _loss_precision(queries: Tensor, queue: Tensor, allowed: str, capability: int) -> str:
    """Return the precision of the loss's float32 products: "bf16x3" instead of tf32 on Hopper, or else `allowed`.

    The matrix units of Hopper read queue entries from shared memory. They read bfloat16 in both orders that the loss
    needs, and tf32 in one. For tf32 every tile would therefore be written to shared memory a second time, transposed,
    number by number. Three bfloat16 products take 1.5 times the time of one tf32 product, and are more exact.

    Args:
        allowed: "ieee" or "tf32", from `float32_precision`.
        capability: 90 for Hopper. Older matrix units read from registers, and two tiles of bfloat16 would spill.
            Newer ones have not been tried.
    """
    _, B, D = queries.shape
    helps = capability == 90 and B > 16 and D <= 128 and _dtype(queries, queue) == torch.float32
    return "bf16x3" if helps and allowed == "tf32" else allowed


def _products(precision: str, D: int) -> str:
    """Return the precision of float32 products in Triton's terms, from the precision that torch allows.

    Exact products ("ieee") do not use the matrix units. The sum of three tf32 products ("tf32x3") is about as exact and
    takes half the time. On an H200 with B 128 and K 65536 the error of a loss was 9e-7, compared with 6e-7 for exact
    products. The error of a gradient was 1e-7 for both (docs/LOG.md). With D = 256, tf32x3 would spill registers.
    """
    return "tf32x3" if precision == "ieee" and D <= 128 else precision


def _product_constants(a: Tensor, b: Tensor, precision: str) -> dict[str, object]:
    """Return the constants that say how a kernel multiplies rows of `a` and `b`."""
    return {
        "D": a.shape[2],
        "DTYPE": tl.bfloat16 if _dtype(a, b) == torch.bfloat16 else tl.float32,
        "PRECISION": _products(precision, a.shape[2]),
        "WIDEN": INTERPRETED,
    }


def _dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype to which the kernels convert both tensors when they read them."""
    return torch.promote_types(a.dtype, b.dtype)


def _rows_contiguous(queue: Tensor) -> Tensor:
    """Return the queue itself if the numbers of each entry are contiguous, or else a contiguous copy.

    Entries may have gaps between them.
    """
    return queue if queue.stride(-1) == 1 else queue.contiguous()


def _split(tiles: int, wanted: int) -> tuple[int, int]:
    """Return the number of splits, at most `wanted` and none empty, and the number of tiles of a split."""
    tiles_per_split = triton.cdiv(tiles, max(1, min(wanted, tiles)))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


_SPARE_COUNTERS = 4096
_counters: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream: the counters of eager launches
_spare_counters: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream: zeros for launches in CUDA graphs


def arrival_counters(count: int, device: torch.device) -> Tensor:
    """Return `count` int32 counters that are 0 when the next launch on the current stream starts.

    Every launch sets its counters back to 0, so they need no launch that clears them. Launches on one stream share
    counters, because they run one after another. A launch that is captured in a CUDA graph has counters of its own,
    because its graph may be replayed on any stream. They come from a reserve that an eager launch on the stream has
    cleared. If there is no reserve, the graph itself clears new counters in each replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    count = triton.cdiv(count, 4) * 4  # Triton compiles another kernel for pointers that are not multiples of 16 bytes
    with torch.cuda.device(device):
        stream = device, torch.cuda.current_stream().cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    own = (_spare_counters if capturing else _counters).get(stream)
    if own is None or len(own) < count:
        own = torch.zeros(count if capturing else count + _SPARE_COUNTERS, dtype=torch.int32, device=device)
        if not capturing:
            _counters[stream], _spare_counters[stream] = own[:count], own[count:]
    elif capturing:
        _spare_counters[stream] = own[count:]
    return own[:count]


@dataclass(frozen=True)
class Partials:
    """The outputs of `_loss_kernel` that the backward pass merges, with the shapes given there.

    Without gradient, `sums` and `positive_means` are empty.
    """

    peaks: Tensor
    masses: Tensor
    sums: Tensor
    positive_means: Tensor


def _loss_splits(queries: Tensor, queue: Tensor, precision: str, scaled: bool) -> tuple[Blocks, int, int]:
    """Return the blocks of the loss, the number of splits and the number of tiles of a split."""
    P, B, D = queries.shape
    K, device = queue.shape[1], queries.device
    blocks = choose_blocks(P, B, K, D, _dtype(queries, queue), precision, device, scaled)
    # Two programs for each multiprocessor, if there are enough tiles.
    wanted = 2 * multiprocessors(device) // (P * triton.cdiv(B, blocks.b))
    return blocks, *_split(triton.cdiv(K, blocks.k), min(wanted, _MOST_SLOTS - 1))


def make_partials(queries: Tensor, queue: Tensor, precision: str, gradient: bool, scaled: bool) -> Partials:
    """Return memory for the partial results of the loss."""
    P, B, D = queries.shape
    slots = _loss_splits(queries, queue, precision, scaled)[1] + 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=queries.device)

    return Partials(
        empty(P, B, slots),
        empty(P, B, slots),
        empty(P, B, slots, D) if gradient else empty(0),
        empty(P, B, D) if gradient else empty(0),
    )


def loss_launch(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor,  # (P, B, M)
    temperature: float,
    gradient: bool,
    precision: str,  # precision of float32 products: "ieee", "tf32" or "bf16x3"
    logit_scale: Tensor | None = None,  # (K,) float32
) -> tuple[Launch, Tensor, Tensor, Partials]:
    """Return the launch of `_loss_kernel`, its losses, its similarities and its other outputs."""
    P, B, D = queries.shape
    K, M = queue.shape[1], positives.shape[2]
    scaled = logit_scale is not None
    blocks, splits, tiles_per_split = _loss_splits(queries, queue, precision, scaled)
    row_blocks = triton.cdiv(B, blocks.b)
    block_r = 4096 // (_POSITIVES * D)
    gather_blocks = triton.cdiv(B, block_r)
    block_n = triton.next_power_of_2(splits + 1)
    partials = make_partials(queries, queue, precision, gradient, scaled)
    losses = torch.empty(P, dtype=torch.float32, device=queries.device)
    similarities = torch.empty(2, P, dtype=torch.float32, device=queries.device)
    launch = Launch(
        _loss_kernel,
        (P * (row_blocks * splits + gather_blocks),),
        {
            "queries": queries, "keys": keys, "queue": queue, "positives": positives,
            # Without a scale this pointer is never read.
            "logit_scale": losses if logit_scale is None else logit_scale,
            "peaks": partials.peaks, "masses": partials.masses, "sums": partials.sums,
            "positive_bits": torch.empty(P, B, dtype=torch.float32, device=queries.device),
            "positive_means": partials.positive_means, "losses": losses, "similarities": similarities,
            "arrivals": arrival_counters(P, queries.device),
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1), "scale": _BITS / temperature,
            "B": B, "K": K, "M": M, "pairs": P, "row_blocks": row_blocks, "splits": splits,
            "rows_per_split": tiles_per_split * blocks.k, "gather_blocks": gather_blocks,
        },
        {
            "BLOCK_B": blocks.b, "BLOCK_K": blocks.k, "BLOCK_R": block_r, "BLOCK_M": _POSITIVES,
            "BLOCK_N": block_n, "MERGE_R": max(1, 2048 // block_n), "GRADIENT": gradient,
            "SCALED": scaled, **_product_constants(queries, queue, precision),
        },
        blocks.num_warps,
        blocks.num_stages,
        _REGISTERS,
    )  # fmt: skip
    return launch, losses, similarities, partials


def gradient_launch(
    partials: Partials, upstream: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Launch, Tensor]:
    """Return the launch of `_gradient_kernel`, and its gradient (P, B, D)."""
    P, B, slots, D = partials.sums.shape
    # The interpreter of Triton 3.6 truncates float32 to bfloat16 instead of rounding.
    dtype = torch.float32 if INTERPRETED else dtype
    gradient = torch.empty((P, B, D), dtype=dtype, device=upstream.device)
    block_n = triton.next_power_of_2(slots)
    launch = Launch(
        _gradient_kernel,
        (B, P),
        {
            "peaks": partials.peaks, "masses": partials.masses, "sums": partials.sums,
            "positive_means": partials.positive_means, "upstream": upstream, "gradient": gradient,
            "stride": upstream.stride(0), "scale": _BITS / temperature, "B": B, "slots": slots,
        },
        {"D": D, "BLOCK_N": block_n},
        num_warps=8 if block_n * D > 4096 else 4,
        num_stages=1,
        max_registers=_REGISTERS,
    )  # fmt: skip
    return launch, gradient


@dataclass(frozen=True)
class Floors:
    """The outputs of `_floor_kernel`, with the shapes given there. Only the ranking by the sum uses tops and shares."""

    tops: Tensor
    shares: Tensor
    floors: Tensor
    counts: Tensor


def floor_launch(
    features: Tensor,  # (S, B, D)
    queue: Tensor,  # (S, K, D)
    m: int,
    together: bool,  # rank by the sum of all softmaxes too
    precision: str,
) -> tuple[Launch, Floors]:
    """Return the launch of `_floor_kernel` and its outputs."""
    S, B, D = features.shape
    K, R = queue.shape[1], S + int(together)
    device = features.device
    blocks, _ = choose_mining_blocks(S, B, K, D, _dtype(features, queue), precision, device)
    row_blocks = triton.cdiv(B, blocks.b)
    # Two programs for each multiprocessor, and enough peaks for a high floor.
    wanted = max(2 * multiprocessors(device) // row_blocks, 2 * m)
    splits, tiles_per_split = _split(triton.cdiv(K, blocks.k), min(wanted, _MOST_PEAKS))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    out = Floors(empty(S, B), empty(S, B), empty(R, B), torch.empty((R, B), dtype=torch.int32, device=device))
    launch = Launch(
        _floor_kernel,
        (row_blocks * splits,),
        {
            "features": features, "queue": queue, "peaks": empty(R, B, splits), "masses": empty(S, B, splits),
            "tops": out.tops, "shares": out.shares, "floors": out.floors, "counts": out.counts,
            "arrivals": arrival_counters(row_blocks, device),
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1), "B": B, "K": K, "m": m,
            "row_blocks": row_blocks, "splits": splits, "rows_per_split": tiles_per_split * blocks.k,
        },
        {
            "TOGETHER": together, "S": S, "BLOCK_B": blocks.b, "BLOCK_K": blocks.k,
            "BLOCK_N": triton.next_power_of_2(splits), **_product_constants(features, queue, precision),
        },
        blocks.num_warps,
        blocks.num_stages,
        _REGISTERS,
    )  # fmt: skip
    return launch, out


def rank_launch(
    features: Tensor,  # (S, B, D)
    queue: Tensor,  # (S, K, D)
    floors: Floors,
    m: int,
    together: bool,  # rank by the sum of all softmaxes too
    precision: str,
) -> tuple[Launch, Tensor]:
    """Return the launch of `_rank_kernel`, and the indices (R, B, m) that it writes."""
    S, B, D = features.shape
    K, R = queue.shape[1], S + int(together)
    device = features.device
    _, blocks = choose_mining_blocks(S, B, K, D, _dtype(features, queue), precision, device)
    row_blocks, tiles = triton.cdiv(B, blocks.b), triton.cdiv(K, blocks.k)
    # Two programs for each multiprocessor, so that one computes while the other waits for memory.
    splits, tiles_per_split = _split(tiles, 2 * multiprocessors(device) // row_blocks)
    kept = min(m, blocks.k)
    products = _product_constants(features, queue, precision)
    ahead = not (D == 256 and products["PRECISION"] == "ieee")  # exact products need the registers
    # Most of this memory is never touched, because few entries reach the floor.
    candidates = torch.empty((R, B, tiles * kept), dtype=torch.int64, device=device)
    rows = torch.empty((R, B, m), dtype=torch.int64, device=device)
    launch = Launch(
        _rank_kernel,
        (row_blocks * splits,),
        {
            "features": features, "queue": queue, "tops": floors.tops, "shares": floors.shares,
            "floors": floors.floors, "candidates": candidates, "counts": floors.counts, "rows_found": rows,
            "arrivals": arrival_counters(row_blocks, device),
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1), "B": B, "K": K, "m": m,
            "row_blocks": row_blocks, "splits": splits, "rows_per_split": tiles_per_split * blocks.k,
            "kept": kept, "most": tiles * kept,
        },
        {
            "TOGETHER": together, "S": S, "BLOCK_B": blocks.b, "BLOCK_K": blocks.k,
            "BLOCK_C": min(max(16, triton.next_power_of_2(2 * m)), 64), "AHEAD": ahead, **products,
        },
        blocks.num_warps,
        blocks.num_stages,
        _REGISTERS,
    )  # fmt: skip
    return launch, rows


# ---------------------------------------------------------------- registered ops


@torch.library.custom_op("dclr::info_nce", mutates_args=())
def info_nce_op(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    positives: Tensor | None,
    temperature: float,
    gradient: bool,
    logit_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the losses (P,), the similarities (2, P) and the fields of `Partials`, for the backward pass.

    `_loss_kernel` describes the outputs. Without `gradient`, some are empty.
    """
    P, B, _ = queries.shape
    queries, keys, queue = queries.contiguous(), keys.contiguous(), _rows_contiguous(queue)
    if positives is None:
        positives = torch.empty((P, B, 0), dtype=torch.int64, device=queries.device)
    if logit_scale is not None:
        logit_scale = logit_scale.contiguous()
    precision = _loss_precision(queries, queue, float32_precision(), compute_capability(queries.device))
    launch, losses, similarities, partials = loss_launch(
        queries, keys, queue, positives.contiguous(), temperature, gradient, precision, logit_scale
    )
    launch()
    return losses, similarities, partials.peaks, partials.masses, partials.sums, partials.positive_means


@info_nce_op.register_fake
def _(queries, keys, queue, positives, temperature, gradient, logit_scale=None):
    P = queries.shape[0]
    precision = _loss_precision(queries, queue, float32_precision(), compute_capability(queries.device))
    partials = make_partials(queries, queue, precision, gradient, logit_scale is not None)
    losses = queries.new_empty((P,), dtype=torch.float32)
    similarities = queries.new_empty((2, P), dtype=torch.float32)
    return losses, similarities, partials.peaks, partials.masses, partials.sums, partials.positive_means


@torch.library.custom_op("dclr::info_nce_backward", mutates_args=())
def info_nce_backward_op(
    peaks: Tensor,
    masses: Tensor,
    sums: Tensor,
    positive_means: Tensor,
    upstream: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient (P, B, D) with respect to the queries, multiplied by upstream (P,) and rounded once to dtype.

    It is a separate op without a derivative, so a second derivative is an error instead of silently wrong.
    """
    launch, gradient = gradient_launch(Partials(peaks, masses, sums, positive_means), upstream, temperature, dtype)
    launch()
    return gradient.to(dtype)


@info_nce_backward_op.register_fake
def _(peaks, masses, sums, positive_means, upstream, temperature, dtype):
    return torch.empty_like(positive_means, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # otherwise autograd writes zeros for the outputs without gradient
    ctx.save_for_backward(*output[2:])
    ctx.dtype, ctx.temperature = inputs[0].dtype, inputs[4]


def _backward(ctx, losses_gradient, *_):
    if losses_gradient is None:
        return None, None, None, None, None, None, None
    gradient = torch.ops.dclr.info_nce_backward(*ctx.saved_tensors, losses_gradient, ctx.temperature, ctx.dtype)
    return gradient, None, None, None, None, None, None


info_nce_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dclr::mine_positives", mutates_args=())
def mine_positives_op(features: Tensor, queue: Tensor, m: int, together: bool) -> Tensor:
    """Return the indices (R, B, m) of the m >= 1 queue entries most similar to each feature, best first.

    features is (S, B, D) and queue is (S, K, D). The R rankings are one for each similarity, then one for all
    similarities together if `together` is True.
    """
    features, queue = features.contiguous(), _rows_contiguous(queue)
    precision = float32_precision()
    launch, floors = floor_launch(features, queue, m, together, precision)
    launch()
    launch, rows = rank_launch(features, queue, floors, m, together, precision)
    launch()
    return rows


@mine_positives_op.register_fake
def _(features, queue, m, together):
    S, B, _ = features.shape
    return features.new_empty((S + int(together), B, m), dtype=torch.int64)


def launches_to_compile() -> list[tuple[str, Launch]]:
    """Return every kernel in every configuration that the launchers choose, with a label, to be compiled ahead of time.

    The tensors are on the meta device, so they have no memory. Training ranks by one or two similarities.
    """
    P, K, M = 5, 2048, 5
    kinds = (
        ("bfloat16", torch.bfloat16, "tf32"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    )

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def mining(features: Tensor, queue: Tensor, m: int, together: bool, precision: str) -> list[Launch]:
        launch, floors = floor_launch(features, queue, m, together, precision)
        return [launch, rank_launch(features, queue, floors, m, together, precision)[0]]

    launches = []
    for D in EMBEDDING_SIZES:
        for name, dtype, precision in kinds:
            queue, scales = meta(P, K, D, dtype=dtype), meta(K, dtype=torch.float32)
            # The precision of tf32 follows from the GPU. It is the same for all GPUs where D is 256.
            sizes = product((16, 40, 128), (80, 90)) if name == "tf32" and D <= 128 else product((16, 40), (None,))
            for B, capability in sizes:
                label = f"D {D}, {name}, B {'to 16' if B == 16 else 'above 16' if B == 40 else 'above 64'}"
                queries, positives = meta(P, B, D, dtype=dtype), meta(P, B, M, dtype=torch.int64)
                own = _loss_precision(queries, queue, precision, capability or 80)
                found = []
                for gradient in (True, False):
                    suffix = ", gradient" if gradient else ""
                    found.append((suffix, loss_launch(queries, queries, queue, positives, 0.07, gradient, own)[0]))
                    if dtype == torch.bfloat16 and D <= 128:
                        small = queue[:, :64]
                        launch = loss_launch(queries, queries, small, positives, 0.07, gradient, own)[0]
                        found.append((f", small queue{suffix}", launch))
                # Training computes the gradient, which needs the most registers.
                launch = loss_launch(queries, queries, queue, positives, 0.07, True, own, scales)[0]
                found.append((", logit scale", launch))
                launches += [(f"{label}{suffix}", replace(launch, capability=capability)) for suffix, launch in found]
            for size, entries in (("small", 64), ("large", K)):  # the size of the blocks follows from B and K
                # One similarity leaves more registers than two. It is compiled where registers are scarce.
                for S in (1, 2) if D == 256 else (2,):
                    features = meta(S, 1024 if size == "large" else 16, D, dtype=dtype)
                    label = f"D {D}, {name}, {size} blocks, S {S}"
                    for launch in mining(features, queue[:S, :entries], M, S > 1, precision):
                        launches.append((label, launch))
        # The middle number of slots makes the largest tile of 4 warps.
        for slots in sorted({2, min(4096 // D, _MOST_SLOTS), _MOST_SLOTS}):
            sums, means = meta(P, 40, slots, D, dtype=torch.float32), meta(P, 40, D, dtype=torch.float32)
            partials = Partials(sums[..., 0], sums[..., 0], sums, means)
            for dtype in (torch.bfloat16, torch.float32):
                label = f"D {D}, {slots} slots, {'bfloat16' if dtype == torch.bfloat16 else 'float32'}"
                launches.append((label, gradient_launch(partials, sums[:, 0, 0, 0], 0.07, dtype)[0]))
    for name, dtype, precision in kinds:
        # Triton compiles an integer argument of 1 as a constant.
        one, rows = meta(1, 1, 32, dtype=dtype), meta(1, 1, 1, dtype=torch.int64)
        label = f"D 32, {name}, all sizes 1"
        launch, losses, _, partials = loss_launch(one, one, one, rows, 0.07, True, precision)
        launches += [(label, launch), (label, gradient_launch(partials, losses, 0.07, dtype)[0])]
        launches += [(label, launch) for launch in mining(one, one, 1, True, precision)]
    return launches
