"""The sources of a configuration, and their order.

The sources are the defaults of the settings, the preset, the file given to --config, and the flags. A later source
overrides an earlier one. A resumed run has its own config.json in place of the preset and the file.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from dclr.config.options import as_flag, flag_of
from dclr.config.presets import PRESETS
from dclr.config.settings import AUTOMATIC, COMMANDS, Config, MethodConfig, PretrainConfig, groups
from dclr.errors import UserError
from dclr.methods import METHODS, QUEUE_SETTINGS, VIEW_SETTINGS


def make_config(command: str, values: dict[str, Any]) -> Config:
    """Return the configuration of `command` from flat field values, and from defaults for the other fields.

    Raises UserError for a name that the command does not have, and for a value outside its bounds.
    """
    values = dict(values)
    built: dict[str, Any] = {}
    for name, group_class in groups(command).items():
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(group_class) if f.name in values}
        built[name] = group_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
    if values:
        raise UserError(f"{command} has no setting named {', '.join(sorted(values))}")
    return COMMANDS[command](**built)


def flat(config: Config) -> dict[str, Any]:
    """Return field name -> value over all groups."""
    return {k: v for group in dataclasses.asdict(config).values() for k, v in group.items()}


def resolve(
    command: str,
    preset: str,
    flags: dict[str, Any],
    resumed: dict[str, Any] | None = None,
    file: dict[str, Any] | None = None,
) -> Config:
    """Return the configuration from the preset, the values of the file given to --config, and the flags, in this order.

    A resumed run has its stored values, `resumed`, in place of preset and file. It also keeps the number that it has
    chosen for --fill-steps -1.

    Raises UserError for a value that is refused, and for a flag that has no effect on the chosen method or command.
    """
    if resumed is None and preset not in PRESETS:
        raise UserError(f"--preset is {preset}, but must be one of {', '.join(PRESETS)}")
    stored = resumed if resumed is not None else {**PRESETS[preset][command], **(file or {})}
    kept = {"fill_steps"} if resumed is not None and flags.get("fill_steps") == AUTOMATIC else set()
    config = make_config(command, {**stored, **{name: flags[name] for name in flags.keys() - kept}})
    if config.optim.schedule == "cosine":
        same_file = file if file and file.get("schedule") == "cosine" else {}
        if {**same_file, **flags}.get("milestones"):
            raise UserError("--milestones has no effect with --schedule cosine: leave it out, or use --schedule step")
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, milestones=()))
    elif stored.get("schedule") == "cosine" and stored.get("milestones") in ((), []) and "milestones" not in flags:
        raise UserError("--schedule step needs --milestones here, because a run with --schedule cosine stores none")
    if command == "linear" and config.run.recompute:
        raise UserError(
            "--recompute has no effect in linear, whose backbone is frozen and keeps nothing: leave the flag out"
        )
    if not isinstance(config, PretrainConfig):
        for name, only in _SETTINGS_OF_ONE_COMMAND.items():
            if name in flags and command != only:
                raise UserError(f"{flag_of(name)} has no effect in {command}, only in {only}: leave the flag out")
        return config
    refuse_settings_without_effect(config.method.method, flags)
    for name, (switch, values) in _SWITCHED_OFF.items():
        value = getattr(config.method, switch)
        if name in flags and value in values:
            raise UserError(f"{flag_of(name)} has no effect with {as_flag(switch, value)}: leave the flag out")
    if not METHODS[config.method.method].has_queue:
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, fill_steps=0))
    return config


_SWITCHED_OFF = {
    "dropped_fill": ("dropping", ("none",)),
    "straight_through": ("dropping", ("random", "none")),
    "decay_rate": ("decay", ("none",)),
    "jitter_form": ("jitter", (0.0,)),
}
"""Setting of a method -> another setting, and the values of that one with which the first has no effect."""

_SETTINGS_OF_ONE_COMMAND = {"dropout": "finetune", "finetune_augmentation": "finetune", "normalised_probe": "linear"}


def refuse_settings_without_effect(method: str, flags: Collection[str]) -> None:
    """Raise UserError if one of the settings `flags` is a field of MethodConfig that has no effect on `method`."""
    chosen = METHODS[method]
    of_methods = {f.name for f in dataclasses.fields(MethodConfig)} - {"method"}
    same_frames = {"distinct_starts"} if chosen.same_frames else set()
    for name in sorted((of_methods - chosen.settings | same_frames).intersection(flags)):
        why = ", whose clips are the same frames" if name in same_frames else ""
        if name in VIEW_SETTINGS and not chosen.auxiliary_views:
            why = ", which has neither static nor dynamic views"
        elif name in QUEUE_SETTINGS and not chosen.has_queue:
            why = ", which has no queue"
        raise UserError(f"{flag_of(name)} has no effect with --method {method}{why}: leave the flag out")
