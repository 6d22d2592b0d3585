"""What the pages say is what was measured and what is there."""

import json
import re
import shutil
from pathlib import Path

from benchmarks import tables
from experiments import evidence

ROOT = Path(__file__).parents[1]


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


def test_every_experiment_has_a_section_of_the_evidence_and_says_how_it_is_run():
    page = evidence.PAGE.read_text()
    for file in (ROOT / "experiments").glob("*.py"):
        if file.stem in ("__init__", "runs", "evidence"):
            continue
        assert evidence.MARKER.format(file.stem) in page, file
        assert f"python -m experiments.{file.stem}" in file.read_text(), file


def test_results_name_device_versions_commit_and_date():
    for path in [
        file for folder in ("benchmarks", "experiments") for file in (ROOT / folder / "results").rglob("*.json")
    ]:
        environment = json.loads(path.read_text())["environment"]
        assert {"device", "versions", "commit", "date"} <= environment.keys(), path


def test_every_flag_and_every_file_the_readme_names_exists():
    import eval as evaluation
    import train
    from dclr.evaluation import view_sheet

    parsers = [entry.make_parser() for entry in (train, evaluation)]
    known = {"--hostfile", "--nproc_per_node", "--logdir"}  # of deepspeed, torchrun and tensorboard
    known |= set(view_sheet.make_parser()._option_string_actions)
    for parser in parsers:
        for action in parser._subparsers._group_actions[0].choices.values():
            known |= set(action._option_string_actions)
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition("## From the authors' commands to these")
    table, _, after = rest.partition("## Where things are")
    ours = before + after + "\n".join(row.rpartition(" | ")[2] for row in table.splitlines())
    ours = ours.replace("without `--finetune`", "")
    assert not set(re.findall(r"--[a-z][a-z_-]+", ours)) - known
    for path in re.findall(r"\((docs/[a-zA-Z.]+)\)|`(ds_configs/\w+\.json)`", readme):
        assert (ROOT / "".join(path)).is_file(), path


def test_the_logs_index_lists_every_entry_once_and_links_to_its_heading():
    page = (ROOT / "docs" / "LOG.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.M)
    rows = re.findall(r"^\| \[(\d{4}-\d\d-\d\d)\]\(#(\S+)\) \| (.+) \| (.+) \|$", page, re.M)
    listed = [f"{date} · {title}: {verdict}" for date, _, title, verdict in rows]
    assert listed == [heading for heading in headings if re.match(r"\d{4}-\d\d-\d\d ", heading)]
    assert listed == sorted(listed, key=lambda heading: heading[:10], reverse=True)
    # GitHub's anchor of a heading: lower case, without punctuation, a hyphen for each space.
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert [anchor for _, anchor, _, _ in rows] == [anchor for anchor in anchors if anchor[:4].isdigit()]
    assert len(set(anchors)) == len(anchors)
    assert not set(re.findall(r"\]\(#(\S+?)\)", page)) - set(anchors)


def test_what_we_know_opens_the_log_and_is_a_page_of_at_most_60_lines():
    lines = (ROOT / "docs" / "LOG.md").read_text().splitlines()
    first, second = [number for number, line in enumerate(lines) if line.startswith("## ")][:2]
    assert lines[first] == "## What we know"
    assert second - first <= 60
    assert max(map(len, lines[first:second])) <= 120
