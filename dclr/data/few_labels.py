"""Training on few labels: the videos of the train split that --label-share or --shots keeps.

The videos of a class are ranked by a hash of the seed and their path, and the first ones are kept. So the choice
depends only on the seed and the listed paths: every method, command and machine trains on the same videos. A larger
share keeps all videos of a smaller one. Listed videos that are not on disk are ranked too, so an incomplete data set
does not change the choice. Those that are chosen are then missing, which --max-missing counts.

Kinetics, Something-Something v2 and Diving48 list ids and no paths. There, a video is ranked by its path on disk, or by
its id if it is missing. So other missing videos or other folders change the choice.
"""

import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

from dclr.data.catalog import Catalog, Video
from dclr.errors import UserError, printable


def keep_few(catalog: Catalog, share: float, shots: int, seed: int) -> tuple[Catalog, dict[str, Any]]:
    """Return the catalog with few videos in its train split, and the entry of report.json about them.

    Args:
        share: share of each class's videos, above 0 to 1. The number is rounded, and each class keeps at least 1.
        shots: number of videos of each class; 0: `share` counts.

    Raises UserError: a class has fewer videos than `shots`, or no kept video is on disk.
    """
    there, absent = catalog.videos("train"), catalog.missing.get("train", ())
    by_class: dict[int, list[str]] = defaultdict(list)
    for video in (*there, *absent):
        by_class[video.label].append(video.path)
    kept: set[str] = set()
    for label, paths in by_class.items():
        ranked = sorted(dict.fromkeys(paths), key=lambda path: _rank(seed, path))
        if shots > len(ranked):
            raise UserError(
                f"--shots is {shots}, but class {printable(catalog.classes[label])} of {catalog.root} has only "
                f"{len(ranked)} train videos: lower it, or use --label-share"
            )
        kept.update(ranked[: shots or max(1, math.floor(share * len(ranked) + 0.5))])

    def chosen(videos: tuple[Video, ...]) -> tuple[Video, ...]:
        return tuple(video for video in videos if video.path in kept)

    if not chosen(there):
        raise UserError(
            f"{catalog.root}: the {len(kept)} train videos that --label-share or --shots keeps are not on disk, such "
            f"as {min(kept)}: complete the data set, or give another --seed"
        )
    missing = {**catalog.missing, "train": chosen(absent)}
    few = replace(
        catalog,
        splits={**catalog.splits, "train": chosen(there)},
        missing={split: found for split, found in missing.items() if found},
    )
    counts = Counter(video.label for video in (*chosen(there), *chosen(absent)))
    return few, {
        "videos": counts.total(),
        "of": len(there) + len(absent),
        "by_class": {catalog.classes[label]: count for label, count in sorted(counts.items())},
        "fingerprint": hashlib.sha256("\0".join(sorted(kept)).encode("utf-8", "surrogateescape")).hexdigest()[:16],
    }


def _rank(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogateescape")).digest()
