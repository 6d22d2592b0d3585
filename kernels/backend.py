"""The choice between the Triton kernels of a function and its reference in plain torch and kornia.

By default CUDA tensors use the kernels, and all other tensors use the reference.
"""

import functools
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")

HAS_TRITON = find_spec("triton") is not None
"""True if Triton is installed. It has wheels for Linux only."""

if HAS_TRITON:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when this module was imported
else:
    INTERPRETED = False
"""True if Triton interprets the kernels step by step in NumPy, on tensors of any device.

This is slow, for tests and debugging.
"""

_backend = "auto"


def set_backend(backend: str) -> None:
    """Choose the implementation for this process.

    Args:
        backend: "auto" uses the kernels for CUDA tensors and the reference for others. "reference" always uses the
            reference. "triton" always uses the kernels, except that `convolve` uses the reference for weights and
            dtypes without a kernel. On CPU tensors the kernels need Triton's interpreter: set the environment variable
            TRITON_INTERPRET=1 before `kernels` is imported.

    Raises:
        ValueError: The name is unknown, or it is "triton" and Triton is not installed.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError('backend "triton": the package triton is not installed; choose "auto" or "reference"')
    _backend = backend


def runs_triton(device: torch.device) -> bool:
    """Return True if tensors on `device` use the kernels.

    Raises:
        RuntimeError: The backend is "triton", and it cannot run on this device.
    """
    if _backend == "reference":
        return False
    if _backend == "triton":
        if device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(
                f'backend "triton" cannot run on {device.type}: '
                "use a CUDA device, set TRITON_INTERPRET=1 before the start, "
                'or choose "auto"'
            )
        return True
    return device.type == "cuda" and HAS_TRITON


def describe(device: torch.device) -> str:
    """Return a line that names the implementation for tensors on `device`, and the reason."""
    if runs_triton(device):
        return "Triton in its interpreter: slow, for tests only" if INTERPRETED else "Triton"
    if _backend == "reference":
        why = "as chosen"
    else:
        why = f"the device is {device.type}" if device.type != "cuda" else "the package triton is not installed"
    return f"reference (plain torch and kornia; {why})"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU.

    On other devices and under the interpreter it is 16, so that small inputs are split too.
    """
    return (
        16 if INTERPRETED or device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    )


def compute_capability(device: torch.device) -> int:
    """Return the compute capability of a GPU, 90 for 9.0. On other devices it is 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float32_precision() -> Literal["ieee", "tf32"]:
    """Return the precision that torch allows for float32 products on a GPU.

    It is set by torch.set_float32_matmul_precision ("highest" means ieee) or
    torch.backends.cuda.matmul.fp32_precision.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError if the two tensors are on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, not on {tensor.device}")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`, without waiting for the device.

    A copy from memory that is not pinned would make the host wait, so the tensor is pinned first.
    """
    # torch.compile cannot trace pin_memory.
    if tensor.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
