"""Batches on the device equal those on the host, come in order, and are never overwritten while they are in use."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dclr.config import DataConfig
from dclr.data.datasets import open_catalog
from dclr.data.loader import Batches, BatchSampler
from dclr.data.prefetch import DeviceBatches, batches_on
from dclr.data.samples import ClipSamples, PairSamples
from dclr.data.videos import VideoSet, open_videos
from dclr.kernels import Yuv420, generate_views

CONFIG = DataConfig(clip_length=4, clip_stride=2, crop_size=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(demo_videos) -> VideoSet:
    return open_videos(open_catalog(demo_videos), "train", workers=1, progress=False)


def planes_of(frames: Yuv420) -> list[torch.Tensor]:
    """Return all bytes of a batch. The demo videos have one size, so all bytes belong to frames."""
    return [plane.cpu().clone() for plane in (frames.y, frames.u, frames.v)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_on_a_cpu_a_batch_is_the_rings_own_memory(videos):
    batches = batches_on(CPU, PairSamples(videos, CONFIG, 0), BatchSampler(16, 4, 1), 0)
    assert isinstance(batches, Batches)
    assert batches.ring.slots == 1


class FakeCuda:
    """Streams and events that only record their calls, so that a test can check the order without a GPU."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def event(self) -> Any:
        cuda, name = self, f"event {sum(note.startswith('made event') for note in self.notes)}"
        self.notes.append(f"made {name}")

        class Event:
            def synchronize(self) -> None:
                cuda.notes.append(f"host waits for {name}")

            def record(self, stream: Any) -> None:
                cuda.notes.append(f"{name} after {stream.name}")

        event = Event()
        event.name = name
        return event

    def stream(self, name: str) -> Any:
        cuda = self

        class Stream:
            def wait_event(self, event: Any) -> None:
                cuda.notes.append(f"{name} waits for {event.name}")

            def wait_stream(self, other: Any) -> None:
                cuda.notes.append(f"{name} waits for {other.name}")

        stream = Stream()
        stream.name = name
        return stream


def test_a_copy_waits_for_what_had_its_buffer_and_a_step_for_its_copy(videos, monkeypatch):
    cuda = FakeCuda()
    computing, copying = cuda.stream("step"), cuda.stream("copy")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    samples, sampler = PairSamples(videos, CONFIG, 0), BatchSampler(16, 4, 2)
    expected = [(planes_of(batch.frames), batch) for batch in Batches(samples, sampler, 0)]
    host = Batches(samples, sampler, workers=2, hold=2)
    asked = host.__class__.__next__
    monkeypatch.setattr(Batches, "__next__", lambda self: (cuda.notes.append("host batch"), asked(self))[1])
    on_device = DeviceBatches(host, CPU)

    cuda.notes.clear()
    for number, batch in enumerate(on_device):
        planes, plain = expected[number]
        assert same(planes_of(batch.frames), planes)
        assert torch.equal(batch.indices, plain.indices)
        assert torch.equal(batch.query_params.clip.box, plain.query_params.clip.box)
        # The next one has been copied already, to the other buffer.
        assert batch.frames.y.data_ptr() == on_device._buffers[number % 2].data_ptr()
        assert not batch.frames.bt709.is_cuda
        own, other = f"event {number % 2}", f"event {1 - number % 2}"

        def copy(event: str) -> list[str]:
            return [f"host waits for {event}", "host batch", "copy waits for step", f"{event} after copy"]

        notes = copy(own) if number == 0 else []
        notes.append(f"step waits for {own}")
        notes += copy(other) if number < 7 else copy(other)[:2]  # after the last there is none to copy
        assert cuda.notes == notes
        cuda.notes.clear()
    assert number == 7


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_on_a_gpu_batches_are_those_of_the_host_however_long_a_step_takes(videos, kind):
    device, samples, sampler = torch.device("cuda"), kind(videos, CONFIG, 0), BatchSampler(16, 4, 4)
    expected = [(planes_of(batch.frames), batch) for batch in Batches(samples, sampler, 0)]
    batches, kept = batches_on(device, samples, sampler, workers=2), []
    for batch in batches:
        torch.cuda._sleep(20_000_000)  # 10 ms of the GPU, in which the host runs ahead and copies are asked for
        kept.append(([plane.clone() for plane in (batch.frames.y, batch.frames.u, batch.frames.v)], batch))
    assert len(kept) == 16
    for (planes, plain), (found, batch) in zip(expected, kept, strict=True):
        assert all(plane.is_cuda for plane in found)
        assert same([plane.cpu() for plane in found], planes)
        assert torch.equal(batch.indices, plain.indices)
        if kind is ClipSamples:
            assert batch.labels.is_cuda
            assert torch.equal(batch.labels.cpu(), plain.labels)


@pytest.mark.gpu
def test_on_a_gpu_neither_the_next_batch_nor_its_views_wait_for_the_device(videos):
    device = torch.device("cuda")
    batches = batches_on(device, PairSamples(videos, CONFIG, 0), BatchSampler(16, 4, 4), workers=2)

    def views() -> None:
        batch = next(batches)
        generate_views(batch.query_frames, batch.query_stills, batch.query_params)

    views()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            views()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_a_warning_and_nothing_else(videos, capfd):
    device, samples, sampler = torch.device("cuda"), PairSamples(videos, CONFIG, 0), BatchSampler(16, 4, 1)
    expected = [planes_of(batch.frames) for batch in Batches(samples, sampler, 0)]
    host = Batches(samples, sampler, workers=1, hold=2)
    host.ring.pin(device)
    assert host.ring.slot(0).is_pinned()
    assert "warning" not in capfd.readouterr().err
    host.ring.pin(device)  # a second time: CUDA refuses it
    assert "warning: batches cannot be pinned in memory" in capfd.readouterr().err
    found = [planes_of(batch.frames) for batch in DeviceBatches(host, device)]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    torch.cuda.synchronize()
