"""What a data set layout is: how its folder is recognised and read. datasets.py has the dictionary of all layouts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dclr.data.catalog import Catalog
from dclr.data.tree import Tree
from dclr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """A data folder, and how the user wants it to be read."""

    root: Path
    """The folder that --data names."""
    tree: Tree
    """Everything below the folder."""
    split: int
    """The number of the official split, from 1 (--split)."""
    allow_outside: bool
    """True if lists may name videos outside the folder (--allow-outside)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way in which data sets are laid out on disk."""

    recognise: Callable[[Path], bool]
    """Return whether a folder has this layout. No video needs to be opened for this."""
    read: Callable[[DataFolder], Catalog]
    """Return the catalog of a folder of this layout. Raises UserError: something is wrong with the folder or its lists.
    With `numbers`, it must also refuse a number that the folder does not have (see `check_split`)."""
    numbers: Callable[[Path], Sequence[int]] | None = None
    """Return the numbers of the official splits that a folder has lists for. None: the layout has no numbered splits,
    and only --split 1 is accepted."""


def check_split(split: int, layout: str, numbers: Sequence[int]) -> None:
    """Raise UserError unless `split` is one of the numbers that a layout has. [1]: it has no numbered splits."""
    if split not in numbers:
        *others, last = map(str, numbers)
        allowed = f"{', '.join(others)} or {last}" if others else "1: this layout has no numbered splits"
        raise UserError(f"split {split} of {layout}: must be {allowed}")
