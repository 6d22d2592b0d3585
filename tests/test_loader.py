"""Batches do not depend on the workers, equal a plain decode, and survive videos that fail later."""

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import block, children, crash, loop

from dclr.config import DataConfig
from dclr.data import clips, decoder_process, loader, ring_buffer
from dclr.data.datasets import open_catalog
from dclr.data.decode import empty_planes
from dclr.data.decoder_process import shared_array
from dclr.data.encode import write_video
from dclr.data.failures import Failures, check_bad
from dclr.data.loader import PREFETCH, Batches, BatchSampler, ChunkSampler, TestSampler, batches_ahead
from dclr.data.ring_buffer import FrameShape
from dclr.data.samples import (
    Batch,
    ClipBatch,
    ClipSamples,
    PairBatch,
    PairSamples,
    Sample,
    SampleInfo,
    TestClips,
    TrainSamples,
    merge_failures,
)
from dclr.data.videos import VideoFiles, VideoSet, open_videos
from dclr.data.workers import read_chunk
from dclr.errors import UserError
from dclr.kernels import Yuv420
from dclr.kernels.types import AUGMENTATION

CONFIG = DataConfig(clip_length=4, clip_stride=2, crop_size=32)


@pytest.fixture(scope="module")
def videos(demo_videos: Path) -> VideoSet:
    return open_videos(open_catalog(demo_videos), "train", workers=1, progress=False)


@pytest.fixture
def mixed(tmp_path: Path) -> VideoSet:
    """Six videos in two classes, of three sizes and several lengths, in a folder that a test may damage."""
    for number in range(6):
        path = tmp_path / "mixed" / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = ((32, 48), (48, 32), (40, 40))[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (12 + number, height, width, 3), dtype=np.uint8)
        write_video(path, noise)
    return open_videos(open_catalog(tmp_path / "mixed"), "train", workers=1, progress=False)


def kept(batch: Batch) -> Batch:
    """Return a copy of a batch that later batches do not overwrite, with zeros outside of smaller frames."""
    rows = batch.query_params.clip if isinstance(batch, PairBatch) else batch.augmentation
    y, u, v = (torch.zeros_like(plane) for plane in (batch.frames.y, batch.frames.u, batch.frames.v))
    for b, (height, width) in enumerate(rows.size.tolist()):
        y[b, :, :height, :width] = batch.frames.y[b, :, :height, :width]
        for copy, plane in ((u, batch.frames.u), (v, batch.frames.v)):
            half = (slice(None), slice((height + 1) // 2), slice((width + 1) // 2))
            copy[b][half] = plane[b][half]
    return replace(batch, frames=replace(batch.frames, y=y, u=u, v=v))


def train_batches(samples: TrainSamples, sampler: BatchSampler, workers: int = 0) -> Iterator[Batch]:
    return map(kept, Batches(samples, sampler, workers))


def test_batches(samples: TestClips, workers: int) -> list[ClipBatch]:
    """Return copies of all test batches."""

    def copied(plane: torch.Tensor) -> torch.Tensor:
        return plane.clone()

    return [
        replace(batch, frames=Yuv420(*map(copied, vars(batch.frames).values())))
        for batch in Batches(samples, TestSampler(samples), workers)
    ]


test_batches.__test__ = False  # type: ignore[attr-defined]


def plain(batch: object) -> list[object]:
    """Return a batch as bytes, names and numbers. Two results are equal only if all tensors are equal."""
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


def batches(samples: TrainSamples, sampler: BatchSampler, workers: int = 0) -> list[object]:
    return [plain(batch) for batch in train_batches(samples, sampler, workers)]


def sequential(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode the planes of every frame of a video of even size: y (N, H, W), u and v (N, H / 2, W / 2)."""
    with av.open(str(path), metadata_errors="ignore") as container:
        packed = np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])
    height, width = packed.shape[1] * 2 // 3, packed.shape[2]
    u, v = packed[:, height:].reshape(-1, 2, height // 2, width // 2).transpose(1, 0, 2, 3)
    return packed[:, :height], u, v


def same_planes(found: object, expected: tuple[np.ndarray, ...], numbers: object) -> bool:
    return all(
        np.array_equal(getattr(found, name), plane[numbers]) for name, plane in zip("yuv", expected, strict=True)
    )


def batch_of(samples: TrainSamples, indices: list[int], epoch: int = 0) -> Batch:
    """Return a batch of the samples of these videos, without a ring."""
    parts = [samples.read(epoch, index) for index in indices]
    height, width = (max(getattr(samples.videos, size)[indices]) for size in ("heights", "widths"))
    planes = []
    for name, shape in (("y", (height, width)), *((n, ((height + 1) // 2, (width + 1) // 2)) for n in "uv")):
        planes.append(torch.full((len(parts), samples.frames_a_sample, *shape), 7, dtype=torch.uint8))
        for target, part in zip(planes[-1].numpy(), parts, strict=True):
            own = getattr(part.frames, name)
            target[:, : own.shape[1], : own.shape[2]] = own
    drawn = [SampleInfo(part.index, part.rows, part.frames.bt709, part.frames.full_range, {}) for part in parts]
    flags = (torch.tensor([getattr(d, flag) for d in drawn]) for flag in ("bt709", "full_range"))
    return kept(samples.batch(Yuv420(*planes, *flags), drawn))


# ---------------------------------------------------------------- which samples make a batch


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_and_accumulation_share_out_the_batch_of_a_single_process_in_order(ranks, accumulation):
    whole = list(BatchSampler(27, 12, 2))
    shares = [list(BatchSampler(27, 12, 2, accumulation=accumulation, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(whole) * accumulation} == {4 * accumulation}
    for step, expected in enumerate(whole):
        micro = [share[step * accumulation + part] for part in range(accumulation) for share in shares]
        assert {len(m) for m in micro} == {12 // (ranks * accumulation)}
        assert [position for m in micro for position in m] == expected


def test_an_epoch_takes_consecutive_positions_and_drops_the_last_incomplete_step():
    sampler = BatchSampler(11, 4, 3)
    assert (sampler.steps_per_epoch, sampler.stop, len(sampler)) == (2, 6, 6)
    steps = list(sampler)
    for epoch in range(3):
        assert steps[2 * epoch] + steps[2 * epoch + 1] == [(epoch, position) for position in range(8)]


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_a_batch_sampler_from_step_k_gives_the_last_steps_of_the_whole(start):
    whole = list(BatchSampler(11, 4, 3, accumulation=2, ranks=2, rank=1))
    tail = BatchSampler(11, 4, 3, accumulation=2, ranks=2, rank=1, start=start)
    assert list(tail) == whole[2 * start :]
    assert len(tail) == len(whole) - 2 * start


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(
        UserError, match=r"^--batch-size is 8, but there are only 7 readable training videos: lower it$"
    ):
        BatchSampler(7, 8, 1)
    assert len(BatchSampler(8, 8, 1)) == 1


# ---------------------------------------------------------------- what is in a batch


@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_batches_are_byte_identical_for_any_workers_and_any_start(videos, kind):
    samples = kind(videos, CONFIG, 5)
    expected = batches(samples, BatchSampler(len(videos), 4, 2))
    assert len(expected) == 8
    assert len({repr(batch) for batch in expected}) == 8
    for workers in (1, 2):
        assert batches(kind(videos, CONFIG, 5), BatchSampler(len(videos), 4, 2), workers) == expected
    for start, workers in ((1, 0), (5, 2), (7, 1)):
        assert batches(samples, BatchSampler(len(videos), 4, 2, start=start), workers) == expected[start:]


@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_two_ranks_read_the_two_halves_of_the_same_samples(videos, kind):
    samples = kind(videos, CONFIG, 5)
    (whole,) = train_batches(samples, BatchSampler(16, 8, 1, start=1))
    halves = [next(train_batches(samples, BatchSampler(16, 8, 1, start=1, rank=r, ranks=2))) for r in (0, 1)]
    assert torch.equal(torch.cat([half.indices for half in halves]), whole.indices)
    for plane in "yuv":
        assert torch.equal(torch.cat([getattr(half.frames, plane) for half in halves]), getattr(whole.frames, plane))


def test_epochs_and_seeds_draw_differently(videos):
    def drawn(seed, epoch, index=3):
        sample = PairSamples(videos, CONFIG, seed).read(epoch, index)
        return sample.frames.y.tobytes(), sample.rows.tobytes()

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0)[-1] != drawn(0, 1)[-1]
    assert drawn(0, 0)[-1] != drawn(1, 0)[-1]
    assert drawn(0, 0)[0] != drawn(0, 1)[0]
    orders = [[key for batch in train_batches(PairSamples(videos, CONFIG, seed), BatchSampler(16, 8, 2))
               for key in batch.indices.tolist()] for seed in (0, 1)]  # fmt: skip
    assert orders[0][:16] != orders[0][16:]
    assert orders[0] != orders[1]
    assert all(sorted(order[:16]) == sorted(order[16:]) == list(range(16)) for order in orders)


def test_the_same_frames_have_two_augmentations(videos):
    batch = batch_of(PairSamples(videos, CONFIG, 0, same_frames=True), [3, 5])
    assert torch.equal(batch.query_frames.y, batch.key_frames.y)
    assert not torch.equal(batch.query_params.clip.box, batch.key_params.clip.box)
    other = batch_of(PairSamples(videos, CONFIG, 0), [3, 5])
    assert not torch.equal(other.query_frames.y, other.key_frames.y)
    assert torch.equal(other.query_params.clip.box, batch.query_params.clip.box)


def test_frames_of_a_pair_are_those_of_a_sequential_decode_at_the_drawn_numbers(genuine):
    """Genuine UCF101 files, two of them with scrambled timestamps."""
    catalog = open_catalog(genuine / "ucf101_sample")
    videos = open_videos(catalog, "test", workers=1, progress=False)
    samples = PairSamples(videos, DataConfig(), seed=3)
    for index in range(len(videos)):
        planes = sequential(catalog.root / videos.path(index))
        assert len(planes[0]) == videos.frames[index]
        pair = clips.draw_pair(clips.sample_rng(3, 2, index), len(planes[0]), 16, 2)
        batch = batch_of(samples, [index], epoch=2)
        assert batch.indices.tolist() == [index]
        for part, numbers in (
            (batch.query_frames, pair.query), (batch.key_frames, pair.key),
            (batch.query_stills, pair.query_still), (batch.key_stills, pair.key_still),
        ):  # fmt: skip
            assert part.y.shape[1:] == ((16, 240, 320) if np.ndim(numbers) else (240, 320))
            assert same_planes(Yuv420(part.y[0], part.u[0], part.v[0], part.bt709, part.full_range), planes, numbers)
        rows = samples.read(2, index).rows
        assert len({row.tobytes() for row in rows}) == 4  # clips and stills have their own augmentation


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_samples_of_any_size_and_their_sizes(mixed, workers):
    """Batches in the ring equal samples that are read one by one: planes, colour space, parameters and order."""
    samples, sampler = PairSamples(mixed, CONFIG, 0), BatchSampler(6, 3, 2)
    for step, batch in enumerate(train_batches(samples, sampler, workers)):
        assert isinstance(batch, PairBatch)
        order = clips.epoch_order(0, step // 2, 6)[step % 2 * 3 :][:3].tolist()
        assert batch.indices.tolist() == order
        assert batch.frames.y.shape == (3, 10, 48, 48)
        assert batch.frames.u.shape == batch.frames.v.shape == (3, 10, 24, 24)
        own = [samples.read(step // 2, index) for index in order]
        for b, sample in enumerate(own):
            height, width = mixed.heights[sample.index], mixed.widths[sample.index]
            assert np.array_equal(batch.frames.y[b, :, :height, :width], sample.frames.y)
            for plane in "uv":
                expected = getattr(sample.frames, plane)
                assert np.array_equal(getattr(batch.frames, plane)[b, :, : height // 2, : width // 2], expected)
            assert batch.frames.bt709[b] == sample.frames.bt709
            assert batch.frames.full_range[b] == sample.frames.full_range
        # Four rows of parameters a sample, each at its position, with the true size of the frame.
        tables = [table for params in (batch.query_params, batch.key_params) for table in (params.clip, params.still)]
        for position, table in enumerate(tables):
            for name in AUGMENTATION.names:
                assert np.array_equal(getattr(table, name), np.stack([sample.rows[position][name] for sample in own]))
            assert table.size.tolist() == [[mixed.heights[index], mixed.widths[index]] for index in order]


def test_colour_spaces_go_with_their_samples(mixed):
    samples = PairSamples(mixed, CONFIG, 0)
    own = [samples.read(0, index) for index in range(2)]
    drawn = [SampleInfo(s.index, s.rows, bool(s.index), not s.index, {}) for s in own]

    class Marked(PairSamples):
        def read(self, epoch, index, into=None):
            sample = super().read(epoch, index, into)
            frames = replace(sample.frames, bt709=drawn[index].bt709, full_range=drawn[index].full_range)
            return Sample(index, frames, sample.rows)

    two = replace(mixed, labels=mixed.labels[:2])
    (batch,) = train_batches(Marked(two, CONFIG, 0), BatchSampler(2, 2, 1))
    assert batch.frames.bt709.tolist() == [index == 1 for index in batch.indices.tolist()]
    assert batch.frames.full_range.tolist() == [index == 0 for index in batch.indices.tolist()]


def test_labels_go_with_their_videos(mixed):
    assert batch_of(ClipSamples(mixed, CONFIG, 0), [4, 1, 0]).labels.tolist() == mixed.labels[[4, 1, 0]].tolist()
    (batch,) = train_batches(ClipSamples(mixed, CONFIG, 0), BatchSampler(6, 6, 1))
    assert batch.labels.tolist() == [int(mixed.path(index)[0] == "b") for index in batch.indices.tolist()]


def test_the_test_protocol_cuts_ten_uniform_clips_of_each_video_in_order(mixed):
    found = test_batches(TestClips(mixed, CONFIG), 0)
    assert [batch.indices.tolist() for batch in found] == [[index] * 10 for index in range(6)]
    for index in range(6):
        planes = sequential(mixed.root / mixed.path(index))
        numbers = clips.uniform_clips(len(planes[0]), 10, 4, 2)
        batch = found[index]
        assert same_planes(batch.frames, planes, numbers)
        assert batch.frames.y.shape == (10, 4, mixed.heights[index], mixed.widths[index])
        assert batch.labels.tolist() == [mixed.labels[index]] * 10
        assert batch.augmentation.size.tolist() == [[mixed.heights[index], mixed.widths[index]]] * 10
        assert batch.frames.bt709.shape == batch.frames.full_range.shape == (10,)
        assert not batch.augmentation.flip.any()


# ---------------------------------------------------------------- the ring


def shape_of(positions: Sequence[tuple[int, int]]) -> FrameShape:
    return FrameShape(len(positions), 1, 2, 2)


@pytest.mark.parametrize(
    ("size", "workers", "hold"),
    [
        pytest.param(3, 2, 1, id="a batch is one chunk"),
        pytest.param(9, 2, 1, id="two chunks a batch, the last one smaller"),
        pytest.param(8, 3, 2, id="two batches stay valid"),
        pytest.param(40, 2, 2, id="more chunks a batch than are out"),
        pytest.param(4, 0, 1, id="no workers"),
    ],
)
def test_no_chunk_is_sent_to_a_slot_in_use_and_no_slot_is_too_many(size, workers, hold):
    """`Batches` takes `workers * PREFETCH` chunks at once, then one for each that is answered."""
    sampler = BatchSampler(size, size, 12)
    chunks = ChunkSampler(sampler, shape_of, workers * PREFETCH, hold)
    first_rows = range(0, size, sampler.chunk_size)
    assert len(first_rows) == sampler.chunks_a_batch
    sent, batches_at_once = [], []

    def send():
        chunk = next(chunks_sent, None)
        if chunk is not None:
            sent.append(chunk)
            newest = (len(sent) - 1) // len(first_rows)
            in_use = range(max(chunks.newest - hold + 1, 0), newest + 1)
            assert len({number % chunks.slots for number in in_use}) == len(in_use)
            assert chunk.slot == newest % chunks.slots
            batches_at_once.append(len(in_use))

    chunks_sent = iter(chunks)
    for _ in range(workers * PREFETCH):
        send()
    for number in range(12):
        chunks.newest = number
        for _ in first_rows:
            send()
    assert max(batches_at_once) == chunks.slots  # every slot is needed

    by_batch = [sent[first : first + len(first_rows)] for first in range(0, len(sent), len(first_rows))]
    assert [[position for chunk in batch for position in chunk.positions] for batch in by_batch] == list(sampler)
    for batch in by_batch:
        rows = [chunk.first_row + row for chunk in batch for row in range(len(chunk.positions))]
        assert rows == list(range(size))
        assert max(len(chunk.positions) for chunk in batch) <= loader.CHUNK


def test_a_chunk_for_a_slot_in_use_is_refused():
    chunks = iter(ChunkSampler(BatchSampler(4, 4, 9), shape_of, ahead=PREFETCH, hold=1))
    with pytest.raises(RuntimeError, match="batch 2 would be written over batch -1"):
        list(chunks)  # no batch has been requested


@pytest.mark.parametrize("hold", [1, 2])
def test_a_batch_stays_as_it_is_until_enough_others_are_asked_for(videos, hold):
    """A batch is valid however long the consumer takes, while the workers continue to read."""
    samples, sampler = PairSamples(videos, CONFIG, 5), BatchSampler(16, 4, 2)
    expected = batches(samples, sampler)
    held: list[Batch] = []
    for number, batch in enumerate(Batches(samples, sampler, 2, hold)):
        held = [*held, batch][-hold:]
        time.sleep(0.15)
        assert [plain(kept(b)) for b in held] == expected[number + 1 - len(held) : number + 1]
    assert number == 7


def test_frames_are_views_of_the_ring_and_little_else_comes_from_a_worker(videos):
    samples = PairSamples(videos, CONFIG, 0)
    found = Batches(samples, BatchSampler(16, 4, 2), workers=2)
    for number, batch in enumerate(found):
        start = found.ring.slot(number % found.ring.slots).data_ptr()
        assert len(found.slot()) == found.ring.slot_bytes
        assert found.slot().data_ptr() == start
        for plane in (batch.frames.y, batch.frames.u, batch.frames.v, batch.query_frames.y, batch.key_stills.v):
            assert start <= plane.data_ptr() < start + found.ring.slot_bytes
    chunk = next(iter(ChunkSampler(BatchSampler(16, 4, 2), samples.shape, ahead=4, hold=1)))
    sent = len(pickle.dumps(read_chunk(samples, found.ring, chunk)))
    assert sent < 1000 * len(chunk.positions)
    assert sent < found.ring.slot_bytes / 100


# ---------------------------------------------------------------- videos that fail after they were verified


def spoil(videos: VideoSet, index: int, how: str) -> str:
    """Make a verified video unreadable and return its path in the catalog."""
    path = videos.root / videos.path(index)
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    return videos.path(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["delete", "truncate"])
@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_a_video_that_fails_later_is_replaced_by_the_next_of_the_epochs_order(mixed, kind, how, workers, capsys):
    samples, sampler = kind(mixed, CONFIG, 1), BatchSampler(6, 3, 2)
    before = list(train_batches(samples, sampler))
    path = spoil(mixed, 2, how)
    after = list(train_batches(samples, sampler, workers))

    failures = Failures()
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        order = clips.epoch_order(1, step // 2, 6).tolist()
        expected = [order[(order.index(i) + 1) % 6] if i == 2 else i for i in old.indices.tolist()]
        assert new.indices.tolist() == expected
        assert set(new.failures) == ({path} if 2 in old.indices.tolist() else set())
        failures.add(new.failures)
    # Read once per epoch: counted each time, one warning.
    assert failures.count == 2
    assert list(failures.reasons) == [path]
    named = capsys.readouterr().err
    assert named.count(path) == named.count("\n") == 1
    assert failures.reasons[path] in named
    failures.add({"red\x1b[31m\n.mp4": "gone"})
    assert capsys.readouterr().err.startswith("warning: red\\x1b[31m\\n.mp4 can no longer be read (gone); ")


def test_a_replacing_sample_is_the_sample_of_that_video_and_epoch(mixed):
    order = clips.epoch_order(1, 0, 6).tolist()
    spoil(mixed, order[0], "delete")
    samples, height, width = PairSamples(mixed, CONFIG, 1), mixed.heights[order[1]], mixed.widths[order[1]]
    into = [empty_planes(10, 48, 48) for _ in range(2)]
    replaced, own = samples.read_into(0, 0, into[0]), samples.read_into(0, 1, into[1])
    assert replaced.index == own.index == order[1]
    assert (replaced.failures, own.failures) == ({mixed.path(order[0]): "no such file"}, {})
    assert replaced.rows.tobytes() == own.rows.tobytes()
    assert np.array_equal(into[0][0][:, :height, :width], into[1][0][:, :height, :width])
    assert np.array_equal(into[0][0][:, :height, :width], samples.read(0, order[1]).frames.y)


@pytest.mark.parametrize("workers", [0, 2])
def test_when_no_video_can_be_read_any_more_the_run_ends_with_one_line(mixed, workers):
    shutil.rmtree(mixed.root)
    with pytest.raises(UserError) as caught:
        list(train_batches(PairSamples(mixed, CONFIG, 0), BatchSampler(6, 3, 1), workers))
    assert "\n" not in str(caught.value)
    assert str(caught.value) == (
        f"{mixed.root}: not one of 6 videos can be read any more; was the folder moved or unmounted?"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_split_skips_videos_that_fail(mixed, workers):
    path, other = spoil(mixed, 1, "truncate"), spoil(mixed, 4, "delete")
    found = test_batches(TestClips(mixed, CONFIG), workers)
    assert [sorted(set(batch.indices.tolist())) for batch in found] == [[0], [], [2], [3], [], [5]]
    assert [list(batch.failures) for batch in found] == [[], [path], [], [], [other], []]
    empty = found[4]
    assert (len(empty.frames.y), len(empty.frames.bt709), len(empty.labels)) == (0, 0, 0)
    assert len(empty.augmentation.size) == 0


# ---------------------------------------------------------------- videos on which the decoder crashes or never returns


def hurt(monkeypatch: pytest.MonkeyPatch, index: int, fault: Callable[[], None]) -> None:
    """Make every later attempt to read video `index` call this function, in processes that are forked later."""
    read = VideoFiles.read_planes

    def read_planes(self, number, wanted, into=None):
        if number == index:
            fault()
        return read(self, number, wanted, into)

    monkeypatch.setattr(VideoFiles, "read_planes", read_planes)


FAULTS = pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (crash, "the decoder crashes on it (SIGSEGV)"),
        (loop, "the decoder gives no frame for 1 s"),
        (block, "the decoder gives no frame for 1 s"),
    ],
)


def runs(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def gone(processes: list[int], seconds: float = 3) -> bool:
    """Return whether all these processes end within the time."""
    end = time.monotonic() + seconds
    while any(map(runs, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@FAULTS
def test_a_video_that_the_decoder_dies_on_is_replaced_by_the_next_and_not_tried_again(
    mixed, monkeypatch, fault, reason
):
    """In three epochs with two workers, each worker waits for the time-out at most once."""
    mixed = replace(mixed, timeout=1)
    samples, sampler = PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 3)
    before = list(train_batches(samples, sampler))
    hurt(monkeypatch, 2, fault)
    began = time.monotonic()
    after = list(train_batches(samples, sampler, 2))
    assert time.monotonic() - began < 8
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        order = clips.epoch_order(1, step // 2, 6).tolist()
        expected = [order[(order.index(i) + 1) % 6] if i == 2 else i for i in old.indices.tolist()]
        assert new.indices.tolist() == expected
        assert new.failures == ({mixed.path(2): reason} if 2 in old.indices.tolist() else {})
        for b, index in enumerate(expected):  # nothing of the interrupted attempt is left
            height, width = mixed.heights[index], mixed.widths[index]
            own = samples.read(step // 2, index).frames
            assert np.array_equal(new.frames.y[b, :, :height, :width], own.y)
    assert children() == []


@FAULTS
def test_a_test_split_skips_videos_that_the_decoder_dies_on(mixed, monkeypatch, fault, reason):
    mixed = replace(mixed, timeout=1)
    hurt(monkeypatch, 3, fault)
    found = test_batches(TestClips(mixed, CONFIG), 2)
    assert [sorted(set(batch.indices.tolist())) for batch in found] == [[0], [1], [2], [], [4], [5]]
    assert [batch.failures for batch in found] == [{}, {}, {}, {mixed.path(3): reason}, {}, {}]
    assert children() == []


def test_a_decoder_killed_once_reads_the_video_after_all(mixed, monkeypatch):
    """The kernel may have killed the process because memory was short."""
    times = shared_array(1, np.int64)

    def killed_at_first() -> None:
        times[0] += 1
        if times[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    expected = batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1))
    hurt(monkeypatch, 2, killed_at_first)
    assert batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1), 2) == expected
    assert times[0] == 2
    hurt(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    found = list(train_batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1), 2))
    assert merged(found) == {mixed.path(4): "the decoder crashes on it (SIGKILL)"}


def merged(found: list[Batch]) -> dict[str, str]:
    return merge_failures(batch.failures for batch in found)


def test_a_bug_in_a_worker_comes_out_with_its_traceback(mixed, monkeypatch):
    def bug() -> None:
        raise ZeroDivisionError("a bug")

    hurt(monkeypatch, 2, bug)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        list(train_batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1), 2))
    assert "in bug" in str(caught.value.__cause__)  # the line in the child
    assert gone(children())
    assert time.monotonic() - began < 4


def test_signals_to_the_whole_group_leave_the_workers_reading(mixed):
    """A terminal's Ctrl-C and a scheduler's signals reach all processes. The training process decides what to do."""
    samples, sampler = PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 20)
    expected = batches(samples, sampler)
    found = []
    for number, batch in enumerate(train_batches(samples, sampler, 2)):
        found.append(plain(batch))
        if number == 3:
            processes = children()
            assert len(processes) == 4  # two workers, a decoder each
            for process in processes:
                for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(process, sent)
            time.sleep(0.2)
            assert children() == processes
    assert found == expected
    assert gone(processes)


@pytest.mark.parametrize("busy", [False, True])
def test_batches_that_are_dropped_end_their_workers_at_once(mixed, monkeypatch, busy):
    """Workers end at once, also while a decoder does not return and its time limit is not reached."""
    if busy:
        hurt(monkeypatch, 2, block)
    found = Batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 1, 20), 2)
    next(found)
    time.sleep(0.3)
    processes = children()
    assert len(processes) == 4
    began = time.monotonic()
    del found
    assert gone(processes)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("end", ["killed", "exception", "left"])
@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_the_training_process(mixed, monkeypatch, tmp_path, busy, end):
    """The training process is killed, raises an exception, or ends with batches that it has not requested."""
    if busy:
        hurt(monkeypatch, clips.epoch_order(1, 0, 6)[3], block)

    def train() -> None:
        found = Batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 1, 20), 2)
        keep.append(found)  # as a traceback's frames do
        next(found)
        time.sleep(0.3)
        (tmp_path / "part").write_text(" ".join(map(str, children())))
        (tmp_path / "part").rename(tmp_path / "processes")
        if end == "exception":
            raise RuntimeError("of the training process")
        if end == "killed":
            time.sleep(100)

    keep: list[object] = []
    trainer = multiprocessing.get_context("fork").Process(target=train)
    trainer.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "processes").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = [int(number) for number in (tmp_path / "processes").read_text().split()]
    assert len(processes) == 4
    if end == "killed":
        os.kill(trainer.pid, signal.SIGKILL)
    trainer.join(10)
    assert trainer.exitcode == {"killed": -signal.SIGKILL, "exception": 1, "left": 0}[end]
    assert gone(processes)


# ---------------------------------------------------------------- workers that die


def workers_and_decoders() -> tuple[list[int], list[int]]:
    """Return the processes that this process forked, and those that they forked."""
    parents = {process: int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])
               for process in children()}  # fmt: skip
    workers = [process for process, parent in parents.items() if parent == os.getpid()]
    return workers, [process for process in parents if process not in workers]


WORKER_DEATHS = {
    signal.SIGKILL: "a data worker was killed (SIGKILL), as Linux does when memory is short: "
    "make frames smaller with train.py pack, or lower --batch-size or --workers",
    signal.SIGSEGV: "a data worker has crashed (SIGSEGV) outside of a decoder: "
    "run the command again, or use --workers 0",
}


@pytest.mark.parametrize("death", WORKER_DEATHS, ids=lambda death: death.name)
@pytest.mark.parametrize("moment", ["at the start", "between batches", "while it reads", "while another is waited for"])
def test_a_worker_that_dies_ends_the_run_with_one_line(mixed, monkeypatch, moment, death):
    if moment == "while it reads":
        hurt(monkeypatch, clips.epoch_order(1, 0, 6)[2], block)
    found = Batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 1, 20), 2)
    if moment != "at the start":
        next(found)
    if moment == "while it reads":
        next(found)
        time.sleep(0.3)
    workers, _ = workers_and_decoders()
    assert len(workers) == 2
    os.kill(workers[moment == "while another is waited for"], death)
    with pytest.raises(UserError) as caught:
        list(found)
    assert str(caught.value) == WORKER_DEATHS[death]
    assert gone(workers)
    assert children() == []
    assert list(found) == []


def test_a_worker_that_dies_interrupts_nothing_else(mixed):
    """DataLoader's signal handler would raise in whatever line the training process is."""
    found = Batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 1, 20), 2)
    next(found)
    os.kill(workers_and_decoders()[0][0], signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert signal.getsignal(signal.SIGCHLD) in (signal.SIG_DFL, None)


def test_a_worker_whose_decoder_holds_the_connection_open_is_noticed(mixed, monkeypatch):
    """The kernel cannot kill a decoder at once that reads from a network disk."""
    monkeypatch.setattr(decoder_process, "end_with_parent", lambda parent: None)
    hurt(monkeypatch, clips.epoch_order(1, 0, 6)[2], block)
    found = Batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 1, 20), 2)
    next(found), next(found)
    time.sleep(0.3)
    workers, decoders = workers_and_decoders()
    for process in workers:
        os.kill(process, signal.SIGKILL)
    with pytest.raises(UserError, match="a data worker was killed"):
        list(found)
    for process in decoders:
        os.kill(process, signal.SIGKILL)


def test_a_decoder_that_is_killed_before_it_reads_a_video_is_replaced_once(mixed, monkeypatch):
    times = shared_array(1, np.int64)
    read = PairSamples.read_chunk

    def read_chunk(self, positions, into):
        times[0] += 1
        if times[0] <= killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, positions, into)

    monkeypatch.setattr(PairSamples, "read_chunk", read_chunk)
    killed = 1
    assert len(list(train_batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1), 1))) == 2
    times[0], killed = 0, 2
    with pytest.raises(UserError, match=r"^a data worker was killed \(SIGKILL\), as Linux does when memory is short: "):
        list(train_batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1), 1))
    assert children() == []


def test_a_worker_without_memory_ends_the_run_with_one_line(mixed, monkeypatch):
    def short_of_memory() -> None:
        raise MemoryError("1 GiB")

    hurt(monkeypatch, 2, short_of_memory)
    with pytest.raises(UserError, match=r"^a data worker has too little memory: make frames smaller"):
        list(train_batches(PairSamples(mixed, CONFIG, 1), BatchSampler(6, 3, 1), 2))
    assert gone(children())


# ---------------------------------------------------------------- large frames in a test


def test_large_frames_make_test_batches_of_fewer_clips_that_are_the_same(mixed, monkeypatch):
    samples = TestClips(mixed, CONFIG)
    whole = test_batches(samples, 0)
    clip = samples.shape([(2, 0)]).bytes
    for clips_that_fit, sizes in ((0.5, [1] * 10), (2.5, [2] * 5), (9.9, [5, 5]), (4, [4, 4, 2])):
        monkeypatch.setattr(loader, "_TEST_BATCH_BYTES", int(clips_that_fit * clip))
        found = [batch for batch in test_batches(samples, 2) if 2 in batch.indices]
        assert [len(batch.indices) for batch in found] == sizes
        assert torch.equal(torch.cat([batch.frames.y for batch in found]), whole[2].frames.y)
        assert torch.equal(torch.cat([batch.augmentation.box for batch in found]), whole[2].augmentation.box)


def test_memory_of_test_batches_is_bounded_by_the_largest_frame(mixed, monkeypatch):
    """One video of 7680 x 4320 pixels: one clip a batch, two batches in memory. 1920 x 1080: five clips a batch."""
    free = 20 * 2**30
    monkeypatch.setattr(loader, "available_memory", lambda: free)
    for height, width, in_batch, most_ahead in ((4320, 7680, 1, 1), (1080, 1920, 5, 4), (240, 320, 10, 70)):
        mixed.heights[2], mixed.widths[2] = height, width
        samples = TestClips(mixed, DataConfig())
        sampler = TestSampler(samples)
        assert [len(batch) for batch in sampler if batch[0][0] == 2] == [in_batch] * (10 // in_batch)
        assert [len(batch) for batch in sampler if batch[0][0] == 1] == [10]  # a small video
        largest = sampler.largest(samples.shape)
        assert (largest.samples, largest.height, largest.width) == (in_batch, height, width)
        assert batches_ahead(samples, sampler) == pytest.approx(most_ahead, abs=1)
        assert largest.bytes * (batches_ahead(samples, sampler) + 1) < max(free / 16, 1.6 * 2**30)


def test_frames_too_large_for_the_memory_are_refused_before_they_are_read(mixed, monkeypatch):
    monkeypatch.setattr(ring_buffer, "available_memory", lambda: int(2.9 * 2**30))
    mixed.heights[2], mixed.widths[2] = 4320, 7680
    samples = TestClips(mixed, DataConfig())
    with pytest.raises(UserError) as refused:
        Batches(samples, TestSampler(samples), 2, ahead=1)
    assert str(refused.value) == (
        "the largest frame of these videos is 7680 x 4320, and batches in memory would take 1.5 GiB, which is more "
        "than half of the 2.9 GiB free: make frames smaller with train.py pack, or use --workers 0, which holds one "
        "batch in memory"
    )
    assert children() == []
    next(Batches(samples, TestSampler(samples), 0))


# ---------------------------------------------------------------- too many bad videos


def test_more_bad_videos_than_are_allowed_end_the_run_with_one_line(mixed):
    some = replace(mixed, unreadable={"a/x.mp4": "empty file", "b/y.mp4": "no video stream"})  # 2 of 8
    check_bad(some, {}, 25)
    check_bad(some, {"a/x.mp4": "again"}, 25)  # each counts once
    check_bad(mixed, {}, 0)
    with pytest.raises(UserError) as caught:
        check_bad(some, {mixed.path(0): "no such file"}, 37.4)
    assert str(caught.value) == (
        f"{mixed.root}: 3 of the split's 8 videos cannot be read (37.5 %), and --max-bad allows 37.4 %; "
        "the first is a/x.mp4 (empty file): see train.py check, or raise --max-bad"
    )
    with pytest.raises(
        UserError, match=r"1 of the split's 6 videos cannot be read \(16\.7 %\).*the first is .* \(gone\)"
    ):
        check_bad(mixed, {mixed.path(1): "gone"}, 1)


@pytest.mark.parametrize("layout", ["flat", "class folders"])
def test_faulty_files_are_skipped_and_never_crash_a_worker(genuine, tmp_path, layout):
    """Every file of `faulty/`, in one folder and in class folders, for a whole epoch with two workers."""
    folder = genuine / "faulty"
    if layout == "class folders":
        folder = tmp_path / "data"
        for number, file in enumerate(sorted((genuine / "faulty").iterdir())):
            (folder / "xy"[number % 2]).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / "xy"[number % 2])
    videos = open_videos(open_catalog(folder), "train", workers=2, progress=False)
    assert {Path(videos.path(index)).name for index in range(len(videos))} == {
        "no_duration.webm", "non_utf8_metadata.3gp", "rotated_90.mov"
    }  # fmt: skip
    assert len(videos.unreadable) == 7
    assert all(reason and "\n" not in reason for reason in videos.unreadable.values())
    for kind in (PairSamples, ClipSamples):
        (batch,) = train_batches(kind(videos, CONFIG, 0), BatchSampler(3, 3, 1), workers=2)
        assert sorted(batch.indices.tolist()) == [0, 1, 2]
        assert batch.failures == {}
