"""The official layouts UCF101, HMDB51 and Diving48, as their publishers distribute the lists."""

import re
from pathlib import Path, PurePosixPath

from dclr.data.catalog import Catalog, Video, make_catalog
from dclr.data.folders import videos_by_stem
from dclr.data.layout import DataFolder, check_split
from dclr.data.listed_paths import Disk, describe_equal_names, find_videos
from dclr.data.lists import MAX_CLASSES, label_number, path_inside, read_json_list, read_lines
from dclr.data.tree import has_video_name
from dclr.errors import UserError

HMDB51_LISTS = "[!.]*_test_split[123].txt"
"""Pattern of the names of HMDB51's lists. Hidden files, which macOS may write next to them, are not lists."""


def is_ucf101(data: Path) -> bool:
    return (data / "ucfTrainTestlist").is_dir() or (data / "UCF-101").is_dir()


def ucf101_numbers(data: Path) -> list[int]:
    return _numbers(data / "ucfTrainTestlist", "t*list0[123].txt")


def ucf101(folder: DataFolder) -> Catalog:
    """Return the catalog of UCF101. Raises UserError: there is no such split, or a list is missing or wrong."""
    data, split, allow_outside = folder.root, folder.split, folder.allow_outside
    check_split(split, "UCF101", (1, 2, 3))
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
    by_case = {name.casefold(): name for name in labels}
    renamed: dict[str, str] = {}

    def video(where: str, path: str) -> Video:
        written = PurePosixPath(path.replace("\\", "/"))
        if not has_video_name(written):
            raise UserError(f"{where}: expected `Class/video.avi`, got {path!r}")
        name = written.parent.name
        if name not in labels:
            if len(by_case) < len(labels) or name.casefold() not in by_case:
                raise UserError(f"{where}: class {name!r} is not in {class_file}")
            renamed[name] = by_case[name.casefold()]
            name = renamed[name]
        # v_ApplyEyeMakeup_g01_c03: clip 3 of group 1; groups are numbered within their class.
        group = re.search(r"_(g\d+)_c\d+$", written.stem)
        path_inside(PurePosixPath("UCF-101", written), where, allow_outside)
        return Video(
            path=str(PurePosixPath("UCF-101", path)), label=labels[name], group=f"{name}_{group[1]}" if group else ""
        )

    train = []
    for where, line in read_lines(lists / f"trainlist{split:02d}.txt"):
        path, _, number = line.rpartition(" ")
        if not path or (label := label_number(number)) is None:
            raise UserError(f"{where}: expected `Class/video.avi number`, got {line!r}")
        train.append(video(where, path.strip()))
        if label != train[-1].label + 1:
            raise UserError(f"{where}: label {number} contradicts {class_file}, which says {train[-1].label + 1}")
    test = [video(where, line) for where, line in read_lines(lists / f"testlist{split:02d}.txt")]
    # The lists of the other splits are named too. Otherwise they would be reported as not used.
    official = [class_file, *sorted(lists.glob("t*list0[123].txt"))]
    warnings = [f"class {listed} of the lists is read as {name} of classInd.txt" for listed, name in renamed.items()]
    classes = tuple(names[number] for number in sorted(names))
    found = find_videos(Disk(data), {"train": train, "test": test})
    return make_catalog(
        data,
        "UCF101",
        classes,
        found.splits,
        found.missing,
        recognised=[f"split {split} of the lists in {lists.name}"],
        warnings=[*warnings, *found.warnings],
        lists=official,
    )


def is_hmdb51(data: Path) -> bool:
    return (data / "testTrainMulti_7030_splits").is_dir()


def hmdb51_numbers(data: Path) -> list[int]:
    return _numbers(data / "testTrainMulti_7030_splits", HMDB51_LISTS)


def hmdb51(folder: DataFolder) -> Catalog:
    """Return the catalog of HMDB51. Raises UserError: there is no such split, or a list is missing or wrong."""
    data, split, allow_outside = folder.root, folder.split, folder.allow_outside
    check_split(split, "HMDB51", (1, 2, 3))
    lists = data / "testTrainMulti_7030_splits"
    classes = tuple(sorted({file.name.rpartition("_test_split")[0] for file in lists.glob(HMDB51_LISTS)}))
    if not classes:
        raise UserError(f"{lists} holds no <class>_test_split{split}.txt")
    splits: dict[str, list[Video]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        inner = (data / "videos" / name).is_dir() or ((data / "videos").is_dir() and not (data / name).is_dir())
        videos = f"videos/{name}" if inner else name
        for where, line in read_lines(lists / f"{name}_test_split{split}.txt"):
            file, _, use = line.rpartition(" ")
            if not file or use not in ("0", "1", "2"):
                raise UserError(f"{where}: expected `video.avi 0|1|2` (unused, train, test), got {line!r}")
            if use != "0":
                path = path_inside(PurePosixPath(videos, file.strip()), where, allow_outside)
                splits["train" if use == "1" else "test"].append(Video(path=path, label=label))
    official = sorted(lists.glob(HMDB51_LISTS))  # of all splits, as in `ucf101`
    found = find_videos(Disk(data), splits)
    return make_catalog(
        data,
        "HMDB51",
        classes,
        found.splits,
        found.missing,
        recognised=[f"split {split} of the lists in {lists.name}"],
        warnings=found.warnings,
        lists=official,
    )


def is_diving48(data: Path) -> bool:
    return any(data.glob("Diving48*_train.json")) or any(data.glob("Diving48*_test.json"))


def diving48(folder: DataFolder) -> Catalog:
    """Return the catalog of Diving48. Without a vocabulary, classes have the names "0", "1" and so on.

    Raises UserError: a list is missing, occurs twice or is wrong.
    """
    data = folder.root
    entries: dict[str, list[tuple[str, int]]] = {}
    labels: dict[str, int] = {}
    for split in ("train", "test"):
        file = _only(data, f"Diving48*_{split}.json")
        entries[split] = []
        for number, entry in enumerate(read_json_list(file)):
            match entry:
                case {"vid_name": str(name), "label": int(label)} if 0 <= label < MAX_CLASSES and label is not True:
                    if labels.setdefault(name, label) != label:
                        raise UserError(
                            f"{file}: entry {number}: {name} has label {label}, but label {labels[name]} earlier"
                        )
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

    on_disk = videos_by_stem(folder.tree)
    splits: dict[str, list[Video]] = {split: [] for split in entries}
    missing: dict[str, list[Video]] = {split: [] for split in entries}
    for split, listed in entries.items():
        for name, label in listed:
            # <youtube id>_<number>: dives of one competition share pool, camera and divers.
            paths = on_disk.get(name, [])
            video = Video(path=paths[0] if paths else name, label=label, group=name.rpartition("_")[0])
            (splits if paths else missing)[split].append(video)
    read = [*data.glob("Diving48*_train.json"), *data.glob("Diving48*_test.json"), *data.glob("Diving48*_vocab.json")]
    return make_catalog(
        data,
        "Diving48",
        classes,
        splits,
        missing,
        warnings=describe_equal_names([on_disk[name] for name in labels if len(on_disk.get(name, [])) > 1]),
        lists=sorted(read),
    )


def _numbers(lists: Path, pattern: str) -> list[int]:
    """Return the numbers at the end of the names of list files, each once."""
    return sorted({int(file.stem[-1]) for file in lists.glob(pattern)})


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"missing list file: {folder / pattern}")
    if len(files) > 1:
        raise UserError(f"{folder} holds both {files[0].name} and {files[1].name}; keep one")
    return files[0]
