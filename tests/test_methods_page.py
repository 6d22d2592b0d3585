"""docs/methods.md: its table has every method, and the cost of a step is counted without memory."""

import re
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from helpers import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode

from dclr.config import MethodConfig, PretrainConfig
from dclr.kernels import Views
from dclr.methods import METHODS

ROWS = {
    name: (int(gigaflop), float(ratio))
    for name, gigaflop, ratio in re.findall(
        r"^\| `([\w-]+)` \|.*\| (\d+) \| (\d\.\d\d) \|", (REPOSITORY / "docs" / "methods.md").read_text(), re.M
    )
}


def gigaflop_a_sample(name: str) -> float:
    """Return the GFLOP of forward and backward of a sample, from tensors that have shapes and no memory."""
    samples = 8
    # torch.autocast does not know the device "meta". The loss switches it off, which has no effect here.
    with torch.device("meta"), patch("torch.autocast", lambda *_, **__: nullcontext()):
        # VideoMoCo is counted in its second phase.
        network = METHODS[name].build(PretrainConfig(method=MethodConfig(method=name, adversarial_from=0)))
        rgb, still = torch.empty(samples, 3, 16, 112, 112), torch.empty(samples, 3, 1, 112, 112)
        views = Views(rgb, still.expand_as(rgb), rgb)
        with FlopCounterMode(display=False) as counter:
            network(views, views, 0).loss.backward()
    return counter.get_total_flops() / samples / 1e9


def test_the_table_has_a_row_for_every_method() -> None:
    assert ROWS.keys() == METHODS.keys()


@pytest.mark.slow
def test_the_cost_of_a_step_is_that_of_the_table() -> None:
    counted = {name: gigaflop_a_sample(name) for name in METHODS}
    found = {name: (round(flop), round(flop / counted["moco"], 2)) for name, flop in counted.items()}
    assert found == ROWS
