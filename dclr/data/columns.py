"""The columns of a list of videos: which separator, which header, and which column is the path, label or group.

Lists rarely say what their columns are. Every reading that all lines permit is tried. A reading whose paths are on disk
wins. If more than one reading is left, the list is refused, because a wrong guess would train on wrong labels.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from dclr.data.listed_paths import Disk
from dclr.data.lists import label_number, read_lines
from dclr.data.tree import has_video_name
from dclr.errors import UserError

NAMES = {
    "path": [
        "path", "video_path", "file_path", "filepath", "clip_path", "relative_path", "filename", "file_name", "file",
        "video_file", "video", "video_name", "videoname", "clip", "clip_name", "vid_name", "name", "video_id", "vid",
    ],
    "label": [
        "label", "labels", "class", "class_id", "classid", "label_id", "category", "action", "target", "activity",
        "class_name", "label_name", "class_label", "y",
    ],
    "group": ["group", "groups", "scene", "subject", "person", "actor"],
    "split": ["split", "subset", "partition", "usage"],
    "frames": ["num_frames", "frames", "n_frames", "nframes", "nb_frames", "total_frames", "frame_count", "length"],
    "start": ["start", "start_frame", "start_time", "time_start", "begin"],
    "end": ["end", "end_frame", "end_time", "time_end", "stop"],
}  # fmt: skip
"""Role -> the names that a header gives to a column of this role. If a header holds two of them, the first one here is
used."""
SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";"}
HEADER_HINT = "add a header line such as `path label group` or `path num_frames label` that names the columns"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a list."""

    where: str
    """file:line, for error messages."""
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A list of videos as columns."""

    file: Path
    separator: str
    """tab, comma, semicolon or space."""
    roles: tuple[str, ...]
    """The role of each column: a key of NAMES, or "?" for a column that is not used."""
    header: bool
    rows: tuple[Row, ...]
    comments: int
    """Number of lines that are comments."""

    def column(self, role: str) -> list[str]:
        """Return the fields of the column of this role, or empty strings if there is none."""
        if role not in self.roles:
            return [""] * len(self.rows)
        position = self.roles.index(role)
        return [row.fields[position] for row in self.rows]

    def describe(self) -> str:
        """Return a line that says how the list was read."""
        named = [role if role in ("path", "label", "group", "split") else f"{role} (not used)" for role in self.roles]
        columns = ", ".join(named).replace("? (not used)", "(not used)")
        separator = f"; separator: {self.separator}" if len(self.roles) > 1 else ""
        header = ", with a header" if self.header else ""
        comments = f", {self.comments} comment lines skipped" if self.comments else ""
        return f"columns: {columns}{separator}{header}; {len(self.rows):,} videos{comments}"


def looks_like_list(file: Path, disk: Disk) -> bool:
    """Return whether most of the first lines of a file name a video. No fault of the file is reported here."""
    try:
        lines = [line for _, line in read_lines(file)[:20]]
    except UserError:
        return False
    named = sum(
        any(has_video_name(PurePosixPath(field.strip("\"' "))) or disk.find(field)[0] for field in _first_fields(line))
        for line in lines
    )
    return 2 * named >= len(lines) > 0


def read_table(file: Path, disk: Disk) -> Table:
    """Return a list as columns. The role of the last two of three columns may be left open: "?" stands for both.

    Raises UserError: the lines permit no reading, or more than one, or a header names no column of paths.
    """
    lines, comments = [], 0
    for where, line in read_lines(file):
        if line.startswith("#") and (line.startswith("# ") or not any(disk.find(f)[0] for f in _first_fields(line))):
            comments += 1
        else:
            lines.append((where, line))
    if not lines:
        return Table(file=file, separator="space", roles=("path", "label"), header=False, rows=(), comments=comments)

    tables: list[Table] = []
    for table in _readings(file, lines, disk):
        if all((table.roles, table.rows) != (other.roles, other.rows) for other in tables):  # else it says the same
            tables.append(replace(table, comments=comments))
    if len(tables) == 1:
        return tables[0]
    on_disk = [sum(bool(disk.find(path)[0]) for path in table.column("path")) for table in tables]
    if not any(on_disk):  # no video is there: make_catalog refuses that
        on_disk = [sum(has_video_name(PurePosixPath(path)) for path in table.column("path")) for table in tables]
    best = [table for table, count in zip(tables, on_disk, strict=True) if count == max(on_disk)]
    if not best:
        raise _no_reading(lines)
    if len(best) > 1:  # the names in a header are a better sign than the number of columns
        best = [table for table in best if table.header] or best
    if len(best) > 1:
        ways = " or ".join(f"`{' '.join(table.roles)}` separated by {table.separator}" for table in best)
        raise UserError(f"{lines[0][0]}: can be read as {ways}; {HEADER_HINT}")
    _refuse_unknown_header(best[0], disk)
    return best[0]


def _refuse_unknown_header(table: Table, disk: Disk) -> None:
    """Raise UserError if the first row is a header whose name for the path is not known, such as `url,label`.

    Otherwise, its other fields would become a class called `label`.
    """
    if table.header or "label" not in table.roles:
        return
    path, label = table.column("path")[0], table.column("label")[0]
    is_path = has_video_name(PurePosixPath(path)) or bool(disk.find(path)[0])
    if label.lower() in NAMES["label"] and not is_path:
        raise UserError(
            f"{table.rows[0].where}: {' '.join(table.rows[0].fields)!r} looks like a header, but no column has a known "
            f"name for the paths: call {path!r} `path`"
        )


def _first_fields(line: str) -> set[str]:
    """Return what could be the path at the start of a line."""
    return {line, *(line.split(separator)[0] for separator in (*SEPARATORS.values(), None)), *_rsplits(line)}


def _rsplits(line: str) -> list[str]:
    return [line.rsplit(None, count)[0] for count in (1, 2)]


def _readings(file: Path, lines: list[tuple[str, str]], disk: Disk) -> Iterator[Table]:
    """Yield each reading that all lines permit."""
    for separator, character in SEPARATORS.items():
        if character not in lines[0][1]:
            continue
        rows = [Row(where=where, fields=_split(line, character)) for where, line in lines]
        if separator == "tab" and len({len(row.fields) for row in rows}) > 1:  # perhaps some last fields are empty
            whole = dict(read_lines(file, keep_tabs=True))
            rows = [Row(where=where, fields=_split(whole[where], character)) for where, _ in lines]
        if len({len(row.fields) for row in rows}) == 1 and len(rows[0].fields) > 1:
            yield from _with_roles(file, separator, rows, disk)
    for columns in (1, 2, 3):
        rows = []
        for where, line in lines:
            fields = _split_spaces(line, columns)
            if not fields or not _may_be_spaced(fields[0], line, disk):
                break  # at the first line that does not fit: a list may have a million
            rows.append(Row(where=where, fields=fields))
        else:
            yield from _with_roles(file, "space", rows, disk)
    if header := _roles_of_header(lines[0][1].split(), disk):
        rows = [Row(where=where, fields=tuple(line.split())) for where, line in lines]
        if len(header) > 3 and len({len(row.fields) for row in rows}) == 1:
            yield from _with_roles(file, "space", rows, disk)


def _split(line: str, character: str) -> tuple[str, ...]:
    """Return the fields of a line of a table. Quotes are as in comma-separated values."""
    if character not in line:
        return (line,)
    try:
        return tuple(field.strip() for field in next(csv.reader([line], delimiter=character, skipinitialspace=True)))
    except csv.Error:
        return (line,)


def _split_spaces(line: str, columns: int) -> tuple[str, ...]:
    """Return the fields of a line; empty if their number is not `columns`. The first may have quotes or spaces."""
    if quoted := re.match(r"""(["'])(.+?)\1(?:\s+(.*))?$""", line):
        fields = (quoted[2], *(quoted[3] or "").split())
    else:
        fields = tuple(line.rsplit(None, columns - 1)) if columns > 1 else (line,)
    return fields if len(fields) == columns else ()


def _may_be_spaced(path: str, line: str, disk: Disk) -> bool:
    """Return whether the first field is a path. A path with spaces and without quotes must be on disk."""
    return line[0] in "\"'" or len(path.split()) == 1 or bool(disk.find(path)[0])


def _roles_of_header(fields: Sequence[str], disk: Disk) -> tuple[str, ...]:
    """Return the roles that a header line gives to the columns; empty if the line is not a header."""
    names = [field.strip().lower().replace(" ", "_").replace("-", "_") for field in fields]
    roles = ["?"] * len(names)
    for role, known in NAMES.items():
        for name in known:
            if name in names and role not in roles:
                roles[names.index(name)] = role
    if "path" not in roles or any(has_video_name(PurePosixPath(name)) for name in names):
        return ()
    return () if disk.find(fields[roles.index("path")])[0] else tuple(roles)


def _with_roles(file: Path, separator: str, rows: list[Row], disk: Disk) -> Iterator[Table]:
    """Yield a table for rows of one length, if its columns have roles by a header or by their number."""
    header = _roles_of_header(rows[0].fields, disk)
    count = len(rows[0].fields)
    by_number = {1: ("path",), 2: ("path", "label"), 3: ("path", "?", "?")}
    if roles := header or by_number.get(count, ()):
        rest = tuple(rows[1:] if header else rows)
        yield Table(file=file, separator=separator, roles=roles, header=bool(header), rows=rest, comments=0)


def _no_reading(lines: list[tuple[str, str]]) -> UserError:
    """Return the error for lines that permit no reading. It names the first line that differs from most others."""
    separator = next((c for c in SEPARATORS.values() if sum(c in line for _, line in lines) > len(lines) / 2), None)
    counts = [len(_split(line, separator)) if separator else len(line.split()) for _, line in lines]
    usual = max(Counter(counts).values())
    common = next(count for count in counts if counts.count(count) == usual)
    for (where, line), count in zip(lines, counts, strict=True):
        if count != common:
            columns = "1 column" if count == 1 else f"{count} columns"
            return UserError(
                f"{where}: {columns} in {line!r}, but {common} in most lines; every line must be `path label [group]` "
                "with the same columns, and a path with spaces needs quotes"
            )
    where, line = lines[0]
    return UserError(f"{where}: {common} columns without a header in {line!r}; {HEADER_HINT}")


# ---------------------------------------------------------------- three columns without a header


def resolve_open_columns(tables: Iterable[Table], classes: int | None) -> list[Table]:
    """Return the tables with the last two of three columns decided by the content of all tables together.

    Without a header, three columns are `path label group` or `path num_frames label`. Labels are whole numbers from 0,
    and most numbers up to the largest one occur. Frame counts are larger than 0 and leave large gaps.

    Args:
        classes: number of classes that classes.txt names; None without such a file.

    Raises UserError: both readings are possible, or none is.
    """
    tables = list(tables)
    undecided = [table for table in tables if not table.header and table.roles == ("path", "?", "?")]
    rows = [row for table in undecided for row in table.rows]
    if not rows:
        return tables
    second, third = ([row.fields[column] for row in rows] for column in (1, 2))
    has_zero = "0" in second or "-1" in second
    labels_second = are_labels(second) and (has_zero or is_dense(second) or _all_named(second, classes))
    frames_second = all(text.isdecimal() and text.strip("0") for text in second)
    labels_third = are_labels(third) and (is_dense(third) or _all_named(third, classes))
    roles: tuple[str, ...]
    if labels_second and not (frames_second and labels_third):
        roles = ("path", "label", "group")
    elif frames_second and labels_third and not labels_second:
        roles = ("path", "frames", "label")
    else:
        raise UserError(
            f"{rows[0].where}: {' '.join(rows[0].fields)!r} can be `path label group` or `path num_frames label`, and "
            f"the numbers do not show which; {HEADER_HINT}"
        )
    return [replace(table, roles=roles) if table in undecided else table for table in tables]


def are_labels(fields: Iterable[str]) -> bool:
    """Return whether all fields are the number of a class, or -1 for a video without a label."""
    return all(field == "-1" or label_number(field) is not None for field in fields)


def is_dense(fields: Iterable[str]) -> bool:
    """Return whether at least half of the numbers from 0 to the largest label occur."""
    numbers = {int(field) for field in fields if field != "-1"}
    return 2 * len(numbers) > max(numbers, default=0)


def _all_named(labels: Iterable[str], classes: int | None) -> bool:
    """Return whether classes.txt names a class for every label. `classes`: as in `resolve_open_columns`."""
    return classes is not None and max(map(int, labels), default=0) < classes
