"""One launch of a Triton kernel as a value: it can be run, and compiled ahead of time for a GPU that is not there.

So that what benchmarks/resources.py and the tests compile is what runs: same kernel, same argument types, same constants.
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
    """A kernel with everything it is started with. Argument and constant names are the kernel's own."""

    kernel: Any  # what triton.jit made
    grid: tuple[int, ...]  # programs, by axis
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, Any]  # the kernel's tl.constexpr parameters
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # of a thread; None: as many as ptxas thinks best

    @property
    def options(self) -> dict[str, int | None]:
        """How the compiler maps a program to hardware, under Triton's names."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    def __call__(self) -> None:
        """Start it on the current stream; under the interpreter, run it to its end."""
        some = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(some):  # Triton starts kernels on the current device, whichever holds the tensors
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def compile(self, capability: int) -> "CompiledKernel":
        """Compile for an NVIDIA GPU of this compute capability (80 for 8.0, 90 for 9.0); needs no GPU.

        Arguments are specialised as Triton's launcher does it: pointers and integers that 16 divides are known to be so, and an
        integer argument of 1 is a constant. Tensors may be on any device, the meta device too.
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
                attributes[(position,)] = (
                    _DIVISIBLE  # what torch allocates is; a view may not be, and is compiled apart
                )
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(position,)] = _DIVISIBLE
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
