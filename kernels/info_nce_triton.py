"""The contrastive loss and the search for positives in Triton: one pass over the queue, no logits in memory.

Keys and queue receive no gradient, so all of a step's work can be done going forward. With logits l_ij = q_i . x_j / temperature,
x_0 the query's key and x_1 .. x_K the queue,

    loss_i = log sum_j exp(l_ij) - log sum_(j positive) exp(l_ij)
    d loss_i / d q_i = (sum_j p_ij x_j - sum_(j positive) r_ij x_j) / temperature

where p_i is the softmax over all and r_i the softmax over the positives. The first sum is attention with the queue as keys and as values,
so the online softmax of FlashAttention (Dao et al., arXiv 2205.14135) gives it together with the loss; backward only multiplies by the
upstream gradient. The queue may be overwritten in between.

Letters: P pairs, B clips, D embedding size, K queue rows, M positives of a query, S similarities ranked together, N splits of the queue.
Logits are kept in units of log 2 ("bits"): exp2 is the instruction a GPU has.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import INTERPRETED, float32_precision, multiprocessors
from kernels.launch import Launch
from kernels.types import EMBEDDING_SIZES

_BITS = math.log2(math.e)  # exp(x) = exp2(x * _BITS)
# As many as a program of 8 warps can have. Without a limit given, ptxas (CUDA 12.8) aims at more programs side by side and keeps values
# that a loop does not use in local memory meanwhile, 8 to 24 bytes, also in kernels of 40 registers; with this one it does not.
_REGISTERS = 255
_MOST_SPLITS = 64  # the partial results of a query are merged in one tile
_LOWEST = tl.constexpr(-(2**63))  # a candidate that is none
_BITS_IN = tl.constexpr(_BITS)
_LN2 = tl.constexpr(math.log(2))


# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b + acc, float32. WIDEN: the interpreter of Triton 3.6 multiplies the bit patterns of bfloat16, so they are widened for it;
    the products are the same, for a product of two bfloat16 is exact in float32. (It does not round to tf32.)"""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a = _to_tf32(a)
        b = _to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _to_tf32(x):
    """To the nearest. The matrix units drop the 13 bits that tf32 has not, which makes every product too small: a loss was off by 1e-3
    on an H200 where torch's was by 7e-6 (docs/LOG.md)."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _stream_queue(
    queries, queue, peaks, masses, sums, pid, stride_pair, stride_row, scale, B, K, row_blocks, splits, rows_per_split,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    GRADIENT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_B queries of one pair against one split of its queue, by online softmax."""
    block = pid % row_blocks  # fastest, so that neighbours read the same part of the queue
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
        fading = tl.exp2(peak - higher)
        mass = mass * fading + tl.sum(weights, 1)
        if GRADIENT:
            acc = _dot(weights.to(DTYPE), x, acc * fading[:, None], PRECISION, WIDEN)
        peak = higher

    out = (pair * B + b) * splits + split
    tl.store(peaks + out, peak, mask=b < B)
    tl.store(masses + out, mass, mask=b < B)
    if GRADIENT:
        tl.store(sums + out[:, None] * D + d[None, :], acc, mask=(b < B)[:, None])


@triton.jit
def _gather_positives(
    queries, keys, queue, positives, key_bits, positive_bits, positive_means, pid, stride_pair, stride_row, scale, B, K, M,
    D: tl.constexpr, BLOCK_R: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_R queries of one pair against their key and their positives, by online softmax that starts from the key."""
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

    mine = positives + (pair * B + b) * M
    for t in range(M):
        j = tl.load(mine + t, mask=valid_b, other=-1)
        counts = (j >= 0) & (j < K)
        for earlier in range(t):
            counts = counts & (tl.load(mine + earlier, mask=valid_b, other=-1) != j)
        x = tl.load(
            queue + pair * stride_pair + tl.where(counts, j, 0)[:, None] * stride_row + d[None, :],
            mask=counts[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        bits = tl.where(counts, tl.sum(q * x, 1) * scale, float("-inf"))
        higher = tl.maximum(peak, bits)
        weight = tl.exp2(bits - higher)
        fading = tl.exp2(peak - higher)
        mass = mass * fading + weight
        acc = acc * fading[:, None] + weight[:, None] * x
        peak = higher

    tl.store(positive_bits + pair * B + b, peak + tl.log2(mass), mask=valid_b)
    if GRADIENT:
        tl.store(positive_means + row, acc / mass[:, None], mask=valid_b[:, None])


@triton.jit
def _partial_kernel(
    queries,  # (P, B, D)
    keys,  # (P, B, D)
    queue,  # (P, K, D), rows and pairs apart by the strides
    positives,  # (P, B, M) int64
    peaks,  # out (P, B, N): the split's greatest logit, in bits
    masses,  # out (P, B, N): the sum of exp2(logit - peak)
    sums,  # out (P, B, N, D): the sum of exp2(logit - peak) x
    key_bits,  # out (P, B): the key's logit
    positive_bits,  # out (P, B): log2 of the sum of exp2(logit) over key and positives
    positive_means,  # out (P, B, D): the mean of key and positives, weighted by exp2(logit)
    stride_pair, stride_row, scale, B, K, M, row_blocks, splits, rows_per_split, stream_programs,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GRADIENT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The first `stream_programs` programs own (pair, split, BLOCK_B queries); the others (pair, BLOCK_R queries) and gather what the
    queries' positives are. All run side by side: nothing here waits for anything."""
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
    peaks, masses, sums, key_bits, positive_bits, positive_means,  # as _partial_kernel writes them
    losses,  # out (P,)
    similarities,  # out (2, P): means over B of query . key, and of the greatest query . row
    gradient,  # out (P, B, D): of the mean loss with respect to the queries
    scale, B, splits,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (0, p) owns the figures of pair p, and program (1 + b, p) the gradient of query b. Both add the splits up in one order."""
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
        # 1 / temperature = scale ln 2, and B more queries share the mean loss.
        tl.store(gradient + row * D + d, (mean - positive_mean) * (scale * _LN2 / B))


@triton.jit
def _rank_kernel(
    features,  # (S, B, D)
    queue,  # (S, K, D), rows and similarities apart by the strides
    peaks, masses,  # (S, B, N) as _partial_kernel writes them, at temperature 1; unused without SOFTMAX
    candidates,  # out (R, B, tiles, kept) int64: the best of each tile of the queue, best first
    stride_pair, stride_row, first_ranking, row_blocks, S, B, K, splits, tiles, kept,
    SOFTMAX: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_B features, one tile of BLOCK_K queue rows, and one of R rankings, of which the first is `first_ranking`:
    ranking r < S is by similarity r, ranking S by the sum of all S softmaxes over the queue. Without SOFTMAX that one is not asked for.

    A candidate is one number: its upper half orders as the score does, its lower half is the row, reversed so that of two equal scores the
    lower row is the greater number. No two are equal, so the next best is the greatest below the last one: nothing is sorted or marked.
    """
    tile = tl.program_id(0) // row_blocks  # neighbours read the same part of the queue
    b = tl.program_id(0) % row_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    ranking = first_ranking + tl.program_id(1)
    together = ranking == S
    score = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    # Not unrolled: the tiles of two similarities do not fit into registers at once.
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
    pattern = tl.where(pattern >= 0, pattern, pattern ^ 0x7FFFFFFF)  # negative floats order backwards
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
    candidates,  # (R, B, C) int64, of _rank_kernel
    rows,  # out (R, B, m) int64: rows of the queue, best first
    C, m,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns one query in one ranking: the m greatest of its candidates, one after another."""
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


# -------------------------------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Blocks:
    """How the stream over the queue is cut. Chosen, not searched for: a search would make runs differ."""

    b: int  # queries a program holds
    k: int  # rows of the queue at a time
    num_warps: int
    num_stages: int


def choose_blocks(B: int, D: int, dtype: torch.dtype, precision: str) -> Blocks:
    """The blocks for these sizes: large ones that spill no register on sm_80 and sm_90 (tests/test_resources.py compiles them all)."""
    b = 16 if B <= 16 else 64  # 16 is the least a matrix unit takes
    if dtype == torch.float32 and precision == "ieee":
        return Blocks(16, 32, 8, 2)
    if dtype == torch.float32:  # rounding to tf32 takes registers: 64 queries of 256 numbers would spill them
        return Blocks(32 if b == 64 and D == 256 else b, 32, 8, 2)
    return Blocks(b, 64 if D <= 128 else 32, 8 if b == 16 or D == 256 else 4, 3)


def _products(precision: str, D: int) -> str:
    """How float32 is multiplied, by what torch allows.

    Exactly, it would be without matrix units. The sum of three tf32 products errs as little: on an H200 at B 128, K 65536 a loss by 9e-7
    against 6e-7, a gradient by 1e-7 as well, in half of the time (docs/LOG.md). With 256 numbers its registers would spill.
    """
    return "tf32x3" if precision == "ieee" and D <= 128 else precision


def _dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def _rows_contiguous(queue: Tensor) -> Tensor:
    """The queue as it is, whatever lies between its rows; a copy only where the numbers of a row are apart."""
    return queue if queue.stride(-1) == 1 else queue.contiguous()


class _Partials:
    """Results of the splits and of the positives, before they are merged."""

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
    keys: Tensor | None,  # (P, B, D); None to stream the queue only
    queue: Tensor,  # (P, K, D)
    positives: Tensor,  # (P, B, M)
    temperature: float,
    gradient: bool,
    precision: str,  # of float32 products: "ieee" or "tf32"
) -> tuple[Launch, _Partials]:
    P, B, D = queries.shape
    K, M = queue.shape[1], positives.shape[2]
    dtype = _dtype(queries, queue)
    blocks = choose_blocks(B, D, dtype, precision)
    row_blocks, tiles = triton.cdiv(B, blocks.b), triton.cdiv(K, blocks.k)
    # Two programs for each multiprocessor, if there is as much to do.
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
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1), "scale": _BITS / temperature, "B": B, "K": K, "M": M,
            "row_blocks": row_blocks, "splits": splits, "rows_per_split": tiles_per_split * blocks.k,
            "stream_programs": stream_programs,
        },
        {
            "D": D, "BLOCK_B": blocks.b, "BLOCK_K": blocks.k, "BLOCK_R": block_r, "GRADIENT": gradient,
            "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, "PRECISION": _products(precision, D), "WIDEN": INTERPRETED,
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
            "keys": keys, "peaks": partials.peaks, "masses": partials.masses, "sums": partials.sums, "key_bits": partials.key_bits,
            "positive_bits": partials.positive_bits, "positive_means": partials.positive_means, "losses": losses,
            "similarities": similarities, "gradient": result, "scale": _BITS / temperature, "B": B, "splits": splits,
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
        (row_blocks * tiles, rankings),  # a GPU takes 2^31 along the first axis, 65535 along the second
        {
            "features": features, "queue": queue, "peaks": peaks, "masses": masses, "candidates": candidates,
            "stride_pair": queue.stride(0), "stride_row": queue.stride(1),
            "first_ranking": 0 if each else S, "row_blocks": row_blocks, "S": S, "B": B, "K": K,
            "splits": splits, "tiles": tiles, "kept": kept,
        },
        {
            "SOFTMAX": together, "D": D, "BLOCK_B": block_b, "BLOCK_K": block_k, "BLOCK_N": triton.next_power_of_2(splits),
            "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, "PRECISION": _products(precision, D), "WIDEN": INTERPRETED,
        },
        num_warps,
        num_stages=1,
        max_registers=_REGISTERS,
    )  # fmt: skip
    return launch, candidates


def select_launch(candidates: Tensor, m: int) -> tuple[Launch, Tensor]:  # (R, B, tiles, kept)
    R, B, tiles, kept = candidates.shape
    C = tiles * kept
    rows = torch.empty((R, B, m), dtype=torch.int64, device=candidates.device)
    block_c = min(triton.next_power_of_2(C), 2048)
    launch = Launch(
        _select_kernel, (R * B,), {"candidates": candidates, "rows": rows, "C": C, "m": m}, {"BLOCK_C": block_c}, num_stages=1
    )  # fmt: skip
    return launch, rows


# -------------------------------------------------------------------------------------------------------- registered ops


@torch.library.custom_op("dclr::info_nce", mutates_args=())
def info_nce_op(
    queries: Tensor, keys: Tensor, queue: Tensor, positives: Tensor | None, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (P,), similarities (2, P) as `kernels.info_nce` returns them, and the gradient of each pair's loss with respect to its queries
    (P, B, D) float32, or an empty tensor where `gradient` is false."""
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
    """gradient (P, B, D) times upstream (P,), rounded once to dtype. An op of its own: one kernel for bfloat16 too, and one that has no
    derivative, so that a second derivative is an error and not silently wrong."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream[:, None, None], out=out)


@info_nce_backward_op.register_fake
def _(gradient, upstream, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of the outputs that have none, zeros would be written
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, of_losses, of_similarities, of_gradient):
    (gradient,) = ctx.saved_tensors
    of_queries = None if of_losses is None else torch.ops.dclr.info_nce_backward(gradient, of_losses, ctx.dtype)
    return of_queries, None, None, None, None, None


info_nce_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dclr::mine_positives", mutates_args=())
def mine_positives_op(features: Tensor, queue: Tensor, m: int, each: bool, together: bool) -> Tensor:
    """Rows (R, B, m) of the queue (S, K, D) most similar to the features (S, B, D), m >= 1: by each similarity, and by all together."""
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
    """Every kernel in every configuration that the launchers choose, on tensors without memory, to be compiled ahead of time."""
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
        for splits in sorted(
            {1, min(4096 // D, _MOST_SPLITS), _MOST_SPLITS}
        ):  # the middle one is the largest tile of 4 warps
            partials = _Partials(queries, splits, gradient=True)
            launches.append((f"D {D}, {splits} split(s)", merge_launch(queries, partials, 0.07, True)[0]))
    for name, dtype, precision in kinds:
        # An integer argument of 1 is compiled as a constant.
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
