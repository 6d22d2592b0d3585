"""Retrieval against numpy, and chance against a count of all possible draws."""

import errno
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import retrieval as benchmark
from benchmarks import retrieval_worker as worker
from benchmarks.harness import NotAvailable
from benchmarks.retrieval import turn as real_turn
from benchmarks.retrieval_worker import peak_gib
from dclr.commands import evaluate
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.evaluation import retrieval as module
from dclr.evaluation.features import ClipOutputs, mean_of_clips
from dclr.evaluation.retrieval import chance_of_hit, mean_direction, nearest_rows, normalized, retrieval


def outputs(values, labels) -> ClipOutputs:
    """Return the outputs of N videos. `values`: (N, clips, D)."""
    return ClipOutputs(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), torch.arange(len(labels)), {})


def test_retrieval_agrees_with_numpy_on_random_features():
    rng = np.random.default_rng(1)
    gallery, queries = rng.normal(2, 1, (30, 4, 8)), rng.normal(-1, 1, (12, 4, 8))
    gallery_labels, query_labels = rng.integers(0, 6, 30), rng.integers(0, 6, 12)
    result = retrieval(outputs(gallery, gallery_labels), outputs(queries, query_labels))

    def unit(features):
        mean = features.mean(1)
        mean = mean - mean.mean(0)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    cosines = unit(queries) @ unit(gallery).T
    nearest = np.argsort(-cosines, axis=1)
    assert np.array_equal(result.nearest, nearest)
    assert np.allclose(result.similarity, np.take_along_axis(cosines, nearest, 1), atol=1e-6)
    assert list(result.recall) == list(result.chance) == [1, 5, 10, 20]  # no R@50 with 30 videos
    for k in result.recall:
        hits = [label in gallery_labels[row[:k]] for row, label in zip(nearest, query_labels, strict=True)]
        assert result.recall[k] == pytest.approx(np.mean(hits))
    assert 0 < result.recall[1] < result.recall[5] < 1


@pytest.mark.parametrize("rows", [(1024, 4096), (7, 3), (2, 60), (40, 64)])
def test_chunks_of_any_size_give_the_order_and_the_bits_of_a_stable_sort_of_exact_cosines(monkeypatch, rows):
    """Half of the gallery repeats other rows, so there are ties inside a chunk, over chunks and at the last place."""
    monkeypatch.setattr(module, "_QUERY_ROWS", rows[0])
    monkeypatch.setattr(module, "_GALLERY_ROWS", rows[1])
    rng = np.random.default_rng(4)
    features = rng.normal(size=(120, 1, 37))
    features[rng.permutation(120)[:60]] = features[rng.integers(0, 10, 60)]
    gallery, queries = normalized(outputs(features, range(120))), normalized(outputs(features[:30], range(30)))
    whole = [(features.double() / module.STEP).to(torch.int64).numpy() for features in (queries, gallery)]
    assert torch.equal(torch.from_numpy(whole[1]) * module.STEP, gallery.double())  # multiples of STEP
    exact = torch.from_numpy((whole[0] @ whole[1].T) * module.STEP**2).float()  # whole numbers below 2^53
    expected = exact.sort(dim=1, descending=True, stable=True)
    assert any(len(set(row)) < 50 for row in expected.values[:, :50].tolist())
    nearest, cosines = nearest_rows(queries, gallery, 50)
    assert torch.equal(nearest, expected.indices[:, :50])
    assert torch.equal(cosines, expected.values[:, :50])


def test_features_that_are_all_equal_have_no_direction_and_keep_the_order_of_the_gallery(monkeypatch):
    monkeypatch.setattr(module, "_GALLERY_ROWS", 16)
    same = outputs(np.ones((70, 2, 3)), [0] * 70)
    result = retrieval(same, same)
    assert np.array_equal(result.nearest, np.tile(np.arange(50), (70, 1)))
    assert not result.similarity.any()


def test_each_split_is_centred_on_its_own_mean():
    """A constant added to all features of a split changes nothing, even if it differs between the splits."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(9, 2, 5))
    found = normalized(outputs(features, range(9)))
    assert torch.allclose(found, normalized(outputs(features + 100, range(9))), atol=1e-4)
    assert torch.allclose(found.norm(dim=1), torch.ones(9))
    result = retrieval(outputs(features + 100, range(9)), outputs(features - 7, range(9)))
    assert result.nearest[:, 0].tolist() == list(range(9))
    assert result.recall[1] == 1


@pytest.mark.parametrize(("normalise_clips", "nearest"), [(False, [0, 1]), (True, [1, 0])])
def test_a_clip_with_a_large_feature_counts_as_one_clip_if_clips_are_normalised(normalise_clips, nearest):
    """The query has the clips (8, 0), (0, 1) and (0, 1). Its mean is (8, 2) / 3, but the mean of their directions is
    (1, 2) / 3. The other videos have clips of length 1 along (1, 0) or (0, 1). Every split has the mean 0 because of
    mirrored videos."""

    def split(*videos):
        values = np.array(videos, float)
        whole = outputs(np.concatenate([values, -values]), range(2 * len(values)))
        keep = mean_direction if normalise_clips else mean_of_clips
        return replace(whole, values=torch.stack([keep(clips) for clips in whole.values]))

    gallery = split([[1, 0]] * 3, [[0, 1]] * 3)
    queries = split([[8, 0], [0, 1], [0, 1]])
    result = retrieval(gallery, queries)
    assert result.nearest[0, :2].tolist() == nearest
    mean = np.array([1, 2]) if normalise_clips else np.array([8, 2])
    assert result.similarity[0, 0] == pytest.approx(mean.max() / np.linalg.norm(mean), abs=1e-6)


@pytest.mark.parametrize(("same_class", "gallery"), [(0, 5), (1, 5), (2, 6), (3, 7), (5, 5)])
def test_chance_is_the_share_of_all_draws_that_contain_the_class(same_class, gallery):
    for k in range(1, gallery + 1):
        draws = list(itertools.combinations(range(gallery), k))
        share = sum(any(video < same_class for video in draw) for draw in draws) / len(draws)
        assert chance_of_hit(same_class, gallery, k) == pytest.approx(share, abs=1e-12)


def test_chance_averages_over_queries_same_classes_that_differ_in_size():
    """The gallery has three videos of class 0 and one of class 1. The queries are of class 0, 1 and 2."""
    features = np.random.default_rng(3).normal(size=(7, 1, 4))
    result = retrieval(outputs(features[:4], [0, 0, 0, 1]), outputs(features[4:], [0, 1, 2]))
    assert result.chance == {1: pytest.approx((3 / 4 + 1 / 4 + 0) / 3)}
    big = math.comb(9537, 50)  # UCF101's gallery: exact integers, no overflow
    assert chance_of_hit(94, 9537, 50) == pytest.approx(1 - math.comb(9537 - 94, 50) / big)


def test_the_providers_of_the_benchmark_find_the_same_videos(tmp_path, monkeypatch):
    def run_here(provider, cell, python, folder):
        features = (worker.make_features(count, 16, seed) for seed, count in ((1, cell.Q), (2, cell.G)))
        return {"seconds": 1.0, "peak_gib": 0.5, "nearest": worker.PROVIDERS[provider](*features, 50)}

    monkeypatch.setattr(benchmark, "turn", run_here)
    monkeypatch.setitem(worker.PROVIDERS, "faiss IndexFlatIP", worker.full_sort)  # faiss is not installed here
    monkeypatch.setattr(worker, "CLASSES", 5)
    row = benchmark.measure(benchmark.Cell(40, 300), 2, {})
    assert all(found["same_rows"] > 0.999 for found in row["providers"].values())
    assert [line[2] for line in benchmark.lines([row])] == ["1.00"] * 4
    with pytest.raises(NotAvailable, match="needs 9 GiB"):
        real_turn("full sort", benchmark.CELLS[1], "", tmp_path)
    assert peak_gib() > 0


# ---------------------------------------------------------------- the command


def evaluate_untrained(data: Path, out: Path) -> None:
    tiny = ["--width", "2", "--clip-length", "4", "--clip-stride", "1", "--crop-size", "16", "--workers", "0"]
    where = ["--checkpoint", "random", "--data", str(data), "--out", str(out)]
    evaluate.main(["retrieval", *where, "--backbone", "r3d_10", *tiny])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes, one of them with a byte that is not UTF-8 in its name, with a video in each split."""
    for number, (split, name) in enumerate(itertools.product(("train", "test"), ("caf\udce9", "park"))):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        frames = np.random.default_rng(number).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        write_video(folder / "a.mp4", frames)
    return tmp_path / "data"


def test_a_class_may_have_a_name_that_is_not_utf8_and_a_video_may_go_while_it_is_evaluated(data, tmp_path, monkeypatch):
    real = module.retrieval

    def then_lost(*arguments, **options):
        (data / "test" / "park" / "a.mp4").unlink()
        return real(*arguments, **options)

    monkeypatch.setattr(module, "retrieval", then_lost)
    evaluate_untrained(data, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    (sheet,) = (tmp_path / "out" / "pictures").iterdir()
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        evaluate_untrained(tmp_path / "nowhere", tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_an_evaluation_with_one_line_and_keeps_the_picture_before(data, tmp_path, monkeypatch):
    evaluate_untrained(data, tmp_path / "out")
    (sheet,) = (tmp_path / "out" / "pictures").iterdir()
    before = sheet.read_bytes()

    def full(figure, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(UserError, match=r"^--out .*out: cannot write there \(No space left on device\)$"):
        evaluate_untrained(data, tmp_path / "out")
    assert sheet.read_bytes() == before
    assert list(sheet.parent.iterdir()) == [sheet]


def test_a_file_elsewhere_that_cannot_be_read_is_named_and_not_the_folder_of_the_result(data, tmp_path, monkeypatch):
    def broken(figure, file, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/disk/video.mp4")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(UserError, match=r"^/disk/video.mp4: Input/output error$"):
        evaluate_untrained(data, tmp_path / "out")
