"""What moves in a clip, put on another video's background: test clips whose foreground says one class and whose background another.

The foreground is the smoothed frame difference above a threshold, as in FAME (Ding et al., CVPR 2022, arXiv 2109.15130), with three
changes, for measuring instead of training: each frame has its own mask, so that the frozen clip does not show the path of a movement
as the outline of its mask; the threshold is a share of the clip's greatest difference and not a fixed half of the picture, so
that little of the old background comes along; and colours do not refine the mask. The moving and the frozen clip, and accuracy on the
first that fails on the second, are the tests SCUBA and SCUFO of StillMix (Li et al., ICCV 2023, arXiv 2211.12883); there masks come from
annotations and segmentation networks, and backgrounds from other pictures, which no data set here has.

All this is for a still camera. Where it moves, the scene's edges are foreground too and come along, so the share of the picture that is
foreground belongs beside every figure: 6 % on Weizmann's videos, 11 to 50 % in the clips of four of UCF101's.

Letters: T frames, H, W pixels of a frame; h, w of its chroma planes, half as many, rounded up.
"""

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dclr.config import DataConfig
from dclr.data import clips
from dclr.data.decode import Planes, UnreadableVideo, YuvFrames, converted
from dclr.data.decoder_process import shared_array
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import VideoSet

SMOOTHING = 1 / 30
"""Standard deviation of the blur over a frame's short side; FAME's is the same."""

THRESHOLD = 0.2
"""Of the clip's greatest smoothed difference. On 48 demo videos, whose sprites are known, masks agree with them best from 0.2 to 0.3:
intersection over union 0.53 to 0.54, against 0.45 at 0.1 and 0.49 at 0.4. The lowest of these, as it keeps most of what moves (86 %)."""

LEAST_DIFFERENCE = 8.0
"""Levels of 255, summed over the three planes: where nothing differs by more after smoothing, nothing moves. Coding alone leaves up to 3 on
stills of genuine videos and 4 on a still of white noise (h264); in four clips of each of 33 genuine videos something reaches 17 or more."""

BACKGROUND_FRAMES = 25
"""Frames of a video that its background is the median of: an odd number, so that a median is one of the values."""


def foreground_mask(frames: YuvFrames) -> np.ndarray:
    """Where a clip of T frames moves: (T, H, W) bool. All False without motion, and for a clip of one frame.

    A pixel's difference is the mean of those to the frame before and to the one after (at the ends, the only one), summed over the
    planes. Four pixels share their chroma, so a square of 2 x 2 is foreground as a whole.
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
    greatest = smooth.max().item()
    if greatest < LEAST_DIFFERENCE:
        return np.zeros((T, H, W), bool)
    squares = (smooth > THRESHOLD * greatest).numpy()  # (T, h, w)
    return squares.repeat(2, axis=1).repeat(2, axis=2)[:, :H, :W]


def background_of(videos: VideoSet, index: int) -> YuvFrames:
    """A video without what moves: one frame, the median over time of 25 frames spread evenly. Raises UnreadableVideo.

    Where the camera is still, whoever walks through vanishes; whoever moves in place stays, frozen. Where the camera moves it is a blur
    of the scene.
    """
    frames = int(videos.frames[index])
    read = videos.read(index, np.linspace(0, frames - 1, BACKGROUND_FRAMES).round().astype(np.int64))
    y, u, v = (np.median(plane, axis=0, keepdims=True).astype(np.uint8) for plane in (read.y, read.u, read.v))
    return YuvFrames(y, u, v, read.bt709, read.full_range)


def draw_backgrounds(labels: np.ndarray) -> np.ndarray:
    """For each of N videos another one, of another class, uniform over those: (N,) int64. The same draws for every checkpoint and seed, so
    that all are measured on the same clips.

    Args:
        labels: (N,) int64, of two classes or more.
    """
    drawn = [
        np.random.default_rng((clips.BACKGROUND, index)).choice(np.flatnonzero(labels != label))
        for index, label in enumerate(labels)
    ]
    return np.array(drawn, np.int64)


def put_on(frames: YuvFrames, mask: np.ndarray, background: YuvFrames) -> None:
    """Replace a clip's frames outside of its mask by the background, in place.

    Args:
        frames: T frames.
        mask: (T, H, W) bool, whole squares of 2 x 2, as `foreground_mask` gives.
        background: one frame, of any size and colour space.
    """
    height, width = frames.y.shape[1:]
    still = converted(background, height, width, frames.bt709, frames.full_range)
    np.copyto(frames.y, still.y, where=~mask)
    np.copyto(frames.u, still.u, where=~mask[:, ::2, ::2])
    np.copyto(frames.v, still.v, where=~mask[:, ::2, ::2])


class ForegroundClips(TestClips):
    """The test clips of a set of videos, each on the background of a video of another class.

    Attributes:
        backgrounds: (N,) int64, the video whose background each is put on.
        shares: (N, TEST_CLIPS) float64, of a clip's pixels that are foreground, once it has been read, by whichever process.
    """

    def __init__(self, videos: VideoSet, config: DataConfig) -> None:
        super().__init__(videos, config)
        self.backgrounds = draw_backgrounds(videos.labels)
        self.shares = shared_array(len(videos) * TEST_CLIPS, np.float64).reshape(-1, TEST_CLIPS)

    def read(self, index: int, into: Planes | None = None) -> YuvFrames:
        """Raises UnreadableVideo: the video, or that of its background, cannot be read."""
        other = int(self.backgrounds[index])
        try:
            background = background_of(self.videos, other)
        except UnreadableVideo as error:
            raise UnreadableVideo(f"its background, {self.videos.path(other)}: {error}") from error
        frames = super().read(index, into)
        for number, clip in enumerate(clips_of(frames, self.config.clip_length)):
            mask = foreground_mask(clip)
            put_on(clip, mask, background)
            self.shares[index, number] = mask.mean()
        return frames


def clips_of(frames: YuvFrames, length: int) -> list[YuvFrames]:
    """Frames that hold one clip after the other, by clip: views of them."""
    parts = (slice(first, first + length) for first in range(0, len(frames.y), length))
    return [YuvFrames(frames.y[p], frames.u[p], frames.v[p], frames.bt709, frames.full_range) for p in parts]


def frozen(clip: Tensor) -> Tensor:
    """The middle frame of each clip, repeated: (B, C, T, H, W) -> the same shape, without a copy."""
    middle = clip.shape[2] // 2
    return clip[:, :, middle : middle + 1].expand_as(clip)


def energy_share(activation: np.ndarray, mask: np.ndarray) -> float:
    """How much of an activation map lies inside a mask, as a share of its sum.

    A map that is the same everywhere gives the mask's own share of the pixels.

    Each pixel of the mask takes the value of the map's cell that it lies in. Pooling the mask to the map's cells instead would weigh
    pixels unequally where the sizes do not divide.

    Args:
        activation: (T', H', W'), not negative, coarser than the mask.
        mask: (T, H, W) bool of the same clip and crop.

    Raises:
        ValueError: a map with negative values, or of nothing but zeros.
    """
    if activation.min() < 0 or activation.sum() <= 0:
        raise ValueError("the map must not be negative, nor zero everywhere")
    cells = (
        ((np.arange(fine) + 0.5) * coarse / fine).astype(int)
        for fine, coarse in zip(mask.shape, activation.shape, strict=True)
    )
    resized = activation.astype(np.float64)[np.ix_(*cells)]  # (T, H, W)
    return float(resized[mask].sum() / resized.sum())
