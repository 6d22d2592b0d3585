"""The listed videos that a result is computed from, and the limit --max-missing.

Results of different people are comparable only if they are computed from the same videos. So every result says how many
of the listed videos it does not use, and which classes have no video.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dclr.data.catalog import Catalog
from dclr.errors import UserError, printable

SHOWN = 3
"""The most names in one line."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The listed videos of one split, and those that a result does not use."""

    root: Path
    """The data folder."""
    split: str
    """train, val or test."""
    listed: int
    """Number of listed videos."""
    used: int
    """Number of videos that the result is computed from."""
    missing: tuple[str, ...]
    """Paths of the listed videos that are not on disk."""
    unreadable: dict[str, str]
    """Path -> reason, of the videos on disk that cannot be read."""
    classes: dict[str, tuple[int, int]]
    """Class name -> number of listed and of used videos. Empty if the split has no labels."""

    @property
    def empty_classes(self) -> list[str]:
        """Names of the classes that have no used video in the split."""
        return [name for name, (_, used) in self.classes.items() if not used]

    def sentence(self) -> str:
        """Return what is missing, such as "8 of 12 listed test videos (4 not on disk); class X has none".

        The sentence is empty if nothing is missing.
        """
        empty = self.empty_classes
        if self.used == self.listed and not empty:
            return ""
        absent = len(self.missing)
        reasons = {"not on disk": absent, "unreadable": self.listed - self.used - absent}
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        counts = f"{self.used} of {self.listed} listed {self.split} videos" + (f" ({counted})" if counted else "")
        if not empty:
            return counts
        have = f"class {printable(empty[0])} has" if len(empty) == 1 else f"{len(empty)} classes have"
        return f"{counts}; {have} none" + (f": {shorten(empty)}" if len(empty) > 1 else "")

    def check(self, max_missing: float) -> None:
        """Raise UserError if more than `max_missing` percent of the listed videos are missing or unreadable."""
        share = 100 * (self.listed - self.used) / max(1, self.listed)
        if share > max_missing:
            first = [*self.missing, *self.unreadable][0]
            raise UserError(
                f"{self.root}: {self.sentence()}; {share:.3g} % are not there, and --max-missing "
                f"allows {max_missing:g} %; the first is {first}: complete the data set, or raise --max-missing"
            )

    def report(self) -> dict[str, Any]:
        """Return the entry of report.json."""
        return {
            "listed": self.listed,
            "used": self.used,
            "missing": list(self.missing),
            "unreadable": self.unreadable,
            "classes": {name: {"listed": listed, "used": used} for name, (listed, used) in self.classes.items()},
        }


def coverage(catalog: Catalog, split: str, unreadable: Mapping[str, str]) -> Coverage:
    """Return what a result uses of a split.

    Args:
        unreadable: path -> reason, of videos that cannot be read. Other splits' videos may be among them.
    """
    there, missing = catalog.splits.get(split, ()), catalog.missing.get(split, ())
    listed = Counter(video.label for video in (*there, *missing))
    used = Counter(video.label for video in there if video.path not in unreadable)
    labelled = any(label >= 0 for label in listed)
    return Coverage(
        root=catalog.root,
        split=split,
        listed=len(there) + len(missing),
        used=used.total(),
        missing=tuple(video.path for video in missing),
        unreadable={video.path: unreadable[video.path] for video in there if video.path in unreadable},
        classes={name: (listed[label], used[label]) for label, name in enumerate(catalog.classes) if labelled},
    )


def class_warnings(catalog: Catalog) -> list[str]:
    """Return lines about classes that have test videos but no training videos, which no classifier can learn."""
    if not catalog.classes or not {"train", "test"} <= catalog.splits.keys():
        return []
    trained = {video.label for video in catalog.splits["train"]}
    tested = {video.label for video in catalog.splits["test"]}
    never = [name for label, name in enumerate(catalog.classes) if label in tested - trained]
    if not never:
        return []
    have = f"class {printable(never[0])} has" if len(never) == 1 else f"{len(never)} classes have"
    return [f"{have} test videos but no train video" + (f": {shorten(never)}" if len(never) > 1 else "")]


def shorten(names: Sequence[str]) -> str:
    """Return the first names in printable form, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more
