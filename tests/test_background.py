"""`eval.py bias`: its command line on small videos, and its functions on features with a known answer."""

import contextlib
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_flags
from PIL import Image

from dclr.commands import evaluate as evaluation
from dclr.config import DataConfig
from dclr.data.datasets import open_catalog
from dclr.data.encode import write_video
from dclr.data.videos import open_videos
from dclr.errors import UserError
from dclr.evaluation import background
from dclr.evaluation.background import (
    evaluate_features,
    evaluate_foreground,
    mutual_information,
    run_on_composites,
    why_no_scenes,
)
from dclr.evaluation.composites import CompositeClips
from dclr.evaluation.features import ClipOutputs, run_on_clips
from dclr.models import Classifier, build_backbone, save_backbone, save_classifier
from dclr.models.heads import NormalisedLinear

CONFIG = DataConfig(clip_length=4, crop_size=16, workers=0)
CPU = torch.device("cpu")
TINY = {"width": 2, "clip_length": 4, "crop_size": 16, "workers": 0}
PROBES = ["motion_probe", "motion_nearest", "motion_chance"]
SCENES = ["scene_probe", "scene_nearest", "scene_chance"]
FOREGROUND = ["foreground_ordinary", "foreground_moving", "foreground_static", "foreground_contrasted"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread. Networks this small gain nothing from a second one (see conftest.one_process)."""
    torch.set_num_threads(1)


def measure(out: Path, **flags) -> dict:
    evaluation.main(["bias", *as_flags({**TINY, **flags, "out": out})])
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def crossed(demo_videos: Path, tmp_path_factory) -> Path:
    """The demo videos with other splits, whose test scenes are train scenes of other classes.

    Each class has three videos of the same three scenes. Classes 0 to 3 are tested on the last scene and classes 4 to 7
    on the first one.
    """
    folder = tmp_path_factory.mktemp("crossed") / "data"
    shutil.copytree(demo_videos, folder)
    lines = [
        line for split in ("train", "test") for line in (folder / "splits" / f"{split}.txt").read_text().splitlines()
    ]
    tested = [
        line for line in lines if (line.split()[0][-5] == "2") == (int(line.split()[1]) < 4) and "1.mp4" not in line
    ]
    splits = {"test": tested, "train": [line for line in lines if line not in tested]}
    for split, listed in splits.items():
        (folder / "splits" / f"{split}.txt").write_text("\n".join(listed) + "\n")
    assert (len(splits["train"]), len(tested)) == (16, 8)
    return folder


# ---------------------------------------------------------------- functions


def test_probe_and_nearest_are_right_on_separable_features_and_at_chance_on_noise():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)

    def outputs(values, labels):
        clips = torch.tensor(
            values[:, None] + rng.normal(0, 0.1, (len(values), 10, values.shape[1])), dtype=torch.float32
        )
        return ClipOutputs(clips, torch.tensor(labels), torch.arange(len(labels)), {})

    corners = 5 * np.eye(4)
    separable = evaluate_features(outputs(corners[labels], labels), outputs(corners[labels[::3]], labels[::3]), 4)
    assert (separable.probe, separable.nearest) == (1, 1)
    assert separable.chance == pytest.approx(1 / 4)
    assert separable.fitted.converged
    noise = evaluate_features(
        outputs(rng.normal(size=(120, 4)), labels), outputs(rng.normal(size=(400, 4)), labels[np.arange(400) % 120]), 4
    )
    # Within three standard deviations of the mean of 400 guesses that are right with probability 1/4.
    for score in (noise.probe, noise.nearest):
        assert abs(score - 1 / 4) < 3 * math.sqrt(3 / 16 / 400)


def test_mutual_information_is_0_for_independent_labels_and_1_for_equal_labels():
    classes, scenes = np.repeat(np.arange(8), 8).tolist(), [f"scene{i}" for i in range(8)] * 8
    assert mutual_information(classes, scenes) == pytest.approx(0, abs=1e-12)
    assert mutual_information(classes, [f"only{label}" for label in classes]) == pytest.approx(1)
    # The class (3 bits) determines which half it is in (1 bit), and they share nothing else: 2 * 1 / (3 + 1).
    assert mutual_information(classes, [label < 4 for label in classes]) == pytest.approx(1 / 2)
    assert mutual_information([0, 0], ["a", "a"]) == 0
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 3, 50).tolist(), rng.integers(0, 5, 50).tolist()

    def entropy(values):
        shares = [values.count(value) / len(values) for value in set(values)]
        return -sum(p * math.log2(p) for p in shares)

    shared = entropy(a) + entropy(b) - entropy(list(zip(a, b, strict=True)))
    assert mutual_information(a, b) == pytest.approx(2 * shared / (entropy(a) + entropy(b)))


def test_scenes_are_scored_if_test_groups_are_train_groups_of_several_classes():
    assert why_no_scenes("aabb", [0, 1, 0, 1], "ab") == ""
    assert why_no_scenes(["a", ""], [0, 1], ["a"]).startswith("the data set does not say")
    assert why_no_scenes("aabb", [0, 1, 0, 1], ["a", ""]).startswith("the data set does not say")
    assert (
        why_no_scenes("aabb", [0, 1, 0, 1], "acd") == "2 of the 3 test groups are not in the train split, for example c"
    )
    assert why_no_scenes("aabb", [0, 1, 1, 1], "ab").startswith(
        "1 of the 2 test groups have train videos of one class only, for example b"
    )
    assert why_no_scenes("aabb", [0, 1, 1, 1], "a") == ""  # b is not a test group


def test_moving_static_and_contrasted_for_predictors_that_use_motion_only(crossed):
    """The only feature is whether the clip moves. Each predictor maps the feature to a class with one test video."""
    videos = open_videos(open_catalog(crossed), "test", workers=1, progress=False)

    def moves(clip: torch.Tensor) -> torch.Tensor:
        return (clip.diff(dim=2).abs().amax((1, 2, 3, 4)) > 0).float()[:, None]

    def always(label):
        return lambda video: torch.eye(9)[torch.full((len(video),), label)]

    def if_moving(label, otherwise):
        return lambda video: torch.eye(9)[torch.where(video[:, 0] > 0.5, label, otherwise)]

    ordinary = run_on_clips(moves, videos, CONFIG, CPU, "test")
    samples = CompositeClips(videos, CONFIG)
    composites = run_on_composites(moves, samples, CPU)
    eighth = 1 / 8
    for predict, expected in (
        (always(2), (eighth, eighth, eighth, 0)),
        # Right on the moving clips of class 2 and on the static clips of class 5.
        (if_moving(2, 5), (eighth, eighth, eighth, eighth)),
        (if_moving(2, 2), (eighth, eighth, eighth, 0)),
    ):
        found = evaluate_foreground(predict, samples, composites, ordinary)
        assert (found.ordinary, found.moving, found.static, found.contrasted) == expected
        assert found.indices == list(range(8))
        assert (found.without_motion, found.failures) == ([], {})
        assert found.mask_share == samples.shares.mean()
        assert 0.02 < found.mask_share < 0.5

    # Each score uses its own features. Here those of the ordinary videos say that all move, or that none does. No video
    # is of class 8.
    for values, expected in ((ordinary.values, eighth), (ordinary.values * 0, 0)):
        found = evaluate_foreground(if_moving(2, 8), samples, composites, replace(ordinary, values=values))
        assert (found.ordinary, found.moving, found.static, found.contrasted) == (expected, eighth, 0, eighth)

    # A video's logits are the mean over its clips, also if they are not linear in the features: one clip of ten has a
    # large feature, and by its length it would decide for the whole video.
    one_large = torch.full_like(ordinary.values, -1.0)
    one_large[:, 0] = 100
    sign = NormalisedLinear(1, 9, bias=False)
    with torch.no_grad():
        sign.weight.zero_()[[2, 8], 0] = torch.tensor([1.0, -1.0])
    found = evaluate_foreground(sign, samples, composites, replace(ordinary, values=one_large))
    assert found.ordinary == 0  # class 2 has the logit -0.8, and class 8 the logit 0.8


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def untrained(crossed, tmp_path_factory) -> tuple[dict, str, Path]:
    """The report, the printed text and the output folder of random weights."""
    folder, shown = tmp_path_factory.mktemp("untrained") / "out", io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "SHEET_VIDEOS", 8)
        report = measure(folder, checkpoint="random", data=crossed)
    return report, shown.getvalue(), folder


def test_bias_reports_motion_scene_foreground_and_chance_and_writes_a_picture(untrained):
    report, shown, folder = untrained
    figures = report["figures"]
    assert list(figures) == PROBES + SCENES + FOREGROUND
    assert figures["motion_chance"] == pytest.approx(1 / 8)
    assert figures["scene_chance"] == pytest.approx(4 / 16)  # four of sixteen train videos show each test scene
    for name, value in figures.items():
        assert name == "scene_chance" or value * 8 == round(value * 8)  # shares of eight videos
    assert figures["foreground_ordinary"] == figures["motion_probe"]
    assert figures["foreground_contrasted"] <= figures["foreground_moving"]
    assert report["independence"] == pytest.approx(1 / 2)  # the half of the classes determines the scene
    assert (report["train"], report["test"], report["left_out"], report["no_scene_scores"]) == (16, 8, {}, None)
    assert report["foreground"]["predicted_by"] == "the motion probe"
    assert (report["foreground"]["videos"], report["foreground"]["without_motion"]) == (8, [])
    assert 0 < report["foreground"]["mask_share"] < 0.5
    assert report["probes"]["motion"]["converged"]
    assert report["probes"]["scene"]["converged"]
    assert report["weights"] == "random weights of r2plus1d_10 (width 2), seed 0"
    for name, number in (("motion", figures["motion_probe"]), ("scene", figures["scene_probe"])):
        assert f"{name:10}{number:8.1%}" in shown
    values = [figures[name] for name in FOREGROUND] + [figures["motion_chance"]]
    assert "".join(f"{value:12.1%}" for value in values) in shown
    assert "class and group share 0.500 of their information" in shown
    with Image.open(folder / "pictures" / "foreground.png") as image:
        assert image.width > 800


def test_the_same_command_gives_the_same_scores_and_another_network_gets_the_same_clips(untrained, crossed, tmp_path):
    again = measure(tmp_path / "again", checkpoint="random", data=crossed)
    assert again["figures"] == untrained[0]["figures"]
    other = measure(tmp_path / "other", checkpoint="random", data=crossed, seed=1)
    assert other["foreground"] == untrained[0]["foreground"]  # among them the mask's share, bit for bit
    assert other["weights"] != untrained[0]["weights"]


def test_no_foreground_runs_only_the_probes(crossed, tmp_path):
    report = measure(tmp_path / "out", checkpoint="random", data=crossed, foreground=False)
    assert list(report["figures"]) == PROBES + SCENES
    assert "foreground" not in report
    assert not (tmp_path / "out" / "pictures").exists()


def test_meaningless_scene_scores_are_omitted_with_the_reason(demo_videos, tmp_path, capsys):
    """The demo videos of the tests: each class has two train videos, and a test video of a third scene."""
    report = measure(tmp_path / "out", checkpoint="random", data=demo_videos, foreground=False)
    assert list(report["figures"]) == PROBES
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no scene")]
    assert line == f"no scene scores: {report['no_scene_scores']}"
    assert line.endswith("1 of the 1 test groups are not in the train split, for example scene19")
    assert report["independence"] == 0


def test_a_classifier_predicts_the_composites_and_its_backbone_gives_the_probes(crossed, tmp_path):
    torch.manual_seed(3)
    classifier = Classifier(build_backbone("r2plus1d_10", 2), 8)
    torch.nn.init.normal_(classifier.fc.weight, std=30)
    classes = open_catalog(crossed).classes
    file = tmp_path / "run" / "classifier.safetensors"
    save_classifier(classifier, classes, file)
    save_backbone(classifier.backbone, tmp_path / "alone" / "backbone.safetensors")

    by_classifier = measure(tmp_path / "a", checkpoint=file.parent, data=crossed)
    probes = measure(tmp_path / "b", checkpoint=tmp_path / "alone", data=crossed, foreground=False)["figures"]
    assert {name: by_classifier["figures"][name] for name in probes} == probes
    assert by_classifier["foreground"]["predicted_by"] == f"the classifier of {file.parent}"
    clips = {name: TINY[name] for name in ("clip_length", "crop_size", "workers")}
    evaluation.main(["accuracy", *as_flags({**clips, "checkpoint": file, "data": crossed, "out": tmp_path / "c"})])
    accuracy = json.loads((tmp_path / "c" / "report.json").read_text())["figures"]
    assert by_classifier["figures"]["foreground_ordinary"] == accuracy["top1_video"]

    # A classifier with a constant answer is right on the static clip whenever it is right on the moving clip.
    torch.nn.init.zeros_(classifier.fc.weight)
    classifier.fc.bias.data[5] = 1
    save_classifier(classifier, classes, file)
    figures = measure(tmp_path / "d", checkpoint=file, data=crossed)["figures"]
    assert [figures[name] for name in FOREGROUND] == [1 / 8, 1 / 8, 1 / 8, 0]


def still(path: Path, seed: int = 0) -> None:
    """Write a video of noise that does not move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    write_video(path, np.repeat(picture, 40, axis=0))


def test_a_video_without_motion_is_skipped_in_the_foreground_scores_and_named(crossed, tmp_path, capsys):
    shutil.copytree(crossed, tmp_path / "data")
    path = (tmp_path / "data" / "splits" / "test.txt").read_text().split()[0]
    (tmp_path / "data" / path).unlink()
    still(tmp_path / "data" / path)
    report = measure(tmp_path / "out", checkpoint="random", data=tmp_path / "data")
    assert report["test"] == 8  # the probes count it
    assert (report["foreground"]["videos"], report["foreground"]["without_motion"]) == (7, [path])
    assert report["foreground"]["clips_without_motion"] == 0  # of the seven
    for name in FOREGROUND:
        assert report["figures"][name] * 7 == pytest.approx(round(report["figures"][name] * 7))
    assert "skipped, because nothing moves in them: 1 videos" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_refused_in_one_line(crossed, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dclr.data.datasets.render_demo", lambda folder: pytest.fail("rendered the demo for a wrong input")
    )

    def refused(**flags) -> str:
        with pytest.raises(UserError) as caught:
            measure(tmp_path / "out", **flags)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = tmp_path / "gone"
    assert refused(checkpoint=missing).startswith(f"--checkpoint {missing}: no such file or folder")

    for split in ("train", "test"):
        still(tmp_path / "still" / split / "a" / "still.mp4")
    random = {"checkpoint": "random", "data": tmp_path / "still"}
    message = f"--data {tmp_path / 'still'}: the train split has one video. bias subtracts the mean of a split"
    assert refused(**random).startswith(message)
    for split in ("train", "test"):
        still(tmp_path / "still" / split / "a" / "second.mp4")
    assert "are of one class" in refused(**random)
    for split in ("train", "test"):
        still(tmp_path / "still" / split / "b" / "still.mp4", seed=1)
    assert "nothing moves in any of 3 test videos" in refused(**random)
    measure(tmp_path / "out", **random, foreground=False)

    lists = tmp_path / "unlabelled"
    shutil.copytree(crossed, lists)
    shutil.rmtree(lists / "splits")
    for split in ("train", "test"):
        (lists / split).mkdir()
        shutil.copy(next((lists / "videos" / "up").iterdir()), lists / split / "a.mp4")
    shutil.rmtree(lists / "videos")
    message = refused(checkpoint="random", data=lists)
    assert "no labels, which bias needs" in message

    torch.manual_seed(0)
    file = tmp_path / "classifier.safetensors"
    save_classifier(Classifier(build_backbone("r2plus1d_10", 2), 3), ("a", "b", "c"), file)
    assert "knows 3 classes and" in refused(checkpoint=file, data=crossed)
    message = refused(checkpoint=file, data=crossed, width=4)
    assert message.endswith("--width 4: pass --backbone r2plus1d_10 --width 2")
