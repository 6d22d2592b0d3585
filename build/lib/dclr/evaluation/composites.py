"""Composites: test clips that show the foreground of one video on the background of a video of another class.

The foreground mask is a threshold on the smoothed frame difference, as in FAME (Ding et al., CVPR 2022, arXiv
2109.15130). FAME makes training data. Here the mask serves a test, so three things differ:
- Each frame has its own mask. Otherwise the mask's outline would show the path of the movement in a frozen clip.
- The threshold is a share of the clip's largest difference, where FAME always takes half of the picture. So less of
  the old background stays.
- Colours do not refine the mask.

StillMix (Li et al., ICCV 2023, arXiv 2211.12883) has two such tests. SCUBA is the accuracy on moving composites.
SCUFO counts only composites whose frozen version is classified wrongly. StillMix takes masks from annotations and
segmentation networks, and backgrounds from other pictures. The data sets here have neither.

The mask assumes a still camera. A moving camera makes the edges of the scene foreground too. Therefore report the
mask's share of the picture with every result: it is 6 % on Weizmann's videos, and 11 to 50 % in the clips of four
UCF101 videos.

Letters: B clips, C channels, N videos, T frames, H, W pixels of a frame, h, w pixels of its chroma planes (half of H
and W, rounded up).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dclr.config import DataConfig
from dclr.data import clips
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, converted
from dclr.data.decoder_process import shared_array
from dclr.data.display import turned, turned_back
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import VideoSet

SMOOTHING = 1 / 30
"""Standard deviation of the Gaussian blur, as a share of the frame's short side. FAME uses the same value."""

THRESHOLD = 0.2
"""Share of the clip's largest smoothed difference above which a pixel is foreground.

Chosen on 48 demo videos, whose true masks are known. The intersection over union is 0.45 at a threshold of 0.1, 0.53 to
0.54 at 0.2 to 0.3 and 0.49 at 0.4. Of the best values 0.2 keeps the largest share of the true foreground (86 %)."""

LEAST_DIFFERENCE = 8.0
"""A clip has no foreground if its largest smoothed difference, summed over the three planes, is below this level.

Video coding alone (h264) gives up to 3 levels on stills of real videos and up to 4 on a still of white noise. Four
clips of each of 33 real videos all reach 17 levels or more."""

BACKGROUND_FRAMES = 25
"""Number of frames whose median is the background. An odd number, so that the median is one of the values."""


def foreground_mask(frames: YuvFrames) -> np.ndarray:
    """Return the moving region of a clip of T frames: (T, H, W) bool. All False without motion and for T = 1.

    The difference of a pixel is the mean of its differences to the previous and to the next frame, summed over the
    planes. The first and the last frame have one neighbour only. Four pixels share their chroma values, so each square
    of 2 x 2 pixels has one value.
    """
    T, H, W = frames.y.shape
    if T == 1:
        return np.zeros((T, H, W), bool)
    y, u, v = (torch.from_numpy(plane).float()[:, None] for plane in (frames.y, frames.u, frames.v))
    pixels = torch.cat([F.avg_pool2d(y, 2, ceil_mode=True), u, v], 1)  # (T, 3, h, w)
    step = (pixels[1:] - pixels[:-1]).abs().sum(1, keepdim=True)  # (T - 1, 1, h, w)
    difference = (torch.cat([step[:1], step]) + torch.cat([step, step[-1:]])) / 2  # (T, 1, h, w)

    sigma = SMOOTHING * min(difference.shape[2:])
    width = 2 * max(1, round(3 * sigma)) + 1
    smooth = gaussian_blur2d(difference, (width, width), (sigma, sigma), border_type="replicate")[:, 0]
    largest = smooth.max().item()
    if largest < LEAST_DIFFERENCE:
        return np.zeros((T, H, W), bool)
    squares = (smooth > THRESHOLD * largest).numpy()  # (T, h, w)
    return squares.repeat(2, axis=1).repeat(2, axis=2)[:, :H, :W]


def background_of(videos: VideoSet, index: int) -> YuvFrames:
    """Return the background of a video as one frame: the median over time of 25 evenly spaced frames.

    With a still camera, a person who walks through the picture disappears. A person who moves on the spot stays, as a
    still. With a moving camera the background is a blurred picture of the scene.

    Raises:
        UnreadableVideo: the video cannot be read.
    """
    frames = int(videos.frames[index])
    read = videos.read(index, np.linspace(0, frames - 1, BACKGROUND_FRAMES).round().astype(np.int64))
    y, u, v = (np.median(plane, axis=0, keepdims=True).astype(np.uint8) for plane in (read.y, read.u, read.v))
    return YuvFrames(y, u, v, read.bt709, read.full_range, read.display)


def draw_backgrounds(labels: np.ndarray) -> np.ndarray:
    """Draw, for each of N videos, a video of another class, uniformly: (N,) int64.

    The draws depend on `labels` only. Every checkpoint and every seed is tested on the same composites.

    Args:
        labels: (N,) int64, of at least two classes.
    """
    drawn = [
        np.random.default_rng((clips.BACKGROUND, index)).choice(np.flatnonzero(labels != label))
        for index, label in enumerate(labels)
    ]
    return np.array(drawn, np.int64)


def composite(frames: YuvFrames, mask: np.ndarray, background: YuvFrames) -> None:
    """Replace the pixels of a clip outside its mask by the background, in place.

    Args:
        frames: T frames.
        mask: (T, H, W) bool in whole squares of 2 x 2, as `foreground_mask` returns.
        background: one frame, of any size, colour space and orientation.
    """
    still = fitted(background, frames)
    np.copyto(frames.y, still.y, where=~mask)
    np.copyto(frames.u, still.u, where=~mask[:, ::2, ::2])
    np.copyto(frames.v, still.v, where=~mask[:, ::2, ::2])


def fitted(background: YuvFrames, frames: YuvFrames) -> YuvFrames:
    """Return the background in the size and colour space of the clip, turned so that both are upright when shown."""
    height, width = frames.y.shape[1:]
    own, other = background.display.orientation, frames.display.orientation
    if own == other:
        return converted(background, height, width, frames.bt709, frames.full_range)
    # Sides are rounded up to even numbers, so that chroma squares stay whole when a plane is reversed.
    sides = height + height % 2, width + width % 2
    if (own + other) % 2:
        sides = sides[::-1]
    still = converted(background, *sides, frames.bt709, frames.full_range)
    y, u, v = (turned_back(turned(plane, own), other) for plane in (still.y, still.u, still.v))
    return replace(still, y=y[:, :height, :width], u=u, v=v, display=frames.display)


class CompositeClips(TestClips):
    """The test clips of a set of videos, each on the background of a video of another class.

    Attributes:
        backgrounds: (N,) int64, the video whose background each video gets.
        shares: (N, TEST_CLIPS) float64 in shared memory, the foreground's share of a clip's pixels. The process that
            reads a video sets its row.
    """

    def __init__(self, videos: VideoSet, config: DataConfig) -> None:
        super().__init__(videos, config)
        self.backgrounds = draw_backgrounds(videos.labels)
        self.shares = shared_array(len(videos) * TEST_CLIPS, np.float64).reshape(-1, TEST_CLIPS)

    def read(self, index: int, numbers: Sequence[int] = range(TEST_CLIPS), into: Planes | None = None) -> YuvFrames:
        """Read the composites of some of a video's test clips, one after the other.

        Raises:
            UnreadableVideo: the video, or the video of its background, cannot be read.
        """
        other = int(self.backgrounds[index])
        try:
            background = background_of(self.videos, other)
        except UnreadableVideo as error:
            raise UnreadableVideo(f"its background, {self.videos.path(other)}: {error}") from error
        frames = super().read(index, numbers, into)
        for number, clip in zip(numbers, split_clips(frames, self.config.clip_length), strict=True):
            mask = foreground_mask(clip)
            composite(clip, mask, background)
            self.shares[index, number] = mask.mean()
        return frames


def split_clips(frames: YuvFrames, length: int) -> list[YuvFrames]:
    """Split frames of consecutive clips of `length` frames into one YuvFrames per clip, as views."""
    return [frames.select(slice(first, first + length)) for first in range(0, len(frames.y), length)]


def frozen(clip: Tensor) -> Tensor:
    """Repeat the middle frame of each clip: (B, C, T, H, W) -> a view of the same shape."""
    middle = clip.shape[2] // 2
    return clip[:, :, middle : middle + 1].expand_as(clip)
