"""Tests of benchmarks/communication.py: the model's bytes and times by hand, and the committed counts."""

import json

import pytest

from benchmarks import communication, harness
from dclr import distributed
from dclr.methods.shuffle import Shuffle

RESULT = json.loads((harness.RESULTS / "cpu" / "communication.json").read_text())


def test_the_bytes_of_a_step_by_hand():
    sizes = {"clip": 1000, "key": 20, "maps": 8, "parameters": 400}
    now = communication.sent_bytes(4, 6, **sizes, zero=True)
    assert now == {"clips": 4500, "keys": 360, "maps": 36, "gradients": 2400, "parameters": 1200}
    before = communication.sent_bytes(4, 6, **sizes, zero=False, gathers=True)
    assert before == now | {"clips": 18_000, "maps": 144, "parameters": 0}


def test_the_clips_that_leave_their_rank_are_those_of_the_shuffle(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    expected = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        expected += [int(clip) for clip in Shuffle(4, seed=5).arrived if clip // 4 != rank]
    assert sorted(communication.leaving_sizes(range(12), 4, step=5)) == sorted(expected)


def test_the_times_of_a_step_by_hand(monkeypatch):
    monkeypatch.setattr(communication, "LATENCY", 0)
    network = communication.NETWORKS["InfiniBand"]
    # All-to-all: of 15 other GPUs, 8 are on the other machine. Rings: 8 GPUs of a machine pass on the same bytes.
    clips = communication.transfer_seconds("clips", 15e9, 16, network)
    assert clips == pytest.approx(8e9 / network / communication.REACHED)
    assert communication.transfer_seconds("keys", 15e9, 16, network) == pytest.approx(15 / 8 * 1e9 / 0.8 / network)
    assert communication.transfer_seconds("keys", 15e9, 8, network) == pytest.approx(15e9 / communication.NVLINK / 0.8)


def test_the_model_gives_the_committed_counts():
    """gloo adds up to 288 bytes to each message. A rank sends each other rank at most 3 messages of a kind."""
    assert {row["ranks"] for row in RESULT["rows"]} == {2, 4, 8}
    for row in RESULT["rows"]:
        assert row["counted"]["other"] == 0
        for kind, expected in row["modelled"].items():
            headers = row["counted"][kind] - expected
            assert 0 < headers <= 3 * 288 * (row["ranks"] - 1) if expected else headers == 0


def test_one_rank_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        communication.main(["--ranks", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "--ranks is 1, but must be at least 2: one rank sends nothing\n"
