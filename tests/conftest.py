"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

GENUINE = Path(os.environ.get("DCLR_TEST_VIDEOS", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def genuine() -> Path:
    """The folder of genuine videos (UCF101, HMDB51, Kinetics, Weizmann and faulty files); they are not part of the repository."""
    if not GENUINE.is_dir():
        pytest.skip(
            f"no genuine videos at {GENUINE}: set DCLR_TEST_VIDEOS to the folder that holds ucf101_sample, faulty, ..."
        )
    return GENUINE


@pytest.fixture(scope="session")
def one_process() -> torch.device:
    """This process as a run of one rank, under DeepSpeed. For all tests together: DeepSpeed cannot start twice in a process."""
    from dclr.engine import start_processes, stop_processes

    device = start_processes()
    yield device
    stop_processes()


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """For processes that tests start: runs of their own, whatever this one has become."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}
