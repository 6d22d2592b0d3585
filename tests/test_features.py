"""A network run on the test clips of a split, with readable and unreadable videos."""

import shutil
from pathlib import Path

import pytest
import torch

from dclr.config import DataConfig
from dclr.data import loader
from dclr.data.clips import evenly_spaced
from dclr.data.datasets import open_catalog
from dclr.data.samples import TEST_CLIPS
from dclr.data.videos import open_videos
from dclr.errors import UserError
from dclr.evaluation import features
from dclr.evaluation.features import run_on_clips
from dclr.kernels import augment

CONFIG = DataConfig(clip_length=4, crop_size=32, workers=0)
CPU = torch.device("cpu")


@pytest.fixture
def copied(demo_videos: Path, tmp_path: Path):
    """The 8 test videos, in a folder that a test may change."""
    shutil.copytree(demo_videos, tmp_path / "data")
    return open_videos(open_catalog(tmp_path / "data"), "test", workers=1, progress=False)


def mean_colour(clip: torch.Tensor) -> torch.Tensor:
    return clip.mean((2, 3, 4))


def test_outputs_are_in_the_order_of_the_videos_ten_clips_each(copied):
    found = run_on_clips(mean_colour, copied, CONFIG, CPU, "test")
    assert found.values.shape == (8, TEST_CLIPS, 3)
    assert found.labels.tolist() == copied.labels.tolist()
    assert found.indices.tolist() == list(range(8))
    assert found.failures == {}
    assert found.values.isfinite().all()
    assert len({tuple(row) for row in found.values[:, 0].tolist()}) == 8
    in_workers = run_on_clips(mean_colour, copied, DataConfig(clip_length=4, crop_size=32, workers=2), CPU, "test")
    assert torch.equal(in_workers.values, found.values)


def test_workers_need_no_shared_memory_of_torch(copied, monkeypatch):
    """Docker limits /dev/shm, where torch puts the tensors that processes exchange, to 64 MB."""

    def refuse(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse)
    found = run_on_clips(mean_colour, copied, DataConfig(clip_length=4, crop_size=32, workers=2), CPU, "test")
    assert found.indices.tolist() == list(range(8))


def test_a_video_of_which_only_some_clips_can_be_read_is_skipped(copied, monkeypatch):
    """A video with large frames is read in several batches, and it may fail between two of them."""
    whole = run_on_clips(mean_colour, copied, CONFIG, CPU, "test")
    monkeypatch.setattr(loader, "_TEST_BATCH_BYTES", 1)  # one clip a batch
    assert torch.equal(run_on_clips(mean_colour, copied, CONFIG, CPU, "test").values, whole.values)
    batches = []

    def delete(clip: torch.Tensor) -> torch.Tensor:
        batches.append(len(clip))
        if len(batches) == 5:
            (copied.root / copied.path(0)).unlink()
        return mean_colour(clip)

    found = run_on_clips(delete, copied, CONFIG, CPU, "test")
    assert batches == [1] * 75
    assert found.indices.tolist() == list(range(1, 8))
    assert torch.equal(found.values, whole.values[1:])
    assert found.labels.tolist() == copied.labels[1:].tolist()
    assert list(found.failures) == [copied.path(0)]


def test_large_frames_are_augmented_a_few_at_a_time_with_the_same_result(copied, monkeypatch):
    """Also the memory format is the same, which decides how a network sums."""

    def clips(clip: torch.Tensor) -> torch.Tensor:
        assert clip.is_contiguous(memory_format=torch.channels_last_3d)
        return clip.flatten(1)

    whole = run_on_clips(clips, copied, CONFIG, CPU, "test")
    computed = []

    def counted(frames, augmentation, size):
        computed.append(frames.y.shape[1])
        return augment(frames, augmentation, size)

    monkeypatch.setattr(features, "augment", counted)
    monkeypatch.setattr(features, "_PIXELS_AT_ONCE", int(3.5 * copied.heights[0] * copied.widths[0]))
    assert torch.equal(run_on_clips(clips, copied, CONFIG, CPU, "test").values, whole.values)
    assert computed == [3, 1] * 8


def test_unreadable_videos_are_skipped_and_named(copied, capsys):
    whole = run_on_clips(mean_colour, copied, CONFIG, CPU, "test")
    deleted = (2, 6, 7)
    for index in deleted:
        (copied.root / copied.path(index)).unlink()
    found = run_on_clips(mean_colour, copied, CONFIG, CPU, "test")
    kept = [index for index in range(8) if index not in deleted]
    assert found.indices.tolist() == kept
    assert torch.equal(found.values, whole.values[kept])
    assert found.labels.tolist() == copied.labels[kept].tolist()
    assert found.failures == {copied.path(index): "no such file" for index in deleted}
    said = capsys.readouterr().err
    assert "it is skipped in the figures" in said
    assert "next video" not in said


def test_a_split_without_a_readable_video_is_refused(copied):
    shutil.rmtree(copied.root)
    with pytest.raises(UserError, match="not one of 8 videos can be read any more"):
        run_on_clips(mean_colour, copied, CONFIG, CPU, "test")


def test_at_most_so_many_positions_are_taken_from_the_first_to_the_last():
    assert evenly_spaced(3, 200) == [0, 1, 2]
    assert evenly_spaced(1000, 5) == [0, 250, 500, 749, 999]
    assert evenly_spaced(1, 8) == [0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e16])
def test_outputs_that_are_not_finite_give_no_figures_and_name_the_video(copied, value):
    def network(clip: torch.Tensor) -> torch.Tensor:
        colours = mean_colour(clip)
        for row in range(len(colours)):
            if len(clips) == 3 * TEST_CLIPS + 3:  # a clip of the fourth video
                colours[row, 1] = value
            clips.append(row)
        return colours

    clips: list[int] = []
    with pytest.raises(UserError, match=f"the network's output for {copied.path(3)} is not finite or above 1e\\+15"):
        run_on_clips(network, copied, CONFIG, CPU, "test")


def test_a_network_whose_outputs_are_all_equal_is_named(copied, capsys):
    warning = "warning: the network gives the same output for every clip"
    run_on_clips(mean_colour, copied, CONFIG, CPU, "test")
    assert warning not in capsys.readouterr().err
    run_on_clips(lambda clip: torch.ones(len(clip), 3), copied, CONFIG, CPU, "test")
    assert warning in capsys.readouterr().err
