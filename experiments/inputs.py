"""What do a network's features use: the picture, the order of frames, or their differences? real.py runs this command.

    python -m experiments.inputs --checkpoint RUN --data DIR --out OUT
    python -m experiments.inputs --checkpoint RUN --data DIR --folds DIR/folds.txt --out OUT

The network is frozen. Its features are computed for each of the ten test clips of a video from four inputs:

- full: the clip;
- shuffled: its frames in another order, which is the same for all clips;
- static: its middle frame, repeated;
- differences: the differences of successive frames, as in the dynamic view.

The features of an input are averaged over a video's clips. A linear probe is fitted to those of the train videos and
scored on those of the test videos, both from the same input. Nearest neighbours are found in the same way. If the full
clip is no better than the static one, the features do not use motion. If it is no better than the shuffled one, they do
not use the order.

With --folds, each fold of the file is the test split once, and the other folds are the train split. The figures are
shares of all videos. A line of the file is "path label group fold", and its videos are those of the train and test
splits of --data.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dclr.commands.evaluate import pick, settings_of
from dclr.config import DataConfig, ModelConfig
from dclr.data.datasets import open_data
from dclr.errors import UserError
from dclr.evaluation.composites import frozen
from dclr.evaluation.features import ClipOutputs, load_features, mean_of_clips, open_labelled, run_on_clips
from dclr.evaluation.linear_probe import fit_probe
from dclr.evaluation.retrieval import retrieval
from dclr.models import Backbone, pool
from dclr.report import environment, write_json
from experiments import runs

FULL, SHUFFLED, STATIC, DIFFERENCES = INPUTS = ("full", "shuffled", "static", "differences")
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Embedded:
    """The features of all videos of a data set."""

    features: Tensor  # (N, 4, D) float32, in the order of INPUTS
    labels: Tensor  # (N,) int64
    paths: tuple[str, ...]
    train: tuple[bool, ...]  # whether a video is in the train split
    classes: int


def shuffled_order(frames: int) -> Tensor:
    """Return an order of the frames (T,) int64 that is not the original one and is always the same. T is at least 2."""
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    order = torch.randperm(frames, generator=generator)
    return order if (order != torch.arange(frames)).any() else order.flip(0)


def features_of_inputs(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Return the function from clips (B, 3, T, h, w) to the pooled features (B, 4, D) of the four inputs."""

    def features(clips: Tensor) -> Tensor:
        order = shuffled_order(clips.shape[2]).to(clips.device)
        maps = [
            backbone(clips),
            backbone(clips[:, :, order]),
            backbone(frozen(clips)),
            backbone(clips - clips.roll(1, dims=2), differences=True),
        ]
        return torch.stack([pool(each) for each in maps], dim=1)

    return features


def embed(checkpoint: Path, settings: dict[str, Any], device: torch.device) -> tuple[Embedded, str]:
    """Return the features of the videos of both splits, and one line that says which weights were loaded.

    Raises:
        UserError: see load_features and open_labelled; clips of one frame; a video cannot be read.
    """
    data, model = pick(DataConfig, settings), pick(ModelConfig, settings)
    if data.clip_length < 2:
        raise UserError(f"--clip-length is {data.clip_length}, but must be at least 2: one frame has no order")
    backbone, loaded = load_features(checkpoint, model, settings.get("seed", 0))
    backbone.to(device).eval()
    catalog = open_data(data)
    found = []
    for split, videos in zip(("train", "test"), open_labelled(catalog, data, "inputs"), strict=True):
        outputs = run_on_clips(features_of_inputs(backbone), videos, data, device, split, mean_of_clips)
        if outputs.failures:
            raise UserError("; ".join(f"{path}: {reason}" for path, reason in outputs.failures.items()))
        found.append((outputs, [videos.path(index) for index in outputs.indices.tolist()]))
    (train, train_paths), (test, test_paths) = found
    embedded = Embedded(
        torch.cat([train.values, test.values])[:, 0],
        torch.cat([train.labels, test.labels]),
        (*train_paths, *test_paths),
        (True,) * len(train_paths) + (False,) * len(test_paths),
        len(catalog.classes),
    )
    return embedded, loaded


def read_folds(file: Path) -> dict[str, str]:
    """Return the fold of each path. Raises UserError if the file is unreadable or wrong, or has only one fold."""
    folds = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--folds {file} cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) != 4:
            raise UserError(f'--folds {file}: line {number} is {line!r}, but must be "path label group fold"')
        folds[words[0]] = words[3]
    if len(set(folds.values())) < 2:
        raise UserError(f"--folds {file} has {len(set(folds.values()))} folds, but must have at least 2")
    return folds


def divisions(embedded: Embedded, folds: dict[str, str] | None) -> list[tuple[Tensor, Tensor]]:
    """Return the train and test videos (N,) bool of each fold, or of the splits if there are no folds.

    Raises:
        UserError: the videos of the folds are not those of the data set.
    """
    if folds is None:
        train = torch.tensor(embedded.train)
        return [(train, ~train)]
    if different := sorted(set(folds) ^ set(embedded.paths)):
        where = "only in --folds" if different[0] in folds else "not in --folds"
        raise UserError(f"--folds must list the videos of --data: {different[0]} is {where} ({len(different)} differ)")
    own = [folds[path] for path in embedded.paths]
    tests = [torch.tensor([fold == name for fold in own]) for name in sorted(set(own))]
    return [(~test, test) for test in tests]


def figures_of(embedded: Embedded, parts: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the shares of the test videos of all `parts` that are predicted right, and chance."""
    correct: dict[str, list[Tensor]] = {}
    for train, test in parts:
        labels, truth = embedded.labels[train], embedded.labels[test]
        for number, name in enumerate(INPUTS):
            fitted, scored = embedded.features[train, number], embedded.features[test, number]
            predicted = fit_probe(fitted, labels, embedded.classes).logits(scored).argmax(1)
            found = retrieval(as_outputs(fitted, labels), as_outputs(scored, truth))
            nearest = labels[torch.from_numpy(found.nearest[:, 0])]
            correct.setdefault(f"{name}_probe", []).append(predicted == truth)
            correct.setdefault(f"{name}_nearest", []).append(nearest == truth)
        same_class = torch.bincount(labels, minlength=embedded.classes)[truth]
        correct.setdefault("chance", []).append(same_class / len(labels))
    return {name: torch.cat(values).double().mean().item() for name, values in correct.items()}


def as_outputs(features: Tensor, labels: Tensor) -> ClipOutputs:
    """Return features (N, D) of videos with their labels (N,), as eval.py retrieval takes them."""
    return ClipOutputs(features[:, None], labels, torch.arange(len(labels)), {})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run, or random: random weights")
    parser.add_argument("--like", help="with --checkpoint random: the run whose clips and backbone are used")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights (default: 0)")
    parser.add_argument("--data", required=True, help="folder of the videos, with a train and a test split")
    parser.add_argument("--folds", type=Path, help="list of folds (default: the train and the test split)")
    parser.add_argument("--out", type=Path, required=True, help="folder in which report.json is written")
    return parser


def main(arguments: Sequence[str]) -> None:
    given = make_parser().parse_args(arguments)
    folds = read_folds(given.folds) if given.folds else None
    flags = {"data": given.data} | ({"like": given.like} if given.like else {})
    if str(given.checkpoint) == "random":
        flags["seed"] = given.seed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedded, loaded = embed(given.checkpoint, settings_of(given.checkpoint, flags), device)
    parts = divisions(embedded, folds)
    figures = figures_of(embedded, parts)
    print(f"\n{loaded}\n{len(embedded.labels)} videos, {len(parts)} test splits")
    for name, value in figures.items():
        print(f"{name:22}{value:8.4f}")
    given.out.mkdir(parents=True, exist_ok=True)
    report = {"weights": loaded, "figures": figures, "videos": len(embedded.labels), "parts": len(parts)}
    write_json(given.out / "report.json", {**report, "environment": environment(device)})


if __name__ == "__main__":
    sys.exit(runs.entry(main))
