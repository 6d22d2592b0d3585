"""benchmarks/train.py: its data set of links, its figures and verdicts, and its whole way with the runs themselves replaced."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks import train as benchmark
from benchmarks.train import Case, figures_of, judge, link_videos, summarise
from dclr.data.catalog import open_catalog


def write_metrics(folder: Path, lines: list[tuple[int, float, float]]) -> None:
    """(step, milliseconds in all, milliseconds waiting for data)"""
    folder.mkdir(parents=True)
    text = [
        json.dumps({"step": step, "milliseconds/total": total, "milliseconds/data": data, "memory/peak_gib": 1.5})
        for step, total, data in lines
    ]
    (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")


def test_links_make_a_data_set_of_any_size_that_holds_each_video_as_often(demo_videos, tmp_path):
    linked = open_catalog(link_videos(demo_videos, 40, tmp_path / "links"))
    source = open_catalog(demo_videos)
    assert set(linked.classes) == set(source.classes)
    assert len(linked.videos("train")) == 40
    targets = Counter((linked.root / video.path).resolve() for video in linked.videos("train"))
    assert set(targets) == {(source.root / video.path).resolve() for video in source.videos("train")}
    assert set(targets.values()) == {2, 3}  # 40 of 16
    for video in linked.videos("train"):
        assert linked.classes[video.label] in str((linked.root / video.path).resolve())


def test_figures_are_those_of_the_second_half(tmp_path):
    write_metrics(tmp_path / "run", [(4, 9000, 8000), (8, 500, 400), (12, 100, 10), (16, 300, 10)])
    found = figures_of(tmp_path / "run", batch=20)
    assert found["samples_per_second"] == pytest.approx(2 * 20 / 0.4)
    assert found["data_wait_share"] == pytest.approx(20 / 400)
    assert found["peak_gib"] == 1.5


def test_rows_compare_with_one_process_and_with_videos():
    def runs(*rates: float) -> list[dict[str, float]]:
        return [{"samples_per_second": rate, "data_wait_share": 0.1, "peak_gib": 1.0} for rate in rates]

    rows = summarise({
        Case(source="videos", processes=1): runs(10, 30, 20), Case(source="store", processes=1): runs(40),
        Case(source="videos", processes=2): runs(30), Case(source="store", processes=2): runs(60),
    })  # fmt: skip
    assert [row["samples_per_second"] for row in rows] == [20, 40, 30, 60]
    assert (rows[0]["lowest"], rows[0]["highest"]) == (10, 30)
    assert [row["growth_from_one_process"] for row in rows] == [1, 1, 1.5, 1.5]
    assert [row["times_videos"] for row in rows] == [1, 2, 1, 2]


def test_the_goal_is_judged_on_a_gpu_with_enough_cores_only():
    def rows(share: float) -> list[dict[str, float]]:
        return [{"processes": 1, "data_wait_share": share}, {"processes": 2, "data_wait_share": 0.9}]

    assert judge(rows(0.01), "cuda", 16).startswith("met: at most 1.0%")
    assert judge(rows(0.03), "cuda", 16).startswith("not met: at most 3.0%")
    assert judge(rows(0.01), "cuda", 4).startswith("not judged")
    assert judge(rows(0.01), "cpu", 16).startswith("the goal (under 2% with 16 cores) is stated for a GPU")


def test_the_whole_way(demo_videos, tmp_path, monkeypatch, capsys):
    commands: list[list[str]] = []

    def pretended(line, log):
        commands.append(list(line))
        if "pretrain" in line:
            rate = 20.0 if "store" in line[line.index("--data") + 1] else 40.0
            write_metrics(Path(line[line.index("--out") + 1]), [(4, 900, 800), (8, rate, 1)])

    monkeypatch.setattr(benchmark, "run", pretended)
    benchmark.main(
        [
            "--data",
            str(demo_videos),
            "--rounds",
            "2",
            "--processes",
            "1",
            "2",
            "--results",
            str(tmp_path),
            "--workers",
            "3",
        ]
    )
    content = json.loads((tmp_path / "cpu" / "train.json").read_text())
    assert {"device", "versions", "commit", "date"} <= content["environment"].keys()
    assert [(row["source"], row["processes"], row["times_videos"]) for row in content["rows"]] == [
        ("videos", 1, 1), ("store", 1, 2), ("videos", 2, 1), ("store", 2, 2),
    ]  # fmt: skip
    assert (tmp_path / "cpu" / "train.png").stat().st_size > 10_000
    assert commands[0][2] == "pack"
    assert len(commands) == 9
    assert {line[line.index("--workers") + 1] for line in commands[1:]} == {"3", "1"}
    assert commands[1] != commands[5]  # the second round begins with another case
    assert harness.table_line(["run"]).strip("| ") in capsys.readouterr().out


def test_a_run_that_fails_ends_with_its_last_words(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)ended with 3:.*no such thing"):
        benchmark.run(["sh", "-c", "echo no such thing; exit 3"], tmp_path / "log")
