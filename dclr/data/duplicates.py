"""Videos that a data set lists more than once: by the same path, by links, or as files with equal content.

A video with two labels harms training. A video in train and test makes the test invalid. Files are compared by content
only if their sizes in bytes are equal: first by their first and last 64 KiB, then whole. Verification has recorded
digests of the ends, because many of a million files have equal sizes. A packed store is compared by the checksums in
its index, without reading videos.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dclr.data.catalog import SPLITS, Catalog, Video
from dclr.data.coverage import shorten
from dclr.data.file_content import (
    DIGEST_BYTES,
    THREADS,
    WHOLE_DIGEST_BYTES,
    digest_of_all,
    digest_of_ends,
    find_status,
)
from dclr.data.manifest import known_digests
from dclr.data.store_files import Arrays
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError

OFFICIAL = ("UCF101", "HMDB51", "Kinetics-400", "Something-Something v2", "Diving48")
"""Layouts whose lists and labels were published. Users cannot correct them."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The videos of a data set that are listed more than once."""

    root: Path
    """The data folder."""
    two_labels: tuple[str, ...]
    """Phrases that name a video, or two files with equal content, and the different labels."""
    refused: tuple[str, ...]
    """Those of `two_labels` that are refused. Only official lists may give two labels to two files of equal content,
    because their figures would no longer be comparable without one of the files."""
    repeated: dict[str, tuple[str, ...]]
    """Split -> paths of entries that repeat an earlier entry of the split with the same label."""
    shared: dict[str, tuple[str, ...]]
    """Two splits, such as "train and test" -> the videos that are in both. Two paths with equal content are joined
    by " = "."""

    def lines(self) -> list[str]:
        """Return one line for each kind of duplicate that was found."""
        lines = []
        if self.two_labels:
            lines.append(f"{_videos(self.two_labels, 'has', 'have')} two labels: {shorten(self.two_labels)}")
        for splits, paths in self.shared.items():
            lines.append(f"{_videos(paths, 'is', 'are')} in both {splits}: {shorten(paths)}")
        for split, paths in self.repeated.items():
            lines.append(f"{_videos(paths, 'is', 'are')} listed more than once in {split}: {shorten(paths)}")
        return lines

    def check_labels(self) -> None:
        """Raise UserError if `refused` names a video."""
        if self.refused:
            more = f", and {len(self.refused) - 1} more such videos" if len(self.refused) > 1 else ""
            raise UserError(
                f"{self.root}: {self.refused[0]}{more}: one video cannot have two labels; correct the lists or "
                "delete the wrong file"
            )

    def report(self) -> dict[str, Any]:
        """Return the entry of report.json."""
        return {
            "two_labels": list(self.two_labels),
            "in_two_splits": {splits: list(paths) for splits, paths in self.shared.items()},
            "listed_more_than_once": {split: list(paths) for split, paths in self.repeated.items()},
        }


def find_duplicates(catalog: Catalog, unreadable: Collection[str] = ()) -> Duplicates:
    """Compare all listed videos with each other.

    If the test split is the val split, because the data set has no test split of its own, it is compared once.

    Args:
        unreadable: paths of videos that no result uses. They are not compared: failed downloads are often equal.
    """
    splits = {split: catalog.splits[split] for split in SPLITS if split in catalog.splits}
    if splits.get("val") == splits.get("test"):
        splits.pop("val", None)
    listed = dict.fromkeys(video.path for videos in splits.values() for video in videos)
    compared = [path for path in listed if path not in unreadable]
    content = (
        content_of_files(catalog.root, compared) if catalog.index is None else content_in_store(catalog.index, compared)
    )
    number_of = dict(zip(compared, content.tolist(), strict=True))
    numbers = {
        split: np.array([number_of.get(video.path, -1) for video in videos], np.int64)
        for split, videos in splits.items()
    }
    every = _join([*numbers.values()])
    counts = np.bincount(every[every >= 0], minlength=1)
    entries: dict[int, list[tuple[str, Video]]] = defaultdict(list)
    for split, videos in splits.items():
        for position in np.flatnonzero((numbers[split] >= 0) & (counts[numbers[split]] > 1)).tolist():
            entries[int(numbers[split][position])].append((split, videos[position]))
    two_labels: list[str] = []
    refused: list[str] = []
    repeated: dict[str, list[str]] = defaultdict(list)
    shared: dict[str, list[str]] = defaultdict(list)
    for equal in entries.values():
        by_label = {video.label: video for _, video in equal if video.label >= 0}
        if len(by_label) > 1:
            first, second, *_ = by_label.values()
            two_labels.append(_two_labels(first, second, catalog.classes))
            if first.path == second.path or not catalog.layout.startswith(OFFICIAL):
                refused.append(two_labels[-1])
        by_split: dict[str, list[Video]] = defaultdict(list)
        for split, video in equal:
            by_split[split].append(video)
        for one, other in combinations(by_split, 2):
            names = dict.fromkeys((by_split[one][0].path, by_split[other][0].path))
            shared[f"{one} and {other}"].append(" = ".join(names))
        for split, videos_of_split in by_split.items():
            labels = set[int]()
            for video in videos_of_split:
                if video.label in labels:
                    repeated[split].append(video.path)
                labels.add(video.label)
    return Duplicates(
        root=catalog.root,
        two_labels=tuple(two_labels),
        refused=tuple(refused),
        repeated={split: tuple(paths) for split, paths in repeated.items()},
        shared={names: tuple(paths) for names, paths in shared.items()},
    )


def content_in_store(index: Arrays, paths: Sequence[str]) -> np.ndarray:
    """Return a number for each video, (number of paths,) int64. Videos with equal frames have the same number.

    It is -1 for a video that the store does not hold.
    """
    columns = [index[name].tolist() for name in ("sizes", "crc32", "frames", "heights", "widths")]
    stored = (index["shards"] >= 0).tolist()
    rows = zip(unpack_strings(index["paths"]), stored, zip(*columns, strict=True), strict=True)
    frames = {path: numbers for path, is_stored, numbers in rows if is_stored}
    first: dict[tuple[int, ...], int] = {}
    return np.array(
        [first.setdefault(frames[path], number) if path in frames else -1 for number, path in enumerate(paths)],
        np.int64,
    )


def content_of_files(root: Path, paths: Sequence[str]) -> np.ndarray:
    """Return a number for each file, (number of paths,) int64. Files with equal content have the same number.

    It is -1 for a file that is empty or cannot be read.
    """
    status = find_status(root, paths)
    sizes, inodes = status.stamps[:, 0], status.numbers[:, 1]
    usable = np.flatnonzero(sizes)  # files that are empty or cannot be read have size 0
    content = np.full(len(paths), -1, np.int64)
    content[usable] = usable  # the position of the first file with the same content
    # Some network disks give several files the same inode number, or all files the number 0.
    for links in _equal(status.numbers, usable[inodes[usable] != 0]):
        content[links] = links[0]

    same_size = _join(_equal(sizes[:, None], usable[content[usable] == usable]))
    if len(same_size):
        ends = known_digests(root, paths, status)
        with ThreadPoolExecutor(THREADS) as pool:

            def read(files: np.ndarray, digest: Callable[[Path], bytes | None], size: int) -> np.ndarray:
                """Return the digests of files, (number of files, size) uint8. Zeros: the file cannot be read."""
                found = pool.map(lambda file: digest(root / paths[file]), files.tolist())
                packed = b"".join(value or bytes(size) for value in found)
                return np.frombuffer(packed, np.uint8).reshape(-1, size)

            unknown = same_size[~ends[same_size].any(axis=1)]
            ends[unknown] = read(unknown, digest_of_ends, DIGEST_BYTES)
            keys = np.column_stack([sizes, ends.view(np.int64)])
            same_ends = _join(_equal(keys, same_size[ends[same_size].any(axis=1)]))
            whole = read(same_ends, digest_of_all, WHOLE_DIGEST_BYTES)
        for members in _equal(whole.view(np.int64), np.flatnonzero(whole.any(axis=1))):
            content[same_ends[members]] = same_ends[members[0]]
    content[usable] = content[content[usable]]  # links to a file whose content is that of another one
    return content


def _equal(values: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
    """Return the groups of positions that have equal rows of values, each with at least two positions, in increasing
    order.

    Args:
        values: (N, k) int64.
        positions: (M,) int64, in increasing order.
    """
    ordered = positions[np.lexsort(values[positions].T)]
    begins = np.flatnonzero(np.append(True, (values[ordered[1:]] != values[ordered[:-1]]).any(axis=1)))
    ends = np.append(begins, len(ordered))[1:]
    several = ends - begins > 1
    return [ordered[begin:end] for begin, end in zip(begins[several].tolist(), ends[several].tolist(), strict=True)]


def _join(groups: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *groups])


def _two_labels(first: Video, second: Video, classes: tuple[str, ...]) -> str:
    one, other = classes[first.label], classes[second.label]
    if first.path == second.path:
        return f"{first.path} is listed as {one} and as {other}"
    return f"{first.path} ({one}) and {second.path} ({other}) are the same video"


def _videos(paths: Collection[str], singular: str, plural: str) -> str:
    return f"1 video {singular}" if len(paths) == 1 else f"{len(paths)} videos {plural}"
