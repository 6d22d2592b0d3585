"""Five kills of a run of two ranks. `make chaos` runs the same program with 100 kills."""

import json
import subprocess
import sys

import pytest
from helpers import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_five_times_equals_an_uninterrupted_one(clean_environment):
    """tests/chaos.py checks the run after every kill. This test checks that each kind of kill took place."""
    command = [sys.executable, "tests/chaos.py", "--kills", "5", "--one-rank-every", "5", "--seed", "5"]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean_environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 5
    assert summary["while writing"] >= 1
    assert summary["one rank"] == 1
    assert summary["finished"] >= 1
