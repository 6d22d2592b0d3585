"""The choice between the Triton kernels and the library for each convolution of a backbone."""

import json
from collections import Counter
from pathlib import Path

import torch

from dclr import kernels
from dclr.errors import UserError
from dclr.kernels.backend import runs_triton
from dclr.kernels.convolution import MOST_CHANNELS, supports
from dclr.kernels.types import kind_of
from dclr.models import Backbone

MEASURED = Path(kernels.__file__).with_name("convolution_choices.json")
"""The convolutions that were faster in Triton than in the library, by the name of the GPU that was measured:
{name: [{"kind": "temporal" or "spatial", "in": channels before, "out": channels after}, ...]}. The channels include
padded ones."""


def resolve_convolutions(choice: str, backbone: Backbone, device: torch.device, bfloat16: bool) -> tuple[set[str], str]:
    """Decide which convolutions of a backbone are computed by the Triton kernels.

    Args:
        choice: --convolutions: "triton" (wherever the kernels take the shape), "library" (nowhere) or "auto" (those
            that MEASURED names for this GPU).
        bfloat16: whether the run computes in bfloat16. The kernels take nothing else.

    Returns:
        Names for `Backbone.fuse`, and one line that says what runs and why.

    Raises:
        UserError: the choice is "triton", but the device, the precision or the backbone does not allow the kernels.
    """
    if choice == "library":
        return set(), "convolutions: library (--convolutions library)"
    weights = {name: weight for name, weight in backbone.fusible().items() if supports(weight, torch.bfloat16)}
    if choice == "triton":
        _check(backbone, device, bfloat16, weights)
        return set(weights), _describe(weights)
    if device.type != "cuda" or not runs_triton(device):
        why = f"the device is {device.type}" if device.type != "cuda" else "--kernels reference"
        return set(), f"convolutions: library ({why})"
    if not bfloat16:
        return set(), "convolutions: library (the run computes in float32)"
    gpu = torch.cuda.get_device_name(device)
    measured = json.loads(MEASURED.read_text())
    if gpu not in measured:
        return set(), f"convolutions: library (no measurements of {gpu})"
    faster = {(entry["kind"], entry["in"], entry["out"]) for entry in measured[gpu]}
    weights = {name: w for name, w in weights.items() if (kind_of(w), w.shape[1], w.shape[0]) in faster}
    if not weights:
        return set(), f"convolutions: library (on {gpu} it was faster for all of {backbone.name})"
    return set(weights), _describe(weights)


def _check(backbone: Backbone, device: torch.device, bfloat16: bool, weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError if --convolutions triton cannot run."""
    if not runs_triton(device):
        raise UserError(
            "--convolutions triton needs --kernels auto or triton and a GPU: choose auto or library "
            "(for tests on a CPU, set TRITON_INTERPRET=1 and pass --kernels triton)"
        )
    if not bfloat16:
        raise UserError(
            "--convolutions triton needs bfloat16, but this run computes in float32: enable torch_autocast in the file "
            "of --ds_config, or choose auto or library"
        )
    if not weights:
        raise UserError(
            f"--convolutions triton: {backbone.name} with --width {backbone.width} has no convolution for the kernels, "
            "which take (2+1)D convolutions of stride 1 and multiples of 16 channels "
            f"up to {MOST_CHANNELS}: choose auto or library"
        )


def _describe(weights: dict[str, torch.Tensor]) -> str:
    """Return a line that counts the convolutions in Triton by stage and kind."""
    counts = Counter(f"{name.split('.')[0]} {kind_of(weight)}" for name, weight in weights.items())
    layers = ", ".join(f"{layer} ({count})" if count > 1 else layer for layer, count in counts.items())
    return f"convolutions: Triton in {layers}; library in the others"
