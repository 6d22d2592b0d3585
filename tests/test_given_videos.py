"""Catalogs of given files, and all videos of a data set once."""

from pathlib import Path

import pytest
from helpers import touch

from dclr.data.catalog import Video, make_catalog
from dclr.data.datasets import open_catalog
from dclr.data.given_videos import catalog_of_files, everything, splits_of
from dclr.errors import UserError


def test_files_have_the_folder_that_holds_all_as_their_root(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "a/b/2.mp4", "c/3.avi")
    one = catalog_of_files([tmp_path / "a/1.mp4"])
    assert one.root == tmp_path / "a"
    assert [video.path for video in one.videos("train")] == ["1.mp4"]
    files = [tmp_path / "c/3.avi", tmp_path / "a/b/2.mp4", tmp_path / "c/../c/3.avi"]
    several = catalog_of_files(files)
    assert several.root == tmp_path
    assert several.videos("train") == (Video(path="c/3.avi", label=-1), Video(path="a/b/2.mp4", label=-1))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no such file: {tmp_path}/x.mp4"):
        catalog_of_files([tmp_path / "x.mp4"])
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; give video files"):
        catalog_of_files([tmp_path])
    with pytest.raises(UserError, match="no video files are given"):
        catalog_of_files([])


def test_a_video_file_is_a_data_set(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "2.mp4", "no-suffix")
    for name in ("1.mp4", "no-suffix"):
        catalog = open_catalog(tmp_path / name)
        assert catalog.layout == "video files"
        assert [video.path for video in catalog.videos("train")] == [name]
    twice = [Path(f"/{tmp_path}/1.mp4"), tmp_path / "1.mp4"]  # a path may begin with //
    assert [video.path for video in catalog_of_files(twice).videos("train")] == ["1.mp4"]
    with pytest.raises(UserError, match="split 2 of video files"):
        open_catalog(tmp_path / "1.mp4", split=2)


def test_everything_is_each_video_once_with_the_first_split_that_has_it(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "2.mp4", "3.mp4")
    one, two, three, gone = (Video(path=f"{n}.mp4", label=0) for n in (1, 2, 3, 4))
    catalog = make_catalog(tmp_path, "x", ("c",), {"val": [three, one], "train": [two, one], "test": [gone]})
    found = everything(catalog)
    assert found.videos("all") == (two, one, three)
    assert found.missing == {"all": (gone,)}
    assert splits_of(catalog) == {"2.mp4": "train", "1.mp4": "train", "3.mp4": "val"}
