"""--convolutions: which convolutions run in Triton, the line at the start of a run, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dclr import kernels
from dclr.errors import UserError
from dclr.kernels.convolution import MOST_CHANNELS
from dclr.kernels.types import CONVOLUTIONS
from dclr.models import backbone_without_memory
from dclr.training import convolutions
from dclr.training.convolutions import MEASURED, resolve_convolutions

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Name the GPU, and write measurements of it and of another one."""
    file = tmp_path / "choices.json"
    spatial, temporal = {"kind": "spatial", "in": 64, "out": 144}, {"kind": "temporal", "in": 240, "out": 128}
    file.write_text(json.dumps({"NVIDIA T": [spatial, temporal], "NVIDIA S": []}))
    monkeypatch.setattr(convolutions, "MEASURED", file)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T")
    yield
    kernels.set_backend("auto")


def resolve(choice: str, device: torch.device, name: str = "r2plus1d_10", width: int = 64, bfloat16: bool = True):
    return resolve_convolutions(choice, backbone_without_memory(name, width), device, bfloat16)


def test_triton_takes_each_convolution_whose_shape_is_supported():
    names, line = resolve("triton", GPU)
    assert names == {
        *("stem.3", "layer1.0.conv1.0.0", "layer1.0.conv1.0.3", "layer1.0.conv2.0.0", "layer1.0.conv2.0.3"),
        *("layer2.0.conv2.0.0", "layer2.0.conv2.0.3"),
    }
    assert line == (
        "convolutions: Triton in stem temporal, layer1 spatial (2), layer1 temporal (2), layer2 spatial, "
        "layer2 temporal; library in the others"
    )


def test_auto_takes_those_that_were_faster_on_this_gpu(monkeypatch):
    names, line = resolve("auto", GPU)
    assert names == {"layer1.0.conv1.0.0", "layer1.0.conv2.0.0", "layer2.0.conv2.0.3"}
    assert line == "convolutions: Triton in layer1 spatial (2), layer2 temporal; library in the others"
    assert resolve("auto", GPU, "s3d") == (set(), "convolutions: library (on NVIDIA T it was faster for all of s3d)")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA S")
    assert resolve("auto", GPU)[1] == "convolutions: library (on NVIDIA S it was faster for all of r2plus1d_10)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA R")
    assert resolve("auto", GPU) == (set(), "convolutions: library (no measurements of NVIDIA R)")


def test_the_library_computes_everything_where_the_kernels_cannot():
    assert resolve("library", GPU) == (set(), "convolutions: library (--convolutions library)")
    assert resolve("auto", CPU) == (set(), "convolutions: library (the device is cpu)")
    assert resolve("auto", GPU, bfloat16=False) == (set(), "convolutions: library (the run computes in float32)")
    kernels.set_backend("reference")
    assert resolve("auto", GPU) == (set(), "convolutions: library (--kernels reference)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": CPU}, "--convolutions triton needs --kernels auto or triton and a GPU: choose auto or library "),
        ({"bfloat16": False}, "--convolutions triton needs bfloat16, but this run computes in float32: enable "),
        ({"name": "r3d_10"}, "--convolutions triton: r3d_10 with --width 64 has no convolution for the kernels, "),
        ({"name": "s3d"}, "--convolutions triton: s3d with --width 64 has no convolution for the kernels, "),
        ({"width": 1}, "--convolutions triton: r2plus1d_10 with --width 1 has no convolution for the kernels, "),
    ],
)
def test_triton_is_refused_where_it_cannot_run(settings, message):
    with pytest.raises(UserError) as refused:
        resolve("triton", **{"device": GPU, **settings})
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_triton_runs_in_its_interpreter_on_a_cpu():
    if not kernels.backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    kernels.set_backend("triton")
    assert len(resolve("triton", CPU)[0]) == 7


def test_the_committed_measurements_name_shapes_that_the_kernels_take():
    for gpu, faster in json.loads(MEASURED.read_text()).items():
        assert gpu
        for entry in faster:
            assert entry.keys() == {"kind", "in", "out"}
            assert entry["kind"] in CONVOLUTIONS
            assert entry["in"] % 16 == entry["out"] % 16 == 0
            assert max(entry["in"], entry["out"]) <= MOST_CHANNELS
