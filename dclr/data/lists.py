"""List files: lines of text, tables and JSON that other people wrote, and the catalog of the user's own lists.

Lists often come from other people, so the paths in them must stay in the data folder unless `allow_outside` is set.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dclr.data.catalog import SPLITS, Catalog, Video, make_catalog
from dclr.data.store import leaves_folder
from dclr.errors import UserError

MAX_LINE = 10_000
"""Most characters in a line of a list. No path has half as many."""
MAX_CLASSES = 100_000
"""Labels are below this number. Without a limit, a typing error in a list would make a classifier of gigabytes."""


def list_file(file: Path, allow_outside: bool) -> Catalog:
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


# ---------------------------------------------------------------- reading


def read_lines(file: Path) -> list[tuple[str, str]]:
    """Return (file:line, text) of the lines that are not blank. Bytes that are not UTF-8 are kept (surrogateescape)."""
    with reading(file):
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [(f"{file}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    for where, line in lines:
        if len(line) > MAX_LINE:
            raise UserError(
                f"{where}: a line of {len(line):,} characters, in what should be a list of videos or classes"
            )
    return [(where, line) for where, line in lines if line]


def read_json_list(file: Path) -> list[object]:
    with reading(file):
        text = file.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, list):
        raise UserError(f"{file} must hold a JSON list")
    return content


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise UserError for a list that is missing, cannot be read, or is no table."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"missing list file: {file}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{file} is not a table of comma-separated values: {error}") from None


def label_number(text: str) -> int | None:
    """Return the number of a class; None if the text is no such number."""
    label = int(text) if text.isdecimal() and len(text) < 10 else MAX_CLASSES
    return label if label < MAX_CLASSES else None


def path_inside(path: PurePosixPath, where: str, allow_outside: bool) -> str:
    """Return a path in its normal form. Raises UserError: it leaves the root, and `allow_outside` is not set."""
    if leaves_folder(str(path)) and not allow_outside:
        raise UserError(
            f"{where}: {path} must be relative to the data folder and stay inside it "
            "(or trust the list: --allow-outside)"
        )
    return str(path)
