"""Training on few labels: which videos --label-share and --shots keep, what a run records, and what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import touch, write_lines

from dclr.config import TransferConfig
from dclr.data.catalog import Catalog, Video, make_catalog
from dclr.data.datasets import open_catalog
from dclr.data.few_labels import keep_few
from dclr.errors import UserError


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Return 20, 10 and 3 train videos of three classes, and one test video."""
    counts = {"run": 20, "jump": 10, "sit": 3}
    touch(tmp_path, *(f"train/{name}/{number}.mp4" for name, count in counts.items() for number in range(count)))
    touch(tmp_path, "test/run/x.mp4")
    return open_catalog(tmp_path)


def kept(catalog: Catalog, share: float = 1.0, shots: int = 0, seed: int = 0) -> list[str]:
    return [video.path for video in keep_few(catalog, share, shots, seed)[0].videos("train")]


@pytest.mark.parametrize(
    ("share", "counts"),
    [(0.1, (2, 1, 1)), (0.25, (5, 3, 1)), (0.001, (1, 1, 1)), (0.5, (10, 5, 2)), (1.0, (20, 10, 3))],
)
def test_a_share_is_that_of_each_class_rounded_and_at_least_one(catalog: Catalog, share: float, counts) -> None:
    few, entry = keep_few(catalog, share, 0, 0)
    assert Counter(catalog.classes[video.label] for video in few.videos("train")) == dict(
        zip(("run", "jump", "sit"), counts, strict=True)
    )
    assert (entry["videos"], entry["of"]) == (sum(counts), 33)
    assert entry["by_class"] == {"jump": counts[1], "run": counts[0], "sit": counts[2]}
    assert few.videos("test") == catalog.videos("test")


def test_shots_are_videos_of_each_class_and_too_many_are_refused(catalog: Catalog) -> None:
    assert Counter(path.split("/")[1] for path in kept(catalog, shots=3)) == {"run": 3, "jump": 3, "sit": 3}
    with pytest.raises(UserError) as refusal:
        keep_few(catalog, 1.0, 4, 0)
    assert str(refusal.value) == (
        f"--shots is 4, but class sit of {catalog.root} has only 3 train videos: lower it, or use --label-share"
    )


def test_the_seed_and_the_paths_alone_decide_and_a_larger_share_keeps_a_smaller_one(catalog: Catalog) -> None:
    train = catalog.videos("train")
    shuffled = replace(catalog, splits={"train": train[::-1], "test": catalog.videos("test")})
    assert sorted(kept(shuffled, 0.3)) == sorted(kept(catalog, 0.3))
    assert keep_few(shuffled, 0.3, 0, 0)[1] == keep_few(catalog, 0.3, 0, 0)[1]
    assert set(kept(catalog, 0.2)) < set(kept(catalog, 0.3))
    assert set(kept(catalog, shots=1)) < set(kept(catalog, shots=2))
    seeds = {tuple(kept(catalog, shots=2, seed=seed)) for seed in range(5)}
    assert len(seeds) == 5
    assert len({keep_few(catalog, 1.0, 2, seed)[1]["fingerprint"] for seed in range(5)}) == 5


def test_the_choice_is_that_of_earlier_versions() -> None:
    """A change of this choice would make figures of different versions incomparable."""
    videos = [Video(path=f"{name}.mp4", label=0) for name in "abcdefgh"]
    catalog = make_catalog(Path(), "test", ("x",), {"train": videos}, on_disk=[video.path for video in videos])
    assert kept(catalog, shots=3) == ["c.mp4", "f.mp4", "g.mp4"]
    assert keep_few(catalog, 1.0, 3, 0)[1]["fingerprint"] == "cd8cb3de1ae2b944"


def test_videos_that_are_not_on_disk_do_not_change_the_choice(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.mp4" for number in range(10)))
    write_lines(tmp_path, "train.txt", *(f"{number}.mp4 0" for number in range(10)))
    complete = kept(open_catalog(tmp_path), 0.5)
    (tmp_path / complete[2]).unlink()
    few, entry = keep_few(open_catalog(tmp_path), 0.5, 0, 0)
    assert [video.path for video in few.videos("train")] == [path for path in complete if path != complete[2]]
    assert [video.path for video in few.missing["train"]] == [complete[2]]
    assert (entry["videos"], entry["of"]) == (5, 10)
    others = [f"{number}.mp4" for number in range(10) if f"{number}.mp4" not in complete]
    touch(tmp_path, complete[2])
    (tmp_path / others[0]).unlink()  # missing, but not kept
    assert keep_few(open_catalog(tmp_path), 0.5, 0, 0)[0].missing == {}
    for path in complete:
        (tmp_path / path).unlink()
    with pytest.raises(UserError, match="the 5 train videos that --label-share or --shots keeps are not on disk, such"):
        keep_few(open_catalog(tmp_path), 0.5, 0, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_share": 0.0}, "--label-share is 0.0, but must be above 0 and at most 1"),
        ({"label_share": 1.1}, "--label-share is 1.1, but must be above 0 and at most 1"),
        ({"shots": -1}, "--shots is -1, but must be at least 0"),
        ({"shots": 1, "label_share": 0.5}, "--shots cannot be used with --label-share"),
    ],
)
def test_values_that_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        TransferConfig(**values)
    assert str(refusal.value).startswith(message)


def test_a_run_trains_on_the_kept_videos_records_them_and_resumes_only_with_them(train_main, tiny, tmp_path) -> None:
    out = {command: tmp_path / command for command in ("finetune", "linear")}
    for command in out:
        train_main(command, **{**tiny, "epochs": 1}, label_share=0.5, out=out[command])
    entries = [json.loads((run / "report.json").read_text())["data"] for run in out.values()]
    assert entries[0]["few_labels"] == entries[1]["few_labels"]
    assert entries[0]["videos"] == entries[0]["few_labels"]["videos"] == 8
    assert (entries[0]["few_labels"]["of"], set(entries[0]["few_labels"]["by_class"].values())) == (16, {1})
    assert entries[0]["coverage"]["train"]["listed"] == 8
    assert json.loads((out["linear"] / "config.json").read_text())["transfer"]["label_share"] == 0.5
    with pytest.raises(UserError) as refusal:
        train_main("linear", resume=out["linear"], epochs=2, shots=1)
    assert str(refusal.value) == (
        f"--shots is 1, but the run in {out['linear']} has 0: leave the flag out, or start another run"
    )
    train_main("linear", resume=out["linear"], epochs=2)
    assert json.loads((out["linear"] / "report.json").read_text())["data"]["few_labels"] == entries[1]["few_labels"]
    with pytest.raises(UserError) as refusal:
        train_main("finetune", **{**tiny, "batch_size": 16}, shots=1)
    assert str(refusal.value) == (
        "--batch-size is 16, but --shots 1 leaves 8 readable training videos: lower --batch-size, or raise --shots"
    )


def test_a_run_from_before_few_labels_resumes_with_the_default_given(train_main, tiny, tmp_path) -> None:
    train_main("linear", **{**tiny, "epochs": 1}, out=tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    del stored["transfer"]["label_share"], stored["transfer"]["shots"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    train_main("linear", resume=tmp_path / "run", epochs=2, shots=0)
    with pytest.raises(UserError, match=r"--label-share is 0\.5, but the run in .* has 1\.0"):
        train_main("linear", resume=tmp_path / "run", label_share=0.5)
