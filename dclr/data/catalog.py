"""The catalog of a data set on disk: its videos with labels and splits.

`open_catalog` recognises a packed store, then the official layouts by their lists, then the user's own lists, then
class folders:

    packed store   written by `train.py pack`; it holds the lists of the data set that it was made from
    UCF101         UCF-101/<Class>/*.avi, ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt
    HMDB51         [videos/]<class>/*.avi, testTrainMulti_7030_splits/<class>_test_splitN.txt
    Kinetics-400   *.csv or annotations/*.csv (label,youtube_id,time_start,time_end,split), videos anywhere below
    Diving48       Diving48*_train.json, Diving48*_test.json, [Diving48*_vocab.json], videos anywhere below
    list file      [splits/]{train,test,val,classes}.txt, or the list itself; a line is `path label [group]`
    class folders  <class>/*, or {train,val,test}/<class>/*, or the videos side by side (unlabelled)

No video is opened here. A file that a list names and the disk does not hold is in no split and is named in `missing`.

Lists often come from other people, so the paths in them must stay in the data folder unless `allow_outside` is set.
Links are followed wherever they point, because they were made on this machine and data sets often consist of links.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

import numpy as np

from dclr.data.store import Arrays, is_store, leaves_folder, load_index
from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError

SUFFIXES = frozenset([".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".wmv", ".flv"])
SPLITS = ("train", "val", "test")
MAX_LINE = 10_000
"""Most characters in a line of a list. No path has half as many."""
MAX_CLASSES = 100_000
"""Labels are below this number. Without a limit, a typing error in a list would make a classifier of gigabytes."""
LAYOUTS = "UCF101, HMDB51, Kinetics, Diving48, list files (splits/train.txt), class folders, or a folder of videos"


@dataclass(frozen=True, kw_only=True)
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
    """UCF101, HMDB51, Kinetics-400, Diving48, list file, class folders or folder of videos; of a store, followed by
    " (packed)"."""
    classes: tuple[str, ...]
    """Names by label; empty if nothing is labelled."""
    splits: dict[str, tuple[Video, ...]]
    """Videos by "train", "test" and "val". Only splits with videos are here. A data set without splits is all "train".
    If there is "val" and no "test", then "test" has the same videos as "val"."""
    missing: tuple[str, ...] = ()
    """The videos that the lists name and the disk does not hold."""
    index: Arrays | None = field(default=None, repr=False, compare=False)
    """The index of a packed store, for `open_store`; None for videos on disk."""

    def videos(self, split: str) -> tuple[Video, ...]:
        """Return the videos of a split. Raises UserError, naming the splits that exist: there is no such split."""
        if not self.splits.get(split):
            raise UserError(f"{self.root} has no {split} split; it has: {', '.join(self.splits)}")
        return self.splits[split]


def open_catalog(data: Path, split: int = 1, allow_outside: bool = False) -> Catalog:
    """Return the catalog of the data set in a folder, or of a list file (*.txt).

    Args:
        split: number of the official split of UCF101 and HMDB51, 1 to 3. Other layouts have only 1.
        allow_outside: lists may name videos outside of the data folder.

    Raises:
        UserError: something is wrong with the folder, the split or the lists. For a list, the message names the file
            and the line.
    """
    if data.is_file():
        if data.suffix.lower() != ".txt":
            raise UserError(f"{data} is a file; give a folder of videos or a .txt list of them")
        _require_split(split, "list file", numbers=1)
        return _list_file(data, allow_outside)
    if not data.exists():
        raise UserError(f"no such folder: {data}")

    if is_store(data):
        return _from_store(data, split)
    if (data / "ucfTrainTestlist").is_dir() or (data / "UCF-101").is_dir():
        _require_split(split, "UCF101", numbers=3)
        return _ucf101(data, split, allow_outside)
    if (data / "testTrainMulti_7030_splits").is_dir():
        _require_split(split, "HMDB51", numbers=3)
        return _hmdb51(data, split, allow_outside)
    if kinetics_lists := [file for folder in (data, data / "annotations") for file in _kinetics_lists(folder)]:
        _require_split(split, "Kinetics-400", numbers=1)
        return _kinetics(data, kinetics_lists)
    if any(data.glob("Diving48*_train.json")) or any(data.glob("Diving48*_test.json")):
        _require_split(split, "Diving48", numbers=1)
        return _diving48(data)
    if (data / "splits").is_dir():
        _require_split(split, "list file", numbers=1)
        return _list_file(data / "splits" / "train.txt", allow_outside)
    if (data / "train.txt").is_file():
        _require_split(split, "list file", numbers=1)
        return _list_file(data / "train.txt", allow_outside)
    _require_split(split, "class folders", numbers=1)
    return _class_folders(data)


def official_splits(data: Path) -> list[int]:
    """Return the numbers of the official splits that a data set has lists for; [1] if it has none."""
    if (data / "ucfTrainTestlist").is_dir():
        names = [file.name for file in (data / "ucfTrainTestlist").glob("t*list0[123].txt")]
    else:
        names = [file.name for file in (data / "testTrainMulti_7030_splits").glob("*_test_split[123].txt")]
    return sorted({int(name[-len("1.txt")]) for name in names}) or [1]


def _require_split(split: int, layout: str, numbers: int) -> None:
    if not 1 <= split <= numbers:
        allowed = "1, 2 or 3" if numbers == 3 else "1: this layout has no numbered splits"
        raise UserError(f"split {split} of {layout}: must be {allowed}")


# ---------------------------------------------------------------- the packed store


def catalog_arrays(catalogs: dict[int, Catalog]) -> Arrays:
    """Return the catalogs of a data set, by number of the official split, as arrays for a store. `_from_store` reads
    them.

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
    missing = [(number, path) for number, catalog in catalogs.items() for path in catalog.missing]
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
        "missing": pack_strings(path for _, path in missing),
        "missing_number": np.array([number for number, _ in missing], dtype=np.int64),
    }


def _from_store(folder: Path, split: int) -> Catalog:
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
    missing = zip(index["missing_number"].tolist(), unpack_strings(index["missing"]), strict=True)
    return Catalog(
        root=folder,
        layout=f"{layout} (packed)",
        classes=tuple(unpack_strings(index["classes"])),
        splits={name: tuple(videos) for name, videos in splits.items()},
        missing=tuple(path for number, path in missing if number == split),
        index=index,
    )


# ---------------------------------------------------------------- the official layouts


def _ucf101(data: Path, split: int, allow_outside: bool) -> Catalog:
    lists = data / "ucfTrainTestlist"
    class_file = lists / "classInd.txt"
    names: dict[int, str] = {}
    for where, line in _lines(class_file):
        match line.split():
            case [number, name] if (label := _label(number)) is not None:
                names[label] = name
            case _:
                raise UserError(f"{where}: expected `number Class`, got {line!r}")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{class_file}: the classes must be numbered 1 to {len(names)}, each once")
    labels = {names[number]: number - 1 for number in names}

    def video(where: str, path: str) -> Video:
        if not _is_video(PurePosixPath(path)):
            raise UserError(f"{where}: expected `Class/video.avi`, got {path!r}")
        name = PurePosixPath(path).parent.name
        if name not in labels:
            raise UserError(f"{where}: class {name!r} is not in {class_file}")
        # v_ApplyEyeMakeup_g01_c03: clip 3 of group 1; groups are numbered within their class.
        group = re.search(r"_(g\d+)_c\d+$", PurePosixPath(path).stem)
        path = _inside(PurePosixPath("UCF-101", path), where, allow_outside)
        return Video(path=path, label=labels[name], group=f"{name}_{group[1]}" if group else "")

    train = []
    for where, line in _lines(lists / f"trainlist{split:02d}.txt"):
        path, _, number = line.rpartition(" ")
        if not path or (label := _label(number)) is None:
            raise UserError(f"{where}: expected `Class/video.avi number`, got {line!r}")
        train.append(video(where, path.strip()))
        if label != train[-1].label + 1:
            raise UserError(f"{where}: label {number} contradicts {class_file}, which says {train[-1].label + 1}")
    test = [video(where, line) for where, line in _lines(lists / f"testlist{split:02d}.txt")]
    return _catalog(data, "UCF101", tuple(names[number] for number in sorted(names)), {"train": train, "test": test})


def _hmdb51(data: Path, split: int, allow_outside: bool) -> Catalog:
    lists = data / "testTrainMulti_7030_splits"
    classes = tuple(sorted({file.name.rpartition("_test_split")[0] for file in lists.glob("*_test_split[123].txt")}))
    if not classes:
        raise UserError(f"{lists} holds no <class>_test_split{split}.txt")
    splits: dict[str, list[Video]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        folder = f"videos/{name}" if (data / "videos" / name).is_dir() else name
        for where, line in _lines(lists / f"{name}_test_split{split}.txt"):
            file, _, use = line.rpartition(" ")
            if not file or use not in ("0", "1", "2"):
                raise UserError(f"{where}: expected `video.avi 0|1|2` (unused, train, test), got {line!r}")
            if use != "0":
                path = _inside(PurePosixPath(folder, file.strip()), where, allow_outside)
                splits["train" if use == "1" else "test"].append(Video(path=path, label=label))
    return _catalog(data, "HMDB51", classes, splits)


def _kinetics_lists(folder: Path) -> Iterator[Path]:
    """Yield the CSV files of a folder whose first line is that of Kinetics' lists."""
    for file in sorted(folder.glob("*.csv")):
        with _reading(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            first = text.readline(MAX_LINE)
        with suppress(csv.Error):  # not a table at all
            if {"youtube_id", "time_start", "time_end", "split"} <= set(next(csv.reader([first]), [])):
                yield file


def _kinetics(data: Path, lists: list[Path]) -> Catalog:
    """Return the catalog of Kinetics. Rows of split "validate" are "val".

    Rows without a label (a test list as first published) are skipped. Accuracy on Kinetics is reported on the
    validation split, which is then "test" too.
    """
    rows: dict[str, tuple[str, str]] = {}  # <youtube id>_<start>_<end> -> (split, class name)
    for file in lists:
        with _reading(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            reader = csv.DictReader(text)
            for row in reader:
                where = f"{file}:{reader.line_num}"
                split = "val" if row["split"] in ("validate", "validation") else row["split"]
                try:
                    name = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
                except (TypeError, ValueError, OverflowError):
                    raise UserError(f"{where}: time_start and time_end must be seconds") from None
                if split not in SPLITS:
                    raise UserError(f"{where}: split must be train, val, validate or test, got {split!r}")
                if not row.get("label"):
                    continue
                if rows.setdefault(name, (split, row["label"])) != (split, row["label"]):
                    raise UserError(f"{where}: {name} is listed a second time, with another label or split")

    classes = tuple(sorted({class_name for _, class_name in rows.values()}))
    labels = {class_name: label for label, class_name in enumerate(classes)}
    on_disk = _videos_by_stem(data)
    splits: dict[str, list[Video]] = {split: [] for split in SPLITS}
    missing = []
    for name, (split, class_name) in rows.items():
        youtube_id = name[: -len("_000000_000000")]
        path = on_disk.get(name) or on_disk.get(youtube_id)
        if path:
            splits[split].append(Video(path=path, label=labels[class_name], group=youtube_id))
        else:
            missing.append(name)
    return _catalog(data, "Kinetics-400", classes, splits, missing)


def _diving48(data: Path) -> Catalog:
    entries: dict[str, list[tuple[str, int]]] = {}
    for split in ("train", "test"):
        file = _only(data, f"Diving48*_{split}.json")
        entries[split] = []
        for number, entry in enumerate(_json_list(file)):
            match entry:
                case {"vid_name": str(name), "label": int(label)} if 0 <= label < MAX_CLASSES:
                    entries[split].append((name, label))
                case _:
                    raise UserError(
                        f"{file}: entry {number} must have a vid_name and a label of 0 or more, below {MAX_CLASSES:,}"
                    )

    largest = max((label for split in entries.values() for _, label in split), default=-1)
    if any(data.glob("Diving48*_vocab.json")):
        vocabulary = _only(data, "Diving48*_vocab.json")
        classes = tuple(
            "-".join(map(str, name)) if isinstance(name, list) else str(name) for name in _json_list(vocabulary)
        )
        if largest >= len(classes):
            raise UserError(f"label {largest} is beyond the {len(classes)} classes of {vocabulary}")
    else:
        classes = tuple(str(label) for label in range(largest + 1))

    on_disk = _videos_by_stem(data)
    missing = [name for split in entries.values() for name, _ in split if name not in on_disk]
    splits = {
        split: [
            # <youtube id>_<number>: dives of one competition share pool, camera and divers.
            Video(path=on_disk[name], label=label, group=name.rpartition("_")[0])
            for name, label in listed
            if name in on_disk
        ]
        for split, listed in entries.items()
    }
    return _catalog(data, "Diving48", classes, splits, missing)


# ---------------------------------------------------------------- the user's own layouts


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
    classes = tuple(line for _, line in _lines(class_file)) if class_file.is_file() else None
    splits: dict[str, list[Video]] = {}
    for split, list_file in files.items():
        splits[split] = []
        for where, line in _lines(list_file):
            if line.startswith("#"):
                continue
            fields = line.split()
            if len(fields) not in (2, 3) or (label := _label(fields[1])) is None:
                raise UserError(f"{where}: expected `path label [group]`, the label a number, got {line!r}")
            if classes is not None and label >= len(classes):
                raise UserError(f"{where}: label {label} is beyond the {len(classes)} classes of {class_file}")
            path = _inside(PurePosixPath(fields[0]), where, allow_outside)
            splits[split].append(Video(path=path, label=label, group=fields[2] if len(fields) == 3 else ""))
    if classes is None:
        largest = max((video.label for videos in splits.values() for video in videos), default=-1)
        classes = tuple(str(label) for label in range(largest + 1))
    return _catalog(root, "list file", classes, splits)


def _class_folders(data: Path) -> Catalog:
    split_folders = [split for split in SPLITS if (data / split).is_dir() and not _videos_in(data / split)]
    by_split = {split: _videos_by_class(data / split) for split in split_folders}
    by_split = {split: by_class for split, by_class in by_split.items() if by_class}
    if not by_split:
        by_class = _videos_by_class(data)
        loose = _videos_in(data)
        if loose and by_class:
            raise UserError(f"{data} holds videos both in class folders and next to them, such as {loose[0].name}")
        if loose:
            videos = [Video(path=file.name, label=-1) for file in loose]
            return _catalog(data, "folder of videos", (), {"train": videos})
        if set(by_class) <= set(SPLITS):  # {train,val,test}/* without classes, or no video at all
            unlabelled = {
                split: [Video(path=f"{split}/{file.name}", label=-1) for file in by_class[split]] for split in by_class
            }
            return _catalog(data, "folder of videos", (), unlabelled)
        by_split = {"train": by_class}

    first = next(iter(by_split))
    classes = tuple(by_split[first])
    splits = {}
    for split, by_class in by_split.items():
        if unknown := [name for name in by_class if name not in classes]:
            raise UserError(f"{data / split / unknown[0]}: class {unknown[0]!r} is not in {data / first}")
        splits[split] = [
            Video(path=file.relative_to(data).as_posix(), label=classes.index(name))
            for name, files in by_class.items()
            for file in files
        ]
    return _catalog(data, "class folders", classes, splits)


# ---------------------------------------------------------------- shared by the layouts


def _catalog(
    root: Path, layout: str, classes: tuple[str, ...], splits: dict[str, list[Video]], missing: Iterable[str] = ()
) -> Catalog:
    """Return a catalog without missing videos and empty splits. If there is "val" and no "test", "test" is "val".

    Raises UserError: there are no videos, or a string of the lists cannot be a file name.
    """
    named = [video for videos in splits.values() for video in videos]
    missing = tuple(missing)
    _require_strings(root, [*classes, *missing, *(string for video in named for string in (video.path, video.group))])
    # Path.is_file would raise for a name that is too long and for a folder without permission.
    absent = [video.path for video in named if not os.path.isfile(root / video.path)]
    gone = set(absent)
    present = {split: tuple(video for video in videos if video.path not in gone) for split, videos in splits.items()}
    present = {split: videos for split, videos in present.items() if videos}
    missing = (*missing, *absent)
    if not present:
        listed = f"; its lists name {len(missing)}, such as {missing[0]}" if missing else f"; recognised are {LAYOUTS}"
        raise UserError(f"no videos found in {root}{listed}")
    if "val" in present and "test" not in present:
        present["test"] = present["val"]
    return Catalog(root=root, layout=layout, classes=classes, splits=present, missing=missing)


def _lines(file: Path) -> list[tuple[str, str]]:
    """Return (file:line, text) of the lines that are not blank. Bytes that are not UTF-8 are kept (surrogateescape)."""
    with _reading(file):
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [(f"{file}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    for where, line in lines:
        if len(line) > MAX_LINE:
            raise UserError(
                f"{where}: a line of {len(line):,} characters, in what should be a list of videos or classes"
            )
    return [(where, line) for where, line in lines if line]


def _json_list(file: Path) -> list[object]:
    with _reading(file):
        text = file.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, list):
        raise UserError(f"{file} must hold a JSON list")
    return content


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"missing list file: {folder / pattern}")
    if len(files) > 1:
        raise UserError(f"{folder} holds both {files[0].name} and {files[1].name}; keep one")
    return files[0]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise UserError for a list that is missing, cannot be read, or is no table."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"missing list file: {file}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{file} is not a table of comma-separated values: {error}") from None


def _label(text: str) -> int | None:
    """Return the number of a class; None if the text is no such number."""
    label = int(text) if text.isdecimal() and len(text) < 10 else MAX_CLASSES
    return label if label < MAX_CLASSES else None


def _inside(path: PurePosixPath, where: str, allow_outside: bool) -> str:
    """Return a path in its normal form. Raises UserError: it leaves the root, and `allow_outside` is not set."""
    if leaves_folder(str(path)) and not allow_outside:
        raise UserError(
            f"{where}: {path} must be relative to the data folder and stay inside it "
            "(or trust the list: --allow-outside)"
        )
    return str(path)


def _require_strings(root: Path, strings: list[str]) -> None:
    """Raise UserError if a string of the lists cannot be a file name. So the rest of the project need not check
    again."""
    try:
        whole = "".join(strings)
        whole.encode("utf-8", "surrogateescape")
        if "\0" not in whole:
            return
    except UnicodeEncodeError:
        pass
    raise UserError(f"{root}: its lists hold characters that no file name can have (null, or half of a surrogate pair)")


def _videos_in(folder: Path) -> list[Path]:
    """Return the video files directly in a folder, sorted."""
    return sorted(file for file in folder.iterdir() if _is_video(file) and file.is_file())


def _videos_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return class name -> its video files, both sorted. A folder without videos is no class."""
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {entry.name: files for entry in folders if (files := _videos_in(entry))}


def _videos_by_stem(root: Path) -> dict[str, str]:
    """Return file name without suffix -> relative path, of all videos below a folder. Of equal names, the first path
    wins."""
    # A folder of videos is often a link to another disk. os.walk follows links, rglob does not.
    below = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    paths = sorted(file.relative_to(root).as_posix() for file in below if _is_video(file))
    return {PurePosixPath(path).stem: path for path in reversed(paths)}


def _is_video(file: PurePath) -> bool:
    """Return whether a file is a video, by its name. macOS writes files like ._x.mp4, which are no videos."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
