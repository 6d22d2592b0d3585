"""How long should each convolution kernel take on an H200, and a whole step with the kernels? It needs no GPU.

    python -m benchmarks.convolution_model     write results/convolutions_predicted.json: about 3 minutes on one core

This is a prediction, made before any run on a GPU. Every kernel of `dclr.kernels.convolution_triton` is compiled ahead
of time for sm_90, for one view of 128 clips of 16 x 112 x 112. Its time is the largest of four parts:

    arithmetic    FLOP of whole tiles, with the channels that fill up a section, at 80 % of 790 TFLOP/s
    memory        bytes of each operand read once and each result written once, at 3.9 TB/s
    L2            bytes of all tiles that the programs read, at 5.5 TB/s. This rate is an assumption
    issue         instructions of all threads, at 29.6 * 10^12 a second: 132 multiprocessors x 128 x 1.755 GHz

Instructions are those of the machine code. A loop's body counts as often as the loop runs: once for each tap, or for
each block of rows of a weight gradient. Every instruction counts one slot, a matrix product too. Not modelled: waiting
for memory or barriers, bank conflicts, the last wave of programs, and the half rate of matrix products with 16 columns.

The library's time is that of its convolution by the model of L2 traffic (benchmarks/layers.py), plus that of the passes
over memory that the kernel replaces, at 3.9 TB/s. The bytes of these passes for each row of the convolution:

    forward           4 C to normalise the input (if it is normalised), 2 C' for the output's statistics
    input gradient    4 C for the two sums of batch normalisation's gradient (if the input is normalised)
    weight gradient   none

The time of a step is the sum of all convolutions, of batch normalisation's other passes (6 bytes an element forward and
10 backward without own kernels), and of 6 ms for the views, the loss and the optimizer (measured). Residual sums are
not counted, because they are the same with every choice of kernels.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness, layers, resources, tables
from benchmarks.harness import Row
from benchmarks.layers import Convolution, Rates
from benchmarks.step_providers import Cell
from dclr.kernels.backend import INTERPRETED
from dclr.kernels.convolution_triton import (
    LAYERS,
    Settings,
    forward_launch,
    input_gradient_launch,
    sections,
    settings_for,
    weight_gradient_launch,
)
from dclr.kernels.launch import Launch
from dclr.kernels.types import CONVOLUTIONS, Normalisation
from dclr.report import environment, write_json

RESULT = harness.RESULTS / "convolutions_predicted.json"
CELL = Cell(B=128)
CAPABILITY = 90
MULTIPROCESSORS = 132
"""of an H200"""

RATES = Rates(flops=790e12, bytes=3.9e12, l2_bytes=5.5e12)
ISSUED = 29.6e12
"""Instructions of single threads for each second."""

OTHER_MS = 6.0
"""Views, loss and optimizer of a step: 4 + 1 + 1 ms, measured on an H200."""

FEW_SPILLS = 64
"""Bytes that a thread may spill to local memory. Such a kernel may still be the fastest, so it is timed."""

KERNELS = ("forward", "input gradient", "weight gradient")
LIBRARY_CHANNELS = {240: 232}
"""Channels of a kernel -> of the library, which pads those inside (2+1)D convolutions to a multiple of 8, not of 16."""
KERNEL_CHANNELS = {232: 240}
"""The inverse."""

PASSES = {"forward": "forward", "input gradient": "dgrad", "weight gradient": "wgrad"}
"""Kernel -> its name in benchmarks/layers.py."""


class Layer(NamedTuple):
    """A convolution of stride 1. `normalised`: its kernels normalise its input."""

    kind: str
    C: int
    out: int
    size: tuple[int, int, int]  # D, H, W
    normalised: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.C} -> {self.out}" + ("" if self.normalised else ", without normalisation")

    @property
    def taps(self) -> int:
        return math.prod(CONVOLUTIONS[self.kind])

    def rows(self, clips: int) -> int:
        return clips * math.prod(self.size)


def all_layers() -> list[Layer]:
    """Return the layers of r2plus1d_10 that the kernels take, spatial ones with and without normalisation.

    The first spatial convolution of a block gets clips that are normalised already.
    """
    return [
        Layer(*each, normalised)
        for each in LAYERS
        for normalised in ((True,) if each[0] == "temporal" else (True, False))
    ]


# ----------------------------------------------------------------------------------------------------- work of a kernel


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all programs of a launch do together."""

    flops: float
    bytes: float
    l2_bytes: float
    programs: int
    trips: int
    """Iterations of a program's loop."""


def work_of(kernel: str, layer: Layer, rows: int, settings: Settings) -> Work:
    """Return the work of a kernel for `rows` rows of the result."""
    if kernel == "weight gradient":
        return _weight_gradient_work(layer, rows, settings)
    K, N = (layer.C, layer.out) if kernel == "forward" else (layer.out, layer.C)
    programs = math.ceil(rows / settings.rows)
    computed = programs * settings.rows
    masked = kernel == "input gradient" and layer.normalised  # reads the input for ReLU's mask
    partials = 16 * programs * N if masked or kernel == "forward" else 0  # two float32 numbers, written and read
    return Work(
        flops=2 * computed * layer.taps * sum(sections(K)) * sum(sections(N)),
        bytes=2 * rows * (K + N + masked * N) + 2 * layer.taps * K * N + partials,
        l2_bytes=2 * layer.taps * (computed * K + programs * K * N) + 2 * masked * computed * N,
        programs=programs,
        trips=layer.taps,
    )


def _weight_gradient_work(layer: Layer, rows: int, settings: Settings) -> Work:
    K, N = layer.C, layer.out
    even, wide = (N, K) if sections(N)[1] == 0 else (K, N)
    groups, blocks = layer.taps // settings.taps, math.ceil(rows / settings.rows)
    trips = math.ceil(blocks / max(1, 2 * MULTIPROCESSORS // groups))
    splits = math.ceil(blocks / trips)
    computed = splits * trips * settings.rows
    return Work(
        flops=2 * computed * layer.taps * sum(sections(even)) * sum(sections(wide)),
        bytes=2 * rows * (K + N) + 8 * splits * layer.taps * K * N,
        l2_bytes=2 * computed * (groups * N + layer.taps * K),
        programs=splits * groups,
        trips=trips,
    )


# ----------------------------------------------------------------------------------------------------- compiled kernels


@dataclass(frozen=True, kw_only=True)
class Code:
    """The machine code of a kernel for sm_90."""

    registers: int
    local: int
    """Bytes of a thread in local memory: spilled registers."""
    shared: int
    wgmma: bool
    once: int
    """Instructions outside of the loop."""
    in_loop: int

    def faults(self) -> list[str]:
        """Return what is wrong with the kernel."""
        found = [f"{self.local} bytes in local memory: registers spill"] if self.local else []
        found += ["no wgmma"] if not self.wgmma else []
        over = self.shared > resources.SHARED_LIMIT[CAPABILITY]
        return found + ([f"{self.shared} bytes of shared memory"] if over else [])


def make_launch(kernel: str, layer: Layer, clips: int, settings: Settings) -> Launch:
    """Return a launch of a kernel, whose tensors have no memory."""

    def meta(channels: int) -> Tensor:
        shape = (clips, channels, *layer.size)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last_3d)

    x, upstream, weight = meta(layer.C), meta(layer.out), make_weight(layer)
    normalisation = Normalisation(*torch.empty((3, layer.C), device="meta")) if layer.normalised else None
    if kernel == "forward":
        return forward_launch(x, weight, normalisation, 0, 1, settings)[0]
    if kernel == "input gradient":
        return input_gradient_launch(upstream, weight, x, normalisation, settings)[0]
    return weight_gradient_launch(upstream, weight, x, normalisation, settings)[0]


def make_weight(layer: Layer) -> Tensor:
    """Return a weight that has no memory."""
    return torch.empty((layer.out, layer.C, *CONVOLUTIONS[layer.kind]), dtype=torch.bfloat16, device="meta")


def chosen_settings(kernel: str, layer: Layer) -> Settings:
    """Return the settings of a kernel on an H200."""
    return settings_for(kernel, make_weight(layer), layer.normalised, CAPABILITY)


def compile_kernel(launch: Launch) -> Code:
    """Compile a launch for sm_90, and read its machine code. Raises RuntimeError if it has more than one loop."""
    compiled = launch.compile(CAPABILITY)
    registers, local = resources.read_binary(compiled.asm["cubin"])
    once, in_loop = count_instructions(disassemble(compiled.asm["cubin"]))
    return Code(
        registers=registers,
        local=local,
        shared=compiled.metadata.shared,
        wgmma="wgmma.mma" in compiled.asm["ptx"],
        once=once,
        in_loop=in_loop,
    )


def disassemble(cubin: bytes) -> str:
    """Return the machine code of a binary as text."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(sass: str) -> tuple[int, int]:
    """Return the numbers of instructions outside and inside of the only loop, (n, 0) without a loop.

    A loop is a jump backwards. The code ends with a jump to itself, which never runs, and padding.

    Raises:
        RuntimeError: there are several loops.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass, re.MULTILINE)]
    loops = []
    for number, (at, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        target = int(jump[1], 16) if jump else at + 1
        if target == at:
            code = code[:number]
            break
        if target < at:
            loops.append(sum(target <= other <= at for other, _ in code))
    if len(loops) > 1:
        raise RuntimeError(f"the kernel has {len(loops)} loops, and the model counts one")
    in_loop = sum(loops)
    return len(code) - in_loop, in_loop


# ---------------------------------------------------------------------------------------------------------- predictions


def kernel_ms(work: Work, code: Code, settings: Settings) -> dict[str, float]:
    """Return the milliseconds of the four parts of a kernel's time."""
    issued = work.programs * 32 * settings.warps * (code.once + work.trips * code.in_loop)
    return {
        "arithmetic": work.flops / (0.8 * RATES.flops) * 1e3,
        "memory": work.bytes / RATES.bytes * 1e3,
        "L2": work.l2_bytes / RATES.l2_bytes * 1e3,
        "issue": issued / ISSUED * 1e3,
    }


def library_ms(kernel: str, layer: Layer, clips: int) -> dict[str, float]:
    """Return the milliseconds of the library's convolution, and of the passes over memory that the kernel replaces."""
    C, out = (LIBRARY_CHANNELS.get(channels, channels) for channels in (layer.C, layer.out))
    D, H, W = layer.size
    if layer.kind == "temporal":
        conv = Convolution((clips, C, D, H * W), (out, C, 3, 1), (1, 1), (1, 0))
    else:
        conv = Convolution((clips * D, C, H, W), (out, C, 3, 3), (1, 1), (1, 1))
    return {
        "convolution": layers.models(conv, RATES)["model_ms"][PASSES[kernel]],
        "passes": layer.rows(clips) * replaced_bytes(kernel, layer) / RATES.bytes * 1e3,
    }


def replaced_bytes(kernel: str, layer: Layer) -> int:
    """Return the bytes for each row of the passes over memory that a kernel replaces, as the top of the file says."""
    if kernel == "forward":
        return 4 * layer.C * layer.normalised + 2 * layer.out
    return 4 * layer.C * layer.normalised if kernel == "input gradient" else 0


def predict(case: tuple[str, Layer, Settings]) -> Row:
    """Return the prediction of one kernel for one view of 128 clips."""
    kernel, layer, settings = case
    work = work_of(kernel, layer, layer.rows(CELL.B), settings)
    row: Row = {
        "what": f"{layer}, {kernel}",
        "kernel": kernel,
        "layer": layer._asdict(),
        "settings": settings._asdict(),
        "chosen": settings == chosen_settings(kernel, layer),
        "work": asdict(work),
        "library_ms": library_ms(kernel, layer, CELL.B),
    }
    try:
        code = compile_kernel(make_launch(kernel, layer, CELL.B, settings))
    except Exception as error:  # of any kind: the compiler does not accept this setting
        return row | {"skipped": harness.reason(error)}
    parts = kernel_ms(work, code, settings)
    return row | {"code": asdict(code), "faults": code.faults(), "parts_ms": parts, "ms": max(parts.values())}


def settings_to_try(kernel: str, layer: Layer) -> list[Settings]:
    """Return the settings that are compiled, the chosen one first."""
    others = (
        [(64, 8, 2, 3), (64, 8, 2, 1), (32, 8, 2, 3), (32, 8, 2, 1), (64, 8, 3, 1), (64, 4, 2, 1), (128, 8, 2, 1)]
        if kernel == "weight gradient"
        else [(128, 8, 1), (128, 8, 2), (128, 8, 3), (256, 8, 2), (256, 8, 3), (64, 8, 1), (64, 4, 2), (64, 4, 3)]
    )
    return list(dict.fromkeys([chosen_settings(kernel, layer), *(Settings(*each) for each in others)]))


def settings_to_time(kernel: str, layer: Layer) -> list[Settings]:
    """Return the chosen settings, and up to four others that can run on an H200, the fastest by prediction.

    Layers without a prediction get two settings.
    """
    predicted = [
        row
        for row in json.loads(RESULT.read_text())["rows"]
        if row["kernel"] == kernel and layer_of(row) == layer and not row["chosen"] and "code" in row
    ]
    if not predicted:
        return settings_to_try(kernel, layer)[:2]
    able = [
        row
        for row in predicted
        if row["code"]["shared"] <= resources.SHARED_LIMIT[CAPABILITY] and row["code"]["local"] <= FEW_SPILLS
    ]
    others = [Settings(**row["settings"]) for row in sorted(able, key=lambda row: row["ms"])[:4]]
    return [chosen_settings(kernel, layer), *others]


def layer_of(row: Row) -> Layer:
    """Return the layer of a row of the results."""
    return Layer(**row["layer"] | {"size": tuple(row["layer"]["size"])})


# -------------------------------------------------------------------------------------------------------------- a step


def layers_of(conv: Convolution) -> list[Layer]:
    """Return the layers that a convolution of a step may be, none if the kernels do not take it.

    The two spatial convolutions of the first stage have the same shape. The first gets the output of a block, and the
    second gets clips to normalise. In the second stage, only the second one has stride 1.
    """
    out, C = (KERNEL_CHANNELS.get(channels, channels) for channels in conv.weight[:2])
    size = {"spatial": (3, 3), "temporal": (3, 1)}
    return [
        layer
        for layer in all_layers()
        if (layer.C, layer.out, size[layer.kind]) == (C, out, conv.weight[2:])
        and set(conv.stride) == {1}
        and (layer.normalised or C == 64)
    ]


Choice = tuple[str, int, int]
"""Kind, and channels before and after, of a convolution that own kernels compute."""


def step_ms(
    counts: dict[Convolution, tuple[int, int]], fused: Sequence[Choice], kernel: Callable[[str, Layer, int], float]
) -> float:
    """Return the milliseconds of a step.

    Args:
        counts: the convolutions of the step, from `layers.convolutions_of_step`.
        fused: the convolutions that own kernels compute.
        kernel: returns the milliseconds of a kernel, given its name, the layer and the number of rows.
    """
    total = OTHER_MS
    for conv, (forwards, backwards) in counts.items():
        out, channels = conv.weight[:2]
        rows = math.prod(conv.result) // out
        of_library = layers.models(conv, RATES)["model_ms"]
        # Bytes of the passes of batch normalisation. A kernel can also replace passes of another convolution.
        moved: dict[str, float] = {"forward": 6 * out * rows, "input gradient": 10 * out * rows, "weight gradient": 0}
        own = [layer for layer in layers_of(conv) if layer[:3] in fused]
        for name in KERNELS:
            if own:
                ms = sum(kernel(name, layer, rows) for layer in own) / len(own)
                moved[name] -= rows * sum(replaced_bytes(name, layer) for layer in own) / len(own)
            else:
                # The clips need no gradient.
                ms = 0.0 if channels == 3 and name == "input gradient" else of_library[PASSES[name]]
            count = forwards if name == "forward" else backwards
            total += count * (ms + moved[name] / RATES.bytes * 1e3)
    return total


def predict_steps(rows: Sequence[Row]) -> list[Row]:
    """Return the predicted step with the library, all own kernels, those of each convolution, and those that win."""
    codes = {(row["kernel"], layer_of(row)): Code(**row["code"]) for row in rows if row["chosen"]}

    def kernel(name: str, layer: Layer, count: int) -> float:
        settings = chosen_settings(name, layer)
        return max(kernel_ms(work_of(name, layer, count, settings), codes[name, layer], settings).values())

    counts = layers.convolutions_of_step(CELL)
    each: list[Choice] = list(dict.fromkeys(layer[:3] for layer in all_layers()))
    plans: dict[str, list[Choice]] = {"library": [], "all own kernels": each}
    plans |= {f"only {kind} {C} -> {out}": [(kind, C, out)] for kind, C, out in each}
    times = {name: step_ms(counts, fused, kernel) for name, fused in plans.items()}
    better = [fused[0] for name, fused in plans.items() if len(fused) == 1 and times[name] < times["library"]]
    times["kernels predicted to win"] = step_ms(counts, better, kernel)
    return [{"what": name, "ms": ms, "samples_per_second": CELL.B / ms * 1e3} for name, ms in times.items()]


# ----------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chosen", action="store_true", help="compile only the settings that the launchers choose")
    parser.add_argument("--json", type=Path, default=RESULT, help="the file to write")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.exit(2, "TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it\n")
    cases = [
        (kernel, layer, settings)
        for layer in all_layers()
        for kernel in KERNELS
        for settings in settings_to_try(kernel, layer)[: 1 if arguments.chosen else None]
    ]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        rows = list(pool.map(predict, cases))
    content = {
        "question": "how long should each convolution kernel and a step take on an H200, before any run?",
        "command": harness.command("convolution_model", sys.argv[1:] if argv is None else argv),
        "environment": environment(torch.device("cpu")),
        "cell": asdict(CELL),
        "rates": asdict(RATES) | {"instructions": ISSUED},
        "rows": rows,
        "steps": predict_steps(rows),
    }
    write_json(arguments.json, content)
    print("\n".join(tables.predicted_tables(content)))


if __name__ == "__main__":
    main()
