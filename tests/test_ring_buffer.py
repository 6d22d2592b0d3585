"""The ring is shared by two processes, its planes do not overlap, and a ring that is too large is refused."""

import os
import re

import pytest
import torch

from dclr.data import ring_buffer
from dclr.data.ring_buffer import FrameRing, FrameShape, available_memory
from dclr.data.samples import TrainSamples
from dclr.errors import UserError


@pytest.mark.parametrize(("height", "width"), [(240, 320), (17, 23), (1, 1)])
def test_every_row_is_memory_of_its_own_and_where_the_batch_has_it(height, width):
    shape = FrameShape(samples=2, frames=4, height=height, width=width)
    shared = FrameRing(3, shape, "")
    half = ((height + 1) // 2, (width + 1) // 2)
    number = 0
    for slot in range(3):
        for sample in range(2):
            planes = [plane[sample].numpy() for plane in shape.view(shared.slot(slot))]
            assert [plane.shape for plane in planes] == [(4, height, width), (4, *half), (4, *half)]
            for plane in planes:
                number += 1
                plane[...] = number
    expected = iter(range(1, number + 1))
    values = torch.zeros(3, 2, 3, dtype=torch.uint8)
    for slot in range(3):
        y, u, v = shape.view(shared.slot(slot))
        assert y.shape == (2, 4, height, width)
        assert u.shape == v.shape == (2, 4, *half)
        assert all(plane.is_contiguous() and plane.data_ptr() % 16 == 0 for plane in (y, u, v))
        for sample in range(2):
            for place, plane in enumerate((y, u, v)):
                values[slot, sample, place] = next(expected)
                assert (plane[sample] == values[slot, sample, place]).all()
    copy = shared.slot(1).clone()
    assert all(torch.equal(a, b) for a, b in zip(shape.view(copy), shape.view(shared.slot(1)), strict=True))


def test_what_a_forked_process_writes_is_there():
    shape = FrameShape(samples=1, frames=2, height=4, width=6)
    shared = FrameRing(2, shape, "")
    child = os.fork()
    if child == 0:
        shape.view(shared.slot(1))[0][...] = 77
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (shape.view(shared.slot(1))[0] == 77).all()
    assert (shape.view(shared.slot(0))[0] == 0).all()


def test_too_large_a_ring_is_refused_with_the_size_of_its_frames(monkeypatch):
    monkeypatch.setattr(ring_buffer, "available_memory", lambda: 2**30)
    frame = 640 * 480 * 3 // 2
    fits = (2**29 - 3 * 512 * 5) // (5 * frame)
    FrameRing(5, FrameShape(1, fits, 480, 640), TrainSamples.advice)
    for frames, processes in ((fits + 1, 1), (fits, 2)):
        with pytest.raises(UserError) as refused:
            FrameRing(5, FrameShape(1, frames, 480, 640), TrainSamples.advice, processes)
        message = str(refused.value)
        assert "largest frame of these videos is 640 x 480" in message
        assert "more than half of the 1.0 GiB free" in message
        assert re.search("train.py pack.*--batch-size", message)
        assert "\n" not in message


def test_available_memory_is_what_the_machine_has_at_most():
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < available_memory() <= whole


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts_without_its_use_but_with_its_cache(tmp_path, monkeypatch, version):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    groups = ((tmp_path, *names), (tmp_path / "none", "memory.max", "memory.current"))
    monkeypatch.setattr(ring_buffer, "_CGROUPS", groups)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 70\n" + "total_inactive_file 70\n" * (version == 1))
    (tmp_path / names[1]).write_text("100\n")
    (tmp_path / names[0]).write_text("130\n")
    assert available_memory() == 100
    (tmp_path / names[0]).write_text("20\n")
    assert available_memory() == 0
    if version == 2:
        (tmp_path / names[0]).write_text("max\n")
        assert available_memory() > 2**20


def test_memory_that_cannot_be_allocated_is_an_error_of_one_line(monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(ring_buffer.mmap, "mmap", refuse)
    with pytest.raises(
        UserError, match=r"^0\.0 GiB for batches in memory cannot be allocated \(Cannot .*\): lower it$"
    ):
        FrameRing(1, FrameShape(1, 1, 16, 16), "lower it")


def test_memory_that_nobody_writes_to_costs_nothing():
    """Slots have room for the largest frame, even if most frames are smaller."""
    with open("/proc/self/statm") as before:
        resident = int(before.read().split()[1])
    shape = FrameShape(samples=8, frames=10, height=1000, width=1000)
    shared = FrameRing(4, shape, "")
    shape.view(shared.slot(2))[0][3, :, :100, :100] = 1
    with open("/proc/self/statm") as after:
        grown = (int(after.read().split()[1]) - resident) * os.sysconf("SC_PAGE_SIZE")
    assert 4 * shared.slot_bytes > 400 * 2**20
    assert grown < 20 * 2**20
