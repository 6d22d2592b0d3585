"""The layout "list file": the user's own lists of videos."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dclr.data.catalog import SPLIT_NAMES, SPLITS, Catalog, Video, make_catalog
from dclr.data.columns import Table, is_dense, looks_like_list, read_table, resolve_open_columns
from dclr.data.listed_paths import Disk, find_videos
from dclr.data.lists import MAX_CLASSES, is_plain, label_number, path_inside, read_lines
from dclr.data.tree import VIDEO_SUFFIXES, suffix_of
from dclr.errors import UserError

LIST_SUFFIXES = frozenset([".txt", ".csv", ".tsv", ".lst"])
LIST_FOLDERS = ("splits", "annotations", "lists")
"""Folders below the data folder that may hold its lists."""
LIST_NAME = re.compile(
    rf"(?P<before>(?:.*[ _.-])?)(?P<split>{'|'.join(SPLIT_NAMES)})"
    r"(?P<after>(?:[ _.-]*(?:lists?|videos?|files?|split|fold|set|annotations?|data|info|\d{1,2}))*)"
)
"""A file name in lower case without suffix, such as train, val_list, trainlist01, ucf101_train_split_1_videos."""


@dataclass(frozen=True, kw_only=True)
class ListFile:
    """A file whose name is that of a list of one split."""

    file: Path
    split: str
    number: int | None
    """The number of the official split, such as 1 in trainlist01.txt."""
    kind: tuple[str, str, str]
    """The name without its split: lists of one kind belong together."""
    plain: bool
    """True if nothing stands before the split in the name. Such a file must be a list. Others may be anything."""


def parse_list_name(file: Path) -> ListFile | None:
    """Return what the name of a list says; None if the name is not that of a list of one split."""
    match = LIST_NAME.fullmatch(file.stem.lower())
    if not match or file.suffix.lower() not in LIST_SUFFIXES:
        return None
    if set(re.split(r"[ _.-]", match["before"])) & SPLIT_NAMES.keys():  # such as train_test.txt
        return None
    number = re.search(r"(?<!\d)(\d{1,2})\D*$", match["after"]) or re.search(
        r"(?:split|fold)[ _.-]?(\d{1,2})", match["before"]
    )
    return ListFile(
        file=file,
        split=SPLIT_NAMES[match["split"]],
        number=int(number[1]) if number else None,
        kind=(match["before"], match["after"], file.suffix.lower()),
        plain=not match["before"],
    )


def has_lists(data: Path) -> bool:
    """Return whether a folder holds lists of videos."""
    if _lists_below(data) or _table_of_splits(data):
        return True
    splits = data / "splits"
    return splits.is_dir() and any(file.suffix.lower() in LIST_SUFFIXES for file in _files(splits))


def list_numbers(data: Path) -> list[int]:
    """Return the numbers of the official splits that the lists of a folder have; empty: they have no numbers."""
    lists = _lists_of_kind(data) if data.is_file() else _lists_below(data)
    return sorted({found.number for found in lists if found.number is not None})


def list_catalog(data: Path, split: int, allow_outside: bool) -> Catalog:
    """Return the catalog of the lists in a folder, or of a list file.

    A list file is read together with the lists of the other splits next to it, such as train_list.txt with
    test_list.txt. A list file whose name is not that of a split is the whole data set.

    Raises UserError: there are no lists of this number; two files are lists of one split; something is wrong with a
        list. The message names the file and the line.
    """
    if data.is_file():
        if data.parent == Path():  # named from inside its folder, which may be splits/
            data = data.absolute()
        lists = _lists_of_kind(data)
        single: Path | None = data
        root = data.parent.parent if data.parent.name.lower() in LIST_FOLDERS else data.parent
    else:
        lists, single, root = _lists_below(data), _table_of_splits(data), data
    files, recognised = _choose(root, lists, split)
    if not files and single:
        if split != 1:
            raise UserError(f"split {split} of list file: must be 1: this layout has no numbered splits")
        files = {"": single}
    elif "train" not in files and "" not in files:
        folder = next(iter(files.values())).parent if files else root / "splits"
        raise UserError(f"missing list file: {folder / 'train.txt'}")
    disk = Disk(root)
    tables = {name: read_table(file, disk) for name, file in files.items()}
    others = [found.file for found in lists if found.number not in (None, split)]
    return _catalog(disk, tables, recognised, allow_outside, others)


# ---------------------------------------------------------------- which files are lists


def _files(folder: Path) -> list[Path]:
    """Return the files in a folder that may be lists, and its folders, sorted. A folder that does not exist has none.

    Files that are videos by their name are dropped first, because a folder may have a million.
    """
    try:
        names = [name for name in os.listdir(folder) if suffix_of(name) not in VIDEO_SUFFIXES]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _lists_below(data: Path) -> list[ListFile]:
    """Return the lists in a data folder.

    A file that only might be a list, such as results_test.csv, must look like one. So must lists if none is a train
    list, because class folders may have a test.txt of another kind next to them.
    """
    folders = [data, *(entry for entry in _files(data) if entry.name.lower() in LIST_FOLDERS and entry.is_dir())]
    named = [found for folder in folders for file in _files(folder) if (found := parse_list_name(file))]
    disk = Disk(data)
    sure = any(found.plain and found.split == "train" for found in named)
    return [found for found in named if (sure and found.plain) or looks_like_list(found.file, disk)]


def _lists_of_kind(file: Path) -> list[ListFile]:
    """Return a list file and the lists of other splits next to it, whose names differ only in the split.

    Return none if the name of the file is not that of a list of one split.
    """
    given = parse_list_name(file)
    if not given:
        return []
    named = [found for other in _files(file.parent) if (found := parse_list_name(other))]
    return [given, *(found for found in named if found.kind == given.kind and found.split != given.split)]


def _table_of_splits(data: Path) -> Path | None:
    """Return the only table in a folder that has a split column, whatever its name.

    Raises UserError: there are several.
    """
    disk = Disk(data)
    found = []
    for folder in (data, *(data / name for name in LIST_FOLDERS)):
        for file in _files(folder):
            if file.suffix.lower() in (".csv", ".tsv") and file.is_file() and not parse_list_name(file):
                try:
                    table = read_table(file, disk)
                except UserError:
                    continue
                if "split" in table.roles and table.rows:
                    found.append(file)
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} both have a column of splits; give one of them as --data")
    return found[0] if found else None


def _choose(root: Path, lists: Sequence[ListFile], number: int) -> tuple[dict[str, Path], list[str]]:
    """Return the list of each split, and lines that say which number was chosen.

    Raises UserError: there are lists with numbers and none of this number; two files are lists of one split.
    """
    numbers = sorted({found.number for found in lists if found.number is not None})
    if numbers and number not in numbers:
        raise UserError(f"split {number} of list file: the lists in {root} are numbered {_join(numbers)}; use --split")
    if not numbers and lists and number != 1:
        raise UserError(f"split {number} of list file: must be 1: this layout has no numbered splits")
    files: dict[str, Path] = {}
    for split in SPLITS:
        fitting = [found.file for found in lists if found.split == split and found.number in (None, number)]
        if len(fitting) > 1:
            raise UserError(f"{fitting[0]} and {fitting[1]} are both lists of the {split} split; keep one")
        if fitting:
            files[split] = fitting[0]
    return files, [f"split {number} of the lists numbered {_join(numbers)}"] if len(numbers) > 1 else []


def _join(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))


# ---------------------------------------------------------------- the catalog


def _catalog(
    disk: Disk, tables: Mapping[str, Table], recognised: list[str], allow_outside: bool, others: Sequence[Path]
) -> Catalog:
    """Return the catalog of lists by split. The only list may have the split "": then its rows say their split.

    `others`: the lists of other official splits. They are not read, and they are not reported as unused.
    """
    root = disk.root
    class_file = next(iter(tables.values())).file.with_name("classes.txt")
    names = [line for _, line in read_lines(class_file)] if class_file.is_file() else None
    decided = resolve_open_columns(tables.values(), None if names is None else len(names))
    tables = dict(zip(tables, decided, strict=True))
    labels, classes, warnings = _resolve_labels(tables, class_file, names)

    listed: dict[str, list[Video]] = {split: [] for split in SPLITS}
    first: dict[str, tuple[str, int]] = {}
    for name, table in tables.items():
        columns = zip(table.rows, *map(table.column, ("path", "group", "split")), labels[name], strict=True)
        for row, path_field, group, split_field, label in columns:
            split = _split_of(row.where, split_field, name or ("" if "split" in table.roles else "train"))
            if not path_field:
                raise UserError(f"{row.where}: the path is empty")
            path = path_field
            if not is_plain(path):
                path = path_inside(PurePosixPath(path), row.where, allow_outside)
            if first.setdefault(path, (row.where, label))[1] != label:
                raise UserError(f"{row.where}: {path} has another label than in {first[path][0]}")
            listed[split].append(Video(path=path, label=label, group=group))
        recognised.append(f"{_relative(table.file, root)}: {table.describe()}")
        if {"start", "end"} & set(table.roles):
            warnings.append(f"{_relative(table.file, root)}: start and end are not used: each row is its whole video")
    _check_labels(listed, warnings, classes)
    found = find_videos(disk, listed)
    read = [*(table.file for table in tables.values()), *([class_file] if names is not None else [])]
    return make_catalog(
        root,
        "list file",
        classes,
        found.splits,
        found.missing,
        recognised=recognised,
        warnings=[*warnings, *found.warnings],
        lists=[*read, *others],
        on_disk={video.path for videos in found.splits.values() for video in videos},
    )


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _split_of(where: str, field: str, split: str) -> str:
    """Return the split of a row from its field and the split of its list. Only one of them may be empty."""
    named = SPLIT_NAMES.get(field.lower(), "")
    if not named and (field or not split):
        raise UserError(f"{where}: split must be train, val or test, got {field!r}")
    if named and split and named != split:
        raise UserError(f"{where}: split {field!r} in a list of the {split} split")
    return named or split


def _resolve_labels(
    tables: Mapping[str, Table], class_file: Path, names: list[str] | None
) -> tuple[dict[str, list[int]], tuple[str, ...], list[str]]:
    """Return the labels of each list, the names of the classes, and warnings.

    Labels are numbers in all lists, or names in all lists. An empty field and -1 mean that a video has no label.
    """
    fields = {name: table.column("label") for name, table in tables.items()}
    rows = [
        (row.where, field)
        for name, table in tables.items()
        for row, field in zip(table.rows, fields[name], strict=True)
        if field not in ("", "-1")
    ]
    numbered = [label_number(field) is not None for _, field in rows]
    for (where, field), is_number in zip(rows, numbered, strict=True):
        if re.fullmatch(r"[+-]?\d*[.,]?\d*(e[+-]?\d+)?", field.lower()) and not is_number:
            shown = field if len(field) <= 40 else f"{field[:40]}..."
            raise UserError(f"{where}: label {shown!r} must be a whole number from 0 to {MAX_CLASSES - 1:,}")
        if is_number != numbered[0]:
            kind = "a number" if numbered[0] else "the name of a class"
            raise UserError(f"{where}: expected the label {kind}, as in {rows[0][0]}, got {field!r}")
    if not rows:
        return {name: [-1] * len(column) for name, column in fields.items()}, tuple(names or ()), []
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{class_file}: class {twice!r} is named twice: name it once")
    if numbered[0]:
        return _numbered_labels(fields, rows, any(table.header for table in tables.values()), class_file, names)
    for where, field in rows:
        if names is not None and field not in names:
            raise UserError(f"{where}: class {field!r} is not in {class_file}")
    classes = tuple(names if names is not None else sorted({field for _, field in rows}))
    index = {name: label for label, name in enumerate(classes)} | {"": -1, "-1": -1}
    return {name: [index[field] for field in column] for name, column in fields.items()}, classes, []


def _numbered_labels(
    fields: Mapping[str, list[str]],
    rows: list[tuple[str, str]],
    header: bool,
    class_file: Path,
    names: list[str] | None,
) -> tuple[dict[str, list[int]], tuple[str, ...], list[str]]:
    """Return what `_resolve_labels` returns, for labels that are numbers."""
    labels = {name: [int(field or -1) for field in column] for name, column in fields.items()}
    smallest, largest = (choose(int(field) for _, field in rows) for choose in (min, max))
    warnings = []
    if names is not None:
        where = next((where for where, field in rows if int(field) >= len(names)), None)
        if where is not None:
            start = "; no label is 0: write labels from 0" if smallest > 0 else ""
            label = next(int(field) for _, field in rows if int(field) >= len(names))
            raise UserError(f"{where}: label {label} is beyond the {len(names)} classes of {class_file}{start}")
    elif smallest > 1 and not header and not is_dense(field for _, field in rows):
        raise UserError(
            f"{rows[0][0]}: the labels are {smallest} to {largest} and most numbers up to {largest} do not occur: they "
            "could be frame counts; if they are labels, add the header line `path label`"
        )
    if smallest > 0:
        warnings.append(f"no label is 0: labels should be numbers from 0, and the smallest is {smallest}")
    return labels, tuple(names if names is not None else map(str, range(largest + 1))), warnings


def _check_labels(listed: Mapping[str, list[Video]], warnings: list[str], classes: tuple[str, ...]) -> None:
    """Add a warning for each split with videos that have no label.

    Raises UserError: some videos of the train split have a label, and others do not.
    """
    for split, videos in listed.items():
        bare = [video for video in videos if video.label < 0]
        if not bare or not classes:
            continue
        if split == "train" and len(bare) < len(videos):
            raise UserError(
                f"{len(bare)} of {len(videos)} training videos have no label, such as {bare[0].path}: label all of "
                "them or none"
            )
        warnings.append(f"{len(bare):,} of {len(videos):,} videos of the {split} split have no label")
