"""Folders of videos: class folders, split folders with class folders, and videos side by side.

A data set whose folders can be read in two ways is refused. Single videos in the wrong place do not change the layout:
they are not used, and a warning names them.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from dclr.data.catalog import KNOWN_LAYOUTS, SPLIT_NAMES, SPLITS, Catalog, Video, make_catalog
from dclr.data.listed_paths import count_videos
from dclr.data.tree import LISTS, PICTURES, Tree, looks_like_list, open_unknown, suffix_of
from dclr.errors import UserError

FOLDER_SPLITS = {**SPLIT_NAMES, "eval": "val", "dev": "val"}
"""Lower-case name of a split folder -> split."""

Folders = dict[str, list[str]]
"""Name of a folder -> the paths of all videos below it, relative to the root of the tree, sorted."""


def class_folders(tree: Tree) -> Catalog:
    """Return the catalog of a folder of videos. Raises UserError: there is no video, or the layout is ambiguous."""
    tree = open_unknown(tree)
    if not tree.videos:
        raise UserError(describe_nothing(tree))
    loose, folders = _by_folder(tree.videos)
    splits = {name: FOLDER_SPLITS[name.lower()] for name in folders if name.lower() in FOLDER_SPLITS}
    others = {name: videos for name, videos in folders.items() if name not in splits}
    has_classes = any(_by_folder(folders[name], f"{name}/")[1] for name in splits)
    if splits and (has_classes or not others):
        return _split_folders(tree, loose, others, {name: folders[name] for name in splits})
    if not folders:
        return _catalog(tree, "folder of videos", (), {"train": [Video(path=path, label=-1) for path in loose]})
    _refuse_many_loose(tree, loose, folders, "")
    _refuse_single(tree, folders, "")
    labelled = _Labelled(tuple(folders))
    videos = labelled.videos(folders, "")
    _refuse_splits_below(tree, folders)
    warnings = [
        f"{name}/ is read as a class and not as a split, because {next(iter(others))}/ is next to it" for name in splits
    ]
    return _catalog(
        tree,
        "class folders",
        labelled.classes,
        {"train": videos},
        recognised=labelled.lines(),
        unused={"next to the class folders": loose},
        warnings=warnings,
    )


def _split_folders(tree: Tree, loose: list[str], others: Folders, folders: Folders) -> Catalog:
    """Return the catalog of split folders, with or without class folders in them."""
    root = tree.root
    by_split: dict[str, str] = {}  # split -> name of its folder
    for name in folders:
        split = FOLDER_SPLITS[name.lower()]
        if split in by_split:
            raise UserError(f"{root} holds both {by_split[split]}/ and {name}/, and both mean {split}: keep one")
        by_split[split] = name
    outside = [*loose, *(path for videos in others.values() for path in videos)]
    _refuse_many_loose(tree, outside, folders, "")
    by_split = {split: by_split[split] for split in SPLITS if split in by_split}
    found = {split: _by_folder(folders[name], f"{name}/") for split, name in by_split.items()}
    first = next((split for split in by_split if found[split][1]), None)
    recognised = [f"{name}/ is the {split} split" for split, name in by_split.items() if name != split]
    if first is None:
        videos = {split: [Video(path=path, label=-1) for path in found[split][0]] for split in by_split}
        unused = {"next to the split folders": outside}
        return _catalog(tree, "folder of videos", (), videos, recognised=recognised, unused=unused)
    if "train" in by_split and first != "train":
        raise UserError(
            f"{root / by_split['train']} holds videos without class folders, but {root / by_split[first]} has class "
            "folders: give both class folders, or none"
        )
    labelled = _Labelled(tuple(found[first][1]))
    splits: dict[str, list[Video]] = {}
    strays: list[str] = []
    for split, name in by_split.items():
        direct, by_class = found[split]
        if not by_class:
            splits[split] = [Video(path=path, label=-1) for path in direct]
            recognised.append(f"{name}/ has no class folders, so the videos of the {split} split have no labels")
            continue
        _refuse_many_loose(tree, direct, by_class, f"{name}/")
        _refuse_single(tree, by_class, f"{name}/")
        for unknown in by_class:
            if unknown not in labelled.classes:
                like = next((known for known in labelled.classes if _folded(known) == _folded(unknown)), None)
                hint = f", which has {like!r}" if like else ""
                raise UserError(f"{root / name / unknown}: class {unknown!r} is not in {root / by_split[first]}{hint}")
        splits[split] = labelled.videos(by_class, f"{name}/")
        strays += direct
    return _catalog(
        tree,
        "class folders",
        labelled.classes,
        splits,
        recognised=[*recognised, *labelled.lines()],
        unused={"next to the split folders": outside, "next to the class folders": strays},
    )


class _Labelled:
    """Makes the videos of class folders. The class is the first folder, the group is the folders below it."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._labels = {name: label for label, name in enumerate(classes)}
        self._depth = 0

    def videos(self, by_class: Folders, prefix: str) -> list[Video]:
        """Return the videos of class folders that lie in the folder `prefix`."""
        found = []
        for name, paths in by_class.items():
            inside = len(f"{prefix}{name}/")
            for path in paths:
                group = os.path.dirname(path[inside:])
                self._depth = max(self._depth, group.count("/") + 1 if group else 0)
                found.append(Video(path=path, label=self._labels[name], group=group))
        return found

    def lines(self) -> list[str]:
        """Return a line that says how folders below class folders were read; none if there are none."""
        if not self._depth:
            return []
        folders = "1 folder" if self._depth == 1 else f"{self._depth} folders"
        return [f"videos up to {folders} below their class folder: the class is the first folder, the rest the group"]


def _by_folder(paths: Iterable[str], prefix: str = "") -> tuple[list[str], Folders]:
    """Return the paths that lie directly in the folder `prefix`, and the others by the folder in it."""
    direct: list[str] = []
    folders: Folders = {}
    for path in paths:
        name, slash, _ = path[len(prefix) :].partition("/")
        if slash:
            folders.setdefault(name, []).append(path)
        else:
            direct.append(path)
    return direct, dict(sorted(folders.items()))


def _catalog(
    tree: Tree,
    layout: str,
    classes: tuple[str, ...],
    splits: dict[str, list[Video]],
    recognised: Iterable[str] = (),
    unused: dict[str, list[str]] | None = None,
    warnings: Iterable[str] = (),
) -> Catalog:
    """Return the catalog with what the walk found, and a warning for each kind of unused videos."""
    strays = {reason: tuple(paths) for reason, paths in (unused or {}).items() if paths}
    all_warnings = [*tree.warnings, *warnings, *_empty_splits(tree), *_like_classes(classes)]
    for reason, paths in strays.items():
        all_warnings.append(f"{count_videos(len(paths), 'is', 'are')} {reason} and not used, such as {paths[0]}")
    if lists := tree.unused.get(LISTS):
        all_warnings.append(
            f"{lists[0]} is named like a list and is not read: the folders decide. --data FILE reads a list"
        )
    return make_catalog(
        tree.root,
        layout,
        classes,
        splits,
        recognised=[*tree.recognised, *recognised],
        unused={**strays, **tree.unused},
        warnings=all_warnings,
        on_disk=tree.videos,
    )


def _empty_splits(tree: Tree) -> list[str]:
    """Return a warning for each folder with the name of a split that holds no video."""
    used = {path.partition("/")[0] for path in tree.videos}
    top = [folder for folder in tree.folders.values() if folder and "/" not in folder]
    return [f"{name}/ holds no videos" for name in sorted(top) if name.lower() in FOLDER_SPLITS and name not in used]


def _folded(name: str) -> str:
    """Return a class name in lower case, without spaces at its ends, and with accents written in one way."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def _like_classes(classes: tuple[str, ...]) -> list[str]:
    """Return a warning for each class whose name looks like that of an earlier class."""
    first: dict[str, str] = {}
    for name in classes:
        first.setdefault(_folded(name), name)
    pairs = [(first[_folded(name)], name) for name in classes]
    return [
        f"classes {one!r} and {other!r} are two classes with almost the same name"
        for one, other in pairs
        if one != other
    ]


# ---------------------------------------------------------------- what is refused


def _refuse_many_loose(tree: Tree, loose: list[str], folders: Folders, prefix: str) -> None:
    """Raise UserError if at least as many videos lie next to the folders that decide the layout as in them."""
    if loose and len(loose) >= sum(map(len, folders.values())):
        raise UserError(
            f"{tree.root / prefix} holds videos both in class folders and next to them, such as {loose[0]}: move the "
            "videos that do not belong to a class or a split out of it"
        )


def _refuse_single(tree: Tree, folders: Folders, prefix: str) -> None:
    """Raise UserError if the only folder holds nothing but folders. They may be the classes or the splits."""
    if len(folders) != 1:
        return
    ((name, paths),) = folders.items()
    direct, inner = _by_folder(paths, f"{prefix}{name}/")
    if not direct and len(inner) > 1:
        first, second = list(inner)[:2]
        advice = f"did you mean --data {tree.root / name}" if not prefix else f"move them to {tree.root / prefix}"
        raise UserError(
            f"{tree.root / prefix} holds only the folder {name}, with the folders {first} and {second} in it, which "
            f"may be the classes: {advice}? If {name} is the class, put its videos directly in it"
        )


def _refuse_splits_below(tree: Tree, folders: Folders) -> None:
    """Raise UserError if class folders hold split folders, whose videos would become one train split."""
    for name, paths in folders.items():
        inner = _by_folder(paths, f"{name}/")[1]
        splits = {FOLDER_SPLITS[folder.lower()] for folder in inner if folder.lower() in FOLDER_SPLITS}
        if len(splits) > 1:
            first = next(folder for folder in inner if folder.lower() in FOLDER_SPLITS)
            raise UserError(
                f"{tree.root / name} holds split folders, such as {first}: the split must be the first folder, "
                f"{tree.root / first / name}"
            )


def describe_nothing(tree: Tree) -> str:
    """Return a line about a folder without videos: what it holds, and what would be right."""
    paths = [path for listed in tree.unused.values() for path in listed if not path.endswith("/")]
    suffixes = Counter(suffix_of(path) or "no suffix" for path in paths)
    seen = []
    if paths:
        counted = ", ".join(f"{suffix}: {count:,}" for suffix, count in suffixes.most_common(5))
        files = "1 file that is not a video" if len(paths) == 1 else f"{len(paths):,} files that are not videos"
        seen.append(f"{files} ({counted})")
    for reason, listed in tree.unused.items():
        folders = [path for path in listed if path.endswith("/")]
        if folders or reason.startswith("broken"):
            seen.append(f"{reason}: {len(listed):,}, such as {(folders or listed)[0]}")
    if lists := [path for path in paths if looks_like_list(os.path.basename(path))]:
        seen.append(f"{lists[0]} may be a list: the videos that it names must lie in this folder")
    if PICTURES not in tree.unused and any(suffix in (".jpg", ".jpeg", ".png") for suffix in suffixes):
        seen.append("pictures are not read as frames of videos")
    what = f": {'; '.join(seen)}" if seen else ""
    return f"no videos found in {tree.root}{what}; recognised are {KNOWN_LAYOUTS}"


# ---------------------------------------------------------------- videos that lists name


def videos_by_stem(tree: Tree) -> dict[str, list[str]]:
    """Return file name without suffix -> relative paths, sorted, of all videos below a folder."""
    by_stem: dict[str, list[str]] = {}
    for path in open_unknown(tree).videos:
        by_stem.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    return by_stem


def add_unused(catalog: Catalog, tree: Tree) -> Catalog:
    """Return the catalog of lists with everything below its root that no list names."""
    known = {path for paths in (tree.videos, tree.unknown, *tree.unused.values()) for path in paths}
    named = [video.path for videos in catalog.splits.values() for video in videos]
    used = {path if path in known else tree.path_of(os.path.normpath(path)) for path in dict.fromkeys(named)}
    used.update(catalog.lists, *catalog.unused.values())
    found = {"on disk, but in no list that was read": tree.videos + tree.unknown, **tree.unused}
    unused = dict(catalog.unused)
    for reason, paths in found.items():
        if rest := tuple(path for path in paths if path not in used):
            unused[reason] = (*unused.get(reason, ()), *rest)
    return replace(catalog, unused=unused, warnings=(*catalog.warnings, *tree.warnings))
