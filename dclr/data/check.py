"""train.py check: what a data set is recognised as, its videos by split and class, and every one that cannot be read."""

from collections import Counter
from pathlib import Path

from dclr.config import DataConfig
from dclr.data import store
from dclr.data.catalog import Catalog
from dclr.data.datasets import make_demo, open_data
from dclr.data.manifest import Manifest, load_manifest
from dclr.errors import UserError


def check(data: DataConfig) -> None:
    """Print the findings; exit status 0, whatever is unreadable. Raises UserError: nothing recognised, or a packed store is damaged."""
    if not data.data:
        make_demo()
    catalog = open_data(data)
    if store.is_store(catalog.root):
        check_store(catalog, workers=max(1, data.workers))
        return
    paths = sorted({video.path for videos in catalog.splits.values() for video in videos})
    manifest = load_manifest(catalog.root, paths, workers=max(1, data.workers), timeout=data.video_timeout)
    print("\n".join([*describe_catalog(catalog), *describe_videos(catalog, manifest), *describe_missing(catalog)]))


def check_store(catalog: Catalog, workers: int) -> None:
    """The same for a packed store, after comparing every checksum. Raises UserError, naming the shards that are damaged."""
    index = store.load_index(catalog.root)
    packed = store.store_of(catalog.root, index)
    damaged = store.damaged_shards(packed, workers)
    print("\n".join([*describe_catalog(catalog), *describe_store(packed), *describe_missing(catalog)]))
    for shard, fault in damaged.items():
        print(f"  {shard} {fault}")
    if damaged:
        names = " ".join(str(Path(catalog.root, shard)) for shard in damaged)
        raise UserError(
            f"damaged shards, {len(damaged)} of {packed.shards.max() + 1}: rm -r {names}; then run "
            f"`{store.pack_command(catalog.root, index)}`, which makes only these again"
        )


def describe_catalog(catalog: Catalog) -> list[str]:
    """What was recognised, and how many videos of each class are in each split."""
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
    return lines


def describe_store(packed: store.Store) -> list[str]:
    """What is in the store, over all splits."""
    there = packed.shards >= 0
    kind = "compact" if packed.compact else "planes"
    sizes = Counter(f"{w} x {h}" for w, h in zip(packed.widths[there], packed.heights[there], strict=True))
    return [
        f"store: {kind}, shards: {packed.shards.max() + 1}, {packed.sizes.sum() / 1e9:,.2f} GB, {packed.frames.sum():,} frames",
        "sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(3)),
        f"unreadable: {len(packed.unreadable)}",
        *(f"  {path}: {reason}" for path, reason in sorted(packed.unreadable.items())),
    ]


def describe_videos(catalog: Catalog, manifest: Manifest) -> list[str]:
    """What a complete decode of every video found."""
    lines = []
    everything = dict.fromkeys(video.path for videos in catalog.splits.values() for video in videos)
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
    return lines


def describe_missing(catalog: Catalog) -> list[str]:
    """What the lists name and the disk did not hold, where there is any."""
    if not catalog.missing:
        return []
    return [f"listed but not on disk: {len(catalog.missing)}", *(f"  {path}" for path in catalog.missing)]
