"""How many registers, how much shared memory and how many spills does each Triton kernel have? This needs no GPU.

    python -m benchmarks.resources            print a table, write results/resources.json: a minute on two cores
    python -m benchmarks.resources --check    print only

Kernels are compiled ahead of time for sm_80 (A100) and sm_90 (H100, H200) in every configuration that their launchers
choose. cuobjdump, which comes with Triton, reads the numbers from the binary. The exit status is 1 if a kernel spills
or takes too much shared memory. Result to expect: no kernel spills.

The result has a fingerprint of the code and the compilers. tests/test_resources.py reads the committed result if its
fingerprint is still right. Otherwise the test compiles everything again.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dclr.kernels.launch import Launch

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "resources.json"

# Compute capability -> most shared memory of a program in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Usage:
    """One kernel in one configuration on one kind of GPU."""

    kernel: str
    configuration: str
    capability: int
    num_warps: int
    registers: int  # of a thread
    local: int  # bytes of a thread in local memory: spilled registers and arrays
    shared: int  # bytes of a program
    matrix_units: str  # the instruction of its products: wgmma, mma or none

    def faults(self) -> list[str]:
        """Return a line for each limit that the kernel exceeds."""
        found = [f"{self.local} bytes in local memory: registers spill"] if self.local else []
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(
                f"{self.shared} bytes of shared memory, and sm_{self.capability} has {SHARED_LIMIT[self.capability]}"
            )
        return found


def fingerprint() -> str:
    """Return a hash of the compiled code and of the versions of Triton and ptxas. Comments do not change it."""
    import triton

    sources = [ROOT / "benchmarks" / "resources.py", *sorted((ROOT / "kernels").glob("*.py"))]
    code = [ast.dump(ast.parse(path.read_text())) for path in sources]
    versions = [triton.__version__, triton.knobs.nvidia.ptxas.version]
    return hashlib.sha256("\n".join([*code, *versions]).encode()).hexdigest()


def measure(step: int = 1) -> list[Usage]:
    """Compile every kernel in every configuration, or every `step`-th of these cases, on all cores.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    from dclr.kernels.backend import INTERPRETED  # imported here, because `main` unsets TRITON_INTERPRET first

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    cases = [
        (number, capability)
        for number, (_, launch) in enumerate(launches())
        for capability in SHARED_LIMIT
        if launch.capability in (None, capability)
    ][::step]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        return list(pool.map(compile_one, *zip(*cases, strict=True)))


@functools.cache
def launches() -> list[tuple[str, "Launch"]]:
    """Return every launch with its label. The processes that compile inherit the list."""
    from dclr.kernels import convolution_triton, info_nce_triton, view_generation_triton

    modules = info_nce_triton, view_generation_triton, convolution_triton
    return [launch for module in modules for launch in module.launches_to_compile()]


def compile_one(number: int, capability: int) -> Usage:
    """Compile a launch for a compute capability."""
    label, launch = launches()[number]
    compiled = launch.compile(capability)
    registers, local = read_binary(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Usage(
        kernel=launch.kernel.__name__,
        configuration=label,
        capability=capability,
        num_warps=launch.num_warps,
        registers=registers,
        local=local,
        shared=compiled.metadata.shared,
        matrix_units="wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else "none",
    )


def read_binary(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory of a thread, from a binary with one kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local  # spills are on the stack, which is in local memory


def table(found: list[Usage]) -> str:
    """Return a row for each kernel and configuration, with the values of sm_80 / sm_90."""
    from benchmarks import harness

    both: dict[tuple[str, str], dict[int, Usage]] = {}
    for usage in found:
        both.setdefault((usage.kernel, usage.configuration), {})[usage.capability] = usage
    lines = []
    for (kernel, configuration), by_capability in both.items():
        pair = [by_capability[capability] for capability in SHARED_LIMIT]
        values = (
            [usage.registers for usage in pair],
            [usage.local for usage in pair],
            [f"{usage.shared / 1024:.0f}" for usage in pair],
            [usage.matrix_units for usage in pair],
        )
        warps = " / ".join(map(str, dict.fromkeys(usage.num_warps for usage in pair)))
        lines.append([kernel, configuration, warps, *(" / ".join(map(str, each)) for each in values)])
    columns = ["kernel", "configuration", "warps", "registers", "local bytes", "shared KiB", "products"]
    return harness.table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print only, write nothing")
    parser.add_argument("--json", type=Path, default=RESULT, help="the file to write")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)

    found = measure()
    print("sm_80 / sm_90\n\n" + table(found))
    faults = [f"{u.kernel} ({u.configuration}) on sm_{u.capability}: {fault}" for u in found for fault in u.faults()]
    print("\n" + ("\n".join(faults) or f"{len(found)} binaries: no spills, shared memory within its limits"))
    if not arguments.check:
        from dclr.report import environment

        content = {
            "question": "what does each kernel take of a GPU, compiled ahead of time?",
            "command": "python -m benchmarks.resources",
            "environment": environment(torch.device("cpu")),
            "fingerprint": fingerprint(),
            "kernels": [asdict(usage) for usage in found],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
