"""Which frames a sample is made of: pure functions of (seed, epoch, index), so that neither workers, ranks nor a resume change them.

Frames are numbered in decode order. A clip keeps T frames, `stride` apart, of a window of T * stride source frames.
"""

from dataclasses import dataclass

import numpy as np

# What a random stream is for, so that two uses of the same (seed, epoch, index) never share draws.
ORDER, SAMPLE, BACKGROUND = 0, 1, 2


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` videos: (count,) int64, a permutation."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(count)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The one source of every draw of a sample: windows first, then augmentation."""
    return np.random.default_rng((SAMPLE, seed, epoch, index))


def window(start: int, frames: int, length: int, stride: int) -> np.ndarray:
    """Frame numbers of the clip that starts at `start`: (length,) int64 below `frames`; past the end it goes on from the first frame."""
    return (start + stride * np.arange(length)) % frames


def random_start(rng: np.random.Generator, frames: int, length: int, stride: int) -> int:
    """A window's first frame, uniform over those whose window ends inside the video; 0 where the video is shorter than a window."""
    return int(rng.integers(max(frames - length * stride, 0) + 1))


@dataclass(frozen=True)
class ClipPair:
    """Frame numbers of a pretraining sample: two clips of one video, and the frame of each window that makes its static view."""

    query: np.ndarray  # (T,) int64
    key: np.ndarray  # (T,) int64
    query_still: int
    key_still: int


def draw_pair(rng: np.random.Generator, frames: int, length: int, stride: int) -> ClipPair:
    """Two windows at independent random starts; the still lies at the same random offset in both (method: DCLR's released code)."""
    query, key = (random_start(rng, frames, length, stride) for _ in range(2))
    offset = int(rng.integers(length * stride))  # any source frame of the window, also one that the stride skips
    return ClipPair(
        query=window(query, frames, length, stride),
        key=window(key, frames, length, stride),
        query_still=(query + offset) % frames,
        key_still=(key + offset) % frames,
    )


def uniform_clips(frames: int, count: int, length: int, stride: int) -> np.ndarray:
    """Frame numbers of `count` clips spread evenly from the first window of a video to its last: (count, length) int64."""
    last = max(frames - length * stride, 0)
    starts = np.linspace(0, last, count).round().astype(np.int64)
    return np.stack([window(int(start), frames, length, stride) for start in starts])
