"""`eval.py features`: a row for each video, whatever the number of processes, also after interruptions."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, as_flags, free_port, start_program

from dclr.commands import evaluate
from dclr.commands import features as features_command
from dclr.config import make_config, write_config
from dclr.data.samples import TEST_CLIPS
from dclr.errors import UserError
from dclr.evaluation import feature_parts, feature_table
from dclr.evaluation.embedding import KINDS
from dclr.evaluation.feature_file import FeatureTable, read_features
from dclr.models import ClipFormat, build_backbone, save_backbone

CLIPS = ClipFormat(length=4, stride=1, crop=16)

Features = Callable[..., FeatureTable]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread. Networks this small gain nothing from a second one, which would wait for a busy core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an untrained network of width 4."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(build_backbone("r2plus1d_10", 4), path, CLIPS)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "features.npz"


@pytest.fixture
def features(weights: Path, demo_videos: Path, out: Path) -> Features:
    """Return a function that runs `eval.py features` in this process and reads the file."""

    def run(*given: str, **flags: Any) -> FeatureTable:
        settings = {"checkpoint": weights, "data": demo_videos, "out": out, "workers": 0, **flags}
        evaluate.main(["features", *as_flags(settings), *given])
        return read_features(settings["out"])

    return run


@pytest.fixture(scope="module")
def whole(weights: Path, demo_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureTable:
    """The table of the demo videos, made by one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "features.npz"
    settings = {"checkpoint": weights, "data": demo_videos, "out": out, "workers": 0}
    evaluate.main(["features", *as_flags(settings)])
    return read_features(out)


def assert_equal(found: FeatureTable, expected: FeatureTable) -> None:
    """Check that two tables are equal bit for bit."""
    assert found.paths == expected.paths
    assert found.skipped == expected.skipped
    np.testing.assert_array_equal(found.embeddings["pooled"], expected.embeddings["pooled"])


def start_features(settings: dict[str, Any], environment: dict[str, str]) -> BaseProcess:
    """Start `eval.py features` in another process, whose output nobody reads."""
    nowhere = Path(os.devnull)
    words = ["eval.py", "features", *as_flags(settings)]
    return start_program(*words, environment=environment, output=nowhere, errors=nowhere)


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


# ---------------------------------------------------------------- rows


def test_the_kinds_of_the_command_are_those_that_can_be_embedded() -> None:
    assert features_command.KINDS == KINDS


def test_each_video_of_all_splits_has_a_row_with_label_group_and_split(whole: FeatureTable, demo_videos: Path) -> None:
    assert len(whole.paths) == len(set(whole.paths)) == 24
    assert whole.splits == ["train"] * 16 + ["test"] * 8
    assert all(label and label in path for label, path in zip(whole.labels, whole.paths, strict=True))
    assert len(set(whole.groups)) > 1
    assert whole.embeddings["pooled"].shape == (24, 32)
    assert whole.embeddings["pooled"].dtype == np.float32
    assert len({row.tobytes() for row in whole.embeddings["pooled"]}) == 24
    assert whole.root == str(demo_videos.resolve())
    assert whole.clip_format == {
        "length": 4,
        "stride": 1,
        "crop": 16,
        "mean": list(CLIPS.mean),
        "std": list(CLIPS.std),
        "clips": TEST_CLIPS,
    }


def test_a_video_has_the_mean_of_its_clips(features: Features, whole: FeatureTable) -> None:
    by_clip = features("--clips")
    assert by_clip.clips is not None
    assert by_clip.clips.tolist() == list(range(TEST_CLIPS)) * 24
    assert by_clip.paths == [path for path in whole.paths for _ in range(TEST_CLIPS)]
    rows = by_clip.embeddings["pooled"].reshape(24, TEST_CLIPS, 32)
    np.testing.assert_allclose(rows.mean(1), whole.embeddings["pooled"], rtol=1e-5, atol=1e-6)


def test_half_is_the_nearest_float16(features: Features, whole: FeatureTable) -> None:
    half = features("--half").embeddings["pooled"]
    np.testing.assert_array_equal(half, whole.embeddings["pooled"].astype(np.float16))


def test_a_number_that_float16_does_not_have_is_refused(
    features: Features, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_table, "LARGEST_HALF", 1e-6)
    with pytest.raises(UserError, match="leave --half out"):
        features("--half")
    assert not out.exists()


def test_workers_and_the_other_videos_do_not_change_a_row(
    features: Features, whole: FeatureTable, demo_videos: Path, tmp_path: Path
) -> None:
    path = whole.paths[5]
    one = features(data=demo_videos / path, out=tmp_path / "one.safetensors", workers=1)
    assert one.paths == [Path(path).name]
    assert (one.labels, one.splits) == ([None], ["train"])
    np.testing.assert_array_equal(one.embeddings["pooled"][0], whole.embeddings["pooled"][5])


def test_a_list_gives_what_it_names_and_says_what_is_not_on_disk(
    features: Features, whole: FeatureTable, demo_videos: Path, tmp_path: Path
) -> None:
    shutil.copytree(demo_videos, tmp_path / "data")
    lines = [f"{path} {label}" for path, label in zip(whole.paths, whole.labels, strict=True)][:3]
    (tmp_path / "data" / "some.txt").write_text("\n".join([*lines, "gone.mp4 x"]))
    found = features(data=tmp_path / "data" / "some.txt", out=tmp_path / "x.parquet")
    assert found.paths == whole.paths[:3]
    assert found.skipped == {"gone.mp4": "its list names it, and it is not on disk"}
    np.testing.assert_array_equal(found.embeddings["pooled"], whole.embeddings["pooled"][:3])


def test_a_video_that_cannot_be_read_is_skipped_with_its_reason(
    features: Features, whole: FeatureTable, demo_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_videos, tmp_path / "data")
    (tmp_path / "data" / whole.paths[1]).write_bytes(b"no video")
    found = features(data=tmp_path / "data")
    assert found.paths == [whole.paths[0], *whole.paths[2:]]
    assert list(found.skipped) == [whole.paths[1]]
    np.testing.assert_array_equal(found.embeddings["pooled"], np.delete(whole.embeddings["pooled"], 1, axis=0))
    printed = capsys.readouterr().out
    assert "23 videos, pooled (32 float32)" in printed
    assert "skipped: 1 video" in printed
    assert found.skipped[whole.paths[1]] in printed


# ---------------------------------------------------------------- several processes and interruptions


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_make_the_same_file_in_any_order(
    features: Features, whole: FeatureTable, out: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    first, last = order
    as_process(monkeypatch, first, 2)
    with pytest.raises(UserError, match="no such file"):
        features()
    assert len(list(feature_parts.parts_folder(out).glob("part-*"))) == 12
    as_process(monkeypatch, last, 2)
    assert_equal(features(), whole)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_a_process_that_is_not_needed_any_more_ends_without_an_error(
    features: Features, whole: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    features()
    as_process(monkeypatch, 1, 2)
    assert_equal(features(), whole)


def test_a_killed_command_continues(
    features: Features, whole: FeatureTable, weights: Path, demo_videos: Path, out: Path, clean_environment: dict
) -> None:
    """The command is killed after its first parts, and continued by another number of processes."""
    settings = {"checkpoint": weights, "data": demo_videos, "out": out, "workers": 0}
    folder = feature_parts.parts_folder(out)
    process = start_features(settings, clean_environment)
    while len(list(folder.glob("part-*.npz"))) < 2 and process.exitcode is None:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("part-*.npz")}
    assert 2 <= len(before) < 24
    assert not out.exists()
    embedded = []
    real = feature_table.embed_listed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            feature_parts, "embed_listed", lambda *given, **flags: embedded.extend(given[1]) or real(*given, **flags)
        )
        assert_equal(features(), whole)
    assert len(embedded) == 24 - len(before)


@pytest.mark.slow
@pytest.mark.launcher
def test_a_launcher_makes_the_same_file(
    whole: FeatureTable, weights: Path, demo_videos: Path, out: Path, clean_environment: dict
) -> None:
    """deepspeed adds the flag --local_rank. torchrun only sets RANK and WORLD_SIZE, as the next test does."""
    program = str(Path(sys.executable).parent / "deepspeed")
    start = [program, "--num_accelerators", "2", "--master_port", str(free_port())]
    settings = {"checkpoint": weights, "data": demo_videos, "out": out, "workers": 1}
    done = subprocess.run(
        [*start, "eval.py", "features", *as_flags(settings)],
        cwd=REPOSITORY,
        env=clean_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal(read_features(out), whole)


def test_a_process_that_dies_leaves_the_others_parts(
    features: Features, whole: FeatureTable, weights: Path, demo_videos: Path, out: Path, clean_environment: dict
) -> None:
    """Without a launcher that would end the other process, it ends by itself."""
    settings = {"checkpoint": weights, "data": demo_videos, "out": out, "workers": 0}
    ranks = ({**clean_environment, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2))
    processes = [start_features(settings, environment) for environment in ranks]
    own = [feature_parts.parts_folder(out) / f"part-{number:06}.npz" for number in range(1, 24, 2)]
    while not own[0].exists() and processes[1].exitcode is None:
        time.sleep(0.005)
    processes[1].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert not out.exists()
    assert 1 <= sum(part.exists() for part in own) < 12
    assert_equal(features(), whole)


# ---------------------------------------------------------------- wrong input


def begun(features: Features, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the parts of one of two processes, and return their folder."""
    with monkeypatch.context() as patch:
        as_process(patch, 0, 2)
        with pytest.raises(UserError, match="no such file"):
            features()
    return feature_parts.parts_folder(out)


def test_parts_of_another_command_are_refused_by_what_differs(
    features: Features, whole: FeatureTable, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(features, out, monkeypatch)
    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    save_backbone(build_backbone("r2plus1d_10", 4), other, CLIPS)
    for given, flags, different in (
        ((), {"checkpoint": other}, "checkpoint"),
        (("--half",), {}, "numbers (--half)"),
        (("--clips",), {}, "rows (--clips)"),
        ((), {"clip_stride": 2}, "clips"),
    ):
        with pytest.raises(UserError) as refused:
            features(*given, **flags)
        assert str(refused.value).startswith(f"{folder} holds parts with another {different}: repeat the command")
    assert_equal(features(), whole)


def test_a_damaged_part_is_named(features: Features, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(features, out, monkeypatch)
    part = next(folder.glob("part-*"))
    part.write_bytes(b"x")
    with pytest.raises(UserError, match=f"{part} is damaged"):
        features()


def test_wrong_input_is_refused_before_anything_is_written(
    features: Features, weights: Path, demo_videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"x")
    (tmp_path / "there.npz").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    for flags, message in (
        ({"out": tmp_path / "x.csv"}, "x.csv: a file of features ends in .parquet, .npz or .safetensors"),
        ({"out": tmp_path / "there.npz"}, "there.npz exists: delete it, or give another name"),
        ({"out": tmp_path / "none" / "x.npz"}, f"there is no folder {tmp_path}/none"),
        ({"checkpoint": tmp_path / "none"}, "none"),
        ({"checkpoint": tmp_path / "weights.pth"}, "weights.pth"),
        ({"data": tmp_path / "empty"}, "no videos found in"),
        ({"data": tmp_path / "none"}, "no such folder"),
        ({"data": ""}, "--data is needed: a folder of videos, a list of them, or a video file"),
        ({"like": ["motion"]}, str(weights)),
    ):
        with pytest.raises(UserError) as refused:
            features(**flags)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_refusal_without_data_names_the_data_set_of_the_run(features: Features, weights: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    shutil.copy(weights, tmp_path / "run")
    write_config(tmp_path / "run" / "config.json", "pretrain", "demo", make_config("pretrain", {"data": "/my/videos"}))
    with pytest.raises(UserError, match=r"^--data is needed: .* \(the run was trained on /my/videos\)$"):
        features(checkpoint=tmp_path / "run", data="")


def test_without_one_readable_video_nothing_is_left(features: Features, tmp_path: Path, out: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "data" / name).write_bytes(b"no video")
    with pytest.raises(UserError, match=r"none of the 2 videos can be read \(a.mp4: "):
        features(data=tmp_path / "data")
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_another_command_that_writes_the_same_file_is_refused(features: Features, out: Path) -> None:
    from dclr.lock import folder_lock

    folder = feature_parts.parts_folder(out)
    folder.mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with folder_lock(folder):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    try:
        with pytest.raises(UserError, match="is being written by process"):
            features()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
