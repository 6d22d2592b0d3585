"""The flags of the command line: one for each setting, with bounds, default and presets in its help text."""

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any, NoReturn

from dclr.config.options import flag_of, show
from dclr.config.presets import DATA_PRESET, PRESETS
from dclr.config.settings import ALL
from dclr.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for a wrong command line: one line, without the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help explains every flag)")


def add_flags(
    parser: argparse.ArgumentParser, group_classes: Iterable[type], only: set[str] | None = None, command: str = ""
) -> None:
    """Add one flag for each field of the groups, or of the fields in `only`, under one heading for each group.

    The help text of a flag ends with its bounds, its default (the value in DATA_PRESET), and the values of the presets
    of `command` that have another one. A flag that is not given is absent from the parsed namespace.
    """
    for group_class in group_classes:
        heading = parser.add_argument_group((group_class.__doc__ or "").rstrip("."))
        for f in dataclasses.fields(group_class):
            if only is None or f.name in only:
                _add_flag(heading, f, command)


def _add_flag(heading: Any, f: dataclasses.Field[Any], command: str) -> None:
    bounds = f.metadata["bounds"]
    in_presets = {name: of.get(command, {}).get(f.name, f.default) for name, of in PRESETS.items()}
    default = in_presets[DATA_PRESET]
    notes = [] if bounds.choices else [str(bounds)]
    notes += ["" if default == "" else f"default: {show(default)}"]
    notes += [f"{name}: {show(value)}" for name, value in in_presets.items() if value != default]
    notes = [note for note in notes if note]
    text = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    names = ["--ds_config", "--ds-config"] if f.name == "ds_config" else [flag_of(f.name)]
    given: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if isinstance(f.default, bool):
        heading.add_argument(*names, action=argparse.BooleanOptionalAction, **given)
        return
    choices = "{" + ",".join(map(str, bounds.choices)) + "}"
    given["metavar"] = choices if bounds.choices else f.name.split("_")[-1].upper()
    if isinstance(f.default, tuple):
        heading.add_argument(*names, type=int, nargs="*", **given)
    else:
        heading.add_argument(*names, type=split_number if f.name == "split" else type(f.default), **given)


def split_number(text: str) -> Any:
    """Return the value of --split: a number, or ALL."""
    if text == ALL or text.isdecimal():
        return text if text == ALL else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number or all")
