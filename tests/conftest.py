"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

GENUINE = Path(os.environ.get("DCLR_TEST_VIDEOS", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def genuine() -> Path:
    """The folder of genuine videos (UCF101, HMDB51, Kinetics, Weizmann and faulty files); they are not part of the repository."""
    if not GENUINE.is_dir():
        pytest.skip(f"no genuine videos at {GENUINE}: set DCLR_TEST_VIDEOS to the folder that holds ucf101_sample, faulty, ...")
    return GENUINE
