"""Results of experiments: JSON files, comparisons of means over seeds, and the page docs/evidence.md.

    python -m experiments.evidence      writes the page and its plots again, from the committed results

A result is a dictionary in results/DEVICE/NAME.json:
    question, command       the question, and the command line that answered it
    seeds                   [0, 1, 2]
    figures                 {figure: [title, "%" or "min"]}: the columns of the table, in order
    rows                    {row: {figure: [one value for each seed]}}; a single number does not depend on seeds
    findings                [{"claim", "holds", "detail"}]: each pre-registered claim, and whether it holds
    panels                  the panels of a plot along training: [{"title", "ylabel", "lines", "levels"}]. A line is
                            {"steps": [...], "values": [[one value for each step] for each seed]}. A level is a number.
    groups                  the groups of rows, if rows are named "GROUP: ROW". A bar plot has one panel for each group
    ylabel                  the label of a bar plot's axis, if it is not "share of test videos"
    recipe, environment     the settings and the machine. Commit, device and versions of the environment are those of
                            all runs, and environment.precision names the precisions in which networks were trained

A result file keeps the words that were used when it was measured. The page computes the findings again from the rows,
and shows names as plots.LABELS says.
"""

import importlib
import itertools
import json
import math
import operator
import re
import shutil
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from dclr.errors import UserError
from dclr.report import environment
from experiments import plots, runs
from experiments.plots import label

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = runs.ROOT / "docs" / "evidence.md"
PLOTS = runs.ROOT / "docs" / "evidence"
MARKER, END = "<!-- experiments/{}.py -->\n", "<!-- end -->\n"
"""The generated text of an experiment is between these two lines."""

STANDARD_ERRORS = 2.0
"""Two means differ if their difference is larger than this many of its standard errors."""

LARGEST_SHARE = 0.05
"""An exact permutation test puts one mean above another if its p-value is at most this."""

AND = " and "
"""Separates the commits, devices, versions and precisions of a result's runs."""

NOT_RECORDED = "not recorded for earlier runs"
"""Stands for the precision of earlier results, which do not name it."""

Result = dict[str, Any]
Finding = dict[str, Any]
Values = list[float] | float
Rows = dict[str, dict[str, Values]]


# ---------------------------------------------------------------------------------------------------------- comparisons


def finding(claim: str, holds: bool, detail: str) -> Finding:
    return {"claim": claim, "holds": bool(holds), "detail": detail}


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the difference of two means over at least two seeds, and its standard error."""
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(second) / len(second))
    return statistics.mean(first) - statistics.mean(second), error


def above(claim: str, more: Sequence[float], less: Sequence[float]) -> list[Finding]:
    """Return the finding that the first mean is above the second by more than two standard errors; [] for one seed.

    The detail also has the p-value of an exact test, because few seeds say little about a standard error.
    """
    if min(len(more), len(less)) < 2:
        return []
    return [above_finding(claim, *difference(more, less), permutation_share(more, less))]


def above_level(claim: str, values: Sequence[float], level: float) -> list[Finding]:
    """Return the finding that a mean is above a known level, such as chance, as `above` does for two means."""
    if len(values) < 2:
        return []
    gap, error = statistics.mean(values) - level, statistics.stdev(values) / math.sqrt(len(values))
    return [above_finding(claim, gap, error, sign_share([value - level for value in values]))]


def above_finding(claim: str, gap: float, error: float, share: float) -> Finding:
    threshold = f"threshold more than {100 * STANDARD_ERRORS * error:.1f}"
    detail = f"{100 * gap:+.1f} points, {threshold}, exact test {share:.3f}"
    return finding(claim, gap > STANDARD_ERRORS * error, detail)


def not_below(claim: str, first: Sequence[float], second: Sequence[float]) -> list[Finding]:
    """Return the finding that the first mean is at most two standard errors below the second; [] for one seed."""
    if min(len(first), len(second)) < 2:
        return []
    gap, error = difference(first, second)
    detail = f"{100 * gap:+.1f} points, threshold at least {-100 * STANDARD_ERRORS * error:.1f}"
    return [finding(claim, gap >= -STANDARD_ERRORS * error, detail)]


def equal(claim: str, first: Sequence[float], second: Sequence[float]) -> list[Finding]:
    """Return the finding that two means differ by at most two standard errors; [] for one seed."""
    if min(len(first), len(second)) < 2:
        return []
    gap, error = difference(first, second)
    detail = f"{100 * gap:+.1f} points, threshold at most {100 * STANDARD_ERRORS * error:.1f} in either direction"
    return [finding(claim, abs(gap) <= STANDARD_ERRORS * error, detail)]


def permutation_share(more: Sequence[float], less: Sequence[float]) -> float:
    """Return the p-value of an exact permutation test that the first mean is above the second, one-sided.

    It is the share of all divisions of the values into two groups of these sizes whose difference of means is at least
    as large as the given one. Source: Fisher, The Design of Experiments, 1935.
    """
    values, least = [*more, *less], math.fsum(more) - 1e-12
    reached = sum(math.fsum(chosen) >= least for chosen in itertools.combinations(values, len(more)))
    return reached / math.comb(len(values), len(more))


def sign_share(differences: Sequence[float]) -> float:
    """Return the p-value of an exact sign-flip test that the mean of the differences is above 0, one-sided.

    It is the share of all choices of signs whose sum is at least as large as the given one. Source: Fisher, The Design
    of Experiments, 1935.
    """
    least = math.fsum(differences) - 1e-12
    signs = list(itertools.product((-1, 1), repeat=len(differences)))
    return sum(math.fsum(map(operator.mul, choice, differences)) >= least for choice in signs) / len(signs)


def above_exact(claim: str, more: Sequence[float], less: Sequence[float]) -> list[Finding]:
    """Return the finding that an exact permutation test puts the first mean above the second.

    [] if a side has fewer than three values: with two on each side, no difference reaches the threshold.
    """
    if min(len(more), len(less)) < 3:
        return []
    share = permutation_share(more, less)
    return [finding(claim, share <= LARGEST_SHARE, exact_detail(more, less, share))]


def not_above_exact(claim: str, first: Sequence[float], second: Sequence[float]) -> list[Finding]:
    """Return the finding that an exact permutation test does not put the first mean above the second."""
    return [each | {"holds": not each["holds"]} for each in above_exact(claim, first, second)]


def exact_detail(more: Sequence[float], less: Sequence[float], share: float) -> str:
    gap = 100 * (statistics.mean(more) - statistics.mean(less))
    return f"{gap:+.1f} points, exact test {share:.3f}, threshold {LARGEST_SHARE}"


# ---------------------------------------------------------------------------------------------------- published results


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def published_file(name: str) -> Path:
    """Return the path of the committed result for this kind of device. The file may not exist."""
    return harness.results_folder(here(), RESULTS) / f"{name}.json"


def published(name: str, recipe: dict[str, Any], options: runs.Options) -> Result:
    """Return the committed result, to which this run adds methods or seeds.

    With --with-published, the result must have all seeds of `options`. Otherwise it must have exactly the seeds below
    them. It may come from another processor, which acts like another seed, and from another precision. Both are
    printed here, and the page names those of all runs.

    Raises:
        UserError: there is no such result, or its seeds or an entry of `recipe` differ.
    """
    flag, file = flag_for_published(options), published_file(name)
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {file} cannot be read ({error}); leave the flag out to run everything") from None
    has, needs = result["seeds"], list(range(options.seeds.stop if options.with_published else options.seeds.start))
    if options.with_published and needs == has[: len(needs)]:
        needs = has  # more seeds than needed
    wanted = {"seeds": needs, **json.loads(json.dumps(recipe))}
    found = {"seeds": has, **result["recipe"]}
    for setting, value in wanted.items():
        if found.get(setting) != value:
            raise UserError(
                f"{flag}: {file} has {setting} {found.get(setting)}, but this run needs {value}; "
                "leave the flag out to run everything"
            )
    where = result["environment"]
    print(f"{flag}: {file} comes from {where['device']}; precision: {where.get('precision', NOT_RECORDED)}")
    return result


def with_more_seeds(before: Result, result: Result) -> Result:
    """Return `result` with the values of all seeds: those of `before`, then its own. Both have the same recipe."""
    result = result | {"rows": rows_with_more_seeds(before, result["rows"])}
    return result | ({"panels": panels_with_more_seeds(before, result["panels"])} if "panels" in result else {})


def flag_for_published(options: runs.Options) -> str:
    """Return the flag of the command line that asks for the published result, for error messages."""
    return "--with-published" if options.with_published else "--first-seed"


def check_flags(before: dict[str, list[str]], now: dict[str, list[str]], options: runs.Options) -> None:
    """Raise UserError if a published method (in `before`) was run with other flags than it has now."""
    flag = flag_for_published(options)
    for method, flags in before.items():
        if now.get(method) != flags:
            raise UserError(f"{flag}: the published {method} was run with {flags}, but no method here has these flags")


def check_seeds(before: Result, rows: Sequence[str], options: runs.Options) -> None:
    """Raise UserError if the seeds of `options` cannot be added to one of these rows of `before`.

    The row must have exactly the seeds below the first one. If that is 0, the row is replaced, and it must not have
    more seeds than `options`.
    """
    first, seeds = options.seeds.start, len(options.seeds)
    for row in rows:
        own = plots.seeds_of(before["rows"].get(row, {}))
        if first and own != first:
            raise UserError(
                f"--first-seed is {first}, but the next seed of the published {row} is {own}; --with-published adds it"
            )
        if not first and own > seeds:
            raise UserError(f"--seeds is {seeds}, but the published {row}, which they would replace, has {own} seeds")


def rows_with_more_seeds(before: Result, rows: Rows) -> Rows:
    """Return the rows of `before`. Those that are also in `rows` have the values of the new seeds too."""
    added = {
        row: {
            figure: before["rows"][row][figure] + value if isinstance(value, list) else value
            for figure, value in figures.items()
        }
        for row, figures in rows.items()
    }
    return before["rows"] | added


def panels_with_more_seeds(before: Result, panels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the panels of `before`. Lines that are also in `panels` have the values of the new seeds too."""

    def joined(name: str, earlier: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
        if earlier["steps"] != line["steps"]:
            raise ValueError(f"{name} was logged at other steps before: {earlier['steps']}, now {line['steps']}")
        return line | {"values": earlier["values"] + line["values"]}

    found = {label(panel["title"]): panel for panel in before["panels"]}
    for panel in panels:
        earlier = found[panel["title"]]["lines"]
        lines = {name: joined(name, earlier[name], line) for name, line in panel["lines"].items()}
        found[panel["title"]] = panel | {"lines": earlier | lines}
    return list(found.values())


def in_order(rows: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Return `rows` in the order of `order`. Raises KeyError if a row is not in `order`."""
    if others := rows.keys() - set(order):
        raise KeyError(f"not in order: {others}")
    return {name: rows[name] for name in order if name in rows}


def with_lines_of(
    before: Sequence[dict[str, Any]], panels: Sequence[dict[str, Any]], order: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the panels of both lists. Panels with the same title become one panel with the lines of both."""
    joined = {label(panel["title"]): panel for panel in before}
    for panel in panels:
        title = label(panel["title"])
        lines = joined.get(title, {}).get("lines", {}) | panel["lines"]
        joined[title] = panel | {"lines": in_order(lines, order)}
    return list(joined.values())


def publish(
    name: str, result: Result, chains: Sequence[runs.Chain], options: runs.Options, taken: Result | None = None
) -> bool:
    """Print the table, write NAME.json and NAME.png into the work folder, publish both and write the page.

    A quick run is never published. A result does not replace a published one that has another recipe, or seeds, rows
    or figures that it lacks.

    Args:
        name: the name of the experiment.
        result: the result without command, seeds and environment, which are added here.
        chains: the commands that were run, whose environments are recorded. Without commands, that of this process is.
        options: the common options. The values of seeds below the first one come from `taken`, which may have more
            seeds than run.
        taken: the published result that some rows or seeds come from. Its environment is recorded too.

    Returns:
        True if the result was published.
    """
    result = result | {
        "command": " ".join([f"python -m experiments.{name}", *options.arguments]),
        "seeds": list(range(max(options.seeds.stop, len(taken["seeds"]) if taken else 0))),
        "environment": environment_of(chains, taken),
    }
    harness.write(options.work, name, result, plots.plot(result))
    print("\n" + "\n".join(body(result)))
    written = options.work / f"{name}.json"
    if options.quick:
        print(f"\nwrote {written} and its plot; this run is not published")
        return False
    kept = published_file(name)
    if kept.exists() and (why := why_not_replaced(json.loads(kept.read_text()), result)):
        print(f"\nwrote {written} and its plot; {kept} has {why}, and stays: delete it to publish this result")
        return False
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(written, kept)
    (PLOTS / kept.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(written.with_suffix(".png"), PLOTS / kept.parent.name)
    write_page()
    print(f"\nwrote {kept} and {PAGE}")
    return True


def environment_of(chains: Sequence[runs.Chain], taken: Result | None) -> dict[str, Any]:
    """Return the environment of this process, with the commits, devices, versions and precisions of all runs.

    `taken`: as in `publish`. Several values are joined by AND.
    """
    this, precisions = environment(here()), runs.precisions(chains)
    environments = [report["environment"] for report in runs.reports(chains)]
    if taken:
        environments.append(taken["environment"])
        precisions |= set(taken["environment"].get("precision", NOT_RECORDED).split(AND))

    def joined(values: Iterable[str]) -> str:
        return AND.join(sorted({part for value in values for part in value.split(AND)}))

    environments = environments or [this]
    versions = {package: joined(each["versions"][package] for each in environments) for package in this["versions"]}
    return this | {
        **{name: joined(each[name] for each in environments) for name in ("commit", "device", "python")},
        "versions": versions,
        "precision": joined(precisions),
    }


def why_not_replaced(published: Result, result: Result) -> str:
    """Return what a published result has that `result` does not: its seeds, rows, figures or recipe; "" if nothing.

    Recipes may have methods that the other recipe lacks.
    """
    fewer = any(not published[part].keys() <= result[part].keys() for part in ("rows", "figures")) or any(
        plots.seeds_of(result["rows"][row]) < plots.seeds_of(values) for row, values in published["rows"].items()
    )
    if fewer or len(result["seeds"]) < len(published["seeds"]):
        return "seeds, rows or figures that this result lacks"
    now = json.loads(json.dumps(result["recipe"]))
    for setting, before in published["recipe"].items():
        after = now.get(setting, before)
        if isinstance(before, dict) and isinstance(after, dict):
            same = all(before[name] == after[name] for name in before.keys() & after.keys())
        else:
            same = before == after
        if not same:
            return f"another recipe ({setting})"
    return ""


# ------------------------------------------------------------------------------------------------------------- the page


def write_page() -> None:
    PAGE.write_text(with_sections(PAGE.read_text(), RESULTS))


def with_sections(page: str, results: Path) -> str:
    """Return the page with the generated text of every experiment, one block for each device."""

    def section(match: re.Match[str]) -> str:
        name = match[2]
        blocks = [
            "\n".join(described(name, file.parent.name, json.loads(file.read_text())))
            for file in sorted(results.glob(f"*/{name}.json"))
        ]
        return match[1] + "\n" + ("\n\n".join(blocks) or "Not measured yet.") + "\n\n" + END

    between = MARKER.format("@").replace("@", r"(\w+)")
    return re.sub(f"({between}).*?{END}", section, page, flags=re.DOTALL)


def described(name: str, kind: str, result: Result) -> Iterator[str]:
    """Yield the lines of a result on the page. `kind` is the name of its device's folder."""
    where, seeds = result["environment"], len(result["seeds"])
    spread = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    if any(0 < plots.seeds_of(row) < seeds for row in result["rows"].values()):
        spread += ", or over the number that a row names"
    yield f"{spread}. {where['device']}, {where['date'][:10]}. [Plot](evidence/{kind}/{name}.png)."
    commits = f"Commits of the runs: {', '.join(where['commit'].split(AND))}."
    precision = where.get("precision", "").replace(AND, ", ")
    yield commits + (f" Precision: {precision}." if precision else "")
    yield ""
    yield from body(result | {"findings": importlib.import_module(f"experiments.{name}").findings(result)})


def body(result: Result) -> Iterator[str]:
    """Yield the table and the findings in markdown."""
    if result["rows"]:
        figures = result["figures"]
        yield harness.table_header(["", *(label(title) for title, _ in figures.values())])
        for row, values in result["rows"].items():
            cells = [cell(values[figure], unit) if figure in values else "" for figure, (_, unit) in figures.items()]
            yield harness.table_line([plots.with_seeds(row, plots.seeds_of(values), len(result["seeds"])), *cells])
    if result["rows"] and result["findings"]:
        yield ""
    for found in result["findings"]:
        line = f"- {'Holds' if found['holds'] else '**Does not hold**'}: {found['claim']} ({found['detail']})."
        yield textwrap.fill(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def cell(values: Values, unit: str) -> str:
    """Return mean ± standard deviation over seeds, or a single value. Raises ValueError for an unknown unit."""
    if unit not in ("%", "min"):
        raise ValueError(f"the unit must be % or min, not {unit}")
    by_seed = values if isinstance(values, list) else [values]
    shown = [statistics.mean(by_seed), *([statistics.stdev(by_seed)] if len(by_seed) > 1 else [])]
    numbers = " ± ".join(f"{100 * value:.1f}" if unit == "%" else f"{value:.1f}" for value in shown)
    return f"{numbers} %" if unit == "%" else numbers


def main() -> None:
    for file in sorted(RESULTS.glob("*/*.json")):
        picture = PLOTS / file.parent.name / f"{file.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        plots.save(plots.plot(json.loads(file.read_text())), picture)
    write_page()


if __name__ == "__main__":
    main()
