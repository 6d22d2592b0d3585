"""The files and folders below a data folder, read in one walk. Names decide what a file is, if they say enough.

Links to folders are followed, because data sets often consist of links to other disks. Every folder is read once, even
if several links lead to it. So links that form a circle do no harm.
"""

import errno
import os
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from dclr.data.decode import is_video
from dclr.data.decoder_process import TIMEOUT, answers, report_video
from dclr.errors import UserError


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


VIDEO_SUFFIXES = _suffixes(
    "264 265 3g2 3gp amv asf avc avi divx dv f4v flv h264 h265 hevc ivf m1v m2t m2ts m2v m4v "
    "mjpeg mjpg mk3d mkv mov mp4 mp4v mpe mpeg mpg mpv mts mxf nut ogv qt rm rmvb vob webm wmv "
    "wtv xvid y4m"
)
"""Suffixes of files that are taken for videos without opening them. Verification names those that are not videos."""

PICTURE_SUFFIXES = _suffixes("avif bmp exr heic jfif jp2 jpeg jpg pgm png ppm tga tif tiff")

LIST_SUFFIXES = _suffixes("csv json jsonl list lst tsv txt xlsx xml yaml yml")

OTHER_SUFFIXES = _suffixes(
    "aac aiff ass bak bib bz2 c cfg ckpt cpp crdownload db description doc docx exe flac gz h h5 "
    "hdf5 htm html ico idx ini ipynb jar java js lmdb lock log m4a mat md md5 mdb mid mp3 npy "
    "npz ods onnx opus parquet part pdf pickle pkl ps1 psd pt pth py pyc rar rst rtf safetensors "
    "sbv sh sha1 sha256 sqlite srt ssa svg tar tex tfrecord tgz tmp toml torrent url vtt wav wma "
    "xls xz ytdl zip zst"
)
"""Suffixes of files that are not videos, pictures or lists."""

LIST_WORDS = ("train", "test", "val", "split", "label", "annot", "list", "fold", "class", "index")
"""A file of text or a table is taken for a list if its name has one of these words."""

PICTURES = "folders of pictures, which are not read as frames of videos"
TWICE = "links to folders that are read already or that hold the data folder"
BROKEN = "broken links"
HIDDEN = "hidden"
EMPTY = "empty folders"
LISTS = "named like a list, but not read"

MANY_PICTURES = 10
"""A folder with so many pictures and without videos is one entry, not an entry for each picture."""

MOST_OPENED = 1_000
"""Most files without a known suffix that are opened one by one. If there are more, SAMPLE of each suffix are opened."""
SAMPLE = 50
MOST_SUFFIXES = 20
"""Most suffixes of which a sample is opened."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Everything below a folder. Paths are relative to the folder, sorted. Paths of folders end in "/"."""

    root: Path
    videos: tuple[str, ...]
    """Files that are taken for videos."""
    unknown: tuple[str, ...] = ()
    """Files whose suffix does not say whether they are videos, such as .gif, or that have no suffix."""
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason -> everything else."""
    folders: dict[tuple[int, int], str] = field(default_factory=dict)
    """Device and inode -> path of each folder that was read, without "/" at the end; the root is empty."""
    recognised: tuple[str, ...] = ()
    """Lines about unknown files that turned out to be videos."""
    warnings: tuple[str, ...] = ()
    """Lines about what could not be read."""

    def path_of(self, path: str) -> str:
        """Return the path by which the tree knows a file that may be reached in another way, such as by a link."""
        folder, name = os.path.split(path)
        try:
            status = os.stat(self.root / folder)
        except (OSError, ValueError):
            return path
        return os.path.join(self.folders.get((status.st_dev, status.st_ino), folder), name)


def read_tree(root: Path, only: Iterable[str] | None = None) -> Tree:
    """Read the names of everything below a folder. No file is opened.

    Args:
        only: names of the folders directly in `root` that are read. The others are not used; None: all are read.

    Raises UserError: the folder itself cannot be read.
    """
    unused: dict[str, list[str]] = {}
    videos: list[str] = []
    unknown: list[str] = []
    warnings: list[str] = []
    folders: dict[tuple[int, int], str] = {}
    above = {_identity(parent) for parent in root.resolve().parents if os.access(parent, os.X_OK)}
    waiting, links = deque([""]), deque[str]()  # links are read last: what is reached without a link keeps its path
    wanted = None if only is None else frozenset(only)

    def skip(reason: str, path: str) -> None:
        unused.setdefault(reason, []).append(path)

    while waiting or links:
        folder = waiting.popleft() if waiting else links.popleft()
        try:
            identity = _identity(root / folder)
            if identity in folders or identity in above:
                skip(TWICE, f"{folder}/")
                continue
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(f"{root} cannot be read: {error.strerror}") from None
            skip(f"cannot be read: {error.strerror}", f"{folder}/")
            warnings.append(f"{folder}/ cannot be read: {error.strerror}")
            continue
        folders[identity] = folder
        pictures: list[str] = []
        holds_videos = False
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            kind = _kind(entry)
            if kind == "folder":
                if entry.name.startswith("."):
                    skip(HIDDEN, f"{path}/")
                elif not folder and wanted is not None and entry.name not in wanted:
                    skip("folders that no list names", f"{path}/")
                else:
                    (links if entry.is_symlink() else waiting).append(path)
            elif kind != "file":
                skip(kind, path)
            elif entry.name.startswith("."):
                skip(HIDDEN, path)
            elif (suffix := suffix_of(path)) in VIDEO_SUFFIXES:
                videos.append(path)
                holds_videos = True
            elif suffix in PICTURE_SUFFIXES:
                pictures.append(path)
            elif suffix in LIST_SUFFIXES | OTHER_SUFFIXES:
                listed = looks_like_list(entry.name) and "/" not in folder
                skip(LISTS if listed else f"no video: suffix {suffix}", path)
            else:
                unknown.append(path)
        if len(pictures) >= MANY_PICTURES and not holds_videos:
            skip(PICTURES, f"{folder}/" if folder else "./")
        else:
            for path in pictures:
                skip(f"no video: suffix {suffix_of(path)}", path)
        if folder and not entries:
            skip(EMPTY, f"{folder}/")
    return Tree(
        root=root,
        videos=tuple(sorted(videos)),
        unknown=tuple(sorted(unknown)),
        unused={reason: tuple(sorted(paths)) for reason, paths in sorted(unused.items())},
        folders=folders,
        warnings=tuple(warnings),
    )


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _kind(entry: Any) -> str:
    """Return "file", "folder", or the reason why an entry of a folder is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return BROKEN if entry.is_symlink() else "neither files nor folders"
    except OSError as error:
        return BROKEN if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; empty if the name has none."""
    return os.path.splitext(path)[1].lower()


def has_video_name(file: PurePath) -> bool:
    """Return whether a file is a video, by its name. macOS writes files like ._x.mp4, which are not videos."""
    return file.suffix.lower() in VIDEO_SUFFIXES and not file.name.startswith(".")


def may_be_video(file: PurePath) -> bool:
    """Return whether the name of a file leaves it possible that the file is a video."""
    return suffix_of(file.name) not in PICTURE_SUFFIXES | LIST_SUFFIXES | OTHER_SUFFIXES


def looks_like_list(name: str) -> bool:
    """Return whether a file is a list of videos or classes, by its name."""
    return suffix_of(name) in LIST_SUFFIXES and any(word in name.lower() for word in LIST_WORDS)


# ---------------------------------------------------------------- files that have no known suffix


def open_unknown(tree: Tree) -> Tree:
    """Return the tree with every unknown file among its videos or among what is not used.

    Each file is opened in a decoder process. If there are more than MOST_OPENED, then a sample of each suffix decides:
    all its files are taken for videos if one of them is a video. Verification names those that are not videos.
    """
    by_suffix: dict[str, list[str]] = {}
    for path in tree.unknown:
        by_suffix.setdefault(suffix_of(path), []).append(path)
    videos, unused, warnings = set[str](), dict(tree.unused), list(tree.warnings)
    few = len(tree.unknown) <= MOST_OPENED
    largest = sorted(by_suffix, key=lambda suffix: -len(by_suffix[suffix]))[:MOST_SUFFIXES]
    tried: list[str] = []
    for suffix, paths in by_suffix.items():
        if few:
            tried += paths
        elif suffix in largest:
            tried += paths[:: -(-len(paths) // SAMPLE)]
    opened = _which_are_videos(tree.root, tried)
    for suffix, paths in sorted(by_suffix.items()):
        named = f"suffix {suffix}" if suffix else "without a suffix"
        if few:
            found = [path for path in paths if path in opened]
        elif suffix in largest:
            sample = set(paths) & set(tried)
            found = paths if sample & opened else []
            warnings.append(
                f"{len(paths):,} files {named}: only {len(sample)} were opened, of which {len(sample & opened)} are "
                f"videos; all are taken for {'videos' if found else 'other files'}"
            )
        else:
            found = []
            warnings.append(f"{len(paths):,} files {named} were not opened: there are too many unknown suffixes")
        videos.update(found)
        rest = tuple(path for path in paths if path not in videos)
        if rest:
            unused[f"no video: {named}"] = rest
    kinds = Counter(suffix_of(path) or "no suffix" for path in videos)
    counted = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(kinds.items()))
    recognised = [f"files that are videos by their content ({counted})"] if videos else []
    return Tree(
        root=tree.root,
        videos=tuple(sorted([*tree.videos, *videos])),
        unused=unused,
        folders=tree.folders,
        recognised=(*tree.recognised, *recognised),
        warnings=tuple(warnings),
    )


def _which_are_videos(root: Path, paths: list[str]) -> set[str]:
    """Return the paths that hold a video. A file on which the decoder crashes or hangs does not count as a video."""

    def look(path: str) -> bool:
        report_video(0)  # any number: `answers` knows the path
        return is_video(root / path)

    workers = min(4, len(os.sched_getaffinity(0)))
    return {path for path, answer in answers(look, deque(paths), workers, TIMEOUT) if answer is True}
