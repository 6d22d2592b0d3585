"""Videos that are listed twice: by path, by link and by content, in files and in packed stores."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import make_list

from dclr.commands import evaluate as evaluation
from dclr.config import DataConfig
from dclr.data import duplicates, file_content
from dclr.data.catalog import Video
from dclr.data.check import check
from dclr.data.datasets import open_catalog
from dclr.data.duplicates import find_duplicates
from dclr.data.file_content import SAMPLE_BYTES
from dclr.data.pack import pack
from dclr.errors import UserError

SMALL = ["--width", "4", "--clip-length", "8", "--crop-size", "32", "--workers", "0"]
TRAIN = [("a.mp4", 0), ("b.mp4", 1), ("c.mp4", 2), ("d.mp4", 0)]


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def symbolic_link(source: Path, target: Path) -> None:
    target.symlink_to(source)


WAYS = {"link": symbolic_link, "hard link": os.link, "content": copy}


def found(data: Path) -> duplicates.Duplicates:
    return find_duplicates(open_catalog(data))


def test_videos_that_differ_are_no_duplicates(tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0)])
    for name, content in (("a.mp4", b"a"), ("b.mp4", b"b"), ("c.mp4", b"c")):
        # Equal sizes and equal ends. Only the middle differs.
        (data / name).write_bytes(bytes(SAMPLE_BYTES) + content + bytes(SAMPLE_BYTES))
    assert found(data).lines() == []
    assert found(data).report() == {"two_labels": [], "in_two_splits": {}, "listed_more_than_once": {}}
    found(data).check_labels()


def test_one_path_in_train_and_test_is_named(tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0), ("a.mp4", 0)])
    assert found(data).lines() == ["1 video is in both train and test: a.mp4"]
    assert found(data).report()["in_two_splits"] == {"train and test": ["a.mp4"]}
    found(data).check_labels()


@pytest.mark.parametrize("way", WAYS)
def test_one_file_under_two_names_is_one_video(way, tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0), ("lost_f.mp4", 0)])
    WAYS[way](data / "a.mp4", data / "lost_f.mp4")
    assert found(data).lines() == ["1 video is in both train and test: a.mp4 = lost_f.mp4"]
    (data / "train.txt").write_text("a.mp4 0\nlost_f.mp4 0\nb.mp4 1\nb.mp4 1\n")
    (data / "test.txt").write_text("e.mp4 0\n")
    assert found(data).lines() == ["2 videos are listed more than once in train: lost_f.mp4, b.mp4"]
    (data / "train.txt").write_text("a.mp4 0\nlost_f.mp4 1\nb.mp4 1\n")
    assert found(data).lines() == ["1 video has two labels: a.mp4 (run) and lost_f.mp4 (jump) are the same video"]
    with pytest.raises(
        UserError, match=r"a\.mp4 \(run\) and lost_f\.mp4 \(jump\) are the same video: one video cannot"
    ):
        found(data).check_labels()


def test_one_path_with_two_labels_is_refused_also_over_two_splits(tmp_path):
    """The reader of own lists refuses most of these itself. Other layouts and old packed stores may hold them."""
    catalog = open_catalog(make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0)]))
    train = (*catalog.splits["train"], Video(path="a.mp4", label=2))
    test = (*catalog.splits["test"], Video(path="b.mp4", label=0))
    result = find_duplicates(replace(catalog, splits={"train": train, "test": test}))
    assert result.lines() == [
        "2 videos have two labels: a.mp4 is listed as run and as sit, b.mp4 is listed as jump and as run",
        "1 video is in both train and test: b.mp4",
    ]
    with pytest.raises(UserError, match=r"a\.mp4 is listed as run and as sit, and 1 more such videos"):
        result.check_labels()


def test_two_files_of_an_official_layout_may_have_equal_content_and_two_labels(tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN)
    (data / "UCF-101" / "Run").mkdir(parents=True)
    (data / "UCF-101" / "Sit").mkdir()
    for name in ("Run", "Sit"):
        copy(data / "a.mp4", data / "UCF-101" / name / f"v_{name}_g01_c01.avi")
    (data / "ucfTrainTestlist").mkdir()
    lists = {"classInd": "1 Run\n2 Sit\n", "testlist01": ""}
    lists["trainlist01"] = "Run/v_Run_g01_c01.avi 1\nSit/v_Sit_g01_c01.avi 2\n"
    for name, content in lists.items():
        (data / "ucfTrainTestlist" / f"{name}.txt").write_text(content)
    result = found(data)
    assert result.lines()[0].startswith("1 video has two labels: UCF-101/Run/v_Run_g01_c01.avi (Run) and UCF-101/Sit/")
    result.check_labels()


def test_val_that_serves_as_test_is_no_leakage_but_a_val_of_its_own_is_compared(tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, val=[("e.mp4", 0), ("f.mp4", 1)])
    assert found(data).lines() == []
    (data / "test.txt").write_text("f.mp4 1\n")
    assert found(data).lines() == ["1 video is in both val and test: f.mp4"]


def test_files_on_a_disk_without_inode_numbers_are_not_one_file(tmp_path, monkeypatch):
    def stat(path: Path) -> SimpleNamespace:
        found = os.stat(path)
        return SimpleNamespace(st_dev=1, st_ino=0, st_size=found.st_size, st_mtime_ns=0, st_mode=found.st_mode)

    for name in "abc":
        (tmp_path / name).write_bytes(b"content of " + name.encode())
    copy(tmp_path / "a", tmp_path / "d")
    others = {"fstat": os.fstat, "path": os.path}
    monkeypatch.setattr(file_content, "os", SimpleNamespace(stat=stat, **others))
    content = duplicates.content_of_files(tmp_path, "abcd")
    assert content.tolist() == [0, 1, 2, 0]


def test_empty_and_unreadable_files_are_not_compared(tmp_path):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0)])
    for name in ("a.mp4", "b.mp4"):
        (data / name).write_bytes(b"")
    for name in ("c.mp4", "d.mp4"):
        (data / name).write_bytes(b"<html>error 404</html>")
    assert found(data).two_labels == ("c.mp4 (sit) and d.mp4 (run) are the same video",)
    assert find_duplicates(open_catalog(data), {"c.mp4", "d.mp4"}).lines() == []


@pytest.mark.parametrize("compact", [False, True])
def test_a_packed_store_knows_equal_videos_without_reading_them(compact, tmp_path, monkeypatch):
    data = make_list(tmp_path / "data", train=TRAIN, test=[("e.mp4", 0), ("lost_f.mp4", 1), ("b.mp4", 1)])
    copy(data / "a.mp4", data / "lost_f.mp4")
    pack(DataConfig(data=str(data), workers=1), str(tmp_path / "store"), 32, compact=compact)
    monkeypatch.setattr(duplicates, "content_of_files", lambda *_: pytest.fail("read files"))
    lines = found(tmp_path / "store").lines()
    assert lines == [
        "1 video has two labels: a.mp4 (run) and lost_f.mp4 (jump) are the same video",
        "2 videos are in both train and test: a.mp4 = lost_f.mp4, b.mp4",
    ]


def test_check_training_and_evaluation_name_duplicates(train_main, tiny, tmp_path, capsys):
    data = make_list(tmp_path / "data", train=[*TRAIN, ("d.mp4", 0)], test=[("e.mp4", 0), ("c.mp4", 2), ("f.mp4", 1)])
    lines = ["1 video is in both train and test: c.mp4", "1 video is listed more than once in train: d.mp4"]
    check(DataConfig(data=str(data), workers=1))
    shown = capsys.readouterr().out
    assert all(f"warning: {line}\n" in shown for line in lines)

    train_main("finetune", **{**tiny, "data": str(data), "epochs": 1, "batch_size": 2}, out=tmp_path / "run")
    shown = capsys.readouterr().err
    assert all(f"warning: {line}\n" in shown for line in lines)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["duplicates"]["in_two_splits"] == {"train and test": ["c.mp4"]}

    evaluation.main(
        ["retrieval", "--data", str(data), "--checkpoint", "random", "--out", str(tmp_path / "out"), *SMALL]
    )
    shown = capsys.readouterr()
    assert all(f"\n{line}\n" in shown.out and f"warning: {line}\n" in shown.err for line in lines)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["duplicates"]["in_two_splits"] == {"train and test": ["c.mp4"]}
    assert report["duplicates"]["listed_more_than_once"] == {"train": ["d.mp4"]}


def test_two_labels_end_finetuning_and_evaluation_but_not_pretraining(
    train_main, tiny, tiny_pretrain, tmp_path, capsys
):
    test = [("e.mp4", 0), ("f.mp4", 1), ("g.mp4", 2)]
    data = make_list(tmp_path / "data", train=[*TRAIN, ("lost_a.mp4", 1)], test=test)
    copy(data / "a.mp4", data / "lost_a.mp4")
    message = r"a\.mp4 \(run\) and lost_a\.mp4 \(jump\) are the same video: one video cannot have two labels"
    with pytest.raises(UserError, match=message):
        train_main("finetune", **{**tiny, "data": str(data), "batch_size": 2}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=message):
        evaluation.main(["retrieval", "--data", str(data), "--checkpoint", "random", *SMALL])
    flags = {**tiny_pretrain, "data": str(data), "epochs": 1, "batch_size": 2}
    train_main("pretrain", **flags, out=tmp_path / "pretrained")
    two_labels = "a.mp4 (run) and lost_a.mp4 (jump) are the same video"
    assert f"warning: 1 video has two labels: {two_labels}\n" in capsys.readouterr().err
