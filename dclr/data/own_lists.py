"""The layout "list file": the user's own lists of videos."""

from pathlib import Path, PurePosixPath

from dclr.data.catalog import SPLITS, Catalog, Video, make_catalog
from dclr.data.lists import label_number, path_inside, read_lines
from dclr.errors import UserError

LIST_SUFFIXES = frozenset([".txt"])


def has_lists(data: Path) -> bool:
    """Return whether a folder holds lists of videos."""
    return (data / "splits").is_dir() or (data / "train.txt").is_file()


def list_numbers(data: Path) -> list[int]:
    """Return the numbers of the official splits that the lists of a folder have; empty: they have no numbers."""
    return []


def list_catalog(data: Path, split: int, allow_outside: bool) -> Catalog:
    """Return the catalog of the lists in a folder, or of a list file.

    Raises UserError: there are no lists of this number; something is wrong with a list. The message names the file
    and the line.
    """
    if split != 1:
        raise UserError(f"split {split} of list file: must be 1: this layout has no numbered splits")
    if data.is_file():
        return _list_file(data, allow_outside)
    folder = data / "splits" if (data / "splits").is_dir() else data
    return _list_file(folder / "train.txt", allow_outside)


def _list_file(file: Path, allow_outside: bool) -> Catalog:
    """Return the catalog of a list file.

    A list named train, val or test is read together with the others of these names in its folder. A list of another
    name is the whole data set.
    """
    root = file.parent.parent if file.parent.name == "splits" else file.parent
    files = {split: file.with_name(f"{split}.txt") for split in SPLITS}
    if file in files.values():
        files = {split: sibling for split, sibling in files.items() if sibling == file or sibling.is_file()}
    else:
        files = {"train": file}

    class_file = file.with_name("classes.txt")
    classes = tuple(line for _, line in read_lines(class_file)) if class_file.is_file() else None
    splits: dict[str, list[Video]] = {}
    for split, list_file in files.items():
        splits[split] = []
        for where, line in read_lines(list_file):
            if line.startswith("#"):
                continue
            fields = line.split()
            if len(fields) not in (2, 3) or (label := label_number(fields[1])) is None:
                raise UserError(f"{where}: expected `path label [group]`, the label a number, got {line!r}")
            if classes is not None and label >= len(classes):
                raise UserError(f"{where}: label {label} is beyond the {len(classes)} classes of {class_file}")
            path = path_inside(PurePosixPath(fields[0]), where, allow_outside)
            splits[split].append(Video(path=path, label=label, group=fields[2] if len(fields) == 3 else ""))
    if classes is None:
        largest = max((video.label for videos in splits.values() for video in videos), default=-1)
        classes = tuple(str(label) for label in range(largest + 1))
    read = [*files.values(), *([class_file] if class_file.is_file() else [])]
    return make_catalog(root, "list file", classes, splits, lists=read)
