"""The rate at which all multiprocessors read from the L2 cache, measured by a Triton kernel.

benchmarks/layers.py uses it as the ceiling of convolutions with narrow tiles, which read each operand several times
from L2. This module is not run by itself.
"""

import torch
import triton
import triton.language as tl

from benchmarks import harness

BLOCK = 4096
"""Floats that a program reads at once: 16 KiB, four loads of 16 bytes of each of its 256 threads."""

PROGRAMS_OF_A_MULTIPROCESSOR = 8
ROUNDS = 256


@triton.jit
def _sum_blocks(source, sums, rounds, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum `rounds` blocks, one after another. Each program begins at another block. `.cg` loads do not stay in L1."""
    program = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(rounds):
        block = (program * 61 + number) % blocks
        total += tl.load(source + block * BLOCK + within, cache_modifier=".cg")
    tl.store(sums + program * BLOCK + within, total)


def sum_blocks(source: torch.Tensor, programs: int, rounds: int) -> torch.Tensor:
    """Return the sums (programs, BLOCK) of `rounds` blocks of `source` (N * BLOCK,) float32.

    Program p sums the blocks 61 p, 61 p + 1, ..., counted modulo N.
    """
    sums = source.new_empty(programs, BLOCK)
    _sum_blocks[(programs,)](source, sums, rounds, len(source) // BLOCK, BLOCK=BLOCK, num_warps=8)
    return sums


def measure_read_rate(device: torch.device, mebibytes: int = 16) -> float:
    """Return the bytes per second that all multiprocessors together read from `mebibytes` MiB, which stay in L2.

    An H200 has 60 MB of L2 in two halves, so 16 MiB fit into one. The first reads, which come from memory, take less
    than 1 % of the time.
    """
    source = torch.randn(mebibytes * 2**20 // 4, device=device)
    programs = PROGRAMS_OF_A_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    times = harness.time_in_turns({"read": lambda: sum_blocks(source, programs, ROUNDS)}, device, repetitions=15)
    return programs * ROUNDS * BLOCK * 4 / (times["read"]["median_ms"] / 1e3)
