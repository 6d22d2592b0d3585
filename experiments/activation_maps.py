r"""Do the activation maps lie on what moves? Where a network responds to a clip, its still and its difference, before training and after.

    python -m experiments.activation_maps --data WEIZMANN --checkpoint runs/weizmann-96     30 small clips: 20 seconds on two cores
    python -m experiments.activation_maps --data UCF101 --checkpoint runs/ucf --clips 200

The run that docs/evidence.md shows is weizmann.py's DCLR of seed 0 on frames twice as wide, about 25 minutes on two cores: maps of its 48
pixels are 3 x 3, where a person is a cell.

    python train.py pretrain --data WEIZMANN --preset demo --clip-length 8 --clip-stride 2 --crop-size 96 --batch-size 20 --epochs 160 \
        --milestones 120 144 --fill-steps 26 --checkpoint-every 40 --out runs/weizmann-96

Of test videos the clip in their middle, by the test protocol's centre crop: A_v, A_s and A_d, the sums over channels of the backbone's last
feature maps of the rgb, static and dynamic view. The static view is the clip's middle frame. A run keeps its query backbone alone, so
that all three maps come from that one; in training A_s and A_d are the key network's. Before training is the network that the run began
with: random weights by its seed, which is the only seed here.

Writes activation_maps.json: the share of each map's energy inside of the mask of what moves (dclr/foreground.py), mean and standard
deviation over clips, beside the mask's own share of the pixels, which is what a map would have that is the same everywhere. And
activation_maps.png: maps over frames, a row a clip.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import results_folder
from dclr import config as configuration
from dclr import pictures, report, views
from dclr.config import DataConfig, PretrainConfig
from dclr.data import clips
from dclr.data.decode import UnreadableVideo, YuvFrames, rgb_of
from dclr.data.loader import TEST_CLIPS, Failures
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.foreground import energy_share, foreground_mask
from dclr.measure import load_features
from dclr.models import Backbone, activation_map
from dclr.run import open_data
from dclr.view_sheet import to_yuv420
from experiments import evidence
from kernels import ViewParams, Yuv420, generate_views

MAPS = ("A_v", "A_s", "A_d")
SHEET_CLIPS = 8


@dataclass(frozen=True)
class Clip:
    """One clip, with the crop that the network sees."""

    path: str  # as the catalog has it
    name: str  # of its class, or of its file where it has none
    frames: YuvFrames  # T frames
    rgb: np.ndarray  # (T, side, side, 3) uint8, the crop
    mask: np.ndarray  # (T, side, side) bool: what moves in it


def main(arguments: Sequence[str]) -> None:
    flags = make_parser().parse_args(arguments)
    if flags.clips < 1:
        raise UserError(f"--clips is {flags.clips}, but must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = flags.out or results_folder(device, Path(__file__).resolve().parent / "results")
    report.make_writable(folder)
    config = read_run(flags.checkpoint, flags.data)
    data, seed = config.data, config.run.seed
    before, _ = load_features(Path("random"), config.model, seed)
    after, loaded = load_features(flags.checkpoint, config.model, seed)
    trained = (
        f"{flags.checkpoint.resolve().name}, {after.name} (width {after.width})"  # where it lies is nobody's business
    )
    catalog = open_data(data)
    videos = open_videos(catalog, "test", max(1, data.workers), timeout=data.video_timeout)
    read, failures = [], Failures("it is left out of the figures")
    for index in spread(len(videos), flags.clips):
        try:
            read.append(read_clip(videos, index, data))
        except UnreadableVideo as error:
            failures.add({videos.path(index): str(error)})
    moving = [clip for clip in read if clip.mask.any()]
    if not moving:
        raise UserError(f"--data {catalog.root}: nothing moves in any of {len(read)} clips")

    networks = {"before": before.to(device).eval(), "after": after.to(device).eval()}
    maps = [
        {when: maps_of(net, clip, data.crop_size, config.method.boundary, device) for when, net in networks.items()}
        for clip in moving
    ]
    figures = {"mask": spread_of([float(clip.mask.mean()) for clip in moving])}
    for when in networks:
        for number, name in enumerate(MAPS):
            shares = [energy_share(of[when][number], clip.mask) for of, clip in zip(maps, moving, strict=True)]
            figures[f"{name} {when}"] = spread_of(shares)

    grid = " x ".join(map(str, maps[0]["after"].shape[1:]))
    print(
        f"\n{loaded}\non {catalog.root}: {len(moving)} clips, maps of {grid}; the share of a map inside of what moves"
    )
    for name, values in figures.items():
        print(f"{name:12}{values['mean']:8.1%} ± {values['stdev']:.1%}")
    content = {
        "weights": trained,
        "data": catalog.root.resolve().name,
        "seed": seed,
        "clips": len(moving),
        "without_motion": [clip.path for clip in read if not clip.mask.any()],
        "left_out": {**videos.unreadable, **failures.reasons},
        "map_size": list(maps[0]["after"].shape[1:]),
        "figures": figures,
        "environment": report.environment(device),
    }
    report.write_json(folder / "activation_maps.json", content)
    rows = [sheet_row(moving[place], maps[place]) for place in spread(len(moving), SHEET_CLIPS)]
    pictures.map_sheet(
        rows, MAPS, f"before: random weights, seed {seed}; after: {trained}", folder / "activation_maps.png"
    )
    print(f"\nactivation_maps.json and activation_maps.png written to {folder}")
    if not flags.out:
        evidence.write_page()
        print(f"{evidence.PAGE} written")


def make_parser() -> configuration.Parser:
    summary = (__doc__ or "").splitlines()[0]
    parser = configuration.Parser(prog="python -m experiments.activation_maps", description=summary, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="a data set's folder with a test split")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a pretraining run's folder")
    parser.add_argument(
        "--clips", type=int, default=64, help="test videos at most, spread over the split (default: 64)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where the figures and the picture go (default: experiments/results/DEVICE, and docs/evidence.md tells of them)",
    )  # fmt: skip
    return parser


def read_run(run: Path, data: str) -> PretrainConfig:
    """A run's configuration, with another data set. Raises UserError: it is no pretraining run's folder."""
    command, _, stored = configuration.read_config(run / "config.json")
    if command != "pretrain":
        raise UserError(f"--checkpoint {run} is a run of {command}; give one of pretrain")
    config = configuration.make_config("pretrain", {**stored, "data": data, "split": 1, "allow_outside": "no"})
    assert isinstance(config, PretrainConfig)
    return config


def read_clip(videos: VideoSet, index: int, data: DataConfig) -> Clip:
    """The middle one of a video's test clips. Raises UnreadableVideo."""
    frames = int(videos.frames[index])
    windows = clips.uniform_clips(frames, TEST_CLIPS, data.clip_length, data.clip_stride)
    clip = videos.read(index, windows[TEST_CLIPS // 2])
    top, left, height, width = views.centre_crop(*clip.y.shape[1:])["box"]
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
    still = Yuv420(frames.y[:, middle], frames.u[:, middle], frames.v[:, middle], frames.bt709, frames.full_range)
    row = views.to_augmentation([views.centre_crop(*clip.frames.y.shape[1:])])
    made = generate_views(frames, still, ViewParams(row, row, (size, size)), boundary=boundary)
    return activation_map(backbone(torch.cat(made)))[:, 0].cpu().numpy()


def sheet_row(clip: Clip, maps: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """The middle frame, and the maps at its time."""
    middle = len(clip.rgb) // 2
    at_middle = {when: of[:, middle * of.shape[1] // len(clip.rgb)] for when, of in maps.items()}
    return clip.name, clip.rgb[middle], clip.mask[middle], at_middle["before"], at_middle["after"]


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` places, evenly from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def spread_of(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"experiments.activation_maps: error: {error}", file=sys.stderr)
        sys.exit(2)
