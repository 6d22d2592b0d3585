"""Does the generator of VideoMoCo drop the frames that matter? methods.py runs this command on runs with a generator.

    python -m experiments.dropped_frames --run RUN --data STORE --out OUT

The middle clip of each test video loses every possible quarter of its frames in turn. With 8 frames, these sets are 28
pairs. The query encoder of the run computes the embedding q of the whole clip, and q~ of the clip with dropped frames.
The generator learns to make the change, mean |q~ - q|, large. So the set that it chooses is ranked among all sets of
the clip. The mean over all sets is what random frames change, so no random numbers are needed.

- "rank" is the share of the other sets that change the embedding less than the chosen set. Random frames have 50 %.
- "rank, other clips" gives each clip the sets that the generator chose for the other clips. If it equals "rank", the
  generator has learned which positions matter, but its choice does not depend on the clip.
- "most_common" is the share of clips that lose the most frequently chosen set.
- Linear probes of motion and scene are fitted to the features of whole train clips. They are scored on whole test
  clips, on test clips without the chosen set, and on test clips without each set in turn. The mean over all sets is the
  accuracy without random frames.

All networks are in evaluation mode, so the result of a clip does not depend on other clips.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dclr.config import DataConfig, PretrainConfig, make_config, read_config
from dclr.data.catalog import Catalog
from dclr.data.datasets import open_data
from dclr.data.loader import TestSampler
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.errors import UserError
from dclr.evaluation.features import augment_slices, clip_batches, open_split
from dclr.evaluation.linear_probe import fit_probe
from dclr.methods import VideoMoCo
from dclr.methods.generator import drop, dropped_count, lowest
from dclr.models import pool
from dclr.report import environment, write_json
from dclr.training import checkpoint
from experiments import runs


class Effects(NamedTuple):
    """What dropping each of S sets of frames does to N clips. F is the size of a feature."""

    features: Tensor  # (N, 1 + S, F): of the whole clip, then of the clip without each set
    changes: Tensor  # (N, S): mean |q~ - q| over the embedding
    chosen: Tensor  # (N,) int64: the number of the set that the generator drops


def load_method(run: Path) -> tuple[VideoMoCo, PretrainConfig]:
    """Return the method of a run with the weights of its newest checkpoint, in evaluation mode, and its settings.

    Raises:
        UserError: the run is not one of VideoMoCo with a generator, or has no readable checkpoint.
    """
    command, _, values = read_config(run / "config.json")
    if command != "pretrain" or values.get("method") != "videomoco" or values.get("dropping") != "generator":
        raise UserError(f"--run {run} must be a run of pretrain --method videomoco --dropping generator")
    file = checkpoint.newest(run / "checkpoints")
    if file is None:
        raise UserError(f"--run {run} has no checkpoint")
    config = make_config(command, values)
    assert isinstance(config, PretrainConfig)
    network = VideoMoCo.build(config)
    tensors, _ = checkpoint.read(file)
    weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    network.load_state_dict(weights)
    return network.eval(), config


def middle_clips(catalog: Catalog, split: str, data: DataConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Return the middle test clip of each video (N, 3, T, h, w), its class (N,) and its group, the scene.

    Raises:
        UserError: a video cannot be read.
    """
    videos = open_split(catalog, split, data)
    samples, size = TestClips(videos, data), (data.crop_size, data.crop_size)
    sampler = TestSampler(samples, numbers=[TEST_CLIPS // 2])
    clips = []
    for _, batch in clip_batches(samples, torch.device("cpu"), sampler):
        if batch.failures:
            raise UserError("; ".join(f"{path}: {reason}" for path, reason in batch.failures.items()))
        clips.append(augment_slices(batch.frames, batch.augmentation, size).clone())
    groups = {video.path: video.group for video in catalog.videos(split)}
    scenes = [groups[videos.path(index)] for index in range(len(videos))]
    return torch.cat(clips), torch.from_numpy(videos.labels).long(), scenes


def all_sets(frames: int) -> Tensor:
    """Return a mask (S, T) bool for each set of a quarter of T frames."""
    sets = list(itertools.combinations(range(frames), dropped_count(frames)))
    masks = torch.zeros(len(sets), frames, dtype=torch.bool)
    for mask, chosen in zip(masks, sets, strict=True):
        mask[list(chosen)] = True
    return masks


@torch.no_grad()
def effects(network: VideoMoCo, clips: Tensor, fill: str) -> Effects:
    """Compute what each set of dropped frames does to each of the clips (N, 3, T, h, w)."""
    assert network.generator is not None
    masks = all_sets(clips.shape[2])
    features, changes, chosen = [], [], []
    for clip in clips[:, None]:  # (1, 3, T, h, w) each
        dropped = drop(clip.expand(len(masks), -1, -1, -1, -1), masks, fill)
        maps = network.query.backbone(torch.cat([clip, dropped]))
        embeddings = network.query.embed({"v": maps}, {})["vv"].float()
        features.append(pool(maps).float())
        changes.append((embeddings[1:] - embeddings[:1]).abs().mean(1))
        chosen.append((masks == lowest(network.generator(clip))).all(1).nonzero()[0, 0])
    return Effects(torch.stack(features), torch.stack(changes), torch.stack(chosen))


def ranks(changes: Tensor) -> Tensor:
    """Return for each set the share (N, S) of a clip's other sets that change less. Equal changes count half."""
    less = (changes[:, None, :] < changes[:, :, None]).double().sum(2)
    equal = (changes[:, None, :] == changes[:, :, None]).double().sum(2) - 1  # without itself
    return (less + equal / 2) / (changes.shape[1] - 1)


def rank_figures(changes: Tensor, chosen: Tensor) -> dict[str, float]:
    """Return the ranks of the chosen sets, the changes by chosen and random sets, and how many clips lose the same set.

    Args:
        changes: (N, S), see Effects.
        chosen: (N,) int64, see Effects.
    """
    rank, clips = ranks(changes), len(chosen)
    own = rank.gather(1, chosen[:, None])[:, 0]
    every = rank[:, chosen].sum(1)  # of the sets of all clips
    return {
        "rank": own.mean().item(),
        "rank_other_clips": ((every - own) / (clips - 1)).mean().item(),
        "most_common": torch.bincount(chosen).max().item() / clips,
        "change_chosen": changes.gather(1, chosen[:, None]).mean().item(),
        "change_random": changes.mean().item(),
        "change_largest": changes.amax(1).mean().item(),
    }


def probe_figures(train: Tensor, labels: Tensor, found: Effects, truth: Tensor) -> dict[str, float]:
    """Return the accuracy of a probe on whole clips, without the chosen frames, and without random frames.

    Args:
        train: features (M, F) of whole train clips.
        labels: (M,) int64, their labels.
        truth: (N,) int64, the labels of the test clips.
    """
    probe = fit_probe(train, labels, int(labels.max()) + 1)
    predicted = probe.logits(found.features.flatten(0, 1)).argmax(1).unflatten(0, found.features.shape[:2])
    correct = (predicted == truth[:, None]).double()  # (N, 1 + S)
    return {
        "whole": correct[:, 0].mean().item(),
        "chosen": correct[:, 1:].gather(1, found.chosen[:, None]).mean().item(),
        "random": correct[:, 1:].mean().item(),
    }


@torch.no_grad()
def features_of(network: VideoMoCo, clips: Tensor) -> Tensor:
    """Return the features (N, F) of whole clips."""
    return torch.cat([pool(network.query.backbone(part)).float() for part in clips.split(32)])


def evaluate(run: Path, data: Path) -> dict[str, float]:
    """Return all figures of a run on the videos of the packed store `data`."""
    network, config = load_method(run)
    settings = DataConfig(**{**vars(config.data), "data": str(data)})
    catalog = open_data(settings)
    train, train_motions, train_scenes = middle_clips(catalog, "train", settings)
    test, test_motions, test_scenes = middle_clips(catalog, "test", settings)
    names = sorted(set(train_scenes))
    if unseen := sorted(set(test_scenes) - set(names)):
        raise UserError(f"--data {data}: scene {unseen[0]} of a test video must be the scene of a train video too")
    found, features = effects(network, test, config.method.dropped_fill), features_of(network, train)
    figures = rank_figures(found.changes, found.chosen)
    scenes = [torch.tensor([names.index(scene) for scene in listed]) for listed in (train_scenes, test_scenes)]
    for label, pair in {"motion": (train_motions, test_motions), "scene": scenes}.items():
        probes = probe_figures(features, pair[0], found, pair[1])
        figures |= {f"{label}_{name}": value for name, value in probes.items()}
    return figures


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", type=Path, required=True, help="packed store of its videos")
    parser.add_argument("--out", type=Path, required=True, help="folder in which report.json is written")
    return parser


def main(arguments: Sequence[str]) -> None:
    given = make_parser().parse_args(arguments)
    figures = evaluate(given.run, given.data)
    for name, value in figures.items():
        print(f"{name:20}{value:10.4f}")
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "report.json", {"figures": figures, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    sys.exit(runs.entry(main))
