"""Check a data set (train.py check): print its layout, its videos by split and class, and every unreadable video."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dclr.config import DataConfig
from dclr.data.catalog import Catalog, Video, describe_reading
from dclr.data.coverage import class_warnings, coverage, missing_of_unknown_split
from dclr.data.datasets import make_demo, open_data
from dclr.data.decode import VideoRecord
from dclr.data.display import Displays, collect_displays
from dclr.data.duplicates import find_duplicates
from dclr.data.manifest import Manifest, load_manifest
from dclr.data.store import Arrays, Store, damaged_shards, open_store, pack_command
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError, printable


def check(data: DataConfig) -> None:
    """Print the findings. Unreadable videos are findings and no error.

    Raises UserError: no data set is recognised, or a packed store is damaged.
    """
    if not data.data:
        make_demo()
    catalog, workers = open_data(data), max(1, data.workers)
    if catalog.index is not None:
        check_store(catalog, catalog.index, workers)
        return
    manifest = load_manifest(catalog.root, sorted(videos_of(catalog)), workers=workers, timeout=data.video_timeout)
    lines = [*describe_catalog(catalog), *describe_videos(catalog, manifest), *describe_missing(catalog)]
    print("\n".join([*lines, *describe_faults(catalog, manifest.unreadable)]))


def check_store(catalog: Catalog, index: Arrays, workers: int) -> None:
    """Compare every checksum of a packed store and print the findings. Raises UserError, naming the damaged shards."""
    store = open_store(catalog.root, index)
    damaged = damaged_shards(store, workers)
    lines = [*describe_catalog(catalog), *describe_store(store), *describe_missing(catalog)]
    print("\n".join([*lines, *describe_faults(catalog, store.unreadable)]))
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
    records = [manifest.records[path] for path in videos_of(catalog) if path in manifest.records]
    if records:
        frames = sorted(record.frames for record in records)
        lines.append(
            f"readable: {len(records)}; frames: {frames[0]} to {frames[-1]}, median {frames[len(frames) // 2]}"
        )
        lines.append(describe_sizes(*np.array([(record.width, record.height) for record in records]).T))
        lines += describe_streams(manifest.records)
        lines += describe_displays(
            collect_displays((record.display, record.oblique, record.interlaced) for record in records),
            [path for path in videos_of(catalog) if path in manifest.records],
        )
        wrong = sum(record.declared not in (0, record.frames) for record in records)
        lines.append(
            f"declare another number of frames than they hold: {wrong}; not safe to seek, read from the start: "
            f"{sum(not record.seekable for record in records)}"
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


def describe_streams(records: Mapping[str, VideoRecord]) -> list[str]:
    """Return lines about files with several video streams, files whose end is missing and damaged files."""
    several = {
        path: f"{record.video_streams} streams, read the one of {record.width} x {record.height}"
        for path, record in records.items()
        if record.video_streams > 1
    }
    cut = {
        path: f"holds {record.frames} of about {record.cut_from} frames"
        for path, record in records.items()
        if record.cut_from
    }
    damaged = {path: f"{record.frames} frames; {record.damage}" for path, record in records.items() if record.damage}
    lines = []
    for title, videos in {
        "several video streams, the default or else the largest is read": several,
        "end early, because the end of the file is missing": cut,
        "readable, but FFmpeg reports errors, so frames may be missing or damaged": damaged,
    }.items():
        if videos:
            lines.append(f"{title}: {len(videos)}")
            lines += [f"  {printable(path)}: {printable(text)}" for path, text in videos.items()]
    return lines


def describe_sizes(widths: np.ndarray, heights: np.ndarray) -> str:
    """Return a line with the three most frequent sizes."""
    sizes = Counter(f"{width} x {height}" for width, height in zip(widths, heights, strict=True))
    return "sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(3))


def describe_unreadable(unreadable: Mapping[str, str]) -> list[str]:
    """Return lines with the number of unreadable videos, and each one with its reason."""
    return [
        f"unreadable: {len(unreadable)}",
        *(f"  {printable(path)}: {printable(reason)}" for path, reason in sorted(unreadable.items())),
    ]


def describe_faults(catalog: Catalog, unreadable: Mapping[str, str]) -> list[str]:
    """Return a line for each fault that spoils training or figures: missing videos, empty classes and duplicates."""
    gaps = [coverage(catalog, split, unreadable).sentence() for split in catalog.splits]
    gaps += missing_of_unknown_split(catalog)
    gaps += catalog.warnings
    lines = [*filter(None, gaps), *class_warnings(catalog), *find_duplicates(catalog, unreadable).lines()]
    return [f"warning: {printable(line)}" for line in lines]


def describe_missing(catalog: Catalog) -> list[str]:
    """Return lines with the videos that the lists name and the disk does not hold; none if there are no such videos."""
    paths = list(dict.fromkeys(video.path for videos in catalog.missing.values() for video in videos))
    return [f"listed but not on disk: {len(paths)}", *(f"  {printable(path)}" for path in paths)] if paths else []
