"""Exported files give the outputs of the model on the values that the model is trained on, and say how to use them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from dclr.commands import evaluate as evaluation
from dclr.data.augmentation import centre_crop, to_augmentation
from dclr.errors import UserError
from dclr.evaluation import export
from dclr.evaluation.embedding import make_embedder
from dclr.evaluation.export import ExportedNetwork, export_network, largest_difference, random_clips
from dclr.kernels import augment
from dclr.models import (
    IMAGENET,
    KINETICS,
    Classifier,
    ClipFormat,
    ProjectionHead,
    build_backbone,
    load_pretrained,
    save_backbone,
    save_classifier,
)

CLASSES = ("bend", "naïve $x$", "runs\n")
CLIPS = ClipFormat(length=8, stride=3, crop=32)


def write_classifier(path: Path, name: str = "r3d_10", width: int = 4, clips: ClipFormat = CLIPS) -> Path:
    """Write a classifier with random weights, whose BatchNorm has the statistics of a trained network."""
    torch.manual_seed(0)
    backbone = build_backbone(name, width)
    backbone.statistics = clips.statistics
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    save_classifier(Classifier(backbone, len(CLASSES)), CLASSES, path, clips)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return write_classifier(tmp_path_factory.mktemp("run") / "classifier.safetensors")


def run_example(first_line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the example of docs/use.md that begins with a line, in the folder that holds the exported file."""
    page = (REPOSITORY / "docs" / "use.md").read_text()
    (example,) = re.findall(rf"```python\n({re.escape(first_line)}\n.*?)```", page, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(example, {})


def export_by_command(checkpoint: Path, out: Path, *flags: str) -> None:
    evaluation.main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *flags])


def test_the_network_takes_rgb_from_0_to_1_where_the_model_takes_normalised_clips(tmp_path):
    """A uint8 clip goes through the data pipeline and the classifier, and as RGB / 255 through the exported network."""
    clips = ClipFormat(8, 3, 32, *KINETICS)
    pretrained = load_pretrained(write_classifier(tmp_path / "classifier.safetensors", clips=clips))
    frames = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    row = centre_crop(32, 32)
    row["box"] = 0, 0, 32, 32
    views = augment(frames, to_augmentation([row, row]), (32, 32))
    outputs = ExportedNetwork(pretrained).eval()(frames.permute(0, 4, 1, 2, 3) / 255)
    assert torch.allclose(outputs["logits"], pretrained.classifier(views), rtol=1e-4, atol=1e-5)
    assert (outputs["logits"][0] - outputs["logits"][1]).abs().max() > 1e-3


def test_a_program_gives_the_models_outputs_for_every_batch_size_and_names_the_classes(
    checkpoint, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "new folder" / "network.pt2"
    export_by_command(checkpoint, out)
    shown = capsys.readouterr().out
    assert "clips: float32 (batch, 3, 8, 32, 32), RGB from 0 to 1" in shown
    assert "logits: (batch, 3)" in shown
    clips = random_clips(5, 8, 32)
    run_example("# torch.export", out.parent, monkeypatch)
    assert "resized to 32 x 32" in capsys.readouterr().out
    extra = {"dclr.json": ""}
    outputs = torch.export.load(out, extra_files=extra).module()(clips)
    expected = ExportedNetwork(load_pretrained(checkpoint)).eval()(clips)
    assert list(outputs) == ["features", "logits"]
    assert largest_difference(outputs, expected) < 1e-5
    information = json.loads(extra["dclr.json"])
    assert json.loads(information["classes"]) == list(CLASSES)
    sizes = {name: information[name] for name in ("clip_length", "clip_stride", "crop_size", "feature_dim")}
    assert sizes == {"clip_length": "8", "clip_stride": "3", "crop_size": "32", "feature_dim": "32"}


@pytest.mark.slow
def test_a_program_is_read_where_dclr_is_not_installed(checkpoint, tmp_path):
    export_by_command(checkpoint, tmp_path / "network.pt2")
    program = """
import sys, torch
sys.modules["dclr"] = None  # its import fails
network = torch.export.load("network.pt2").module()
assert network(torch.rand(2, 3, 8, 32, 32))["logits"].shape == (2, 3)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=120)


def test_an_onnx_file_gives_the_models_outputs_for_every_batch_size_and_names_the_classes(
    checkpoint, tmp_path, capsys, monkeypatch
):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_by_command(checkpoint, tmp_path / "network.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]  # weights are inside
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    clips = random_clips(5, 8, 32)
    features, logits = session.run(["features", "logits"], {"clips": clips.numpy()})
    expected = ExportedNetwork(load_pretrained(checkpoint)).eval()(clips)
    outputs = {"features": torch.from_numpy(features), "logits": torch.from_numpy(logits)}
    assert largest_difference(outputs, expected) < 1e-5
    run_example("# ONNX Runtime", tmp_path, monkeypatch)
    assert "resized to 32 x 32" in capsys.readouterr().out
    information = session.get_modelmeta().custom_metadata_map
    assert json.loads(information["classes"]) == list(CLASSES)
    assert information["clip_stride"] == "3"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("name", ["r2plus1d_10", "mc3_18", "s3d"])
def test_every_family_of_backbones_is_exported(name, form, tmp_path):
    pytest.importorskip("onnxruntime")
    clips = ClipFormat(16, 2, 64 if name == "s3d" else 32)
    file = write_classifier(tmp_path / "classifier.safetensors", name, 64 if name == "s3d" else 4, clips)
    out = tmp_path / f"network.{form}"
    assert export_network(load_pretrained(file), clips.length, clips.crop, form, out) < 1e-5
    assert out.is_file()


def test_a_backbone_without_classifier_gives_features_only(tmp_path):
    torch.manual_seed(0)
    save_backbone(build_backbone("r3d_10", 4), tmp_path / "backbone.safetensors", CLIPS)
    outputs = ExportedNetwork(load_pretrained(tmp_path / "backbone.safetensors")).eval()(random_clips(1, 8, 32))
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {"features": (1, 32)}


def test_the_embeddings_of_motion_and_scene_are_those_of_the_embedder(tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone("r3d_10", 4)
    heads = torch.nn.ModuleDict({pair: ProjectionHead(backbone.feature_dim, 32) for pair in ("dv", "sv")})
    save_backbone(backbone, tmp_path / "backbone.safetensors", CLIPS, heads)
    export_by_command(tmp_path / "backbone.safetensors", tmp_path / "network.pt2", "--like", "motion", "scene")
    clips = random_clips(2, 8, 32)
    outputs = torch.export.load(tmp_path / "network.pt2").module()(clips)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in IMAGENET)
    embed = make_embedder(load_pretrained(tmp_path / "backbone.safetensors"), ["pooled", "motion", "scene"])
    expected = embed((clips - mean) / std)
    expected["features"] = expected.pop("pooled")
    assert largest_difference(outputs, expected) < 1e-5
    assert outputs["motion"].shape == (2, 32)


def test_a_file_whose_outputs_differ_is_not_kept(checkpoint, tmp_path, monkeypatch):
    original = export._open_torch
    monkeypatch.setattr(
        export,
        "_open_torch",
        lambda file: lambda clips: {name: 1.001 * values for name, values in original(file)(clips).items()},
    )
    with pytest.raises(UserError, match=r"differ from the model's by 1\.0e-03 .* was not written"):
        export_network(load_pretrained(checkpoint), 8, 32, "torch", tmp_path / "network.pt2")
    assert not list(tmp_path.iterdir())


def test_a_difference_that_is_not_a_number_is_not_lost():
    ones = torch.ones(2)
    outputs = {"features": ones, "logits": ones * torch.nan}
    assert math.isnan(largest_difference(outputs, {"features": ones, "logits": ones}))


def test_what_cannot_be_exported_is_refused_in_one_line(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "there.pt2").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    wrong = [
        (checkpoint, "network.pth", (), "its name must end in .pt2 or .onnx"),
        (checkpoint, "network.pt2", ("--format", "onnx"), "for --format onnx its name must end in .onnx"),
        (checkpoint, "there.pt2", (), "exists already"),
        (checkpoint, "new/network.pt2", ("--like", "motion"), "no projection heads"),
        (tmp_path / "text.safetensors", "new/network.pt2", (), "text.safetensors"),
        (tmp_path / "none", "network.pt2", (), "none"),
    ]
    for file, name, flags, message in wrong:
        with pytest.raises(UserError) as refused:
            export_by_command(file, tmp_path / name, *flags)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--format onnx needs onnxscript: pip install 'dclr\[onnx\]'"):
        export_by_command(checkpoint, tmp_path / "network.onnx")
