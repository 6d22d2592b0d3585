"""Every layout gives its exact videos, and every mistake gives its message."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import touch, write_lines

from dclr.data import store_files, string_array
from dclr.data.catalog import Catalog, Video, catalog_arrays
from dclr.data.datasets import official_splits, open_catalog
from dclr.data.display import AS_CODED
from dclr.errors import UserError


def labels(catalog: Catalog, split: str) -> dict[str, int]:
    return {video.path: video.label for video in catalog.videos(split)}


def missing(catalog: Catalog) -> tuple[str, ...]:
    """Return the paths of the listed videos that are not on disk, each once."""
    return tuple(dict.fromkeys(video.path for videos in catalog.missing.values() for video in videos))


def refused(data: Path, message: str, split: int = 1) -> None:
    """Assert that the catalog is refused with this message, in which DATA stands for the folder."""
    with pytest.raises(UserError) as refusal:
        open_catalog(data, split)
    assert str(refusal.value).replace(str(data), "DATA") == message
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- UCF101

UCF101 = {
    "ApplyEyeMakeup_g01_c01": 0,
    "BaseballPitch_g01_c01": 1,
    "Bowling_g01_c01": 2,
    "IceDancing_g01_c01": 3,
    "Rowing_g16_c03": 4,
    "SoccerJuggling_g23_c01": 5,
    "SoccerJuggling_g24_c01": 5,
}
UCF101_TEST = {
    1: ["ApplyEyeMakeup_g01_c01", "BaseballPitch_g01_c01", "Bowling_g01_c01", "IceDancing_g01_c01"],
    2: [],
    3: ["Rowing_g16_c03"],
}


def ucf101_path(name: str) -> str:
    return f"UCF-101/{name.split('_')[0]}/v_{name}.avi"


@pytest.mark.parametrize("split", [1, 2, 3])
def test_ucf101(genuine: Path, split: int) -> None:
    catalog = open_catalog(genuine / "ucf101_sample", split)
    assert (catalog.layout, catalog.root, missing(catalog)) == ("UCF101", genuine / "ucf101_sample", ())
    assert catalog.classes == ("ApplyEyeMakeup", "BaseballPitch", "Bowling", "IceDancing", "Rowing", "SoccerJuggling")
    test = {ucf101_path(name): UCF101[name] for name in UCF101_TEST[split]}
    train = {ucf101_path(name): label for name, label in UCF101.items() if name not in UCF101_TEST[split]}
    assert labels(catalog, "train") == train
    assert "test" not in catalog.splits if split == 2 else labels(catalog, "test") == test
    assert {video.group for video in catalog.videos("train")} >= {"SoccerJuggling_g23", "SoccerJuggling_g24"}


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    touch(tmp_path, "UCF-101/B/v_B_g01_c01.avi", "UCF-101/A/v_A_g08_c02.avi", "UCF-101/A/v_A_g01_c01.avi")
    write_lines(tmp_path, "ucfTrainTestlist/classInd.txt", "1 B", "2 A")  # numbered, not sorted
    write_lines(tmp_path, "ucfTrainTestlist/trainlist01.txt", "B/v_B_g01_c01.avi 1\r", "A/v_A_g08_c02.avi 2\r")
    write_lines(tmp_path, "ucfTrainTestlist/testlist01.txt", "A/v_A_g01_c01.avi", "")
    return tmp_path


def test_ucf101_labels_follow_class_ind(ucf101: Path) -> None:
    catalog = open_catalog(ucf101)
    assert catalog.classes == ("B", "A")
    assert catalog.videos("train") == (
        Video(path="UCF-101/B/v_B_g01_c01.avi", label=0, group="B_g01"),
        Video(path="UCF-101/A/v_A_g08_c02.avi", label=1, group="A_g08"),
    )
    assert catalog.videos("test") == (Video(path="UCF-101/A/v_A_g01_c01.avi", label=1, group="A_g01"),)


def test_ucf101_names_what_is_not_on_disk(ucf101: Path) -> None:
    (ucf101 / "UCF-101/A/v_A_g01_c01.avi").unlink()
    catalog = open_catalog(ucf101)
    assert missing(catalog) == ("UCF-101/A/v_A_g01_c01.avi",)
    with pytest.raises(UserError, match=re.escape(f"{ucf101} has no test split; it has: train")):
        catalog.videos("test")


LISTS = "DATA/ucfTrainTestlist"


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        (
            "trainlist01.txt",
            ["B/v_B_g01_c01.avi 2"],
            f"{LISTS}/trainlist01.txt:1: label 2 contradicts {LISTS}/classInd.txt, which says 1",
        ),
        (
            "trainlist01.txt",
            ["", "C/v_C_g01_c01.avi 1"],
            f"{LISTS}/trainlist01.txt:2: class 'C' is not in {LISTS}/classInd.txt",
        ),
        (
            "trainlist01.txt",
            ["B/v_B_g01_c01.avi"],
            f"{LISTS}/trainlist01.txt:1: expected `Class/video.avi number`, got 'B/v_B_g01_c01.avi'",
        ),
        (
            "testlist01.txt",
            ["A/v_A_g01_c01.avi", "D/v_D_g01_c01.avi"],
            f"{LISTS}/testlist01.txt:2: class 'D' is not in {LISTS}/classInd.txt",
        ),
        (
            "testlist01.txt",
            ["A/v_A_g01_c01.avi 2"],
            f"{LISTS}/testlist01.txt:1: expected `Class/video.avi`, got 'A/v_A_g01_c01.avi 2'",
        ),
        (
            "testlist01.txt",
            ["../A/v_A_g01_c01.avi"],
            f"{LISTS}/testlist01.txt:1: UCF-101/../A/v_A_g01_c01.avi must be relative to the data folder "
            "and stay inside it (or trust the list: --allow-outside)",
        ),
        ("classInd.txt", ["B", "2 A"], f"{LISTS}/classInd.txt:1: expected `number Class`, got 'B'"),
        ("classInd.txt", ["0 B", "1 A"], f"{LISTS}/classInd.txt: the classes must be numbered 1 to 2, each once"),
    ],
)
def test_ucf101_mistakes(ucf101: Path, file: str, lines: list[str], message: str) -> None:
    write_lines(ucf101, f"ucfTrainTestlist/{file}", *lines)
    refused(ucf101, message)


def test_ucf101_without_its_lists(ucf101: Path) -> None:
    refused(ucf101, f"missing list file: {LISTS}/trainlist02.txt", split=2)
    refused(ucf101, "split 4 of UCF101: must be 1, 2 or 3", split=4)
    refused(ucf101, "split 0 of UCF101: must be 1, 2 or 3", split=0)
    shutil.rmtree(ucf101 / "ucfTrainTestlist")
    refused(ucf101, f"missing list file: {LISTS}/classInd.txt")


def test_ucf101_without_its_videos(ucf101: Path) -> None:
    shutil.rmtree(ucf101 / "UCF-101")
    refused(ucf101, "no videos found in DATA; its lists name 3, such as UCF-101/B/v_B_g01_c01.avi")


# ---------------------------------------------------------------- HMDB51


def test_hmdb51(genuine: Path) -> None:
    catalog = open_catalog(genuine / "hmdb51_sample")
    assert (catalog.layout, catalog.classes, missing(catalog)) == ("HMDB51", ("cartwheel", "wave"), ())
    assert labels(catalog, "train") == {
        "videos/wave/SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": 1,
        "videos/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi": 1,
    }
    assert labels(catalog, "test") == {
        "videos/cartwheel/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi": 0,
        "videos/wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi": 1,
    }


HMDB51_LISTS = "DATA/testTrainMulti_7030_splits"


def test_hmdb51_odd_names_unused_videos_and_classes_at_the_top(tmp_path: Path) -> None:
    odd = "#437_How_To_(Ride)_A&B;!_ride_bike_f_cm_np1_ri_med_0.avi"
    touch(tmp_path, f"ride_bike/{odd}", "ride_bike/unused.avi", "run/r.avi")
    write_lines(
        tmp_path, "testTrainMulti_7030_splits/ride_bike_test_split3.txt", f"{odd} 1 ", "unused.avi 0 ", "gone.avi 2 "
    )
    write_lines(tmp_path, "testTrainMulti_7030_splits/run_test_split3.txt", "r.avi 2 ")
    catalog = open_catalog(tmp_path, 3)
    assert catalog.classes == ("ride_bike", "run")
    assert labels(catalog, "train") == {f"ride_bike/{odd}": 0}
    assert labels(catalog, "test") == {"run/r.avi": 1}
    assert missing(catalog) == ("ride_bike/gone.avi",)


def test_hmdb51_mistakes(tmp_path: Path) -> None:
    touch(tmp_path, "videos/run/r.avi")
    (tmp_path / "testTrainMulti_7030_splits").mkdir()
    refused(tmp_path, f"{HMDB51_LISTS} holds no <class>_test_split1.txt")
    write_lines(tmp_path, "testTrainMulti_7030_splits/run_test_split1.txt", "r.avi 1 ", "s.avi 3 ")
    refused(
        tmp_path,
        f"{HMDB51_LISTS}/run_test_split1.txt:2: expected `video.avi 0|1|2` (unused, train, test), got 's.avi 3'",
    )
    refused(tmp_path, f"missing list file: {HMDB51_LISTS}/run_test_split2.txt", split=2)
    refused(tmp_path, "split 4 of HMDB51: must be 1, 2 or 3", split=4)


# ---------------------------------------------------------------- Kinetics-400

HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        "train/abseiling/-abc_DEF123_000010_000020.mp4",
        "train/zumba/zzzzzzzzzzz.mkv",
        "val/abseiling/vvvvvvvvvvv_000001_000011.webm",
        "unlisted.mp4",
    )
    write_lines(
        tmp_path,
        "train.csv",
        HEADER,
        "abseiling,-abc_DEF123,10,20,train,0",
        '"zumba",zzzzzzzzzzz,5,15,train,0',
        "zumba,gone_______,0,10,train,0",
    )
    write_lines(tmp_path, "validate.csv", HEADER, "abseiling,vvvvvvvvvvv,1,11,validate,0")
    write_lines(tmp_path, "test.csv", "youtube_id,time_start,time_end,split", "ttttttttttt,0,10,test")
    write_lines(tmp_path, "my results.csv", "epoch,loss", "1,2.5")
    return tmp_path


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_kinetics(kinetics: Path, folder: str) -> None:
    (kinetics / "annotations").mkdir()
    for file in kinetics.glob("*.csv"):
        file.rename(kinetics / folder / file.name)
    catalog = open_catalog(kinetics)
    assert (catalog.layout, catalog.classes) == ("Kinetics-400", ("abseiling", "zumba"))
    assert catalog.videos("train") == (
        Video(path="train/abseiling/-abc_DEF123_000010_000020.mp4", label=0, group="-abc_DEF123"),
        Video(path="train/zumba/zzzzzzzzzzz.mkv", label=1, group="zzzzzzzzzzz"),
    )
    assert labels(catalog, "val") == {"val/abseiling/vvvvvvvvvvv_000001_000011.webm": 0}
    assert catalog.videos("test") == catalog.videos("val")  # the test list has no labels
    assert missing(catalog) == ("gone________000000_000010",)


def test_kinetics_test_list_with_labels(kinetics: Path) -> None:
    touch(kinetics, "t/ttttttttttt_000000_000010.mp4")
    write_lines(kinetics, "test.csv", HEADER, "zumba,ttttttttttt,0,10,test,0")
    assert labels(open_catalog(kinetics), "test") == {"t/ttttttttttt_000000_000010.mp4": 1}


def test_kinetics_videos_behind_a_link(kinetics: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "train"
    shutil.move(kinetics / "train", elsewhere)
    (kinetics / "train").symlink_to(elsewhere)
    assert len(open_catalog(kinetics).videos("train")) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("zumba,yyyyyyyyyyy,x,10,train,0", "DATA/train.csv:2: time_start and time_end must be seconds"),
        ("zumba,yyyyyyyyyyy", "DATA/train.csv:2: time_start and time_end must be seconds"),
        ("zumba,yyyyyyyyyyy,0,10,dev,0", "DATA/train.csv:2: split must be train, val, validate or test, got 'dev'"),
        (
            "zumba,vvvvvvvvvvv,1,11,train,0",
            "DATA/validate.csv:2: vvvvvvvvvvv_000001_000011 is listed a second time, with another label or split",
        ),
    ],
)
def test_kinetics_mistakes(kinetics: Path, row: str, message: str) -> None:
    write_lines(kinetics, "train.csv", HEADER, row)
    refused(kinetics, message)


def test_kinetics_without_videos(tmp_path: Path) -> None:
    write_lines(tmp_path, "train.csv", HEADER, "zumba,yyyyyyyyyyy,0,10,train,0")
    refused(tmp_path, "no videos found in DATA; its lists name 1, such as yyyyyyyyyyy_000000_000010")
    refused(tmp_path, "split 2 of Kinetics-400: must be 1: this layout has no numbered splits", split=2)


# ---------------------------------------------------------------- Something-Something v2

TEMPLATES = {"Holding something": "0", "Putting something next to something": "1"}


def write_something(root: Path, prefix: str = "something-something-v2-", folder: str = "") -> Path:
    """Write a data set of five videos, one of which is missing, with the four lists as they are published."""
    touch(root, *(f"20bn-something-something-v2/{name}.webm" for name in ("1", "2", "3", "9")))
    put = {"label": "putting a cup next to a jar", "template": "Putting [something] next to [something]"}
    hold = {"label": "holding a pen", "template": "Holding [something]", "placeholders": ["a pen"]}
    lists = {
        "labels": TEMPLATES,
        "train": [{"id": "2", **put}, {"id": "1", **hold}, {"id": "7", **hold}],
        "validation": [{"id": "3", **hold}],
        "test": [{"id": "9"}],
    }
    for name, content in lists.items():
        write_lines(root, f"{folder}{prefix}{name}.json", json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("prefix", "folder"), [("something-something-v2-", ""), ("something-something-v2-", "labels/"), ("", "labels/")]
)
def test_something_something(tmp_path: Path, prefix: str, folder: str) -> None:
    catalog = open_catalog(write_something(tmp_path, prefix, folder))
    assert (catalog.layout, catalog.classes) == ("Something-Something v2", tuple(TEMPLATES))
    below = "20bn-something-something-v2"
    assert labels(catalog, "train") == {f"{below}/2.webm": 1, f"{below}/1.webm": 0}
    assert labels(catalog, "val") == {f"{below}/3.webm": 0}
    assert catalog.videos("test") == catalog.videos("val")  # the test list has no labels
    assert missing(catalog) == ("7.webm",)
    assert catalog.unused == {"test videos without labels": (f"{below}/9.webm",)}
    assert "1 test videos have no label and are not used" in catalog.recognised[0]
    assert list(through_a_store({1: catalog}, tmp_path / "store")[1].splits.items()) == list(catalog.splits.items())


def test_something_something_without_the_folder_and_without_validation(tmp_path: Path) -> None:
    write_something(tmp_path)
    (tmp_path / "something-something-v2-validation.json").unlink()
    for file in (tmp_path / "20bn-something-something-v2").iterdir():
        file.rename(tmp_path / f"{file.stem}.mp4")  # converted
    catalog = open_catalog(tmp_path)
    assert labels(catalog, "train") == {"2.mp4": 1, "1.mp4": 0}
    assert labels(catalog, "test") == {"9.mp4": -1}
    assert catalog.warnings == ("1 videos of the test split have no label",)


def test_a_train_json_next_to_another_labels_json_is_no_something_something(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "sit/b.mp4")
    write_lines(tmp_path, "train.json", "[]")
    for content in ('["run", "sit"]', '{"run": 0}', "{", '{"run": "x"}'):
        write_lines(tmp_path, "labels.json", content)
        assert open_catalog(tmp_path).layout == "class folders"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels", {"A": "1"}, 'must map each class name to its number, "0" to the number of classes - 1, each once'),
        ("labels", {"A": "0", "B": "0"}, "must map each class name to its number"),
        ("labels", {"A": "0", "B": 1}, "must map each class name to its number"),
        ("labels", [1], "must map each class name to its number"),
        ("train", {"id": "1"}, "must hold a JSON list"),
        ("train", [{"id": "1"}], "entry 0 must have the texts id and template"),
        ("test", [{"id": 1}], "entry 0 must have the text id"),
        ("train", [{"id": "1", "template": "Eating [something]"}], "entry 0: class 'Eating something' is not in DATA/"),
        (
            "validation",
            [{"id": "1", "template": "Putting something next to something"}],
            "entry 0: 1 has label 1, but label 0 earlier",
        ),
    ],
)
def test_something_something_mistakes(tmp_path: Path, file: str, content: object, message: str) -> None:
    written = write_lines(write_something(tmp_path), f"something-something-v2-{file}.json", json.dumps(content))
    with pytest.raises(UserError) as refusal:
        open_catalog(tmp_path)
    assert str(refusal.value).startswith(str(written))
    assert message in str(refusal.value).replace(str(tmp_path), "DATA")


def test_something_something_without_a_list(tmp_path: Path) -> None:
    write_something(tmp_path)
    refused(tmp_path, "split 2 of Something-Something v2: must be 1: this layout has no numbered splits", split=2)
    (tmp_path / "something-something-v2-labels.json").unlink()
    refused(tmp_path, "missing list file: DATA/something-something-v2-labels.json")


# ---------------------------------------------------------------- Diving48


@pytest.fixture
def diving48(tmp_path: Path) -> Path:
    touch(tmp_path, "rgb/_8Vy3dlHg2w_00000.mp4", "rgb/_8Vy3dlHg2w_00001.mp4", "more/xyz_00002.mp4")
    train = [{"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 133}]
    test = [{"vid_name": "xyz_00002", "label": 0}, {"vid_name": "gone_00003", "label": 0}]
    write_lines(tmp_path, "Diving48_V2_train.json", json.dumps(train))
    write_lines(tmp_path, "Diving48_V2_test.json", json.dumps(test))
    write_lines(tmp_path, "Diving48_vocab.json", json.dumps([["Back", "15som", "05Twis", "FREE"], ["Back", "Dive"]]))
    return tmp_path


def test_diving48(diving48: Path) -> None:
    catalog = open_catalog(diving48)
    assert (catalog.layout, catalog.classes) == ("Diving48", ("Back-15som-05Twis-FREE", "Back-Dive"))
    assert catalog.videos("train") == (Video(path="rgb/_8Vy3dlHg2w_00000.mp4", label=1, group="_8Vy3dlHg2w"),)
    assert catalog.videos("test") == (Video(path="more/xyz_00002.mp4", label=0, group="xyz"),)
    assert missing(catalog) == ("gone_00003",)
    (diving48 / "Diving48_vocab.json").unlink()
    assert open_catalog(diving48).classes == ("0", "1")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "Diving48_vocab.json",
            '[["Back"]]',
            "label 1 is beyond the 1 classes of DATA/Diving48_vocab.json",
        ),
        (
            "Diving48_V2_train.json",
            '[{"vid_name": "a"}]',
            "DATA/Diving48_V2_train.json: entry 0 must have a vid_name and a label of 0 or more, below 100,000",
        ),
        ("Diving48_V2_train.json", "{}", "DATA/Diving48_V2_train.json must hold a JSON list"),
        (
            "Diving48_V2_train.json",
            "[1,",
            "DATA/Diving48_V2_train.json is not JSON: Expecting value: line 2 column 1 (char 4)",
        ),
        (
            "Diving48_V1_train.json",
            "[]",
            "DATA holds both Diving48_V1_train.json and Diving48_V2_train.json; keep one",
        ),
    ],
)
def test_diving48_mistakes(diving48: Path, file: str, content: str, message: str) -> None:
    write_lines(diving48, file, content)
    refused(diving48, message)


def test_diving48_without_its_test_list(diving48: Path) -> None:
    (diving48 / "Diving48_V2_test.json").unlink()
    refused(diving48, "missing list file: DATA/Diving48*_test.json")


# ---------------------------------------------------------------- list files


def test_weizmann(genuine: Path) -> None:
    catalog = open_catalog(genuine / "weizmann")
    assert (catalog.layout, catalog.root, missing(catalog)) == ("list file", genuine / "weizmann", ())
    assert catalog.classes == ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")
    assert {split: len(videos) for split, videos in catalog.splits.items()} == {"train": 60, "test": 30}
    for videos in catalog.splits.values():
        for video in videos:
            name = video.path.split("/")[0]
            assert catalog.classes[video.label] == name
            assert video.path == f"{name}/{video.group}_{name}.mp4"
    train, test = ({video.group for video in catalog.videos(split)} for split in ("train", "test"))
    assert (len(train), len(test), train & test) == (6, 3, set())
    assert open_catalog(genuine / "weizmann/splits/test.txt") == catalog


def test_lists_next_to_the_videos(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "2.mp4", "b/3.mp4", "4.mp4")
    write_lines(tmp_path, "train.txt", "# my own", "", "./a/1.mp4 0 park", "2.mp4 3 home", "b/gone.mp4 0 park")
    write_lines(tmp_path, "val.txt", "b/3.mp4 1")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("0", "1", "2", "3")
    assert catalog.videos("train") == (
        Video(path="a/1.mp4", label=0, group="park"),
        Video(path="2.mp4", label=3, group="home"),
    )
    assert catalog.videos("test") == catalog.videos("val") == (Video(path="b/3.mp4", label=1),)
    assert missing(catalog) == ("b/gone.mp4",)
    assert open_catalog(tmp_path / "train.txt") == open_catalog(tmp_path / "val.txt") == catalog
    write_lines(tmp_path, "test.txt", "4.mp4 0")
    assert labels(open_catalog(tmp_path), "test") == {"4.mp4": 0}


def test_a_list_of_another_name_is_all_there_is(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "2.mp4")
    write_lines(tmp_path, "train.txt", "1.mp4 0")
    mine = write_lines(tmp_path, "mine.txt", "2.mp4 0")
    catalog = open_catalog(mine)
    assert list(catalog.splits) == ["train"]
    assert labels(catalog, "train") == {"2.mp4": 0}


COLUMNS = "every line must be `path label [group]` with the same columns, and a path with spaces needs quotes"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1.mp4", f"1 column in '1.mp4', but 2 in most lines; {COLUMNS}"),
        ("1.mp4 zero", "expected the label a number, as in DATA/splits/train.txt:1, got 'zero'"),
        ("1.mp4 0", "1.mp4 has another label than in DATA/splits/train.txt:1"),
        ("1.mp4 0 a b", f"4 columns in '1.mp4 0 a b', but 2 in most lines; {COLUMNS}"),
        ("1.mp4 0.0", "label '0.0' must be a whole number from 0 to 99,999"),
        ("2.mp4 2", "label 2 is beyond the 2 classes of DATA/splits/classes.txt; no label is 0: write labels from 0"),
        (
            "/1.mp4 0",
            "/1.mp4 must be relative to the data folder and stay inside it (or trust the list: --allow-outside)",
        ),
        (
            "a/../../1.mp4 0",
            "a/../../1.mp4 must be relative to the data folder and stay inside it (or trust the list: --allow-outside)",
        ),
    ],
)
def test_list_mistakes(tmp_path: Path, line: str, message: str) -> None:
    touch(tmp_path, "1.mp4")
    write_lines(tmp_path, "splits/classes.txt", "red", "green apple")
    write_lines(tmp_path, "splits/train.txt", "1.mp4 1", line)
    refused(tmp_path, f"DATA/splits/train.txt:2: {message}")


def test_list_missing_or_empty(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4")
    write_lines(tmp_path, "splits/test.txt", "1.mp4 0")
    refused(tmp_path, "missing list file: DATA/splits/train.txt")
    write_lines(tmp_path, "splits/train.txt", "2.mp4 0")
    (tmp_path / "splits/test.txt").unlink()
    refused(tmp_path, "no videos found in DATA; its lists name 1, such as 2.mp4")
    refused(tmp_path, "split 2 of list file: must be 1: this layout has no numbered splits", split=2)


# ---------------------------------------------------------------- class folders


def test_class_folders(tmp_path: Path) -> None:
    touch(
        tmp_path, "run/b.MP4", "run/a.avi", "jump up/c.webm", "jump up/notes.txt", "jump up/._c.webm", "docs/readme.md"
    )
    touch(tmp_path, ".cache/x.mp4")
    catalog = open_catalog(tmp_path)
    assert (catalog.layout, catalog.classes, list(catalog.splits)) == ("class folders", ("jump up", "run"), ["train"])
    assert labels(catalog, "train") == {"jump up/c.webm": 0, "run/a.avi": 1, "run/b.MP4": 1}
    refused(tmp_path, "split 3 of class folders: must be 1: this layout has no numbered splits", split=3)


def test_class_folders_by_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/1.mp4", "train/jump/2.mp4", "val/run/3.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("jump", "run")
    assert labels(catalog, "train") == {"train/jump/2.mp4": 0, "train/run/1.mp4": 1}
    assert labels(catalog, "test") == labels(catalog, "val") == {"val/run/3.mp4": 1}
    touch(tmp_path, "test/run/4.mp4")
    assert labels(open_catalog(tmp_path), "test") == {"test/run/4.mp4": 1}
    touch(tmp_path, "test/swim/5.mp4")
    refused(tmp_path, "DATA/test/swim: class 'swim' is not in DATA/train")


def test_a_flat_folder_is_unlabelled(genuine: Path) -> None:
    catalog = open_catalog(genuine / "kinetics_sample")
    assert (catalog.layout, catalog.classes, list(catalog.splits)) == ("folder of videos", (), ["train"])
    assert labels(catalog, "train") == dict.fromkeys(
        ["R6llTwEh07w.mp4", "SOX5yA1l24A.mp4", "WUzgd7C1pWA.mp4", "mmaction2_demo.mp4"], -1
    )


def test_flat_splits_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "train/2.mp4", "test/3.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ()
    assert labels(catalog, "train") == {"train/1.mp4": -1, "train/2.mp4": -1}
    assert labels(catalog, "test") == {"test/3.mp4": -1}


def test_every_suffix_in_any_case(tmp_path: Path) -> None:
    suffixes = ["avi", "mp4", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "3gp", "wmv", "flv", "AVI", "Mp4"]
    touch(tmp_path, *(f"c/{number}.{suffix}" for number, suffix in enumerate(suffixes)), "c/x.txt", "c/x.jpg", "c/mp4")
    assert len(open_catalog(tmp_path).videos("train")) == len(suffixes)


# ---------------------------------------------------------------- no data set at all


def test_no_data_set(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder: DATA")
    file = write_lines(tmp_path, "weights.pth", "x")
    refused(file, "DATA is a file; give a video, a folder of videos or a list of them (.txt, .csv, .tsv, .lst)")
    recognised = (
        "recognised are UCF101, HMDB51, Kinetics, Something-Something, Diving48, list files (splits/train.txt), "
        "class folders, or a folder of videos"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, f"no videos found in DATA; {recognised}")
    touch(empty, "a/1.mp4", "2.mp4")
    refused(
        empty,
        "DATA holds videos both in class folders and next to them, such as 2.mp4: move the videos that do not belong "
        "to a class or a split out of it",
    )


def test_a_split_that_does_not_exist(genuine: Path) -> None:
    catalog = open_catalog(genuine / "weizmann")
    with pytest.raises(UserError, match=r"has no val split; it has: train, test$"):
        catalog.videos("val")


# ---------------------------------------------------------------- a packed store's


def through_a_store(catalogs: dict[int, Catalog], folder: Path) -> dict[int, Catalog]:
    """Return the catalog that `open_catalog` reads from a store with this index."""
    folder.mkdir()
    lists = catalog_arrays(catalogs)
    videos = len(string_array.unpack_strings(lists["paths"]))
    nothing = np.zeros(videos, np.int64)
    index = {
        "version": np.array(store_files.VERSION),
        "compact": np.array(True),
        "short_side": np.array(128),
        "source": string_array.pack_strings(["videos"]),
        **lists,
        "reasons": string_array.pack_strings(["not packed"] * videos),
        "stamps": np.zeros((videos, 2), np.int64),
        **dict.fromkeys(("frames", "heights", "widths", "sizes", "offsets"), nothing),
        "shards": nothing - 1,
        "crc32": nothing.astype(np.uint32),
        **dict.fromkeys(("bt709", "full_range", "oblique", "interlaced"), nothing.astype(bool)),
        "displays": np.array([AS_CODED] * videos, np.int64),
    }
    store_files.save_arrays(folder / store_files.INDEX, index)
    return {number: open_catalog(folder, number) for number in catalogs}


def test_a_store_gives_the_lists_of_every_split_as_they_were(ucf101: Path, tmp_path: Path) -> None:
    write_lines(ucf101, "ucfTrainTestlist/trainlist03.txt", "A/v_A_g01_c01.avi 2", "B/v_B_g01_c02.avi 1")
    write_lines(ucf101, "ucfTrainTestlist/testlist03.txt", "A/v_A_g08_c02.avi")
    assert official_splits(ucf101) == [1, 3]
    catalogs = {number: open_catalog(ucf101, number) for number in (1, 3)}
    assert missing(catalogs[3]) == ("UCF-101/B/v_B_g01_c02.avi",)
    for number, catalog in through_a_store(catalogs, tmp_path / "store").items():
        assert (catalog.root, catalog.layout) == (tmp_path / "store", "UCF101 (packed)")
        assert list(catalog.splits.items()) == list(catalogs[number].splits.items())
        assert (catalog.classes, missing(catalog)) == (("B", "A"), missing(catalogs[number]))
    assert official_splits(tmp_path / "store") == [1, 3]
    refused(tmp_path / "store", "split 2 of UCF101: the store in DATA holds 1 and 3", split=2)


def test_a_store_keeps_validation_as_test_unlabelled_videos_and_odd_names(tmp_path: Path) -> None:
    odd = os.fsdecode(b"not utf-8 \xff.mp4")
    touch(tmp_path, "tree/train/ß #&(!)/1.mp4", f"tree/val/ß #&(!)/{odd}", "loose/a.mp4", "loose/b.mp4")
    for name in ("tree", "loose"):
        assert official_splits(tmp_path / name) == [1]
        catalog = open_catalog(tmp_path / name)
        again = through_a_store({1: catalog}, tmp_path / f"{name}-store")[1]
        assert list(again.splits.items()) == list(catalog.splits.items())
        assert again.classes == catalog.classes
    assert list(open_catalog(tmp_path / "tree-store").splits) == ["train", "val", "test"]


def test_official_splits_are_those_that_have_lists(genuine: Path, tmp_path: Path) -> None:
    assert official_splits(genuine / "ucf101_sample") == [1, 2, 3]
    assert official_splits(genuine / "hmdb51_sample") == [1]
    write_lines(tmp_path, "testTrainMulti_7030_splits/wave_test_split2.txt")
    assert official_splits(tmp_path) == [2]
    assert official_splits(genuine / "weizmann" / "splits" / "train.txt") == [1]


# ---------------------------------------------------------------- lists from anywhere

LEAVES = "must be relative to the data folder and stay inside it (or trust the list: --allow-outside)"
NO_NAME = "its lists hold characters that no file name can have (null, or half of a surrogate pair)"
NUMBER = "must be a whole number from 0 to 99,999"
DIVES = {
    "Diving48_V2_train.json": '[{"vid_name": "1", "label": 0}]',
    "Diving48_V2_test.json": '[{"vid_name": "1", "label": 0}]',
}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train.txt": "1.mp4 0\n../out.mp4 0\n"}, f"DATA/train.txt:2: ../out.mp4 {LEAVES}"),
        ({"train.txt": "1.mp4 0\nC:\\..\\out.mp4 0\n"}, None),  # an ordinary name on this system
        ({"train.txt": f"1.mp4 0\n{'a' * 300}.mp4 0\n{'b/' * 2500}1.mp4 0\n"}, None),  # too long for the disk: missing
        ({"train.txt": "1.mp4 0\n1.mp4\0 0\n"}, f"DATA: {NO_NAME}"),
        ({"train.txt": "1.mp4 0 a\0b\n"}, f"DATA: {NO_NAME}"),
        ({"train.txt": "1.mp4 0\n", "classes.txt": "a\0b\n"}, f"DATA: {NO_NAME}"),
        ({"train.txt": "1.mp4 100000\n"}, f"DATA/train.txt:1: label '100000' {NUMBER}"),
        ({"train.txt": f"1.mp4 {'9' * 5000}\n"}, f"DATA/train.txt:1: label '{'9' * 40}...' {NUMBER}"),
        (
            {"train.txt": "x" * 10_001},
            "DATA/train.txt:1: a line of 10,001 characters, in what should be a list of videos or classes",
        ),
        ({"splits/train.txt/x": ""}, "DATA/splits/train.txt cannot be read: Is a directory"),
        ({"a.csv/x": ""}, "DATA/a.csv cannot be read: Is a directory"),
        ({"a.csv": "x" * 200_000}, None),
        ({"a.csv": f"{HEADER}\nzumba,y,inf,10,train,0\n"}, "DATA/a.csv:2: time_start and time_end must be seconds"),
        ({"a.csv": f"{HEADER}\nzumba,../../../etc/passwd,0,10,train,0\nzumba,1,0,10,train,0\n"}, None),
        (
            {"a.csv": f"{HEADER}\n{'z' * 200_000},y,0,10,train,0\n"},
            "DATA/a.csv is not a table of comma-separated values: field larger than field limit (131072)",
        ),
        ({"a.csv": f"{HEADER}\nzum\0ba,1,0,10,train,0\n"}, f"DATA: {NO_NAME}"),
        (
            {**DIVES, "Diving48_V2_train.json": "[" * 100_000},
            "DATA/Diving48_V2_train.json is not JSON: maximum recursion depth exceeded while decoding a JSON array "
            "from a unicode string",
        ),
        ({**DIVES, "Diving48_V2_train.json": '[{"vid_name": "../../1", "label": 0}]'}, None),
        ({**DIVES, "Diving48_V2_train.json": '[{"vid_name": "\\ud800", "label": 0}]'}, f"DATA: {NO_NAME}"),
        (
            {**DIVES, "Diving48_V2_train.json": '[{"vid_name": "1", "label": 1000000000}]'},
            "DATA/Diving48_V2_train.json: entry 0 must have a vid_name and a label of 0 or more, below 100,000",
        ),
        ({**DIVES, "Diving48_vocab.json": '[["a", 3, {}]]'}, None),
        ({**DIVES, "Diving48_vocab.json/x": ""}, "DATA/Diving48_vocab.json cannot be read: Is a directory"),
        (
            {"ucfTrainTestlist/classInd.txt": "99999999999 A"},
            f"{LISTS}/classInd.txt:1: expected `number Class`, got '99999999999 A'",
        ),
    ],
)
def test_a_list_that_was_made_to_harm_is_refused_or_names_what_is_not_there(
    tmp_path: Path, lists: dict[str, str], message: str | None
) -> None:
    touch(tmp_path, "1.mp4")
    for name, content in lists.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if message is not None:
        refused(tmp_path, message)
        return
    catalog = open_catalog(tmp_path)
    assert {video.path for videos in catalog.splits.values() for video in videos} == {"1.mp4"}
    assert catalog_arrays({1: catalog})["missing"].dtype == np.uint8  # missing videos can be packed


def test_official_lists_leave_the_data_folder_only_where_they_are_allowed_to(ucf101: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"outside-{tmp_path.name}"
    touch(outside, "A/v_A_g01_c01.avi")
    absolute = f"{outside}/A/v_A_g01_c01.avi"
    up = f"../../{outside.name}/A/v_A_g01_c01.avi"
    for path, plain in ((absolute, absolute), (up, f"UCF-101/{up}")):
        write_lines(ucf101, "ucfTrainTestlist/testlist01.txt", path)
        refused(ucf101, f"{LISTS}/testlist01.txt:1: {plain} {LEAVES}")
        assert labels(open_catalog(ucf101, allow_outside=True), "test") == {plain: 1}
    hmdb = tmp_path / "hmdb"
    touch(hmdb, "A/1.avi")
    write_lines(hmdb, "testTrainMulti_7030_splits/A_test_split1.txt", "1.avi 1", f"{absolute} 2")
    refused(hmdb, f"{HMDB51_LISTS}/A_test_split1.txt:2: {absolute} {LEAVES}")
    assert labels(open_catalog(hmdb, allow_outside=True), "test") == {absolute: 0}


def test_a_link_out_of_the_data_folder_is_followed(tmp_path: Path) -> None:
    """The author of a link can write to this disk. The author of a downloaded list cannot."""
    touch(tmp_path, "elsewhere/1.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    write_lines(tmp_path, "data/train.txt", "linked/1.mp4 0")
    assert labels(open_catalog(tmp_path / "data"), "train") == {"linked/1.mp4": 0}
