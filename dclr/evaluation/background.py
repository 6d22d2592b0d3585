"""What frozen features hold of motion and of scene, and whether actions are known by their movement or by their looks: eval.py bias.

Probes and nearest neighbours take a video's mean feature over its test clips, as retrieval does, and not the clips one by one: a video is
what is right or wrong, and ten clips of one are no ten examples. A linear classifier's mean of logits is its logits of the mean feature,
so that whoever predicts, the network runs once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dclr.config import DataConfig, ModelConfig
from dclr.data.catalog import Catalog
from dclr.data.datasets import open_data
from dclr.data.decode import rgb_of
from dclr.data.samples import TestClips
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from dclr.evaluation import figures
from dclr.evaluation.accuracy import check_classes, load_features, open_labelled
from dclr.evaluation.composites import ForegroundClips, background_of, clips_of, foreground_mask, frozen, put_on
from dclr.evaluation.features import ClipOutputs, retrieval, run_on_clips, run_on_samples
from dclr.evaluation.linear_probe import Probe, fit_probe
from dclr.models import Backbone, Classifier, load_classifier, pool
from dclr.models.classifier import FILE_NAME

SHEET_VIDEOS = 8
FOREGROUND = ("ordinary", "moving", "static", "contrasted")


def measure_bias(
    checkpoint: Path,
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    device: torch.device,
    folder: Path,
    foreground: bool,
) -> dict[str, Any]:
    """`seed`: of random weights. Raises UserError: see load_network and open_catalog; a data set without labels; classes that are not the
    classifier's; with `foreground`, test videos of one class alone, or of which none moves."""
    backbone, classifier, loaded = load_network(checkpoint, model, seed)
    catalog = open_data(data)
    train_videos, test_videos = open_labelled(catalog, data, "bias")
    if classifier:
        check_classes(checkpoint, classifier[1], catalog)
    if foreground and len(np.unique(test_videos.labels)) < 2:
        raise UserError(
            f"--data {catalog.root}: all test videos are of one class, so that none has another's background; pass --no-foreground"
        )
    backbone.to(device).eval()

    def features(clip: Tensor) -> Tensor:
        return pool(backbone(clip))

    train, test = (
        run_on_clips(features, videos, data, device, title)
        for videos, title in ((train_videos, "train"), (test_videos, "test"))
    )
    groups = [groups_of(catalog, *each) for each in (("train", train_videos, train), ("test", test_videos, test))]
    no_scene = why_no_scenes(groups[0], train.labels.tolist(), groups[1])
    motion = measure_features(train, test, len(catalog.classes))
    scores = {"motion": motion} if no_scene else {"motion": motion, "scene": measure_scenes(train, test, *groups)}
    independence = mutual_information(test.labels.tolist(), groups[1]) if all(groups[1]) else None

    counts = f"{len(test.labels)} test videos, probes fitted to {len(train.labels)} train videos"
    print(f"\n{loaded}\non {catalog.root}: {counts}")
    print_scores(scores)
    if no_scene:
        print(f"no scene scores: {no_scene}")
    if independence is not None:
        print(
            f"class and group share {independence:.3f} of their information in the test split (0: independent, 1: one tells the other)"
        )
    result: dict[str, Any] = {
        "weights": loaded,
        "backbone": backbone.name,
        "width": backbone.width,
        "figures": {
            f"{name}_{what}": getattr(of, what)
            for name, of in scores.items()
            for what in ("probe", "nearest", "chance")
        },
        "train": len(train.labels),
        "test": len(test.labels),
        "probes": {name: {"steps": of.fitted.steps, "converged": of.fitted.converged} for name, of in scores.items()},
        "no_scene_scores": no_scene or None,
        "independence": independence,
        "left_out": {**train_videos.unreadable, **test_videos.unreadable, **train.failures, **test.failures},
    }
    if foreground:
        logits = classifier[0].fc if classifier else motion.fitted.logits
        predictor = f"the classifier of {checkpoint}" if classifier else "the motion probe"
        samples = ForegroundClips(test_videos, data)
        tested = measure_foreground(logits, features, samples, test, device)
        print_foreground(tested, predictor, motion.chance)
        title = f"{loaded}: moving {tested.moving:.1%}, static {tested.static:.1%}, contrasted {tested.contrasted:.1%}"
        draw_sheet(samples, tested.indices, title, folder / "foreground.png")
        result["figures"] |= {f"foreground_{name}": getattr(tested, name) for name in FOREGROUND}
        result["foreground"] = {
            "predicted_by": predictor,
            "videos": len(tested.indices),
            "mask_share": tested.mask_share,
            "clips_without_motion": tested.clips_without_motion,
            "without_motion": tested.without_motion,
        }
        result["left_out"] |= tested.failures
    return result


def load_network(
    checkpoint: Path, model: ModelConfig, seed: int
) -> tuple[Backbone, tuple[Classifier, tuple[str, ...]] | None, str]:
    """The backbone; of a finetune or linear run its classifier too, with its classes; one line that says what was loaded.

    Raises UserError: see load_features and load_classifier; a classifier on another backbone than `model`.
    """
    file = checkpoint / FILE_NAME if checkpoint.is_dir() else checkpoint
    if file.name != FILE_NAME or not file.is_file():
        backbone, loaded = load_features(checkpoint, model, seed)
        return backbone, None, loaded
    classifier, classes = load_classifier(file)
    backbone = classifier.backbone
    if (backbone.name, backbone.width) != (model.backbone, model.width):
        raise UserError(
            f"{file} holds {backbone.name} (width {backbone.width}), but --backbone is {model.backbone} and --width {model.width}: "
            f"pass --backbone {backbone.name} --width {backbone.width}"
        )
    return (
        backbone,
        (classifier, classes),
        f"{file}: {backbone.name} (width {backbone.width}), a classifier of {len(classes)} classes",
    )


# ---------------------------------------------------------------- probes


@dataclass(frozen=True)
class Scores:
    """How often test videos are given their own label: shares of 1."""

    probe: float  # by the linear probe fitted to the train videos
    nearest: float  # by the nearest train video
    chance: float  # by a train video at random
    fitted: Probe


def measure_features(train: ClipOutputs, test: ClipOutputs, classes: int) -> Scores:
    """From features (N, TEST_CLIPS, D) and labels below `classes`."""
    probe = fit_probe(train.values.mean(1), train.labels, classes)
    found = retrieval(train, test)
    right = probe.logits(test.values.mean(1)).argmax(1) == test.labels
    return Scores(right.double().mean().item(), found.recall[1], found.chance[1], probe)


def measure_scenes(
    train: ClipOutputs, test: ClipOutputs, train_groups: Sequence[str], test_groups: Sequence[str]
) -> Scores:
    """The same with a video's group for its label; all test groups must be train groups."""
    names = sorted(set(train_groups))

    def labelled(outputs: ClipOutputs, groups: Sequence[str]) -> ClipOutputs:
        return replace(outputs, labels=torch.tensor([names.index(group) for group in groups]))

    return measure_features(labelled(train, train_groups), labelled(test, test_groups), len(names))


def print_scores(scores: dict[str, Scores]) -> None:
    print(f"{'':10}{'probe':>8}{'nearest':>9}{'chance':>8}")
    for name, of in scores.items():
        print(f"{name:10}{of.probe:8.1%}{of.nearest:9.1%}{of.chance:8.1%}")
    for name, of in scores.items():
        if not of.fitted.converged:
            print(
                f"warning: the {name} probe has not converged after {of.fitted.steps} steps: its figures are not final",
                file=sys.stderr,
            )


def groups_of(catalog: Catalog, split: str, videos: VideoSet, outputs: ClipOutputs) -> list[str]:
    """The catalog's group of each video that gave an output; "" where it names none."""
    groups = {video.path: video.group for video in catalog.videos(split)}
    return [groups[videos.path(index)] for index in outputs.indices.tolist()]


def why_no_scenes(train_groups: Sequence[str], train_labels: Sequence[int], test_groups: Sequence[str]) -> str:
    """Why a score of telling groups apart would mean nothing, in one line; "" where it means something."""
    classes: dict[str, set[int]] = {}
    for group, label in zip(train_groups, train_labels, strict=True):
        classes.setdefault(group, set()).add(label)
    if not all((*train_groups, *test_groups)):
        return "the data set does not say which videos share a scene (its third column, or official groups)"
    tested = sorted(set(test_groups))
    if unseen := [group for group in tested if group not in classes]:
        return f"{len(unseen)} of the {len(tested)} test groups, {unseen[0]} for one, are not in the train split"
    if telling := [group for group in tested if len(classes[group]) == 1]:
        return f"{len(telling)} of the {len(tested)} test groups, {telling[0]} for one, are of one class alone: the action tells them"
    return ""


def mutual_information(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Normalised, of two labellings of the same videos: 2 I(a; b) / (H(a) + H(b)); 0: independent, 1: each tells the other. 0 where
    both are constant."""
    rows, columns = (np.unique(np.array(labels), return_inverse=True)[1] for labels in (first, second))
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))

    def entropy(shares: np.ndarray) -> float:
        return float(-sum(share * np.log(share) for share in shares.ravel() if share > 0))

    a, b = entropy(joint.sum(1)), entropy(joint.sum(0))
    # Independent labellings come out as -1e-16.
    return max(0.0, 2 * (a + b - entropy(joint)) / (a + b)) if a + b > 0 else 0.0


# ---------------------------------------------------------------- foreground


@dataclass(frozen=True)
class Foreground:
    """Shares of the test videos whose class is predicted, all four of the same videos: those in which something moves."""

    ordinary: float  # as they are
    moving: float  # what moves in them, on another video's background
    static: float  # the same, frozen to its middle frame
    contrasted: float  # moving right and static wrong: no higher for a network that merely fails on what stands still
    mask_share: float  # of the pixels, the mean over clips
    clips_without_motion: int  # clips that show a background alone; they count, as those of an ordinary video do
    indices: list[int]  # which videos
    without_motion: list[str]  # paths of those left out: with an empty mask nothing of their class is in the picture
    failures: dict[str, str]  # path -> reason


def measure_foreground(
    logits: Callable[[Tensor], Tensor],  # mean features (N, D) -> (N, classes)
    features: Callable[[Tensor], Tensor],  # clips (B, 3, T, h, w) -> (B, D)
    samples: ForegroundClips,
    ordinary: ClipOutputs,
    device: torch.device,
) -> Foreground:
    """`ordinary`: the features of the same videos as they are. Raises UserError: nothing moves in any of them."""
    outputs = run_on_samples(
        lambda clip: torch.stack([features(clip), features(frozen(clip))], 1), samples, device, "foreground"
    )  # values (N, TEST_CLIPS, 2, D)
    row_of = {index: row for row, index in enumerate(ordinary.indices.tolist())}
    read = [(row, index) for row, index in enumerate(outputs.indices.tolist()) if index in row_of]
    kept = [(row, index) for row, index in read if samples.shares[index].any()]
    if not kept:
        raise UserError(
            f"{samples.videos.root}: nothing moves in any of {len(read)} test videos, so that no foreground is left; pass --no-foreground"
        )
    rows, indices = (list(column) for column in zip(*kept, strict=True))
    labels = outputs.labels[rows]
    moving, static = outputs.values[rows].mean(1).unbind(1)  # (N, D) each

    def right(video: Tensor) -> Tensor:  # (N, D) -> (N,) bool
        return logits(video).argmax(1) == labels

    on_moving, on_static = right(moving), right(static)
    shares = samples.shares[indices]
    return Foreground(
        ordinary=share(right(ordinary.values[[row_of[index] for index in indices]].mean(1))),
        moving=share(on_moving),
        static=share(on_static),
        contrasted=share(on_moving & ~on_static),
        mask_share=float(shares.mean()),
        clips_without_motion=int((shares == 0).sum()),
        indices=indices,
        without_motion=[samples.videos.path(index) for _, index in read if not samples.shares[index].any()],
        failures=outputs.failures,
    )


def print_foreground(tested: Foreground, predictor: str, chance: float) -> None:
    print(
        f"\n{len(tested.indices)} test videos on others' backgrounds, predicted by {predictor}; what moves is {tested.mask_share:.1%} of "
        "the picture"
    )
    print("".join(f"{name:>12}" for name in (*FOREGROUND, "chance")))
    print("".join(f"{value:12.1%}" for value in (*(getattr(tested, name) for name in FOREGROUND), chance)))
    if tested.without_motion:
        print(f"left out, as nothing moves in them: {len(tested.without_motion)} videos, listed in report.json")


def share(right: Tensor) -> float:
    return right.double().mean().item()


def draw_sheet(samples: ForegroundClips, indices: Sequence[int], title: str, path: Path) -> None:
    """Of videos spread evenly over `indices`, so over the classes, the clip of which most moves."""
    videos, length = samples.videos, samples.config.clip_length
    rows = []
    for place in sorted({round(i * (len(indices) - 1) / max(SHEET_VIDEOS - 1, 1)) for i in range(SHEET_VIDEOS)}):
        index = indices[place]
        other = int(samples.backgrounds[index])
        frames = TestClips(videos, samples.config).read(index)
        clip = clips_of(frames, length)[int(samples.shares[index].argmax())]
        source, mask, background = rgb_of(clip), foreground_mask(clip), background_of(videos, other)
        put_on(clip, mask, background)
        names = tuple(videos.classes[videos.labels[i]] for i in (index, other))
        rows.append((names, source, mask, rgb_of(background)[0], rgb_of(clip)))
    figures.foreground_sheet(rows, title, path)
