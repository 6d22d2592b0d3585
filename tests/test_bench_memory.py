"""Tests of benchmarks/memory.py: bytes by hand, and the table of batches."""

import json

import pytest
import torch

from benchmarks import memory, tables
from benchmarks.step_providers import Cell

CELL = Cell(backbone="r3d_10", B=2, T=4, side=16, width=4)


def test_the_living_bytes_by_hand():
    given = torch.zeros(100)
    with memory.LiveBytes() as live:
        a = given + 1  # 400 bytes
        b = a[:50] * 2  # a view, which shares memory, and 200 bytes
        assert (live.now, live.peak) == (600, 600)
        del a
        assert live.now == 200
        c = b.double()
        c.add_(1)  # makes nothing
        assert (live.now, live.peak) == (600, 600)
    assert not b.is_cuda
    assert not c.is_cuda


def test_a_step_that_recomputes_holds_less():
    plain, again = (memory.count(CELL, "finetune", recompute) for recompute in (False, True))
    assert again["kept_bytes"] < 0.7 * plain["kept_bytes"]
    assert again["sample_bytes"] < plain["sample_bytes"]
    assert again["fixed_bytes"] == plain["fixed_bytes"]
    assert memory.inputs_bytes(CELL, "finetune") < memory.inputs_bytes(CELL, "MoCo") < memory.inputs_bytes(CELL, "DCLR")


def test_the_batch_that_fits_by_hand():
    row = {"fixed_bytes": 6e8, "sample_bytes": 5e8}
    assert memory.largest_batch(row, 24, margin=1.0) == 42 // 8 * 8
    assert memory.largest_batch(row, 24, margin=10.0) == 4
    rows = [{"backbone": "b", "method": "DCLR", "recompute": False, **row}]
    measured = {"backbone": "b", "method": "DCLR", "B": 10, "bytes": 2 * (6e8 + 10 * 5e8)}
    assert memory.margin({"measured": measured, "rows": rows}) == pytest.approx(2)


def test_the_table_of_the_committed_counts_has_larger_batches_with_the_flag():
    lines = tables.fitting_table(json.loads((tables.harness.RESULTS / "memory.json").read_text())).splitlines()[4:]
    assert len(lines) == len(memory.NETWORKS) * len(memory.METHODS)
    for line in lines:
        _, _, *plain, _, a, b, c, d, _ = (cell.strip() for cell in line.split("|")[1:])
        assert [int(x) for x in plain] <= [int(x) for x in (a, b, c, d)], line
