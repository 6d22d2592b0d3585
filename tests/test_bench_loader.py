"""The benchmark of loaders counts and compares what it says, and every provider reads the frames that it should."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from benchmarks import loader
from benchmarks.loader import Round, Source
from dclr.data.decode import NO_PTS, YuvFrames
from dclr.data.encode import write_video
from dclr.data.loader import BatchSampler
from dclr.errors import UserError

FRAMES = 80


def write_clip(path: Path, seed: int, frames: int = FRAMES) -> None:
    """A pattern that moves by 2 pixels a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    still = np.random.default_rng(seed).integers(0, 256, (6, 16, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    write_video(path, np.stack([np.roll(still, 2 * number, axis=1) for number in range(frames)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "three_clips"
    for number in range(3):
        write_clip(folder / f"class_{number % 2}" / f"{number}.mp4", number)
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return loader.open_source(folder)


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path), metadata_errors="ignore") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_source_is_what_training_reads(source: Source, folder: Path, tmp_path: Path) -> None:
    assert source.name == "three_clips"
    assert [path.name for path in source.paths] == ["0.mp4", "2.mp4", "1.mp4"]
    assert [record.frames for record in source.records] == [FRAMES] * 3
    assert source.batch_size == 3
    pair = source.pair(0, 1)
    assert loader.numbers(pair).shape == (34,)
    assert loader.numbers(pair).tolist() != loader.numbers(source.pair(1, 1)).tolist()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.mp4").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match="none of its 1 training videos can be read"):
        loader.open_source(tmp_path)


def test_reading_by_time(source: Source) -> None:
    """Exact where timestamps grow with the frames, whatever keyframe comes before."""
    path, pts = source.paths[0], source.records[0].pts.tolist()
    frames = decode_all(path)
    for first, last in ((0, 31), (5, 5), (11, 42), (48, 79)):
        assert np.array_equal(loader.read_by_time(path, pts[first], pts[last]), frames[first : last + 1])


def test_every_provider_reads_the_frames_that_are_drawn(source: Source) -> None:
    readers, skipped = loader.open_readers(source, list(loader.PROVIDERS))
    assert {"as released", "ours, videos"} <= readers.keys()
    assert readers.keys() | skipped.keys() == loader.PROVIDERS.keys()
    assert loader.videos_read_wrongly(source, readers) == dict.fromkeys(readers, 0)
    expected = decode_all(source.paths[2])[loader.numbers(source.pair(4, 2))]
    assert np.array_equal(readers["as released"].frames(2, source.pair(4, 2)), expected)


@pytest.mark.parametrize(("name", "wrong"), [("Bowling", 1), ("Rowing", 0)])
def test_packed_files_are_read_wrongly_by_time(genuine: Path, name: str, wrong: int) -> None:
    source = loader.open_source(genuine / "ucf101_sample" / "UCF-101" / name)
    readers, _ = loader.open_readers(source, ["as released", "ours, videos"])
    assert loader.videos_read_wrongly(source, readers) == {"as released": wrong, "ours, videos": 0}


@pytest.mark.parametrize("planes", [False, True])
def test_a_frame_beside_the_right_one_is_noticed(source: Source, planes: bool) -> None:
    rgb, luma = loader.true_thumbnails(source.paths[0])
    assert rgb.shape == luma.shape == (FRAMES, *loader.THUMBNAIL)
    frames = decode_all(source.paths[0])
    with av.open(str(source.paths[0])) as container:
        y = np.stack([frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)])
    wanted = np.array([3, 40, 41, 3])
    for shift in (0, 1):
        chosen = wanted + np.array([0, 0, shift, 0])
        found = YuvFrames(y[chosen], y, y, False, False) if planes else frames[chosen]
        assert loader.are(loader.thumbnails(found), wanted, luma if planes else rgb) == (shift == 0)


def test_checked_videos_are_spread(source: Source) -> None:
    many = replace(source, paths=source.paths * 30)
    assert loader.checked_videos(source) == [0, 1, 2]
    checked = loader.checked_videos(many)
    assert len(checked) == loader.CHECKED_VIDEOS
    assert (checked[0], checked[-1]) == (0, 89)


def test_as_released_hands_over_cropped_float_clips(source: Source) -> None:
    (batch,) = loader.as_released(source).batches(BatchSampler(3, 3, epochs=1), 1)
    assert len(batch) == 4  # query clip, its still, key clip, its still
    for view in batch:
        assert view.shape == (3, 3, 16, 112, 112)
        assert view.dtype == torch.float32
        assert 0 <= view.min() < view.max() <= 1
    for still in batch[1::2]:
        assert (still == still[:, :, :1]).all()
    for clip in batch[::2]:
        assert not torch.equal(clip[:, :, 0], clip[:, :, 1])


def test_what_as_released_cannot_read(source: Source) -> None:
    short = replace(source, records=[replace(source.records[0], frames=31), *source.records[1:]])
    with pytest.raises(loader.NotAvailable, match="fewer than 32 frames, of which there are 1"):
        loader.as_released(short)
    untimed = replace(source, records=[replace(source.records[0], pts=np.full(FRAMES, NO_PTS)), *source.records[1:]])
    with pytest.raises(loader.NotAvailable, match="1 videos have such frames"):
        loader.as_released(untimed)


def test_torchcodec_that_is_not_there(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    readers, skipped = loader.open_readers(source, ["torchcodec"])
    assert readers == {}
    assert "cannot be imported" in skipped["torchcodec"]


def test_processor_time_of_workers_counts(source: Source) -> None:
    """Each sample keeps its worker busy for 0.1 s; two workers do that at once, if there are two cores."""

    def busy(index: int, pair: Any) -> torch.Tensor:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return torch.zeros(1)

    reader = loader.Reader(lambda *_: np.zeros(0), loader.of_samples(source, busy))
    found = loader.run(source, reader, workers=2, epochs=2)
    assert found.samples == 6
    assert 0.6 <= found.processor_seconds < 1.5
    assert found.seconds >= 0.3


def test_a_round_is_about_as_long_as_asked_for(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def run(of: Source, reader: Any, workers: int, epochs: int) -> Round:
        asked.append(epochs)
        return Round(samples=3 * epochs, seconds=0.2 + 0.05 * epochs, processor_seconds=1.0)

    monkeypatch.setattr(loader, "run", run)
    assert loader.epochs_in(source, None, 1, seconds=4.0) == 64  # of which a run of 16 takes 1 s
    assert asked == [1, 4, 16]


def test_figures_by_hand() -> None:
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


def row(data: str, workers: int, videos: float, store: float | None) -> dict[str, Any]:
    providers: dict[str, Any] = {"as released": {"times_released": 1.0}, "ours, videos": {"times_released": videos}}
    providers["ours, store"] = {"skipped": "none"} if store is None else {"times_released": store}
    return {"data": data, "workers": workers, "providers": providers}


def test_goals() -> None:
    videos, store = loader.judge([row("a", 1, 4.0, 30.0), row("b", 2, 3.5, 19.0)])
    assert (videos["worst"], videos["worst_at"], videos["verdict"]) == (3.5, "b, 2 workers", "met")
    assert (store["worst"], store["verdict"]) == (19, "not met")
    videos, store = loader.judge([row("a", 1, 2.9, None)])
    assert videos["verdict"] == "not met"
    assert (store["worst"], store["verdict"]) == (None, "not measured in this run")


def test_a_quick_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A provider that is not available is in the results with its reason."""

    def nowhere(of: Source) -> loader.Reader:
        raise loader.NotAvailable("it is not there")

    monkeypatch.setitem(loader.PROVIDERS, "torchcodec", nowhere)
    monkeypatch.setattr(loader, "QUICK_SECONDS", 0.1)
    loader.main(["--data", str(folder), "--quick", "--results", str(tmp_path)])
    (results,) = tmp_path.glob("*/loader_quick.json")
    text = results.read_text()
    content = json.loads(text)
    assert str(folder) not in text  # results are published
    assert {"processor", "cores", "versions", "commit", "date"} <= content["environment"].keys()
    assert content["command"].startswith("python -m benchmarks.loader --data three_clips --quick --results ")
    (only,) = content["rows"]
    assert (only["data"], only["videos"], only["workers"]) == ("three_clips", 3, 1)
    assert list(only["providers"]) == list(loader.PROVIDERS)
    assert only["providers"]["torchcodec"] == {"skipped": "it is not there"}
    for name in ("as released", "ours, videos"):
        own = only["providers"][name]
        assert (own["wrong_videos"], own["checked_videos"], own["rounds"]) == (0, 3, 1)
        for figure in ("core_samples_per_second", "clock_samples_per_second", "processor_ms_per_sample"):
            assert 0 < own[figure]["low"] <= own[figure]["median"] <= own[figure]["high"]
    assert only["providers"]["as released"]["times_released"] == 1
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "skipped: it is not there" in printed
    assert "0 of 3" in printed


def test_no_new_cell_is_begun_when_time_is_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(of: Source, readers: dict[str, Any], *_: Any) -> dict[str, Any]:
        return {name: loader.figures([Round(10, 1.0, 1.0)], [Round(10, 1.0, 1.0)]) for name in readers}

    def minutes() -> Iterator[float]:
        yield from (0.0, 61.0)
        while True:
            yield 61.0

    clock = minutes()
    monkeypatch.setattr(loader, "measure", measured)
    monkeypatch.setattr(loader.time, "monotonic", lambda: next(clock))
    short = ["--data", str(folder), "--minutes", "1", "--results", str(tmp_path)]
    loader.main([*short, "--providers", "ours, videos"])
    (results,) = tmp_path.glob("*/loader.json")
    content = json.loads(results.read_text())
    assert [row["workers"] for row in content["rows"]] == [1]
    assert content["not_reached"] == ["three_clips, 2 workers"]
