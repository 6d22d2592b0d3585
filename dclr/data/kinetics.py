"""The layout of Kinetics-400, 600 and 700: CSV files of video segments on YouTube, and videos in any folder."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from dclr.data.catalog import SPLIT_NAMES, SPLITS, Catalog, Video, make_catalog
from dclr.data.folders import videos_by_stem
from dclr.data.layout import DataFolder
from dclr.data.listed_paths import describe_equal_names
from dclr.data.lists import MAX_LINE, reading
from dclr.data.own_lists import parse_list_name
from dclr.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A row of the lists: some seconds of a YouTube video."""

    where: str
    """file:line, for error messages."""
    youtube_id: str
    names: tuple[str, ...]
    """Names that its file may have, without suffix, the best one first: with its times, then the id alone."""
    split: str
    class_name: str
    """Empty: the list gives no label."""


def kinetics_lists(data: Path) -> Iterator[Path]:
    """Yield the CSV files of a data folder and of its folder annotations whose header has a column youtube_id."""
    for file in [*sorted(data.glob("*.csv")), *sorted((data / "annotations").glob("*.csv"))]:
        with reading(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            first = text.readline(MAX_LINE)
        with suppress(csv.Error):  # not a table at all
            if "youtube_id" in _column_names(next(csv.reader([first]), [])):
                yield file


def _column_names(header: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in header]


def is_kinetics(data: Path) -> bool:
    return any(kinetics_lists(data))


def kinetics(folder: DataFolder) -> Catalog:
    """Return the catalog of Kinetics. Rows of split "validate" are "val".

    Accuracy on Kinetics is reported on the validation split, which is then "test" too. So a test list without labels,
    as first published, is not used if there is a validation split.

    Raises UserError: a row is wrong; one file stands for two segments with different labels or splits.
    """
    lists = list(kinetics_lists(folder.root))
    segments = _read_segments(lists)
    labelled = {split: [s for s in segments if s.split == split and s.class_name] for split in SPLITS}
    recognised, warnings = [], []
    for split in SPLITS:
        bare = [segment for segment in segments if segment.split == split and not segment.class_name]
        if bare and split == "test" and labelled["val"] and not labelled["test"]:
            recognised.append(
                f"{len(bare):,} test videos have no label and are not used; the test split is the val split"
            )
            segments = [segment for segment in segments if segment.split != "test"]
        elif bare and split == "train" and labelled["train"]:
            raise UserError(f"{bare[0].where}: no label, but other training videos have one")
        elif bare and any(labelled.values()):
            warnings.append(f"{len(bare):,} videos of the {split} split have no label")

    classes = tuple(sorted({segment.class_name for segment in segments} - {""}))
    labels = {class_name: label for label, class_name in enumerate(classes)} | {"": -1}
    on_disk = videos_by_stem(folder.tree)
    splits: dict[str, list[Video]] = {split: [] for split in SPLITS}
    missing: dict[str, list[Video]] = {split: [] for split in SPLITS}
    owner: dict[str, Segment] = {}
    repeated: Counter[str] = Counter()
    equal_names = []
    for segment in segments:
        paths = next((on_disk[name] for name in segment.names if name in on_disk), [])
        if len(paths) > 1:
            paths = _in_own_folder(paths, segment)
        if len(paths) > 1:
            equal_names.append(paths)
        path = paths[0] if paths else segment.names[0]
        if paths and (first := owner.setdefault(path, segment)) is not segment:
            if (first.split, first.class_name) != (segment.split, segment.class_name):
                raise UserError(
                    f"{segment.where}: {path} stands for two segments, {first.names[0]} ({first.class_name}, "
                    f"{first.split}) and {segment.names[0]} ({segment.class_name}, {segment.split}); name the files "
                    f"with their times, such as {segment.names[0]}{PurePosixPath(path).suffix}"
                )
            repeated[path] += 1
            continue
        video = Video(path=path, label=labels[segment.class_name], group=segment.youtube_id)
        (splits if paths else missing)[segment.split].append(video)
    if repeated:
        path = next(iter(repeated))
        warnings.append(
            f"{repeated.total():,} segments share the file of another segment of the same class, such as {path}: each "
            "file is one video"
        )
    warnings += describe_equal_names(equal_names)
    return make_catalog(
        folder.root,
        "Kinetics-400",
        classes,
        splits,
        missing,
        recognised=recognised,
        warnings=warnings,
        lists=lists,
        on_disk=owner,
    )


def _read_segments(lists: list[Path]) -> list[Segment]:
    """Return the segments of all lists, each once. Raises UserError: a segment has two labels or is in two splits."""
    segments: dict[str, Segment] = {}
    for file in lists:
        named, name = parse_list_name(file), str(file)
        with reading(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            reader = csv.reader(text)
            columns = _column_names(next(reader, []))
            for fields in reader:
                if not fields:  # an empty line
                    continue
                row = dict(zip_longest(columns, fields[: len(columns)], fillvalue=""))
                segment = _segment(f"{name}:{reader.line_num}", row, named.split if named else "")
                first = segments.setdefault(segment.names[0], segment)
                if (first.split, first.class_name) != (segment.split, segment.class_name):
                    raise UserError(
                        f"{segment.where}: {segment.names[0]} is listed a second time, with another label or split"
                    )
    return list(segments.values())


def _segment(where: str, row: dict[str, str], split_of_file: str) -> Segment:
    """Return the segment of a row. `split_of_file` is used if the lists have no column of splits."""
    youtube_id = (row["youtube_id"] or "").strip()
    names = [youtube_id]
    if "time_start" in row or "time_end" in row:
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{where}: time_start and time_end must be seconds") from None
        names = [f"{youtube_id}_{start:06d}_{end:06d}", f"{youtube_id}_{start}_{end}", youtube_id]
    if "split" in row:
        split = SPLIT_NAMES.get((row["split"] or "").strip().lower(), "")
        if not split:
            raise UserError(f"{where}: split must be train, val, validate or test, got {row['split']!r}")
    elif split_of_file:
        split = split_of_file
    else:
        raise UserError(f"{where}: no column `split`; name the file train.csv, validate.csv or test.csv, or add it")
    return Segment(
        where=where, youtube_id=youtube_id, names=tuple(names), split=split, class_name=(row.get("label") or "").strip()
    )


def _in_own_folder(paths: list[str], segment: Segment) -> list[str]:
    """Return those of equally named videos that lie in a folder of the segment's class, then of its split."""
    for wanted in ({segment.class_name, segment.class_name.replace(" ", "_")}, None):
        inside = [
            path
            for path in paths
            if any(
                folder in wanted if wanted is not None else SPLIT_NAMES.get(folder.lower()) == segment.split
                for folder in PurePosixPath(path).parts[:-1]
            )
        ]
        paths = inside or paths
    return paths
