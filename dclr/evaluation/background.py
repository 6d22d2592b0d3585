"""Background bias: does a network recognise actions by their movement or by the scene? `eval.py bias`.

The first part fits linear probes on frozen features: how well do the features predict the action and the scene?
The second part classifies composites: test clips whose foreground is on the background of another class.

Probes and nearest neighbours use the mean feature over a video's test clips. One video is one example, because its ten
clips are not independent. A video's class is predicted from the mean of the logits of its test clips.

Letters: B clips, N videos, T frames, h, w pixels of the crop, D features.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dclr import distributed
from dclr.config import DataConfig, ModelConfig
from dclr.data.catalog import Catalog
from dclr.data.clips import evenly_spaced
from dclr.data.decode import UnreadableVideo, rgb_of
from dclr.data.display import shown
from dclr.data.samples import TestClips
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from dclr.evaluation import figures
from dclr.evaluation.benchmark import Benchmark
from dclr.evaluation.composites import (
    CompositeClips,
    background_of,
    composite,
    foreground_mask,
    frozen,
)
from dclr.evaluation.features import (
    ClipOutputs,
    all_clips,
    check_classes,
    check_outputs,
    find_data,
    load_features,
    mean_of_clips,
    open_labelled,
    run_on_clips,
    run_on_samples,
)
from dclr.evaluation.linear_probe import Probe, fit_probe
from dclr.evaluation.retrieval import retrieval
from dclr.models import Backbone, Classifier, backbone_without_memory, load_classifier, pool
from dclr.models.pretrained import NETWORK_FILES
from dclr.models.weights import find_file, read_weights

SHEET_VIDEOS = 8
FOREGROUND = ("ordinary", "moving", "static", "contrasted")


@dataclass(frozen=True)
class Passes:
    """What all ranks compute: the features of the videos of both splits, and those of the composites."""

    train_videos: VideoSet
    test_videos: VideoSet
    train: ClipOutputs  # (N, 1, D), means over the clips
    test: ClipOutputs  # (N, TEST_CLIPS, D), without composites (N, 1, D)
    samples: CompositeClips | None  # None without composites, as the next
    composites: ClipOutputs | None  # (N, TEST_CLIPS, 2, D), moving and frozen


def evaluate_background(
    checkpoint: Path,
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    device: torch.device,
    folder: Path,
    foreground: bool,
) -> dict[str, Any]:
    """Fit the probes and, with `foreground`, classify the composites. Return the entries of report.json, on all ranks.

    Rank 0 prints a table of each. With `foreground`, it writes foreground.png to `folder`.

    Args:
        seed: the seed of random weights, used only if `checkpoint` is the word random.

    Raises:
        UserError: see load_network, find_data, open_split and Benchmark. A data set without labels, or with other
            classes than the classifier. With `foreground`: all test videos are of one class, or none of them has a
            foreground.
    """
    backbone, classifier, loaded = load_network(checkpoint, model, seed)
    catalog = find_data(data)
    train_videos, test_videos = open_labelled(catalog, data, "bias")
    benchmark = Benchmark(catalog, data, train=train_videos, test=test_videos)
    if classifier:
        check_classes(checkpoint, classifier[1], catalog)
    if foreground and len(np.unique(test_videos.labels)) < 2:
        raise UserError(
            f"--data {catalog.root}: all test videos are of one class, so no other class gives them a background; "
            "pass --no-foreground"
        )
    backbone.to(device).eval()

    def features(clip: Tensor) -> Tensor:
        return pool(backbone(clip))

    train = run_on_clips(features, train_videos, data, device, "train", mean_of_clips)
    test = run_on_clips(features, test_videos, data, device, "test", all_clips if foreground else mean_of_clips)
    benchmark.add_failures({**train.failures, **test.failures})
    samples, composites = None, None
    if foreground:
        samples = CompositeClips(test_videos, data)
        composites = run_on_composites(features, samples, device)
        benchmark.add_failures(composites.failures)
    passes = Passes(train_videos, test_videos, train, test, samples, composites)
    return distributed.on_rank_zero(
        lambda: write_background(checkpoint, loaded, backbone, classifier, passes, benchmark, folder)
    )


def write_background(
    checkpoint: Path,
    loaded: str,
    backbone: Backbone,
    classifier: tuple[Classifier, tuple[str, ...]] | None,
    passes: Passes,
    benchmark: Benchmark,
    folder: Path,
) -> dict[str, Any]:
    """Print the tables and write the picture that `evaluate_background` names. Return the entries of report.json."""
    catalog, train, test = benchmark.catalog, passes.train, passes.test
    train_groups, test_groups = (
        groups_of(catalog, "train", passes.train_videos, train),
        groups_of(catalog, "test", passes.test_videos, test),
    )
    no_scene = why_no_scenes(train_groups, train.labels.tolist(), test_groups)
    motion = evaluate_features(train, test, len(catalog.classes))
    scores = {"motion": motion}
    if not no_scene:
        scores["scene"] = evaluate_scenes(train, test, train_groups, test_groups)
    independence = mutual_information(test.labels.tolist(), test_groups) if all(test_groups) else None

    counts = f"{len(test.labels)} test videos, probes fitted to {len(train.labels)} train videos"
    print(f"\n{loaded}\non {catalog.root}: {counts}")
    print_scores(scores)
    if no_scene:
        print(f"no scene scores: {no_scene}")
    if independence is not None:
        print(
            f"class and group share {independence:.3f} of their information in the test split "
            "(0: independent, 1: each determines the other)"
        )
    unreadable = {**passes.train_videos.unreadable, **passes.test_videos.unreadable}
    result: dict[str, Any] = {
        "weights": loaded,
        "backbone": backbone.name,
        "width": backbone.width,
        "figures": {
            f"{name}_{what}": getattr(score, what)
            for name, score in scores.items()
            for what in ("probe", "nearest", "chance")
        },
        "train": len(train.labels),
        "test": len(test.labels),
        "probes": {
            name: {"steps": score.fitted.steps, "converged": score.fitted.converged} for name, score in scores.items()
        },
        "no_scene_scores": no_scene or None,
        "independence": independence,
        "left_out": {**unreadable, **train.failures, **test.failures},
    }
    if passes.samples is not None and passes.composites is not None:
        logits = classifier[0].fc if classifier else motion.fitted.logits
        predictor = f"the classifier of {checkpoint}" if classifier else "the motion probe"
        tested = evaluate_foreground(logits, passes.samples, passes.composites, test)
        print_foreground(tested, predictor, motion.chance)
        title = benchmark.title(
            checkpoint,
            f"accuracy on moving composites {tested.moving:.1%}, on static composites {tested.static:.1%}, "
            f"on moving but not on static ones {tested.contrasted:.1%} (chance {motion.chance:.1%})",
            f"{len(tested.indices)} test videos, each on the background of a video of another class",
            "foreground: the moving region, in white; moving: the foreground on the other background, frame by frame; "
            "static: the middle frame of it, repeated",
        )
        plot_sheet(passes.samples, tested.indices, title, folder / "foreground.png")
        result["figures"] |= {f"foreground_{name}": getattr(tested, name) for name in FOREGROUND}
        result["foreground"] = {
            "predicted_by": predictor,
            "videos": len(tested.indices),
            "mask_share": tested.mask_share,
            "clips_without_motion": tested.clips_without_motion,
            "without_motion": tested.without_motion,
        }
        result["left_out"] |= tested.failures
    benchmark.print_faults()
    return {**result, **benchmark.report()}


def load_network(
    checkpoint: Path, model: ModelConfig, seed: int
) -> tuple[Backbone, tuple[Classifier, tuple[str, ...]] | None, str]:
    """Return the backbone, the classifier with its class names, and one line that says what was loaded.

    The classifier is that of a finetune or linear run, which may be unfinished. It is None if the file that
    `checkpoint` names has none.

    Raises:
        UserError: see load_features and load_classifier; the classifier has another backbone than `model`.
    """
    file = None if str(checkpoint) == "random" else find_file(checkpoint, NETWORK_FILES)
    if file is None or not read_weights(file, backbone_without_memory(model.backbone, model.width)).fc:
        backbone, loaded = load_features(checkpoint, model, seed)
        return backbone, None, loaded
    classifier, classes = load_classifier(file)
    name, width = classifier.backbone.name, classifier.backbone.width
    if (name, width) != (model.backbone, model.width):
        raise UserError(
            f"{file} holds {name} (width {width}), but --backbone is {model.backbone} and --width {model.width}: "
            f"pass --backbone {name} --width {width}"
        )
    loaded = f"{file}: {name} (width {width}), a classifier of {len(classes)} classes"
    return classifier.backbone, (classifier, classes), loaded


# ---------------------------------------------------------------- probes


@dataclass(frozen=True)
class Scores:
    """Shares of the test videos whose label is predicted, from 0 to 1."""

    probe: float  # by the linear probe fitted to the train videos
    nearest: float  # by the nearest train video
    chance: float  # by a random train video
    fitted: Probe


def evaluate_features(train: ClipOutputs, test: ClipOutputs, classes: int) -> Scores:
    """Predict the labels of test videos, 0 to classes - 1, from the mean over R of features (N, R, D)."""
    probe = fit_probe(train.values.mean(1), train.labels, classes)
    found = retrieval(train, test)
    correct = probe.logits(test.values.mean(1)).argmax(1) == test.labels
    return Scores(share(correct), found.recall[1], found.chance[1], probe)


def evaluate_scenes(
    train: ClipOutputs, test: ClipOutputs, train_groups: Sequence[str], test_groups: Sequence[str]
) -> Scores:
    """Predict the groups of test videos, as `evaluate_features` predicts labels. Test groups must be train groups."""
    names = sorted(set(train_groups))

    def labelled(outputs: ClipOutputs, groups: Sequence[str]) -> ClipOutputs:
        return replace(outputs, labels=torch.tensor([names.index(group) for group in groups]))

    return evaluate_features(labelled(train, train_groups), labelled(test, test_groups), len(names))


def print_scores(scores: dict[str, Scores]) -> None:
    """Print one row for each kind of label, and a warning for each probe that has not converged."""
    print(f"{'':10}{'probe':>8}{'nearest':>9}{'chance':>8}")
    for name, score in scores.items():
        print(f"{name:10}{score.probe:8.1%}{score.nearest:9.1%}{score.chance:8.1%}")
    for name, score in scores.items():
        if not score.fitted.converged:
            steps = score.fitted.steps
            print(
                f"warning: the {name} probe has not converged after {steps} steps: its scores are not final",
                file=sys.stderr,
            )


def groups_of(catalog: Catalog, split: str, videos: VideoSet, outputs: ClipOutputs) -> list[str]:
    """Return the catalog's group of each video in `outputs`, the empty string for a video without a group."""
    groups = {video.path: video.group for video in catalog.videos(split)}
    return [groups[videos.path(index)] for index in outputs.indices.tolist()]


def why_no_scenes(train_groups: Sequence[str], train_labels: Sequence[int], test_groups: Sequence[str]) -> str:
    """Return one line that says why scene scores would be meaningless, or the empty string if they are meaningful."""
    classes: dict[str, set[int]] = {}
    for group, label in zip(train_groups, train_labels, strict=True):
        classes.setdefault(group, set()).add(label)
    if not all((*train_groups, *test_groups)):
        return "the data set does not say which videos share a scene (its third column, or official groups)"
    tested = sorted(set(test_groups))
    if unseen := [group for group in tested if group not in classes]:
        return f"{len(unseen)} of the {len(tested)} test groups are not in the train split, for example {unseen[0]}"
    if telling := [group for group in tested if len(classes[group]) == 1]:
        return (
            f"{len(telling)} of the {len(tested)} test groups have train videos of one class only, "
            f"for example {telling[0]}: the action alone tells the scene"
        )
    return ""


def mutual_information(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Compute the normalised mutual information of two labellings of the same videos: 2 I(a; b) / (H(a) + H(b)).

    0 means independent, 1 means that each labelling determines the other. Two constant labellings give 0.
    """
    rows, columns = (np.unique(np.array(labels), return_inverse=True)[1] for labels in (first, second))
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))

    def entropy(shares: np.ndarray) -> float:
        return float(-sum(share * np.log(share) for share in shares.ravel() if share > 0))

    a, b = entropy(joint.sum(1)), entropy(joint.sum(0))
    # max: rounding errors make the information of independent labellings as low as -1e-16.
    return max(0.0, 2 * (a + b - entropy(joint)) / (a + b)) if a + b > 0 else 0.0


# ---------------------------------------------------------------- foreground


@dataclass(frozen=True)
class Foreground:
    """Shares of the test videos whose class is predicted, from 0 to 1. Only videos with a foreground are counted."""

    ordinary: float  # the videos as they are
    moving: float  # their foreground on the background of another class
    static: float  # the same, frozen to the middle frame
    # Moving is correct and static is wrong. A network that fails on all still clips gains nothing here.
    contrasted: float
    mask_share: float  # mean share of a clip's pixels that are foreground
    # Clips without a foreground in the counted videos. Their composites show a background only.
    clips_without_motion: int
    indices: list[int]  # positions in the VideoSet of the counted videos
    without_motion: list[str]  # paths of the videos without a foreground in any clip; they are not counted
    failures: dict[str, str]  # path -> reason: the videos that could not be read


def run_on_composites(
    features: Callable[[Tensor], Tensor],  # clips (B, 3, T, h, w) -> (B, D)
    samples: CompositeClips,
    device: torch.device,
) -> ClipOutputs:
    """Return the features of composites, moving and frozen: (N, TEST_CLIPS, 2, D).

    Rank 0 also gets `samples.shares` of all videos.
    """
    outputs = run_on_samples(
        lambda clip: torch.stack([features(clip), features(frozen(clip))], 1), samples, device, "foreground"
    )
    own = distributed.own_share(len(samples.shares))
    shares = distributed.gather_rows(torch.from_numpy(samples.shares[own.start : own.stop]))
    samples.shares[: len(shares)] = shares.numpy()
    return outputs


def evaluate_foreground(
    logits: Callable[[Tensor], Tensor],  # features (B, D) -> (B, classes)
    samples: CompositeClips,
    outputs: ClipOutputs,
    ordinary: ClipOutputs,
) -> Foreground:
    """Classify composites, moving and frozen, and the same videos as they are.

    Args:
        outputs: see `run_on_composites`.
        ordinary: the features of the same videos as they are.

    Raises:
        UserError: no video has a foreground.
    """
    row_of = {index: row for row, index in enumerate(ordinary.indices.tolist())}
    read = [(row, index) for row, index in enumerate(outputs.indices.tolist()) if index in row_of]
    kept = [(row, index) for row, index in read if samples.shares[index].any()]
    if not kept:
        raise UserError(
            f"{samples.videos.root}: nothing moves in any of {len(read)} test videos, "
            "so there is no foreground to test; pass --no-foreground"
        )
    rows, indices = (list(column) for column in zip(*kept, strict=True))
    labels = outputs.labels[rows]
    # values: (videos, TEST_CLIPS, 2, D), the moving and the frozen composite
    moving, static = outputs.values[rows].unbind(2)  # (N, TEST_CLIPS, D) each

    paths = [samples.videos.path(index) for index in indices]

    def correct(clips: Tensor) -> Tensor:  # (N, TEST_CLIPS, D) -> (N,) bool
        predicted = logits(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
        check_outputs(predicted, paths)
        return predicted.argmax(1) == labels

    moving_correct, static_correct = correct(moving), correct(static)
    shares = samples.shares[indices]
    return Foreground(
        ordinary=share(correct(ordinary.values[[row_of[index] for index in indices]])),
        moving=share(moving_correct),
        static=share(static_correct),
        contrasted=share(moving_correct & ~static_correct),
        mask_share=float(shares.mean()),
        clips_without_motion=int((shares == 0).sum()),
        indices=indices,
        without_motion=[samples.videos.path(index) for _, index in read if not samples.shares[index].any()],
        failures=outputs.failures,
    )


def print_foreground(tested: Foreground, predictor: str, chance: float) -> None:
    """Print the table of the composites. `chance` is the share that a random train video's class gets right."""
    print(
        f"\n{len(tested.indices)} test videos on backgrounds of other classes, predicted by {predictor}; "
        f"the foreground is {tested.mask_share:.1%} of the picture"
    )
    print("".join(f"{name:>12}" for name in (*FOREGROUND, "chance")))
    print("".join(f"{value:12.1%}" for value in (*(getattr(tested, name) for name in FOREGROUND), chance)))
    if tested.without_motion:
        print(f"skipped, because nothing moves in them: {len(tested.without_motion)} videos, listed in report.json")


def share(correct: Tensor) -> float:
    """Return the share of True in a bool tensor."""
    return correct.double().mean().item()


def plot_sheet(samples: CompositeClips, indices: Sequence[int], title: str, path: Path) -> None:
    """Plot composites of some videos, evenly spaced over `indices` and so over the classes.

    For each video, it shows the clip with the largest foreground. Without any, a sheet of an earlier evaluation is
    deleted.
    """
    videos = samples.videos
    ordinary = TestClips(videos, samples.config)
    rows = []
    for position in evenly_spaced(len(indices), SHEET_VIDEOS):
        index = indices[position]
        other = int(samples.backgrounds[index])
        try:
            clip = ordinary.read(index, [int(samples.shares[index].argmax())])
            background = background_of(videos, other)
        except UnreadableVideo:  # the file has changed since its clips were read
            continue
        source, mask = rgb_of(clip), foreground_mask(clip)
        composite(clip, mask, background)
        names = tuple(videos.classes[videos.labels[i]] for i in (index, other))
        pictures = [shown(images, clip.display) for images in (source, mask, rgb_of(clip))]
        rows.append((names, *pictures[:2], shown(rgb_of(background), background.display)[0], pictures[2]))
    if rows:
        figures.plot_composites(rows, title, path)
    else:
        path.unlink(missing_ok=True)
