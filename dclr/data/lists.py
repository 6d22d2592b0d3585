"""The text of list files: lines, JSON, labels and paths that other people wrote.

Lists often come from other people, so the paths in them must stay in the data folder unless `allow_outside` is set.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dclr.data.store import leaves_folder
from dclr.errors import UserError

MAX_LINE = 10_000
"""Most characters in a line of a list. No path has half as many."""
MAX_CLASSES = 100_000
"""Labels are below this number. Without a limit, a typing error in a list would make a classifier of gigabytes."""


def read_lines(file: Path, keep_tabs: bool = False) -> list[tuple[str, str]]:
    """Return (file:line, text) of the lines that are not blank. Bytes that are not UTF-8 are kept (surrogateescape).

    Each text is without the white space at its ends. With `keep_tabs`, tabs stay there.

    Raises UserError: see `reading`; a line is longer than MAX_LINE.
    """
    with reading(file):
        content = file.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # "Unicode text" of spreadsheets
    text = content.decode("utf-16" if utf16 else "utf-8-sig", "replace" if utf16 else "surrogateescape")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    name = str(file)
    ends = " " if keep_tabs else None
    lines = [(f"{name}:{number}", line.strip(ends)) for number, line in enumerate(text.split("\n"), start=1)]
    for where, line in lines:
        if len(line) > MAX_LINE:
            raise UserError(
                f"{where}: a line of {len(line):,} characters, in what should be a list of videos or classes"
            )
    return [(where, line) for where, line in lines if line.strip()]


def read_json(file: Path) -> object:
    """Return the content of a JSON file. Raises UserError: see `reading`; it is not JSON."""
    with reading(file):
        text = file.read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def read_json_list(file: Path) -> list[object]:
    """Return the entries of a file with a JSON list. Raises UserError: see `read_json`; it is not a list."""
    content = read_json(file)
    if not isinstance(content, list):
        raise UserError(f"{file} must hold a JSON list")
    return content


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise UserError for a list that is missing, cannot be read, or is not a table."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"missing list file: {file}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{file} is not a table of comma-separated values: {error}") from None


def label_number(text: str) -> int | None:
    """Return the number of a class; None if the text is not a whole number from 0 and below MAX_CLASSES."""
    label = int(text) if text.isdecimal() and len(text) < 10 else MAX_CLASSES
    return label if label < MAX_CLASSES else None


def is_plain(path: str) -> bool:
    """Return whether a path is in its normal form, relative, and without a name that starts with a dot."""
    return bool(path) and path[0] not in "./" and path[-1] != "/" and "/." not in path and "//" not in path


def path_inside(path: PurePosixPath, where: str, allow_outside: bool) -> str:
    """Return a path in its normal form. Raises UserError: it leaves the root, and `allow_outside` is not set."""
    if leaves_folder(str(path)) and not allow_outside:
        raise UserError(
            f"{where}: {path} must be relative to the data folder and stay inside it "
            "(or trust the list: --allow-outside)"
        )
    return str(path)
