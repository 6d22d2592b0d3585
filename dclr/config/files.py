"""Configuration files: the config.json of a run, and the TOML file given to --config."""

import dataclasses
import json
import os
import tomllib
from pathlib import Path
from typing import Any

from dclr.config.data_url import is_url
from dclr.config.options import WHOLE_LIMIT
from dclr.config.settings import ALL, FIELDS, GROUPS, Config, groups
from dclr.errors import UserError
from dclr.files import atomic_write


def write_config(path: Path, command: str, preset: str, config: Config) -> None:
    """Write the resolved configuration as JSON, one object for each group. `read_config` reads this file.

    The file also names the working folder, from which relative paths start.
    """
    head = {"command": command, "preset": preset, "started_in": str(Path.cwd())}
    text = json.dumps({**head, **dataclasses.asdict(config)}, indent=2)
    atomic_write(path, (text + "\n").encode())


def read_config(path: Path) -> tuple[str, str, dict[str, Any]]:
    """Return (command, preset, flat values) of a run's config.json. Its relative paths hold in the working folder now.

    Raises UserError if the file is missing or is not the configuration of a run, or if a value has a wrong type.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        command, preset = str(stored.pop("command")), str(stored.pop("preset"))
        started_in = Path(stored.pop("started_in", ""))  # the file next to published weights has none, and no paths
        values = {name: value for group in stored.values() for name, value in group.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run's folder holds its config.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path}: not the configuration of a run (damaged, or written by something else)") from None
    values = _typed(path, values)
    if "optim" in stored:
        values = {**_OF_EARLIER_VERSIONS.get(command, {}), **values}
    for name in PATHS & values.keys():
        values[name] = _find(values[name], started_in)
    return command, preset, values


_OF_EARLIER_VERSIONS: dict[str, dict[str, Any]] = {
    "pretrain": {"distinct_starts": False, "jitter_form": "multiplicative"},
    "linear": {"normalised_probe": False},
}
"""Command -> settings that were added later, with the values that describe the runs before. The config.json of such a
run does not name these settings, and today's defaults or presets have other values."""

PATHS = {"data", "pretrained", "init", "ds_config"}
"""Settings that are paths of files that a run reads."""


def _find(value: str, started_in: Path) -> str:
    """Return a path of a config.json, absolute if it does not hold in the working folder.

    A relative path is looked for where the run was started, then in the working folder.
    """
    if not value or Path(value).is_absolute() or is_url(value):
        return value
    here = Path.cwd()
    for folder in (started_in, here):
        # Unlike Path.exists, this is False for a folder without permission.
        if os.path.exists(folder / value):
            return value if folder == here else str(folder / value)
    return value


def read_settings(path: Path, command: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return (preset, flat values) of the file given to --config: a TOML file, or the config.json of a run.

    The preset is "" if the file names none. The file must be for `command`, or for any command if `command` is None.
    The result has neither `out` nor `allow_outside` of a config.json. A new run needs a folder of its own, and a file
    from elsewhere must not permit itself to name videos outside the data folder.

    Raises UserError if the file cannot be read or is for another command, or for an unknown name or a wrong type.
    """
    if path.suffix == ".json":
        written_for, preset, values = read_config(path)
        values = {name: value for name, value in values.items() if name not in ("out", "allow_outside")}
    else:
        written_for, preset, values = _read_toml(path)
    if command and written_for not in ("", command):
        raise UserError(
            f"--config {path} is for {written_for}, but the command is {command}: "
            f"run {written_for}, or give another file"
        )
    allowed = [group for name, group in GROUPS.items() if command is None or name in groups(command)]
    unknown = sorted(values.keys() - {f.name for group in allowed for f in dataclasses.fields(group)})
    if unknown:
        who = f"{command} has no" if command else "no command has a"
        raise UserError(f"--config {path}: {who} setting named {', '.join(unknown)}")
    return preset, values


def _read_toml(path: Path) -> tuple[str, str, dict[str, Any]]:
    """Return (command, preset, flat values) of a TOML file. Settings are at the top, or in one table for each group.

    Raises UserError if the file is not TOML, or for an unknown table, a setting given twice, or a wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a TOML file or a run's config.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not a TOML file: {error!s:.200}") from None
    command, preset = content.pop("command", ""), content.pop("preset", "")
    for name, value in (("command", command), ("preset", preset)):
        if not isinstance(value, str):
            raise UserError(f"--config {path}: {name} is {_shown(value)}, but must be a text")
    settings: list[tuple[str, Any]] = []
    for key, value in content.items():
        if not isinstance(value, dict):
            settings.append((key, value))
        elif key in GROUPS:
            settings += value.items()
        else:
            raise UserError(f"--config {path}: no table is named [{key}]; the tables are {', '.join(GROUPS)}")
    values: dict[str, Any] = {}
    for key, value in settings:
        name = key.replace("-", "_")
        if name in values:
            raise UserError(f"--config {path}: {name} is given twice")
        values[name] = value
    return command, preset, _typed(path, values)


_KINDS = {
    bool: "true or false",
    str: "a text",
    int: "a whole number below 2 ** 31",
    float: "a number",
    tuple: "a list of whole numbers",
}


def _typed(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the file with lists as tuples. Raises UserError for a value of a wrong type."""
    if values.get("split") == ALL:
        raise UserError(f"{path}: split is 'all', which only the flag takes: leave it out, and give --split all")
    for name, value in values.items():
        if name in FIELDS and not _is_alike(value, FIELDS[name].default):
            raise UserError(f"{path}: {name} is {_shown(value)}, but must be {_KINDS[type(FIELDS[name].default)]}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _shown(value: Any) -> str:
    """Return at most 80 characters of a value from a file."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # Python prints no whole number of more than 4,300 digits
        return f"a value of type {type(value).__name__} that cannot be printed"


def _is_alike(value: Any, default: Any) -> bool:
    """Return whether a value from a file has the type that argparse gives the flag with this default."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(_is_alike(item, 0) for item in value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float) and isinstance(value, float):
        return True
    if isinstance(default, int | float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < WHOLE_LIMIT
    return isinstance(value, str)
