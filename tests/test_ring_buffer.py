"""The ring is shared by two processes, its planes do not overlap, and a ring that is too large is refused."""

import os
import re

import numpy as np
import pytest
import torch

from dclr.data import ring_buffer
from dclr.data.ring_buffer import FrameRing, available_memory
from dclr.errors import UserError


@pytest.mark.parametrize(("height", "width"), [(240, 320), (17, 23), (1, 1)])
def test_every_row_is_memory_of_its_own_and_where_the_batch_has_it(height, width):
    shared = FrameRing(slots=3, samples=2, frames=4, height=height, width=width)
    half = ((height + 1) // 2, (width + 1) // 2)
    number = 0
    for slot in range(3):
        for sample in range(2):
            planes = shared.row(slot, sample)
            assert [plane.shape for plane in planes] == [(4, height, width), (4, *half), (4, *half)]
            for plane in planes:
                number += 1
                plane[...] = number
    expected = iter(range(1, number + 1))
    values = torch.zeros(3, 2, 3, dtype=torch.uint8)
    for slot in range(3):
        y, u, v = shared.planes(shared.slot(slot))
        assert y.shape == (2, 4, height, width)
        assert u.shape == v.shape == (2, 4, *half)
        assert all(plane.is_contiguous() and plane.data_ptr() % 16 == 0 for plane in (y, u, v))
        for sample in range(2):
            for place, plane in enumerate((y, u, v)):
                values[slot, sample, place] = next(expected)
                assert (plane[sample] == values[slot, sample, place]).all()
    copy = shared.slot(1).clone()
    assert all(torch.equal(a, b) for a, b in zip(shared.planes(copy), shared.planes(shared.slot(1)), strict=True))


def test_what_a_forked_process_writes_is_there():
    shared = FrameRing(slots=2, samples=1, frames=2, height=4, width=6)
    child = os.fork()
    if child == 0:
        shared.row(1, 0)[0][...] = 77
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (shared.planes(shared.slot(1))[0] == 77).all()
    assert (shared.planes(shared.slot(0))[0] == 0).all()


def test_too_large_a_ring_is_refused_with_the_size_of_its_frames(monkeypatch):
    monkeypatch.setattr(ring_buffer, "available_memory", lambda: 2**30)
    frame = 640 * 480 * 3 // 2
    fits = (2**29 - 3 * 512 * 5) // (5 * frame)
    FrameRing(slots=5, samples=1, frames=fits, height=480, width=640)
    for too_much in ({"frames": fits + 1}, {"frames": fits, "processes": 2}):
        with pytest.raises(UserError) as refused:
            FrameRing(**{"slots": 5, "samples": 1, "height": 480, "width": 640, **too_much})
        message = str(refused.value)
        assert "largest frame of these videos is 640 x 480" in message
        assert "more than half of the 1.0 GiB free" in message
        assert re.search("train.py pack.*--batch-size", message)
        assert "\n" not in message


def test_available_memory_is_what_the_machine_has_at_most():
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < available_memory() <= whole


def test_memory_that_nobody_writes_to_costs_nothing():
    """Slots have room for the largest frame, even if most frames are smaller."""
    with open("/proc/self/statm") as before:
        resident = int(before.read().split()[1])
    shared = FrameRing(slots=4, samples=8, frames=10, height=1000, width=1000)
    shared.row(2, 3)[0][:, :100, :100] = 1
    with open("/proc/self/statm") as after:
        grown = (int(after.read().split()[1]) - resident) * os.sysconf("SC_PAGE_SIZE")
    assert 4 * shared.slot_bytes > 400 * 2**20
    assert grown < 20 * 2**20
    assert isinstance(shared.row(0, 0)[0], np.ndarray)
