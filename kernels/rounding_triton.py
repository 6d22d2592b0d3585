"""Rounding inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr, BY_BITS: tl.constexpr):
    """Round x, float32, to the nearest value of DTYPE.

    BY_BITS rounds to bfloat16 by integer operations, because the interpreter of Triton 3.6 truncates instead.
    """
    if BY_BITS:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)
