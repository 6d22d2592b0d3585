"""The official layouts: UCF101, HMDB51, Kinetics-400 and Diving48, as their publishers distribute the lists."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from dclr.data.catalog import SPLITS, Catalog, Video, make_catalog
from dclr.data.folders import videos_by_stem
from dclr.data.lists import MAX_CLASSES, MAX_LINE, label_number, path_inside, read_json_list, read_lines, reading
from dclr.data.tree import Tree, has_video_name
from dclr.errors import UserError


def ucf101(data: Path, split: int, allow_outside: bool) -> Catalog:
    lists = data / "ucfTrainTestlist"
    class_file = lists / "classInd.txt"
    names: dict[int, str] = {}
    for where, line in read_lines(class_file):
        match line.split():
            case [number, name] if (label := label_number(number)) is not None:
                names[label] = name
            case _:
                raise UserError(f"{where}: expected `number Class`, got {line!r}")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{class_file}: the classes must be numbered 1 to {len(names)}, each once")
    labels = {names[number]: number - 1 for number in names}

    def video(where: str, path: str) -> Video:
        if not has_video_name(PurePosixPath(path)):
            raise UserError(f"{where}: expected `Class/video.avi`, got {path!r}")
        name = PurePosixPath(path).parent.name
        if name not in labels:
            raise UserError(f"{where}: class {name!r} is not in {class_file}")
        # v_ApplyEyeMakeup_g01_c03: clip 3 of group 1; groups are numbered within their class.
        group = re.search(r"_(g\d+)_c\d+$", PurePosixPath(path).stem)
        path = path_inside(PurePosixPath("UCF-101", path), where, allow_outside)
        return Video(path=path, label=labels[name], group=f"{name}_{group[1]}" if group else "")

    train = []
    for where, line in read_lines(lists / f"trainlist{split:02d}.txt"):
        path, _, number = line.rpartition(" ")
        if not path or (label := label_number(number)) is None:
            raise UserError(f"{where}: expected `Class/video.avi number`, got {line!r}")
        train.append(video(where, path.strip()))
        if label != train[-1].label + 1:
            raise UserError(f"{where}: label {number} contradicts {class_file}, which says {train[-1].label + 1}")
    test = [video(where, line) for where, line in read_lines(lists / f"testlist{split:02d}.txt")]
    read = [class_file, lists / f"trainlist{split:02d}.txt", lists / f"testlist{split:02d}.txt"]
    classes = tuple(names[number] for number in sorted(names))
    return make_catalog(data, "UCF101", classes, {"train": train, "test": test}, lists=read)


def hmdb51(data: Path, split: int, allow_outside: bool) -> Catalog:
    lists = data / "testTrainMulti_7030_splits"
    classes = tuple(sorted({file.name.rpartition("_test_split")[0] for file in lists.glob("*_test_split[123].txt")}))
    if not classes:
        raise UserError(f"{lists} holds no <class>_test_split{split}.txt")
    splits: dict[str, list[Video]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        folder = f"videos/{name}" if (data / "videos" / name).is_dir() else name
        for where, line in read_lines(lists / f"{name}_test_split{split}.txt"):
            file, _, use = line.rpartition(" ")
            if not file or use not in ("0", "1", "2"):
                raise UserError(f"{where}: expected `video.avi 0|1|2` (unused, train, test), got {line!r}")
            if use != "0":
                path = path_inside(PurePosixPath(folder, file.strip()), where, allow_outside)
                splits["train" if use == "1" else "test"].append(Video(path=path, label=label))
    read = [lists / f"{name}_test_split{split}.txt" for name in classes]
    return make_catalog(data, "HMDB51", classes, splits, lists=read)


def kinetics_lists(folder: Path) -> Iterator[Path]:
    """Yield the CSV files of a folder whose first line is that of Kinetics' lists."""
    for file in sorted(folder.glob("*.csv")):
        with reading(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            first = text.readline(MAX_LINE)
        with suppress(csv.Error):  # not a table at all
            if {"youtube_id", "time_start", "time_end", "split"} <= set(next(csv.reader([first]), [])):
                yield file


def kinetics(data: Path, lists: list[Path], tree: Tree) -> Catalog:
    """Return the catalog of Kinetics. Rows of split "validate" are "val".

    Rows without a label (a test list as first published) are skipped. Accuracy on Kinetics is reported on the
    validation split, which is then "test" too.
    """
    rows: dict[str, tuple[str, str]] = {}  # <youtube id>_<start>_<end> -> (split, class name)
    for file in lists:
        with reading(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
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
    on_disk = videos_by_stem(tree)
    splits: dict[str, list[Video]] = {split: [] for split in SPLITS}
    missing: dict[str, list[Video]] = {split: [] for split in SPLITS}
    for name, (split, class_name) in rows.items():
        youtube_id = name[: -len("_000000_000000")]
        path = on_disk.get(name) or on_disk.get(youtube_id)
        if path:
            splits[split].append(Video(path=path, label=labels[class_name], group=youtube_id))
        else:
            missing[split].append(Video(path=name, label=labels[class_name], group=youtube_id))
    return make_catalog(data, "Kinetics-400", classes, splits, missing, lists=lists)


def diving48(data: Path, tree: Tree) -> Catalog:
    entries: dict[str, list[tuple[str, int]]] = {}
    for split in ("train", "test"):
        file = _only(data, f"Diving48*_{split}.json")
        entries[split] = []
        for number, entry in enumerate(read_json_list(file)):
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
            "-".join(map(str, name)) if isinstance(name, list) else str(name) for name in read_json_list(vocabulary)
        )
        if largest >= len(classes):
            raise UserError(f"label {largest} is beyond the {len(classes)} classes of {vocabulary}")
    else:
        classes = tuple(str(label) for label in range(largest + 1))

    on_disk = videos_by_stem(tree)
    splits: dict[str, list[Video]] = {split: [] for split in entries}
    missing: dict[str, list[Video]] = {split: [] for split in entries}
    for split, listed in entries.items():
        for name, label in listed:
            # <youtube id>_<number>: dives of one competition share pool, camera and divers.
            video = Video(path=on_disk.get(name, name), label=label, group=name.rpartition("_")[0])
            (splits if name in on_disk else missing)[split].append(video)
    read = [*data.glob("Diving48*_train.json"), *data.glob("Diving48*_test.json"), *data.glob("Diving48*_vocab.json")]
    return make_catalog(data, "Diving48", classes, splits, missing, lists=sorted(read))


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"missing list file: {folder / pattern}")
    if len(files) > 1:
        raise UserError(f"{folder} holds both {files[0].name} and {files[1].name}; keep one")
    return files[0]
