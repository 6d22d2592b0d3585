"""The data set of --data, or the built-in demo videos: recognise the layout and return the catalog.

`open_catalog` recognises a packed store, then the official layouts by their lists, then the user's own lists, then
class folders:

    packed store   written by `train.py pack`; it holds the lists of the data set that it was made from
    UCF101         UCF-101/<Class>/*.avi, ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt
    HMDB51         [videos/]<class>/*.avi, testTrainMulti_7030_splits/<class>_test_splitN.txt
    Kinetics-400   *.csv or annotations/*.csv with a column youtube_id, videos anywhere below
    Diving48       Diving48*_train.json, Diving48*_test.json, [Diving48*_vocab.json], videos anywhere below
    list file      [splits/]{train,test,val,classes}.txt and similar names, or the list itself
    class folders  <class>/*, or {train,val,test}/<class>/*, or the videos side by side (unlabelled)

No video is opened here, except files whose suffix does not say what they are. Everything below the data folder is used,
or it is in `Catalog.unused`. A file that a list names and the disk does not hold is in no split and is named in
`missing`.

Lists often come from other people, so the paths in them must stay in the data folder unless `allow_outside` is set.
Links are followed wherever they point, because they were made on this machine and data sets often consist of links.
"""

from pathlib import Path

from dclr import report
from dclr.config import DataConfig
from dclr.data.catalog import Catalog, catalog_of_store
from dclr.data.demo import render_demo
from dclr.data.folders import add_unused, class_folders
from dclr.data.kinetics import kinetics, kinetics_lists
from dclr.data.layouts import diving48, hmdb51, ucf101
from dclr.data.own_lists import LIST_SUFFIXES, has_lists, list_catalog, list_numbers
from dclr.data.store import is_store
from dclr.data.tree import Tree, read_tree
from dclr.errors import UserError

DEMO_VIDEOS = Path("runs") / "demo-videos"


def make_demo() -> None:
    """Render the built-in demo videos if they do not exist."""
    report.say(f"no --data: using the built-in demo videos in {DEMO_VIDEOS}")
    render_demo(DEMO_VIDEOS)


def open_data(data: DataConfig) -> Catalog:
    """Return the catalog of --data, or of the demo videos without --data."""
    return open_catalog(Path(data.data), data.split, data.allow_outside) if data.data else open_catalog(DEMO_VIDEOS)


def open_catalog(data: Path, split: int = 1, allow_outside: bool = False) -> Catalog:
    """Return the catalog of the data set in a folder, or of a list file.

    Args:
        split: number of the split of UCF101 and HMDB51, 1 to 3, or of numbered lists. Other layouts have only 1.
        allow_outside: lists may name videos outside of the data folder.

    Raises:
        UserError: something is wrong with the folder, the split or the lists. For a list, the message names the file
            and the line.
    """
    try:
        return _open(data, split, allow_outside)
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def _open(data: Path, split: int, allow_outside: bool) -> Catalog:
    """Do what `open_catalog` does. Raises PermissionError too."""
    if data.is_file():
        if data.suffix.lower() not in LIST_SUFFIXES:
            raise UserError(f"{data} is a file; give a folder of videos or a list of them (.txt, .csv, .tsv, .lst)")
        catalog = list_catalog(data, split, allow_outside)
        named = [*catalog.lists, *(video.path for videos in catalog.splits.values() for video in videos)]
        return add_unused(catalog, read_tree(catalog.root, only={Path(path).parts[0] for path in named}))
    if not data.exists():
        raise UserError(f"no such folder: {data}")

    if is_store(data):
        return catalog_of_store(data, split)
    tree = read_tree(data)
    catalog = _open_folder(data, tree, split, allow_outside)
    return add_unused(catalog, tree) if catalog.lists else catalog


def _open_folder(data: Path, tree: Tree, split: int, allow_outside: bool) -> Catalog:
    """Return the catalog of a folder by the first layout that fits. `tree`: all that is below the folder."""
    if (data / "ucfTrainTestlist").is_dir() or (data / "UCF-101").is_dir():
        _require_split(split, "UCF101", numbers=3)
        return ucf101(data, split, allow_outside)
    if (data / "testTrainMulti_7030_splits").is_dir():
        _require_split(split, "HMDB51", numbers=3)
        return hmdb51(data, split, allow_outside)
    if lists := [file for folder in (data, data / "annotations") for file in kinetics_lists(folder)]:
        _require_split(split, "Kinetics-400", numbers=1)
        return kinetics(data, lists, tree)
    if any(data.glob("Diving48*_train.json")) or any(data.glob("Diving48*_test.json")):
        _require_split(split, "Diving48", numbers=1)
        return diving48(data, tree)
    if has_lists(data):
        return list_catalog(data, split, allow_outside)
    _require_split(split, "class folders", numbers=1)
    return class_folders(tree)


def official_splits(data: Path) -> list[int]:
    """Return the numbers of the official splits that a data set has lists for; [1] if it has none."""
    if (data / "ucfTrainTestlist").is_dir():
        names = [file.name for file in (data / "ucfTrainTestlist").glob("t*list0[123].txt")]
    elif numbers := list_numbers(data):
        return numbers
    else:
        names = [file.name for file in (data / "testTrainMulti_7030_splits").glob("*_test_split[123].txt")]
    return sorted({int(name[-len("1.txt")]) for name in names}) or [1]


def _require_split(split: int, layout: str, numbers: int) -> None:
    if not 1 <= split <= numbers:
        allowed = "1, 2 or 3" if numbers == 3 else "1: this layout has no numbered splits"
        raise UserError(f"split {split} of {layout}: must be {allowed}")
