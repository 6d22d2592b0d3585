"""Are the convolution kernels right, and are they faster than the library? Three parts of `make gpu-layers`.

    python -m benchmarks.convolutions check      each convolution with its gradients on random values, against float64,
                                                 also where tensors have more than 2^31 elements
    python -m benchmarks.convolutions kernels    each kernel with several settings, in turns with the library
    python -m benchmarks.convolutions step       a whole step with the library, with all kernels, and with those of each
                                                 convolution alone, in turns. Proposes which kernels to switch on

The convolutions are those of r2plus1d_10 that `dclr.kernels.convolution_triton` takes, for one view of 128 clips of
16 x 112 x 112. "library" is what a kernel replaces: the convolution of cuDNN, and the passes of batch normalisation
with ReLU as torch.compile makes them (see benchmarks/convolution_model.py). For an input gradient, neither side
includes the last pass of batch normalisation's gradient.

A kernel wins if the 80 % quantile of its times is below the 20 % quantile of the library's. The kernels of a
convolution win in a step if the median gain over the library is larger than the difference between the largest and the
smallest gain of a round. `step` writes the winners to convolution_choices.json in results/DEVICE. They are only
switched on if the entry is copied to kernels/convolution_choices.json.

Writes layers-convolution-PART.json into results/DEVICE after each row, so a killed program keeps what it has measured.
Without a GPU it runs tiny sizes, to test the program: its times mean nothing. With TRITON_INTERPRET=1, `check` and
`kernels` run the kernels in Triton's interpreter. Without it, `check` runs plain torch, and `kernels` skips them.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import convolution_model, harness, layers
from benchmarks.convolution_model import CAPABILITY, KERNELS, Choice, Layer, make_launch, settings_to_time
from benchmarks.harness import Call, NotAvailable, Row
from dclr.errors import UserError
from dclr.kernels import Normalisation, convolve, set_backend
from dclr.kernels.backend import INTERPRETED, runs_triton
from dclr.kernels.convolution import supports
from dclr.kernels.convolution_triton import (
    Settings,
    forward_launch,
    input_gradient_launch,
    merge,
    weight_gradient,
    weight_gradient_launch,
)
from dclr.kernels.types import CONVOLUTIONS, kind_of
from dclr.models.batch_norm import batch_statistics
from dclr.models.clips import Clips
from dclr.report import write_json

CLIPS = {"cuda": 128, "cpu": 1}
REPETITIONS = {"cuda": 15, "cpu": 1}
LARGE = {"cuda": 2**31, "cpu": 5000}
"""Tensors of the second check have more elements than this."""

TINY = (
    Layer("temporal", 32, 16, (3, 3, 5), True),
    Layer("spatial", 16, 48, (2, 3, 5), True),
    Layer("spatial", 16, 48, (2, 3, 5), False),
)
"""Layers for a machine without a GPU."""

TOLERANCE = 2.0**-7
"""Greatest allowed error, relative to the greatest value. Rounding a result to bfloat16 has an error of up to 2^-8."""

DIFFERENCE = 0.02
"""Greatest allowed difference from the library's results, relative to their norm. Both round to bfloat16."""

CHECKED = 2
"""Clips that are compared with float64: the last ones."""

ROUNDS = {"cuda": 8, "cpu": 2}
STEPS = {"cuda": 3, "cpu": 1}
"""Rounds of two variants of a step, and the steps of a variant in a round."""

COMPILED_VERSIONS = 256
"""Compiled versions of a function that torch.compile may keep."""


def layers_on(device: torch.device) -> Sequence[Layer]:
    """Return the layers to measure, those of r2plus1d_10 with the largest predicted gain first."""
    if device.type != "cuda":
        return TINY
    wanted = [layer for layer in convolution_model.all_layers() if layer.normalised or layer.C == 64]
    gain = {("spatial", 64): 0, ("temporal", 144): 1, ("temporal", 48): 2}
    return sorted(wanted, key=lambda layer: gain.get(layer[:2], 3))


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random values of a layer, which differ from run to run."""

    x: Tensor  # (B, C, D, H, W) bfloat16 in channels_last_3d memory
    weight: Tensor  # (C', C, ...) bfloat16
    normalisation: Normalisation | None
    upstream: Tensor  # (B, C', D, H, W) bfloat16

    @property
    def given(self) -> list[Tensor]:
        return [self.x, self.weight, *(self.normalisation or ())]


def make_inputs(layer: Layer, clips: int, device: torch.device) -> Inputs:
    """Return random inputs. The scales are powers of two.

    So a fused multiplication and addition rounds like two operations, and ReLU masks the same values everywhere.
    """

    def randn(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last_3d)
        return made.normal_()

    C = layer.C
    weight = randn(layer.out, C, *CONVOLUTIONS[layer.kind]).contiguous() / (C * layer.taps) ** 0.5
    normalisation = None
    if layer.normalised:
        scale = 2.0 ** torch.randint(-1, 2, (C,), device=device)
        normalisation = Normalisation(torch.randn(C, device=device), scale, torch.rand(C, device=device))
    return Inputs(
        x=randn(clips, C, *layer.size),
        weight=weight,
        normalisation=normalisation,
        upstream=randn(clips, layer.out, *layer.size),
    )


def normalised(x: Tensor, normalisation: Normalisation | None) -> Tensor:
    """Return relu((x - mean) * scale + shift), rounded to bfloat16."""
    if normalisation is None:
        return x
    mean, scale, shift = (values.view(-1, 1, 1, 1) for values in normalisation)
    return F.relu((x.float() - mean) * scale + shift).to(x.dtype)


def as_images(clips: Tensor, layer: Layer) -> Tensor:
    """Return clips as images, without a copy. An image is a frame, or it has time as height and pixels as width."""
    return clips.transpose(1, 2).flatten(0, 1) if layer.kind == "spatial" else clips.flatten(3)


def as_clips(images: Tensor, layer: Layer) -> Tensor:
    """Undo `as_images`."""
    D, H, W = layer.size
    return images.unflatten(0, (-1, D)).transpose(1, 2) if layer.kind == "spatial" else images.unflatten(3, (H, W))


def image_weight(weight: Tensor, layer: Layer) -> Tensor:
    """Return the weight (C', C, 3, 3) or (C', C, 3, 1) for images."""
    squeezed = weight.squeeze(2) if layer.kind == "spatial" else weight.squeeze(4)
    return squeezed.contiguous(memory_format=torch.channels_last)


def padding(layer: Layer) -> list[int]:
    return [1, 1] if layer.kind == "spatial" else [1, 0]


def gradients(upstream: Tensor, z: Tensor, weight: Tensor, layer: Layer, mask: list[bool]) -> list[Tensor | None]:
    """Return the library's gradients of z (B, C, D, H, W) and of the weight (C', C, ...), those that `mask` wants."""
    images = (as_images(upstream, layer), as_images(z, layer), image_weight(weight, layer))
    of_z, of_weight, _ = torch.ops.aten.convolution_backward(
        *images, None, [1, 1], padding(layer), [1, 1], False, [0, 0], 1, [*mask, False]
    )
    return [
        as_clips(of_z, layer) if mask[0] else None,
        of_weight.contiguous().view(weight.shape) if mask[1] else None,
    ]


# ---------------------------------------------------------------------------------------------------------------- check

NAMES = ("y", "mean", "variance", "gradient of x", "of the weight", "of the mean", "of the scale", "of the shift")


def check_layer(layer: Layer, clips: int, device: torch.device) -> Row:
    """Return the errors of a convolution and its gradients, relative to the greatest value of each.

    The upstream gradient is 0 except in the last CHECKED clips, so these alone determine the gradients of the
    parameters. Frame 0 stands for three equal frames, and its values are twice as large. So wrong shares of the frames
    give wrong statistics.
    """
    given = make_inputs(layer, clips, device)
    given.x[:, :, 0] *= 2
    given.upstream[:-CHECKED] = 0
    leaves = [tensor.requires_grad_() for tensor in given.given]
    y, mean, variance = convolve(given.x, given.weight, given.normalisation, repeated=0, times=3)
    found = torch.autograd.grad(y, leaves, given.upstream)
    elements = max(y.numel(), given.x.numel())
    with torch.no_grad():
        outside = found[0][:-CHECKED]
        others = float(outside.abs().max()) if len(outside) else 0.0  # must be 0, as the upstream gradient is
        results = [y[-CHECKED:], mean, variance, found[0][-CHECKED:], *found[1:]]
        errors = {
            name: float((result.double() - truth).abs().max() / truth.abs().max())
            for name, result, truth in zip(NAMES, results, truths(layer, given, y), strict=False)
        }
    return {"elements": elements, "errors": errors | {"gradient of x, other clips": others}}


def truths(layer: Layer, given: Inputs, y: Tensor) -> list[Tensor]:
    """Return the float64 values of NAMES for the last CHECKED clips. The statistics are those of all clips."""
    x, upstream = given.x[-CHECKED:], given.upstream[-CHECKED:].double()
    z, weight = normalised(x, given.normalisation).double(), given.weight.double()
    images = F.conv2d(as_images(z, layer), image_weight(weight, layer), padding=tuple(padding(layer)))
    of_z, of_weight = gradients(upstream, z, weight, layer, [True, True])
    assert of_z is not None
    assert of_weight is not None
    true = [as_clips(images, layer), *float64_statistics(y, times=3)]
    if given.normalisation is None:
        return [*true, of_z, of_weight]
    mean, scale = (values.double().view(-1, 1, 1, 1) for values in given.normalisation[:2])
    centred = x.double() - mean
    g = torch.where(z > 0, of_z, 0.0)
    sums = [values.sum((0, 2, 3, 4)) for values in (-g * scale, g * centred, g)]
    return [*true, g * scale, of_weight, *sums]


def float64_statistics(y: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel in float64. Frame 0 stands for `times` frames."""
    share = torch.ones(y.shape[2], dtype=torch.float64, device=y.device)
    share[0] = times
    share = share / share.sum() / len(y)
    chunks = y.split(8)
    mean = torch.stack([(chunk.double().mean((3, 4)) * share).sum((0, 2)) for chunk in chunks]).sum(0)
    centre = mean.view(-1, 1, 1, 1)
    squares = [((chunk.double() - centre).square().mean((3, 4)) * share).sum((0, 2)) for chunk in chunks]
    return mean, torch.stack(squares).sum(0)


def measure_check(device: torch.device, record: layers.Record) -> None:
    """Check each layer twice: with few clips, and with more than 2^31 elements."""
    wrong = []
    for layer in layers_on(device):
        for clips in (CHECKED, LARGE[device.type] // (max(layer.C, layer.out) * layer.rows(1)) + 1):
            row: Row = {
                "what": f"{layer}, {clips} clips",
                "implementation": "triton" if runs_triton(device) else "torch",
            }
            try:
                row |= check_layer(layer, clips, device)
                row["greatest_error"] = max(row["errors"].values())
                row["right"] = row["greatest_error"] <= TOLERANCE
            except RuntimeError as error:  # such as too little memory: the other layers are still worth checking
                row |= {"right": False, "skipped": harness.reason(error)}
            if not row["right"]:
                wrong.append(row["what"])
            record.add(row)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if wrong:
        raise ArithmeticError(f"wrong: {'; '.join(wrong)}")


# -------------------------------------------------------------------------------------------------------------- kernels


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return the function compiled by Inductor. On a CPU it is only traced, which takes less time."""
    return torch.compile(function, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")


def library_call(kernel: str, layer: Layer, given: Inputs, device: torch.device) -> Call:
    """Return the library's call that a kernel replaces. It returns a list of tensors."""
    x, weight, normalisation, upstream = given.x, given.weight, given.normalisation, given.upstream

    def forward() -> list[Tensor]:
        z = as_images(normalised(x, normalisation), layer)
        y = as_clips(F.conv2d(z, image_weight(weight, layer), padding=tuple(padding(layer))), layer)
        return [y, *batch_statistics([Clips(y)])]

    def input_gradient() -> list[Tensor]:
        of_z, _ = gradients(upstream, x, weight, layer, [True, False])  # the values of z do not matter
        assert of_z is not None
        if normalisation is None:
            return [of_z]
        mean, scale, shift = (values.view(-1, 1, 1, 1) for values in normalisation)
        centred = x.float() - mean
        g = torch.where(centred * scale + shift > 0, of_z.float(), 0.0)
        return [of_z, g.sum((0, 2, 3, 4)), (g * centred).sum((0, 2, 3, 4))]

    if kernel == "weight gradient":
        z = normalised(x, normalisation)
        return lambda: gradients(upstream, z, weight, layer, [False, True])[1:]
    return compiled(forward if kernel == "forward" else input_gradient, device)


def kernel_call(kernel: str, given: Inputs, settings: Settings) -> Call:
    """Return the call of a kernel with what belongs to it: merging or adding the results of its programs."""
    x, weight, normalisation, upstream = given.x, given.weight, given.normalisation, given.upstream

    def forward() -> list[Tensor]:
        launch, y, partials = forward_launch(x, weight, normalisation, 0, 1, settings)
        launch()
        return [y, *merge(partials)]

    def input_gradient() -> list[Tensor]:
        launch, gradient, partials = input_gradient_launch(upstream, weight, x, normalisation, settings)
        launch()
        if normalisation is None:
            return [gradient]
        sums = (values.sum(0, dtype=torch.float64).float() for values in (partials.first, partials.second))
        return [gradient, *sums]

    def of_weight() -> list[Tensor]:
        launch, partial = weight_gradient_launch(upstream, weight, x, normalisation, settings)
        launch()
        return [weight_gradient(partial, weight)]

    return {"forward": forward, "input gradient": input_gradient, "weight gradient": of_weight}[kernel]


def expected(kernel: str, given: Inputs, found: list[Tensor]) -> list[Tensor]:
    """Return what a kernel should return, from the library's results, which lack the mask of ReLU and the scale."""
    if kernel != "input gradient" or given.normalisation is None:
        return found
    scale = given.normalisation.scale.view(-1, 1, 1, 1)
    return [torch.where(normalised(given.x, given.normalisation) > 0, found[0], 0) * scale, *found[1:]]


def name_of(settings: Settings) -> str:
    """Return the name of settings in results and tables."""
    return ", ".join(f"{value} {name}" for name, value in settings._asdict().items())


def time_kernel(kernel: str, layer: Layer, given: Inputs, device: torch.device) -> Row:
    """Return the times of a kernel with several settings and of the library, taken in turns.

    `difference` is the greatest difference from the library's results, relative to their norm.
    """
    settings = {name_of(each): each for each in settings_to_time(kernel, layer)}
    of_library = library_call(kernel, layer, given, device)
    truth = expected(kernel, given, of_library())

    def prepare(name: str) -> tuple[Call, Row]:
        if name == "library":
            return of_library, {}
        if not runs_triton(device):
            raise NotAvailable("kernels need a GPU or Triton's interpreter")
        call = kernel_call(kernel, given, settings[name])
        pairs = list(zip(call(), truth, strict=True))
        difference = max(float((a.double() - b).norm() / b.double().norm()) for a, b in pairs)
        return call, {"difference": difference, "wrong": not difference < DIFFERENCE}

    names = ["library", *settings]
    found = harness.check_and_time(names, prepare, device, REPETITIONS[device.type], warmup=2)
    row: Row = {"what": f"{layer}, {kernel}", "kernel": kernel, "layer": layer._asdict(), "providers": found}
    timed = {name: found[name] for name in settings if "median_ms" in found[name] and not found[name]["wrong"]}
    if timed and "median_ms" in found["library"]:
        best = min(timed, key=lambda name: timed[name]["median_ms"])
        row |= {"library_ms": found["library"]["median_ms"], "best": best, "best_ms": timed[best]["median_ms"]}
        row["speedup"] = row["library_ms"] / max(row["best_ms"], 1e-9)
        row["wins"] = timed[best]["high_ms"] < found["library"]["low_ms"]
    return row


def compile_ahead(kernels: Sequence[tuple[str, Layer]], device: torch.device) -> None:
    """Compile all kernels on all cores. Triton finds them in its cache when they are launched."""
    if device.type != "cuda":
        return
    cases = [(kernel, layer, settings) for kernel, layer in kernels for settings in settings_to_time(kernel, layer)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        done = sum(pool.map(compiles, cases))
    print(f"{done} of {len(cases)} kernels compile", flush=True)


def compiles(case: tuple[str, Layer, Settings]) -> bool:
    """Compile a kernel. Return whether the compiler accepts it."""
    kernel, layer, settings = case
    try:
        make_launch(kernel, layer, CLIPS["cuda"], settings).compile(CAPABILITY)
    except Exception:  # the launch will report the reason
        return False
    return True


def measure_kernels(device: torch.device, record: layers.Record) -> None:
    """Time each kernel of each layer."""
    cases = [(kernel, layer) for layer in layers_on(device) for kernel in KERNELS]
    compile_ahead(cases, device)
    failed = []
    for kernel, layer in cases:
        if device.type == "cuda":
            torch.compiler.reset()
        given = make_inputs(layer, CLIPS[device.type], device)
        with torch.no_grad():
            row = time_kernel(kernel, layer, given, device)
        record.add(row)
        for name, found in row["providers"].items():
            print(f"    {name}: {harness.spread(found)}", flush=True)
        failed += [f"{row['what']}, {name}" for name in row["providers"] if row["providers"][name].get("wrong")]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the graphs' pools
    if failed:
        raise ArithmeticError(f"wrong: {'; '.join(failed)}")


# ----------------------------------------------------------------------------------------------------------------- step


def measure_step(device: torch.device, record: layers.Record) -> None:
    """Time a step with each choice of kernels, in turns with the library, and write the proposal."""
    # All networks share the code of their class, and torch.compile keeps 8 versions of a function by default.
    torch._dynamo.config.recompile_limit = COMPILED_VERSIONS
    torch._dynamo.config.accumulated_recompile_limit = COMPILED_VERSIONS
    cell = layers.CELLS[device.type]
    library = layers.PlainStep(cell, device)
    weights = library.network.query.backbone.fusible().values()
    taken = [weight for weight in weights if device.type == "cpu" or supports(weight, torch.bfloat16)]
    each: list[Choice] = list(dict.fromkeys((kind_of(weight), *weight.shape[1::-1]) for weight in taken))
    each = each[: None if device.type == "cuda" else 2]
    winners: list[Choice] = []
    plans = [("all own kernels", each), *((f"only {kind} {C} -> {out}", [(kind, C, out)]) for kind, C, out in each)]
    for name, fused in plans:
        row = time_step(name, fused, library, device, cell)
        record.add(row)
        layers.release(device)
        if row.get("wins") and len(fused) == 1:
            winners += fused
    if len(winners) > 1 and winners != each:
        record.add(time_step("winners", winners, library, device, cell))
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    proposal = {named: [{"kind": kind, "in": C, "out": out} for kind, C, out in winners]}
    record.set(proposal=proposal)
    write_json(record.path.parent / "convolution_choices.json", proposal)
    print(f"proposal: {proposal}")


def time_step(name: str, fused: Sequence[Choice], library: Call, device: torch.device, cell: layers.Cell) -> Row:
    """Return the times of a step with own kernels, in turns with the library's step."""
    row: Row = {"what": name, "fused": [list(choice) for choice in fused]}
    try:
        own = layers.PlainStep(cell, device, fused)
        for call in (library, own):
            harness.time_consecutive(call, device, 2)
        calls: dict[str, Call] = {"library": library, "own": own}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for turn in harness.turns(list(calls), ROUNDS[device.type]):
            samples[turn].append(statistics.median(harness.time_consecutive(calls[turn], device, STEPS[device.type])))
    except RuntimeError as error:  # such as the compiler's: the other variants are still worth measuring
        return row | {"skipped": harness.reason(error)}
    gains = [theirs - ours for theirs, ours in zip(samples["library"], samples["own"], strict=True)]
    gain, ms = statistics.median(gains), statistics.median(samples["own"])
    return row | {
        "median_ms": ms,
        "library_ms": statistics.median(samples["library"]),
        "gain_ms": gain,
        "wins": gain > max(gains) - min(gains),
        "samples_per_second": cell.B / ms * 1e3,
        "ms_by_round": samples,
    }


# ----------------------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[torch.device, layers.Record], None]] = {
    "check": measure_check,
    "kernels": measure_kernels,
    "step": measure_step,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder that holds one folder a device")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and INTERPRETED and arguments.part != "step":
        set_backend("triton")
    record = layers.Record(f"convolution-{arguments.part}", device, arguments.results)
    try:
        PARTS[arguments.part](device, record)
        record.set(finished=True)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(f"Wrote {record.path}")


if __name__ == "__main__":
    main()
