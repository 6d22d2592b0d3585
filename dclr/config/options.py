"""One setting: its default, bounds and help text, the base class that checks values, and how messages write it."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from dclr.errors import UserError

WHOLE_LIMIT = 2**31
"""Whole numbers of settings are below this limit. It holds for files and for flags, because --resume reads the values
of the flags from config.json."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values that a field accepts. Without arguments, every text and every finite number.

    `choices` may be a dictionary. Entries that are added to it later are accepted too.
    """

    choices: Collection[Any] = ()
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return True
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        """Return the accepted values in words: "a, b or c", "from 0 to 1", "at least 0 and below 1", or "" for any."""
        if self.choices:
            *others, last = map(str, self.choices)
            return f"{', '.join(others)} or {last}"
        if math.isfinite(self.at_least) and math.isfinite(self.at_most):
            return f"from {self.at_least} to {self.at_most}"
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))


def option(default: Any, help: str, **bounds: Any) -> Any:
    """Return a dataclass field with its default, its text for --help and its `Bounds`.

    A field with the default True or False is a yes/no option.
    """
    if isinstance(default, bool):
        bounds = {"choices": (True, False)}
    return field(default=default, metadata={"help": help, "bounds": Bounds(**bounds)})


class Group:
    """Base class of the groups of settings: it checks every field against its bounds."""

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its bounds, with the flag, the value and the accepted values."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            found = getattr(self, f.name)
            for value in found if isinstance(found, tuple) else (found,):
                if not f.metadata["bounds"].accepts(value):
                    raise UserError(f"{flag_of(f.name)} is {value}, but must be {f.metadata['bounds']}")
                if isinstance(value, int) and value >= WHOLE_LIMIT:
                    raise UserError(f"{flag_of(f.name)} is {value}, but must be below 2 ** 31")


def flag_of(name: str) -> str:
    """Return the flag of a field, "--log-every" for "log_every"."""
    return "--" + name.replace("_", "-")


def as_flag(name: str, value: Any) -> str:
    """Return a setting in the form of the command line: "--width 16", "--no-compact"."""
    if isinstance(value, bool):
        return flag_of(name) if value else f"--no-{flag_of(name)[2:]}"
    return f"{flag_of(name)} {show(value)}"


def show(value: Any) -> str:
    """Return a value as messages and help texts show it: on or off for True or False, and a tuple without brackets."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
