"""Finetuning and linear probing in runs of about one second: trained tensors, files, interruption and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numbers
from safetensors.torch import load_file

from dclr.config import make_config
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.models import build_backbone, load_classifier, load_pretrained, save_backbone
from dclr.training import finetune as finetuning
from dclr.training.checkpoint import newest, read
from dclr.training.finetune import finetune

CLASSES = ("up", "down", "across", "spin", "grow", "shrink", "circle", "shake")


@pytest.fixture
def run_tiny(tiny, one_process, tmp_path):
    def run(command, name="run", resume=None, **changes):
        config = make_config(command, {**tiny, "lr": 0.05, "out": str(tmp_path / name), **changes})
        return finetune(command, config, "demo", one_process, resume)

    return run


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """Write a backbone with changed batch statistics to a file, and return the file's folder."""
    torch.manual_seed(7)
    backbone = build_backbone("r2plus1d_10", 4)
    for _ in range(3):
        backbone(torch.randn(2, 3, 8, 32, 32))
    save_backbone(backbone, tmp_path / "pretrained" / "backbone.safetensors")
    return tmp_path / "pretrained"


def test_finetuning_trains_all_weights_and_writes_every_documented_file(run_tiny, tmp_path):
    run = run_tiny("finetune")
    left = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    files = {"config.json", "report.json", "metrics.jsonl", "backbone.safetensors", "classifier.safetensors"}
    assert files | {"checkpoints/step-0000008.safetensors"} <= left
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    report = json.loads((run / "report.json").read_text())
    assert (report["command"], report["start"], report["steps"]) == ("finetune", "from scratch", 8)
    lines = numbers(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all({"loss", "train_top1", "lr"} <= line.keys() for line in lines)
    # A classifier that guesses among 8 classes has this loss.
    assert lines[0]["loss"] == pytest.approx(np.log(8), rel=0.05)

    torch.manual_seed(0)
    initial, found = build_backbone("r2plus1d_10", 4).state_dict(), load_file(run / "backbone.safetensors")
    assert all(not torch.equal(found[name], initial[name]) for name in initial)


@pytest.mark.parametrize(
    ("command", "changes", "normalised"),
    [("finetune", {}, False), ("linear", {}, True), ("linear", {"normalised_probe": False}, False)],
)
def test_the_classifier_loads_with_its_classes_and_equals_the_saved_backbone(run_tiny, command, changes, normalised):
    run = run_tiny(command, epochs=1, **changes)
    classifier, classes = load_classifier(run)
    assert classes == CLASSES
    assert load_classifier(run / "classifier.safetensors")[1] == CLASSES
    tensors, _ = read(newest(run / "checkpoints"))
    saved = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    assert torch.equal(classifier.fc.weight, saved["fc.weight"])
    assert torch.equal(classifier.fc.bias, saved["fc.bias"])
    backbone = load_file(run / "backbone.safetensors")
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in classifier.backbone.state_dict().items())

    # Both files say whether the classifier scales the features. Files of earlier versions, without a word, do not.
    clip = torch.randn(2, 3, 8, 32, 32)
    features = classifier.backbone(clip).mean((2, 3, 4))
    if normalised:
        features = features / features.norm(dim=1, keepdim=True)
    expected = features @ saved["fc.weight"].T + saved["fc.bias"]
    for file in (run, newest(run / "checkpoints")):
        found = load_pretrained(file)
        assert torch.allclose(found.classifier(clip), expected, atol=1e-6)
        assert ("on features of length 1" in found.loaded) == normalised


def test_linear_leaves_the_backbone_untouched_batch_statistics_included(run_tiny, pretrained):
    run = run_tiny("linear", pretrained=str(pretrained), lr=5.0)
    before, after = (load_file(folder / "backbone.safetensors") for folder in (pretrained, run))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    classifier = load_file(run / "classifier.safetensors")
    assert classifier["fc.bias"].abs().sum() > 0
    assert "written by dclr" in json.loads((run / "report.json").read_text())["start"]


def test_linear_without_pretrained_weights_says_that_its_features_are_random(run_tiny):
    run = run_tiny("linear", epochs=1)
    assert json.loads((run / "report.json").read_text())["start"].startswith("frozen random features")


def test_finetuning_starts_from_the_pretrained_weights(run_tiny, pretrained, monkeypatch):
    """The learning rate is too small to change a float32 weight, so the run saves the weights it starts from."""
    run = run_tiny("finetune", pretrained=str(pretrained), lr=1e-30, epochs=1)
    before, after = (load_file(folder / "backbone.safetensors") for folder in (pretrained, run))
    weights = [name for name in before if name.endswith("weight")]  # biases start at 0, so any step changes them
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert any(not torch.equal(before[name], after[name]) for name in before if "running_mean" in name)
    scratch = load_file(run_tiny("finetune", "scratch", lr=1e-30, epochs=1) / "backbone.safetensors")
    assert not torch.equal(scratch["stem.0.weight"], before["stem.0.weight"])


@pytest.mark.parametrize("command", ["finetune", "linear"])
def test_the_released_augmentation_changes_the_colour_of_clips_in_finetune_only(run_tiny, monkeypatch, command):
    seen = []
    real = finetuning.augment

    def watched(frames, augmentation, *others):
        seen.append((augmentation.grayscale | augmentation.jitter).any().item())
        return real(frames, augmentation, *others)

    monkeypatch.setattr(finetuning, "augment", watched)
    run_tiny(command, epochs=1, finetune_augmentation="released")
    assert any(seen) == (command == "finetune")


class Interrupted(Exception):
    """Stand-in for a kill."""


@pytest.mark.parametrize("command", ["finetune", "linear"])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    run_tiny, train_main, pretrained, monkeypatch, tmp_path, command
):
    """The runs use dropout and a learning rate that changes with each step.

    The pretrained file is deleted before resuming, which no longer needs it.
    """
    settings = {
        "pretrained": str(pretrained), "dropout": 0.5, "momentum": 0.9, "test_every": 0,
        "schedule": "cosine", "warmup_epochs": 1,
    }  # fmt: skip
    finished = run_tiny(command, "finished", **settings)
    real = finetuning.count_correct
    calls = []

    def fail_at_step_7(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise Interrupted
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "count_correct", fail_at_step_7)
        with pytest.raises(Interrupted):
            run_tiny(command, "cut", **settings)
    cut = tmp_path / "cut"
    assert [line["step"] for line in numbers(cut)] == [1, 2, 3, 4, 5, 6]
    (pretrained / "backbone.safetensors").unlink()
    train_main(command, resume=cut)
    assert numbers(cut) == numbers(finished)
    for name in ("classifier.safetensors", "backbone.safetensors"):
        ours, theirs = load_file(cut / name), load_file(finished / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_learning_rate_falls_at_each_milestone(run_tiny):
    run = run_tiny("finetune", epochs=3, milestones=[1, 2])
    rates = [line["lr"] for line in numbers(run)]
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 4 + [0.0005] * 4)


@pytest.mark.parametrize("command", ["finetune", "linear"])
def test_videos_without_labels_are_refused_before_a_folder_is_made(run_tiny, tmp_path, command):
    (tmp_path / "flat").mkdir()
    for number in range(4):
        write_video(tmp_path / "flat" / f"{number}.mp4", np.zeros((9, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=f"its videos have no labels, which {command} needs; use class folders"):
        run_tiny(command, data=str(tmp_path / "flat"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "right"),
    [({"backbone": "r3d_10"}, "--backbone r2plus1d_10"), ({"width": 8}, "--width 4")],
    ids=["backbone", "width"],
)
def test_weights_of_another_network_are_refused_with_the_flag_that_fits(run_tiny, pretrained, tmp_path, change, right):
    with pytest.raises(UserError) as caught:
        run_tiny("finetune", pretrained=str(pretrained), **change)
    assert right in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_nonfinite_loss_stops_the_run_at_its_step(run_tiny, monkeypatch, tmp_path):
    real = finetuning.augment
    calls = []

    def spoiled(*arguments):
        calls.append(1)
        clip = real(*arguments)
        return clip * float("nan") if len(calls) == 6 else clip

    monkeypatch.setattr(finetuning, "augment", spoiled)
    with pytest.raises(
        UserError,
        match=r"^non-finite values at step 6: loss nan \(samples (\d+, ){3}\d+\)\. Nothing was updated",
    ):
        run_tiny("finetune", log_every=100)
    assert newest(tmp_path / "run" / "checkpoints").stem == "step-0000004"


@pytest.mark.parametrize("change", ["new", "gone", "renamed"])
def test_a_run_resumed_with_other_classes_is_refused_with_both_numbers(train_main, tiny, tmp_path, change):
    for number, name in enumerate(("clap", "jump", "run")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for video in range(4):
            frames = np.full((12, 32, 32, 3), 20 * number + video, np.uint8)
            write_video(tmp_path / "data" / name / f"{video}.mp4", frames)
    if change == "new":
        (tmp_path / "data" / "jump").rename(tmp_path / "jump")
    flags = {**tiny, "data": tmp_path / "data", "epochs": 1, "out": tmp_path / "run"}
    train_main("finetune", **flags)
    if change == "new":
        (tmp_path / "jump").rename(tmp_path / "data" / "jump")
    else:
        (tmp_path / "data" / "jump").rename(tmp_path / ("data/leap" if change == "renamed" else "jump"))
    with pytest.raises(UserError) as caught:
        train_main("finetune", resume=tmp_path / "run", epochs=2)
    found = {
        "new": "3 classes now, 2 then (jump is new)",
        "gone": "2 classes now, 3 then (jump is gone)",
        "renamed": "3 classes now, 3 then (leap is new, jump is gone)",
    }
    assert str(caught.value) == (
        f"--resume {tmp_path / 'run'}: {found[change]}: restore the data set, or start another run"
    )
