"""Every kernel in every configuration that its launcher chooses, compiled for sm_80 and sm_90: no spills, shared memory within limits."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import resources
from benchmarks.resources import RESULT, Usage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    """Compiled by a process of its own: in this one kernels are interpreted."""
    path = tmp_path_factory.mktemp("resources") / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.resources", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert path.exists(), run.stdout + run.stderr
    return [Usage(**kernel) for kernel in json.loads(path.read_text())["kernels"]]


def test_no_kernel_spills_or_takes_too_much_shared_memory(compiled: list[Usage]) -> None:
    assert len(compiled) > 100
    assert not [f"{u.kernel} ({u.configuration}) on sm_{u.capability}: {u.faults()}" for u in compiled if u.faults()]


def test_faults_are_found(compiled: list[Usage]) -> None:
    assert "8 bytes in local memory" in replace(compiled[0], local=8).faults()[0]
    assert "of shared memory, and sm_80 has" in replace(compiled[0], capability=80, shared=200 * 1024).faults()[0]
    assert not replace(compiled[0], capability=90, local=0, shared=200 * 1024).faults()


def test_products_use_the_matrix_units(compiled: list[Usage]) -> None:
    """Also in float32, as three tf32 products; wgmma takes 64 queries, mma 16. 256 numbers take more registers: float32 is multiplied
    without them, and tf32 32 queries at a time."""
    streams = [u for u in compiled if u.kernel == "_partial_kernel"]
    for usage in streams:
        if "D 256, float32" in usage.configuration:
            assert usage.matrix_units == "none", usage
        else:
            large = usage.capability == 90 and "above 16" in usage.configuration
            large &= "D 256, tf32" not in usage.configuration and "float32" not in usage.configuration
            assert usage.matrix_units == ("wgmma" if large else "mma"), usage


def test_the_committed_table_is_of_these_kernels(compiled: list[Usage]) -> None:
    committed = {(k["kernel"], k["configuration"], k["capability"]) for k in json.loads(RESULT.read_text())["kernels"]}
    assert committed == {(u.kernel, u.configuration, u.capability) for u in compiled}


def test_a_spill_in_a_binary_is_read(tmp_path: Path) -> None:
    """An array of 4000 bytes that is indexed at run time cannot be in registers."""
    knobs = pytest.importorskip("triton").knobs
    ptx = tmp_path / "spill.ptx"
    ptx.write_text(
        """.version 7.0
.target sm_80
.address_size 64
.visible .entry spill(.param .u64 out, .param .u32 at) {
    .local .align 4 .b8 array[4000];
    .reg .u64 %rd<5>; .reg .u32 %r<4>; .reg .f32 %f<2>;
    ld.param.u64 %rd1, [out]; ld.param.u32 %r1, [at];
    mov.u64 %rd2, array; mul.wide.u32 %rd3, %r1, 4; add.u64 %rd4, %rd2, %rd3;
    st.local.u32 [%rd4], %r1; ld.local.u32 %r2, [%rd2+8]; st.global.u32 [%rd1], %r2; ret;
}
"""
    )
    cubin = tmp_path / "spill.cubin"
    subprocess.run([knobs.nvidia.ptxas.path, "--gpu-name=sm_80", str(ptx), "-o", str(cubin)], check=True)
    registers, local = resources.read_binary(cubin.read_bytes())
    assert registers > 0
    assert local >= 4000
