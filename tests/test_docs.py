"""Tests of README.md and docs/: figures follow the committed results; links, flags, commands and files exist."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks import tables
from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.evaluation import view_sheet
from experiments import evidence, ucf101

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "LOG.md"
# The log names flags and commands as they were called at the time.
PAGES_OF_TODAY = [page for page in PAGES if page != LOG]
PAGE_OF_THE_AUTHORS_FLAGS = ROOT / "docs" / "from-the-authors-code.md"
# Flags of deepspeed, torchrun, tensorboard, Slurm's programs and mpirun.
FOREIGN_FLAGS = {
    "--hostfile", "--master_addr", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id",
    "--logdir", "--signal", "--requeue", "--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node",
    "--cpus-per-task", "--partition", "--account", "--open-mode", "--kill-on-bad-exit", "--label", "--me", "--format",
    "--pty", "--overlap", "--distribution", "--map-by",
}  # fmt: skip


def subcommands() -> dict[str, dict]:
    """Return the parsers of train.py and eval.py by entry and subcommand."""
    entries = {"train.py": train.make_parser(), "eval.py": evaluation.make_parser()}
    return {name: parser._subparsers._group_actions[0].choices for name, parser in entries.items()}


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> list[str]:
    """Return GitHub's anchor of each heading: lower case, no punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(page.read_text()), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def without_foreign_columns(page: Path) -> str:
    """Return a page's text. The tables of the page of the authors' flags keep only their last column."""
    lines = page.read_text().splitlines()
    if page == PAGE_OF_THE_AUTHORS_FLAGS:
        lines = [line.rpartition(" | ")[2] if line.startswith("|") else line for line in lines]
    return "\n".join(lines)


def test_the_performance_tables_are_those_of_the_committed_results(tmp_path):
    page = tables.PAGE.read_text()
    assert tables.with_tables(page, tables.tables()) == page
    # And they follow the results.
    shutil.copytree(tables.harness.RESULTS, tmp_path / "results")
    file = tmp_path / "results" / "cpu" / "sharding.json"
    result = json.loads(file.read_text())
    result["rows"]["ZeRO-1"]["ratio_to_ddp"] += 1
    file.write_text(json.dumps(result))
    assert tables.with_tables(page, tables.tables(tmp_path / "results")) != page


def test_the_evidence_is_that_of_the_committed_results():
    page = evidence.PAGE.read_text()
    assert evidence.with_sections(page, evidence.RESULTS) == page
    for file in evidence.RESULTS.glob("*/*.json"):
        pictures = [
            each
            for each in re.findall(r"\]\(([^)]+\.png)\)", page)
            if each.endswith(f"{file.parent.name}/{file.stem}.png")
        ]
        assert len(pictures) == 1, f"{file} is shown nowhere"
        assert (ROOT / "docs" / pictures[0]).is_file(), file


OF_UCF101 = ("ucf101_plan", "ucf101_report", "hours", "published")


def test_every_experiment_has_a_section_of_the_evidence_and_says_how_it_is_run():
    page = evidence.PAGE.read_text()
    for file in (ROOT / "experiments").glob("*.py"):
        if file.stem in ("__init__", "runs", "evidence", "plots", "dropped_frames", "inputs", "smaller", *OF_UCF101):
            continue
        assert evidence.MARKER.format(file.stem) in page, file
        assert f"python -m experiments.{file.stem}" in file.read_text(), file


def test_results_name_device_versions_commit_and_date():
    for path in [
        file for folder in ("benchmarks", "experiments") for file in (ROOT / folder / "results").rglob("*.json")
    ]:
        environment = json.loads(path.read_text())["environment"]
        assert {"device", "versions", "commit", "date"} <= environment.keys(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(page.read_text())):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        file = page.parent / path if path else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_two_headings_of_a_page_have_the_same_anchor(page):
    assert len(set(anchors(page))) == len(anchors(page))


@pytest.mark.parametrize("page", PAGES_OF_TODAY, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page):
    known = FOREIGN_FLAGS | set(view_sheet.make_parser()._option_string_actions)
    known |= set(ucf101.make_parser()._option_string_actions)
    for parsers in subcommands().values():
        for parser in parsers.values():
            known |= set(parser._option_string_actions)
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", without_foreign_columns(page))) - known


@pytest.mark.parametrize("page", PAGES_OF_TODAY, ids=lambda page: page.name)
def test_every_command_that_a_page_gives_is_accepted(page):
    for entry, parsers in subcommands().items():
        commands = "|".join(parsers)
        for command, arguments in re.findall(
            rf"{re.escape(entry)} ({commands})\b([^`#\n]*)", without_foreign_columns(page)
        ):
            if "--" in arguments and "..." not in arguments:
                parsers[command].parse_args(shlex.split(arguments))


def test_every_path_that_the_readme_names_exists():
    readme = (ROOT / "README.md").read_text()
    paths = re.findall(r"`?((?:dclr|kernels|benchmarks|experiments|ds_configs)/[\w/]*(?:\.\w+)?)`?", readme)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_readme_has_at_most_150_lines_of_at_most_120_columns():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_the_index_links_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page


def test_the_figures_of_the_field_are_on_one_page_only():
    pages = [page.name for page in PAGES if "figures-of-the-field" in anchors(page)]
    assert pages == ["method.md"]


def test_the_readmes_picture_can_be_made_again_and_is_small(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "pictures" / "views.py"))["plot_views"](tmp_path / "views.jpg")
    for picture in (tmp_path / "views.jpg", ROOT / "docs" / "pictures" / "views.jpg"):
        assert 20_000 < picture.stat().st_size < 150_000


def test_the_logs_index_lists_every_entry_once_and_links_to_its_heading():
    page = LOG.read_text()
    headings = re.findall(r"^## (.+)$", page, re.M)
    rows = re.findall(r"^\| \[(\d{4}-\d\d-\d\d)\]\(#(\S+)\) \| (.+) \| (.+) \|$", page, re.M)
    listed = [f"{date} · {title}: {verdict}" for date, _, title, verdict in rows]
    assert listed == [heading for heading in headings if re.match(r"\d{4}-\d\d-\d\d ", heading)]
    assert listed == sorted(listed, key=lambda heading: heading[:10], reverse=True)
    assert [anchor for _, anchor, _, _ in rows] == [anchor for anchor in anchors(LOG) if anchor[:4].isdigit()]


def test_what_we_know_opens_the_log_and_is_a_page_of_at_most_60_lines():
    lines = LOG.read_text().splitlines()
    first, second = [number for number, line in enumerate(lines) if line.startswith("## ")][:2]
    assert lines[first] == "## What we know"
    assert second - first <= 60
    assert max(map(len, lines[first:second])) <= 120
