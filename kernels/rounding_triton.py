"""Rounding inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr, BY_BITS: tl.constexpr):
    """Round x to the nearest value of DTYPE.

    BY_BITS rounds the bits to bfloat16 explicitly, because the interpreter of Triton 3.6 would cut them off.
    """
    if BY_BITS:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)
