"""torch.compile of backbones: the decision, the call, and the time it took."""

import os
import shutil
from functools import partial
from typing import Any

import torch
from torch._functorch import config as functorch

from dclr.errors import UserError
from dclr.models import Backbone


def resolve_compile(choice: str, device: torch.device) -> tuple[bool, str]:
    """Decide whether backbones are compiled.

    Args:
        choice: --compile: "on", "off" or "auto" (on a GPU).

    Returns:
        The decision, and one line that says what runs and why.

    Raises:
        UserError: backbones are to be compiled, but the compiler for C or C++ is not installed.
    """
    if choice == "off":
        return False, "backbones are not compiled: --compile off"
    if choice == "auto" and device.type == "cpu":
        return False, "backbones are not compiled: on a CPU that takes a minute and gains nothing (--compile on to try)"
    # On a CPU torch generates C++. On a GPU Triton compiles a small C file that launches its kernels.
    variable, usual = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    compilers = [os.environ[variable]] if variable in os.environ else list(usual)
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(
            f"--compile {choice}: torch.compile needs {' or '.join(compilers)}, which is not installed; "
            "install it, or pass --compile off"
        )
    return True, "backbones will be compiled at their first steps (torch.compile)"


INDUCTOR_OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 12,
    "realize_opcount_threshold": 80,
    "realize_acc_reads_threshold": 24,
    "unroll_reductions_threshold": 1,
}
"""Limits above which torch.compile stores an intermediate result. With its defaults it stores the masked gradient of
batch normalisation in float32. On an H200 the query encoder's pass would move 397 GB at batch 128, instead of 342.

The last limit makes sums over the statistics of each view kernels of their own (`merge_statistics`). With its default,
the backward pass would compute such a sum again for each value of the frames, and again store a gradient in float32."""


RECOMPUTED_BUDGET = 0.2
"""The share of the memory of results for the backward pass that torch.compile may use with --recompute. Without the
flag it is 1. With 0.2, r2plus1d_10 keeps about as much as it does uncompiled with the flag (docs/LOG.md)."""


def start_compiling(stage: int, recompute: bool) -> None:
    """Forget all compiled code, and set what every backbone of a run is compiled for.

    Compiled code may assume that weights start at multiples of 16 bytes. In ZeRO's flat buffers they do not. torch 2.11
    does not look at that when it reuses compiled code of another stage, from this process or from the cache on disk
    (extract_tensor_metadata_for_cache_key). The result is "misaligned address" (docs/LOG.md, 2026-11-26). So graphs are
    dropped here, and the stage is part of the cache's key.

    Args:
        stage: the stage of ZeRO.
        recompute: see --recompute. torch.utils.checkpoint has no effect on an autograd.Function in compiled code
            (torch 2.11), so torch.compile itself decides what is computed again.
    """
    torch.compiler.reset()
    torch.compiler.config.cache_key_tag = f"ZeRO {stage}"
    functorch.activation_memory_budget = RECOMPUTED_BUDGET if recompute else 1.0


def compile_backbone(backbone: Backbone, backend: str = "inductor") -> None:
    """Compile a backbone's `forward` and `forward_views` in place, so that parameter names stay.

    Each input shape and mode is compiled at its first call. Code that does not compile as one graph is an error. A deep
    copy of the backbone has a compiled `forward_views` too, which uses the weights of the copy.

    Args:
        backend: the backend of torch.compile. "eager" generates no code, which is enough for some tests.
    """
    options = INDUCTOR_OPTIONS if backend == "inductor" else None
    backbone.compile(dynamic=False, fullgraph=True, backend=backend, options=options)
    # The class's function, with the backbone as its first argument: copy.deepcopy replaces it by the copy.
    function = type(backbone).forward_views
    compiled = torch.compile(function, dynamic=False, fullgraph=True, backend=backend, options=options)
    setattr(backbone, "forward_views", partial(compiled, backbone))  # noqa: B010  (its declared type is a method)


def compile_seconds() -> float:
    """Return the seconds that this process has spent on compiling, forward and backward."""
    # Imported late: evaluation and packing do not need what it loads.
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
