"""Folders of videos: class folders, videos side by side, and the search for videos below a folder."""

import os
from pathlib import Path, PurePath, PurePosixPath

from dclr.data.catalog import SPLITS, Catalog, Video, make_catalog
from dclr.errors import UserError

SUFFIXES = frozenset([".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".wmv", ".flv"])


def class_folders(data: Path) -> Catalog:
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
            return make_catalog(data, "folder of videos", (), {"train": videos})
        if set(by_class) <= set(SPLITS):  # {train,val,test}/* without classes, or no video at all
            unlabelled = {
                split: [Video(path=f"{split}/{file.name}", label=-1) for file in by_class[split]] for split in by_class
            }
            return make_catalog(data, "folder of videos", (), unlabelled)
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
    return make_catalog(data, "class folders", classes, splits)


def _videos_in(folder: Path) -> list[Path]:
    """Return the video files directly in a folder, sorted."""
    return sorted(file for file in folder.iterdir() if has_video_name(file) and file.is_file())


def _videos_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return class name -> its video files, both sorted. A folder without videos is no class."""
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {entry.name: files for entry in folders if (files := _videos_in(entry))}


def videos_by_stem(root: Path) -> dict[str, str]:
    """Return file name without suffix -> relative path, of all videos below a folder. Of equal names, the first path
    wins."""
    # A folder of videos is often a link to another disk. os.walk follows links, rglob does not.
    below = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    paths = sorted(file.relative_to(root).as_posix() for file in below if has_video_name(file))
    return {PurePosixPath(path).stem: path for path in reversed(paths)}


def has_video_name(file: PurePath) -> bool:
    """Return whether a file is a video, by its name. macOS writes files like ._x.mp4, which are no videos."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
