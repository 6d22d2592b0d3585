"""No kernel spills registers or exceeds its shared memory, compiled for sm_80 and sm_90 in every configuration.

Compiling everything takes two minutes of processor time. It is skipped if the committed result belongs to this code,
this Triton and this ptxas, as its fingerprint says. Then only a part is compiled, and must be equal to the committed
result. A new result is kept between runs, in ~/.cache/dclr/tests or in the folder that DCLR_TEST_CACHE names. Remove
the folder to compile again.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import resources
from benchmarks.resources import RESULT, Usage, fingerprint
from dclr.files import atomic_write

pytestmark = pytest.mark.timeout(900)  # on a busy machine compiling takes longer than the usual limit
ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("DCLR_TEST_CACHE", Path.home() / ".cache" / "dclr" / "tests"))
COMMITTED = json.loads(RESULT.read_text())
STEP = 31
"""Every 31st kernel is compiled in any case: 17 of 512, in both capabilities, of all three files of kernels."""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that compiles kernels, because this process interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    """What each compiled kernel uses."""
    pytest.importorskip("triton")
    kept = CACHE / f"kernels-{fingerprint()}.json"
    if COMMITTED["fingerprint"] == fingerprint():
        kept = RESULT
    elif not kept.exists():
        path = tmp_path_factory.mktemp("resources") / "resources.json"
        run = run_python("-m", "benchmarks.resources", "--json", str(path))
        assert path.exists(), run.stdout + run.stderr
        CACHE.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, path.read_bytes(), kept.with_suffix(f".{os.getpid()}.tmp"))
    return [Usage(**kernel) for kernel in json.loads(kept.read_text())["kernels"]]


def test_no_kernel_spills_or_takes_too_much_shared_memory(compiled: list[Usage]) -> None:
    assert len(compiled) > 100
    assert not [f"{u.kernel} ({u.configuration}) on sm_{u.capability}: {u.faults()}" for u in compiled if u.faults()]


def test_convolutions_use_the_matrix_units_of_hopper(compiled: list[Usage]) -> None:
    kernels = ("_convolution_kernel", "_weight_gradient_kernel")
    units = {
        u.capability: [v.matrix_units for v in compiled if v.kernel in kernels and v.capability == u.capability]
        for u in compiled
    }
    assert set(units[90]) == {"wgmma"}
    assert set(units[80]) == {"mma"}
    assert len(units[90]) == 21


def test_faults_are_found(compiled: list[Usage]) -> None:
    assert "8 bytes in local memory" in replace(compiled[0], local=8).faults()[0]
    assert "of shared memory, and sm_80 has" in replace(compiled[0], capability=80, shared=200 * 1024).faults()[0]
    assert not replace(compiled[0], capability=90, local=0, shared=200 * 1024).faults()


def test_products_use_the_matrix_units(compiled: list[Usage]) -> None:
    """wgmma multiplies 64 queries at once and mma 16. Float32 uses the matrix units too, as three tf32 products.

    With D = 256 the registers are too few for that: float32 does without matrix units, and tf32 multiplies 32 queries
    at once.
    """
    streams = [u for u in compiled if u.kernel == "_loss_kernel"]
    for usage in streams:
        if "D 256, float32" in usage.configuration:
            assert usage.matrix_units == "none", usage
        else:
            large = usage.capability == 90 and "above" in usage.configuration
            large &= "D 256, tf32" not in usage.configuration and "float32" not in usage.configuration
            assert usage.matrix_units == ("wgmma" if large else "mma"), usage


def test_the_committed_table_is_of_these_kernels(compiled: list[Usage]) -> None:
    committed = {(k["kernel"], k["configuration"], k["capability"]) for k in json.loads(RESULT.read_text())["kernels"]}
    assert committed == {(u.kernel, u.configuration, u.capability) for u in compiled}


def test_a_part_compiled_now_is_equal_to_the_result(compiled: list[Usage]) -> None:
    """A committed result that somebody wrote by hand, or a compiler that changed without its version, fails here."""
    program = "import json; from dataclasses import asdict; from benchmarks import resources; "
    run = run_python("-c", program + f"print(json.dumps([asdict(usage) for usage in resources.measure({STEP})]))")
    assert run.returncode == 0, run.stderr
    again = json.loads(run.stdout)
    assert {usage["capability"] for usage in again} == {80, 90}
    assert again == [asdict(usage) for usage in compiled[::STEP]]


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "benchmarks" / "resources.py").write_text("")
    source = tmp_path / "kernels" / "a.py"
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    hashes = []
    for text in ("x = 1\n", "# a comment\n\nx = 1\n", "x = 2\n"):
        source.write_text(text)
        hashes.append(fingerprint())
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_spill_in_a_binary_is_read(tmp_path: Path) -> None:
    """An array of 4000 bytes that is indexed at run time cannot be kept in registers."""
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
