"""Missing videos, empty classes and --max-missing, in a catalog and in eval.py and train.py."""

import json

import pytest
from helpers import make_list, touch

from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.config import DataConfig
from dclr.data import verification
from dclr.data.check import check
from dclr.data.coverage import class_warnings, coverage
from dclr.data.datasets import open_catalog
from dclr.data.pack import pack
from dclr.errors import UserError
from dclr.models import build_backbone, save_backbone

SMALL = ["--width", "4", "--clip-length", "8", "--crop-size", "32", "--workers", "0"]
TRAIN = [("a.mp4", 0), ("b.mp4", 1), ("c.mp4", 2), ("d.mp4", 0)]


def test_coverage_counts_listed_used_missing_and_unreadable_videos_by_class(tmp_path):
    test = [("e.mp4", 0), ("f.mp4", 1), ("lost1.mp4", 1), ("lost2.mp4", 2), ("g.mp4", 0)]
    catalog = open_catalog(make_list(tmp_path / "data", train=TRAIN, test=test))
    found = coverage(catalog, "test", {"g.mp4": "empty file", "a.mp4": "of another split"})
    assert (found.listed, found.used, found.missing) == (5, 2, ("lost1.mp4", "lost2.mp4"))
    assert found.unreadable == {"g.mp4": "empty file"}
    assert found.classes == {"run": (2, 1), "jump": (2, 1), "sit": (1, 0)}
    assert found.sentence() == "2 of 5 listed test videos (2 not on disk, 1 unreadable); class sit has none"
    assert found.report()["classes"]["sit"] == {"listed": 1, "used": 0}
    found.check(60)
    with pytest.raises(UserError, match=r"60 % are not there, and --max-missing allows 59 %; the first is lost1\.mp4"):
        found.check(59)
    complete = coverage(catalog, "train", {})
    assert complete.sentence() == ""
    complete.check(0)


def test_a_class_without_listed_videos_is_named(tmp_path):
    catalog = open_catalog(make_list(tmp_path / "data", train=TRAIN[:2], test=[("e.mp4", 2), ("f.mp4", 0)]))
    assert coverage(catalog, "test", {}).sentence() == "2 of 2 listed test videos; class jump has none"
    assert class_warnings(catalog) == ["class sit has test videos but no train video"]
    assert coverage(catalog, "train", {"a.mp4": "cut off"}).sentence() == (
        "1 of 2 listed train videos (1 unreadable); 2 classes have none: run, sit"
    )


def test_a_packed_store_keeps_the_missing_videos_of_each_split(tmp_path, capsys):
    test = [("e.mp4", 0), ("lost.mp4", 1), ("g.mp4", 2)]
    data = make_list(tmp_path / "data", train=[*TRAIN, ("lost0.mp4", 0)], test=test)
    pack(DataConfig(data=str(data), workers=1), str(tmp_path / "store"), 32)
    catalog = open_catalog(tmp_path / "store")
    assert coverage(catalog, "test", {}).sentence() == "2 of 3 listed test videos (1 not on disk); class jump has none"
    assert coverage(catalog, "train", {}).missing == ("lost0.mp4",)
    capsys.readouterr()
    check(DataConfig(data=str(tmp_path / "store"), workers=1))
    shown = capsys.readouterr().out
    assert "warning: 2 of 3 listed test videos (1 not on disk); class jump has none\n" in shown


def test_check_names_gaps_of_each_split(tmp_path, capsys):
    test = [("e.mp4", 0), ("lost.mp4", 1)]
    check(DataConfig(data=str(make_list(tmp_path / "data", train=TRAIN[:2], test=test)), workers=1))
    shown = capsys.readouterr().out
    assert "warning: 1 of 2 listed test videos (1 not on disk); 2 classes have none: jump, sit\n" in shown
    assert "warning: 2 of 2 listed train videos; class sit has none\n" in shown


def test_an_evaluation_is_refused_beyond_max_missing_and_says_what_it_covers(tmp_path, capsys):
    test = [("e.mp4", 0), ("f.mp4", 2), ("lost.mp4", 1)]
    data = make_list(tmp_path / "data", train=TRAIN, test=test)
    command = ["retrieval", "--data", str(data), "--checkpoint", "random", "--out", str(tmp_path / "out"), *SMALL]
    with pytest.raises(UserError, match=r"2 of 3 listed test videos \(1 not on disk\); class jump has none; 33\.3 %"):
        evaluation.main(command)
    capsys.readouterr()
    evaluation.main([*command, "--max-missing", "34"])
    shown = capsys.readouterr()
    sentence = "these figures are of 2 of 3 listed test videos (1 not on disk); class jump has none\n"
    assert f"\n{sentence}" in shown.out
    assert f"warning: {sentence}" in shown.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["coverage"]["test"]["missing"] == ["lost.mp4"]
    assert report["coverage"]["test"]["classes"]["jump"] == {"listed": 1, "used": 0}
    assert report["coverage"]["train"]["used"] == 4


def test_max_missing_of_a_run_does_not_hold_for_its_evaluation(train_main, tiny, tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0), ("lost.mp4", 1)])
    flags = {**tiny, "data": str(data), "epochs": 1, "batch_size": 2, "max_missing": 50.0}
    train_main("finetune", **flags, out=tmp_path / "run")
    with pytest.raises(UserError, match="--max-missing allows 1 %"):
        evaluation.main(["accuracy", "--data", str(data), "--checkpoint", str(tmp_path / "run"), "--workers", "0"])


def test_check_names_ten_videos_of_a_kind_and_its_report_names_all(tmp_path, capsys):
    lost, empty = ([f"{name}{number:02d}.mp4" for number in range(12)] for name in ("lost", "empty"))
    data = make_list(tmp_path / "data", train=[*TRAIN, *((path, 0) for path in lost)])
    with (data / "train.txt").open("a") as opened:
        opened.write("".join(f"{path} 1\n" for path in empty))
    touch(data, *empty)
    train.main(["check", "--data", str(data), "--workers", "1", "--report", str(tmp_path / "report.json")])
    lines = capsys.readouterr().out.splitlines()
    more = "  and 2 more: --report FILE writes all missing and unreadable videos"
    start = lines.index("unreadable: 12")
    assert lines[start + 1 : start + 13] == [
        "  empty file: 12 videos",
        *(f"  {path}: empty file" for path in empty[:10]),
        more,
    ]
    start = lines.index("listed but not on disk: 12")
    assert lines[start + 1 : start + 12] == [*(f"  {path}" for path in lost[:10]), more]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"missing": lost, "unreadable": dict.fromkeys(empty, "empty file")}

    absent = tmp_path / "absent" / "report.json"
    with pytest.raises(UserError, match=f"--report {absent}: no such folder: {absent.parent}"):
        train.main(["check", "--data", str(data), "--report", str(absent)])


def test_a_folder_as_report_is_refused_before_any_video_is_decoded(tmp_path, monkeypatch):
    data = make_list(tmp_path / "data", train=TRAIN)
    monkeypatch.setattr(verification, "verify_video", lambda file: pytest.fail("decoded"))
    with pytest.raises(UserError, match=f"--report {tmp_path} is a folder: give a file"):
        check(DataConfig(data=str(data)), str(tmp_path))


def test_training_is_refused_for_missing_videos_before_any_video_is_decoded(train_main, tiny, tmp_path, monkeypatch):
    data = make_list(tmp_path / "data", train=[*TRAIN, ("lost.mp4", 1)])
    monkeypatch.setattr(verification, "verify_video", lambda file: pytest.fail("decoded"))
    with pytest.raises(UserError, match="20 % are not there"):
        train_main("finetune", **{**tiny, "data": str(data)}, out=tmp_path / "run")


def test_training_is_refused_beyond_max_missing(train_main, tiny, tmp_path, capsys):
    data = make_list(tmp_path / "data", train=[*TRAIN, ("lost.mp4", 1)], test=[("e.mp4", 0)])
    flags = {**tiny, "data": str(data), "epochs": 1, "batch_size": 2, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=r"4 of 5 listed train videos \(1 not on disk\); 20 % are not there"):
        train_main("finetune", **flags)
    assert not (tmp_path / "run").exists()
    train_main("finetune", **flags, max_missing=20.0)
    assert "warning: 4 of 5 listed train videos (1 not on disk)" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["coverage"]["train"]["missing"] == ["lost.mp4"]


def test_finetuning_warns_of_a_class_without_train_videos_and_accuracy_too(train_main, tiny, tmp_path, capsys):
    data = make_list(tmp_path / "data", train=[("a.mp4", 0), ("b.mp4", 1)], test=[("e.mp4", 0), ("f.mp4", 2)])
    train_main("finetune", **{**tiny, "data": str(data), "epochs": 1, "batch_size": 2}, out=tmp_path / "run")
    warning = "warning: class sit has test videos but no train video\n"
    assert warning in capsys.readouterr().err
    evaluation.main(["accuracy", "--data", str(data), "--checkpoint", str(tmp_path / "run"), "--workers", "0"])
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("command", ["retrieval", "maps"])
def test_finite_weights_whose_outputs_overflow_give_no_figures(command, tmp_path, demo_videos):
    network = build_backbone("r2plus1d_10", 4)
    network.state_dict()["layer4.0.conv2.1.weight"].fill_(1e30)
    save_backbone(network, tmp_path / "run" / "backbone.safetensors")
    with pytest.raises(UserError, match=r"output for \S+ is not finite or above 1e\+15, so there are no figures"):
        evaluation.main([command, "--data", str(demo_videos), "--checkpoint", str(tmp_path / "run"), *SMALL])
    assert not (tmp_path / "run" / command / "report.json").exists()


def test_accuracy_of_test_videos_without_labels_is_refused(train_main, tiny, tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", -1), ("f.mp4", -1)])
    train_main("finetune", **{**tiny, "data": str(data), "epochs": 1, "batch_size": 2}, out=tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"no labels, which accuracy needs; its lists must give the class .*test\.txt.* predict needs no labels",
    ):
        evaluation.main(["accuracy", "--data", str(data), "--checkpoint", str(tmp_path / "run"), "--workers", "0"])
