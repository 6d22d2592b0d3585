"""Triton kernels of `convolve`: convolutions of stride 1 in time (3, 1, 1) or in space (1, 3, 3), in bfloat16.

Clips (B, C, D, H, W) in channels_last_3d memory are a matrix of B * D * H * W rows of C channels. Each tap of a
convolution multiplies rows at a fixed distance with a matrix (C, C'): H * W rows for the next frame, W rows for the
next line. Both kinds of convolution are one kernel. The input gradient is a convolution of the same kind with flipped
taps, so it is the same kernel too. A second kernel computes the weight gradient.

Tiles in Triton have powers of two as sizes. A kernel therefore takes the channels in two sections, for example
144 = 128 + 16. If the rest is not a power of two, the second section is filled up with zeros (240 takes 128 + 128).

Letters: B clips, C and C' channels, D frames, H, W pixels.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dclr.kernels.backend import INTERPRETED, compute_capability, multiprocessors
from dclr.kernels.launch import Launch
from dclr.kernels.rounding_triton import rounded
from dclr.kernels.types import CONVOLUTIONS, Normalisation, kind_of

# ---------------------------------------------------------------- kernels


@triton.jit
def _positions(i, D, H, W):
    """Return frame, line and column of rows i."""
    return i // (H * W) % D, i // W % H, i % W


@triton.jit
def _shifted(i, rows, tap, D, H, W, TEMPORAL: tl.constexpr):
    """Return the rows that a tap reads for rows i of the result, and whether they are inside the clip."""
    frame, line, column = _positions(i, D, H, W)
    if TEMPORAL:
        inside = (frame + tap >= 1) & (frame + tap <= D)
        distance = (tap - 1) * H * W
    else:
        down = tap // 3 - 1
        right = tap % 3 - 1
        inside = (line + down >= 0) & (line + down < H) & (column + right >= 0) & (column + right < W)
        distance = down * W + right
    return i + distance, inside & (i < rows)


@triton.jit
def _vectors(mean, scale, shift, channels, C):
    """Return mean, scale and shift of these channels, 0 from channel C on."""
    known = channels < C
    return (
        tl.load(mean + channels, mask=known, other=0.0),
        tl.load(scale + channels, mask=known, other=0.0),
        tl.load(shift + channels, mask=known, other=0.0),
    )


@triton.jit
def _tile(matrix, i, inside, channels, C: tl.constexpr):
    """Return rows i of a matrix (rows, C), 0 where `inside` is false and from channel C on."""
    known = inside[:, None] & (channels < C)[None, :]
    return tl.load(matrix + i.to(tl.int64)[:, None] * C + channels[None, :], mask=known, other=0.0)


@triton.jit
def _input(
    x, i, inside, channels, C: tl.constexpr, mean, scale, shift, NORMALISE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Return rows of a convolution's input as an operand, 0 outside of the clip. NORMALISE applies `Normalisation`."""
    tile = _tile(x, i, inside, channels, C)
    if NORMALISE:
        z = tl.maximum((tile.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :], 0.0)
        tile = rounded(tl.where(inside[:, None], z, 0.0), tl.bfloat16, INTERPRETED)
    return _operand(tile, INTERPRETED)


@triton.jit
def _operand(tile, INTERPRETED: tl.constexpr):
    """Return an operand of `tl.dot`. The interpreter of Triton 3.6 would multiply the bit patterns of bfloat16."""
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def _weights(weight, tap, k, n, K: tl.constexpr, N: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return rows k and columns n of one tap's matrix, from weight (taps, K, N)."""
    known = (k < K)[:, None] & (n < N)[None, :]
    return _operand(tl.load(weight + (tap * K + k)[:, None] * N + n[None, :], mask=known, other=0.0), INTERPRETED)


@triton.jit
def _write_statistics(acc, target, means, squares, i, n, share, N: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write one section of a result, and the mean and the sum of squared deviations of its rows.

    share: (ROWS,) how many equal frames each row's frame stands for, 0 for rows outside.
    """
    y = rounded(acc, tl.bfloat16, INTERPRETED)
    known = n < N
    tl.store(target + i.to(tl.int64)[:, None] * N + n[None, :], y, mask=(share > 0)[:, None] & known[None, :])
    y = y.to(tl.float32)
    mean = tl.sum(y * share[:, None], 0) / tl.sum(share, 0)
    deviation = y - mean[None, :]
    out = tl.program_id(0).to(tl.int64) * N + n
    tl.store(means + out, mean, mask=known)
    tl.store(squares + out, tl.sum(deviation * deviation * share[:, None], 0), mask=known)


@triton.jit
def _write_gradient(
    acc, target, raw, mean, scale, shift, sums, products, i, n, inside,
    N: tl.constexpr, NORMALISE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write one section of an input gradient, and with NORMALISE the sums of g and of g (x - mean) over its rows.

    g is the gradient of (x - mean) * scale + shift: `acc` where ReLU passed this value, else 0.
    """
    if NORMALISE:
        mean, scale, shift = _vectors(mean, scale, shift, n, N)
        centred = _tile(raw, i, inside, n, N).to(tl.float32) - mean[None, :]
        acc = tl.where((centred * scale[None, :] + shift[None, :] > 0) & inside[:, None], acc, 0.0)
        out = tl.program_id(0).to(tl.int64) * N + n
        tl.store(sums + out, tl.sum(acc, 0), mask=n < N)
        tl.store(products + out, tl.sum(acc * centred, 0), mask=n < N)
        acc *= scale[None, :]
    gradient = rounded(acc, tl.bfloat16, INTERPRETED)
    known = inside[:, None] & (n < N)[None, :]
    tl.store(target + i.to(tl.int64)[:, None] * N + n[None, :], gradient, mask=known)


@triton.jit
def _convolution_kernel(
    x,  # (rows, K) bfloat16: the input, or the gradient of the result
    weight,  # (taps, K, N) bfloat16
    target,  # (rows, N) bfloat16
    raw,  # (rows, N) bfloat16: the convolution's input, for an input gradient
    mean, scale, shift,  # (C,) float32: the normalisation of the convolution's input
    first, second,  # (programs, N) float32: means and squares, or sums and products
    totals,  # (programs,) float32: sum of the shares of a program's rows
    rows, D, H, W, repeated, times,
    TEMPORAL: tl.constexpr, GRADIENT: tl.constexpr, NORMALISE: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    N: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of a convolution or, with GRADIENT, of its input gradient.

    In a convolution, NORMALISE normalises the input, and the statistics of the result are written. In an input
    gradient, NORMALISE applies the mask of ReLU, computed from `raw`, and writes two sums for the normalisation.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k0 = tl.arange(0, K0)
    n0 = tl.arange(0, N0)
    k1 = K0 + tl.arange(0, K1 if K1 else 1)
    n1 = N0 + tl.arange(0, N1 if N1 else 1)
    normalise: tl.constexpr = NORMALISE and not GRADIENT
    mean0, scale0, shift0 = mean, scale, shift
    mean1, scale1, shift1 = mean, scale, shift
    if normalise:
        mean0, scale0, shift0 = _vectors(mean, scale, shift, k0, K)
        if K1:
            mean1, scale1, shift1 = _vectors(mean, scale, shift, k1, K)
    acc0 = tl.zeros((ROWS, N0), tl.float32)
    acc1 = tl.zeros((ROWS, N1 if N1 else 1), tl.float32)
    for tap in range(3 if TEMPORAL else 9):
        at, inside = _shifted(i, rows, tap, D, H, W, TEMPORAL)
        a = _input(x, at, inside, k0, K, mean0, scale0, shift0, normalise, INTERPRETED)
        acc0 = tl.dot(a, _weights(weight, tap, k0, n0, K, N, INTERPRETED), acc0)
        if N1:
            acc1 = tl.dot(a, _weights(weight, tap, k0, n1, K, N, INTERPRETED), acc1)
        if K1:
            a = _input(x, at, inside, k1, K, mean1, scale1, shift1, normalise, INTERPRETED)
            acc0 = tl.dot(a, _weights(weight, tap, k1, n0, K, N, INTERPRETED), acc0)
            if N1:
                acc1 = tl.dot(a, _weights(weight, tap, k1, n1, K, N, INTERPRETED), acc1)

    if GRADIENT:
        inside = i < rows
        _write_gradient(
            acc0, target, raw, mean, scale, shift, first, second, i, n0, inside, N, NORMALISE, INTERPRETED
        )  # fmt: skip
        if N1:
            _write_gradient(
                acc1, target, raw, mean, scale, shift, first, second, i, n1, inside, N, NORMALISE, INTERPRETED
            )  # fmt: skip
    else:
        frame, _, _ = _positions(i, D, H, W)
        share = tl.where(i < rows, tl.where(frame == repeated, times, 1), 0).to(tl.float32)
        tl.store(totals + tl.program_id(0), tl.sum(share, 0))
        _write_statistics(acc0, target, first, second, i, n0, share, N, INTERPRETED)
        if N1:
            _write_statistics(acc1, target, first, second, i, n1, share, N, INTERPRETED)


@triton.jit
def _merge_kernel(
    means, squares, totals,  # (programs, N), (programs, N), (programs,) float32
    mean, square, total,  # (groups, N), (groups, N), (groups,) float32
    programs, group,
    N: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of `group` programs, for BLOCK channels. LAST writes the variance instead of squares.

    Differences from the first program's mean are averaged, because averaging large means would lose digits.
    """
    start = tl.program_id(0) * group
    end = tl.minimum(start + group, programs)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = n < N
    pivot = tl.load(means + start.to(tl.int64) * N + n, mask=known, other=0.0)
    count = 0.0
    offset = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, ROWS):
        i = first + tl.arange(0, ROWS)
        weight = tl.load(totals + i, mask=i < end, other=0.0)
        at = i.to(tl.int64)[:, None] * N + n[None, :]
        valid = (i < end)[:, None] & known[None, :]
        count += tl.sum(weight, 0)
        offset += tl.sum(tl.where(valid, tl.load(means + at, mask=valid, other=0.0) - pivot, 0.0) * weight[:, None], 0)
    merged = pivot + offset / count
    squared = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, ROWS):
        i = first + tl.arange(0, ROWS)
        weight = tl.load(totals + i, mask=i < end, other=0.0)
        at = i.to(tl.int64)[:, None] * N + n[None, :]
        valid = (i < end)[:, None] & known[None, :]
        deviation = tl.where(valid, tl.load(means + at, mask=valid, other=0.0) - merged, 0.0)
        squared += tl.sum(tl.load(squares + at, mask=valid, other=0.0) + weight[:, None] * deviation * deviation, 0)
    out = tl.program_id(0).to(tl.int64) * N + n
    tl.store(mean + out, merged, mask=known)
    tl.store(square + out, squared / count if LAST else squared, mask=known)
    if tl.program_id(1) == 0:
        tl.store(total + tl.program_id(0), count)


@triton.jit
def _add_tap(
    acc0, acc1, upstream0, upstream1, x, i, rows, tap, D, H, W,
    e, v0, v1, mean0, scale0, shift0, mean1, scale1, shift1,
    K: tl.constexpr, WIDE1: tl.constexpr,
    TEMPORAL: tl.constexpr, NORMALISE: tl.constexpr, BY_OUTPUT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add the products of rows i for one tap to two sections of its weight gradient, and return them."""
    at, inside = _shifted(i, rows, tap, D, H, W, TEMPORAL)
    if BY_OUTPUT:
        z = _input(x, at, inside, v0, K, mean0, scale0, shift0, NORMALISE, INTERPRETED)
        acc0 = tl.dot(tl.trans(upstream0), z, acc0)
        if WIDE1:
            z = _input(x, at, inside, v1, K, mean1, scale1, shift1, NORMALISE, INTERPRETED)
            acc1 = tl.dot(tl.trans(upstream0), z, acc1)
    else:
        z = tl.trans(_input(x, at, inside, e, K, mean0, scale0, shift0, NORMALISE, INTERPRETED))
        acc0 = tl.dot(z, upstream0, acc0)
        if WIDE1:
            acc1 = tl.dot(z, upstream1, acc1)
    return acc0, acc1


@triton.jit
def _write_tap(partial, acc0, acc1, tap, taps, e, v0, v1, E: tl.constexpr, V: tl.constexpr, WIDE1: tl.constexpr):
    """Write both sections of one tap's weight gradient to partial (splits, taps, E, V)."""
    rows = ((tl.program_id(0).to(tl.int64) * taps + tap) * E + e)[:, None] * V
    tl.store(partial + rows + v0[None, :], acc0, mask=(e < E)[:, None] & (v0 < V)[None, :])
    if WIDE1:
        tl.store(partial + rows + v1[None, :], acc1, mask=(e < E)[:, None] & (v1 < V)[None, :])


@triton.jit
def _weight_gradient_kernel(
    x,  # (rows, K) bfloat16: the convolution's input
    mean, scale, shift,  # (K,) float32: its normalisation
    upstream,  # (rows, N) bfloat16: the gradient of the result
    partial,  # (splits, taps, N, K) float32 if BY_OUTPUT, else (splits, taps, K, N)
    rows, tiles, taps, D, H, W,
    TEMPORAL: tl.constexpr, NORMALISE: tl.constexpr, BY_OUTPUT: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, WIDE0: tl.constexpr, WIDE1: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sum the products of the input, shifted by a tap, and of the upstream gradient over `tiles` blocks of ROWS rows.

    A program computes TAPS taps, 1 or 3. One side of the product, the output's channels if BY_OUTPUT, is one section e
    of EVEN channels. The other side has two sections, v0 and v1. E and V are their numbers of channels.
    """
    E: tl.constexpr = N if BY_OUTPUT else K
    V: tl.constexpr = K if BY_OUTPUT else N
    tap = tl.program_id(1) * TAPS
    e = tl.arange(0, EVEN)
    v0 = tl.arange(0, WIDE0)
    v1 = WIDE0 + tl.arange(0, WIDE1 if WIDE1 else 1)
    mean0, scale0, shift0 = mean, scale, shift
    mean1, scale1, shift1 = mean, scale, shift
    if NORMALISE:
        mean0, scale0, shift0 = _vectors(mean, scale, shift, v0 if BY_OUTPUT else e, K)
        if BY_OUTPUT and WIDE1:
            mean1, scale1, shift1 = _vectors(mean, scale, shift, v1, K)
    a0 = tl.zeros((EVEN, WIDE0), tl.float32)
    a1 = tl.zeros((EVEN, WIDE1 if WIDE1 else 1), tl.float32)
    b0, b1, c0, c1 = a0, a1, a0, a1
    for tile in range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles):
        i = tile * ROWS + tl.arange(0, ROWS)
        upstream0 = _operand(_tile(upstream, i, i < rows, e if BY_OUTPUT else v0, N), INTERPRETED)
        upstream1 = upstream0
        if not BY_OUTPUT and WIDE1:
            upstream1 = _operand(_tile(upstream, i, i < rows, v1, N), INTERPRETED)
        a0, a1 = _add_tap(
            a0, a1, upstream0, upstream1, x, i, rows, tap, D, H, W,
            e, v0, v1, mean0, scale0, shift0, mean1, scale1, shift1,
            K, WIDE1, TEMPORAL, NORMALISE, BY_OUTPUT, INTERPRETED,
        )  # fmt: skip
        if TAPS == 3:
            b0, b1 = _add_tap(
                b0, b1, upstream0, upstream1, x, i, rows, tap + 1, D, H, W,
                e, v0, v1, mean0, scale0, shift0, mean1, scale1, shift1,
                K, WIDE1, TEMPORAL, NORMALISE, BY_OUTPUT, INTERPRETED,
            )  # fmt: skip
            c0, c1 = _add_tap(
                c0, c1, upstream0, upstream1, x, i, rows, tap + 2, D, H, W,
                e, v0, v1, mean0, scale0, shift0, mean1, scale1, shift1,
                K, WIDE1, TEMPORAL, NORMALISE, BY_OUTPUT, INTERPRETED,
            )  # fmt: skip
    _write_tap(partial, a0, a1, tap, taps, e, v0, v1, E, V, WIDE1)
    if TAPS == 3:
        _write_tap(partial, b0, b1, tap + 1, taps, e, v0, v1, E, V, WIDE1)
        _write_tap(partial, c0, c1, tap + 2, taps, e, v0, v1, E, V, WIDE1)


# ---------------------------------------------------------------- launches


class Settings(NamedTuple):
    """How a kernel is divided into programs, and how a program is compiled."""

    rows: int  # rows of a program, in the weight gradient of one iteration of its loop
    warps: int
    stages: int  # of Triton's software pipeline
    taps: int = 1  # of a program, in the weight gradient: 1 or 3


def sections(channels: int) -> tuple[int, int]:
    """Return the sizes of two sections, powers of two: the largest that fits, and one that holds the rest, or 0."""
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


def settings_for(kernel: str, weight: Tensor, normalised: bool, capability: int) -> Settings:
    """Return the settings of a kernel for a weight (C', C, ...).

    The tiles are large but spill no register on a GPU of this compute capability (benchmarks/resources.py). A larger
    tile uses the weights that it reads for more rows.

    Args:
        kernel: "forward", "input gradient" or "weight gradient".
        normalised: True if the convolution normalises its input.
        capability: 80 for 8.0. From 90 on, matrix units read one operand from shared memory, which frees registers.
    """
    large = max(weight.shape[:2]) > 144
    temporal = kind_of(weight) == "temporal"
    hopper = capability >= 90
    if kernel == "weight gradient":
        if hopper:
            return Settings(64, 8, 2, taps=1 if large else 3)
        return Settings(16 if large else 32, 8, 2)
    if hopper and large and kernel == "forward" and (temporal or not normalised):
        return Settings(128, 8, 2)
    many_written = kernel == "input gradient" and weight.shape[1] > 64
    if temporal and many_written and not hopper:
        return Settings(32, 4, 2)
    if large or (temporal and many_written):
        return Settings(64, 8, 2)
    if not hopper:
        return Settings(128, 8, 2)
    if kernel == "input gradient" or temporal:
        return Settings(256, 8, 2)
    return Settings(128 if normalised else 256, 8, 3)


@dataclass(frozen=True)
class Partials:
    """What the programs of a kernel write for their rows."""

    first: Tensor  # (programs, C) float32: means, or sums of g
    second: Tensor  # (programs, C) float32: sums of squared deviations, or sums of g (x - mean)
    totals: Tensor  # (programs,) float32: number of rows, where each of several equal frames counts


def forward_launch(
    x: Tensor,
    weight: Tensor,
    normalisation: Normalisation | None,
    repeated: int,
    times: int,
    settings: Settings | None = None,
) -> tuple[Launch, Tensor, Partials]:
    """Return the launch of a convolution, its result and the partial statistics."""
    matrices = weight.flatten(2).permute(2, 1, 0).contiguous()  # (taps, C, C')
    settings = settings or settings_for("forward", weight, normalisation is not None, compute_capability(x.device))
    return _convolution_launch(x, matrices, None, normalisation, kind_of(weight), repeated, times, settings)


def input_gradient_launch(
    upstream: Tensor, weight: Tensor, x: Tensor, normalisation: Normalisation | None, settings: Settings | None = None
) -> tuple[Launch, Tensor, Partials]:
    """Return the launch of an input gradient, the gradient and, with a normalisation, its partial sums."""
    matrices = weight.flatten(2).flip(2).permute(2, 0, 1).contiguous()  # (taps, C', C)
    settings = settings or settings_for(
        "input gradient", weight, normalisation is not None, compute_capability(x.device)
    )
    return _convolution_launch(upstream, matrices, x, normalisation, kind_of(weight), 0, 1, settings)


def _convolution_launch(
    x: Tensor,
    matrices: Tensor,
    raw: Tensor | None,
    normalisation: Normalisation | None,
    kind: str,
    repeated: int,
    times: int,
    settings: Settings,
) -> tuple[Launch, Tensor, Partials]:
    """Return the launch of `_convolution_kernel`, its target and the partial results.

    Args:
        raw: The convolution's input if the launch computes an input gradient, else None.
    """
    B, K, D, H, W = x.shape
    N = matrices.shape[2]
    rows = B * D * H * W
    programs = triton.cdiv(rows, settings.rows)
    target = torch.empty((B, N, D, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    summed = raw is None or normalisation is not None
    first, second = (x.new_empty((programs if summed else 0, N), dtype=torch.float32) for _ in range(2))
    totals = x.new_empty((programs if raw is None else 0,), dtype=torch.float32)
    mean, scale, shift = normalisation or (first, first, first)  # not read without normalisation
    (k0, k1), (n0, n1) = sections(K), sections(N)
    launch = Launch(
        _convolution_kernel,
        (programs,),
        {
            "x": x, "weight": matrices, "target": target, "raw": x if raw is None else raw,
            "mean": mean, "scale": scale, "shift": shift, "first": first, "second": second, "totals": totals,
            "rows": rows, "D": D, "H": H, "W": W, "repeated": repeated, "times": times,
        },
        {
            "TEMPORAL": kind == "temporal", "GRADIENT": raw is not None, "NORMALISE": normalisation is not None,
            "K": K, "K0": k0, "K1": k1, "N": N, "N0": n0, "N1": n1,
            "ROWS": settings.rows, "INTERPRETED": INTERPRETED,
        },
        settings.warps,
        settings.stages,
    )  # fmt: skip
    return launch, target, Partials(first, second, totals)


def merge_launch(partials: Partials, group: int, last: bool) -> tuple[Launch, Partials]:
    """Return the launch that merges the statistics of each `group` programs, and its results.

    Args:
        last: One group holds all programs, and its `second` becomes the variance.
    """
    programs, N = partials.first.shape
    groups = triton.cdiv(programs, group)
    merged = Partials(*(value.new_empty((groups, *value.shape[1:])) for value in vars(partials).values()))
    launch = Launch(
        _merge_kernel,
        (groups, triton.cdiv(N, 64)),
        {
            "means": partials.first, "squares": partials.second, "totals": partials.totals,
            "mean": merged.first, "square": merged.second, "total": merged.totals,
            "programs": programs, "group": group,
        },
        {"N": N, "LAST": last, "ROWS": 32, "BLOCK": 64},
    )  # fmt: skip
    return launch, merged


def weight_gradient_launch(
    upstream: Tensor, weight: Tensor, x: Tensor, normalisation: Normalisation | None, settings: Settings | None = None
) -> tuple[Launch, Tensor]:
    """Return the launch of a weight gradient, and its partial sums (splits, taps, C', C) or (splits, taps, C, C').

    The output's channels come first if they are a power of two. `weight_gradient` adds the sums.
    """
    settings = settings or settings_for(
        "weight gradient", weight, normalisation is not None, compute_capability(x.device)
    )
    kind = kind_of(weight)
    B, K, D, H, W = x.shape
    N = upstream.shape[1]
    by_output = sections(N)[1] == 0
    even, wide = (N, K) if by_output else (K, N)
    taps = 3 if kind == "temporal" else 9
    rows = B * D * H * W
    blocks, groups = triton.cdiv(rows, settings.rows), taps // settings.taps
    tiles = triton.cdiv(blocks, max(1, 2 * multiprocessors(x.device) // groups))
    splits = triton.cdiv(blocks, tiles)
    partial = x.new_empty((splits, taps, even, wide), dtype=torch.float32)
    mean, scale, shift = normalisation or (partial, partial, partial)  # not read without normalisation
    wide0, wide1 = sections(wide)
    launch = Launch(
        _weight_gradient_kernel,
        (splits, groups),
        {
            "x": x, "mean": mean, "scale": scale, "shift": shift, "upstream": upstream, "partial": partial,
            "rows": rows, "tiles": tiles, "taps": taps, "D": D, "H": H, "W": W,
        },
        {
            "TEMPORAL": kind == "temporal", "NORMALISE": normalisation is not None, "BY_OUTPUT": by_output,
            "K": K, "N": N, "EVEN": triton.next_power_of_2(even), "WIDE0": wide0, "WIDE1": wide1,
            "TAPS": settings.taps, "ROWS": settings.rows, "INTERPRETED": INTERPRETED,
        },
        settings.warps,
        settings.stages,
    )  # fmt: skip
    return launch, partial


# ---------------------------------------------------------------- registered ops


def merge(partials: Partials, group: int = 256) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance (C',) float32 of all rows, merged in the order of the programs.

    Args:
        group: Number of programs that a first launch merges into one. A second launch merges the results.
    """
    launch, groups = merge_launch(partials, group, last=False)
    launch()
    launch, merged = merge_launch(groups, len(groups.totals), last=True)
    launch()
    return merged.first[0], merged.second[0]


def weight_gradient(partial: Tensor, weight: Tensor) -> Tensor:
    """Return the weight gradient (C', C, ...) in the weight's dtype, from the sums of `weight_gradient_launch`."""
    gradient = partial.sum(0)
    by_output = sections(weight.shape[0])[1] == 0
    gradient = gradient.permute(1, 2, 0) if by_output else gradient.permute(2, 1, 0)
    return gradient.to(weight.dtype).contiguous().view(weight.shape)


def _normalisation(mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Normalisation | None:
    if mean is None or scale is None or shift is None:
        return None
    return Normalisation(mean.contiguous(), scale.contiguous(), shift.contiguous())


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


@torch.library.custom_op("dclr::convolve", mutates_args=())
def convolve_op(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    repeated: int,
    times: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of `Convolved`."""
    normalisation = _normalisation(mean, scale, shift)
    launch, y, partials = forward_launch(_channels_last(x), weight, normalisation, repeated, times)
    launch()
    return y, *merge(partials)


@convolve_op.register_fake
def _(x, weight, mean, scale, shift, repeated, times):
    B, _, D, H, W = x.shape
    y = x.new_empty((B, weight.shape[0], D, H, W)).contiguous(memory_format=torch.channels_last_3d)
    statistics = (x.new_empty((weight.shape[0],), dtype=torch.float32) for _ in range(2))
    return y, *statistics


@torch.library.custom_op("dclr::convolve_backward", mutates_args=())
def convolve_backward_op(
    upstream: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and weight, and the sums of g and of g (x - mean), which are empty without `mean`.

    g is the gradient of (x - mean) * scale + shift. The op has no derivative, so a second derivative is an error
    instead of silently wrong.
    """
    upstream, x, normalisation = _channels_last(upstream), _channels_last(x), _normalisation(mean, scale, shift)
    launch, gradient, partials = input_gradient_launch(upstream, weight, x, normalisation)
    launch()
    launch, partial = weight_gradient_launch(upstream, weight, x, normalisation)
    launch()
    sums, products = (
        values.sum(0, dtype=torch.float64).float() if normalisation else values.new_empty(0)
        for values in (partials.first, partials.second)
    )
    return gradient, weight_gradient(partial, weight), sums, products


@convolve_backward_op.register_fake
def _(upstream, x, weight, mean, scale, shift):
    channels = 0 if mean is None else x.shape[1]
    sums = (x.new_empty((channels,), dtype=torch.float32) for _ in range(2))
    gradient = torch.empty_like(x).contiguous(memory_format=torch.channels_last_3d)
    return gradient, torch.empty_like(weight, memory_format=torch.contiguous_format), *sums


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else autograd writes zeros for outputs without a gradient
    x, weight, mean, scale, shift, ctx.repeated, ctx.times = inputs
    ctx.save_for_backward(x, weight, mean, scale, shift, output[0], output[1])


def _backward(ctx, upstream, of_mean, of_variance):
    """Return the gradients of the inputs. The gradient of y includes that of its statistics.

    With share = c / sum c of a row's frame, the statistics add share * (dmean + 2 dvariance (y - mean)).
    """
    x, weight, mean, scale, shift, y, y_mean = ctx.saved_tensors
    if upstream is None:
        upstream = torch.zeros_like(y)
    if of_mean is not None or of_variance is not None:
        B, _, D, H, W = y.shape
        count = torch.where(torch.arange(D, device=y.device) == ctx.repeated, ctx.times, 1).float()
        share = (count / (B * (D + ctx.times - 1) * H * W)).view(D, 1, 1)
        sent = 0.0 if of_mean is None else of_mean.view(-1, 1, 1, 1)
        if of_variance is not None:
            sent = sent + 2 * of_variance.view(-1, 1, 1, 1) * (y.float() - y_mean.view(-1, 1, 1, 1))
        upstream = (upstream.float() + share * sent).to(y.dtype)
    gradient, of_weight, sums, products = torch.ops.dclr.convolve_backward(upstream, x, weight, mean, scale, shift)
    if mean is None:
        return gradient, of_weight, None, None, None, None, None
    return gradient, of_weight, -scale * sums, products, sums, None, None


convolve_op.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------- ahead of time

LAYERS = (
    ("temporal", 48, 64, (16, 56, 56)),  # stem
    ("spatial", 64, 144, (16, 56, 56)),  # first stage
    ("temporal", 144, 64, (16, 56, 56)),
    ("spatial", 128, 240, (8, 28, 28)),  # second stage
    ("temporal", 240, 128, (8, 28, 28)),
)
"""Kind, channels before and after, and D, H, W of the convolutions of r2plus1d_10 that the kernels take, for clips of
16 x 112 x 112. Channels inside (2+1)D convolutions are padded to a multiple of 16."""


def launches_to_compile() -> list[tuple[str, Launch]]:
    """Return every kernel for each of LAYERS with the settings for capabilities 8.0 and 9.0, with a label.

    The tensors are on the meta device, so they have no memory. The first convolution of a block gets clips that are
    normalised already, so spatial convolutions are also compiled without normalisation.
    """

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last_3d)

    found = []
    for kind, C, out, size in LAYERS:
        x, upstream, weight = meta(8, C, *size), meta(8, out, *size), meta(out, C, *CONVOLUTIONS[kind])
        normalisation = Normalisation(*torch.empty((3, C), device="meta"))
        for given in (normalisation,) if kind == "temporal" else (normalisation, None):
            label = f"{kind} {C} -> {out}" + ("" if given else ", without normalisation")
            for capability in (80, 90):
                forward, input_gradient, weight_gradient = (
                    settings_for(kernel, weight, given is not None, capability)
                    for kernel in ("forward", "input gradient", "weight gradient")
                )
                launches = {
                    "forward": forward_launch(x, weight, given, 0, 1, forward)[0],
                    "input gradient": input_gradient_launch(upstream, weight, x, given, input_gradient)[0],
                    "weight gradient": weight_gradient_launch(upstream, weight, x, given, weight_gradient)[0],
                }
                found += [(f"{label}, {name}", replace(each, capability=capability)) for name, each in launches.items()]
    means, squares = torch.empty((2, 1000, 144), device="meta")
    partials = Partials(means, squares, torch.empty(1000, device="meta"))
    found += [("groups of programs", merge_launch(partials, 256, last=False)[0])]
    return [*found, ("all groups", merge_launch(partials, 1000, last=True)[0])]
