"""train.py check: what a data set is recognised as, its videos by split and class, and every one that cannot be read."""

from collections import Counter

from dclr.config import DataConfig
from dclr.data.catalog import Catalog
from dclr.data.manifest import Manifest, load_manifest
from dclr.run import make_demo, open_data


def check(data: DataConfig) -> None:
    """Print the findings; exit status 0, whatever is unreadable. Raises UserError: nothing recognised."""
    if not data.data:
        make_demo()
    catalog = open_data(data)
    paths = sorted({video.path for videos in catalog.splits.values() for video in videos})
    manifest = load_manifest(catalog.root, paths, workers=max(1, data.workers))
    print("\n".join(describe(catalog, manifest)))


def describe(catalog: Catalog, manifest: Manifest) -> list[str]:
    """The lines that `check` prints."""
    everything = {video.path: video for videos in catalog.splits.values() for video in videos}
    classes = f"{len(catalog.classes)} classes" if catalog.classes else "no labels"
    lines = [f"{catalog.root}: {catalog.layout}, {len(everything)} videos, {classes}"]
    names = list(catalog.splits)
    counts = {name: Counter(video.label for video in catalog.splits[name]) for name in names}
    wide = max([len(name) for name in catalog.classes] + [10])
    lines.append(f"  {'class':{wide}}" + "".join(f"{name:>8}" for name in names))
    for label, class_name in enumerate(catalog.classes):
        lines.append(f"  {class_name:{wide}}" + "".join(f"{counts[name][label]:8}" for name in names))
    lines.append(f"  {'all':{wide}}" + "".join(f"{len(catalog.splits[name]):8}" for name in names))

    records = [manifest.records[path] for path in everything if path in manifest.records]
    if records:
        frames = sorted(record.frames for record in records)
        sizes = Counter(f"{record.width} x {record.height}" for record in records).most_common(3)
        lines.append(
            f"readable: {len(records)}; frames: {frames[0]} to {frames[-1]}, median {frames[len(frames) // 2]}"
        )
        lines.append("sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes))
        lied = sum(record.declared not in (0, record.frames) for record in records)
        lines.append(
            f"declare another number of frames than they hold: {lied}; not safe to seek, read from the start: "
            f"{sum(not record.seekable for record in records)}"
        )
    lines.append(f"unreadable: {len(manifest.unreadable)}")
    lines += [f"  {path}: {reason}" for path, reason in sorted(manifest.unreadable.items())]
    if catalog.missing:
        lines.append(f"listed but not on disk: {len(catalog.missing)}")
        lines += [f"  {path}" for path in catalog.missing]
    return lines
