"""Clips in which one frame stands for several equal frames, and their convolution.

All frames of a static view are equal. A convolution in time pads with zeros, so its first and last output frames
differ from the others, but the frames between them stay equal: of 16 frames 3 differ after one such convolution, 5
after two, 7 after three. Equal frames are computed once.

Letters: B clips, C channels, D frames in memory, T frames of the clip, H, W pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Clips(NamedTuple):
    """Clips of T = D + times - 1 frames. Frame `repeated` stands for `times` equal frames, one after another."""

    frames: Tensor  # (B, C, D, H, W) in channels_last_3d memory
    repeated: int = 0
    times: int = 1

    @property
    def length(self) -> int:
        """The number of frames T."""
        return self.frames.shape[2] + self.times - 1

    def counts(self) -> Tensor:
        """Return how many frames of the clip each frame in memory stands for: (D,) int64 on the frames' device."""
        number = torch.arange(self.frames.shape[2], device=self.frames.device)
        return torch.where(number == self.repeated, self.times, 1)

    def stretch(self, copies: int) -> Tensor:
        """Return the frames with `copies` >= 1 copies of the repeated frame: (B, C, D + copies - 1, H, W)."""
        if copies == 1:
            return self.frames
        same = self.frames[:, :, self.repeated : self.repeated + 1]
        before, after = self.frames[:, :, : self.repeated], self.frames[:, :, self.repeated + 1 :]
        stretched = torch.cat([part for part in (before, *[same] * copies, after) if part.shape[2]], dim=2)
        return stretched.contiguous(memory_format=torch.channels_last_3d)

    def expand(self) -> Tensor:
        """Return all T frames, (B, C, T, H, W)."""
        return self.stretch(self.times)


def as_clips(view: Tensor, frames: int) -> Clips:
    """Return a view (B, C, D, H, W) as clips of T = `frames`: D is T, or 1 if the frame stands for all T.

    Raises ValueError: D is neither.
    """
    if view.shape[2] not in (1, frames):
        raise ValueError(f"a view has 1 or {frames} frames, not {view.shape[2]}")
    view = view.contiguous(memory_format=torch.channels_last_3d)
    return Clips(view, 0, frames if view.shape[2] == 1 else 1)


def before_convolution(clips: Clips, conv: nn.Conv3d) -> Clips:
    """Return the frames that a convolution must read, and the equal frames of its result.

    Output frame t reads the input frames from stride * t - padding to stride * t - padding + kernel - 1. The outputs
    that read copies of the repeated frame only are equal. One of them is kept. To compute it and all others, the
    repeated frame needs `times - stride * (equal - 1)` copies, where `equal` is the number of equal outputs.

    Args:
        conv: gives the kernel, the stride and the padding in time.

    Returns:
        The frames to convolve, with `repeated` and `times` of the result: `_replace(frames=...)` makes it the result.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    first = -(-(clips.repeated + padding) // stride)  # rounded up
    last = (clips.repeated + clips.times - kernel + padding) // stride
    equal = last - first + 1
    if equal < 2:
        return Clips(clips.expand())
    return Clips(clips.stretch(clips.times - stride * (equal - 1)), first, equal)


def convolve(clips: Clips, conv: nn.Conv3d, apply: Callable[[Tensor], Tensor]) -> Clips:
    """Convolve clips. Each frame of the result that occurs once is computed once, as long as some frames are equal.

    Args:
        conv: gives the kernel, the stride and the padding in time.
        apply: computes the convolution of frames (B, C, D, H, W).
    """
    given = before_convolution(clips, conv)
    return given._replace(frames=apply(given.frames))


def align(shortcut: Clips, main: Clips) -> Tensor:
    """Return the frames of `shortcut` that belong to the frames of `main`, (B, C, D of main, H, W).

    The equal frames of `main` must be among those of `shortcut`. They are, where `main` was convolved more often.
    """
    return shortcut.stretch(main.frames.shape[2] - shortcut.frames.shape[2] + 1)
