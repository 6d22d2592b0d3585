"""The report of the experiment of the paper: one HTML page, and the same in Markdown, in the folder WORK/report.

The page holds its pictures, so it can be sent alone. The Markdown file refers to the pictures next to it.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from dclr.evaluation import page
from dclr.files import atomic_write
from experiments import evidence
from experiments.published import ROWS, Published

TITLE = "DCLR on UCF101 and HMDB51"
OURS = "this run"

PICTURES = {
    "confusion.png": "Confusion matrix",
    "mistakes.png": "Most confident mistakes",
    "retrieval.png": "Nearest train videos of some test videos",
    "foreground.png": "Moving foreground on other backgrounds",
    "maps.png": "Activation maps",
}
"""What an evaluation writes into its folder `pictures`."""

NOT_COMPARABLE = (
    "The published figures are not comparable with ours line by line: networks, clips, epochs and the number of splits "
    "differ, and sources do not always say whether they report the last epoch or the best one on the test videos. Ours "
    "is the last one. An empty cell: the source gives no figure, or we have not read it there."
)


@dataclass(frozen=True)
class Table:
    """A table: the names of its columns, and its lines."""

    head: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Output:
    """The output of a command."""

    text: str


@dataclass(frozen=True)
class Section:
    """A heading and its content. Each text is a paragraph."""

    heading: str
    parts: list[str | Table | Picture | Output]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of our rows of the table, with what the report says about it."""

    row: str
    evaluations: tuple[Path, ...]
    """The folders of the evaluations whose pictures are shown: those of the first seed and the first split."""
    pretrained: str
    network: str
    protocol: str


def write(
    folder: Path, result: evidence.Result, own: Sequence[Run], facts: Sequence[str], times: Table,
    checks: Sequence[str],
) -> list[Path]:  # fmt: skip
    """Write report.html, report.md and its pictures into `folder`, in place of those of an earlier report.

    Args:
        result: the experiment's result with seeds and environment (see evidence.py).
        own: our rows.
        facts: lines about data sets, machine and flags.
        times: the measured and expected times of the stages.
        checks: what train.py check found, one text for each data set.

    Returns:
        The paths of the two files.
    """
    sections = [
        Section("Results next to published figures", [NOT_COMPARABLE, comparison(result, own), spread(result)]),
        Section("Sources and protocols", [sources(own)]),
        Section("Claims that were written down before the runs", claims(result)),
        Section("All figures", [all_figures(result)]),
        Section("What was run", [*facts, times]),
        Section("Pretraining", [Picture(folder.parent / "ucf101.png", "Curves of pretraining")]),
        *(Section(f"{run.row}: pictures of the first seed and split", list(pictures(run))) for run in own),
        Section("Data sets", list(map(Output, checks))),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ucf101.png", *PICTURES):
        for picture in folder.glob(f"[0-9][0-9][0-9]-{name}"):
            picture.unlink()
    html, markdown = folder / "report.html", folder / "report.md"
    atomic_write(html, as_html(sections).encode())
    atomic_write(markdown, as_markdown(sections, folder).encode())
    return [html, markdown]


# -------------------------------------------------------------------------------------------------------------- content


def comparison(result: evidence.Result, own: Sequence[Run]) -> Table:
    """Return our rows, then the published rows. The last column is a row number of the table of `sources`."""
    shown = {
        name: title
        for name, (title, _) in result["figures"].items()
        if name.endswith(("_finetune", "_recall")) or name in ("ucf101_finetune_first", "ucf101_linear")
    }
    published = {
        "ucf101_finetune": "ucf101",
        "hmdb51_finetune": "hmdb51",
        "ucf101_linear": "linear",
        "ucf101_recall": "retrieval",
    }
    numbers = {words: str(number) for number, words in enumerate(described(own), 1)}
    head = ["method", "pretrained on", "network", *(f"{title}, %" for title in shown.values()), "source"]
    lines = []
    for run in own:
        values = result["rows"][run.row]
        cells = [evidence.cell(values[name], "%").removesuffix(" %") for name in shown]
        lines.append([run.row, run.pretrained, run.network, *cells, numbers[OURS, run.protocol]])

    def cell(row: Published, name: str) -> str:
        value = getattr(row, published[name]) if name in published else None
        return "" if value is None else f"{value:.1f}"

    for row in ROWS:
        cells = [cell(row, name) for name in shown]
        lines.append([row.method, row.pretrained, row.backbone, *cells, numbers[row.source, row.protocol]])
    return Table(head, lines)


def described(own: Sequence[Run]) -> list[tuple[str, str]]:
    """Return each source with its protocol once, ours first."""
    ours = [(OURS, run.protocol) for run in own]
    return list(dict.fromkeys([*ours, *((row.source, row.protocol) for row in ROWS)]))


def sources(own: Sequence[Run]) -> Table:
    """Return the numbered sources, with what each says about its protocol."""
    lines = [[str(number), *words] for number, words in enumerate(described(own), 1)]
    return Table(["number", "source", "protocol"], lines)


def spread(result: evidence.Result) -> str:
    seeds = len(result["seeds"])
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Ours: mean ± standard deviation (n - 1) over all splits of all seeds ({over}), top-1 by video, or R@1. "
        "Columns of one split: over the seeds. Pretraining on UCF101 has seen the train videos of split 1, so it has "
        "also seen test videos of the splits 2 and 3, without their labels."
    )


def claims(result: evidence.Result) -> list[str | Table | Picture | Output]:
    if not result["findings"]:
        return ["Not judged: the claims need DCLR, MoCo and at least two seeds."]
    lines = [
        [each["claim"], "holds" if each["holds"] else "does not hold", each["detail"]] for each in result["findings"]
    ]
    return [Table(["claim", "verdict", "difference"], lines)]


def all_figures(result: evidence.Result) -> Table:
    """Return every figure of every row, including chance."""
    lines = []
    for name, (title, unit) in result["figures"].items():
        cells = [evidence.cell(row[name], unit) if name in row else "" for row in result["rows"].values()]
        lines.append([title, *cells])
    return Table(["", *result["rows"]], lines)


def pictures(run: Run) -> Iterator[Picture]:
    """Yield the pictures of a run's evaluations."""
    for evaluation in run.evaluations:
        for name, title in PICTURES.items():
            file = evaluation / "pictures" / name
            if file.exists():
                where = evaluation.parent.name if evaluation.name == "accuracy" else evaluation.name
                yield Picture(file, f"{title}: {run.row}, {where}")


# ---------------------------------------------------------------------------------------------------------------- files


def as_html(sections: Sequence[Section]) -> str:
    def html(part: str | Table | Picture | Output) -> str:
        match part:
            case Table(head, lines):
                return page.table(head, lines)
            case Picture(file, caption):
                return page.picture(file, caption, caption)
            case Output(text):
                return page.Html("<pre>" + "\n".join(map(page.text, text.splitlines())) + "</pre>")
        return part

    body = [page.section(each.heading, *map(html, each.parts)) for each in sections]
    return page.page(TITLE, body)


def as_markdown(sections: Sequence[Section], folder: Path) -> str:
    """Return the report in Markdown, after copying its pictures into `folder` under numbered names."""
    lines, count = [f"# {TITLE}"], 0
    for each in sections:
        lines += ["", f"## {each.heading}"]
        for part in each.parts:
            lines.append("")
            match part:
                case Table(head, rows):
                    lines += [harness.table_header(head), *map(harness.table_line, rows)]
                case Picture(file, caption):
                    count += 1
                    name = f"{count:03d}-{file.name}"
                    shutil.copyfile(file, folder / name)
                    lines.append(f"![{caption}]({name})")
                case Output(text):
                    lines += ["```", text.rstrip(), "```"]
                case _:
                    lines.append(part)
    return "\n".join(lines) + "\n"
