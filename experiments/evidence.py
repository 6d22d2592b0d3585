"""What experiments have found: JSON, a table of means and spreads over seeds, a plot, and the page docs/evidence.md.

    python -m experiments.evidence      makes the page and its plots anew from the committed results

A result is a dictionary, kept as results/DEVICE/NAME.json:
    question, command       what was asked, and what was typed
    seeds                   [0, 1, 2]
    figures                 {figure: [its title, "%" or "min"]}: the columns of the table, in order
    rows                    {row: {figure: [value by seed]}}; a bare number has no seed (chance)
    findings                [{"claim", "holds", "detail"}]: what was said beforehand, and whether it came out so
    panels                  of the plot, where values along training are shown: [{"title", "ylabel", "lines", "levels"}], a line being
                            {"steps": [...], "values": [[by step] by seed]} and a level one number
    ylabel                  of the plot, where no panels are and the values are no shares of test videos
    recipe, environment     what was run and on what; environment.commit is of the runs
"""

import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Figure, plt
from dclr.errors import UserError
from dclr.report import environment
from experiments import runs

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = runs.ROOT / "docs" / "evidence.md"
PLOTS = runs.ROOT / "docs" / "evidence"
MARKER, END = "<!-- experiments/{}.py -->\n", "<!-- end -->\n"  # what is measured stands between them

STANDARD_ERRORS = 2.0
"""By how many the means of two methods must differ to be called different."""

AND = " and "
"""Between the commits of a result's runs."""

Result = dict[str, Any]
Values = list[float] | float
Rows = dict[str, dict[str, Values]]


def finding(claim: str, holds: bool, detail: str) -> dict[str, Any]:
    return {"claim": claim, "holds": bool(holds), "detail": detail}


def difference(first: list[float], second: list[float]) -> tuple[float, float]:
    """Of the means over at least two seeds, and its standard error."""
    error = math.sqrt((statistics.variance(first) + statistics.variance(second)) / len(first))
    return statistics.mean(first) - statistics.mean(second), error


def above(claim: str, more: list[float], less: list[float]) -> list[dict[str, Any]]:
    """The finding that the first mean is above the second by more than two standard errors. One seed says nothing, and nothing is said."""
    if len(more) < 2:
        return []
    gap, error = difference(more, less)
    detail = f"{100 * gap:+.1f} points, more than {100 * STANDARD_ERRORS * error:.1f} was asked"
    return [finding(claim, gap > STANDARD_ERRORS * error, detail)]


def not_below(claim: str, first: list[float], second: list[float]) -> list[dict[str, Any]]:
    """The finding that the first mean is at most two standard errors below the second; again nothing of one seed."""
    if len(first) < 2:
        return []
    gap, error = difference(first, second)
    detail = f"{100 * gap:+.1f} points, at least {-100 * STANDARD_ERRORS * error:.1f} was asked"
    return [finding(claim, gap >= -STANDARD_ERRORS * error, detail)]


def published_file(name: str) -> Path:
    """Where the committed result of this kind of device is, or would be."""
    return harness.results_folder(here(), RESULTS) / f"{name}.json"


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def published(name: str, recipe: dict[str, Any], seeds: range) -> Result:
    """The committed result, to take rows from: made on the same device, with these seeds and these parts of its recipe.

    Raises UserError: there is none, or it was made otherwise, so that its rows do not belong beside new ones.
    """
    file = published_file(name)
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--with-published: {file} cannot be read ({error}); without the flag, every row is run"
        ) from None
    asked = {"seeds": list(seeds), "device": environment(here())["device"], **json.loads(json.dumps(recipe))}
    found = {"seeds": result["seeds"], "device": result["environment"]["device"], **result["recipe"]}
    for part, value in asked.items():
        if found.get(part) != value:
            raise UserError(
                f"--with-published: {file} has {part} {found.get(part)}, and this would be {value}; without the flag, every row is run"
            )
    return result


def in_order(rows: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Its entries as `order` names them. Raises KeyError: it has others."""
    if others := rows.keys() - set(order):
        raise KeyError(f"not in order: {others}")
    return {name: rows[name] for name in order if name in rows}


def with_lines_of(
    before: Sequence[dict[str, Any]], panels: Sequence[dict[str, Any]], order: Sequence[str]
) -> list[dict[str, Any]]:
    """The panels of both, those of the same title as one, with the lines of both."""
    joined = {panel["title"]: panel for panel in before}
    for panel in panels:
        lines = joined.get(panel["title"], {}).get("lines", {}) | panel["lines"]
        joined[panel["title"]] = panel | {"lines": in_order(lines, order)}
    return list(joined.values())


def publish(
    name: str, result: Result, chains: Sequence[runs.Chain], options: runs.Options, taken: Result | None = None
) -> bool:
    """Prints the table; writes NAME.json and NAME.png into the folder of the runs and, unless it was a quick try, where the page is
    made from, and the page. A result of fewer seeds or rows than the one that is there does not replace it.

    `taken`: the published result that some of the rows are of, whose commits are then told too. Returns whether it was published.
    """
    commits = {*runs.commits(chains), *(taken["environment"]["commit"].split(AND) if taken else ())}
    result = result | {
        "command": " ".join([f"python -m experiments.{name}", *options.arguments]),
        "seeds": list(options.seeds),
        "environment": environment(here()) | {"commit": AND.join(sorted(commits))},
    }
    harness.write(options.work, name, result, plot(result))
    print("\n" + "\n".join(body(result)))
    written = options.work / f"{name}.json"
    if options.quick:
        print(f"\n{written} and .png written; a quick try, so nothing is published")
        return False
    kept = published_file(name)
    if kept.exists() and is_narrower(result, json.loads(kept.read_text())):
        print(f"\n{written} and .png written; {kept} is of more seeds or rows and stays: delete it to publish this one")
        return False
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(written, kept)
    (PLOTS / kept.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(written.with_suffix(".png"), PLOTS / kept.parent.name)
    write_page()
    print(f"\n{kept} and {PAGE} written")
    return True


def is_narrower(result: Result, before: Result) -> bool:
    return len(result["seeds"]) < len(before["seeds"]) or not before["rows"].keys() <= result["rows"].keys()


# ---------------------------------------------------------------------------------------------------------------- the page


def write_page() -> None:
    PAGE.write_text(with_sections(PAGE.read_text(), RESULTS))


def with_sections(page: str, results: Path) -> str:
    """The page with every experiment's tables in their place, a device after the other."""

    def section(match: re.Match[str]) -> str:
        name = match[2]
        files = sorted(results.glob(f"*/{name}.json"))
        parts = []
        for file in files:
            kind, result = file.parent.name, json.loads(file.read_text())
            parts.append("\n".join(described(name, kind, result)))
        return match[1] + "\n" + ("\n\n".join(parts) or "Not measured yet.") + "\n\n" + END

    between = MARKER.format("@").replace("@", r"(\w+)")
    return re.sub(f"({between}).*?{END}", section, page, flags=re.DOTALL)


def described(name: str, kind: str, result: Result) -> Iterator[str]:
    """The lines of a result on the page. `kind`: the device's folder."""
    where = result["environment"]
    seeds = len(result["seeds"])
    spread = f"mean ± s.d. over {seeds} seeds" if seeds > 1 else "one seed"
    yield f"{where['device']}, {where['date'][:10]}, commit {where['commit']}; {spread}; [plot](evidence/{kind}/{name}.png)"
    yield ""
    yield from body(result)


def body(result: Result) -> Iterator[str]:
    """The table and the findings, in markdown."""
    if result["rows"]:
        figures = result["figures"]
        yield harness.table_header(["", *(title for title, _ in figures.values())])
        for row, found in result["rows"].items():
            cells = [cell(found[figure], unit) if figure in found else "" for figure, (_, unit) in figures.items()]
            yield harness.table_line([row, *cells])
    if result["rows"] and result["findings"]:
        yield ""
    for found in result["findings"]:
        yield f"- {'Holds' if found['holds'] else '**Does not hold**'}: {found['claim']} ({found['detail']})."


def cell(values: Values, unit: str) -> str:
    """Mean ± standard deviation over seeds; a single value as it is."""
    if unit not in ("%", "min"):
        raise ValueError(f"no such unit: {unit}")
    several = values if isinstance(values, list) else [values]
    shown = [statistics.mean(several), *([statistics.stdev(several)] if len(several) > 1 else [])]
    numbers = " ± ".join(f"{100 * value:.1f}" if unit == "%" else f"{value:.1f}" for value in shown)
    return f"{numbers} %" if unit == "%" else numbers


# ---------------------------------------------------------------------------------------------------------------- the plot


def plot(result: Result) -> Figure:
    """Values along training where there are panels, else bars; error bars and bands are a standard deviation over seeds."""
    figure = curves(result["panels"]) if "panels" in result else bars(result)
    where, seeds = result["environment"], len(result["seeds"])
    spread = f"mean and s.d. over {seeds} seeds" if seeds > 1 else "one seed"
    caption = f"{spread}; {where['device']}, {where['date'][:10]}, torch {where['versions']['torch']}, commit {where['commit']}"
    figure.supxlabel(caption, fontsize=8, color="dimgray")
    return figure


def bars(result: Result) -> Figure:
    """A group for each figure that is a share, a bar for each row that has seeds, a dashed line where a row has none."""
    shares = {name: title for name, (title, unit) in result["figures"].items() if unit == "%"}
    rows = {name: row for name, row in result["rows"].items() if any(isinstance(row.get(key), list) for key in shares)}
    figure, panel = plt.subplots(figsize=(max(7, 2 + 1.5 * len(shares)), 4.5), layout="constrained")
    width = 0.8 / len(rows)
    for place, (name, row) in enumerate(rows.items()):
        at = [group for group, key in enumerate(shares) if key in row]
        values = [row[key] if isinstance(row[key], list) else [row[key]] for key in shares if key in row]
        left = [group - 0.4 + (place + 0.5) * width for group in at]
        errors = [statistics.stdev(several) for several in values] if len(values[0]) > 1 else None
        heights = [statistics.mean(several) for several in values]
        panel.bar(left, heights, 0.9 * width, yerr=errors, capsize=3, label=name, color=f"C{place}", alpha=0.8)
        for x, several in zip(left, values, strict=True):
            panel.plot([x] * len(several), several, "k.", markersize=3)
    for name, row in result["rows"].items():
        if name not in rows:
            for group, key in enumerate(shares):
                if key in row:
                    label = (
                        name if group == min(g for g, k in enumerate(shares) if k in row) else "_"
                    )  # no second entry in the legend
                    panel.hlines(row[key], group - 0.42, group + 0.42, "k", "dashed", linewidth=1, label=label)
    panel.set(xticks=range(len(shares)), ylabel=result.get("ylabel", "share of test videos"))
    panel.set_ylim(0, None if "ylabel" in result else 1.02)
    panel.set_xticklabels([title.replace(", ", "\n") for title in shares.values()], fontsize=8)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def curves(panels: Sequence[dict[str, Any]]) -> Figure:
    """Two panels a row; a line has the same colour in all of them. The first two are drawn bold, and what varies them thin."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(12, 4 * rows), layout="constrained", squeeze=False)
    drawn = {}
    for panel, axis in zip(panels, axes.flat, strict=False):
        for name, line in panel["lines"].items():
            by_step, place = list(zip(*line["values"], strict=True)), names.index(name)
            mean = [statistics.mean(values) for values in by_step]
            style = {
                "color": f"C{place}",
                "linewidth": 2.2 if place < 2 else 1.0,
                "marker": "." if len(mean) < 10 else "",
            }
            (drawn[name],) = axis.plot(line["steps"], mean, label=name, **style)
            if len(by_step[0]) > 1:
                spread = [statistics.stdev(values) for values in by_step]
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axis.fill_between(line["steps"], low, high, color=f"C{place}", alpha=0.15, linewidth=0)
        levels = panel.get("levels", {})
        for name, level in levels.items():
            below = len(levels) > 1 and level == min(levels.values())  # so that two near each other can be read
            axis.axhline(level, color="black", linewidth=1, linestyle="dashed")
            axis.text(
                0.99, level, name, transform=axis.get_yaxis_transform(), ha="right", va="top" if below else "bottom",
                fontsize=8,
            )  # fmt: skip
        axis.margins(y=0.1)  # room for the names of levels
        axis.set(title=panel["title"], xlabel="optimizer step", ylabel=panel["ylabel"])
        axis.grid(True, alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=4)
    return figure


def thinned(metrics: Sequence[dict[str, Any]], name: str, points: int = 40) -> tuple[list[float], list[float]]:
    """(steps, values) of a logged number: means over equal parts of the run, since single steps are noise. Steps without it (the queue
    fills, or the number was not finite) are left out."""
    logged = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    size = max(1, -(-len(logged) // points))
    parts = [logged[first : first + size] for first in range(0, len(logged), size)]
    means = [[round(statistics.mean(column), 5) for column in zip(*part, strict=True)] for part in parts]
    return [step for step, _ in means], [value for _, value in means]


def main() -> None:
    for file in sorted(RESULTS.glob("*/*.json")):
        picture = PLOTS / file.parent.name / f"{file.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure = plot(json.loads(file.read_text()))
        figure.savefig(picture, dpi=130)
        plt.close(figure)
    write_page()


if __name__ == "__main__":
    main()
