"""Tests of benchmarks/loader.py, benchmarks/train.py and benchmarks/soak.py: frames, figures, one small run each."""

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from benchmarks import loader, loader_providers, soak, train
from benchmarks.harness import NotAvailable
from benchmarks.loader import Round
from benchmarks.loader_providers import Source
from benchmarks.train import Case
from dclr.data.datasets import open_catalog
from dclr.data.decode import NO_PTS, YuvFrames
from dclr.data.encode import write_video
from dclr.data.loader import BatchSampler
from dclr.errors import UserError

FRAMES = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos with a pattern that moves by 2 pixels a frame."""
    folder = tmp_path_factory.mktemp("videos") / "three_clips"
    for number in range(3):
        path = folder / f"class_{number % 2}" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        still = np.random.default_rng(number).integers(0, 256, (6, 16, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        write_video(path, np.stack([np.roll(still, 2 * frame, axis=1) for frame in range(FRAMES)]))
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return loader_providers.open_source(folder)


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path), metadata_errors="ignore") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# --------------------------------------------------------------------------------------------------------- right frames


def test_a_source_is_what_training_reads(source: Source, tmp_path: Path) -> None:
    assert source.name == "three_clips"
    assert [path.name for path in source.paths] == ["0.mp4", "2.mp4", "1.mp4"]
    assert [record.frames for record in source.records] == [FRAMES] * 3
    assert source.batch_size == 3
    numbers = loader_providers.frame_numbers(source.pair(0, 1))
    assert numbers.shape == (34,)
    assert numbers.tolist() != loader_providers.frame_numbers(source.pair(1, 1)).tolist()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.mp4").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match="none of its 1 training videos can be read"):
        loader_providers.open_source(tmp_path)


def test_every_provider_reads_the_drawn_frames(source: Source) -> None:
    readers, skipped = loader_providers.open_readers(source, list(loader.PROVIDERS))
    assert {"as released", "ours, videos"} <= readers.keys()
    assert readers.keys() | skipped.keys() == loader.PROVIDERS.keys()
    assert loader.count_wrong_videos(source, readers) == dict.fromkeys(readers, 0)
    expected = decode_all(source.paths[2])[loader_providers.frame_numbers(source.pair(4, 2))]
    assert np.array_equal(readers["as released"].frames(2, source.pair(4, 2)), expected)


@pytest.mark.parametrize(("name", "wrong"), [("Bowling", 1), ("Rowing", 0)])
def test_reading_by_time_gets_wrong_frames_of_scrambled_timestamps(genuine: Path, name: str, wrong: int) -> None:
    source = loader_providers.open_source(genuine / "ucf101_sample" / "UCF-101" / name)
    readers, _ = loader_providers.open_readers(source, ["as released", "ours, videos"])
    assert loader.count_wrong_videos(source, readers) == {"as released": wrong, "ours, videos": 0}


@pytest.mark.parametrize("planes", [False, True])
def test_a_frame_next_to_the_right_one_is_noticed(source: Source, planes: bool) -> None:
    rgb, luma = loader.true_thumbnails(source.paths[0])
    assert rgb.shape == luma.shape == (FRAMES, *loader.THUMBNAIL)
    frames = decode_all(source.paths[0])
    with av.open(str(source.paths[0])) as container:
        y = np.stack([frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)])
    wanted = np.array([3, 40, 41, 3])
    for shift in (0, 1):
        chosen = wanted + np.array([0, 0, shift, 0])
        found = YuvFrames(y[chosen], y, y, False, False) if planes else frames[chosen]
        assert loader.match(loader.thumbnails(found), wanted, luma if planes else rgb) == (shift == 0)


def test_as_released_hands_over_cropped_float_clips(source: Source) -> None:
    # Without workers: forked ones can inherit a lock that a thread of an earlier test held.
    (batch,) = loader_providers.as_released(source).batches(BatchSampler(3, 3, epochs=1), 0)
    assert len(batch) == 4  # query clip, its still, key clip, its still
    for view in batch:
        assert view.shape == (3, 3, 16, 112, 112)
        assert view.dtype == torch.float32
        assert 0 <= view.min() < view.max() <= 1
    for still in batch[1::2]:
        assert (still == still[:, :, :1]).all()
    for clip in batch[::2]:
        assert not torch.equal(clip[:, :, 0], clip[:, :, 1])


def test_what_providers_cannot_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(source, records=[replace(source.records[0], frames=31), *source.records[1:]])
    with pytest.raises(NotAvailable, match="fewer than 32 frames, of which there are 1"):
        loader_providers.as_released(short)
    untimed = replace(source, records=[replace(source.records[0], pts=np.full(FRAMES, NO_PTS)), *source.records[1:]])
    with pytest.raises(NotAvailable, match="1 videos have such frames"):
        loader_providers.as_released(untimed)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    readers, skipped = loader_providers.open_readers(source, ["torchcodec"])
    assert readers == {}
    assert "cannot be imported" in skipped["torchcodec"]


# -------------------------------------------------------------------------------------------------------------- figures


def test_processor_time_of_workers_counts(source: Source) -> None:
    """Each sample keeps its worker busy for 0.05 s of processor time."""

    def busy(index: int, pair: Any) -> torch.Tensor:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return torch.zeros(1)

    reader = loader_providers.Reader(lambda *_: np.zeros(0), loader_providers.sample_batches(source, busy))
    found = loader.read_epochs(source, reader, workers=2, epochs=2)
    assert found.samples == 6
    assert found.processor_seconds >= 0.3
    assert found.seconds >= 0.15


def test_a_round_is_about_as_long_as_asked_for(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def read_epochs(of: Source, reader: Any, workers: int, epochs: int) -> Round:
        asked.append(epochs)
        return Round(samples=3 * epochs, seconds=0.2 + 0.05 * epochs, processor_seconds=1.0)

    monkeypatch.setattr(loader, "read_epochs", read_epochs)
    assert loader.find_epochs(source, None, 1, seconds=4.0) == 64  # 16 epochs take 1 s
    assert asked == [1, 4, 16]


def test_figures_and_goals_by_hand() -> None:
    ours = [Round(100, 2.0, 1.0), Round(100, 4.0, 2.0), Round(100, 5.0, 4.0)]
    released = [Round(10, 2.0, 1.0), Round(10, 1.0, 1.0), Round(10, 2.0, 2.0)]
    found = loader.figures(ours, released)
    assert found["core_samples_per_second"]["median"] == 50
    assert found["clock_samples_per_second"]["median"] == 25
    assert found["processor_ms_per_sample"]["median"] == 20
    assert found["times_released"] == 5  # of 10, 5 and 5 by round
    assert found["times_released_by_clock"] == 4  # of 10, 2.5 and 4
    assert (found["samples"], found["rounds"]) == (300, 3)
    assert loader.figures(ours, None)["times_released"] is None
    row = {"data": "a", "workers": 1, "providers": {"ours, videos": found, "ours, store": {"skipped": "none"}}}
    videos, store = loader.judge([row])
    assert (videos["worst"], videos["worst_at"], videos["verdict"]) == (5, "a, 1 worker", "met")
    assert store["verdict"] == "not measured in this run"


def test_a_run_of_loaders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are published, so they must not name the folder."""

    def nowhere(of: Source) -> loader_providers.Reader:
        raise NotAvailable("it is not there")

    monkeypatch.setitem(loader.PROVIDERS, "torchcodec", nowhere)
    monkeypatch.setattr(loader, "QUICK_SECONDS", 0.05)
    names = ["as released", "torchcodec", "ours, videos"]
    loader.main(["--data", str(folder), "--quick", "--results", str(tmp_path), "--providers", *names])
    (results,) = tmp_path.glob("*/loader_quick.json")
    text = results.read_text()
    content = json.loads(text)
    assert str(folder) not in text
    assert {"processor", "cores", "versions", "commit", "date"} <= content["environment"].keys()
    (only,) = content["rows"]
    assert (only["data"], only["videos"], only["workers"]) == ("three_clips", 3, 1)
    assert list(only["providers"]) == names
    assert only["providers"].pop("torchcodec") == {"skipped": "it is not there"}
    for found in only["providers"].values():
        assert (found["wrong_videos"], found["checked_videos"], found["rounds"]) == (0, 3, 1)
        for figure in ("core_samples_per_second", "clock_samples_per_second", "processor_ms_per_sample"):
            assert 0 < found[figure]["low"] <= found[figure]["median"] <= found[figure]["high"]
    assert only["providers"]["as released"]["times_released"] == 1
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------- train


def write_metrics(folder: Path, lines: list[tuple[int, float, float]]) -> None:
    """Write metrics.jsonl. A line is (step, total milliseconds, milliseconds waiting for data)."""
    folder.mkdir(parents=True)
    text = [
        json.dumps({"step": step, "milliseconds/total": total, "milliseconds/data": data, "memory/peak_gib": 1.5})
        for step, total, data in lines
    ]
    (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")


def test_links_make_a_data_set_of_any_size_that_holds_each_video_equally_often(demo_videos: Path, tmp_path: Path):
    linked = open_catalog(train.link_videos(demo_videos, 40, tmp_path / "links"))
    source = open_catalog(demo_videos)
    assert set(linked.classes) == set(source.classes)
    targets = Counter((linked.root / video.path).resolve() for video in linked.videos("train"))
    assert set(targets) == {(source.root / video.path).resolve() for video in source.videos("train")}
    assert set(targets.values()) == {2, 3}  # 40 links to 16 videos
    for video in linked.videos("train"):
        assert linked.classes[video.label] in str((linked.root / video.path).resolve())


def test_figures_of_a_run_are_those_of_its_second_half(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [(4, 9000, 8000), (8, 500, 400), (12, 100, 10), (16, 300, 10)])
    found = train.read_figures(tmp_path / "run", batch=20)
    assert found["samples_per_second"] == pytest.approx(2 * 20 / 0.4)
    assert found["data_wait_share"] == pytest.approx(20 / 400)
    assert found["peak_gib"] == 1.5


def test_rows_compare_with_one_process_and_with_videos() -> None:
    def runs(*rates: float) -> list[dict[str, float]]:
        return [{"samples_per_second": rate, "data_wait_share": 0.1, "peak_gib": 1.0} for rate in rates]

    rows = train.summarise({
        Case(source="videos", processes=1): runs(10, 30, 20), Case(source="store", processes=1): runs(40),
        Case(source="videos", processes=2): runs(30), Case(source="store", processes=2): runs(60),
    })  # fmt: skip
    assert [row["samples_per_second"] for row in rows] == [20, 40, 30, 60]
    assert (rows[0]["lowest"], rows[0]["highest"]) == (10, 30)
    assert [row["growth_from_one_process"] for row in rows] == [1, 1, 1.5, 1.5]
    assert [row["times_videos"] for row in rows] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("share", "kind", "cores", "verdict"),
    [
        (0.01, "cuda", 16, "met: at most 1.0%"),
        (0.03, "cuda", 16, "not met: at most 3.0%"),
        (0.01, "cuda", 4, "not judged: the goal (under 2%) is for 16 cores"),
        (0.01, "cpu", 16, "not judged: the goal (under 2% with 16 cores) is for a GPU"),
    ],
)
def test_waiting_is_judged_on_a_gpu_with_enough_cores_only(share: float, kind: str, cores: int, verdict: str) -> None:
    rows = [{"processes": 1, "data_wait_share": share}, {"processes": 2, "data_wait_share": 0.9}]
    assert train.judge(rows, kind, cores).startswith(verdict)


def test_a_run_of_training_runs(demo_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are replaced; other tests run them."""
    commands: list[list[str]] = []

    def execute(command: list[str], log: Path) -> None:
        commands.append(command)
        if "pretrain" in command:
            milliseconds = 20.0 if "store" in command[command.index("--data") + 1] else 40.0
            write_metrics(Path(command[command.index("--out") + 1]), [(4, 900, 800), (8, milliseconds, 1)])

    monkeypatch.setattr(train, "execute", execute)
    flags = ["--data", str(demo_videos), "--rounds", "2", "--processes", "2", "--workers", "3"]
    train.main([*flags, "--results", str(tmp_path)])
    content = json.loads((tmp_path / "cpu" / "train.json").read_text())
    assert [(row["source"], row["processes"], row["times_videos"]) for row in content["rows"]] == [
        ("videos", 1, 1), ("store", 1, 2), ("videos", 2, 1), ("store", 2, 2),
    ]  # fmt: skip
    assert content["rounds"] == 2
    assert (tmp_path / "cpu" / "train.png").read_bytes().startswith(b"\x89PNG")
    assert commands[0][2] == "pack"
    assert len(commands) == 9
    # The links have no test split, which the preset's search of nearest neighbours would ask for.
    assert all(command[command.index("--knn-every") + 1] == "0" for command in commands if "pretrain" in command)
    assert {command[command.index("--workers") + 1] for command in commands[1:]} == {"3", "1"}
    assert "store" in commands[5][commands[5].index("--data") + 1]  # the second round begins with another case


def test_a_command_that_fails_ends_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with 3:.*no such thing"):
        train.execute(["sh", "-c", "echo no such thing; exit 3"], tmp_path / "log")


# ----------------------------------------------------------------------------------------------------------------- soak


def test_growth_is_seen_between_the_early_and_the_late_quarter() -> None:
    usages = [
        (float(at), {"rank": {"mib": 100.0 + (at >= 75) * 17, "files": 5.0 + (at < 10), "threads": 3.0, "count": 2}})
        for at in range(0, 100, 5)
    ]
    (row,) = soak.summarise(usages, seconds=100.0)
    assert (row["kind"], row["count"], row["mib_early"], row["mib_late"]) == ("rank", 2, 100, 117)
    assert soak.growth([row]) == ["rank: mib 100.0 -> 117.0"]
    assert soak.growth([row | {"mib_late": 116.0}]) == []
    assert "| rank | 2 | 100.0, 117.0 | 5, 5 | 3, 3 |" in soak.table([row])
