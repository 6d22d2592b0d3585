"""Tests of what a process knows about the others before they are connected."""

import pytest

from dclr import distributed


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        pytest.param({"LOCAL_WORLD_SIZE": "4"}, 4, id="torchrun"),
        pytest.param({"LOCAL_SIZE": "8"}, 8, id="deepspeed"),
        pytest.param({}, 1, id="no launcher"),
    ],
)
def test_the_number_of_processes_on_the_machine_comes_from_the_launcher(monkeypatch, launcher, expected):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert distributed.processes_of_machine() == expected
