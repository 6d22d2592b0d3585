"""Tests of dclr.load: a pretrained network in Python."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from torch import nn

import dclr
from dclr.commands import evaluate
from dclr.data.datasets import open_catalog
from dclr.data.decode import YuvFrames, rgb_of
from dclr.data.encode import write_video
from dclr.data.samples import TEST_CLIPS, stack_frames
from dclr.data.videos import open_videos
from dclr.evaluation.feature_file import read_features
from dclr.kernels.colour import yuv_box_to_rgb, yuv_coefficients
from dclr.models import ClipFormat, ProjectionHead, build_backbone
from dclr.models.weights import save_weights

CLIPS = ClipFormat(length=4, stride=2, crop=32)
CLASSES = ("up", "down", "across")
PAIRS = ("vv", "vs", "vd", "sv", "dv")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: for networks this small, a thread that waits for a busy core costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a network with heads and a classifier, and BatchNorm statistics that are not those of a new network."""
    torch.manual_seed(0)
    backbone = build_backbone("r2plus1d_10", 4).train()
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(4, 3, 4, 32, 32))
    heads = nn.ModuleDict({pair: ProjectionHead(backbone.feature_dim, 32) for pair in PAIRS})
    fc = nn.Linear(backbone.feature_dim, len(CLASSES))
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(file, backbone, CLIPS, heads, fc, CLASSES)
    return file


@pytest.fixture(scope="module")
def model(weights: Path) -> dclr.VideoModel:
    return dclr.load(weights, device="cpu")


@pytest.fixture(scope="module")
def videos(demo_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return three videos, which are all that their folder holds."""
    folder = tmp_path_factory.mktemp("folder")
    for path in sorted((demo_videos / "videos").rglob("*.mp4"))[::9]:
        shutil.copy(path, folder)
    return sorted(folder.iterdir())


def planes_of(video: Path) -> YuvFrames:
    """Return all frames of a video file."""
    found = open_videos(open_catalog(video), "train", 1, progress=False)
    return found.read(0, np.arange(found.frames[0]))


def frames_of(video: Path) -> np.ndarray:
    """Return all frames of a video file as FFmpeg converts them, (T, H, W, 3) uint8."""
    return rgb_of(planes_of(video))


def exact_frames_of(video: Path) -> np.ndarray:
    """Return all frames of a video file, (T, H, W, 3) uint8, each value rounded to the nearest whole number."""
    planes = stack_frames([planes_of(video)])
    coefficients = yuv_coefficients(planes.bt709, planes.full_range)[0].tolist()
    rgb = yuv_box_to_rgb(planes, coefficients, 0, 0, 0, *planes.y.shape[2:])
    return rgb.round().byte().permute(0, 2, 3, 1).numpy()


def test_one_video_several_and_clips(model, videos):
    one, several = model.embed(str(videos[1])), model.embed(videos)
    assert (one.shape, one.dtype, several.shape, several.dtype) == ((32,), np.float32, (3, 32), np.float32)
    np.testing.assert_allclose(one, several[1], atol=1e-6)
    clips = model.embed(videos[1], clips=True)
    assert clips.shape == (TEST_CLIPS, 32)
    np.testing.assert_allclose(clips.mean(0), one, atol=1e-6)
    assert model.embed(videos, clips=True).shape == (3, TEST_CLIPS, 32)


def test_the_rows_of_a_list_are_in_its_order_and_may_repeat(model, videos):
    order = [videos[2], videos[0], videos[2]]
    rows = model.embed(order)
    np.testing.assert_array_equal(rows, model.embed(videos)[[2, 0, 2]])


def test_a_folder_gives_the_rows_of_find_videos_for_any_number_of_workers(model, videos):
    assert dclr.find_videos(videos[0].parent) == videos
    rows = model.embed(videos)
    np.testing.assert_array_equal(model.embed(videos[0].parent), rows)
    np.testing.assert_array_equal(model.embed(str(videos[0].parent), workers=1), rows)


def test_frames_give_the_embedding_of_their_file_up_to_the_conversion_of_colours(model, videos):
    """The colours of a file are converted without rounding. FFmpeg's RGB is lower by 1 of 255 levels on average."""
    other = model.embed(videos[1])
    for video in (videos[0], videos[2]):
        of_file = model.embed(video)
        length = np.linalg.norm(of_file)
        assert np.linalg.norm(model.embed(exact_frames_of(video)) - of_file) <= 0.005 * length
        assert np.linalg.norm(model.embed(frames_of(video)) - of_file) <= 0.03 * length
        assert np.linalg.norm(other - of_file) >= 0.15 * length  # so the tolerances tell videos apart
    frames = frames_of(videos[0])
    np.testing.assert_array_equal(model.embed(torch.from_numpy(frames)), model.embed(frames))


def test_the_embeddings_and_probabilities_are_those_of_the_commands(model, weights, videos, tmp_path):
    """The clips, too, are those of the file of weights: no flag names them."""
    common = ["--checkpoint", str(weights), "--data", str(videos[0].parent), "--workers", "0"]
    evaluate.main(["features", *common, "--out", str(tmp_path / "features.npz"), "--like", "pooled", "motion", "scene"])
    table = read_features(tmp_path / "features.npz")
    assert [videos[0].parent / path for path in table.paths] == videos
    for kind, rows in table.embeddings.items():
        np.testing.assert_array_equal(rows, model.embed(videos, kind))
    evaluate.main(["predict", *common, "--out", str(tmp_path / "classes.csv")])
    lines = list(csv.DictReader((tmp_path / "classes.csv").open()))
    for line, predicted in zip(lines, model.predict(videos), strict=True):
        assert line["class_1"] == predicted[0][0]
        assert float(line["probability_1"]) == pytest.approx(predicted[0][1], abs=1e-4)


def test_motion_and_scene_are_the_embeddings_of_the_heads(model, videos):
    motion, scene = (model.embed(videos[0], like, clips=True) for like in ("motion", "scene"))
    assert motion.shape == scene.shape == (TEST_CLIPS, 32)
    for embeddings in (motion, scene):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert np.abs(motion - scene).max() > 1e-3


def test_predictions_are_class_names_with_probabilities(model, videos):
    found = model.predict(videos[0])
    assert {name for name, _ in found} == set(CLASSES)
    probabilities = [probability for _, probability in found]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert model.predict(videos[0], top=1) == found[:1]
    several = model.predict(videos[:2], top=1)
    assert [len(each) for each in several] == [1, 1]
    assert several[0][0][0] == found[0][0]


@pytest.mark.parametrize("top", [0, -1])
def test_predictions_have_at_least_one_class(model, top):
    with pytest.raises(dclr.UserError, match=f"^top is {top}, but must be at least 1$"):
        model.predict("nothing.mp4", top=top)


def test_preprocess_returns_what_the_backbone_takes(model, videos):
    frames = frames_of(videos[0])[: 2 * CLIPS.length : CLIPS.stride]
    clip = model.preprocess(frames)
    assert (clip.shape, clip.dtype) == ((3, 4, 32, 32), torch.float32)
    batch = model.preprocess(torch.from_numpy(np.stack([frames, frames[::-1]])))
    assert torch.equal(batch[0], clip)
    with torch.no_grad():
        features = model.backbone(batch)
    assert features.shape[:2] == (2, model.backbone.feature_dim)
    np.testing.assert_allclose(features[0].mean((1, 2, 3)), model.embed(frames_of(videos[0]), clips=True)[0], atol=1e-5)


def test_embedding_leaves_a_network_in_training_as_it_was(weights, videos):
    model = dclr.load(weights, device="cpu")
    expected = model.embed(videos[0])
    model.backbone.train()
    model.backbone.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    np.testing.assert_array_equal(model.embed(videos[0]), expected)
    assert model.backbone.training
    assert model.backbone.stem.training
    assert not model.backbone.layer1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())


def test_unreadable_videos_of_several_are_rows_of_nan_and_named(model, videos, tmp_path, capsys):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    rows = model.embed([videos[0], bad])
    assert np.isnan(rows[1]).all()
    assert np.isfinite(rows[0]).all()
    assert "bad.mp4 cannot be read (" in capsys.readouterr().err
    assert model.predict([bad, videos[0]])[0] == []
    with pytest.raises(dclr.UserError, match=r"bad\.mp4 cannot be read \("):
        model.embed(bad)
    shutil.copy(bad, tmp_path / "other.mp4")
    with pytest.raises(dclr.UserError, match=r"bad\.mp4 cannot be read \(.*\), nor can the 1 other videos"):
        model.embed(tmp_path)


def test_a_listed_video_that_is_not_on_disk_is_named(model, tmp_path, capsys):
    write_video(tmp_path / "here.mp4", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "list.txt").write_text("gone.mp4\nhere.mp4\n")
    assert dclr.find_videos(tmp_path / "list.txt") == [tmp_path / "here.mp4"]
    assert np.isfinite(model.embed(tmp_path / "list.txt")).all()
    assert "warning: 1 listed videos are not on disk, such as gone.mp4; they have no result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing.mp4", "no such file or folder: nothing.mp4"),
        (["nothing.mp4"], "no such file: "),
        ([], "no video files are given"),
        (17, "give a video file, a folder, a list of files, or the frames of one video"),
        ([np.zeros((4, 32, 32, 3), np.uint8)], "give a video file, a folder, a list of files"),
        (np.zeros((4, 32, 32, 3), np.float32), "frames must be uint8, from 0 to 255, not float32"),
        (np.zeros((3, 4, 32, 32), np.uint8), r"frames must be \(T, H, W, 3\), RGB, not \(3, 4, 32, 32\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"frames must be \(T, H, W, 3\), RGB, not \(0, 32, 32, 3\)"),
        (np.zeros((3, 32, 32, 3), object), "frames must be uint8, from 0 to 255, not object"),
        (np.zeros((3, 32, 32, 3), ">u2"), "frames must be uint8, from 0 to 255, not >u2"),
        (np.zeros((2, 4, 32, 32, 3), np.uint8), r"frames must be \(T, H, W, 3\), RGB, not \(2, 4, 32, 32, 3\)"),
    ],
)
def test_wrong_input_is_one_line(model, what, message):
    with pytest.raises(dclr.UserError, match=message) as caught:
        model.embed(what)
    assert "\n" not in str(caught.value)


def test_what_the_weights_do_not_have_is_one_line(tmp_path, videos):
    save_weights(tmp_path / "plain.safetensors", build_backbone("r2plus1d_10", 4), CLIPS)
    plain = dclr.load(tmp_path / "plain.safetensors", device="cpu")
    assert plain.embed(videos[0]).shape == (32,)
    with pytest.raises(dclr.UserError, match=r"plain\.safetensors has no classifier: give the folder of a finetune"):
        plain.predict(videos[0])
    with pytest.raises(dclr.UserError, match=r"plain\.safetensors has no projection heads"):
        plain.embed(videos[0], "motion")
    with pytest.raises(dclr.UserError, match="like is 'colour', but must be one of pooled, motion, scene"):
        plain.embed(videos[0], "colour")
    with pytest.raises(dclr.UserError, match="device nothing cannot be used"):
        dclr.load(tmp_path / "plain.safetensors", device="nothing")
    with pytest.raises(dclr.UserError, match="no such file: "):
        dclr.load(tmp_path / "other")


# ---------------------------------------------------------------- save_pretrained


def test_a_saved_folder_is_the_same_network_bit_for_bit(model, videos, tmp_path):
    folder = model.save_pretrained(tmp_path / "published")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    other = dclr.load(folder, device="cpu")
    assert (other.clips, other.classes, sorted(other.heads)) == (CLIPS, CLASSES, sorted(PAIRS))
    for mine, theirs in (
        (model.backbone, other.backbone),
        (model.heads, other.heads),
        (model.classifier, other.classifier),
    ):
        ours = mine.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())
    for like in ("pooled", "motion", "scene"):
        np.testing.assert_array_equal(other.embed(videos[0], like), model.embed(videos[0], like))
    assert other.predict(videos[0]) == model.predict(videos[0])
    with pytest.raises(dclr.UserError, match=r"already holds a model\.safetensors: give another folder"):
        other.save_pretrained(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(dclr.UserError, match="cannot write there"):
        other.save_pretrained(tmp_path / "file")


def test_the_model_card_has_the_figures_of_the_run_and_no_folders_of_its_machine(weights, tmp_path):
    run = tmp_path / "secret" / "ucf"
    (run / "retrieval").mkdir(parents=True)
    (run / "random").mkdir()
    (run / "other-clips").mkdir()
    (run / "backbone.safetensors").write_bytes(weights.read_bytes())
    report = {
        "data": {"folder": "/secret/UCF101", "layout": "UCF101", "videos": 9537},
        "command": "pretrain",
        "steps": 4,
    }
    (run / "report.json").write_text(json.dumps(report))
    evaluation = {"command": "retrieval", "figures": {"recall_at_1": 0.51239}, "clips": {"data": "/secret/UCF101"}}
    (run / "retrieval" / "report.json").write_text(json.dumps({**evaluation, "checkpoint": "/secret/ucf"}))
    other = {**evaluation, "figures": {"recall_at_1": 0.03}, "checkpoint": "random"}
    (run / "random" / "report.json").write_text(json.dumps(other))
    shorter = {**evaluation, "clips": {"clip_length": 1}, "figures": {"recall_at_1": 0.07}, "checkpoint": "/secret/ucf"}
    (run / "other-clips" / "report.json").write_text(json.dumps(shorter))
    card = (dclr.load(run, device="cpu").save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert "| retrieval | UCF101 | recall_at_1 | 0.5124 |" in card
    assert "- data set: UCF101 (UCF101), 9537 training videos" in card
    assert "0.03" not in card
    assert "0.07" not in card
    assert "# license:" in card
    assert "3: up, down, across" in card
    assert "secret" not in card + (tmp_path / "out" / "config.json").read_text()


def test_the_model_card_of_changed_weights_has_no_figures_of_the_run(weights, tmp_path):
    run = tmp_path / "run"
    (run / "retrieval").mkdir(parents=True)
    shutil.copy(weights, run / "backbone.safetensors")
    evaluation = {"command": "retrieval", "checkpoint": "run", "figures": {"recall_at_1": 0.51239}, "clips": {}}
    (run / "retrieval" / "report.json").write_text(json.dumps(evaluation))
    model = dclr.load(run, device="cpu")
    card = (model.save_pretrained(tmp_path / "same") / "README.md").read_text()
    assert "| recall_at_1 | 0.5124 |" in card
    with torch.no_grad():
        model.classifier.fc.bias += 1
    card = (model.save_pretrained(tmp_path / "trained") / "README.md").read_text()
    assert "0.5124" not in card
    assert "The weights were changed" in card


def test_the_model_card_of_a_checkpoint_has_no_figures_and_steps_of_the_final_weights(weights, tmp_path):
    run = tmp_path / "run"
    for name in ("early", "late"):
        (run / name).mkdir(parents=True)
    (run / "checkpoints").mkdir()
    for file in (run / "backbone.safetensors", run / "checkpoints" / "step-0000010.safetensors"):
        shutil.copy(weights, file)
    data = {"folder": "UCF101", "layout": "UCF101", "videos": 9537}
    own = {"command": "pretrain", "steps": 1920, "data": data, "environment": {"date": "2026-11-02T00:00:00+00:00"}}
    (run / "report.json").write_text(json.dumps(own))
    for name, day, recall in (("early", "01", 0.125), ("late", "03", 0.375)):
        evaluation = {"command": "retrieval", "checkpoint": "run", "figures": {"recall_at_1": recall}, "clips": {}}
        evaluation["environment"] = {"date": f"2026-11-{day}T00:00:00+00:00"}
        (run / name / "report.json").write_text(json.dumps(evaluation))
    card = (dclr.load(run, device="cpu").save_pretrained(tmp_path / "final") / "README.md").read_text()
    assert "| recall_at_1 | 0.375 |" in card
    assert "0.125" not in card  # it was evaluated while the run was training
    assert "- steps: 1920\n" in card
    model = dclr.load(run / "checkpoints" / "step-0000010.safetensors", device="cpu")
    card = (model.save_pretrained(tmp_path / "tenth") / "README.md").read_text()
    assert "recall_at_1" not in card
    assert "- steps: 1920; the weights are those of step-0000010.safetensors" in card


def test_classes_with_any_name_are_saved_and_weights_that_are_not_finite_leave_no_folder(weights, tmp_path):
    model = dclr.load(weights, device="cpu")
    names = ("caf\udce9", "größe", "c")  # the first has a byte that is not UTF-8, as file names may have
    model._pretrained = replace(model._pretrained, classes=names)
    card = (model.save_pretrained(tmp_path / "named") / "README.md").read_text()
    assert "3: caf\\udce9, größe, c" in card
    with torch.no_grad():
        model.backbone.stem[0].weight.fill_(torch.nan)
    with pytest.raises(dclr.UserError, match="not finite"):
        model.save_pretrained(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_model_card_without_a_run_invents_nothing(model, tmp_path):
    card = (model.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert "nothing is known about their training" in card
    assert "No evaluation of dclr was found" in card


# ---------------------------------------------------------------- the package


def test_the_examples_of_the_page_run(weights, videos, tmp_path, monkeypatch, capsys):
    """The blocks of docs/python.md run one after the other, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dclr.inference._device", lambda device: torch.device("cpu"))
    shutil.copytree(weights.parent, "runs/ucf")
    shutil.copytree(videos[0].parent, "videos")
    shutil.copy(videos[0], "video.mp4")
    shutil.copy(videos[1], "other.mp4")
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "docs" / "python.md").read_text(), re.M | re.S)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["embedding"].shape == names["motion"].shape == (32,)
    assert names["rows"].shape == (3, 32)
    assert names["clips"].shape == (TEST_CLIPS, 32)
    assert [path.name for path in names["paths"]] == [path.name for path in videos]
    assert names["logits"].shape == (2, 5)
    assert (tmp_path / "published" / "README.md").is_file()
    assert capsys.readouterr().out == "no such file or folder: missing.mp4\n"


def test_every_public_name_exists_and_an_unknown_one_is_refused():
    assert all(hasattr(dclr, name) for name in dclr.__all__)
    assert set(dclr.__all__) <= set(dir(dclr))
    with pytest.raises(AttributeError, match="module 'dclr' has no attribute 'nothing'"):
        dclr.nothing  # noqa: B018
