"""The data set of --data, or the built-in demo videos: recognise the layout and return the catalog.

A folder that `train.py pack` wrote is a packed store, here or on a server. Every other folder has one of LAYOUTS:

    UCF101         UCF-101/<Class>/*.avi, ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt
    HMDB51         [videos/]<class>/*.avi, testTrainMulti_7030_splits/<class>_test_splitN.txt
    Kinetics-400   *.csv or annotations/*.csv with a column youtube_id, videos anywhere below
    Something-Something v2
                   [labels/]something-something-v2-{train,validation,test,labels}.json, or {train,...}.json, videos
                   anywhere below
    Diving48       Diving48*_train.json, Diving48*_test.json, [Diving48*_vocab.json], videos anywhere below
    list file      [splits/]{train,test,val,classes}.txt and similar names, or the list itself
    class folders  <class>/*, or {train,val,test}/<class>/*, or the videos side by side (unlabelled)

A video file is a data set of one video without a label.

No video is opened here, except files whose suffix does not say what they are. Everything below the data folder is used,
or it is in `Catalog.unused`. A file that a list names and the disk does not hold is in no split and is named in
`missing`.

Lists often come from other people, so the paths in them must stay in the data folder unless `allow_outside` is set.
Links are followed wherever they point, because they were made on this machine and data sets often consist of links.
"""

import gc
from pathlib import Path

from dclr import report
from dclr.config import DataConfig
from dclr.data.catalog import Catalog, catalog_of_store
from dclr.data.demo import render_demo
from dclr.data.folders import add_unused, class_folders
from dclr.data.given_videos import catalog_of_files
from dclr.data.kinetics import is_kinetics, kinetics
from dclr.data.layout import DataFolder, Layout, check_split
from dclr.data.layouts import (
    diving48,
    hmdb51,
    hmdb51_numbers,
    is_diving48,
    is_hmdb51,
    is_ucf101,
    ucf101,
    ucf101_numbers,
)
from dclr.data.own_lists import LIST_SUFFIXES, has_lists, list_catalog, list_numbers
from dclr.data.remote import RemotePath, data_path
from dclr.data.something import is_something, something
from dclr.data.store import is_store, load_index
from dclr.data.tree import may_be_video, read_tree
from dclr.errors import UserError

DEMO_VIDEOS = Path("runs") / "demo-videos"

LAYOUTS: dict[str, Layout] = {
    "class folders": Layout(recognise=lambda data: True, read=lambda folder: class_folders(folder.tree)),
    "list file": Layout(
        recognise=has_lists,
        read=lambda folder: list_catalog(folder.root, folder.split, folder.allow_outside),
        numbers=list_numbers,
    ),
    "Diving48": Layout(recognise=is_diving48, read=diving48),
    "Something-Something v2": Layout(recognise=is_something, read=something),
    "Kinetics-400": Layout(recognise=is_kinetics, read=kinetics),
    "HMDB51": Layout(recognise=is_hmdb51, read=hmdb51, numbers=hmdb51_numbers),
    "UCF101": Layout(recognise=is_ucf101, read=ucf101, numbers=ucf101_numbers),
}
"""The layouts by name, from the most general to the most special. The last one that recognises a folder reads it, so a
layout that is added later has precedence over all others. docs/extend.md shows how to add one."""


def make_demo() -> None:
    """Render the built-in demo videos if they do not exist."""
    report.say(f"no --data: using the built-in demo videos in {DEMO_VIDEOS}")
    render_demo(DEMO_VIDEOS)


def open_data(data: DataConfig) -> Catalog:
    """Return the catalog of --data, or of the demo videos without --data."""
    if not data.data:
        return open_catalog(DEMO_VIDEOS, data.split)
    return open_catalog(data_path(data.data), data.split, data.allow_outside)


def open_catalog(data: Path, split: int = 1, allow_outside: bool = False) -> Catalog:
    """Return the catalog of the data set in a folder, of a list file, or of a single video file.

    Args:
        split: number of the split of UCF101 and HMDB51, 1 to 3, or of numbered lists. Other layouts have only 1.
        allow_outside: lists may name videos outside of the data folder.

    Raises:
        UserError: something is wrong with the folder, the split or the lists. For a list, the message names the file
            and the line.
    """
    collects = gc.isenabled()
    gc.disable()  # a million videos then take a fourth of the time: the collector visits all objects again and again
    try:
        return _open(data, split, allow_outside)
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    finally:
        if collects:
            gc.enable()


def _open(data: Path, split: int, allow_outside: bool) -> Catalog:
    """Do what `open_catalog` does. Raises PermissionError too."""
    if isinstance(data, RemotePath):
        return catalog_of_store(data, split)
    if data.is_file() and data.suffix.lower() not in LIST_SUFFIXES:
        if not may_be_video(data):
            raise UserError(
                f"{data} is a file; give a video, a folder of videos or a list of them (.txt, .csv, .tsv, .lst)"
            )
        check_split(split, "video files", [1])
        return catalog_of_files([data])
    if data.is_file():
        catalog = list_catalog(data, split, allow_outside)
        named = [*catalog.lists, *(video.path for videos in catalog.splits.values() for video in videos)]
        return add_unused(catalog, read_tree(catalog.root, only={Path(path).parts[0] for path in named}))
    if not data.exists():
        raise UserError(f"no such folder: {data}")

    if is_store(data):
        return catalog_of_store(data, split)
    name, layout = layout_of(data)
    if layout.numbers is None:
        check_split(split, name, [1])
    tree = read_tree(data)
    catalog = layout.read(DataFolder(root=data, tree=tree, split=split, allow_outside=allow_outside))
    return add_unused(catalog, tree) if catalog.lists else catalog


def layout_of(data: Path) -> tuple[str, Layout]:
    """Return the name and the layout of a folder: the last of LAYOUTS that recognises it."""
    return next((name, layout) for name, layout in reversed(LAYOUTS.items()) if layout.recognise(data))


def official_splits(data: Path) -> list[int]:
    """Return the numbers of the official splits that a data set has lists for; [1] if it has none."""
    if is_store(data):
        return sorted(load_index(data)["numbers"].tolist())
    numbers = list_numbers if data.is_file() else layout_of(data)[1].numbers
    return sorted(numbers(data) if numbers else []) or [1]


def several_splits(data: DataConfig) -> list[int]:
    """Return the numbers of the official splits for --split all. Raises UserError if there is only one."""
    folder = data_path(data.data or str(DEMO_VIDEOS))
    if data.data and not isinstance(folder, RemotePath) and not folder.exists():
        raise UserError(f"no such folder: {data.data}")
    numbers = official_splits(folder) if data.data else [1]
    if len(numbers) < 2:
        named = data.data or "the set of demo videos"
        raise UserError(f"--split all needs several official splits, but {named} has lists for one: leave the flag out")
    return numbers
