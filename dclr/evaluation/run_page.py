"""The page of a training run as one HTML file: what it is, whether it is healthy, its curves and its settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr.evaluation import figures
from dclr.evaluation.health import Finding, State
from dclr.evaluation.page import STYLE, Html, details, page, picture, section, side_by_side, table, text
from dclr.evaluation.run_record import RunRecord

WORDS: dict[State, str] = {"ok": "ok", "warning": "look at this", "bad": "bad", "unknown": "not known"}
"""A state as the page and the terminal write it."""

_STYLE = (
    STYLE
    + """
.state { font-weight: bold; white-space: nowrap; border-left: .4em solid; padding-left: .5em; }
.ok { color: #1a7f37; } .warning { color: #9a6700; } .bad { color: #cf222e; } .unknown { color: #666; }
"""
)

PANELS = {
    "Loss": ("loss", "loss_plateau"),
    "Loss of each pair": ("pair_loss/",),
    "Similarity of positive and hardest negative": ("positive_similarity/", "hardest_negative/"),
    "Loss among the keys of the batch": ("batch_loss/",),
    "Share of queries whose own key is the nearest of the queue": ("nearest_key/",),
    "Spread of the projections": ("spread",),
    "Alignment": ("alignment", "alignment_share"),
    "Loss of the generator": ("generator_loss",),
    "Nearest neighbours of test videos": ("knn/",),
    "Accuracy": ("train_top1", "test/"),
    "Learning rate": ("lr",),
    "Share of the time that waits for data": ("data_wait_share",),
    "Samples per second": ("samples_per_second",),
    "Skipped steps": ("nonfinite/skipped_steps",),
}
"""Title of a picture of curves -> names in the log. A name that ends in / stands for all names that begin with it."""


def run_page(run: RunRecord, name: str, findings: Sequence[Finding], sections: Sequence[Html], pictures: Path) -> str:
    """Return the page as HTML.

    Args:
        run: the settings and the log.
        name: the title, such as the name of the run's folder.
        findings: of `check_health`.
        sections: what was measured, see run_sections.py.
        pictures: a folder for temporary files.
    """
    body = [
        section("Is it healthy?", summary(findings), health_table(findings)),
        section("The run", table(["what", "value"], overview(run))),
        section("Curves", "docs/curves.md explains each name.", side_by_side(*curves(run, pictures))),
        *sections,
        section("Settings", *settings(run)),
    ]
    return page(name, body, _STYLE)


def summary(findings: Sequence[Finding]) -> str:
    """Return one sentence about all findings."""
    states = [finding.state for finding in findings]
    kinds: tuple[State, ...] = ("bad", "warning")
    counts = [f"{states.count(kind)} of {len(states)} checks: {WORDS[kind]}" for kind in kinds if kind in states]
    return "; ".join(counts or ["All checks that could be made are ok"]) + "."


def health_table(findings: Sequence[Finding]) -> Html:
    """Return the findings as a table: the state, the sentence and what to do."""
    rows = []
    for finding in findings:
        state = Html(f'<span class="state {finding.state}">{text(WORDS[finding.state])}</span>')
        advice = f"<br><small>{text(finding.advice)}</small>" if finding.advice else ""
        rows.append([state, finding.name, Html(f"{text(finding.sentence)}{advice}")])
    return table(["state", "check", "finding"], rows)


def overview(run: RunRecord) -> list[list[str]]:
    """Return what the run is, as rows of two cells."""
    report = run.report
    data, environment = report.get("data", {}), report.get("environment", {})
    of = f" of {run.steps:,}" if run.steps is not None else ""
    rows: dict[str, Any] = {
        "command": f"{run.command}, preset {run.preset}",
        "method": run.setting("method") if run.command == "pretrain" else "",
        "network": f"{run.setting('backbone')} (width {run.setting('width')})",
        "start": shown_name(report.get("start") or ""),
        "data set": shown_name(data.get("folder") or run.setting("data")) or "demo videos",
        "training videos": _count(data.get("videos")),
        "unreadable videos": _count(
            len(data.get("unreadable", ())) + len(data.get("failed_while_training", ())) or None
        ),
        "steps": f"{run.last_step:,}{of}, batches of {run.setting('batch_size')}",
        "unreadable lines of the log": _count(run.damaged or None),
        "seconds": _count(report.get("seconds")),
        "samples/s": report.get("samples_per_second"),
        "processes": report.get("processes"),
        "precision": report.get("precision"),
        "device": environment.get("device"),
        "commit": environment.get("commit"),
        "ended": environment.get("date") if run.ended else "not yet",
    }
    return [[name, str(value)] for name, value in rows.items() if value not in (None, "")]


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int | float) else ""


def shown_name(path: Any) -> str:
    """Return the last part of a path, because pages are published and folders are private.

    A text that begins with a path keeps what follows it: "/home/me/run/backbone.safetensors: r2plus1d_18" gives
    "backbone.safetensors: r2plus1d_18". A text without a path stays as it is.
    """
    file, colon, words = str(path).partition(": ")
    return Path(file).name + colon + words


def curves(run: RunRecord, pictures: Path) -> list[Html]:
    """Return the pictures of all curves that the run has logged."""
    logged = list(dict.fromkeys(name for line in run.lines for name in line))
    shown = []
    for number, (title, wanted) in enumerate(PANELS.items()):
        names = [name for name in logged if name in wanted or name.startswith(tuple(w for w in wanted if w[-1] == "/"))]
        lines = {name: curve for name in names if (curve := run.curve(name)) and not name.endswith("/mean")}
        if not lines:
            continue
        path = pictures / f"curves-{number}.png"
        figures.plot_curves(lines, title, path)
        ends = "; ".join(f"{name} {curve[-1][1]:.4g}" for name, curve in lines.items())
        shown.append(picture(path, f"{title}, last values: {ends}"))
    return shown


def settings(run: RunRecord) -> list[str]:
    """Return the settings that differ from the preset, and all settings."""
    preset = configuration.PRESETS.get(run.preset, {}).get(run.command, {})
    usual = {name: preset.get(name, f.default) for name, f in configuration.FIELDS.items()}
    values = {name: _shown(name, value) for name, value in run.settings.items()}
    changed = [
        [name, value, _shown(name, usual[name]) if name in usual else "no such setting today"]
        for name, value in values.items()
        if name not in usual or value != _shown(name, usual[name])
    ]
    what = f"the preset {run.preset}" if preset else "the defaults"
    return [
        f"Settings that differ from {what}. Paths are shown without their folders.",
        table(["setting", "this run", what.removeprefix("the ")], changed) if changed else "None.",
        details("All settings", table(["setting", "value"], [[name, value] for name, value in values.items()])),
    ]


def _shown(name: str, value: Any) -> str:
    if name in {*configuration.PATHS, "out"} and value:
        return shown_name(value)
    return configuration.show(tuple(value) if isinstance(value, list) else value)
