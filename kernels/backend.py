"""Which implementation of a function runs: its Triton kernels, or the plain reference beside them.

By default a function runs where its tensors are: the kernels on a CUDA device, the reference anywhere else.
"""

import functools
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")

HAS_TRITON = find_spec("triton") is not None
"""Triton has wheels for Linux only."""

if HAS_TRITON:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 as it was when the kernels were imported
else:
    INTERPRETED = False
"""Kernels run step by step in numpy, on tensors of any device: slow, for tests and for reading them with a debugger."""

_backend = "auto"


def set_backend(backend: str) -> None:
    """Choose the implementation for this process.

    Args:
        backend: "auto", the kernels for CUDA tensors and the reference for others; "reference", always; "triton", always:
            on CPU tensors that needs Triton's interpreter, the environment variable TRITON_INTERPRET=1 before `kernels` is imported.

    Raises:
        ValueError: another name, or "triton" where there is no Triton.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError('backend "triton": the package triton is not installed; choose "auto" or "reference"')
    _backend = backend


def runs_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go through the kernels.

    Raises:
        RuntimeError: "triton" was chosen, and it cannot run there.
    """
    if _backend == "reference":
        return False
    if _backend == "triton":
        if device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(
                f'backend "triton" cannot run on {device.type}: use a CUDA device, set TRITON_INTERPRET=1 before the start, '
                'or choose "auto"'
            )
        return True
    return device.type == "cuda" and HAS_TRITON


def describe(device: torch.device) -> str:
    """One line: which implementation tensors on `device` run, and why."""
    if runs_triton(device):
        return "Triton in its interpreter: slow, for tests only" if INTERPRETED else "Triton"
    if _backend == "reference":
        why = "as chosen"
    else:
        why = f"the device is {device.type}" if device.type != "cuda" else "the package triton is not installed"
    return f"reference (plain torch and kornia; {why})"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side; 16 under the interpreter, so that small inputs are split too."""
    return (
        16 if INTERPRETED or device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    )


def float32_precision() -> Literal["ieee", "tf32"]:
    """What a float32 product on the matrix units may be rounded to, following torch.set_float32_matmul_precision
    ("highest": ieee) or, if that was used instead, torch.backends.cuda.matmul.fp32_precision."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError: the two are on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, not on {tensor.device}")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: what is copied to a GPU from memory that is not pinned, waits."""
    if (
        tensor.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling()
    ):  # which cannot trace pinning
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
