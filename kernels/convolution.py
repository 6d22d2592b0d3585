"""Convolutions of stride 1 in space or in time, fused with batch normalisation and ReLU.

A (2+1)D network computes convolution, batch normalisation, ReLU, convolution, and so on. With a library, batch
normalisation reads each convolution's output twice and writes it once more. Here the convolution normalises its input
while it reads it, and sums its output's statistics while it writes it. With the mean m, scale s and shift b of each
channel, the weight w and the number c of frames that a frame stands for,

    z = relu((x - m) s + b),   y = conv(z, w),   mean = sum c y / sum c,   variance = sum c (y - mean)^2 / sum c.

The padding is zero after ReLU. For batch normalisation (Ioffe and Szegedy, ICML 2015, arXiv 1502.03167), m is the mean
that the convolution before computed, s = weight / sqrt(variance + eps) with its variance, and b = bias. The whole
gradient follows from these formulas: `convolve` is differentiable in x, w, m, s and b, through y, mean and variance.

Letters: B clips, C and C' channels, D frames, H, W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dclr.kernels.backend import check_same_device, runs_triton
from dclr.kernels.types import CONVOLUTIONS, Convolved, Normalisation, kind_of

MOST_CHANNELS = 256
"""The most channels that the Triton kernels take, before and after a convolution."""


def convolve(
    x: Tensor, weight: Tensor, normalisation: Normalisation | None = None, repeated: int = 0, times: int = 1
) -> Convolved:
    """Normalise clips, convolve them with stride 1, and compute the statistics of the result.

    The formulas are at the top of the file. The result has the size of the input.

    Args:
        x: (B, C, D, H, W). With bfloat16 the arithmetic is float32, and z and y are rounded.
        weight: (C', C, 3, 1, 1) for a convolution in time, (C', C, 1, 3, 3) for one in space. The dtype of x.
        normalisation: m, s and b, each (C,) float32. None convolves x itself.
        repeated: the frame of the result that counts as `times` equal frames in the statistics.
        times: how many equal frames it counts as, at least 1.

    Raises:
        TypeError: The weight has another dtype than x.
        ValueError: Shapes or devices do not match, the weight is of neither kind, or `repeated` or `times` is out of
            range.
        RuntimeError: The backend is "triton", and it cannot run on this device.
    """
    kind_of(weight)
    if x.dim() != 5 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be (B, {weight.shape[1]}, D, H, W) for this weight, not {tuple(x.shape)}")
    if not (0 <= repeated < x.shape[2] and times >= 1):
        raise ValueError(f"frame {repeated} cannot stand for {times} frames in clips of {x.shape[2]} frames")
    check_same_device("weight", weight, "x", x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} like x, not {weight.dtype}")
    for name, values in zip(Normalisation._fields, normalisation or (), strict=False):
        check_same_device(name, values, "x", x)
        if values.shape != (x.shape[1],):
            raise ValueError(f"{name} must have one value for each of {x.shape[1]} channels, not {tuple(values.shape)}")
    if supports(weight, x.dtype) and runs_triton(x.device):
        from dclr.kernels import convolution_triton

        mean, scale, shift = (None, None, None) if normalisation is None else normalisation
        return Convolved(*convolution_triton.convolve_op(x, weight, mean, scale, shift, repeated, times))
    return reference(x, weight, normalisation, repeated, times)


def supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the Triton kernels take this weight for clips of this dtype.

    They take bfloat16, both kinds of convolution, and multiples of 16 channels up to MOST_CHANNELS.
    """
    return (
        dtype == torch.bfloat16
        and weight.dim() == 5
        and weight.shape[2:] in CONVOLUTIONS.values()
        and all(channels % 16 == 0 and channels <= MOST_CHANNELS for channels in weight.shape[:2])
    )


def reference(
    x: Tensor, weight: Tensor, normalisation: Normalisation | None = None, repeated: int = 0, times: int = 1
) -> Convolved:
    """Compute `convolve` in plain torch. Its gradient comes from autograd."""
    precise = torch.promote_types(x.dtype, torch.float32)
    if normalisation is not None:
        mean, scale, shift = (values.view(-1, 1, 1, 1) for values in normalisation)
        x = F.relu((x.to(precise) - mean) * scale + shift).to(x.dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    # Libraries convolve images faster than clips. An image is one frame, or it has time as height and pixels as width.
    if kind_of(weight) == "spatial":
        images = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], padding=1)
        y = images.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    else:
        y = F.conv2d(x.flatten(3), weight[..., 0], padding=(1, 0)).unflatten(3, x.shape[3:])
    y = y.contiguous(memory_format=torch.channels_last_3d)
    share = torch.ones(x.shape[2], dtype=precise, device=x.device)
    share[repeated] = times
    share = share / share.sum()
    mean = (y.to(precise).mean((0, 3, 4)) * share).sum(1)
    centred = y.to(precise) - mean.view(-1, 1, 1, 1)
    return Convolved(y, mean, (centred.square().mean((0, 3, 4)) * share).sum(1))
