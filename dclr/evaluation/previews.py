"""Small previews of videos, for pictures and pages."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dclr.data.catalog import Catalog, Video
from dclr.data.datasets import open_catalog
from dclr.data.decode import UnreadableVideo, rgb_of
from dclr.data.display import shown
from dclr.data.encode import write_video
from dclr.data.given_videos import EVERYTHING, everything
from dclr.data.store import is_store
from dclr.data.videos import NoReadableVideo, VideoSet, open_videos
from dclr.errors import UserError

HEIGHT, MOST_WIDTH = 160, 320
"""Largest height and width of a preview in pixels."""

FRAMES = 100
"""Most frames of a preview: 4 seconds."""

FPS = 25

_PIXELS_AT_ONCE = 2**25
"""Pixels that are decoded at once. They take about 10 bytes each."""


@dataclass(frozen=True)
class Preview:
    """What a picture or a page shows of a video."""

    picture: np.ndarray
    """(h, w, 3) uint8 RGB, the middle frame as it is shown. Both sides are even."""
    mp4: bytes
    """The frames in the middle of the video as h264 in mp4, which all browsers play; empty if it is not needed."""
    frames: str
    """Which frames of the video the mp4 holds, in words."""


def make_previews(root: Path, paths: Sequence[str], play: bool, timeout: float) -> dict[str, Preview | str]:
    """Return the preview of each video of a data set, by path, or the reason why it cannot be read.

    Args:
        root: the folder that the paths start from, or a packed store.
        paths: of the videos, at least one.
        play: also encode the frames, and not only the middle one.
        timeout: seconds without a frame after which a decoder process is killed.
    """
    if is_store(root):
        stored, wanted = everything(open_catalog(root)), set(paths)
        chosen = tuple(video for video in stored.videos(EVERYTHING) if video.path in wanted)
        listed = replace(stored, splits={EVERYTHING: chosen})
    else:
        videos = tuple(Video(path=path, label=-1) for path in dict.fromkeys(paths))
        listed = Catalog(root=root, layout="video files", classes=(), splits={EVERYTHING: videos})
    previews: dict[str, Preview | str] = dict.fromkeys(paths, "it is not in the data set any more")
    try:
        opened = open_videos(listed, EVERYTHING, 1, progress=False, timeout=timeout)
    except NoReadableVideo as error:
        return previews | error.reasons
    except UserError as error:
        return dict.fromkeys(paths, str(error))
    previews |= opened.unreadable
    for index in range(len(opened)):
        try:
            previews[opened.path(index)] = make_preview(opened, index, play)
        except UnreadableVideo as error:
            previews[opened.path(index)] = str(error)
    return previews


def make_preview(videos: VideoSet, index: int, play: bool) -> Preview:
    """Return the preview of one video. Raises UnreadableVideo."""
    count = int(videos.frames[index])
    middle = count // 2
    picture = small_frames(videos, index, middle, middle + 1)[0]
    if not play:
        return Preview(picture, b"", "")
    first = max(0, middle - FRAMES // 2)
    last = min(count, first + FRAMES)
    at_once = max(1, _PIXELS_AT_ONCE // int(videos.heights[index] * videos.widths[index]))
    parts = [small_frames(videos, index, at, min(at + at_once, last)) for at in range(first, last, at_once)]
    words = f"frames {first} to {last - 1} of {count}" if last - first < count else f"all {count} frames"
    words = "1 frame" if count == 1 else words
    return Preview(picture, encode(np.concatenate(parts)), words)


def small_frames(videos: VideoSet, index: int, first: int, end: int) -> np.ndarray:
    """Return the frames `first` to `end` - 1 as they are shown, in the size of a preview: (T, h, w, 3) uint8.

    Raises UnreadableVideo.
    """
    frames = videos.read(index, np.arange(first, end))
    images = shown(rgb_of(frames), frames.display)
    height, width = images.shape[1:3]
    scale = min(1.0, HEIGHT / height, MOST_WIDTH / width)
    size = [max(2, round(side * scale / 2) * 2) for side in (height, width)]
    if size != [height, width]:
        tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        images = F.interpolate(tensor, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(images)


def encode(frames: np.ndarray) -> bytes:
    """Return frames (T, h, w, 3) uint8 of even sides as h264 in mp4."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preview.mp4"
        write_video(path, frames, fps=FPS, keyframe_every=FRAMES)
        return path.read_bytes()


def address(file: Path) -> str:
    """Return the address by which a page links to a file on disk; empty if there is no such file."""
    return Path(os.path.abspath(file)).as_uri() if file.is_file() else ""
