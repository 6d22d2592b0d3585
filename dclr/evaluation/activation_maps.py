"""Where a network responds to a clip, to its still and to its difference, and how much of that lies on what moves: eval.py maps.

Of a test video the clip in its middle, by the test protocol's centre crop: A_v, A_s and A_d, the sums over channels of the backbone's last
feature maps of the rgb, the static and the dynamic view. The static view is the clip's middle frame. A run keeps its query backbone alone,
so all three maps come from that one; in training A_s and A_d are the key network's.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr.config import DataConfig, ModelConfig
from dclr.data import augmentation, clips
from dclr.data.datasets import open_data
from dclr.data.decode import UnreadableVideo, YuvFrames, rgb_of
from dclr.data.failures import Failures
from dclr.data.samples import TEST_CLIPS
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.evaluation import figures
from dclr.evaluation.accuracy import load_features
from dclr.evaluation.composites import energy_share, foreground_mask
from dclr.evaluation.view_sheet import to_yuv420
from dclr.models import Backbone, activation_map
from kernels import ViewParams, generate_views

MAPS = ("A_v", "A_s", "A_d")
VIDEOS = 200
"""At most, spread over the test split: shares of single clips vary by 4 to 8 points, so a mean of 200 is good to half a point."""

SHEET_CLIPS = 8


@dataclass(frozen=True)
class Clip:
    """One clip, with the crop that the network sees."""

    path: str  # as the catalog has it
    name: str  # of its class, or of its file where it has none
    frames: YuvFrames  # T frames
    rgb: np.ndarray  # (T, side, side, 3) uint8, the crop
    mask: np.ndarray  # (T, side, side) bool: what moves in it


def measure_maps(
    checkpoint: Path,
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    boundary: Any,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """The share of each map's sum that lies inside of what moves, of the checkpoint's network and of an untrained one of the same seed.

    Args:
        seed: of random weights, the run's own: then they are the network that it began with.
        boundary: of the dynamic view, as in kernels.generate_views.

    Raises:
        UserError: see load_backbone and open_catalog; no test clip in which anything moves.
    """
    network, loaded = load_features(checkpoint, model, seed)
    networks = {"": network}
    if str(checkpoint) != "random":
        networks = {"untrained": load_features(Path("random"), model, seed)[0], **networks}
    catalog = open_data(data)
    videos = open_videos(catalog, "test", max(1, data.workers), timeout=data.video_timeout)
    read, failures = [], Failures("it is left out of the figures")
    for index in spread(len(videos), VIDEOS):
        try:
            read.append(read_clip(videos, index, data))
        except UnreadableVideo as error:
            failures.add({videos.path(index): str(error)})
    moving = [clip for clip in read if clip.mask.any()]
    if not moving:
        raise UserError(f"--data {catalog.root}: nothing moves in any of {len(read)} test clips")

    for each in networks.values():
        each.to(device).eval()
    maps = [
        {
            f"{name} {which}".strip(): values
            for which, each in networks.items()
            for name, values in zip(MAPS, maps_of(each, clip, data.crop_size, boundary, device), strict=True)
        }
        for clip in moving
    ]
    shares = {"flat": [float(clip.mask.mean()) for clip in moving]}
    for name in maps[0]:
        shares[name] = [energy_share(of[name], clip.mask) for of, clip in zip(maps, moving, strict=True)]

    size = maps[0][MAPS[0]].shape
    grid = " x ".join(map(str, size))
    print(f"\n{loaded}\non {catalog.root}: {len(moving)} test clips, maps of {grid}; the share of a map on what moves")
    for name, values in shares.items():
        print(f"{'the same everywhere' if name == 'flat' else name:20}{statistics.mean(values):8.1%}")
    rows = [sheet_row(moving[place], maps[place]) for place in spread(len(moving), SHEET_CLIPS)]
    title = f"{checkpoint.resolve().name}, {network.name} (width {network.width})"  # where it lies is nobody's business
    figures.map_sheet(rows, title, folder / "maps.png")
    return {
        "weights": loaded,
        "backbone": network.name,
        "width": network.width,
        "figures": {name.replace(" ", "_"): statistics.mean(values) for name, values in shares.items()},
        "deviations": {name.replace(" ", "_"): statistics.pstdev(values) for name, values in shares.items()},
        "videos": len(moving),
        "map_size": list(size),
        "without_motion": [clip.path for clip in read if not clip.mask.any()],
        "left_out": {**videos.unreadable, **failures.reasons},
    }


def read_clip(videos: VideoSet, index: int, data: DataConfig) -> Clip:
    """The middle one of a video's test clips. Raises UnreadableVideo."""
    frames = int(videos.frames[index])
    windows = clips.uniform_clips(frames, TEST_CLIPS, data.clip_length, data.clip_stride)
    clip = videos.read(index, windows[TEST_CLIPS // 2])
    top, left, height, width = augmentation.centre_crop(*clip.y.shape[1:])["box"]
    crop = np.s_[:, top : top + height, left : left + width]
    path, label = videos.path(index), int(videos.labels[index])
    return Clip(
        path,
        videos.classes[label] if label >= 0 else Path(path).stem,
        clip,
        rgb_of(clip)[crop],
        foreground_mask(clip)[crop],
    )


@torch.no_grad()
def maps_of(backbone: Backbone, clip: Clip, size: int, boundary: Any, device: torch.device) -> np.ndarray:
    """A_v, A_s and A_d of a clip: (3, T', H', W') float32."""
    frames = to_yuv420([clip.frames]).to(device)
    middle = frames.y.shape[1] // 2
    still = frames.select(np.s_[:, middle])
    row = augmentation.to_augmentation([augmentation.centre_crop(*clip.frames.y.shape[1:])])
    made = generate_views(frames, still, ViewParams(row, row, (size, size)), boundary=boundary)
    return activation_map(backbone(torch.cat(made)))[:, 0].cpu().numpy()


def sheet_row(clip: Clip, maps: dict[str, np.ndarray]) -> tuple[str, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The middle frame, what moves in it, and the maps at its time."""
    middle = len(clip.rgb) // 2
    at_middle = {name: of[middle * of.shape[0] // len(clip.rgb)] for name, of in maps.items()}
    return clip.name, clip.rgb[middle], clip.mask[middle], at_middle


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` places, evenly from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
