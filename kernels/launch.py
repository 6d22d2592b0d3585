"""The launch of a Triton kernel as a value: it can be run, or compiled for a GPU that this machine does not have.

benchmarks/resources.py and the tests therefore compile exactly what runs: the same kernel, argument types and
constants.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and constants.

    The names of arguments and constants are those of the kernel's parameters.
    """

    kernel: Any  # a function decorated with triton.jit
    grid: tuple[int, ...]  # number of programs along each axis
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, Any]  # the kernel's tl.constexpr parameters
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # for one thread; None lets ptxas choose
    capability: int | None = None  # the compute capability that this launch is chosen for; None if for all

    @property
    def options(self) -> dict[str, int | None]:
        """Return the compiler's options under Triton's names."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    def __call__(self) -> None:
        """Start the kernel on the current stream. Under the interpreter, run it to the end."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):  # Triton starts kernels on the current device, not on the tensors' device
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def compile(self, capability: int) -> "CompiledKernel":
        """Compile for an NVIDIA GPU of this compute capability (80 for 8.0, 90 for 9.0). This needs no GPU.

        Arguments are specialised as in Triton's launcher: the compiler knows which pointers and integers are multiples
        of 16, and an integer argument of 1 becomes a constant. Tensors may be on any device, including the meta device.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, dict(self.constants), {}
        for position, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            value = self.arguments[name]
            if isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
                # Memory that torch allocates is aligned. For a view that is not, Triton compiles the kernel again.
                attributes[(position,)] = _DIVISIBLE
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                # The launcher gives other integers an empty list. With the same list, it finds this in Triton's cache.
                attributes[(position,)] = _DIVISIBLE if value % 16 == 0 else []
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
