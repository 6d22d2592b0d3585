"""Conversion of YUV 4:2:0 frames to RGB in plain torch."""

import torch
from torch import Tensor

from dclr.kernels.types import Yuv420


def yuv_coefficients(bt709: Tensor, full_range: Tensor) -> Tensor:
    """Return the coefficients that convert YUV to RGB, (B, 6) float32.

    They are offset, scale, red_v, green_u, green_v and blue_u of

        luma = (y - offset) * scale
        R = luma + red_v * (v - 128)
        G = luma + green_u * (u - 128) + green_v * (v - 128)
        B = luma + blue_u * (u - 128)

    Source: Rec. ITU-R BT.601 and BT.709. In units of 255, luma = Kr R + Kg G + Kb B, Cb = (B - luma) / (2 (1 - Kb)) and
    Cr = (R - luma) / (2 (1 - Kr)). In full range, y is luma, and u and v are Cb and Cr plus 128. In limited range, y
    spans 219 steps from 16, and u and v span 224 steps.

    Args:
        bt709: (B,) bool, the matrix of each clip: BT.709 where True, BT.601 where False.
        full_range: (B,) bool, the range of each clip: full where True, limited where False.
    """
    kr = torch.where(bt709, 0.2126, 0.299)  # (B,), like all tensors below
    kb = torch.where(bt709, 0.0722, 0.114)
    kg = 1 - kr - kb
    chroma = torch.where(full_range, 1.0, 255 / 224)
    red_v, blue_u = 2 * (1 - kr) * chroma, 2 * (1 - kb) * chroma
    return torch.stack(
        [
            torch.where(full_range, 0.0, 16.0),
            torch.where(full_range, 1.0, 255 / 219),
            red_v,
            -kb / kg * blue_u,
            -kr / kg * red_v,
            blue_u,
        ],
        dim=1,
    ).float()


def yuv_box_to_rgb(
    frames: Yuv420, coefficients: list[float], b: int, top: int, left: int, height: int, width: int
) -> Tensor:  # (T, 3, height, width)
    """Return a box of clip b as RGB, float32 between 0 and 255, not rounded.

    `coefficients` is row b of `yuv_coefficients`.
    """
    offset, scale, red_v, green_u, green_v, blue_u = coefficients
    rows = torch.arange(top, top + height, device=frames.y.device)
    columns = torch.arange(left, left + width, device=frames.y.device)
    luma = (frames.y[b][:, rows[:, None], columns].float() - offset) * scale  # (T, height, width), like cb and cr
    cb = frames.u[b][:, rows[:, None] // 2, columns // 2].float() - 128
    cr = frames.v[b][:, rows[:, None] // 2, columns // 2].float() - 128
    rgb = [luma + red_v * cr, luma + green_u * cb + green_v * cr, luma + blue_u * cb]
    return torch.stack(rgb, dim=1).clamp(0, 255)
