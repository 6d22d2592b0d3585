"""The files on disk that lists name, also where a list writes a name in a slightly different way.

Lists and videos often come from different people. Four differences are resolved if exactly one file fits: backslashes
for slashes, letter case, the Unicode form of accents, and the suffix (a video that was converted, or a name without a
suffix). Every such reading is reported, because it could be wrong.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dclr.data.catalog import SPLITS, Video
from dclr.data.store import leaves_folder
from dclr.data.tree import has_video_name

BACKSLASHES = "with backslashes"
CASE = "in other letter case or with other accents"
SUFFIX = "with another suffix or without one"


class Disk:
    """The files below a folder. Each directory is read once, when a path in it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[str, dict[str, bool]] = {}
        self._alike: dict[str, dict[str, list[str]]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def holds(self, path: str) -> bool:
        """Return whether a path, relative to the folder, is a file."""
        folder, name = os.path.split(path)
        return self._read(folder).get(name, False)

    def find(self, path: str) -> tuple[str, set[str]]:
        """Return the path of the file that a list means, and the differences. The path is empty if no file fits.

        A path that leaves the folder is only found exactly as it is written.
        """
        if self.holds(path):
            return path, set()
        written = str(PurePosixPath(path.replace("\\", "/")))
        differences = {BACKSLASHES} if "\\" in path else set()
        if leaves_folder(written):
            return "", set()
        folder = ""
        *parents, name = written.split("/")
        for part in parents:
            if part not in self._read(folder):
                alike = self._similar(folder, part)
                if len(alike) != 1:
                    return "", set()
                part = alike[0]
                differences.add(CASE)
            folder = os.path.join(folder, part)
        file, difference = self._find_name(folder, name)
        return (os.path.join(folder, file), differences | difference) if file else ("", set())

    def _find_name(self, folder: str, name: str) -> tuple[str, set[str]]:
        """Return the name of the file in a folder that a list means, and the differences."""
        if self._read(folder).get(name):
            return name, set()
        alike = [file for file in self._similar(folder, name) if self._read(folder)[file]]
        if alike:
            return (alike[0], {CASE}) if len(alike) == 1 else ("", set())
        stem = PurePosixPath(name).stem if has_video_name(PurePosixPath(name)) else name
        converted = self._by_stem(folder).get(_key(stem), [])
        if len(converted) != 1:
            return "", set()
        same_case = PurePosixPath(converted[0]).stem == stem
        return converted[0], {SUFFIX} if same_case else {SUFFIX, CASE}

    def _read(self, folder: str) -> dict[str, bool]:
        """Return the names in a folder, and whether each is a file. A folder that cannot be read has none."""
        if folder not in self._entries:
            names = {}
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    for entry in entries:
                        names[entry.name] = os.path.isfile(entry) if entry.is_symlink() else entry.is_file()
            except (OSError, ValueError):  # ValueError: a null character in the path
                pass
            self._entries[folder] = names
        return self._entries[folder]

    def _similar(self, folder: str, name: str) -> list[str]:
        """Return the names in a folder that are equal but for letter case and the form of accents."""
        if folder not in self._alike:
            alike = defaultdict(list)
            for other in self._read(folder):
                alike[_key(other)].append(other)
            self._alike[folder] = alike
        return self._alike[folder].get(_key(name), [])

    def _by_stem(self, folder: str) -> dict[str, list[str]]:
        """Return the names of the videos in a folder by the key of their name without suffix."""
        if folder not in self._stems:
            stems = defaultdict(list)
            for name, is_file in self._read(folder).items():
                if is_file and has_video_name(PurePosixPath(name)):
                    stems[_key(PurePosixPath(name).stem)].append(name)
            self._stems[folder] = stems
        return self._stems[folder]


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@dataclass(frozen=True, kw_only=True)
class ListedVideos:
    """The videos of lists, with the paths that they have on disk."""

    splits: dict[str, list[Video]]
    missing: dict[str, list[Video]]
    warnings: list[str]
    """One line for each kind of difference between the lists and the disk."""


def find_videos(disk: Disk, listed: Mapping[str, Sequence[Video]]) -> ListedVideos:
    """Return the listed videos with the paths that they have on disk, and those that the disk does not hold.

    A file that a list names exactly is never taken for another listed video. Two listed videos never become one file:
    then both are missing.
    """
    paths = list(dict.fromkeys(video.path for split in SPLITS for video in listed.get(split, ())))
    found = {path: disk.find(path) for path in paths}
    listed_as = defaultdict(list)
    for path, (file, _) in found.items():
        listed_as[file].append(path)
    found = {
        path: (file, differences) if not differences or len(listed_as[file]) == 1 else ("", set())
        for path, (file, differences) in found.items()
    }
    splits: dict[str, list[Video]] = {}
    missing: dict[str, list[Video]] = {}
    for split, videos in listed.items():
        for video in videos:
            file = found[video.path][0]
            group = (splits if file else missing).setdefault(split, [])
            group.append(Video(path=file or video.path, label=video.label, group=video.group))
    return ListedVideos(splits=splits, missing=missing, warnings=_describe(found))


def _describe(found: Mapping[str, tuple[str, set[str]]]) -> list[str]:
    """Return a line for each kind of difference between listed paths and files."""
    lines = []
    for difference in (BACKSLASHES, CASE, SUFFIX):
        if examples := [(path, file) for path, (file, differences) in found.items() if difference in differences]:
            path, file = examples[0]
            lines.append(
                f"{count_videos(len(examples), 'is', 'are')} listed {difference}: for {path!r}, {file} is read"
            )
    if gone := [path for path, (file, _) in found.items() if not file and "\\" in path]:
        lines.append(
            f"{count_videos(len(gone), 'is', 'are')} not on disk and listed {BACKSLASHES}, such as {gone[0]!r}: "
            "write paths with slashes"
        )
    return lines


def describe_equal_names(equal: Sequence[Sequence[str]]) -> list[str]:
    """Return a line about listed videos of which several files have the name. `equal`: the paths of each video."""
    if not equal:
        return []
    count = count_videos(len(equal), "has", "have")
    return [f"{count} several files of the same name, such as {equal[0][0]} and {equal[0][1]}: the first is read"]


def count_videos(count: int, one: str, many: str) -> str:
    """Return a number of videos and the verb that fits, such as "1 video is"."""
    return f"{count:,} video{'' if count == 1 else 's'} {one if count == 1 else many}"
