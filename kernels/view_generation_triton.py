# mypy: allow-untyped-defs
"""Generation of the three views in Triton: from uint8 frames to finished views in three launches.

    1. _means    sums the luma of each frame, whose mean the contrast step needs; it writes no pixels
    2. _columns  crops, resizes and colours each frame of a blurred clip, and blurs it along its columns
    3. _finish   blurs these clips along their rows, and crops, resizes and colours the other clips; then it normalises
                 the pixels, computes the frame difference and writes the views

The kernels treat the B stills as B more clips of one frame. Row r < B of the table of parameters belongs to clip r, and
row B + r to its still. Frames are numbered in the same order: the T frames of each clip, clip by clip, then the stills.

A program works on one clip. The order of the colour steps and the blur differ between clips, so all threads of a
program take the same branch. `_finish` processes the frames of its clip in order and keeps the pixels of the previous
frame in registers. The frame difference therefore reads no memory. A still is one frame of its clip's static view,
which `generate_views` expands over time without a copy.

The memory traffic for a clip of T frames and views of h x w pixels is as follows. The box in the frames is read once (3
bytes a source pixel, 1.5 for YUV 4:2:0), and once more by `_means`. Two views of T * 3 * h * w values and one still of
3 * h * w values are written. For a blurred clip, the intermediate result is written once and read once:
2 * T * 3 * h * (w + 10) * 4 bytes. The blur reads each intermediate value 11 times, but 10 of these reads come from the
L1 cache. A blur within a tile would save these bytes but compute a border of 10 more rows and columns for each tile.

Letters: B clips, T frames, H, W source pixels, h, w pixels of a view, C columns of the table.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dclr.kernels.backend import INTERPRETED
from dclr.kernels.colour import yuv_coefficients
from dclr.kernels.launch import Launch
from dclr.kernels.rounding_triton import rounded
from dclr.kernels.space_to_depth import CHANNELS, blocks_shape
from dclr.kernels.types import BLUR_KERNEL, MEAN, STD, TABLE_COLUMNS, Augmentation, Yuv420

# Columns of the table of parameters, (rows, C) float32, which holds whole numbers of pixels exactly. C is 18, or 24 for
# YUV frames.
_TOP, _LEFT, _HEIGHT, _WIDTH = (tl.constexpr(TABLE_COLUMNS["box"] + i) for i in range(4))
_FLIP, _GRAYSCALE, _JITTER, _SIGMA, _FACTORS, _ORDER, _ORIENTATION, _ADDITIVE, _YUV = (
    tl.constexpr(TABLE_COLUMNS[name])
    for name in ("flip", "grayscale", "jitter", "sigma", "factors", "order", "orientation", "additive", "yuv")
)

_RADIUS = tl.constexpr(BLUR_KERNEL // 2)
_MEAN_R, _MEAN_G, _MEAN_B = (tl.constexpr(mean) for mean in MEAN)
_PER_STD_R, _PER_STD_G, _PER_STD_B = (tl.constexpr(1 / std) for std in STD)

# Partial sums of a frame's luma: one for each 16 of 112 rows. They are always added in the same order, so the mean is
# the same in every run.
_SPLITS = 7
_MEANS_COLUMNS = 16  # width of the tiles of _means, which divide 112 x 112
_MEANS_ROWS = {False: 16, True: 8}  # their height for RGB and for YUV, which would need 137 registers with 16 rows
_MEANS_WARPS = 2  # each of their 64 threads then has four or two pixels of a tile's column, which share its `_taps`
# Register limit of a thread in two rare configurations, where ptxas 12.9 (Triton 3.8) would otherwise move 8 and 24
# bytes to local memory in order to run more programs at once.
_REGISTERS = 96
_COLUMNS_BLOCK = 128  # columns of a program of _columns, enough for 112 columns and a border of 10
_STRIP = 56  # rows of a program of _columns, which also computes a border of 10 rows
_FINISH_BLOCK = 256  # pixels of a program of _finish: 49 programs for 112 x 112


# ---------------------------------------------------------------- kernels


@triton.jit
def _box(row, H, W):
    """Return top, left, height and width of the crop, clamped so that no program reads outside the H x W buffer."""
    top = tl.minimum(tl.maximum(tl.load(row + _TOP), 0.0), H - 1.0).to(tl.int32)
    left = tl.minimum(tl.maximum(tl.load(row + _LEFT), 0.0), W - 1.0).to(tl.int32)
    height = tl.minimum(tl.maximum(tl.load(row + _HEIGHT), 1.0), (H - top).to(tl.float32)).to(tl.int32)
    width = tl.minimum(tl.maximum(tl.load(row + _WIDTH), 1.0), (W - left).to(tl.float32)).to(tl.int32)
    return top, left, height, width


@triton.jit
def _axes(row, H, W, VALUES: tl.constexpr):
    """Return what the axes of the view read in the frame, as three tuples.

    vertical, horizontal: start and extent of the crop along the frame's axis that this axis of the view reads.
    pitches: distances in bytes between neighbours along the vertical and along the horizontal axis, first in `luma`,
        then in the chroma planes. `luma` has VALUES bytes a pixel: 3 for packed RGB, 1 for YUV.
    If the frame lies on its side, the vertical axis of the view reads along the rows of the frame.
    """
    top, left, height, width = _box(row, H, W)
    lying = (tl.load(row + _ORIENTATION).to(tl.int32) & 1) != 0
    chroma_W = (W + 1) // 2
    vertical = (tl.where(lying, left, top), tl.where(lying, width, height))
    horizontal = (tl.where(lying, top, left), tl.where(lying, height, width))
    pitches = (
        tl.where(lying, 1, W) * VALUES,
        tl.where(lying, W, 1) * VALUES,
        tl.where(lying, 1, chroma_W),
        tl.where(lying, chroma_W, 1),
    )
    return vertical, horizontal, pitches


@triton.jit
def _taps(position, axis, outputs):
    """Return the two source pixels next to each pixel of the view along one axis, and the weight of the second.

    The result equals F.interpolate of the crop start .. start + extent to `outputs` pixels, with half-pixel centres.
    Pixels outside the crop are not used. `axis` is (start, extent).
    """
    start, extent = axis
    scale = tl.div_rn(extent.to(tl.float32), outputs + 0.0)  # no .to: an argument of 1 is a constant
    at = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), extent - 1)
    second = tl.minimum(first + 1, extent - 1)
    return start + first, start + second, at - first


@triton.jit
def _source_pixel(luma, u, v, y, x, pitches, yuv, YUV: tl.constexpr):
    """Return R, G, B in 0..255 of the source pixels y along the vertical and x along the horizontal axis of the view.

    RGB: luma (H, W, 3) is the packed frame, u and v are unused. YUV: luma (H, W), u and v (ceil(H / 2), ceil(W / 2)).
    """
    pitch_y, pitch_x, chroma_pitch_y, chroma_pitch_x = pitches
    pixel = y * pitch_y + x * pitch_x
    if YUV:
        chroma = (y // 2) * chroma_pitch_y + (x // 2) * chroma_pitch_x  # repeated, not interpolated
        offset, scale, red_v, green_u, green_v, blue_u = yuv
        light = (tl.load(luma + pixel).to(tl.float32) - offset) * scale
        cb = tl.load(u + chroma).to(tl.float32) - 128
        cr = tl.load(v + chroma).to(tl.float32) - 128
        r = light + red_v * cr
        g = light + green_u * cb + green_v * cr
        b = light + blue_u * cb
        r = tl.minimum(tl.maximum(r, 0.0), 255.0)
        g = tl.minimum(tl.maximum(g, 0.0), 255.0)
        b = tl.minimum(tl.maximum(b, 0.0), 255.0)
    else:
        first = luma + pixel
        r = tl.load(first).to(tl.float32)
        g = tl.load(first + 1).to(tl.float32)
        b = tl.load(first + 2).to(tl.float32)
    return r, g, b


@triton.jit
def _sample(luma, u, v, rows, columns, pitches, yuv, YUV: tl.constexpr):
    """Return R, G, B in 0..1 of the resized crop.

    `rows` and `columns` are the results of `_taps` for the vertical and the horizontal axis of the view.
    """
    above, below, down = rows
    before, after, right = columns
    r0, g0, b0 = _source_pixel(luma, u, v, above, before, pitches, yuv, YUV)
    r1, g1, b1 = _source_pixel(luma, u, v, above, after, pitches, yuv, YUV)
    r2, g2, b2 = _source_pixel(luma, u, v, below, before, pitches, yuv, YUV)
    r3, g3, b3 = _source_pixel(luma, u, v, below, after, pitches, yuv, YUV)
    left = 1 - right
    upper, lower = (1 - down) / 255, down / 255
    w0, w1, w2, w3 = upper * left, upper * right, lower * left, lower * right
    r = w0 * r0 + w1 * r1 + w2 * r2 + w3 * r3
    g = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3
    b = w0 * b0 + w1 * b1 + w2 * b2 + w3 * b3
    return r, g, b


@triton.jit
def _clamp(x):
    """Clamp x to 0..1."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(r, g, b):
    """Return the luma of R, G, B with the weights of BT.601, like kornia's rgb_to_grayscale."""
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _channel_of_hue(distance, value, chroma):
    """Return a channel of a colour with this value and chroma.

    `distance` is the distance between the colour's hue and the channel's own hue, in sixths of the colour circle.
    """
    distance -= 6 * tl.floor(distance * (1 / 6) + 0.5)
    return value - chroma * _clamp(tl.abs(distance) - 1)


@triton.jit
def _shift_hue(r, g, b, turns):
    """Shift the hue by `turns` of the colour circle, at constant value and saturation.

    This is kornia.enhance.adjust_hue in closed form.

    A channel has its greatest value within a sixth of the circle from its own hue (red 0, green 2 sixths, blue 4
    sixths). It has its least value from two sixths on, and is linear between. These distances are small where they
    matter, so their rounding error is smaller than that of kornia's angle of up to 2 pi. kornia also adds 1e-8 to a
    denominator, which changes the result by at most 1e-8.
    """
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    red = r == value
    green = g == value
    difference = tl.where(red, g - b, tl.where(green, b - r, r - g)) / tl.where(chroma == 0, 1.0, chroma)
    # The colour's hue is the hue of the greatest channel plus `difference`.
    shift = 6 * turns
    same, behind, ahead = shift + 0.0, shift - 2, shift + 2
    return (
        _channel_of_hue(tl.where(red, same, tl.where(green, ahead, behind)) + difference, value, chroma),
        _channel_of_hue(tl.where(red, behind, tl.where(green, same, ahead)) + difference, value, chroma),
        _channel_of_hue(tl.where(red, ahead, tl.where(green, behind, same)) + difference, value, chroma),
    )


@triton.jit
def _scale_saturation(r, g, b, factor):
    """Multiply the saturation of HSV by `factor` and clamp it to 1, at constant value and hue.

    This is kornia.enhance.adjust_saturation in closed form. Value is the greatest channel, and saturation is
    chroma / value. So the distance of each channel from the value is multiplied by `factor`, but by at most
    value / chroma, which gives a saturation of 1.
    """
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    factor = tl.minimum(factor, value / tl.where(chroma == 0, 1.0, chroma))
    return value - (value - r) * factor, value - (value - g) * factor, value - (value - b) * factor


@triton.jit
def _colour_row(row):
    """Return the values that `_colour` needs from a row of the table.

    They are grayscale, jitter, the four factors, and their order as one integer with 2 bits a step. jitter is 0 for
    none, 1 for the multiplicative form and 2 for the additive form.
    """
    order = 0
    for step in tl.static_range(4):
        order += (tl.load(row + _ORDER + step).to(tl.int32) & 3) << (2 * step)
    return (
        tl.load(row + _GRAYSCALE),
        tl.load(row + _JITTER) * (1 + tl.load(row + _ADDITIVE)),
        tl.load(row + _FACTORS),
        tl.load(row + _FACTORS + 1),
        tl.load(row + _FACTORS + 2),
        tl.load(row + _FACTORS + 3),
        order,
    )


@triton.jit
def _colour(r, g, b, colour, mean, steps):
    """Apply grayscale and the first `steps` colour steps, if the clip has them. `augment` defines their two forms.

    `mean` is the frame's mean luma before the contrast step, which is 0 in the additive form.
    """
    grayscale, jitter, brightness, contrast, saturation, hue, order = colour
    if grayscale != 0:
        r = _luma(r, g, b)
        g = r
        b = r
    if jitter != 0:
        r = _clamp(r)
        g = _clamp(g)
        b = _clamp(b)
        for step in range(steps):
            operation = (order >> (2 * step)) & 3
            if operation == 3:
                if hue != 0:
                    r, g, b = _shift_hue(r, g, b, hue)
            elif (operation == 2) & (jitter == 2):
                r, g, b = _scale_saturation(r, g, b, saturation)
            else:
                # The other operations multiply each channel and add a number to it.
                factor = brightness
                added = r * 0
                if (operation == 0) & (jitter == 2):
                    factor = 1.0
                    added += brightness - 1
                if operation == 1:
                    factor = contrast
                    added += mean * (1 - contrast)
                if operation == 2:
                    factor = saturation
                    added = _luma(r, g, b) * (1 - saturation)
                r = _clamp(factor * r + added)
                g = _clamp(factor * g + added)
                b = _clamp(factor * b + added)
        r = _clamp(r)
        g = _clamp(g)
        b = _clamp(b)
    return r, g, b


@triton.jit
def _yuv_row(row, YUV: tl.constexpr):
    """Return the six coefficients that convert YUV to RGB, in the order of `yuv_coefficients`.

    They are unused for RGB frames.
    """
    if YUV:
        return (
            tl.load(row + _YUV),
            tl.load(row + _YUV + 1),
            tl.load(row + _YUV + 2),
            tl.load(row + _YUV + 3),
            tl.load(row + _YUV + 4),
            tl.load(row + _YUV + 5),
        )
    else:
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def _frame_mean(partials, frame, pixels, SPLITS: tl.constexpr):
    """Return the mean luma of a frame from its partial sums, which are added in order."""
    total = tl.load(partials + frame * SPLITS)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials + frame * SPLITS + split)
    return total / pixels


@triton.jit
def _reversals(row):
    """Return whether the vertical and the horizontal axis of the view run against the frame's axis that they read.

    The horizontal axis is reversed by one or two quarter turns clockwise, by the mirror of the orientation and by the
    flip. Two of these cancel each other. Two or three quarter turns reverse the vertical axis.
    """
    orientation = tl.load(row + _ORIENTATION).to(tl.int32)
    half_turn = (orientation >> 1) & 1
    flip = tl.where(tl.load(row + _FLIP) != 0, 1, 0)
    return half_turn != 0, ((orientation & 1) ^ half_turn ^ (orientation >> 2) ^ flip) != 0


@triton.jit
def _reversed(position, reverse, size):
    """Return positions 0..size - 1 counted from the other end if `reverse` is true."""
    return tl.where(reverse, size - 1 - position, position)


@triton.jit
def _mirrored(position, size, smaller_side):
    """Return an index within 0..size - 1 for a pixel at most 5 outside it.

    The index is mirrored at the border pixel. If a side of the view is too small for that, it is the index of the
    border pixel.
    """
    if smaller_side > _RADIUS:
        position = tl.where(position < 0, -position, position)
        position = tl.where(position >= size, 2 * (size - 1) - position, position)
    return tl.minimum(tl.maximum(position, 0), size - 1)


@triton.jit
def _gaussian(sigma):
    """Return the weights of the blur at 0, 1, .. 5 pixels from the centre. They add up to 1 over all 11 pixels."""
    scale = -0.5 / (sigma * sigma)  # minus infinity if the square underflows; only the centre then has a weight
    w1 = tl.exp(scale)
    w2 = tl.exp(4 * scale)
    w3 = tl.exp(9 * scale)
    w4 = tl.exp(16 * scale)
    w5 = tl.exp(25 * scale)
    norm = 1 / (1 + 2 * (w1 + w2 + w3 + w4 + w5))
    return norm, w1 * norm, w2 * norm, w3 * norm, w4 * norm, w5 * norm


@triton.jit
def _before_contrast(colour):
    """Return the number of colour steps before contrast, and how these steps change a frame's mean luma.

    The second result is true if they multiply the mean luma by a factor. The third result is this factor.

    A brightness of 0..1 is the factor, because its result needs no clamping. A saturation of 0..1 needs no clamping
    either, and does not change the luma of a pixel. Saturation and hue do not change a grey pixel.
    """
    grayscale, _, brightness, _, saturation, hue, order = colour
    steps = 0
    for step in tl.static_range(1, 4):
        if ((order >> (2 * step)) & 3) == 1:
            steps = step
    linear = True
    factor = 1.0
    for step in range(steps):
        operation = (order >> (2 * step)) & 3
        if operation == 0:
            linear &= (brightness >= 0) & (brightness <= 1)
            factor = brightness
        if operation == 2:
            linear &= (grayscale != 0) | ((saturation >= 0) & (saturation <= 1))
        if operation == 3:
            linear &= (grayscale != 0) | (hue == 0)
    return steps, linear, factor


@triton.jit
def _weight(position, extent, outputs):
    """Return the sum of the weights that a source pixel has in all pixels of the view, along one axis.

    position: the source pixel, counted from the start of the crop. Outside 0..extent - 1, the result is 0.
    extent, outputs: lengths of the crop and of the view.
    A pixel of the view is at `at` in the crop. As in `_taps`, source pixels less than 1 away have the weight
    1 - |at - position|. The loop visits the pixels of the view that can be that near.
    """
    scale = tl.div_rn(extent.to(tl.float32), outputs + 0.0)
    position = position.to(tl.float32)
    output = tl.floor((position - 0.5) / scale - 0.5)  # the last pixel of the view that is not beyond position - 1
    total = position * 0
    for _ in range((2 / scale).to(tl.int32) + 1):
        output += 1
        at = tl.minimum(tl.maximum((output + 0.5) * scale - 0.5, 0.0), extent - 1.0)
        weight = tl.maximum(1 - tl.abs(at - position), 0.0)
        total += tl.where((output >= 0) & (output < outputs), weight, 0.0)
    return total


@triton.jit
def _means(
    luma, u, v, still_luma, still_u, still_v, table, partials,
    B, T, H, W, still_H, still_W, h, w,
    YUV: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute partial sums of each frame's luma before its contrast step. They are 0 if contrast needs no mean.

    Inputs:
        RGB frames: luma (B, T, H, W, 3) and still_luma (B, still_H, still_W, 3), uint8. u and v are unused.
        YUV frames: luma (B, T, H, W), u and v (B, T, ceil(H / 2), ceil(W / 2)), uint8. The planes of stills have no T.
        table (rows, C), float32.
    Output: partials (images, SPLITS), float32, where images is B * T plus the number of stills.

    A program owns every SPLITS-th row of tiles of one frame. A tile has ROWS x COLUMNS pixels. The program computes
    the `_taps` of a tile's rows once for all columns.

    If the steps before contrast only multiply the mean luma, the mean is a weighted sum over the source rows. Pixels
    then need no colour steps, and a column reads two pixels of each source row, in place of four for each row of the
    view. This is less work if the crop has at most twice as many rows as the view.
    """
    frame = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row, luma, u, v, H, W = _frame(
        frame, luma, u, v, still_luma, still_u, still_v, table, B, T, H, W, still_H, still_W, YUV, C
    )
    colour = _colour_row(row)
    yuv = _yuv_row(row, YUV)
    sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    if (colour[1] == 1) & (tl.load(row + _FACTORS + 1) != 1):
        steps, linear, factor = _before_contrast(colour)
        vertical, horizontal, pitches = _axes(row, H, W, 1 if YUV else 3)  # reversed axes have the same mean
        start, extent = vertical
        if linear & (extent <= 2 * h):
            for top in range(split * ROWS, extent, SPLITS * ROWS):
                y = top + tl.arange(0, ROWS)[None, :]
                weight = _weight(y, extent, h) * (factor / 255)  # 0 for y >= extent
                y = start + tl.minimum(y, extent - 1)
                luma_sums = tl.zeros((COLUMNS, ROWS), tl.float32)
                for left in range(0, w, COLUMNS):
                    x = left + tl.arange(0, COLUMNS)[:, None]
                    before, after, right = _taps(tl.minimum(x, w - 1), horizontal, w)
                    r0, g0, b0 = _source_pixel(luma, u, v, y, before, pitches, yuv, YUV)
                    r1, g1, b1 = _source_pixel(luma, u, v, y, after, pitches, yuv, YUV)
                    luma_sums += tl.where(x < w, 1 - right, 0.0) * _luma(r0, g0, b0)
                    luma_sums += tl.where(x < w, right, 0.0) * _luma(r1, g1, b1)
                sums += weight * luma_sums
        else:
            for top in range(split * ROWS, h, SPLITS * ROWS):
                y = top + tl.arange(0, ROWS)[None, :]
                rows = _taps(tl.minimum(y, h - 1), vertical, h)
                for left in range(0, w, COLUMNS):
                    x = left + tl.arange(0, COLUMNS)[:, None]
                    columns = _taps(tl.minimum(x, w - 1), horizontal, w)
                    r, g, b = _sample(luma, u, v, rows, columns, pitches, yuv, YUV)
                    r, g, b = _colour(r, g, b, colour, 0.0, steps)
                    sums += tl.where((x < w) & (y < h), _luma(r, g, b), 0.0)
    tl.store(partials + tl.program_id(0), tl.sum(sums))


@triton.jit
def _frame(
    frame, luma, u, v, still_luma, still_u, still_v, table,
    B, T, H, W, still_H, still_W,
    YUV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return the row of the table, the planes and the size of a frame or still. Pointers as in `_means`."""
    still = frame >= B * T
    if still:
        luma, u, v = still_luma, still_u, still_v
    # These are not assigned in the branch, because an argument of 1 is a constant, which a branch cannot change.
    H = tl.where(still, still_H, H)
    W = tl.where(still, still_W, W)
    clip = tl.where(still, B + frame - B * T, frame // T)
    index = tl.where(still, frame - B * T, frame).to(tl.int64)
    if YUV:
        luma += index * (H * W)
        u += index * (((H + 1) // 2) * ((W + 1) // 2))
        v += index * (((H + 1) // 2) * ((W + 1) // 2))
    else:
        luma += index * (H * W * 3)
    return table + clip * C, luma, u, v, H, W


@triton.jit
def _advance(sums, x, weights):
    """Add the next pixel x of a column. Return the blurred pixel 5 above x and the new sums of the next ten pixels.

    Before the call, sums[j] is the unfinished sum of the blurred pixel 5 - j above x.
    """
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = sums
    w0, w1, w2, w3, w4, w5 = weights
    done = s0 + w5 * x
    sums = (
        s1 + w4 * x,
        s2 + w3 * x,
        s3 + w2 * x,
        s4 + w1 * x,
        s5 + w0 * x,
        s6 + w1 * x,
        s7 + w2 * x,
        s8 + w3 * x,
        s9 + w4 * x,
        w5 * x,
    )
    return done, sums


@triton.jit
def _columns(
    luma, u, v, still_luma, still_u, still_v, table, partials, blurred,
    B, T, H, W, still_H, still_W, h, w, strips, blocks,
    YUV: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Crop, resize and colour each frame, then blur it along its columns. Skip frames without blur.

    Inputs: those of `_means` and its output partials (images, SPLITS).
    Output: blurred (images, 3, h, w + 10), float32, with a border of 5 columns on both sides.

    A program owns BLOCK columns of STRIP rows of one frame and processes them from top to bottom. It computes each
    pixel once and adds it to the 11 sums that it belongs to, which are in registers.
    """
    block = tl.program_id(0) % blocks
    strip = tl.program_id(0) // blocks % strips
    frame = tl.program_id(0) // (blocks * strips)
    row, luma, u, v, H, W = _frame(
        frame, luma, u, v, still_luma, still_u, still_v, table, B, T, H, W, still_H, still_W, YUV, C
    )
    sigma = tl.load(row + _SIGMA)
    if sigma > 0:
        weights = _gaussian(sigma)
        colour = _colour_row(row)
        yuv = _yuv_row(row, YUV)
        mean = _frame_mean(partials, frame, h * w, SPLITS)
        column = block * BLOCK + tl.arange(0, BLOCK)
        stored = column < w + 2 * _RADIUS
        vertical, horizontal, pitches = _axes(row, H, W, 1 if YUV else 3)
        y_reversed, x_reversed = _reversals(row)
        x = _reversed(_mirrored(column - _RADIUS, w, tl.minimum(h, w)), x_reversed, w)
        columns = _taps(x, horizontal, w)
        zero = tl.zeros((BLOCK,), tl.float32)
        red = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        green = red
        blue = red
        first = strip * STRIP
        plane = h * (w + 2 * _RADIUS)
        target = blurred + frame.to(tl.int64) * 3 * plane + column
        for y in range(first - _RADIUS, tl.minimum(first + STRIP, h) + _RADIUS):
            rows = _taps(_reversed(_mirrored(y, h, tl.minimum(h, w)), y_reversed, h), vertical, h)
            r, g, b = _sample(luma, u, v, rows, columns, pitches, yuv, YUV)
            r, g, b = _colour(r, g, b, colour, mean, 4)
            r, red = _advance(red, r, weights)
            g, green = _advance(green, g, weights)
            b, blue = _advance(blue, b, weights)
            if y >= first + _RADIUS:
                line = target + (y - _RADIUS) * (w + 2 * _RADIUS)
                tl.store(line, r, stored)
                tl.store(line + plane, g, stored)
                tl.store(line + 2 * plane, b, stored)


@triton.jit
def _blur_row(pixel, weights):
    """Return the weighted sum of 11 pixels of a row. `pixel` points to the first."""
    w0, w1, w2, w3, w4, w5 = weights
    total = w5 * (tl.load(pixel) + tl.load(pixel + 10))
    total += w4 * (tl.load(pixel + 1) + tl.load(pixel + 9))
    total += w3 * (tl.load(pixel + 2) + tl.load(pixel + 8))
    total += w2 * (tl.load(pixel + 3) + tl.load(pixel + 7))
    total += w1 * (tl.load(pixel + 4) + tl.load(pixel + 6))
    return total + w0 * tl.load(pixel + 5)


@triton.jit
def _four(a, b, c, d):
    """Return four tensors (...,) as one (..., 4)."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _store_pixels(
    target, r, g, b, start, elements, inside, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BY_BITS: tl.constexpr
):
    """Write pixels start .. start + BLOCK of the frame at `target`, which has `elements` values.

    inside: None if the frame is (h, w, 3). Else the frame consists of blocks of 2 x 2 pixels, 16 values each, and
    pixels that are not `inside` the view are 0.

    The three channels are first brought into memory order, so that each thread writes 16 bytes and each warp one
    contiguous range. Three separate stores would each write every third value.
    """
    element = tl.arange(0, 4 * BLOCK)
    if inside is None:
        pixels = tl.reshape(rounded(_four(r, g, b, b), DTYPE, BY_BITS), (4 * BLOCK,))
        # Only 3 * BLOCK values are needed, but sizes must be powers of 2.
        values = tl.gather(pixels, tl.minimum(element // 3 * 4 + element % 3, 4 * BLOCK - 1), 0)
        element += start * 3
        tl.store(target + element, values, (element < elements) & (element < (start + BLOCK) * 3))
    else:
        zero = tl.zeros((BLOCK,), tl.float32)
        r = tl.where(inside, r, zero)
        g = tl.where(inside, g, zero)
        b = tl.where(inside, b, zero)
        pixels = tl.reshape(rounded(_four(r, g, b, zero), DTYPE, BY_BITS), (4 * BLOCK,))
        # Value 3 of each pixel is 0, and so are the channels 12 to 15 of each block.
        channel = element % 16
        source = tl.where(channel < 12, channel // 3 * 4 + channel % 3, 3)
        element += start * 4
        tl.store(target + element, tl.gather(pixels, element - start * 4 - channel + source, 0), element < elements)


@triton.jit
def _finish(
    luma, u, v, still_luma, still_u, still_v, table, partials, blurred, rgb, static, dynamic,
    B, T, H, W, still_H, still_W, h, w, elements, blocks,
    YUV: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    BOUNDARY: tl.constexpr, DTYPE: tl.constexpr, BY_BITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the finished views. With BOUNDARY "none", write only rgb.

    Inputs: those of `_columns` and its output blurred (images, 3, h, w + 10). elements is the number of values that a
    frame of a view has in memory.
    Outputs of dtype DTYPE: rgb and dynamic (B, T, h, w, 3), which is (B, 3, T, h, w) in channels_last_3d, and static
    (B, 1, h, w, 3). With BLOCKS, each has the layout of space_to_depth.py instead: for rgb and dynamic
    (B, T, ceil(h / 2) + 3, ceil(w / 2) + 3, 16). Four consecutive pixels of a program are then one block. Programs also
    own the border blocks and write zeros there, so the memory needs no memset.

    A program owns BLOCK consecutive pixels in all frames of one clip, which it processes in order, or BLOCK pixels of
    one still.
    """
    block = tl.program_id(0) % blocks
    clip = tl.program_id(0) // blocks
    still = clip >= B
    first_frame = tl.where(still, B * T + clip - B, clip * T)
    frames = tl.where(still, 1, T)
    row, luma, u, v, H, W = _frame(
        first_frame, luma, u, v, still_luma, still_u, still_v, table, B, T, H, W, still_H, still_W, YUV, C
    )
    sigma = tl.load(row + _SIGMA)
    weights = _gaussian(tl.where(sigma > 0, sigma, 1.0))
    colour = _colour_row(row)
    yuv = _yuv_row(row, YUV)

    start = block * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    if BLOCKS:
        width = (w + 1) // 2 + 3
        y = pixel // 4 // width * 2 - 4 + pixel // 2 % 2
        x = pixel // 4 % width * 2 - 4 + pixel % 2
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        y = tl.minimum(tl.maximum(y, 0), h - 1)
        x = tl.minimum(tl.maximum(x, 0), w - 1)
    else:
        pixel = tl.minimum(pixel, h * w - 1)
        y = pixel // w
        x = pixel % w
        inside = None
    vertical, horizontal, pitches = _axes(row, H, W, 1 if YUV else 3)
    y_reversed, x_reversed = _reversals(row)
    rows = _taps(_reversed(y, y_reversed, h), vertical, h)
    columns = _taps(_reversed(x, x_reversed, w), horizontal, w)
    plane = h * (w + 2 * _RADIUS)
    padded = blurred + first_frame.to(tl.int64) * 3 * plane + y * (w + 2 * _RADIUS) + x

    view = clip.to(tl.int64) * T * elements
    rgb += view
    static += (clip - B).to(tl.int64) * elements
    dynamic += view
    before_r = tl.zeros((BLOCK,), tl.float32)
    before_g = before_r
    before_b = before_r
    first_r = before_r
    first_g = before_r
    first_b = before_r
    for t in range(frames):
        if sigma > 0:
            r = _blur_row(padded, weights)
            g = _blur_row(padded + plane, weights)
            b = _blur_row(padded + 2 * plane, weights)
        else:
            r, g, b = _sample(luma, u, v, rows, columns, pitches, yuv, YUV)
            mean = _frame_mean(partials, first_frame + t, h * w, SPLITS)
            r, g, b = _colour(r, g, b, colour, mean, 4)
        r = (r - _MEAN_R) * _PER_STD_R
        g = (g - _MEAN_G) * _PER_STD_G
        b = (b - _MEAN_B) * _PER_STD_B

        if BOUNDARY == "none":
            _store_pixels(rgb, r, g, b, start, elements, inside, DTYPE, BLOCK, BY_BITS)
        elif still:
            _store_pixels(static, r, g, b, start, elements, inside, DTYPE, BLOCK, BY_BITS)
        else:
            _store_pixels(rgb, r, g, b, start, elements, inside, DTYPE, BLOCK, BY_BITS)
            if t > 0:
                dr = r - before_r
                dg = g - before_g
                db = b - before_b
                _store_pixels(dynamic + t * elements, dr, dg, db, start, elements, inside, DTYPE, BLOCK, BY_BITS)
                if BOUNDARY == "replicate":  # noqa: SIM102 (evaluated when compiled, the next one when run)
                    if t == 1:
                        _store_pixels(dynamic, dr, dg, db, start, elements, inside, DTYPE, BLOCK, BY_BITS)
            if BOUNDARY == "wrap":
                first_r = tl.where(t == 0, r, first_r)
                first_g = tl.where(t == 0, g, first_g)
                first_b = tl.where(t == 0, b, first_b)
        before_r = r
        before_g = g
        before_b = b

        rgb += elements
        padded += 3 * plane
        if YUV:
            luma += H * W
            u += ((H + 1) // 2) * ((W + 1) // 2)
            v += ((H + 1) // 2) * ((W + 1) // 2)
        else:
            luma += H * W * 3

    # Write the first frame of the dynamic view. "replicate" has written it above, unless there is no second frame.
    if BOUNDARY != "none":  # noqa: SIM102 (as above)
        if still == 0:
            if BOUNDARY == "wrap":
                first_r -= before_r
                first_g -= before_g
                first_b -= before_b
                _store_pixels(dynamic, first_r, first_g, first_b, start, elements, inside, DTYPE, BLOCK, BY_BITS)
            elif (BOUNDARY == "zero") | (T == 1):
                _store_pixels(dynamic, first_r, first_r, first_r, start, elements, inside, DTYPE, BLOCK, BY_BITS)


# ---------------------------------------------------------------- launches


def table_of(rows: Augmentation, frames: Tensor | Yuv420) -> Tensor:
    """Return the table of parameters for these rows and the colour space of their frames, (B, C) float32."""
    values = [getattr(rows, name)[:, None].flatten(1) for name in TABLE_COLUMNS if name != "yuv"]  # (B, width) each
    table = torch.cat(values, dim=1)  # promoted to float32
    if isinstance(frames, Tensor):
        return table
    coefficients = yuv_coefficients(frames.bt709, frames.full_range)
    if coefficients.device != table.device:
        # The rows may be on the CPU and the flags on the device. A copy to the CPU would make the host wait.
        table, coefficients = (tensor.to(frames.y.device, non_blocking=True) for tensor in (table, coefficients))
    return torch.cat([table, coefficients], dim=1)


def table_width(yuv: bool) -> int:
    """Return C, the number of columns of the table of parameters."""
    return TABLE_COLUMNS["yuv"] + (6 if yuv else 0)


@dataclass(frozen=True)
class Planes:
    """The tensors of frames or stills: packed RGB in `luma` alone, or three planes."""

    luma: Tensor  # (B, T, H, W, 3) or (B, T, H, W); without T for stills
    u: Tensor | None = None  # (B, T, ceil(H / 2), ceil(W / 2)); without T for stills
    v: Tensor | None = None

    def size(self) -> tuple[int, int]:
        """Return height and width of the buffer."""
        H, W = self.luma.shape[-2:] if self.u is not None else self.luma.shape[-3:-1]
        return H, W


def _launches(
    frames: Planes,
    stills: Planes | None,
    table: Tensor,  # (B, C), or (2 B, C) with stills
    views: tuple[Tensor, ...],  # the output of `_empty_views`; rgb alone without stills
    size: tuple[int, int],
    boundary: str,
) -> list[Launch]:
    """Return the launches in the order in which they must run.

    Raises ValueError if the table has another shape, because the kernels would read beyond its memory.
    """
    rgb, static, dynamic = views if stills is not None else views * 3
    (B, channels, T), (h, w) = rgb.shape[:3], size
    by_blocks = channels == CHANNELS
    images = B * T + (B if stills is not None else 0)
    rows = 2 * B if stills is not None else B
    device = rgb.device
    partials = torch.empty((images, _SPLITS), dtype=torch.float32, device=device)
    blurred = torch.empty((images, 3, h, w + 2 * _RADIUS.value), dtype=torch.float32, device=device)

    still = frames if stills is None else stills
    (H, W), (still_H, still_W) = frames.size(), still.size()
    yuv = frames.u is not None
    if table.shape != (rows, table_width(yuv)):
        raise ValueError(f"table has shape {tuple(table.shape)}, but must have {(rows, table_width(yuv))}")
    source: dict[str, Tensor | int | float] = {
        "luma": frames.luma,
        "u": frames.luma if frames.u is None else frames.u,
        "v": frames.luma if frames.v is None else frames.v,
        "still_luma": still.luma,
        "still_u": still.luma if still.u is None else still.u,
        "still_v": still.luma if still.v is None else still.v,
        "table": table,
        "partials": partials,
    }
    sizes = {"B": B, "T": T, "H": H, "W": W, "still_H": still_H, "still_W": still_W, "h": h, "w": w}
    constants = {"YUV": yuv, "C": table.shape[1], "SPLITS": _SPLITS}

    strips = math.ceil(h / _STRIP)
    column_blocks = math.ceil((w + 2 * _RADIUS.value) / _COLUMNS_BLOCK)
    pixels = 4 * rgb.shape[3] * rgb.shape[4] if by_blocks else h * w
    blocks = math.ceil(pixels / _FINISH_BLOCK)
    return [
        Launch(
            _means,
            (images * _SPLITS,),
            {**source, **sizes},
            {**constants, "ROWS": _MEANS_ROWS[yuv], "COLUMNS": _MEANS_COLUMNS},
            num_warps=_MEANS_WARPS,
        ),
        Launch(
            _columns,
            (images * strips * column_blocks,),
            {**source, "blurred": blurred, **sizes, "strips": strips, "blocks": column_blocks},
            {**constants, "STRIP": _STRIP, "BLOCK": _COLUMNS_BLOCK},
            max_registers=_REGISTERS if max(h, w) == 1 else None,
        ),
        Launch(
            _finish,
            (rows * blocks,),
            {
                **source,
                "blurred": blurred,
                "rgb": rgb,
                "static": static,
                "dynamic": dynamic,
                **sizes,
                "elements": rgb.shape[1] * rgb.shape[3] * rgb.shape[4],
                "blocks": blocks,
            },
            {
                **constants,
                "BLOCK": _FINISH_BLOCK,
                "BOUNDARY": "none" if stills is None else boundary,
                "DTYPE": tl.bfloat16 if rgb.dtype == torch.bfloat16 else tl.float32,
                "BY_BITS": INTERPRETED and rgb.dtype == torch.bfloat16,
                "BLOCKS": by_blocks,
            },
            max_registers=_REGISTERS if by_blocks and boundary == "replicate" and not yuv else None,
        ),
    ]


def launches_to_compile() -> list[tuple[str, Launch]]:
    """Return every kernel in every configuration that `_launches` chooses, with a label, to be compiled ahead of time.

    The tensors are on the meta device, so they have no memory. Triton compiles a kernel again for arguments that are
    not multiples of 16 (odd sizes) and for arguments of 1.
    """
    named = []
    production, odd, one = (8, 16, 240, 320, 112, 112), (3, 5, 17, 23, 13, 11), (1, 1, 1, 1, 1, 1)
    for yuv in (False, True):
        source = "YUV" if yuv else "RGB"
        means, columns, _ = _launches_without_memory(*production, yuv, torch.float32, "wrap")
        named += [(f"means, {source}", means), (f"columns, {source}", columns)]
        for dtype in (torch.float32, torch.bfloat16):
            for boundary in ("wrap", "zero", "replicate", "none"):
                kind = f"finish, {source}, {str(dtype).removeprefix('torch.')}, {boundary}"
                named.append((kind, _launches_without_memory(*production, yuv, dtype, boundary)[-1]))
            for boundary in ("wrap", "zero", "replicate"):
                kind = f"finish, {source}, {str(dtype).removeprefix('torch.')}, {boundary}, blocks"
                launch = _launches_without_memory(*production, yuv, dtype, boundary, blocks=True)[-1]
                named.append((kind, launch))
        for size, sizes in (("odd sizes", odd), ("sizes of 1", one)):
            launches = _launches_without_memory(*sizes, yuv, torch.bfloat16, "wrap")
            for name, launch in zip(("means", "columns", "finish"), launches, strict=True):
                named.append((f"{name}, {source}, {size}", launch))
            finish = _launches_without_memory(*sizes, yuv, torch.bfloat16, "wrap", blocks=True)[-1]
            named.append((f"finish, {source}, {size}, blocks", finish))
    return named


def _launches_without_memory(
    B: int, T: int, H: int, W: int, h: int, w: int, yuv: bool, dtype: torch.dtype, boundary: str, blocks: bool = False
) -> list[Launch]:
    """Return `_launches` for tensors on the meta device, without stills if the boundary is "none"."""

    def planes(*shape: int) -> Planes:
        if not yuv:
            return Planes(torch.empty(*shape, H, W, 3, dtype=torch.uint8, device="meta"))
        chroma = torch.empty(*shape, math.ceil(H / 2), math.ceil(W / 2), dtype=torch.uint8, device="meta")
        return Planes(torch.empty(*shape, H, W, dtype=torch.uint8, device="meta"), chroma, chroma)

    alone = boundary == "none"
    views = _empty_views(B, T, h, w, dtype, torch.device("meta"), blocks)[: 1 if alone else 3]
    table = torch.empty(B if alone else 2 * B, table_width(yuv), device="meta")
    return _launches(planes(B, T), None if alone else planes(B), table, views, (h, w), boundary)


# ---------------------------------------------------------------- registered ops


def _empty_view(B: int, T: int, h: int, w: int, dtype: torch.dtype, device: torch.device, blocks: bool) -> Tensor:
    """Return memory for a view (B, 3, T, h, w), or for its blocks (B, 16, T, ceil(h / 2) + 3, ceil(w / 2) + 3)."""
    shape = (B, CHANNELS, T, *blocks_shape(h, w)) if blocks else (B, 3, T, h, w)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last_3d)


def _empty_views(
    B: int, T: int, h: int, w: int, dtype: torch.dtype, device: torch.device, blocks: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for rgb, static and dynamic. The static view has one frame."""
    rgb, static, dynamic = (_empty_view(B, frames, h, w, dtype, device, blocks) for frames in (T, 1, T))
    return rgb, static, dynamic


def _contiguous(luma: Tensor, u: Tensor | None, v: Tensor | None) -> Planes:
    return Planes(luma.contiguous(), None if u is None else u.contiguous(), None if v is None else v.contiguous())


@torch.library.custom_op("dclr::generate_views", mutates_args=())
def generate_views_op(
    frames: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    stills: Tensor,
    still_u: Tensor | None,
    still_v: Tensor | None,
    table: Tensor,
    h: int,
    w: int,
    boundary: str,
    dtype: torch.dtype,
    blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rgb, static and dynamic, each (B, 3, T, h, w) or its blocks. The static view has one frame.

    `_means` gives the shapes of the inputs.
    """
    B, T = frames.shape[:2]
    views = _empty_views(B, T, h, w, dtype, frames.device, blocks)
    if B > 0:
        clips, their_stills = _contiguous(frames, u, v), _contiguous(stills, still_u, still_v)
        for launch in _launches(clips, their_stills, table.contiguous(), views, (h, w), boundary):
            launch()
    return views


@generate_views_op.register_fake
def _(
    frames: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    stills: Tensor,
    still_u: Tensor | None,
    still_v: Tensor | None,
    table: Tensor,
    h: int,
    w: int,
    boundary: str,
    dtype: torch.dtype,
    blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_views(frames.shape[0], frames.shape[1], h, w, dtype, frames.device, blocks)


@torch.library.custom_op("dclr::augment", mutates_args=())
def augment_op(
    frames: Tensor, u: Tensor | None, v: Tensor | None, table: Tensor, h: int, w: int, dtype: torch.dtype
) -> Tensor:
    """Return the rgb view alone, (B, 3, T, h, w). `_means` gives the shapes of the inputs."""
    B, T = frames.shape[:2]
    view = _empty_view(B, T, h, w, dtype, frames.device, blocks=False)
    if B > 0:
        for launch in _launches(_contiguous(frames, u, v), None, table.contiguous(), (view,), (h, w), "none"):
            launch()
    return view


@augment_op.register_fake
def _(frames: Tensor, u: Tensor | None, v: Tensor | None, table: Tensor, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return _empty_view(frames.shape[0], frames.shape[1], h, w, dtype, frames.device, blocks=False)
