"""The data set layout that a page of docs/ adds: its program is taken from the page and run."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, make_list, run_program

from dclr.data.datasets import LAYOUTS, official_splits, open_catalog
from dclr.errors import UserError

PAGES = sorted((REPOSITORY / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "\n".join(page.read_text() for page in PAGES)
    [code] = re.findall(r"^```python\n(# lab\.py\n.*?)^```", text, re.M | re.S)
    file = tmp_path_factory.mktemp("program") / "lab.py"
    file.write_text(code)
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write recordings of two activities by three subjects, and a file that the table does not name."""
    folder = tmp_path_factory.mktemp("lab")
    names = [f"{subject}_{activity}" for subject in ("ann", "bob", "eve") for activity in ("run", "sit")]
    make_list(folder / "recordings", train=[(f"{name}.mp4", 0) for name in names])
    for file in (folder / "recordings").glob("*.txt"):
        file.unlink()
    rows = [f"{name},{name.split('_')[0]},{name.split('_')[1]},warm" for name in names]
    (folder / "recordings.csv").write_text("\n".join(["id,subject,activity,light", *rows, "lost,ann,run,cold"]) + "\n")
    (folder / "notes.txt").write_text("x\n")
    return folder


@pytest.fixture
def lab(program: Path) -> Iterator[None]:
    runpy.run_path(str(program))
    yield
    del LAYOUTS["lab"]


def test_the_layout_of_the_page_gives_its_splits_by_subject(lab, data: Path) -> None:
    assert official_splits(data) == [1, 2, 3]
    catalog = open_catalog(data, 2)
    assert (catalog.layout, catalog.classes) == ("lab", ("run", "sit"))
    assert {video.group for video in catalog.videos("test")} == {"bob"}
    assert {video.group for video in catalog.videos("train")} == {"ann", "eve"}
    assert {video.path: video.label for video in catalog.videos("test")} == {
        "recordings/bob_run.mp4": 0,
        "recordings/bob_sit.mp4": 1,
    }
    assert [video.path for video in catalog.missing["train"]] == ["recordings/lost.mp4"]
    assert catalog.unused == {"no video: suffix .txt": ("notes.txt",)}
    with pytest.raises(UserError, match=r"^split 4 of lab: must be 1, 2 or 3$"):
        open_catalog(data, 4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,who,activity\na,b,c\n", "must have the columns id, subject and activity"),
        ("", "must have the columns id, subject and activity"),
        ("id,subject,activity\n../../x,a,b\n", "must be relative to the data folder and stay inside it"),
    ],
)
def test_a_wrong_table_is_refused_with_one_line(lab, tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "recordings.csv").write_text(table)
    with pytest.raises(UserError, match=message) as refusal:
        open_catalog(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_run_uses_the_layout(lab, train_main, tiny: dict[str, Any], data: Path, tmp_path: Path) -> None:
    flags = {**tiny, "data": str(data), "batch_size": 2, "epochs": 1, "max_missing": 30}
    train_main("linear", **flags, split=1, shots=1, out=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "report.json").read_text())["data"]
    assert (found["layout"], found["videos"], found["few_labels"]["by_class"]) == ("lab", 2, {"run": 1, "sit": 1})


def test_the_program_of_the_page_runs(program: Path, data: Path, clean_environment: dict[str, str]) -> None:
    done = run_program(program, "check", "--data", data, "--split", "3", environment=clean_environment)
    assert done.returncode == 0, done.stderr
    assert f"{data}: lab, 6 videos, 2 classes" in done.stdout
