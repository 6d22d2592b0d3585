"""Catalogs without official splits: of given video files, and of all videos of a data set in one split."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dclr.data.catalog import SPLITS, Catalog, Video, make_catalog
from dclr.errors import UserError

EVERYTHING = "all"
"""The name of the only split of `everything`."""


def catalog_of_files(files: Sequence[Path]) -> Catalog:
    """Return the catalog of video files, unlabelled and in one split, in the given order. Each file is there once.

    The root is the folder that holds all files, directly or in folders below it. No file is opened.

    Raises UserError: no files are given, or a file does not exist or is a folder.
    """
    if not files:
        raise UserError("no video files are given")
    absolute = list(dict.fromkeys(absolute_path(file) for file in files))
    for file in absolute:
        if not os.path.isfile(file):
            raise UserError(f"{file} is a folder; give video files" if os.path.isdir(file) else f"no such file: {file}")
    root = os.path.commonpath([os.path.dirname(file) for file in absolute])
    videos = [Video(path=Path(file).relative_to(root).as_posix(), label=-1) for file in absolute]
    paths = [video.path for video in videos]
    return make_catalog(Path(root), "video files", (), {"train": videos}, on_disk=paths)


def absolute_path(file: str | os.PathLike[str]) -> str:
    """Return the absolute path of a file. `os.path.abspath` alone would keep "//" at the beginning."""
    return "/" + os.path.abspath(file).lstrip("/")


def everything(catalog: Catalog) -> Catalog:
    """Return the catalog with one split, EVERYTHING, that has each video of all splits once.

    Its order is that of the splits train, val and test, and inside a split that of the catalog. The same holds for the
    missing videos. `splits_of` of the given catalog says which split a video is from.
    """
    videos = _once(catalog.splits)
    missing = _once(catalog.missing)
    return replace(catalog, splits={EVERYTHING: videos}, missing={EVERYTHING: missing} if missing else {})


def splits_of(catalog: Catalog) -> dict[str, str]:
    """Return path -> the first of the splits train, val and test that has the video."""
    found: dict[str, str] = {}
    for split in SPLITS:
        for video in catalog.splits.get(split, ()):
            found.setdefault(video.path, split)
    return found


def _once(splits: dict[str, tuple[Video, ...]]) -> tuple[Video, ...]:
    """Return each video of the splits once."""
    found: dict[str, Video] = {}
    for split in SPLITS:
        for video in splits.get(split, ()):
            found.setdefault(video.path, video)
    return tuple(found.values())
