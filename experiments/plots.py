"""Plots of results: curves along training, or bars. Error bars and bands are one standard deviation over seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, plt

LABELS = {
    "the same everywhere": "uniform map",
    "A_v, share on what moves": "A_v, share inside the moving region",
    "A_s, share on what moves": "A_s, share inside the moving region",
    "A_d, share on what moves": "A_d, share inside the moving region",
    "pair vv, the clip itself: key against the hardest negative": "pair vv (clip): key minus hardest negative",
    "pair vd, its motion: key against the hardest negative": "pair vd (motion): key minus hardest negative",
    "pair vs, its scene: key against the hardest negative": "pair vs (scene): key minus hardest negative",
    "difference of cosines": "difference of cosine similarities",
    "no nearer than it": "as similar as the hardest negative",
    "telling no clips apart": "equal logits",
    "the same, with 1 mined positive": "equal logits, 1 mined positive",
    "how far from the reference": "distance from the reference",
    "powers of ten of its loss": "log10 of the relative difference",
    "reference rounded otherwise": "reference, other rounding",
    "loss in float32, by kernels": "loss in float32",
    "triton": "Triton kernels",
}
"""Names in result files, and what the page and the plots show instead. Names in result files do not change, so that
results of different dates can be compared."""


def label(name: str) -> str:
    return LABELS.get(name, name)


def seeds_of(row: dict[str, Any]) -> int:
    """Return the number of seeds of a row, and 0 for a row that does not depend on seeds."""
    return max((len(values) for values in row.values() if isinstance(values, list)), default=0)


def with_seeds(name: str, own: int, seeds: int) -> str:
    """Return the label of a row or line, with its number of seeds if it has fewer than the `seeds` of the result."""
    return label(name) + (f" ({own} seed{'s' * (own > 1)})" if 0 < own < seeds else "")


def plot(result: dict[str, Any]) -> Figure:
    """Return the plot of a result: curves if it has panels, otherwise bars."""
    where, seeds = result["environment"], len(result["seeds"])
    figure = curves(result["panels"], seeds) if "panels" in result else bars(result)
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    caption = f"{spread}; {where['device']}, {where['date'][:10]}, torch {where['versions']['torch']}"
    figure.supxlabel(f"{caption}\ncommit {where['commit']}", fontsize=8, color="dimgray")
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(result: dict[str, Any]) -> Figure:
    """Return a bar plot with one group of bars for each figure in percent, and one panel for each group of rows."""
    shares = {name: label(title) for name, (title, unit) in result["figures"].items() if unit == "%"}
    groups = result.get("groups", [""])
    size = (max(7, 2 + 1.5 * len(shares)), 4.5 * len(groups))
    figure, panels = plt.subplots(len(groups), figsize=size, layout="constrained", squeeze=False)
    for group, panel in zip(groups, panels[:, 0], strict=True):
        start = f"{group}: " if group else ""
        rows = {name.removeprefix(start): row for name, row in result["rows"].items() if name.startswith(start)}
        draw_bars(panel, rows, list(shares), len(result["seeds"]))
        panel.set(title=group, xticks=range(len(shares)), ylabel=result.get("ylabel", "share of test videos"))
        panel.set_ylim(0, None if "ylabel" in result else 1.02)
        panel.set_xticklabels([title.replace(", ", "\n") for title in shares.values()], fontsize=8)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def draw_bars(panel: Any, rows: dict[str, Any], shares: Sequence[str], seeds: int) -> None:
    """Draw the values of each row. A row with values by seed gets bars, and a row without (chance) dashed lines."""
    has_seeds = {name: any(isinstance(row.get(key), list) for key in shares) for name, row in rows.items()}
    width = 0.8 / sum(has_seeds.values())
    bar = 0
    for name, row in rows.items():
        groups = [group for group, key in enumerate(shares) if key in row]
        values = [row[key] for key in shares if key in row]
        if not has_seeds[name]:
            left, right = [group - 0.42 for group in groups], [group + 0.42 for group in groups]
            panel.hlines(values, left, right, "k", "dashed", linewidth=1, label=label(name))
            continue
        centres = [group - 0.4 + (bar + 0.5) * width for group in groups]
        errors = [statistics.stdev(by_seed) for by_seed in values] if len(values[0]) > 1 else None
        heights = [statistics.mean(by_seed) for by_seed in values]
        title = with_seeds(name, seeds_of(row), seeds)
        panel.bar(centres, heights, 0.9 * width, yerr=errors, capsize=3, label=title, color=f"C{bar}", alpha=0.8)
        for x, by_seed in zip(centres, values, strict=True):
            panel.plot([x] * len(by_seed), by_seed, "k.", markersize=3)
        bar += 1


def curves(panels: Sequence[dict[str, Any]], seeds: int) -> Figure:
    """Return the panels, two in a row. A line has the same colour in all panels. The first two lines are thick."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(12, 4 * rows), layout="constrained", squeeze=False)
    handles = {}
    for panel, axis in zip(panels, axes.flat, strict=False):
        for name, line in panel["lines"].items():
            by_step, number = list(zip(*line["values"], strict=True)), names.index(name)
            mean = [statistics.mean(values) for values in by_step]
            style = {
                "color": f"C{number}",
                "linewidth": 2.2 if number < 2 else 1.0,
                "marker": "." if len(mean) < 10 else "",
            }
            title = with_seeds(name, len(line["values"]), seeds)
            (handles[name],) = axis.plot(line["steps"], mean, label=title, **style)
            if len(by_step[0]) > 1:
                spread = [statistics.stdev(values) for values in by_step]
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axis.fill_between(line["steps"], low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        levels = panel.get("levels", {})
        for name, level in levels.items():
            # The lower of two levels has its name below the line, so that both names can be read.
            side = "top" if len(levels) > 1 and level == min(levels.values()) else "bottom"
            axis.axhline(level, color="black", linewidth=1, linestyle="dashed")
            axis.text(
                0.99, level, label(name), transform=axis.get_yaxis_transform(), ha="right", va=side, fontsize=8
            )  # fmt: skip
        axis.margins(y=0.1)  # room for the names of levels
        axis.set(title=label(panel["title"]), xlabel="optimizer step", ylabel=label(panel["ylabel"]))
        axis.grid(True, alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=4)
    return figure
