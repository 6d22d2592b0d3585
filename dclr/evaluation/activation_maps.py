"""Activation maps, and the share of each map's sum that is inside the moving region: `eval.py maps`.

Each test video gives its middle test clip. The activation maps A_v, A_s and A_d are the sums over channels of the
backbone's last feature maps for the rgb, the static and the dynamic view. The static view repeats the clip's middle
frame. All three maps come from the query encoder, because a run's backbone file holds nothing else. In training, A_s
and A_d come from the key encoder.

Letters: T frames; H, W pixels of the crop; T', H', W' cells of a map.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr import distributed
from dclr.config import DataConfig, ModelConfig
from dclr.data import augmentation
from dclr.data.clips import evenly_spaced
from dclr.data.decode import YuvFrames, rgb_of
from dclr.data.display import shown
from dclr.data.failures import Failures
from dclr.data.loader import TestSampler
from dclr.data.samples import TEST_CLIPS, ClipBatch, TestClips, merge_failures, stack_frames
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from dclr.evaluation import figures
from dclr.evaluation.benchmark import Benchmark
from dclr.evaluation.composites import foreground_mask
from dclr.evaluation.features import SKIPPED, check_outputs, clip_batches, find_data, load_features, open_split
from dclr.kernels import ViewParams, generate_views
from dclr.models import Backbone, activation_map

MAPS = ("A_v", "A_s", "A_d")
MAX_VIDEOS = 200
"""The most videos that are evaluated, evenly spaced over the test split.

The share of a single clip varies by 4 to 8 percentage points, so the mean of 200 clips is precise to about half a
point."""

SHEET_CLIPS = 8

LEAST_CELLS = 4
"""Cells of a map's side below which a warning says that the map is coarse. With 4, one cell covers 6 % of the picture.
The published crop of 112 pixels gives 7."""

PIXELS_SHOWN = 512
"""Pixels of a side above which a picture leaves out rows and columns, so that 200 large frames fit into memory."""


@dataclass(frozen=True)
class Clip:
    """One test clip and the crop of it that the network sees."""

    path: str  # as in the catalog
    name: str  # the class, or the file's name if the video has no label
    frames: YuvFrames  # T frames, as coded
    rgb: np.ndarray  # (T, H, W, 3) uint8, the crop as it is shown
    mask: np.ndarray  # (T, H, W) bool, the foreground of the crop


SheetRow = tuple[str, np.ndarray, np.ndarray, dict[str, np.ndarray]]
"""One row of `figures.plot_activation_maps`."""


@dataclass(frozen=True)
class ClipMaps:
    """What is kept of the maps of one test clip. A clip without a foreground has only its path."""

    path: str  # as in the catalog
    shares: dict[str, float] = field(default_factory=dict)  # of each map inside the foreground, and "flat"
    size: tuple[int, ...] = ()  # of a map
    row: SheetRow | None = None


def evaluate_activation_maps(
    checkpoint: Path,
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    boundary: Any,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Compute the share of each map's sum inside the foreground, for the checkpoint and for untrained weights.

    Rank 0 prints the means and writes maps.png to `folder`. Return the entries of report.json, on all ranks.

    Args:
        seed: the seed of the untrained weights. The seed of the run gives the weights that the run started from.
        boundary: how the dynamic view treats the first frame, see kernels.generate_views.

    Raises:
        UserError: see load_backbone, find_data, open_split and Benchmark; no test clip has a foreground; a map is zero
            everywhere or not finite.
    """
    network, loaded = load_features(checkpoint, model, seed)
    networks = {"": network}
    if str(checkpoint) != "random":
        networks = {"untrained": load_features(Path("random"), model, seed)[0], **networks}
    catalog = find_data(data)
    videos = open_split(catalog, "test", data)
    benchmark = Benchmark(catalog, data, test=videos)
    for each in networks.values():
        each.to(device).eval()
    own, failures = maps_of_share(networks, videos, data, boundary, device)
    benchmark.add_failures(failures)
    gathered = distributed.gather_on_rank_zero(own)
    return distributed.on_rank_zero(
        lambda: write_maps(
            checkpoint, loaded, network, videos, [clip for share in gathered for clip in share], benchmark, folder
        )
    )


def maps_of_share(
    networks: dict[str, Backbone], videos: VideoSet, data: DataConfig, boundary: Any, device: torch.device
) -> tuple[list[ClipMaps], dict[str, str]]:
    """Return what is kept of the test clips of this rank's share, and the failed videos of all ranks: path -> reason.

    Args:
        networks: by what is added to the names of their maps.

    Raises:
        UserError: a map is zero everywhere or not finite.
    """
    samples, failures, found = TestClips(videos, data), Failures(SKIPPED), list[ClipMaps]()
    chosen = evenly_spaced(len(videos), MAX_VIDEOS)
    own = [chosen[position] for position in distributed.own_share(len(chosen))]
    sampler = TestSampler(samples, own, [TEST_CLIPS // 2])
    for _, batch in clip_batches(samples, torch.device("cpu"), sampler) if own else ():
        failures.add(batch.failures)
        if not len(batch.indices):
            continue
        clip = clip_of(videos, batch)
        if not clip.mask.any():
            found.append(ClipMaps(clip.path))
            continue
        maps = {
            f"{name} {which}".strip(): values
            for which, each in networks.items()
            for name, values in zip(MAPS, compute_maps(each, clip, data.crop_size, boundary, device), strict=True)
        }
        check_maps(clip.path, maps)
        shares = {"flat": float(clip.mask.mean())}
        shares |= {name: energy_share(values, clip.mask) for name, values in maps.items()}
        found.append(ClipMaps(clip.path, shares, maps[MAPS[0]].shape, sheet_row(clip, maps)))
    return found, merge_failures(distributed.gather_objects(failures.reasons))


def write_maps(
    checkpoint: Path,
    loaded: str,
    network: Backbone,
    videos: VideoSet,
    clips: Sequence[ClipMaps],
    benchmark: Benchmark,
    folder: Path,
) -> dict[str, Any]:
    """Print the shares and write the picture that `evaluate_activation_maps` names. Return entries of report.json.

    Raises:
        UserError: no test clip has a foreground.
    """
    without_motion = [clip.path for clip in clips if not clip.shares]
    rows = [clip.row for clip in clips if clip.row is not None]
    if not rows:
        raise UserError(f"--data {benchmark.catalog.root}: nothing moves in any of {len(without_motion)} test clips")
    shares: dict[str, list[float]] = defaultdict(list)
    for clip in clips:
        for name, value in clip.shares.items():
            shares[name].append(value)
    size = next(clip.size for clip in clips if clip.size)

    grid = " x ".join(map(str, size))
    counts = f"{len(rows)} test clips, maps of {grid}; the share of each map in the moving region"
    print(f"\n{loaded}\non {benchmark.catalog.root}: {counts}")
    for name, values in shares.items():
        print(f"{'the same everywhere' if name == 'flat' else name:20}{statistics.mean(values):8.1%}")
    coarse = why_too_coarse(*size[1:])
    if coarse:
        print(f"warning: {coarse}", file=sys.stderr)
    benchmark.print_faults()
    shown_rows = [rows[position] for position in evenly_spaced(len(rows), SHEET_CLIPS)]
    means = ", ".join(f"{name} {statistics.mean(shares[name]):.1%}" for name in MAPS)
    title = benchmark.title(
        checkpoint,
        f"share of the activation maps in the moving region: {means} "
        f"(a map that is the same everywhere: {statistics.mean(shares['flat']):.1%})",
        f"{len(rows)} test clips, {network.name} (width {network.width}), maps of {grid} cells",
        "A_v: rgb view; A_s: static view, the middle frame repeated; A_d: dynamic view, the differences of frames; "
        "untrained: the same network with random weights",
        *([f"warning: {coarse}"] if coarse else []),
    )
    figures.plot_activation_maps(shown_rows, title, folder / "maps.png")
    return {
        "weights": loaded,
        "backbone": network.name,
        "width": network.width,
        "figures": {name.replace(" ", "_"): statistics.mean(values) for name, values in shares.items()},
        "deviations": {name.replace(" ", "_"): statistics.pstdev(values) for name, values in shares.items()},
        "videos": len(rows),
        "map_size": list(size),
        "without_motion": without_motion,
        "left_out": {**videos.unreadable, **benchmark.failures},
        **benchmark.report(),
    }


def clip_of(videos: VideoSet, batch: ClipBatch) -> Clip:
    """Return the one clip of a test batch. Its frames are valid until the next batch is requested."""
    own, index = batch.frames, int(batch.indices[0])
    y, u, v = (plane[0].numpy() for plane in (own.y, own.u, own.v))
    clip = YuvFrames(y, u, v, bool(own.bt709[0]), bool(own.full_range[0]), videos.source.displays[index])
    top, left, height, width = augmentation.centre_box(*clip.display.size(*clip.y.shape[1:]))
    crop = np.s_[:, top : top + height, left : left + width]
    rgb, mask = (shown(images, clip.display)[crop] for images in (rgb_of(clip), foreground_mask(clip)))
    path, label = videos.path(index), int(videos.labels[index])
    name = videos.classes[label] if label >= 0 else Path(path).stem
    return Clip(path, name, clip, rgb, mask)


def why_too_coarse(height: int, width: int) -> str:
    """Return one line that says why maps of so few cells show little, or the empty string if they have enough."""
    if min(height, width) >= LEAST_CELLS:
        return ""
    return (
        f"a map of {height} x {width} cells hardly shows where the network responds: one cell covers "
        f"{1 / (height * width):.0%} of the picture; use a network that was trained on larger crops (--crop-size 112)"
    )


@torch.no_grad()
def compute_maps(backbone: Backbone, clip: Clip, size: int, boundary: Any, device: torch.device) -> np.ndarray:
    """Return A_v, A_s and A_d of a clip that is resized to `size` x `size` pixels: (3, T', H', W') float32."""
    frames = stack_frames([clip.frames]).to(device)
    middle = frames.y.shape[1] // 2
    still = frames.select(np.s_[:, middle])
    height, width = clip.frames.y.shape[1:]
    row = augmentation.to_augmentation([augmentation.centre_crop(height, width, clip.frames.display)])
    views = generate_views(frames, still, ViewParams(row, row, (size, size)), boundary=boundary)
    features = backbone.forward_views(views, views.rgb.shape[2], differences=True)
    return activation_map(torch.cat(features))[:, 0].cpu().numpy()


def check_maps(path: str, maps: dict[str, np.ndarray]) -> None:
    """Raise UserError for a map of a video that is not finite or is zero everywhere."""
    for name, values in maps.items():
        check_outputs(torch.from_numpy(values)[None], [path])
        if not values.any():
            raise UserError(f"the map {name} of {path} is zero everywhere, so no share of it is on moving regions")


def energy_share(activation: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of an activation map's sum that lies inside a mask, from 0 to 1.

    A map that is the same everywhere gives the mask's own share of the pixels.

    Each pixel of the mask takes the value of the map's cell that contains the pixel. Averaging the mask over the map's
    cells instead would weight pixels unequally where the sizes do not divide.

    Args:
        activation: (T', H', W') without negative values, coarser than the mask.
        mask: (T, H, W) bool of the same clip and crop.

    Raises:
        ValueError: a map with a negative value, or of zeros only.
    """
    if activation.min() < 0 or activation.sum() <= 0:
        raise ValueError("the map must not be negative, nor zero everywhere")
    cells = (
        ((np.arange(fine) + 0.5) * coarse / fine).astype(int)
        for fine, coarse in zip(mask.shape, activation.shape, strict=True)
    )
    resized = activation.astype(np.float64)[np.ix_(*cells)]  # (T, H, W)
    return float(resized[mask].sum() / resized.sum())


def sheet_row(clip: Clip, maps: dict[str, np.ndarray]) -> SheetRow:
    """Return the name of the clip, its middle frame, and mask and maps at that time."""
    middle = len(clip.rgb) // 2
    step = max(1, min(clip.mask.shape[1:]) // PIXELS_SHOWN)
    pixels = np.s_[middle, ::step, ::step]
    at_middle = {name: values[middle * len(values) // len(clip.rgb)] for name, values in maps.items()}
    # Copies: a view would keep all frames of the clip in memory.
    return clip.name, clip.rgb[pixels].copy(), clip.mask[pixels].copy(), at_middle
