"""Search: the nearest videos, the command, its files, and wrong input."""

import base64
import csv
import os
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import make_list
from PIL import Image
from torch import nn

from dclr.commands import evaluate
from dclr.commands.features import print_summary
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.evaluation import search
from dclr.evaluation.feature_file import FeatureTable, read_features, write_features
from dclr.evaluation.previews import Preview, make_previews
from dclr.evaluation.search import Gallery, mean_of_clips
from dclr.evaluation.search_page import Block, Cell, search_page
from dclr.models import ClipFormat, ProjectionHead, build_backbone, save_backbone


def table(rows: np.ndarray, paths: list[str] | None = None, **changes) -> FeatureTable:
    names = paths or [f"{number}.mp4" for number in range(len(rows))]
    made = FeatureTable(
        paths=names,
        labels=[None] * len(names),
        groups=[""] * len(names),
        splits=["train"] * len(names),
        clips=None,
        embeddings={"pooled": rows},
        skipped={},
        root="videos",
        fingerprint="",
    )
    return replace(made, **changes)


# ---------------------------------------------------------------- the nearest rows


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_nearest_rows_are_those_of_a_full_sort(dtype, monkeypatch):
    monkeypatch.setattr(search, "_ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    rows, query = rng.normal(1, 1, (50, 6)).astype(dtype), rng.normal(1, 1, 6).astype(dtype)
    mean = rows.astype(np.float64).mean(0)
    centred, direction = rows - mean, query - mean
    cosines = centred @ direction / np.linalg.norm(centred, axis=1) / np.linalg.norm(direction)
    found = Gallery(table(rows), "pooled").nearest(query, 12, without=[])
    assert [each.row for each in found] == np.argsort(-cosines)[:12].tolist()
    assert np.allclose([each.similarity for each in found], np.sort(cosines)[::-1][:12], atol=1e-5)


def test_equal_rows_have_equal_similarity_and_the_order_of_the_gallery(monkeypatch):
    monkeypatch.setattr(search, "_ROWS_AT_ONCE", 16)
    rows = np.random.default_rng(0).normal(size=(64, 37)).astype(np.float32)
    same = [3, 21, 22, 40, 63]
    rows[same] = rows[3]
    gallery = Gallery(table(rows), "pooled")
    found = gallery.nearest(rows[3], 3, without=[])
    assert [each.row for each in found] == same[:3]
    assert {each.similarity for each in found} == {found[0].similarity}
    assert [each.row for each in gallery.nearest(rows[3], 4, without=[3])] == same[1:]


def test_a_query_can_be_left_alone_in_the_gallery():
    gallery = Gallery(table(np.ones((2, 3), np.float32)), "pooled")
    assert [each.row for each in gallery.nearest(np.ones(3), 10, without=[1])] == [0]
    assert gallery.nearest(np.ones(3), 10, without=[0, 1]) == []


def test_rows_of_clips_are_averaged():
    rows = np.arange(12, dtype=np.float16).reshape(6, 2)
    clips = table(rows, ["a", "a", "b", "b", "b", "c"], clips=np.array([0, 1, 0, 1, 2, 0]), labels=[*"xxyyyz"])
    videos = mean_of_clips(clips)
    assert (videos.paths, videos.labels, videos.clips) == (["a", "b", "c"], ["x", "y", "z"], None)
    assert videos.embeddings["pooled"].tolist() == [[1, 2], [6, 7], [10, 11]]


def test_a_query_is_the_same_file_under_any_name_and_no_other_file_of_the_same_name(tmp_path):
    for path in ("a/1.mp4", "b/1.mp4", "b/2.mp4"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / "link.mp4").symlink_to("b/1.mp4")
    paths = ["a/1.mp4", "b/1.mp4", "b/2.mp4", "lost/3.mp4"]
    gallery = Gallery(table(np.zeros((4, 2), np.float32), paths, root=str(tmp_path)), "pooled")
    assert gallery.rows_of(str(tmp_path / "b/1.mp4")) == [1]
    assert gallery.rows_of(os.path.relpath(tmp_path / "b/1.mp4")) == [1]
    assert gallery.rows_of(str(tmp_path / "link.mp4")) == [1]
    assert gallery.rows_of("lost/3.mp4") == [3]  # for example in a packed store
    assert gallery.rows_of("4.mp4") == []


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        Gallery(table(np.array([[1.0, np.nan]], np.float32)), "pooled")
    with pytest.raises(UserError, match="videos has no pooled embeddings of any video"):
        Gallery(table(np.ones((0, 2), np.float32)), "pooled")
    with pytest.raises(UserError, match="no motion embeddings, only pooled"):
        Gallery(table(np.ones((1, 2), np.float32)), "motion")


# ---------------------------------------------------------------- previews and the page


def test_previews_are_small_and_play_the_middle_of_a_video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 200, 600, 3), dtype=np.uint8)
    write_video(tmp_path / "wide.mp4", np.repeat(frames, 104, 0))
    write_video(tmp_path / "tiny.avi", frames[:, :16, :18])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    previews = make_previews(tmp_path, ["wide.mp4", "tiny.avi", "broken.mp4", "lost.mp4"], True, 60.0)
    wide, tiny = previews["wide.mp4"], previews["tiny.avi"]
    assert isinstance(wide, Preview)
    assert isinstance(tiny, Preview)
    assert (wide.picture.shape, tiny.picture.shape) == ((106, 320, 3), (16, 18, 3))
    assert (wide.frames, tiny.frames) == ("frames 2 to 101 of 104", "1 frame")
    (tmp_path / "preview.mp4").write_bytes(wide.mp4)
    with av.open(str(tmp_path / "preview.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 100
    assert isinstance(previews["broken.mp4"], str)
    assert "no such file" in str(previews["lost.mp4"])
    alone = make_previews(tmp_path, ["lost.mp4", "broken.mp4"], True, 60.0)
    assert alone == {name: previews[name] for name in ("lost.mp4", "broken.mp4")}  # each with its own reason


def test_the_page_escapes_texts_and_loads_nothing():
    evil = '"><script>alert(1)</script>\udcff\n.mp4'
    preview = Preview(np.zeros((2, 2, 3), np.uint8), b"mp4 bytes", evil)
    query = Cell(evil, preview, "run & jump", address='file:///a"b')
    page = search_page(
        evil, [evil], [Block(query, [Cell(evil, evil, evil, 1, 0.5), Cell("b", preview, "run & jump", 2)])]
    )
    page.encode()
    assert "<script" not in page
    assert 'href="file:///a&quot;b"' in page
    assert page.count("run &amp; jump") == 2
    assert 'class="other"' in page
    assert 'class="same"' in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:video/mp4;base64,", "file:")) for source in sources)
    assert base64.b64decode(sources[0].split(",")[1]) == b"mp4 bytes"


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The file of a backbone with heads, and next to it headless.safetensors of another backbone without heads."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("whole", "headless")):
        torch.manual_seed(seed)
        heads = nn.ModuleDict({pair: ProjectionHead(32, 8) for pair in ("vv", "vs", "vd", "sv", "dv")})
        backbone = build_backbone("r3d_10", 4)
        save_backbone(backbone, folder / f"{name}.safetensors", ClipFormat(4, 1, 16), heads if not seed else None)
    return folder / "whole.safetensors"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Five labelled videos of noise. a1 and a2 have the same frames."""
    folder = make_list(
        tmp_path_factory.mktemp("data") / "noise",
        train=[("a1.mp4", 0), ("b.mp4", 1), ("c.mp4", 1)],
        test=[("a2.mp4", 0), ("d.mp4", 2)],
    )
    (folder / "a2.mp4").write_bytes((folder / "a1.mp4").read_bytes())
    return folder


@pytest.fixture(scope="module")
def features(weights, videos) -> Path:
    path = weights.with_name("features.npz")
    evaluate.main(["features", "--checkpoint", str(weights), "--data", str(videos), "--out", str(path)])
    return path


def run(*arguments: object) -> None:
    evaluate.main(["search", *map(str, arguments), "--workers", "0"])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("like", ["both", "motion", "scene"])
def test_a_video_finds_its_copy_first_and_not_itself(like, weights, videos, tmp_path, capsys):
    out = tmp_path / "found"
    run("--checkpoint", weights, "--data", videos, "--query", videos / "a1.mp4", "--like", like, "--out", out)
    found = rows(out)
    assert [row["rank"] for row in found] == ["1", "2", "3", "4"]
    assert (found[0]["path"], found[0]["label"], found[0]["split"]) == ("a2.mp4", "run", "test")
    assert float(found[0]["similarity"]) == pytest.approx(1, abs=1e-5)
    assert {row["path"] for row in found} == {"a2.mp4", "b.mp4", "c.mp4", "d.mp4"}
    printed = capsys.readouterr().out
    assert "a1.mp4; it is among the searched videos and does not find itself" in printed
    assert "1      1.000  run    a2.mp4" in printed
    assert Image.open(out / "nearest.png").width > 400
    assert sorted(path.name for path in out.iterdir()) == ["nearest.png", "results.csv"]


def test_a_file_of_features_gives_the_same_as_the_videos(weights, videos, features, tmp_path):
    outside = tmp_path / "outside.mp4"
    outside.write_bytes((videos / "b.mp4").read_bytes())
    queries = ["--query", outside, videos / "d.mp4", "a2.mp4", "--count", 2]
    run("--checkpoint", weights, "--data", videos, *queries, "--out", tmp_path / "1")
    run("--checkpoint", weights, "--features", features, *queries, "--out", tmp_path / "2", "--html")
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    assert [row["path"] for row in rows(tmp_path / "1")][::2][0::2] == ["b.mp4", "a1.mp4"]
    page = (tmp_path / "2" / "search.html").read_text()
    assert page.count("<video ") == 3 + 6
    assert (videos / "b.mp4").as_uri() in page


def test_a_packed_store_is_searched_by_the_paths_in_it(weights, videos, tmp_path):
    from dclr.commands import train

    train.main(["pack", "--data", str(videos), "--out", str(tmp_path / "packed")])
    run(
        "--checkpoint", weights, "--data", tmp_path / "packed", "--query", "a2.mp4", "--html", "--out", tmp_path / "out"
    )
    assert [row["path"] for row in rows(tmp_path / "out")][:1] == ["a1.mp4"]
    assert (tmp_path / "out" / "search.html").read_text().count("<video ") == 5


def test_videos_that_no_list_names_are_counted(weights, tmp_path, capsys):
    data = make_list(tmp_path / "data", train=[("a.mp4", 0), ("b.mp4", 1)])
    (data / "stray.mp4").write_bytes((data / "a.mp4").read_bytes())
    common = ["--checkpoint", weights, "--data", data]
    unused = "not used, on disk, but in no list that was read: 1 (stray.mp4)\n"
    evaluate.main(["features", *map(str, common), "--out", str(tmp_path / "f.npz"), "--workers", "0"])
    assert unused in capsys.readouterr().out
    run(*common, "--query", data / "a.mp4", "--out", tmp_path / "found")
    assert unused in capsys.readouterr().out


@pytest.mark.parametrize("in_store", [False, True])
def test_the_command_that_features_suggests_is_one_that_search_takes(in_store, tmp_path, capsys):
    if not in_store:
        (tmp_path / "0.mp4").touch()
    query = "0.mp4" if in_store else str(tmp_path / "0.mp4")
    made = table(np.ones((2, 3), np.float32), root=str(tmp_path))
    print_summary(made, Path("f.npz"), Path("run"), 1.0)
    assert capsys.readouterr().out.endswith(f" search --checkpoint run --features f.npz --query {query}\n")
    made = replace(made, embeddings={"scene": made.embeddings["pooled"]})
    print_summary(made, Path("f.npz"), Path("run"), 1.0)
    assert capsys.readouterr().out.endswith(f" --features f.npz --like scene --query {query}\n")


def test_videos_that_are_gone_are_found_without_pictures(weights, features, videos, tmp_path, capsys):
    moved = replace(read_features(features), root=str(tmp_path / "gone"))
    write_features(moved, tmp_path / "moved.npz")
    flags = ["--query", videos / "b.mp4", "--count", 3, "--out", tmp_path / "out", "--html"]
    run("--checkpoint", weights, "--features", tmp_path / "moved.npz", *flags)
    assert len(rows(tmp_path / "out")) == 3
    assert "warning: 3 videos cannot be shown, such as " in capsys.readouterr().err
    assert (tmp_path / "out" / "search.html").read_text().count("<video ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count is 0"),
        (["--out", "{weights.parent}"], "exists and is not an empty folder"),
        (["--query", "nothing.mp4"], "--query nothing.mp4: no such file, and the searched videos"),
        (["--query", "{videos}/classes.txt"], "classes.txt cannot be read"),
        (["--query", "{videos}"], "is a folder; give video files"),
        (["--checkpoint", "{weights.parent}/headless.safetensors", "--like", "motion"], "has no projection heads"),
        (["--features", "{features}", "--like", "scene"], "has no scene embeddings, only pooled"),
        (["--features", "{features}", "--crop-size", "32"], "--crop-size cannot be used with --features"),
        (["--features", "{features}", "--data", "{videos}"], "--data cannot be used with --features"),
        (
            ["--features", "{features}", "--checkpoint", "{weights.parent}/headless.safetensors"],
            "was written with other weights",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, message, weights, videos, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [each.format(weights=weights, videos=videos, features=features) for each in arguments]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    flags = {"--checkpoint": weights, "--query": videos / "b.mp4", **given}
    flags |= {} if "--features" in given else {"--data": videos}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run(*(word for pair in flags.items() for word in pair))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_any_video_that_can_be_read_is_one_line(weights, videos, tmp_path):
    (tmp_path / "broken").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "broken" / name).write_bytes(b"no video")
    with pytest.raises(UserError, match=r"none of the 2 videos can be read \(a\.mp4: .*; see train\.py check"):
        run(
            "--checkpoint", weights, "--data", tmp_path / "broken", "--query", videos / "b.mp4", "--out", tmp_path / "x"
        )


def test_features_that_do_not_say_how_clips_were_made_are_refused(weights, videos, features, tmp_path):
    write_features(replace(read_features(features), clip_format={}), tmp_path / "old.npz")
    with pytest.raises(
        UserError, match=r"old\.npz does not say how its clips were made: write it with eval\.py features"
    ):
        run("--checkpoint", weights, "--features", tmp_path / "old.npz", "--query", videos / "b.mp4")
