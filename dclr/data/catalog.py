"""The catalog of a data set: its videos with labels and splits, as the layouts and the packed store give it."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dclr.data.store import load_index
from dclr.data.store_files import Arrays
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError, printable

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What people call a split, in lower case -> its name here."""
KNOWN_LAYOUTS = (
    "UCF101, HMDB51, Kinetics, Something-Something, Diving48, list files (splits/train.txt), class folders, "
    "or a folder of videos"
)


SHOWN_NAMES = 5
"""Most names that a line or an entry gives for one reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One video of a catalog."""

    path: str
    """Relative to the catalog's root, with forward slashes. With `allow_outside` it may leave the root or be
    absolute."""
    label: int
    """Index into the catalog's `classes`; -1: unlabelled."""
    group: str = ""
    """The film or scene that the video was cut from. Videos of one group look alike. Empty if the layout does not
    say."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The videos of a data set, by split."""

    root: Path
    """The folder that the videos' paths start from."""
    layout: str
    """The name of the layout: a key of datasets.LAYOUTS, "folder of videos" or "video files". The layout of a packed
    store ends in " (packed)"."""
    classes: tuple[str, ...]
    """Names by label; empty if nothing is labelled."""
    splits: dict[str, tuple[Video, ...]]
    """Videos by "train", "test" and "val". Only splits with videos are here. A data set without splits is all "train".
    If there is "val" and no "test", then "test" has the same videos as "val"."""
    missing: dict[str, tuple[Video, ...]] = field(default_factory=dict)
    """The videos that the lists name and the disk does not hold, by split."""
    recognised: tuple[str, ...] = ()
    """Lines that say how the data set was read, such as which columns of a list were taken for what."""
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason -> paths relative to root of the files and folders that were not used."""
    warnings: tuple[str, ...] = ()
    """Lines about what is probably wrong, such as a class that has no training videos."""
    lists: tuple[str, ...] = ()
    """The list files that were read, relative to root. Every other file below root is a video or is in `unused`."""
    index: Arrays | None = field(default=None, repr=False, compare=False)
    """The index of a packed store, for `open_store`; None for videos on disk."""

    def videos(self, split: str) -> tuple[Video, ...]:
        """Return the videos of a split. Raises UserError if there is no such split. The message names the others."""
        if not self.splits.get(split):
            raise UserError(f"{self.root} has no {split} split; it has: {', '.join(self.splits)}")
        return self.splits[split]


def make_catalog(
    root: Path,
    layout: str,
    classes: tuple[str, ...],
    splits: Mapping[str, Iterable[Video]],
    missing: Mapping[str, Iterable[Video]] | None = None,
    *,
    recognised: Iterable[str] = (),
    unused: Mapping[str, Iterable[str]] | None = None,
    warnings: Iterable[str] = (),
    lists: Iterable[Path] = (),
    on_disk: Iterable[str] = (),
) -> Catalog:
    """Return a catalog in which every split holds videos on disk, and only such videos.

    If there is "val" and no "test", "test" is "val". This also holds if no listed test video is on disk. Then a warning
    says so, and the listed test videos stay in `missing`.

    Args:
        missing: videos by split of which the layout already knows that they are not on disk.
        recognised, unused, warnings: the fields of Catalog.
        lists: the list files that were read, all below `root`.
        on_disk: paths of videos that are known to be on disk. All others are looked for.

    Raises UserError: there are no videos, or a string of the lists cannot be a file name.
    """
    named = {split: tuple(videos) for split, videos in splits.items()}
    known = {split: tuple(videos) for split, videos in (missing or {}).items()}
    everything = [video for group in (named, known) for videos in group.values() for video in videos]
    _require_strings(root, classes, (video.path for video in everything), {video.group for video in everything})
    paths = {video.path for videos in named.values() for video in videos}
    paths.difference_update(on_disk)
    # Path.is_file would raise for a name that is too long and for a folder without permission.
    gone = {path for path in paths if not os.path.isfile(os.path.join(root, path))}
    present = named
    if gone:
        present = {split: tuple(video for video in videos if video.path not in gone) for split, videos in named.items()}
    absent = {
        split: (*known.get(split, ()), *(video for video in named.get(split, ()) if video.path in gone))
        for split in SPLITS
    }
    present = {split: videos for split, videos in present.items() if videos}
    absent = {split: videos for split, videos in absent.items() if videos}
    if not present:
        first = next((videos[0].path for videos in absent.values()), "")
        count = sum(map(len, absent.values()))
        listed = f"; its lists name {count}, such as {first}" if absent else f"; recognised are {KNOWN_LAYOUTS}"
        raise UserError(f"no videos found in {root}{listed}")
    if "val" in present and "test" not in present:
        present["test"] = present["val"]
        if lost := absent.get("test", ()):
            first = f"none of the {len(lost):,} listed test videos is on disk, such as {lost[0].path}"
            warnings = (*warnings, f"{first}: the val split is used as the test split")
        if "val" in absent:
            absent["test"] = tuple(dict.fromkeys((*lost, *absent["val"])))
    return Catalog(
        root=root,
        layout=layout,
        classes=classes,
        splits=present,
        missing=absent,
        recognised=tuple(recognised),
        unused={reason: tuple(paths) for reason, paths in (unused or {}).items()},
        warnings=tuple(warnings),
        lists=tuple(file.relative_to(root).as_posix() for file in lists),
    )


def _require_strings(root: Path, *strings: Iterable[str]) -> None:
    """Raise UserError if a string of the lists cannot be a file name. So the rest of the project need not check
    again."""
    try:
        whole = "".join(chain(*strings))
        whole.encode("utf-8", "surrogateescape")
        if "\0" not in whole:
            return
    except UnicodeEncodeError:
        pass
    raise UserError(f"{root}: its lists hold characters that no file name can have (null, or half of a surrogate pair)")


def label_advice(catalog: Catalog) -> str:
    """Return the end of a message: what the user can do to give the videos labels."""
    if catalog.index is not None:
        return "pack a data set whose videos have labels"
    if catalog.lists:
        return f"its lists must give the class of each video ({', '.join(catalog.lists[:SHOWN_NAMES])})"
    return "use class folders (test/<class>/video.mp4), or lists with a column `label`"


# ---------------------------------------------------------------- how the data set was read


def describe_reading(catalog: Catalog) -> list[str]:
    """Return lines that say how the data set was read, and what was not used for which reason."""
    lines = [f"recognised: {printable(line)}" for line in catalog.recognised]
    for reason, paths in catalog.unused.items():
        more = f" and {len(paths) - SHOWN_NAMES:,} more" if len(paths) > SHOWN_NAMES else ""
        names = ", ".join(map(printable, paths[:SHOWN_NAMES]))
        lines.append(f"not used, {printable(reason)}: {len(paths):,} ({names}{more})")
    return lines


def describe_warnings(catalog: Catalog) -> list[str]:
    """Return a line for each warning."""
    return [f"warning: {printable(line)}" for line in catalog.warnings]


def print_reading(catalog: Catalog) -> None:
    """Print the lines of `describe_reading`, and those of `describe_warnings` to stderr."""
    for line in describe_reading(catalog):
        print(line, flush=True)
    for line in describe_warnings(catalog):
        print(line, file=sys.stderr)


def reading_entry(catalog: Catalog) -> dict[str, Any]:
    """Return the entries of report.json that say how the data set was read."""
    return {
        "recognised": list(catalog.recognised),
        "unused": {
            reason: {"count": len(paths), "first": list(paths[:SHOWN_NAMES])}
            for reason, paths in catalog.unused.items()
        },
        "warnings": list(catalog.warnings),
    }


# ---------------------------------------------------------------- the packed store


def catalog_arrays(catalogs: dict[int, Catalog]) -> Arrays:
    """Return the catalogs of a data set, by number of the official split, as arrays for a store.

    `catalog_of_store` reads them.

    `paths` names each video once, in the order of the lists. An entry is a line of a list. Its row is an index into
    `paths`.
    """
    first = next(iter(catalogs.values()))
    listed = [
        (number, SPLITS.index(name), video)
        for number, catalog in catalogs.items()
        for name, videos in catalog.splits.items()
        for video in videos
    ]
    rows = {path: row for row, path in enumerate(dict.fromkeys(video.path for _, _, video in listed))}
    missing = [
        (number, SPLITS.index(name), video)
        for number, catalog in catalogs.items()
        for name, videos in catalog.missing.items()
        for video in videos
    ]
    return {
        "layout": pack_strings([first.layout]),
        "classes": pack_strings(first.classes),
        "paths": pack_strings(rows),
        "numbers": np.array(list(catalogs), dtype=np.int64),
        "entry_number": np.array([number for number, _, _ in listed], dtype=np.int64),
        "entry_split": np.array([split for _, split, _ in listed], dtype=np.int64),
        "entry_row": np.array([rows[video.path] for _, _, video in listed], dtype=np.int64),
        "entry_label": np.array([video.label for _, _, video in listed], dtype=np.int64),
        "entry_group": pack_strings(video.group for _, _, video in listed),
        "missing": pack_strings(video.path for _, _, video in missing),
        "missing_number": np.array([number for number, _, _ in missing], dtype=np.int64),
        "missing_split": np.array([split for _, split, _ in missing], dtype=np.int64),
        "missing_label": np.array([video.label for _, _, video in missing], dtype=np.int64),
        **_reading_arrays(catalogs),
    }


def _reading_arrays(catalogs: dict[int, Catalog]) -> Arrays:
    """Return how the data set was read, by number of the official split, as the arrays `store.READING`."""
    recognised = [(number, line) for number, catalog in catalogs.items() for line in catalog.recognised]
    warnings = [(number, line) for number, catalog in catalogs.items() for line in catalog.warnings]
    unused = [
        (number, reason, path)
        for number, catalog in catalogs.items()
        for reason, paths in catalog.unused.items()
        for path in paths
    ]
    return {
        "recognised": pack_strings(line for _, line in recognised),
        "recognised_number": np.array([number for number, _ in recognised], dtype=np.int64),
        "warnings": pack_strings(line for _, line in warnings),
        "warnings_number": np.array([number for number, _ in warnings], dtype=np.int64),
        "unused": pack_strings(path for _, _, path in unused),
        "unused_reason": pack_strings(reason for _, reason, _ in unused),
        "unused_number": np.array([number for number, _, _ in unused], dtype=np.int64),
    }


def _lines_of(index: Arrays, name: str, split: int) -> tuple[str, ...]:
    """Return the strings of a store's array that belong to one number of the official split."""
    lines = zip(unpack_strings(index[name]), index[f"{name}_number"].tolist(), strict=True)
    return tuple(line for line, number in lines if number == split)


def _unused_of(index: Arrays, split: int) -> dict[str, tuple[str, ...]]:
    """Return reason -> paths of a store's unused files, for one number of the official split."""
    unused: dict[str, list[str]] = {}
    columns = (unpack_strings(index["unused"]), unpack_strings(index["unused_reason"]))
    for path, reason, number in zip(*columns, index["unused_number"].tolist(), strict=True):
        if number == split:
            unused.setdefault(reason, []).append(path)
    return {reason: tuple(paths) for reason, paths in unused.items()}


def catalog_of_store(folder: Path, split: int) -> Catalog:
    """Return the catalog that a packed store holds for one number of the official split.

    Raises UserError: the store is damaged, or was not made for this split.
    """
    index = load_index(folder)
    (layout,) = unpack_strings(index["layout"])
    numbers = index["numbers"].tolist()
    if split not in numbers:
        raise UserError(f"split {split} of {layout}: the store in {folder} holds {' and '.join(map(str, numbers))}")
    paths, groups = unpack_strings(index["paths"]), unpack_strings(index["entry_group"])
    splits: dict[str, list[Video]] = {}
    for entry in np.flatnonzero(index["entry_number"] == split).tolist():
        row, label = int(index["entry_row"][entry]), int(index["entry_label"][entry])
        video = Video(path=paths[row], label=label, group=groups[entry])
        splits.setdefault(SPLITS[index["entry_split"][entry]], []).append(video)
    missing: dict[str, list[Video]] = {}
    for entry, path in enumerate(unpack_strings(index["missing"])):
        if index["missing_number"][entry] == split:
            video = Video(path=path, label=int(index["missing_label"][entry]))
            missing.setdefault(SPLITS[index["missing_split"][entry]], []).append(video)
    return Catalog(
        root=folder,
        layout=f"{layout} (packed)",
        classes=tuple(unpack_strings(index["classes"])),
        splits={name: tuple(videos) for name, videos in splits.items()},
        missing={name: tuple(videos) for name, videos in missing.items()},
        recognised=_lines_of(index, "recognised", split),
        unused=_unused_of(index, split),
        warnings=_lines_of(index, "warnings", split),
        index=index,
    )
