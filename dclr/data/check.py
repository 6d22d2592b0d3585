"""Check a data set (train.py check): print its layout, its videos by split and class, and the unreadable videos."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dclr.config import DataConfig
from dclr.data.catalog import Catalog, Video, describe_reading
from dclr.data.coverage import class_warnings, coverage
from dclr.data.datasets import make_demo, open_data
from dclr.data.display import Displays
from dclr.data.duplicates import find_duplicates
from dclr.data.manifest import Manifest, RecordsByPath, load_manifest
from dclr.data.store import Store, open_store, pack_command
from dclr.data.store_damage import damaged_shards
from dclr.data.store_files import Arrays
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError, printable
from dclr.report import write_json

SHOWN_VIDEOS = 10
"""Most videos that are named for one kind of finding. A report names all."""

SHOWN_REASONS = 5
"""Most reasons whose videos are counted, if there are more unreadable videos than SHOWN_VIDEOS."""


def check(data: DataConfig, report: str = "") -> None:
    """Print the findings. Unreadable videos are findings, and not errors.

    Args:
        report: a JSON file to write, with all missing and unreadable videos; empty: none is written.

    Raises UserError: no data set is recognised, a packed store is damaged, or the report cannot be written.
    """
    if report and not Path(report).absolute().parent.is_dir():  # noticed before hours of verifying
        raise UserError(f"--report {report}: no such folder: {Path(report).parent}")
    if report and Path(report).is_dir():
        raise UserError(f"--report {report} is a folder: give a file")
    if not data.data:
        make_demo()
    catalog, workers = open_data(data), max(1, data.workers)
    if catalog.index is not None:
        check_store(catalog, catalog.index, workers, report)
        return
    manifest = load_manifest(catalog.root, sorted(videos_of(catalog)), workers=workers, timeout=data.video_timeout)
    lines = [*describe_catalog(catalog), *describe_videos(catalog, manifest), *describe_missing(catalog)]
    print("\n".join([*lines, *describe_faults(catalog, manifest.unreadable)]))
    if report:
        write_report(report, catalog, manifest.unreadable)


def write_report(file: str, catalog: Catalog, unreadable: Mapping[str, str]) -> None:
    """Write the paths of all missing videos, and those of all unreadable videos with their reasons."""
    try:
        write_json(Path(file), {"missing": missing_paths(catalog), "unreadable": dict(sorted(unreadable.items()))})
    except OSError as error:
        raise UserError(f"--report {file} cannot be written: {error.strerror}") from None


def check_store(catalog: Catalog, index: Arrays, workers: int, report: str) -> None:
    """Check every checksum of a packed store and print the findings. Raises UserError if shards are damaged."""
    store = open_store(catalog.root, index)
    damaged = damaged_shards(store, workers)
    lines = [*describe_catalog(catalog), *describe_store(store), *describe_missing(catalog)]
    print("\n".join([*lines, *describe_faults(catalog, store.unreadable)]))
    if report:
        write_report(report, catalog, store.unreadable)
    for shard, fault in damaged.items():
        print(f"  {shard} {fault}")
    if damaged and store.remote is not None:
        raise UserError(
            f"damaged shards, {len(damaged)} of {store.shards.max() + 1}: upload {', '.join(damaged)} of the store to "
            f"{catalog.root} again"
        )
    if damaged:
        names = " ".join(str(Path(catalog.root, shard)) for shard in damaged)
        raise UserError(
            f"damaged shards, {len(damaged)} of {store.shards.max() + 1}: rm -r {names}; then run "
            f"`{pack_command(catalog.root, index)}`, which makes only these again"
        )


def videos_of(catalog: Catalog) -> dict[str, Video]:
    """Return the videos of all splits by path."""
    return {video.path: video for videos in catalog.splits.values() for video in videos}


def describe_catalog(catalog: Catalog) -> list[str]:
    """Return lines with the layout, how it was read, and the number of videos of each class in each split."""
    classes = f"{len(catalog.classes)} classes" if catalog.classes else "no labels"
    lines = [f"{catalog.root}: {catalog.layout}, {len(videos_of(catalog))} videos, {classes}"]
    lines += [f"  {line}" for line in describe_reading(catalog)]
    names, class_names = list(catalog.splits), [printable(name) for name in catalog.classes]
    counts = {name: Counter(video.label for video in catalog.splits[name]) for name in names}
    wide = max([len(name) for name in class_names] + [10])
    lines.append(f"  {'class':{wide}}" + "".join(f"{name:>8}" for name in names))
    for label, class_name in enumerate(class_names):
        lines.append(f"  {class_name:{wide}}" + "".join(f"{counts[name][label]:8}" for name in names))
    lines.append(f"  {'all':{wide}}" + "".join(f"{len(catalog.splits[name]):8}" for name in names))
    return lines


def describe_store(store: Store) -> list[str]:
    """Return lines about the content of a packed store, over all splits."""
    there = store.shards >= 0
    kind = "compact" if store.compact else "planes"
    return [
        f"store: {kind}, shards: {store.shards.max() + 1}, {store.sizes.sum() / 1e9:,.2f} GB, "
        f"{store.frames.sum():,} frames",
        describe_sizes(store.widths[there], store.heights[there]),
        *describe_displays(store.displays, unpack_strings(store.packed_paths)),
        *describe_unreadable(store.unreadable),
    ]


def describe_videos(catalog: Catalog, manifest: Manifest) -> list[str]:
    """Return lines about what a complete decode of every video found."""
    lines = []
    paths = [path for path in videos_of(catalog) if path in manifest.records]
    if paths:
        records = manifest.records.records.select(manifest.records.rows(paths))
        frames = np.sort(records.frames)
        lines.append(f"readable: {len(paths)}; frames: {frames[0]} to {frames[-1]}, median {frames[len(frames) // 2]}")
        lines.append(describe_sizes(records.sizes[:, 1], records.sizes[:, 0]))
        lines += describe_streams(manifest.records)
        lines += describe_displays(records.displays, paths)
        wrong = np.count_nonzero((records.declared != 0) & (records.declared != records.frames))
        lines.append(
            f"declare another number of frames than they hold: {wrong}; not safe to seek, read from the start: "
            f"{np.count_nonzero(~records.seekable)}"
        )
    return [*lines, *describe_unreadable(manifest.unreadable)]


def describe_displays(displays: Displays, paths: Sequence[str]) -> list[str]:
    """Return a line for each way in which videos are not shown as coded, or not progressive, with an example."""
    lines = {
        "rotated": "rotated when shown: {}; views are turned upright",
        "rotated_by_other_angle": "rotated by an angle that is not a multiple of 90 degrees: {}; the nearest is used",
        "pixels_not_square": "pixels not square: {}; views are made in square pixels",
        "pixel_aspect_ignored": "pixel aspect outside 1:4 to 4:1: {}; pixels are taken as square",
        "interlaced": "interlaced: {}; both fields stay in one frame",
    }
    return [
        lines[name].format(f"{len(found)} video{'s' * (len(found) > 1)}, such as {printable(paths[found[0]])}")
        for name, found in displays.unusual().items()
        if len(found)
    ]


def describe_streams(found: RecordsByPath) -> list[str]:
    """Return lines about files with several video streams, files whose end is missing and damaged files."""
    paths, records = found.paths, found.records
    several = {
        paths[row]: f"{records.video_streams[row]} streams, read the one of {width} x {height}"
        for row in np.flatnonzero(records.video_streams > 1).tolist()
        for height, width in [records.sizes[row].tolist()]
    }
    cut = {
        paths[row]: f"holds {records.frames[row]} of about {records.cut_from[row]} frames"
        for row in np.flatnonzero(records.cut_from).tolist()
    }
    damaged = {
        paths[row]: f"{records.frames[row]} frames; {damage}"
        for row, damage in enumerate(unpack_strings(records.damages))
        if damage
    }
    lines = []
    for title, videos in {
        "several video streams, the default or else the largest is read": several,
        "end early, because the end of the file is missing": cut,
        "readable, but FFmpeg reports errors, so frames may be missing or damaged": damaged,
    }.items():
        if videos:
            lines += [f"{title}: {len(videos)}", *name_first(videos)]
    return lines


def describe_sizes(widths: np.ndarray, heights: np.ndarray) -> str:
    """Return a line with the three most frequent sizes."""
    sizes = Counter(f"{width} x {height}" for width, height in zip(widths, heights, strict=True))
    return "sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(3))


def describe_unreadable(unreadable: Mapping[str, str]) -> list[str]:
    """Return lines with the number of unreadable videos, and the first ones with their reasons."""
    lines = [f"unreadable: {len(unreadable)}"]
    if len(unreadable) > SHOWN_VIDEOS:
        counted = Counter(unreadable.values()).most_common(SHOWN_REASONS)
        lines += [f"  {printable(reason)}: {count} videos" for reason, count in counted if count > 1]
    return [*lines, *name_first(dict(sorted(unreadable.items())))]


def name_first(videos: Mapping[str, str]) -> list[str]:
    """Return a line for each of the first videos (path -> text, which may be empty), and how many more there are."""
    first = list(islice(videos.items(), SHOWN_VIDEOS))
    lines = [f"  {printable(path)}{': ' if text else ''}{printable(text)}" for path, text in first]
    more = len(videos) - len(first)
    return [*lines, f"  and {more} more: --report FILE writes all missing and unreadable videos"] if more else lines


def describe_faults(catalog: Catalog, unreadable: Mapping[str, str]) -> list[str]:
    """Return a line for each fault that harms training or figures: missing videos, empty classes and duplicates."""
    gaps = [coverage(catalog, split, unreadable).sentence() for split in catalog.splits]
    lines = [*filter(None, gaps), *catalog.warnings, *class_warnings(catalog)]
    lines += find_duplicates(catalog, unreadable).lines()
    return [f"warning: {printable(line)}" for line in lines]


def describe_missing(catalog: Catalog) -> list[str]:
    """Return lines with the number of videos that the lists name and the disk does not hold, and the first of them.

    There are no lines if there are no such videos.
    """
    paths = missing_paths(catalog)
    return [f"listed but not on disk: {len(paths)}", *name_first(dict.fromkeys(paths, ""))] if paths else []


def missing_paths(catalog: Catalog) -> list[str]:
    """Return the paths of all missing videos, each once."""
    return list(dict.fromkeys(video.path for videos in catalog.missing.values() for video in videos))
