"""The frames of a sample: pure functions of (seed, epoch, index). So workers, ranks and a resume do not change them.

Frames are numbered in decode order. A clip has T frames, `stride` apart, from a window of T * stride source frames.
"""

from dataclasses import dataclass

import numpy as np

# The purpose of a random stream. Two streams of the same (seed, epoch, index) with different purposes are independent.
ORDER, SAMPLE, BACKGROUND = 0, 1, 2


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order in which an epoch visits `count` videos: (count,) int64, a permutation."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(count)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of all random numbers of a sample: first its windows, then its augmentation."""
    return np.random.default_rng((SAMPLE, seed, epoch, index))


def window(start: int, frames: int, length: int, stride: int) -> np.ndarray:
    """Return the frame numbers of the clip that starts at `start`: (length,) int64.

    After the last of the video's `frames` frames, the clip continues with frame 0.
    """
    return (start + stride * np.arange(length)) % frames


def random_start(rng: np.random.Generator, frames: int, length: int, stride: int) -> int:
    """Draw the first frame of a window, uniform over the windows inside the video; 0 if the video is shorter."""
    return int(rng.integers(max(frames - length * stride, 0) + 1))


@dataclass(frozen=True)
class ClipPair:
    """Frame numbers of a pretraining sample: two clips of one video, and one still per clip for its static view."""

    query: np.ndarray  # (T,) int64
    key: np.ndarray  # (T,) int64
    query_still: int
    key_still: int


def draw_pair(
    rng: np.random.Generator,
    frames: int,
    length: int,
    stride: int,
    same_frames: bool = False,
    distinct_starts: bool = True,
) -> ClipPair:
    """Draw two windows and one offset, at which both have their still, like DCLR's released code.

    The two starts are uniform over all pairs of different starts. A video without a second window has two equal starts.

    Args:
        same_frames: both clips are the first window. The second start is drawn but not used, so that the random
            numbers that follow do not depend on `same_frames`.
        distinct_starts: False draws two independent starts, which can be equal.
    """
    query = random_start(rng, frames, length, stride)
    if distinct_starts and frames > length * stride:
        key = random_start(rng, frames - 1, length, stride)  # one start fewer: all but `query`
        key += key >= query
    else:
        key = random_start(rng, frames, length, stride)
    if same_frames:
        key = query
    offset = int(rng.integers(length * stride))  # any source frame of the window, also one between the clip's frames
    return ClipPair(
        query=window(query, frames, length, stride),
        key=window(key, frames, length, stride),
        query_still=(query + offset) % frames,
        key_still=(key + offset) % frames,
    )


def uniform_clips(frames: int, count: int, length: int, stride: int) -> np.ndarray:
    """Return the frame numbers of `count` clips, evenly spaced over a video: (count, length) int64."""
    last = max(frames - length * stride, 0)
    starts = np.linspace(0, last, count).round().astype(np.int64)
    return np.stack([window(int(start), frames, length, stride) for start in starts])


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return up to `most` positions below `count`, evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
