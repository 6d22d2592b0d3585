"""Batches: the same whoever reads them, equal to what a plain decode gives, and what becomes of videos that fail later."""

import shutil
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dclr.config import DataConfig
from dclr.data import clips, loader
from dclr.data.catalog import open_catalog
from dclr.data.decode import write_video
from dclr.data.loader import (
    ClipSamples,
    Failures,
    PairBatch,
    PairSamples,
    Schedule,
    VideoSet,
    open_videos,
    train_loader,
)
from dclr.errors import UserError
from dclr.views import AUGMENTATION

CONFIG = DataConfig(clip_length=4, clip_stride=2, crop_size=32)


@pytest.fixture(scope="module")
def videos(demo_videos: Path) -> VideoSet:
    return open_videos(open_catalog(demo_videos), "train", workers=1, progress=False)


@pytest.fixture
def mixed(tmp_path: Path) -> VideoSet:
    """Six videos in two classes, of three sizes and lengths, in a folder that a test may spoil."""
    for number in range(6):
        path = tmp_path / "mixed" / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = ((32, 48), (48, 32), (40, 40))[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (12 + number, height, width, 3), dtype=np.uint8)
        write_video(path, noise)
    return open_videos(open_catalog(tmp_path / "mixed"), "train", workers=1, progress=False)


def plain(batch: object) -> list[object]:
    """A batch as bytes, names and numbers: equal only if everything in it is."""
    found: list[object] = []
    for field in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            found.append((field.name, value.dtype, tuple(value.shape), value.numpy().tobytes()))
        elif hasattr(value, "__dataclass_fields__"):
            found.append((field.name, plain(value)))
        else:
            found.append((field.name, value))
    return found


def batches(samples: loader.TrainSamples, schedule: Schedule, workers: int = 0) -> list[object]:
    return [plain(batch) for batch in train_loader(samples, schedule, workers, pin=False)]


def sequential(path: Path) -> np.ndarray:
    """Every frame of a video from a decode of its own, (N, H, W, 3)."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---------------------------------------------------------------- which samples make a batch


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_and_accumulation_share_out_the_batch_of_a_single_process_in_order(ranks, accumulation):
    whole = list(Schedule(27, 12, 2))
    shares = [list(Schedule(27, 12, 2, accumulation=accumulation, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(whole) * accumulation} == {4 * accumulation}
    for step, expected in enumerate(whole):
        micro = [share[step * accumulation + part] for part in range(accumulation) for share in shares]
        assert {len(m) for m in micro} == {12 // (ranks * accumulation)}
        assert [place for m in micro for place in m] == expected


def test_an_epoch_takes_consecutive_places_and_drops_the_last_incomplete_step():
    schedule = Schedule(11, 4, 3)
    assert (schedule.steps_per_epoch, schedule.stop, len(schedule)) == (2, 6, 6)
    steps = list(schedule)
    for epoch in range(3):
        assert steps[2 * epoch] + steps[2 * epoch + 1] == [(epoch, place) for place in range(8)]


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_a_schedule_from_step_k_is_the_tail_of_the_whole(start):
    whole = list(Schedule(11, 4, 3, accumulation=2, ranks=2, rank=1))
    tail = Schedule(11, 4, 3, accumulation=2, ranks=2, rank=1, start=start)
    assert list(tail) == whole[2 * start :]
    assert len(tail) == len(whole) - 2 * start


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(
        UserError, match=r"^--batch-size is 8, but there are only 7 readable training videos: lower it$"
    ):
        Schedule(7, 8, 1)
    assert len(Schedule(8, 8, 1)) == 1


# ---------------------------------------------------------------- what is in a batch


@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_batches_are_byte_identical_for_any_workers_and_any_start(videos, kind):
    samples = kind(videos, CONFIG, 5)
    expected = batches(samples, Schedule(len(videos.videos), 4, 2))
    assert len(expected) == 8
    assert len({repr(batch) for batch in expected}) == 8
    for workers in (1, 2):
        assert batches(kind(videos, CONFIG, 5), Schedule(len(videos.videos), 4, 2), workers) == expected
    for start, workers in ((1, 0), (5, 2), (7, 1)):
        assert batches(samples, Schedule(len(videos.videos), 4, 2, start=start), workers) == expected[start:]


@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_two_ranks_read_the_two_halves_of_the_same_samples(videos, kind):
    samples = kind(videos, CONFIG, 5)
    (whole,) = train_loader(samples, Schedule(16, 8, 1, start=1), 0, pin=False)
    halves = [
        next(iter(train_loader(samples, Schedule(16, 8, 1, start=1, rank=r, ranks=2), 0, pin=False))) for r in (0, 1)
    ]
    assert torch.equal(torch.cat([half.indices for half in halves]), whole.indices)
    name = "query_frames" if kind is PairSamples else "frames"
    assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))


def test_epochs_and_seeds_draw_differently(videos):
    def drawn(seed, epoch, index=3):
        sample = PairSamples(videos, CONFIG, seed).read(epoch, index)
        return [np.asarray(part).tobytes() for part in (*sample[1:5], np.stack(sample[5]))]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0)[-1] != drawn(0, 1)[-1]
    assert drawn(0, 0)[-1] != drawn(1, 0)[-1]
    assert drawn(0, 0)[0] != drawn(0, 1)[0]
    orders = [[key for batch in train_loader(PairSamples(videos, CONFIG, seed), Schedule(16, 8, 2), 0, pin=False)
               for key in batch.indices.tolist()] for seed in (0, 1)]  # fmt: skip
    assert orders[0][:16] != orders[0][16:]
    assert orders[0] != orders[1]
    assert all(sorted(order[:16]) == sorted(order[16:]) == list(range(16)) for order in orders)


def test_frames_of_a_pair_are_those_of_a_sequential_decode_at_the_drawn_numbers(genuine):
    """On genuine UCF101 files, two of which have scrambled timestamps."""
    catalog = open_catalog(genuine / "ucf101_sample")
    videos = open_videos(catalog, "test", workers=1, progress=False)
    samples = PairSamples(videos, DataConfig(), seed=3)
    for index, (video, record) in enumerate(zip(videos.videos, videos.records, strict=True)):
        frames = sequential(catalog.root / video.path)
        assert len(frames) == record.frames
        pair = clips.draw_pair(clips.sample_rng(3, 2, index), record.frames, 16, 2)
        found_index, query, key, query_still, key_still, rows = samples.read(2, index)
        assert found_index == index
        assert np.array_equal(query, frames[pair.query])
        assert np.array_equal(key, frames[pair.key])
        assert np.array_equal(query_still, frames[pair.query_still])
        assert np.array_equal(key_still, frames[pair.key_still])
        assert len({row.tobytes() for row in rows}) == 4  # clip and still of query and key: each a draw of its own


def test_a_batch_pads_smaller_videos_and_tells_their_true_size(mixed):
    samples = PairSamples(mixed, CONFIG, 0)
    drawn = [(samples.read(0, index), {}) for index in range(3)]
    batch = samples.collate(drawn)
    assert isinstance(batch, PairBatch)
    assert batch.query_frames.shape == (3, 4, 48, 48, 3)
    assert batch.query_stills.shape == (3, 48, 48, 3)
    assert batch.indices.tolist() == [0, 1, 2]
    for row, (sample, _) in enumerate(drawn):
        height, width = sample[1].shape[1:3]
        for found, expected in (
            (batch.query_frames[row], sample[1]), (batch.key_frames[row], sample[2]),
            (batch.query_stills[row], sample[3]), (batch.key_stills[row], sample[4]),
        ):  # fmt: skip
            assert np.array_equal(found[..., :height, :width, :].numpy(), expected)
            assert not found[..., height:, :, :].any()
            assert not found[..., :, width:, :].any()
    # Four rows of parameters a sample, each at its place, and the size without the padding.
    tables = [table for params in (batch.query_params, batch.key_params) for table in (params.clip, params.still)]
    for place, table in enumerate(tables):
        for name in AUGMENTATION.names:
            expected = np.stack([sample[5][place][name] for sample, _ in drawn])
            assert np.array_equal(getattr(table, name).numpy(), expected)
        assert {tuple(size) for size in table.size.tolist()} == {s[1].shape[1:3] for s, _ in drawn}


def test_labels_go_with_their_videos(mixed):
    batch = ClipSamples(mixed, CONFIG, 0).collate([(ClipSamples(mixed, CONFIG, 0).read(0, i), {}) for i in (4, 1, 0)])
    assert batch.indices.tolist() == [4, 1, 0]
    assert batch.labels.tolist() == [mixed.videos[i].label for i in (4, 1, 0)]
    assert {video.label for video in mixed.videos} == {0, 1}


def test_the_test_protocol_cuts_ten_uniform_clips_of_each_video_in_order(mixed):
    found = list(loader.test_loader(loader.TestClips(mixed, CONFIG), 2, 0, pin=False))
    assert [batch.indices.tolist() for batch in found] == [[a] * 10 + [b] * 10 for a, b in ((0, 1), (2, 3), (4, 5))]
    for index, (video, record) in enumerate(zip(mixed.videos, mixed.records, strict=True)):
        frames = sequential(mixed.catalog.root / video.path)
        numbers = clips.uniform_clips(record.frames, 10, 4, 2)
        batch, row = found[index // 2], 10 * (index % 2)
        own = batch.frames[row : row + 10, :, : record.height, : record.width]
        assert np.array_equal(own.numpy(), frames[numbers])
        assert set(batch.labels[row : row + 10].tolist()) == {video.label}
        assert not batch.augmentation.flip.any()


# ---------------------------------------------------------------- videos that fail after they were verified


def spoil(videos: VideoSet, index: int, how: str) -> str:
    """Make a verified video unreadable; returns its path in the catalog."""
    path = videos.catalog.root / videos.videos[index].path
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    return videos.videos[index].path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["delete", "truncate"])
@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_a_video_that_fails_later_gives_its_place_to_the_next_of_the_epochs_order(mixed, kind, how, workers, capsys):
    samples, schedule = kind(mixed, CONFIG, 1), Schedule(6, 3, 2)
    before = list(train_loader(samples, schedule, 0, pin=False))
    path = spoil(mixed, 2, how)
    after = list(train_loader(samples, schedule, workers, pin=False))

    failures = Failures()
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        order = clips.epoch_order(1, step // 2, 6).tolist()
        expected = [order[(order.index(i) + 1) % 6] if i == 2 else i for i in old.indices.tolist()]
        assert new.indices.tolist() == expected
        assert set(new.failures) == ({path} if 2 in old.indices.tolist() else set())
        failures.add(new.failures)
    # Read once an epoch: counted each time, named once.
    assert failures.count == 2
    assert list(failures.reasons) == [path]
    named = capsys.readouterr().err
    assert named.count(path) == named.count("\n") == 1
    assert failures.reasons[path] in named


def test_the_sample_that_takes_the_place_is_its_own_of_that_epoch(mixed):
    order = clips.epoch_order(1, 0, 6).tolist()
    spoil(mixed, order[0], "delete")
    sample, _ = PairSamples(mixed, CONFIG, 1)[(0, 0)]
    own, _ = PairSamples(mixed, CONFIG, 1)[(0, 1)]
    assert sample[0] == own[0] == order[1]
    assert np.array_equal(sample[1], own[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_when_no_video_can_be_read_any_more_the_run_ends_with_one_line(mixed, workers):
    shutil.rmtree(mixed.catalog.root)
    with pytest.raises(UserError) as caught:
        list(train_loader(PairSamples(mixed, CONFIG, 0), Schedule(6, 3, 1), workers, pin=False))
    assert "\n" not in str(caught.value)
    assert str(caught.value) == (
        f"{mixed.catalog.root}: not one of 6 videos can be read any more; was the folder moved or unmounted?"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_split_leaves_videos_that_fail_out(mixed, workers):
    path, other = spoil(mixed, 1, "truncate"), spoil(mixed, 4, "delete")
    found = list(loader.test_loader(loader.TestClips(mixed, CONFIG), 2, workers, pin=False))
    assert [sorted(set(batch.indices.tolist())) for batch in found] == [[0], [2, 3], [5]]
    assert [list(batch.failures) for batch in found] == [[path], [], [other]]
    spoil(mixed, 5, "delete")
    *_, empty = loader.test_loader(loader.TestClips(mixed, CONFIG), 2, 0, pin=False)
    assert (len(empty.frames), len(empty.labels)) == (0, 0)


@pytest.mark.parametrize("layout", ["flat", "class folders"])
def test_faulty_files_are_left_out_and_never_crash_a_worker(genuine, tmp_path, layout):
    """Every file of `faulty/`: as it lies, and among readable ones in class folders; a whole epoch with two workers."""
    folder = genuine / "faulty"
    if layout == "class folders":
        folder = tmp_path / "data"
        for number, file in enumerate(sorted((genuine / "faulty").iterdir())):
            (folder / "xy"[number % 2]).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / "xy"[number % 2])
    videos = open_videos(open_catalog(folder), "train", workers=2, progress=False)
    assert {Path(video.path).name for video in videos.videos} == {
        "no_duration.webm", "non_utf8_metadata.3gp", "rotated_90.mov"
    }  # fmt: skip
    assert len(videos.unreadable) == 7
    assert all(reason and "\n" not in reason for reason in videos.unreadable.values())
    for kind in (PairSamples, ClipSamples):
        (batch,) = train_loader(kind(videos, CONFIG, 0), Schedule(3, 3, 1), workers=2, pin=False)
        assert sorted(batch.indices.tolist()) == [0, 1, 2]
        assert batch.failures == {}


def test_a_folder_of_which_nothing_can_be_read_is_refused_with_a_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match=r"none of the 1 videos of split train can be read \(empty.mp4: empty file\)"):
        open_videos(open_catalog(tmp_path), "train", workers=1, progress=False)
