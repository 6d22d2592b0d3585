"""torch.compile of backbones: whether, how, and how long it took."""

import os
import shutil

import torch

from dclr.errors import UserError
from dclr.models import Backbone


def settle_compile(choice: str, device: torch.device) -> tuple[bool, str]:
    """Whether backbones are compiled, and one line on what runs and why. Raises UserError: asked for, without a compiler to do it."""
    if choice == "off":
        return False, "backbones run as they are: --compile off"
    if choice == "auto" and device.type == "cpu":
        return (
            False,
            "backbones run as they are: on a CPU compiling takes a minute and gains nothing (--compile on to try)",
        )
    # torch's own code generation ends in C++ on a CPU; on a GPU, Triton compiles a small C file to launch its kernels.
    variable, usual = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    compilers = [os.environ[variable]] if variable in os.environ else list(usual)
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(
            f"--compile {choice}: torch.compile needs {' or '.join(compilers)}, which is not installed; install it, or pass --compile off"
        )
    return True, "backbones compiled at their first steps (torch.compile)"


def compile_backbone(backbone: Backbone) -> None:
    """In place, so that names of parameters stay. Every input shape and mode is compiled once, at its first call; whatever would break the
    graph is an error."""
    backbone.compile(dynamic=False, fullgraph=True)


def compile_seconds() -> float:
    """Spent on compiling in this process so far, forward and backward."""
    from torch._dynamo.utils import calculate_time_spent  # late: evaluation and packing have no use for what it loads

    return calculate_time_spent()["total_wall_time"]
