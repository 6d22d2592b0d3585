"""Files that tell all that is needed to use a network, and the statistics that its weights expect."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import video

from dclr.commands import evaluate
from dclr.errors import UserError
from dclr.kernels.types import MEAN, STD
from dclr.models import (
    KINETICS,
    Classifier,
    ClipFormat,
    ProjectionHead,
    build_backbone,
    load_backbone,
    load_classifier,
    load_pretrained,
    save_classifier,
)
from dclr.models import save_backbone as save
from dclr.models.backbone import convert
from dclr.training import checkpoint

CLIPS = ClipFormat(length=8, stride=4, crop=32)


def heads(*names: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: ProjectionHead(32, 32) for name in names})


def normalised(values: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1, 1) for numbers in (mean, std))
    return (values - mean) / std


def test_clips_and_frame_differences_get_the_statistics_of_the_weights() -> None:
    values = torch.rand(2, 3, 4, 5, 5, dtype=torch.float64)
    clip, expected = normalised(values, MEAN, STD), normalised(values, *KINETICS)
    differences = [view - view.roll(1, 2) for view in (clip, expected)]
    found = convert(differences[0].float(), KINETICS, differences=True)
    torch.testing.assert_close(found.double(), differences[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(convert(clip.float(), KINETICS).double(), expected, rtol=0, atol=1e-6)


def test_a_file_alone_gives_the_network_its_heads_its_clips_and_its_statistics(tmp_path: Path) -> None:
    backbone, own = build_backbone("r3d_10", 4), heads("vv", "vd")
    backbone.statistics = KINETICS
    save(backbone, tmp_path / "backbone.safetensors", CLIPS, own)
    for source in (tmp_path, str(tmp_path / "backbone.safetensors")):
        found = load_pretrained(source)
        assert (found.clips.length, found.clips.stride, found.clips.crop) == (8, 4, 32)
        assert found.clips.statistics == found.backbone.statistics == KINETICS
        assert set(found.heads) == {"vv", "vd"}
        assert torch.equal(found.heads["vd"][2].weight, own["vd"][2].weight)
        x = torch.randn(1, 3, 8, 32, 32)
        assert torch.equal(found.backbone(x), backbone.eval()(x))
    theirs = video.r3d_18(num_classes=3)
    ours = build_backbone("r3d_18")
    save(ours, tmp_path / "r3d_18.safetensors", CLIPS)
    assert set(theirs.load_state_dict(load_file(tmp_path / "r3d_18.safetensors"), strict=False).missing_keys) == {
        "fc.weight", "fc.bias",
    }  # fmt: skip


def test_a_run_that_belongs_to_somebody_else_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    """The folder may be listed but not entered. Tests may run as root, whom no permission stops."""

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    for source in (tmp_path, tmp_path / "backbone"):
        with pytest.raises(UserError, match=rf"^{source} cannot be read: Permission denied$"):
            load_pretrained(source)
        with pytest.raises(UserError, match=rf"^--checkpoint: {source} cannot be read: Permission denied; only a"):
            load_classifier(source)


def test_files_without_clips_take_them_from_the_config_of_their_run_or_say_what_is_assumed(tmp_path: Path) -> None:
    save(build_backbone("r3d_10", 4), tmp_path / "backbone.safetensors")
    assert load_pretrained(tmp_path).loaded.endswith("; assumed: clips of 16 frames, stride 2, 112 pixels")
    sizes = {"clip_length": 8, "clip_stride": 3, "crop_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"data": sizes}))
    found = load_pretrained(tmp_path)
    assert (found.clips.length, found.clips.stride, found.clips.crop) == (8, 3, 32)
    assert "assumed" not in found.loaded


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_length", "1000000000"), ("clip_length", "0"), ("crop_size", "x"), ("clip_stride", "9" * 5000),
        ("mean", "[1, 2]"), ("mean", "[NaN, 0, 0]"), ("std", "[0, 0, 0]"), ("std", "[" * 100_000), ("mean", "null"),
        ("width", "1000000000"), ("width", "8"), ("backbone", "__class__"),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused_in_one_line(name: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "backbone.safetensors"
    save(build_backbone("r3d_10", 4), file, CLIPS)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, {**metadata, name: value})
    with pytest.raises(UserError) as caught:
        load_pretrained(file)
    assert str(caught.value).isprintable()


def test_a_classifier_with_an_unknown_normalisation_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "classifier.safetensors"
    save_classifier(Classifier(build_backbone("r3d_10", 4), 1, normalised=True), ("a",), file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["normalised"] == "true"
    save_file(load_file(file), file, {**metadata, "normalised": "yes\n" * 100})
    for load in (load_pretrained, load_classifier):
        with pytest.raises(UserError, match=r"its metadata say normalised 'yes.*, not true") as caught:
            load(file)
        assert str(caught.value).isprintable()


def test_heads_of_the_same_name_and_shape_are_loaded_and_the_others_named(tmp_path: Path) -> None:
    backbone, own = build_backbone("r3d_10", 4), heads("vv", "vd")
    save(backbone, tmp_path / "backbone.safetensors", CLIPS, own)
    into = heads("vv", "vs")
    before = into["vs"][0].weight.clone()
    line = load_backbone(tmp_path, build_backbone("r3d_10", 4), into)
    assert line.endswith("written by dclr; heads vv; random heads vs")
    assert torch.equal(into["vv"][0].weight, own["vv"][0].weight)
    assert torch.equal(into["vs"][0].weight, before)


def test_pretraining_starts_from_the_weights_and_heads_of_another_run(
    tiny_pretrain, train_main, tmp_path, monkeypatch, capfd
):
    """The learning rate is too small to change a float32 weight, so the second run saves the weights it starts from."""
    train_main("pretrain", **{**tiny_pretrain, "epochs": 1, "out": tmp_path / "first"})
    first = load_file(tmp_path / "first" / "backbone.safetensors")
    again = {**tiny_pretrain, "epochs": 1, "lr": 1e-30, "out": tmp_path / "second", "init": tmp_path / "first"}
    train_main("pretrain", **again)
    second = load_file(tmp_path / "second" / "backbone.safetensors")
    weights = [name for name in first if name.endswith("weight")]
    assert any(name.startswith("heads.") for name in weights)
    assert all(torch.equal(first[name], second[name]) for name in weights)
    tensors, _ = checkpoint.read(checkpoint.newest(tmp_path / "second" / "checkpoints"))
    name = "stem.0.weight"
    assert torch.equal(tensors[f"model/key.backbone.{name}"], first[name])
    wrong = {"init": tmp_path / "missing", "data": tmp_path / "gone"}  # the weights are refused before the videos are
    with pytest.raises(UserError, match=r"no such file: .*missing"):
        train_main("pretrain", **{**again, "out": tmp_path / "third", **wrong})
    # An untrained network of the run's size, on the run's data set.
    monkeypatch.chdir(tmp_path)  # where the evaluation writes
    evaluate.main(["retrieval", "--checkpoint", "random", "--like", str(tmp_path / "first"), "--workers", "0"])
    assert "random weights of r2plus1d_10 (width 4)" in capfd.readouterr().out
    for source in (["random", "--like", str(tmp_path / "first")], [str(tmp_path / "first")]):
        with pytest.raises(UserError, match=r"^--preset demo has no effect: .*first names its own clips and network: "):
            evaluate.main(["retrieval", "--checkpoint", *source, "--preset", "demo"])
