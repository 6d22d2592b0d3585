"""The layout of Something-Something v2: JSON lists of videos that are called by a number, and videos in any folder."""

import json
from pathlib import Path
from typing import Any

from dclr.data.catalog import Catalog, Video, make_catalog
from dclr.data.folders import videos_by_stem
from dclr.data.layout import DataFolder
from dclr.data.listed_paths import describe_equal_names
from dclr.data.lists import label_number, read_json, read_json_list
from dclr.errors import UserError

FOLDERS = ("", "labels", "label", "annotations", "lists")
"""Folders of the data set that may hold its lists."""
PREFIXES = ("something-something-v2-", "")
"""The lists are called something-something-v2-train.json, or train.json on the newer download page."""
LISTS = {"train": "train", "val": "validation", "test": "test"}
"""Split -> the end of the name of its list."""
MAX_LABELS_FILE = 2**20
"""Most bytes of a labels.json. The published file has 10,000."""


def is_something(data: Path) -> bool:
    return _find_lists(data) is not None


def something(folder: DataFolder) -> Catalog:
    """Return the catalog of Something-Something v2. The class of a video is its template without brackets.

    The published test list has no labels. Accuracy is reported on the validation split, which is then "test" too.

    Raises UserError: a list is missing or wrong; a video has two labels.
    """
    found = _find_lists(folder.root)
    assert found, "something() reads only folders that is_something() recognises"
    lists, prefix = found
    class_file = lists / f"{prefix}labels.json"
    labels = _read_labels(class_file)
    files = {split: lists / f"{prefix}{name}.json" for split, name in LISTS.items()}
    files = {split: file for split, file in files.items() if file.is_file()}
    seen: dict[str, int] = {}
    listed = {split: _read_list(file, class_file, labels, split, seen) for split, file in files.items()}

    on_disk = videos_by_stem(folder.tree)
    recognised, warnings, unused = [], [], {}
    if bare := [name for name, label in listed.get("test", []) if label < 0]:
        if "val" in listed:
            recognised.append(f"{len(bare):,} test videos have no label and are not used; the test split is validation")
            unused = {"test videos without labels": [path for name in bare for path in on_disk.get(name, [])]}
            listed["test"] = [(name, label) for name, label in listed["test"] if label >= 0]
        else:
            warnings.append(f"{len(bare):,} videos of the test split have no label")
    splits: dict[str, list[Video]] = {split: [] for split in listed}
    missing: dict[str, list[Video]] = {split: [] for split in listed}
    equal_names = []
    for split, entries in listed.items():
        for name, label in entries:
            paths = on_disk.get(name, [])
            if len(paths) > 1:
                equal_names.append(paths)
            (splits if paths else missing)[split].append(Video(path=paths[0] if paths else f"{name}.webm", label=label))
    return make_catalog(
        folder.root,
        "Something-Something v2",
        tuple(labels),
        splits,
        missing,
        recognised=recognised,
        unused={reason: paths for reason, paths in unused.items() if paths},
        warnings=[*warnings, *describe_equal_names(equal_names)],
        lists=[class_file, *files.values()],
    )


def _find_lists(data: Path) -> tuple[Path, str] | None:
    """Return the folder of the lists and the start of their names; None if the data set has no such lists.

    Other data sets have a train.json too. It is a list of this one only if a labels.json maps class names to numbers.
    """
    for prefix in PREFIXES:
        for folder in (data / name for name in FOLDERS):
            if any((folder / f"{prefix}{name}.json").is_file() for name in LISTS.values()) and (
                prefix or _maps_names(folder / "labels.json")
            ):
                return folder, prefix
    return None


def _maps_names(file: Path) -> bool:
    """Return whether a file maps names to numbers, as labels.json does. No fault of the file is reported here."""
    try:
        if file.stat().st_size > MAX_LABELS_FILE:
            return False
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content) and None not in map(_number, content.values())


def _number(value: Any) -> int | None:
    """Return the number of a class, which the file writes as "0"; None for anything else."""
    return label_number(value) if isinstance(value, str) else None


def _read_labels(file: Path) -> dict[str, int]:
    """Return class name -> number, in the order of the numbers."""
    content = read_json(file)
    names = {name: _number(value) for name, value in content.items()} if isinstance(content, dict) else {}
    numbers = {number: name for name, number in names.items() if number is not None}
    if not names or sorted(numbers) != list(range(len(names))):
        raise UserError(f'{file} must map each class name to its number, "0" to the number of classes - 1, each once')
    return {numbers[number]: number for number in sorted(numbers)}


def _read_list(
    file: Path, class_file: Path, labels: dict[str, int], split: str, seen: dict[str, int]
) -> list[tuple[str, int]]:
    """Return the (id, label) of each entry of a list. Only entries of the test list may have no label, which is -1.

    Args:
        seen: id -> label, of the lists that were read before. The entries of this list are added.
    """
    entries = []
    for number, entry in enumerate(read_json_list(file)):
        match entry:
            case {"id": str(name), "template": str(template)}:
                class_name = template.replace("[", "").replace("]", "")
                if class_name not in labels:
                    raise UserError(f"{file}: entry {number}: class {class_name!r} is not in {class_file}")
                label = labels[class_name]
            case {"id": str(name)} if split == "test":
                label = -1
            case _:
                texts = "the text id" if split == "test" else "the texts id and template"
                raise UserError(f"{file}: entry {number} must have {texts}")
        if label >= 0 and seen.setdefault(name, label) != label:
            raise UserError(f"{file}: entry {number}: {name} has label {label}, but label {seen[name]} earlier")
        entries.append((name, label))
    return entries
