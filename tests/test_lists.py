"""Lists of videos: their names, columns and paths, and what is refused because it could be read in two ways."""

import json
from pathlib import Path

import pytest
from helpers import REPOSITORY, touch, write_lines

from dclr.config import DataConfig
from dclr.data.catalog import Catalog
from dclr.data.datasets import official_splits, open_catalog, open_data, several_splits
from dclr.errors import UserError

VIDEOS = [f"{name}/{number}.mp4" for name in ("jump", "run", "sit") for number in range(2)]


def labels(catalog: Catalog, split: str = "train") -> dict[str, int]:
    return {video.path: video.label for video in catalog.videos(split)}


def refusal(data: Path, split: int = 1) -> str:
    """Return the message with which the data set is refused. DATA stands for its folder."""
    with pytest.raises(UserError) as error:
        open_catalog(data, split)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(data), "DATA")


EXPECTED = {path: number // 2 for number, path in enumerate(VIDEOS)}


# ---------------------------------------------------------------- names of lists


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.csv", "test.csv"),
        ("Train.TXT", "Test.TXT"),
        ("training.lst", "testing.lst"),
        ("train_list.txt", "test_list.txt"),
        ("trainlist01.txt", "testlist01.txt"),
        ("ucf101_train_split_1_videos.txt", "ucf101_test_split_1_videos.txt"),
        ("lists/train.tsv", "lists/test.tsv"),
        ("annotations/train_annotations.txt", "annotations/test_annotations.txt"),
    ],
)
def test_lists_of_many_names_are_read_instead_of_class_folders(tmp_path: Path, train: str, test: str) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, train, *(f"{path}\t{label}" for path, label in EXPECTED.items() if "0.mp4" in path))
    write_lines(tmp_path, test, *(f"{path}\t{label}" for path, label in EXPECTED.items() if "1.mp4" in path))
    catalog = open_catalog(tmp_path)
    assert catalog.layout == "list file"
    assert labels(catalog) | labels(catalog, "test") == EXPECTED
    assert len(catalog.videos("train")) == len(catalog.videos("test")) == 3
    assert catalog.recognised[0] == f"{train}: columns: path, label; separator: tab; 3 videos"
    assert open_catalog(tmp_path / train).splits == catalog.splits


def test_a_list_may_be_named_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "splits/train.txt", *(f"{path} {label}" for path, label in EXPECTED.items()))
    monkeypatch.chdir(tmp_path / "splits")
    assert open_catalog(Path("train.txt")).splits == open_catalog(tmp_path).splits
    monkeypatch.chdir(tmp_path)
    assert open_catalog(Path("splits/train.txt")).splits == open_catalog(tmp_path).splits


@pytest.mark.parametrize("name", ["val.txt", "valid.csv", "Validation_list.txt"])
def test_validation_lists(tmp_path: Path, name: str) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.txt", "run/0.mp4 0")
    write_lines(tmp_path, name, "run/1.mp4 0")
    assert labels(open_catalog(tmp_path), "val") == {"run/1.mp4": 0}


@pytest.mark.parametrize("names", [("val.txt", "validation.txt"), ("train.txt", "train.csv"), ("a_val.txt", "val.txt")])
def test_two_lists_of_one_split_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *VIDEOS)
    for name in ("train.txt", *names):
        write_lines(tmp_path, name, "run/0.mp4 0")
    first, second = sorted(names)
    split = "train" if "train.csv" in names else "val"
    assert refusal(tmp_path) == f"DATA/{first} and DATA/{second} are both lists of the {split} split; keep one"


def test_numbered_lists_are_chosen_by_the_split(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    for number in (1, 2):
        write_lines(tmp_path, f"train_split_{number}.txt", f"run/{number - 1}.mp4 0")
    write_lines(tmp_path, "test.txt", "sit/0.mp4 0")
    assert official_splits(tmp_path) == [1, 2]
    assert labels(open_catalog(tmp_path, 1)) == {"run/0.mp4": 0}
    assert labels(open_catalog(tmp_path, 2)) == {"run/1.mp4": 0}
    assert labels(open_catalog(tmp_path, 2), "test") == {"sit/0.mp4": 0}
    assert open_catalog(tmp_path, 2).recognised[0] == "split 2 of the lists numbered 1 and 2"
    assert not any(".txt" in path for paths in open_catalog(tmp_path, 1).unused.values() for path in paths)
    assert "numbered 1 and 2" in refusal(tmp_path, 3)


def test_lists_may_be_numbered_from_0(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    for number in (0, 1):
        write_lines(tmp_path, f"train_fold{number}.txt", f"run/{number}.mp4 0")
    assert several_splits(DataConfig(data=str(tmp_path))) == [0, 1]
    assert labels(open_data(DataConfig(data=str(tmp_path), split=0))) == {"run/0.mp4": 0}
    (tmp_path / "train_fold0.txt").unlink()
    assert refusal(tmp_path, 0) == "split 0 of list file: the lists in DATA are numbered 1; use --split"


def test_a_year_or_a_size_is_no_number_of_a_split(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    for name in ("train_100.txt", "test_2024.txt"):
        write_lines(tmp_path, name, "run/0.mp4 0")
    assert official_splits(tmp_path) == [1]
    assert labels(open_catalog(tmp_path), "test") == {"run/0.mp4": 0}


def test_a_text_that_is_no_list_leaves_class_folders_alone(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "results_test.csv", "epoch,loss", "1,0.5")
    catalog = open_catalog(tmp_path)
    assert (catalog.layout, catalog.lists) == ("class folders", ())
    assert any("results_test.csv" in paths for paths in catalog.unused.values())


def test_a_table_with_a_column_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    rows = [f"{path.split('/')[0]},{path},{'Valid' if '1' in path else 'Training'}" for path in VIDEOS]
    table = write_lines(tmp_path, "videos.csv", "Class,File Name,Subset", *rows)
    for catalog in (open_catalog(tmp_path), open_catalog(table)):
        assert labels(catalog) | labels(catalog, "val") == EXPECTED
        assert catalog.classes == ("jump", "run", "sit")
    write_lines(tmp_path, "videos.csv", "class,path,split", "run,run/0.mp4,holdout")
    assert refusal(table) == "DATA:2: split must be train, val or test, got 'holdout'"
    write_lines(tmp_path, "videos.csv", "class,path,split", "run,run/0.mp4,train", "run,run/1.mp4,")
    assert refusal(table) == "DATA:3: split must be train, val or test, got ''"


@pytest.mark.parametrize(
    "header",
    [
        "path,label,split",
        "video_path,class,subset",
        "filename;label;split",
        "Video;Class Name;Split",
        ",file_name,label,split",
    ],
)
def test_headers_that_people_write(tmp_path: Path, header: str) -> None:
    touch(tmp_path, *VIDEOS)
    separator = ";" if ";" in header else ","
    first = ["0"] if header.startswith(",") else []
    rows = [[*first, path, path.split("/")[0], "train" if "0" in path else "test"] for path in VIDEOS]
    table = write_lines(tmp_path, "labels.csv", header, *map(separator.join, rows))
    for catalog in (open_catalog(tmp_path), open_catalog(table)):
        assert labels(catalog) | labels(catalog, "test") == EXPECTED
        assert catalog.classes == ("jump", "run", "sit")


def test_a_header_with_an_unknown_name_for_the_paths_is_no_video(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.csv", "video_url,label", *(f"{path},{path.split('/')[0]}" for path in VIDEOS))
    assert refusal(tmp_path) == (
        "DATA/train.csv:1: 'video_url label' looks like a header, but no column has a known name for the paths: call "
        "'video_url' `path`"
    )


def test_a_header_decides_even_if_no_video_is_on_disk(tmp_path: Path) -> None:
    """Ids do not look like videos, so the lines could also be paths with a comma in them."""
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.csv", "video_id,label", "x7a,run", "x7b,sit")
    assert refusal(tmp_path) == "no videos found in DATA; its lists name 2, such as x7a"


def test_the_converter_of_the_docs_makes_a_table_of_activitynets_json(tmp_path: Path, monkeypatch) -> None:
    section = (REPOSITORY / "docs" / "data.md").read_text().split("### ActivityNet's JSON")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 14
    segment = {"segment": [0.5, 3.0]}
    database = {
        "a": {"subset": "training", "annotations": [{"label": "Long jump", **segment}, {"label": "Long jump"}]},
        "b": {"subset": "validation", "annotations": [{"label": "Rope, skipping", **segment}]},
        "c": {"subset": "testing", "annotations": []},
        "d": {"subset": "training", "annotations": [{"label": "Long jump"}, {"label": "Rope, skipping"}]},
        "e": {"subset": "training", "annotations": [{"label": "Rope, skipping"}]},
        "gone": {"subset": "training", "annotations": [{"label": "Long jump"}]},
    }
    data = tmp_path / "ACTIVITYNET"
    touch(data, "videos/v_a.mp4", "videos/v_b.mp4", "videos/v_c.mp4", "videos/v_d.mp4", "videos/v_e.mkv")
    write_lines(data, "activity_net.v1-3.min.json", json.dumps({"version": "1.3", "database": database}))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/data.md", "exec"), {})
    catalog = open_catalog(data)
    assert catalog.classes == ("Long jump", "Rope, skipping")
    assert labels(catalog) == {"videos/v_a.mp4": 0, "videos/v_e.mkv": 1}
    assert labels(catalog, "val") == labels(catalog, "test") == {"videos/v_b.mp4": 1}
    assert [video.path for video in catalog.missing["train"]] == ["v_gone"]


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        (["{path} {label}"], "path, label; separator: space"),
        (["{path},{label}"], "path, label; separator: comma"),
        (["{path};{label}"], "path, label; separator: semicolon"),
        (['"{path}", {label}'], "path, label; separator: comma"),
        (['"{path}" {label}'], "path, label; separator: space"),
        (["path,label", "{path},{label}"], "path, label; separator: comma, with a header"),
        (["label group path", "{label} g1 {path}"], "label, group, path; separator: space, with a header"),
        (["id,label,video", "7,{label},{path}"], "(not used), label, path; separator: comma, with a header"),
        (["{path} {label} home"], "path, label, group; separator: space"),
        (["{path} 240 {label}"], "path, frames (not used), label; separator: space"),
        (["path frames label", "{path} 1 {label}"], "path, frames (not used), label; separator: space, with a header"),
    ],
)
def test_columns(tmp_path: Path, lines: list[str], columns: str) -> None:
    touch(tmp_path, *VIDEOS)
    *header, line = lines
    write_lines(
        tmp_path, "train.txt", *header, *(line.format(path=path, label=label) for path, label in EXPECTED.items())
    )
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == EXPECTED
    assert catalog.recognised == (f"train.txt: columns: {columns}; 6 videos",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["run/0.mp4 1 1", "run/1.mp4 2 0"], "can be `path label group` or `path num_frames label`"),
        (["run/0.mp4 30 7", "run/1.mp4 60 90"], "can be `path label group` or `path num_frames label`"),
        (["run/0.mp4 24", "run/1.mp4 30"], "they could be frame counts"),
        (["run/0.mp4 0", "run/1.mp4"], "train.txt:2: 1 column in 'run/1.mp4', but 2 in most lines"),
        (["run/0.mp4 0 a b"], "4 columns without a header"),
        (["run/0.mp4 0.0"], "train.txt:1: label '0.0' must be a whole number"),
        (["run/0.mp4 0", "run/1.mp4 run"], "train.txt:2: expected the label a number, as in"),
        (["run/0.mp4 0", "run/1.mp4 -1"], "1 of 2 training videos have no label, such as run/1.mp4"),
        (["run/0.mp4 0", "run/0.mp4 1"], "train.txt:2: run/0.mp4 has another label than in"),
        (["path\tclass name"], "train.txt:1: can be read as `path label` separated by tab or `path label ?` separated"),
        (["run/0.mp4 0", "a b.mp4 0"], "a path with spaces needs quotes"),
    ],
)
def test_what_can_be_read_in_two_ways_or_none_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.txt", *lines)
    assert message in refusal(tmp_path)


def test_paths_with_spaces_are_those_on_disk(tmp_path: Path) -> None:
    touch(tmp_path, "run/v 1.mp4", "run/v 1", "run/v2.mp4", "yoga, hot/v.mp4")
    write_lines(tmp_path, "train.txt", "run/v 1.mp4 0", "run/v 1 1", "run/v2.mp4 0", "yoga, hot/v.mp4 2")
    assert labels(open_catalog(tmp_path)) == {
        "run/v 1.mp4": 0,
        "run/v 1": 1,
        "run/v2.mp4": 0,
        "yoga, hot/v.mp4": 2,
    }


def test_names_of_classes_as_labels(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.txt", *(f"{path} {path.split('/')[0]}" for path in VIDEOS[:4]))
    write_lines(tmp_path, "test.txt", *(f"{path} {path.split('/')[0]}" for path in VIDEOS[4:]))
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("jump", "run", "sit")
    assert labels(catalog) | labels(catalog, "test") == EXPECTED
    write_lines(tmp_path, "classes.txt", "sit", "run", "jump")
    assert labels(open_catalog(tmp_path), "test") == {"sit/0.mp4": 0, "sit/1.mp4": 0}
    write_lines(tmp_path, "classes.txt", "run", "jump")
    assert "class 'sit' is not in DATA/classes.txt" in refusal(tmp_path)
    write_lines(tmp_path, "classes.txt", "sit", "run", "jump", "run")
    assert refusal(tmp_path) == "DATA/classes.txt: class 'run' is named twice: name it once"
    write_lines(tmp_path, "train.txt", *(f"{path} {number % 4}" for number, path in enumerate(VIDEOS[:4])))
    write_lines(tmp_path, "test.txt", *(f"{path} 0" for path in VIDEOS[4:]))
    assert refusal(tmp_path) == "DATA/classes.txt: class 'run' is named twice: name it once"


def test_the_val_split_is_the_test_split_with_a_warning_if_no_listed_test_video_is_on_disk(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    write_lines(tmp_path, "train.txt", "a.mp4 0")
    write_lines(tmp_path, "val.txt", "b.mp4 0", "lost.mp4 0")
    write_lines(tmp_path, "test.txt", "c.mp4 0", "d.mp4 0")
    catalog = open_catalog(tmp_path)
    assert catalog.videos("test") == catalog.videos("val")
    assert [video.path for video in catalog.missing["test"]] == ["c.mp4", "d.mp4", "lost.mp4"]
    (warning,) = catalog.warnings
    assert warning == (
        "none of the 2 listed test videos is on disk, such as c.mp4: the val split is used as the test split"
    )
    touch(tmp_path, "c.mp4")
    catalog = open_catalog(tmp_path)
    assert [video.path for video in catalog.videos("test")] == ["c.mp4"]
    assert not catalog.warnings


def test_a_last_field_may_be_empty_in_a_table_with_tabs(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.tsv", "path\tlabel\tgroup", "run/0.mp4\trun\tpark", "sit/0.mp4\tsit\t")
    write_lines(tmp_path, "test.tsv", "path\tlabel", "run/1.mp4\t", "sit/1.mp4\tsit")
    catalog = open_catalog(tmp_path)
    assert [(video.path, video.label, video.group) for video in catalog.videos("train")] == [
        ("run/0.mp4", 0, "park"),
        ("sit/0.mp4", 1, ""),
    ]
    assert labels(catalog, "test") == {"run/1.mp4": -1, "sit/1.mp4": 1}


@pytest.mark.parametrize("line", ["{path}", "{path} -1", "{path},"])
def test_a_test_list_without_labels_does_not_stop_the_others(tmp_path: Path, line: str) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.txt", *(f"{path} {label}" for path, label in EXPECTED.items() if "0.mp4" in path))
    write_lines(tmp_path, "test.txt", *(line.format(path=path) for path in VIDEOS if "1.mp4" in path))
    catalog = open_catalog(tmp_path)
    assert len(catalog.classes) == 3
    assert set(labels(catalog, "test").values()) == {-1}
    assert "3 of 3 videos of the test split have no label" in catalog.warnings


def test_labels_from_one_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, *VIDEOS)
    write_lines(tmp_path, "train.txt", *(f"{path} {label + 1}" for path, label in EXPECTED.items()))
    assert "no label is 0: labels should be numbers from 0, and the smallest is 1" in open_catalog(tmp_path).warnings


def test_a_number_sign_is_a_comment_unless_a_file_has_this_name(tmp_path: Path) -> None:
    touch(tmp_path, "#1.mp4", "2.mp4", "3.mp4")
    write_lines(tmp_path, "train.txt", "# my own list", "#1.mp4 0", "2.mp4 1", "#3.mp4 1")
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == {"#1.mp4": 0, "2.mp4": 1}
    assert catalog.recognised[0].endswith("2 videos, 2 comment lines skipped")


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\r\n"), ("utf-16", "\r\n"), ("utf-8", "\r")])
def test_encodings_and_ends_of_lines(tmp_path: Path, encoding: str, newline: str) -> None:
    touch(tmp_path, "é/1.mp4", "é/2.mp4")
    content = newline.join(["é/1.mp4\t0", "", "é/2.mp4\t1", ""])
    (tmp_path / "train.txt").write_bytes(content.encode(encoding))
    assert labels(open_catalog(tmp_path)) == {"é/1.mp4": 0, "é/2.mp4": 1}


# ---------------------------------------------------------------- paths on disk


@pytest.mark.parametrize(
    ("listed", "on_disk", "difference"),
    [
        ("run\\a\\1.mp4", "run/a/1.mp4", "with backslashes"),
        ("Run/a/1.MP4", "run/a/1.mp4", "in other letter case"),
        ("e\u0301/1.mp4", "\u00e9/1.mp4", "with other accents"),
        ("run/1.avi", "run/1.mp4", "with another suffix"),
        ("run/1", "run/1.mp4", "with another suffix or without one"),
    ],
)
def test_names_that_differ_a_little_are_found_and_reported(
    tmp_path: Path, listed: str, on_disk: str, difference: str
) -> None:
    touch(tmp_path, on_disk, "other.mp4")
    write_lines(tmp_path, "train.txt", f"{listed} 0", "other.mp4 1")
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == {on_disk: 0, "other.mp4": 1}
    (warning,) = catalog.warnings
    assert difference in warning
    assert on_disk in warning


def test_one_file_is_never_taken_for_two_listed_videos(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "A/2.mp4", "a/2.mp4", "3.mp4", "3.mkv")
    write_lines(tmp_path, "train.txt", "1.mp4 0", "1.avi 1", "1.mov 2", "Ä/2.mp4 0", "3.avi 0")
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == {"1.mp4": 0}
    assert len(catalog.missing["train"]) == 4


def test_backslashes_do_not_leave_the_data_folder(tmp_path: Path) -> None:
    touch(tmp_path, "out.mp4", "data/1.mp4")
    write_lines(tmp_path, "data/train.txt", "1.mp4 0", "..\\out.mp4 0")
    catalog = open_catalog(tmp_path / "data")
    assert labels(catalog) == {"1.mp4": 0}
    assert "write paths with slashes" in catalog.warnings[0]


@pytest.mark.parametrize(
    ("folder", "name", "listed"),
    [
        ("HandStandPushups", "v_HandStandPushups_g01_c01", "HandstandPushups/v_HandStandPushups_g01_c01.avi"),
        ("HandstandPushups", "v_HandStandPushups_g01_c01", "HandstandPushups/v_HandstandPushups_g01_c01.avi"),
        ("HandstandPushups", "v_HandstandPushups_g01_c01", "HandStandPushups/v_HandStandPushups_g01_c01.avi"),
        ("HandstandPushups", "v_HandstandPushups_g01_c01", "HandstandPushups\\v_HandstandPushups_g01_c01.avi"),
    ],
)
def test_ucf101_in_other_letter_case_or_with_backslashes(tmp_path: Path, folder: str, name: str, listed: str) -> None:
    touch(tmp_path, f"UCF-101/{folder}/{name}.avi", "UCF-101/YoYo/v_YoYo_g01_c01.avi")
    write_lines(tmp_path, "ucfTrainTestlist/classInd.txt", "1 HandstandPushups", "2 YoYo")
    write_lines(tmp_path, "ucfTrainTestlist/trainlist01.txt", f"{listed} 1")
    write_lines(tmp_path, "ucfTrainTestlist/testlist01.txt", "YoYo/v_YoYo_g01_c01.avi")
    catalog = open_catalog(tmp_path)
    (video,) = catalog.videos("train")
    assert (video.path, video.label, video.group) == (f"UCF-101/{folder}/{name}.avi", 0, "HandstandPushups_g01")
    assert catalog.warnings
    assert not catalog.missing


def test_hmdb51_in_other_letter_case_and_without_a_class_folder(tmp_path: Path) -> None:
    touch(tmp_path, "videos/Wave/1.avi", "videos/run/1.avi")
    for name in ("wave", "run", "sit"):
        write_lines(tmp_path, f"testTrainMulti_7030_splits/{name}_test_split1.txt", "1.avi 1 ")
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == {"videos/run/1.avi": 0, "videos/Wave/1.avi": 2}
    assert [video.path for video in catalog.missing["train"]] == ["videos/sit/1.avi"]


def test_hidden_files_next_to_hmdb51s_lists_are_no_lists(tmp_path: Path) -> None:
    touch(tmp_path, "run/1.avi", "run/._1.avi")
    write_lines(tmp_path, "testTrainMulti_7030_splits/run_test_split1.txt", "1.avi 1 ")
    for number in (1, 2):
        (tmp_path / f"testTrainMulti_7030_splits/._run_test_split{number}.txt").write_bytes(b"\0\5\x16\7 Mac OS X")
    catalog = open_catalog(tmp_path)
    assert (catalog.classes, labels(catalog)) == (("run",), {"run/1.avi": 0})
    assert official_splits(tmp_path) == [1]


# ---------------------------------------------------------------- Kinetics and Diving48

HEADER = "label,youtube_id,time_start,time_end,split"


def test_segments_of_one_source_are_videos_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "abc_000000_000010.mp4", "abc_000050_000060.mp4")
    write_lines(tmp_path, "train.csv", HEADER, "run,abc,0,10,train", "jump,abc,50,60,train")
    assert labels(open_catalog(tmp_path)) == {"abc_000000_000010.mp4": 1, "abc_000050_000060.mp4": 0}


@pytest.mark.parametrize("second", ["jump,abc,50,60,train", "run,abc,50,60,test"])
def test_a_file_that_stands_for_two_segments_is_refused(tmp_path: Path, second: str) -> None:
    touch(tmp_path, "v/abc.mp4")
    write_lines(tmp_path, "train.csv", HEADER, "run,abc,0,10,train", second)
    message = refusal(tmp_path)
    assert message.startswith("DATA/train.csv:3: v/abc.mp4 stands for two segments, abc_000000_000010 (run, train) and")


def test_equal_segments_of_one_file_are_one_video(tmp_path: Path) -> None:
    touch(tmp_path, "abc.mp4")
    write_lines(tmp_path, "train.csv", HEADER, "run,abc,0,10,train", "run,abc,50,60,train")
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == {"abc.mp4": 0}
    assert "1 segments share the file" in catalog.warnings[0]


def test_files_of_one_name_are_told_apart_by_their_class_folder(tmp_path: Path) -> None:
    touch(tmp_path, "run/abc.mp4", "jump_up/abc.mp4", "a/xyz.mp4", "b/xyz.mp4")
    write_lines(tmp_path, "train.csv", HEADER, "run,abc,0,10,train", "jump up,abc,50,60,train", "run,xyz,0,10,train")
    catalog = open_catalog(tmp_path)
    assert labels(catalog) == {"run/abc.mp4": 1, "jump_up/abc.mp4": 0, "a/xyz.mp4": 1}
    assert catalog.warnings == (
        "1 video has several files of the same name, such as a/xyz.mp4 and b/xyz.mp4: the first is read",
    )


def test_kinetics_lists_without_splits_times_or_labels(tmp_path: Path) -> None:
    touch(tmp_path, "-a.mp4", "b.mp4", "c.mp4")
    write_lines(tmp_path, "k700_train.csv", "label,youtube_id", "run,-a")
    write_lines(tmp_path, "validate.csv", "Label,YouTube_ID", "run,b")
    write_lines(tmp_path, "test.csv", "youtube_id", "c")
    catalog = open_catalog(tmp_path)
    assert (labels(catalog), labels(catalog, "val")) == ({"-a.mp4": 0}, {"b.mp4": 0})
    assert labels(catalog, "test") == {"b.mp4": 0}
    assert catalog.recognised == ("1 test videos have no label and are not used; the test split is the val split",)
    (tmp_path / "validate.csv").unlink()
    assert labels(open_catalog(tmp_path), "test") == {"c.mp4": -1}
    (tmp_path / "k700_train.csv").rename(tmp_path / "some.csv")
    assert refusal(tmp_path).startswith("DATA/some.csv:2: no column `split`")


def test_a_dive_with_two_labels_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a_1.mp4")
    write_lines(tmp_path, "Diving48_V2_train.json", json.dumps([{"vid_name": "a_1", "label": 0}]))
    write_lines(tmp_path, "Diving48_V2_test.json", json.dumps([{"vid_name": "a_1", "label": 1}]))
    assert refusal(tmp_path) == "DATA/Diving48_V2_test.json: entry 0: a_1 has label 1, but label 0 earlier"
