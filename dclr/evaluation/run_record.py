"""What a training run has written about itself: config.json, metrics.jsonl and, once it has ended, report.json."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr.errors import UserError

Curve = list[tuple[int, float]]
"""Steps, counted from 1 and in increasing order, and the value logged at each."""

NOT_PAIRS = ("plateau", "ln_K_plus_1")
"""Names of `pair_loss/...` that are not pairs."""


@dataclass(frozen=True)
class RunRecord:
    """The settings and the log of a run.

    Attributes:
        command: "pretrain", "finetune" or "linear".
        preset: the recipe that the settings started from.
        settings: field name -> value. A run of an earlier version lacks some fields.
        lines: the lines of metrics.jsonl: the step and name -> value. null stands for a value that was not finite.
        report: report.json; empty if the run has not ended.
        damaged: lines of metrics.jsonl that cannot be read. A run that is killed may leave half a line.
    """

    command: str
    preset: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    report: dict[str, Any] = field(default_factory=dict)
    damaged: int = 0

    @property
    def steps(self) -> int | None:
        """The steps of the whole run; None if they are not known, because the run has not ended even once."""
        videos = self.report.get("data", {}).get("videos")
        return videos // self.setting("batch_size") * self.setting("epochs") if isinstance(videos, int) else None

    @property
    def ended(self) -> bool:
        """True if the run has reached its last step. A run that is resumed with more epochs has not."""
        return self.steps is not None and self.last_step >= self.steps

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return int(self.lines[-1]["step"])

    @property
    def pairs(self) -> list[str]:
        """The names of the contrasted pairs, in the order of the log; none for a method without pairs."""
        names = [
            name.removeprefix("pair_loss/") for line in self.lines for name in line if name.startswith("pair_loss/")
        ]
        return [name for name in dict.fromkeys(names) if name not in NOT_PAIRS]

    def setting(self, name: str) -> Any:
        """Return a setting, or its default today if the run is of an earlier version that lacks it."""
        return self.settings.get(name, configuration.FIELDS[name].default)

    def curve(self, name: str) -> Curve:
        """Return the finite values that were logged under a name."""
        return [(int(line["step"]), float(line[name])) for line in self.lines if _is_finite(line.get(name))]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> RunRecord:
    """Read what a run has written into its folder. The run may still be training.

    Raises:
        UserError: it is not the folder of a run, or the run has logged no step yet.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a training run")
    command, preset, settings = configuration.read_config(folder / "config.json")
    if command not in configuration.COMMANDS:
        raise UserError(f"{folder}: its config.json is of {command}, but must be of a training run")
    lines, damaged = _read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder}: its metrics.jsonl has no step; wait for the first log line of the run")
    return RunRecord(command, preset, settings, lines, _read_report(folder / "report.json"), damaged)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics.jsonl in the order of their steps, and the number of damaged lines."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    lines, damaged = [], 0
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and _is_finite(line.get("step")) and line["step"] >= 0:
            lines.append(line)
        else:
            damaged += 1
    return sorted(lines, key=lambda line: line["step"]), damaged


def _read_report(path: Path) -> dict[str, Any]:
    """Return report.json; empty if there is none, or if it cannot be read."""
    content = read_object(path)
    return content if all(isinstance(content.get(n), dict) for n in ("data", "environment")) else {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is missing or is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
