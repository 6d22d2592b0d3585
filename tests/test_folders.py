"""Every file and folder of a data set is used or counted by a reason, in check, at the start and in report.json."""

import errno
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dclr.config import DataConfig
from dclr.data import store_files
from dclr.data import tree as tree_module
from dclr.data.catalog import (
    Catalog,
    Video,
    catalog_arrays,
    describe_reading,
    describe_warnings,
    make_catalog,
    reading_entry,
)
from dclr.data.check import check, describe_catalog
from dclr.data.coverage import coverage
from dclr.data.datasets import open_catalog
from dclr.data.display import AS_CODED
from dclr.data.pack import pack
from dclr.data.string_array import pack_strings
from dclr.data.tree import BROKEN, EMPTY, HIDDEN, LISTS, PICTURES, TWICE, Tree, open_unknown, read_tree
from dclr.data.videos import open_videos
from dclr.errors import UserError
from dclr.evaluation.benchmark import Benchmark


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def labels(catalog: Catalog, split: str) -> dict[str, int]:
    return {video.path: video.label for video in catalog.videos(split)}


# ---------------------------------------------------------------- what a catalog says


def read_oddly(root: Path) -> Catalog:
    """Return a catalog with each kind of line about how it was read."""
    touch(root, "a/1.mp4")
    return make_catalog(
        root,
        "class folders",
        ("a",),
        {"train": [Video(path="a/1.mp4", label=0)]},
        recognised=["the first folder is the class"],
        unused={"no video": [f"{number}.txt" for number in range(7)], "hidden": [".x\n.mp4"]},
        warnings=["class b\x1b[2J has no training videos"],
    )


def test_lines_and_report_name_the_first_files_of_each_reason(tmp_path: Path) -> None:
    catalog = read_oddly(tmp_path)
    assert describe_reading(catalog) == [
        "recognised: the first folder is the class",
        "not used, no video: 7 (0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more)",
        "not used, hidden: 1 (.x\\n.mp4)",
    ]
    assert describe_warnings(catalog) == ["warning: class b\\x1b[2J has no training videos"]
    assert reading_entry(catalog) == {
        "recognised": ["the first folder is the class"],
        "unused": {
            "no video": {"count": 7, "first": ["0.txt", "1.txt", "2.txt", "3.txt", "4.txt"]},
            "hidden": {"count": 1, "first": [".x\n.mp4"]},
        },
        "warnings": ["class b\x1b[2J has no training videos"],
    }


def test_a_class_name_cannot_break_the_table_of_check(tmp_path: Path) -> None:
    catalog = replace(read_oddly(tmp_path), classes=("new\nline",))
    assert all("\n" not in line for line in describe_catalog(catalog))
    assert any("new\\nline" in line for line in describe_catalog(catalog))


def pack_lists(catalog: Catalog, folder: Path, **changed: np.ndarray) -> Path:
    """Write the index of a packed store with this catalog and no readable video."""
    folder.mkdir()
    nothing = np.zeros(1, np.int64)
    index = {
        "version": np.array(store_files.VERSION),
        "compact": np.array(True),
        "short_side": np.array(128),
        "source": pack_strings(["videos"]),
        **catalog_arrays({1: catalog}),
        "reasons": pack_strings(["not packed"]),
        "stamps": np.zeros((1, 2), np.int64),
        "displays": np.array([AS_CODED], np.int64),
        **dict.fromkeys(("frames", "heights", "widths", "sizes", "offsets"), nothing),
        "shards": nothing - 1,
        "crc32": nothing.astype(np.uint32),
        **dict.fromkeys(("bt709", "full_range", "oblique", "interlaced"), nothing.astype(bool)),
        **changed,
    }
    store_files.save_arrays(folder / store_files.INDEX, index)
    return folder


def test_a_store_says_how_its_videos_were_read(tmp_path: Path) -> None:
    catalog = read_oddly(tmp_path / "data")
    packed = open_catalog(pack_lists(catalog, tmp_path / "store"))
    assert describe_reading(packed) == describe_reading(catalog)
    assert describe_warnings(packed) == describe_warnings(catalog)


@pytest.mark.parametrize("name", store_files.READING)
def test_a_damaged_array_of_the_reading_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = pack_lists(read_oddly(tmp_path / "data"), tmp_path / "store", **{name: np.ones(5, np.uint32)})
    with pytest.raises(UserError, match=f"{store_files.INDEX} cannot be used: {name} must be"):
        open_catalog(folder)


# ---------------------------------------------------------------- the walk


def test_every_file_and_folder_is_a_video_or_has_a_reason(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "a/2.MTS", "a/notes.srt", "a/.hidden", ".git/x.mp4", "a/thumb.jpg", "train_list.txt")
    touch(tmp_path, *(f"frames/v1/img_{number:05d}.jpg" for number in range(10)), "b/3", "a/4.ts")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a/gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "a/self.mp4").symlink_to("self.mp4")
    os.mkfifo(tmp_path / "a/pipe.mp4")
    tree = read_tree(tmp_path)
    assert tree.videos == ("a/1.mp4", "a/2.MTS")
    assert tree.unknown == ("a/4.ts", "b/3")
    assert tree.unused == {
        "no video: suffix .srt": ("a/notes.srt",),
        "no video: suffix .jpg": ("a/thumb.jpg",),
        HIDDEN: (".git/", "a/.hidden"),
        PICTURES: ("frames/v1/",),
        LISTS: ("train_list.txt",),
        BROKEN: ("a/gone.mp4", "a/self.mp4"),
        EMPTY: ("empty/",),
        "neither files nor folders": ("a/pipe.mp4",),
    }


def test_links_in_circles_end_and_a_folder_is_read_once(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "z/1.mp4", "z/deep/2.mp4")
    for name in ("loop1", "loop2", "z/loop3"):
        (data / name).symlink_to(data)
    (data / "above").symlink_to(tmp_path)
    (data / "a").symlink_to(data / "z")  # sorted before z, but z is no link and keeps its name
    touch(tmp_path / "elsewhere", "3.mp4")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    tree = read_tree(data)
    assert tree.videos == ("linked/3.mp4", "z/1.mp4", "z/deep/2.mp4")
    assert tree.unused == {TWICE: ("a/", "above/", "loop1/", "loop2/", "z/loop3/")}


def test_a_folder_without_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.mp4", "b/2.mp4", "secret/3.mp4")
    scan = os.scandir

    def refusing(folder: Path) -> Any:
        if folder.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("a", "b")
    assert catalog.unused == {"cannot be read: Permission denied": ("secret/",)}
    assert catalog.warnings == ("secret/ cannot be read: Permission denied",)
    with pytest.raises(UserError, match=r"secret cannot be read: Permission denied$"):
        open_catalog(tmp_path / "secret")


def test_a_data_folder_below_a_folder_without_permission_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refusing)
    with pytest.raises(UserError, match=r"data cannot be read: Permission denied$"):
        open_catalog(tmp_path / "data")


def make_video(file: Path, video_format: str, codec: str = "mpeg4", pixels: str = "yuv420p", frames: int = 3) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w", format=video_format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for number in range(frames):
            picture = np.full((32, 32, 3), 5 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_file_with_an_unknown_suffix_is_a_video_if_it_can_be_decoded(tmp_path: Path) -> None:
    make_video(tmp_path / "a/no suffix", "avi")
    make_video(tmp_path / "a/1.TS", "mpegts", "mpeg2video", frames=30)
    make_video(tmp_path / "b/moving.gif", "gif", "gif", "rgb8")
    make_video(tmp_path / "b/still.gif", "gif", "gif", "rgb8", frames=1)
    (tmp_path / "b/app.ts").write_text("export const answer: number = 42;\n" * 50)
    (tmp_path / "b/LICENSE").write_text("Permission is granted.\n" * 50)
    catalog = open_catalog(tmp_path)
    assert labels(catalog, "train") == {"a/1.TS": 0, "a/no suffix": 0, "b/moving.gif": 1}
    assert catalog.recognised == ("files that are videos by their content (.gif: 1, .ts: 1, no suffix: 1)",)
    assert catalog.unused == {
        "no video: suffix .gif": ("b/still.gif",),
        "no video: suffix .ts": ("b/app.ts",),
        "no video: without a suffix": ("b/LICENSE",),
    }


def test_of_many_files_with_an_unknown_suffix_a_sample_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def answers(_: Any, paths: Iterable[str], *__: Any) -> list[tuple[str, bool]]:
        opened.extend(paths)
        return [(path, path.endswith(".xyz")) for path in paths]

    monkeypatch.setattr(tree_module, "answers", answers)
    paths = [f"a/{number:04d}.{suffix}" for number in range(600) for suffix in ("xyz", "other")]
    tree = open_unknown(Tree(root=tmp_path, videos=(), unknown=tuple(sorted(paths))))
    assert len(opened) == 100
    assert (len(tree.videos), len(tree.unused["no video: suffix .other"])) == (600, 600)
    assert tree.warnings == (
        "600 files suffix .other: only 50 were opened, of which 0 are videos; all are taken for other files",
        "600 files suffix .xyz: only 50 were opened, of which 50 are videos; all are taken for videos",
    )


# ---------------------------------------------------------------- split folders


def counts(catalog: Catalog) -> dict[str, int]:
    return {split: len(videos) for split, videos in catalog.splits.items()}


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train", "valid", "val"),
        ("Train", "Validation", "val"),
        ("training", "testing", "test"),
        ("TRAIN", "TEST", "test"),
        ("train", "eval", "val"),
        ("train", "dev", "val"),
    ],
)
def test_split_folders_have_many_names(tmp_path: Path, train: str, other: str, split: str) -> None:
    touch(tmp_path, f"{train}/a/1.mp4", f"{train}/b/2.mp4", f"{other}/a/3.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("a", "b")
    assert labels(catalog, "train") == {f"{train}/a/1.mp4": 0, f"{train}/b/2.mp4": 1}
    assert labels(catalog, split) == {f"{other}/a/3.mp4": 0}
    assert f"{other}/ is the {split} split" in catalog.recognised or other == split
    flat = touch(tmp_path / "flat", f"{train}/1.mp4", f"{train}/2.mp4", f"{other}/3.mp4")
    assert (open_catalog(flat).layout, labels(open_catalog(flat), split)) == (
        "folder of videos",
        {f"{other}/3.mp4": -1},
    )


def test_a_stray_video_does_not_change_the_layout(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/a/2.mp4", "train/b/3.mp4", "test/a/4.mp4", "test/a/5.mp4")
    for stray in ("train/intro.mp4", "test/intro.mp4", "intro.mp4", "extras/6.mp4"):
        touch(tmp_path, stray)
        catalog = open_catalog(tmp_path)
        assert (catalog.layout, counts(catalog)) == ("class folders", {"train": 3, "test": 2})
        assert any(stray in paths for paths in catalog.unused.values())
    assert catalog.warnings == (
        "2 videos are next to the split folders and not used, such as intro.mp4",
        "2 videos are next to the class folders and not used, such as train/intro.mp4",
    )


def test_a_stray_video_next_to_class_folders_is_not_used(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "b/2.mp4", "intro.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.unused == {"next to the class folders": ("intro.mp4",)}
    assert labels(catalog, "train") == {"a/1.mp4": 0, "b/2.mp4": 1}


def test_a_flat_test_folder_is_unlabelled(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "test/3.mp4")
    catalog = open_catalog(tmp_path)
    assert labels(catalog, "test") == {"test/3.mp4": -1}
    assert catalog.recognised == ("test/ has no class folders, so the videos of the test split have no labels",)
    assert coverage(catalog, "test", {}).sentence() == ""  # no class without test videos


def test_folders_named_like_splits_are_classes_next_to_other_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "test/2.mp4", "walk/3.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("test", "train", "walk")
    assert catalog.warnings[0] == "test/ is read as a class and not as a split, because walk/ is next to it"


def test_two_classes_of_almost_the_same_name_are_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, "Run/1.mp4", "run/2.mp4", "jump/3.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("Run", "jump", "run")
    assert catalog.warnings == ("classes 'Run' and 'run' are two classes with almost the same name",)


def test_a_split_folder_without_videos_is_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "val/a/readme.txt")
    assert open_catalog(tmp_path).warnings == ("val/ holds no videos",)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/1.mp4", "val/a/2.mp4", "valid/a/3.mp4"], "holds both val/ and valid/, and both mean val: keep one"),
        (["train/a/1.mp4", "Train/a/2.mp4"], "holds both Train/ and train/, and both mean train: keep one"),
        (["train/1.mp4", "train/2.mp4", "test/a/3.mp4"], "train holds videos without class folders, but DATA/test has"),
        (["train/a/1.mp4", "train/2.mp4", "train/3.mp4"], "DATA/train holds videos both in class folders and next to"),
        (["train/a/1.mp4", "walk/2.mp4", "run/3.mp4"], "DATA holds videos both in class folders and next to them"),
        (["a/1.mp4", "2.mp4", "3.mp4"], "DATA holds videos both in class folders and next to them, such as 2.mp4"),
        (["train/Run/1.mp4", "test/run/2.mp4"], "DATA/test/run: class 'run' is not in DATA/train, which has 'Run'"),
        (["train/caf\u00e9/1.mp4", "test/cafe\u0301/2.mp4"], "is not in DATA/train, which has 'caf\u00e9'"),
        (["train/a/1.mp4", "test/b/2.mp4"], "DATA/test/b: class 'b' is not in DATA/train"),
        (
            ["set/a/1.mp4", "set/b/2.mp4"],
            "the folders a and b in it, which may be the classes: did you mean --data DATA",
        ),
        (["set/train/a/1.mp4", "set/test/a/2.mp4"], "did you mean --data DATA/set?"),
        (["train/set/a/1.mp4", "train/set/b/2.mp4"], "may be the classes: move them to DATA/train"),
        (
            ["a/train/1.mp4", "a/test/2.mp4", "b/train/3.mp4"],
            "DATA/a holds split folders, such as test: the split must",
        ),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    touch(tmp_path, *paths)
    with pytest.raises(UserError) as refusal:
        open_catalog(tmp_path)
    assert message in str(refusal.value).replace(str(tmp_path), "DATA")


def test_folders_below_the_class_folders_are_groups(tmp_path: Path) -> None:
    touch(tmp_path, "run/p1/1.mp4", "run/p2/2.mp4", "jump/p1/day/3.mp4", "jump/4.mp4")
    catalog = open_catalog(tmp_path)
    assert catalog.classes == ("jump", "run")
    assert {video.path: video.group for video in catalog.videos("train")} == {
        "jump/4.mp4": "",
        "jump/p1/day/3.mp4": "p1/day",
        "run/p1/1.mp4": "p1",
        "run/p2/2.mp4": "p2",
    }
    assert catalog.recognised == (
        "videos up to 2 folders below their class folder: the class is the first folder, the rest the group",
    )


# ---------------------------------------------------------------- no videos at all


@pytest.mark.parametrize(
    ("paths", "seen"),
    [
        ([], "no videos found in DATA; recognised are UCF101"),
        (["a/1.srt", "a/2.txt"], "DATA: 2 files that are not videos (.srt: 1, .txt: 1); recognised"),
        (["a/v/1.jpg"], "1 file that is not a video (.jpg: 1); pictures are not read as frames of videos"),
        ([f"a/v/{number}.jpg" for number in range(20)], f"{PICTURES}: 1, such as a/v/"),
        (["train.json"], "train.json may be a list: the videos that it names must lie in this folder"),
    ],
)
def test_no_videos_found_says_what_was_seen(tmp_path: Path, paths: list[str], seen: str) -> None:
    touch(tmp_path, *paths)
    with pytest.raises(UserError) as refusal:
        open_catalog(tmp_path)
    assert seen in str(refusal.value).replace(str(tmp_path), "DATA")


# ---------------------------------------------------------------- what lists do not name


def test_everything_that_the_lists_do_not_name_has_a_reason(tmp_path: Path) -> None:
    touch(tmp_path, "videos/1.mp4", "videos/2.mp4", "videos/notes.srt", "videos/3.gif")
    (tmp_path / "train.txt").write_text("videos/1.mp4 0\n")
    catalog = open_catalog(tmp_path)
    assert catalog.unused == {
        "on disk, but in no list that was read": ("videos/2.mp4", "videos/3.gif"),
        "no video: suffix .srt": ("videos/notes.srt",),
    }
    assert catalog.lists == ("train.txt",)


def test_a_listed_video_that_is_reached_by_a_link_is_used(tmp_path: Path) -> None:
    touch(tmp_path, "videos/1.mp4", "videos/2.mp4")
    (tmp_path / "link").symlink_to("videos")
    (tmp_path / "train.txt").write_text("link/1.mp4 0\nvideos/../videos/2.mp4 0\n")
    assert open_catalog(tmp_path, allow_outside=True).unused == {TWICE: ("link/",)}


def test_a_list_given_as_a_file_does_not_read_other_folders(tmp_path: Path) -> None:
    touch(tmp_path, "videos/1.mp4", "another set/2.mp4")
    (tmp_path / "mine.txt").write_text("videos/1.mp4 0\n")
    assert open_catalog(tmp_path / "mine.txt").unused == {"folders that no list names": ("another set/",)}


# ---------------------------------------------------------------- the commands


def test_check_pack_and_report_say_what_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for frames, name in enumerate(["train/a/1.avi", "train/b/2.avi", "intro.avi"], start=5):
        make_video(data / name, "avi", frames=frames)
    touch(data, "train/a/notes.srt")
    stray = "1 video is next to the split folders and not used, such as intro.avi"
    for command in (check, pack):
        command(DataConfig(data=str(data), workers=1))
        shown = capsys.readouterr().out
        assert "not used, next to the split folders: 1 (intro.avi)" in shown
        assert "not used, no video: suffix .srt: 1 (train/a/notes.srt)" in shown
        assert f"warning: {stray}" in shown
    pack(DataConfig(data=str(data), workers=1), str(tmp_path / "store"), short_side=16)
    touch(data, "train/a/more.srt")
    pack(DataConfig(data=str(data), workers=1), str(tmp_path / "store"), short_side=16)  # is still the same store
    capsys.readouterr()
    check(DataConfig(data=str(tmp_path / "store"), workers=1))
    assert f"warning: {stray}" in capsys.readouterr().out
    catalog = open_catalog(data)
    benchmark = Benchmark(catalog, DataConfig(), train=open_videos(catalog, "train", 1, progress=False))
    assert "not used, next to the split folders: 1 (intro.avi)" in capsys.readouterr().out
    assert benchmark.report()["data"]["warnings"] == [stray]
    benchmark.print_faults()
    assert f"warning: {stray}" in capsys.readouterr().err
