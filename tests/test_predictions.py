"""Predictions of videos: probabilities against numpy, the files read back, and `eval.py predict` on a few videos."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dclr.commands import evaluate as evaluation
from dclr.commands import predict
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.evaluation.accuracy import most_confident_mistakes
from dclr.evaluation.predictions import Predictions, write_predictions
from dclr.models import Classifier, ClipFormat, build_backbone, save_backbone, save_classifier

CLASSES = ("dark", "light", "other")
CLIPS = ClipFormat(length=4, stride=1, crop=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Write a classifier that says "light" for bright videos and "dark" for the others, and a config.json."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = build_backbone("r3d_10", 4)
    classifier = Classifier(backbone, len(CLASSES)).eval()
    with torch.no_grad():
        for module in backbone.modules():  # without them, the network would not know how bright a clip is
            if isinstance(module, torch.nn.Conv3d):
                module.weight.abs_()
        dark, light = (backbone(torch.full((1, 3, 4, 16, 16), value)).mean((2, 3, 4))[0] for value in (-1.0, 1.0))
        classifier.fc.weight.copy_(torch.stack([dark - light, light - dark, 0 * dark]) / (light - dark).norm() ** 2)
        classifier.fc.bias[0] = (light - dark) @ (light + dark) / (light - dark).norm() ** 2
        classifier.fc.bias[1] = -classifier.fc.bias[0]
        classifier.fc.weight.mul_(3)
        classifier.fc.bias.mul_(1.5)
    file = tmp_path_factory.mktemp("run") / "classifier.safetensors"
    save_classifier(classifier, CLASSES, file, CLIPS)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two test videos in class folders that the classifier does not know in full, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for name, level in (("light/a", 230), ("night/b", 20), ("light/c", 20)):
        path = folder / "test" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, np.full((8, 32, 32, 3), level, np.uint8))
    (folder / "test" / "night" / "damaged.mp4").write_bytes(b"")
    return folder


def run(*arguments: str | Path) -> None:
    evaluation.main(["predict", *map(str, arguments), "--workers", "0"])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def make(logits, skipped=None, **changes) -> Predictions:
    count = len(logits)
    fields = {"paths": [f"{i}.mp4" for i in range(count)], "labels": ["a"] * count, "splits": ["test"] * count}
    return Predictions(
        **{**fields, **changes}, classes=("a", "b", "c"), logits=torch.tensor(logits), skipped=skipped or {}
    )


def test_probabilities_are_the_softmax_of_the_logits_and_the_first_class_has_the_highest_logit():
    logits = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    best = make(logits).best(2)
    expected = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    for row, shares in zip(best, expected, strict=True):
        order = np.argsort(-shares)[:2]
        assert [name for name, _ in row] == [("a", "b", "c")[index] for index in order]
        assert [probability for _, probability in row] == pytest.approx(shares[order], rel=1e-6)
    assert make([[1000.0, 999.0, -1000.0]]).best(9)[0][0] == ("a", pytest.approx(0.731, abs=1e-3))
    # The two lowest probabilities are 0 in float64. The higher logit still comes first.
    assert [name for name, _ in make([[-2000.0, -1000.0, 0.0]]).best(3)[0]] == ["c", "b", "a"]


def test_mistakes_are_ordered_by_the_probability_of_the_wrong_class():
    predictions = make([[0.0, 1, 0], [2, 0, 0], [0, 0, 3], [0, 2, 0]], labels=["a", "a", "b", "c"])
    assert most_confident_mistakes(predictions) == [2, 3, 0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_has_a_row_for_each_video_and_the_reason_of_each_skipped_one(suffix, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    odd = 'odd, "name"\n\udcff.mp4'
    predictions = make([[0.0, 1, 0], [3, 0, 0]], {"gone.mp4": "empty file"}, paths=[odd, "b.mp4"], labels=["a", ""])
    write_predictions(predictions, tmp_path / "new" / f"out{suffix}", top=5)
    if suffix == ".csv":
        rows = rows_of(tmp_path / "new" / "out.csv")
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(tmp_path / "new" / "out.parquet")
        rows = [{name: "" if value is None else value for name, value in row.items()} for row in table.to_pylist()]
    first, second, skipped = rows
    columns = ["path", "split", "label", *(f"{what}_{k}" for k in (1, 2, 3) for what in ("class", "probability"))]
    assert list(first) == [*columns, "skipped"]
    assert first["path"] == 'odd, "name"\n\\xff.mp4'
    assert (first["class_1"], first["label"], first["skipped"]) == ("b", "a", "")
    assert float(first["probability_1"]) == pytest.approx(np.e / (np.e + 2), rel=1e-5)
    assert (second["path"], second["label"]) == ("b.mp4", "")
    assert (skipped["path"], skipped["class_1"], skipped["skipped"]) == ("gone.mp4", "", "empty file")


def test_predict_writes_all_videos_of_a_data_set_with_other_classes(checkpoint, folder, tmp_path, capsys):
    run("--checkpoint", checkpoint, "--data", folder, "--out", tmp_path / "new" / "out.csv", "--top", "2")
    rows = rows_of(tmp_path / "new" / "out.csv")
    assert [(row["path"], row["split"], row["label"], row["class_1"]) for row in rows] == [
        ("test/light/a.mp4", "test", "light", "light"),
        ("test/light/c.mp4", "test", "light", "dark"),
        ("test/night/b.mp4", "test", "night", "dark"),
        ("test/night/damaged.mp4", "", "", ""),
    ]
    assert rows[3]["skipped"] == "empty file"
    assert "class_2" in rows[0]
    assert "class_3" not in rows[0]
    assert "3 videos, 1 skipped with their reasons" in capsys.readouterr().out


def test_predict_prints_the_classes_of_one_video_and_of_a_list(checkpoint, folder, tmp_path, capsys):
    run("--checkpoint", checkpoint, "--data", folder / "test" / "light" / "a.mp4")
    assert capsys.readouterr().out.split("a.mp4\n")[-1].split()[0] == "light"
    (tmp_path / "list.txt").write_text("a.mp4\nc.mp4\nnone.mp4\n")
    for name in "ac":
        shutil.copy(folder / "test" / "light" / f"{name}.mp4", tmp_path)
    run("--checkpoint", checkpoint, "--data", tmp_path / "list.txt", "--top", "1")
    shown = capsys.readouterr().out
    assert "c.mp4\n    dark" in shown
    assert "none.mp4: skipped: its list names it, and it is not on disk" in shown


def test_accuracy_writes_its_predictions_and_a_sheet_of_mistakes(checkpoint, tmp_path, capsys):
    for more, split in enumerate(("train", "test")):
        for name, level in (("dark/a", 20), ("light/b", 230), ("light/c", 30), ("other/d", 240)):
            path = tmp_path / "data" / split / f"{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, np.full((8, 32, 32, 3), level + 4 * more, np.uint8))
    for split in ("train", "test"):
        paths = sorted((tmp_path / "data" / split).rglob("*.mp4"))
        lines = [f"{path.relative_to(tmp_path / 'data')} {path.parent.name}" for path in paths]
        lost = ["test/dark/lost.mp4 dark"] if split == "test" else []
        (tmp_path / "data" / f"{split}.txt").write_text("\n".join(lines + lost))
    command = ["accuracy", "--checkpoint", checkpoint, "--data", tmp_path / "data", "--out", tmp_path / "out"]
    flags = ["--clip-length", "4", "--clip-stride", "1", "--crop-size", "16", "--workers", "0", "--max-missing", "100"]
    evaluation.main([*map(str, command), *flags])
    assert "2 of 4 test videos are predicted wrongly" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [(row["label"], row["class_1"]) for row in rows] == [
        ("dark", "dark"), ("light", "light"), ("light", "dark"), ("other", "light"), ("", ""),
    ]  # fmt: skip
    assert (rows[-1]["path"], rows[-1]["skipped"]) == ("test/dark/lost.mp4", "its list names it, and it is not on disk")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["figures"]["top1_video"] == 0.5
    sheet = tmp_path / "out" / "pictures" / "mistakes.png"
    assert sheet.read_bytes().startswith(b"\x89PNG")

    shutil.rmtree(tmp_path / "data" / "test" / "other")
    (tmp_path / "data" / "test" / "light" / "c.mp4").unlink()
    evaluation.main([*map(str, command), *flags])
    assert not sheet.exists()  # it would show mistakes of the evaluation before


def test_what_cannot_be_predicted_is_refused_in_one_line(checkpoint, folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").touch()
    save_backbone(build_backbone("r3d_10", 4), tmp_path / "backbone.safetensors", CLIPS)
    given = {"--checkpoint": checkpoint, "--data": folder, "--out": tmp_path / "new" / "out.csv"}
    wrong = [
        ({"--checkpoint": tmp_path / "backbone.safetensors"}, "has no classifier: give the folder of a finetune"),
        ({"--checkpoint": tmp_path / "none"}, "none"),
        ({"--data": tmp_path / "empty"}, "no videos found"),
        ({"--data": ""}, "--data is needed"),
        ({"--data": folder / "test" / "night" / "damaged.mp4"}, "empty file"),
        ({"--out": tmp_path / "out.xlsx"}, "must end in .csv or .parquet"),
        ({"--out": tmp_path / "there.csv"}, "exists already"),
        ({"--top": "0"}, "--top is 0, but must be at least 1"),
    ]
    monkeypatch.setattr(predict, "MOST_PRINTED", 2)
    for changes, message in [*wrong, ({"--out": ""}, "4 videos, too many to print: give --out predictions.csv")]:
        with pytest.raises(UserError) as refused:
            run(*(word for pair in {**given, **changes}.items() for word in pair))
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()
