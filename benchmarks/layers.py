"""What do the layers of a training step cost, compared with the least that the device's ceilings allow?

    python -m benchmarks.layers ceilings        copy, memcpy, read and write rate, L2 read rate, matrix products
    python -m benchmarks.layers step            a whole step at 128 and 64 clips
    python -m benchmarks.layers profile         time by kernel name in one step
    python -m benchmarks.layers convolutions    each convolution of a step: forward, gradient of the input (dgrad) and
                                                of the weights (wgrad), next to its roofline and a model of L2 traffic
    python -m benchmarks.layers stem            the first convolution: 7 x 7 of stride 2, and 4 x 4 on 2 x 2 blocks
    python -m benchmarks.layers equal-frames    the static view given as one frame, and as all its equal frames
    python -m benchmarks.layers step --search   any of these with cuDNN's exhaustive search (cudnn.benchmark)

`make gpu-layers` runs all of them. On an H200 each should take 10 to 120 seconds, most of it torch.compile (predicted;
no GPU has run this yet). Without a GPU it runs a tiny network, to test the program: its times mean nothing.

The steps and the convolutions are those of r2plus1d_10 at 16 x 112 x 112 in bfloat16 and channels_last memory. `step`
and `profile` time a plain step that needs no DeepSpeed: autocast, compiled backbones and torch's SGD. `step` also times
"ours" of benchmarks/step.py if DeepSpeed is installed.

The roofline of a convolution is the larger of two times: its FLOP at the rate of a matrix product, and its bytes
(operands read once, result written once) at the rate of a copy. The L2 model takes, for the best of eight tile sizes,
the largest of three times: FLOP of whole tiles at 80 % of the product's rate, bytes at the copy's rate, and bytes of
all tiles' operands at the L2 read rate. docs/LOG.md compares this model with the first run on an H200.

Prints one line a row and writes layers-NAME.json into results/DEVICE after each row, so a killed program keeps what it
has measured. --save-as NAME changes the name.
"""

import argparse
import gc
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness, l2_read
from benchmarks.harness import Call, Row
from benchmarks.step_providers import Cell, configure, make_inputs, make_network, sgd
from dclr.errors import UserError
from dclr.kernels import generate_views
from dclr.kernels.space_to_depth import space_to_depth
from dclr.kernels.types import kind_of
from dclr.models import Backbone, build_backbone
from dclr.report import environment, write_json

CELLS = {"cuda": Cell(B=128), "cpu": Cell(B=2, T=8, side=32, H=48, W=64, width=4)}
BATCH_SIZES = {"cuda": (128, 64), "cpu": (2, 1)}
TIMED_STEPS = {"cuda": 12, "cpu": 1}
REPETITIONS = {"cuda": 10, "cpu": 1}
PROFILED_SHAPES = {"cuda": 20, "cpu": 1}
"""Number of convolutions, those with the most work, whose kernels are recorded by name. A profile takes time."""


class Record:
    """The results file of one measurement, which is rewritten at every change."""

    def __init__(self, name: str, device: torch.device, results: Path) -> None:
        self.path = harness.results_folder(device, results) / f"layers-{name}.json"
        self.began_s = time.monotonic()
        self.content: Row = {
            "question": "what does a layer cost, next to the least that the device allows?",
            "environment": environment(device),
            "settings": {
                "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
                "cudnn_benchmark": torch.backends.cudnn.benchmark,
                "cudnn_benchmark_limit": torch.backends.cudnn.benchmark_limit if device.type == "cuda" else None,
                HEURISTIC_B: os.environ.get(HEURISTIC_B),
            },
            "rows": [],
        }

    def set(self, **entries: Any) -> None:
        """Set entries of the file."""
        self.content |= entries
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content | {"seconds": round(time.monotonic() - self.began_s, 1)})

    def add(self, row: Row) -> None:
        """Add a row and print it."""
        shown = {name: value for name, value in row.items() if not isinstance(value, list | tuple | dict)}
        print(", ".join(f"{name} {_short(value)}" for name, value in shown.items() if value is not None), flush=True)
        self.set(rows=[*self.content["rows"], row])


HEURISTIC_B = "TORCH_CUDNN_USE_HEURISTIC_MODE_B"
"""Environment variable: cuDNN chooses algorithms by its second heuristic. torch reads it once for each process."""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The ceilings of a device, per second."""

    flops: float
    bytes: float
    l2_bytes: float


ASSUMED = Rates(flops=790e12, bytes=4.3e12, l2_bytes=5.5e12)
"""An H200's ceilings, used without a GPU. The L2 rate is an assumption."""


def measure_rates(device: torch.device) -> Rates:
    """Measure the ceilings that the models need."""
    ceilings = harness.measure_ceilings(device)
    if ceilings is None:
        return ASSUMED
    return Rates(
        flops=ceilings.flops_per_second["bf16"],
        bytes=ceilings.bytes_per_second,
        l2_bytes=l2_read.measure_read_rate(device),
    )


def measure_ceilings(device: torch.device, record: Record, arguments: argparse.Namespace) -> None:
    """Measure copies, reads and writes by kernels, copies by the driver, reads from L2 and matrix products."""
    ceilings = harness.measure_ceilings(device)
    record.set(ceilings=None if ceilings is None else asdict(ceilings))
    # Without a GPU the calls are tried at a small size.
    source = torch.randn(harness.COPIED_FLOATS if device.type == "cuda" else 1000, device=device)
    target, narrow = torch.empty_like(source), source.bfloat16()
    narrow_target, moved = torch.empty_like(narrow), source.nbytes
    calls: dict[str, tuple[int, Call]] = {
        "copy by a kernel, float32": (2 * moved, lambda: torch.mul(source, 1.5, out=target)),
        "copy by a kernel, bfloat16": (moved, lambda: torch.mul(narrow, 1.5, out=narrow_target)),
        "memcpy": (2 * moved, lambda: target.copy_(source)),
        "read (sum)": (moved, lambda: source.sum()),
        "write (fill)": (moved, lambda: target.fill_(1.5)),
    }
    times = harness.time_in_turns({name: call for name, (_, call) in calls.items()}, device, REPETITIONS[device.type])
    for name, (size, _) in calls.items():
        found = times[name]
        record.add({"what": name, "bytes_per_second": size / found["median_ms"] * 1e3, **found})
    harness.time_consecutive(calls["memcpy"][1], device, 3)
    outside = harness.quantiles(harness.time_consecutive(calls["memcpy"][1], device, REPETITIONS[device.type]))
    rate = 2 * moved / outside["median"] * 1e3
    record.add({"what": "memcpy, not in a CUDA graph", "bytes_per_second": rate, "median_ms": outside["median"]})
    if device.type != "cuda":
        return
    for mebibytes in (8, 16, 32):
        rate = l2_read.measure_read_rate(device, mebibytes)
        record.add({"what": f"L2 read, {mebibytes} MiB", "bytes_per_second": rate})


# ----------------------------------------------------------------------------------------------------------------- step


class PlainStep:
    """The step of `train.py pretrain` without DeepSpeed: autocast on a GPU, compiled backbones, torch's SGD.

    Args:
        fused: kind, and channels before and after, of the convolutions that own kernels compute.
    """

    def __init__(self, cell: Cell, device: torch.device, fused: Collection[tuple[str, int, int]] = ()) -> None:
        self.inputs, self.device, self.network = make_inputs(cell, device), device, make_network(cell)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for backbone in (self.network.query.backbone, self.network.key.backbone):
            weights = {name: (kind_of(weight), *weight.shape[1::-1]) for name, weight in backbone.fusible().items()}
            backbone.fuse([name for name, choice in weights.items() if choice in fused])
        configure(self.network, device)
        self.network.to(device).train()
        self.network.enqueued.fill_(self.network.method.queue_length)  # so queue entries are mined
        self.optimizer = sgd(self.network.query)

    def __call__(self) -> None:
        query, key = (
            generate_views(clips.planes, clips.stills, clips.params, dtype=self.dtype) for clips in self.inputs
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            loss = self.network(query, key, 0).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.network.update_key()


def measure_step(device: torch.device, record: Record, arguments: argparse.Namespace) -> None:
    """Time whole steps: "ours" of benchmarks/step.py if DeepSpeed is installed, and the plain step."""
    deepspeed = find_spec("deepspeed") is not None
    if not deepspeed:
        record.set(ours="skipped: DeepSpeed is not installed")
    for B in BATCH_SIZES[device.type][: 1 if arguments.plain else None]:
        cell = Cell(**asdict(CELLS[device.type]) | {"B": B})
        if deepspeed and not arguments.plain:
            record.add(time_ours(cell, device))
            release(device)
        record.add(time_plain_step(cell, device))
        release(device)


def time_ours(cell: Cell, device: torch.device) -> Row:
    """Return the times and the check of "ours" in benchmarks/step.py."""
    # Imported late, because only this function needs step.py and the engine.
    from benchmarks import step
    from dclr.training import engine

    engine.start_processes()
    measured = step.measure(cell, ["ours"], device, 2, TIMED_STEPS[device.type] // 2 or 1, None)
    return {
        "what": str(cell),
        "provider": "ours",
        "B": cell.B,
        "unchecked": measured["unchecked"],
        **measured["providers"]["ours"],
    }


def time_plain_step(cell: Cell, device: torch.device) -> Row:
    """Return the times of the plain step and its peak memory."""
    torch.compiler.reset()
    began_s = time.perf_counter()
    step = PlainStep(cell, device)
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first_s = time.perf_counter() - began_s
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = harness.milliseconds(harness.time_consecutive(step, device, TIMED_STEPS[device.type]))
    return {
        "what": str(cell),
        "provider": "without DeepSpeed",
        "B": cell.B,
        **times,
        "samples_per_second": cell.B / times["median_ms"] * 1e3,
        "first_step_s": first_s,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def release(device: torch.device) -> None:
    """Free the memory of a step, whose modules refer to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


GROUPS = {
    "Triton and Inductor": ("triton_",),
    "convolutions and matrix products": (
        "conv",
        "cudnn",
        "xmma",
        "cutlass",
        "gemm",
        "wgrad",
        "dgrad",
        "fprop",
        "nvjet",
    ),
    "memory": ("memcpy", "memset", "copy", "fill"),
}
"""Part of a kernel's name, in lower case -> the kernel's group. Inductor's kernels begin with triton_."""


def group_of(kernel: str) -> str:
    """Return the group of a kernel by its name: the first of GROUPS that fits, or "other"."""
    return next((group for group, parts in GROUPS.items() if any(part in kernel.lower() for part in parts)), "other")


def kernel_times(call: Call, device: torch.device) -> list[Row]:
    """Return name, milliseconds and number of launches of each kernel of one call, the slowest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        {
            "kernel": event.key[:200],
            "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3,
            "count": event.count,
        }
        for event in profiler.key_averages()
        if event.device_type == wanted
    ]
    return sorted(found, key=lambda row: -row["ms"])


def measure_profile(device: torch.device, record: Record, arguments: argparse.Namespace) -> None:
    """Profile one step after three others."""
    cell = CELLS[device.type]
    step = PlainStep(cell, device)
    for _ in range(3):
        step()
    times = harness.milliseconds(harness.time_consecutive(step, device, TIMED_STEPS[device.type] // 2 or 1))
    kernels = kernel_times(step, device)
    busy, groups = sum(row["ms"] for row in kernels), Counter[str]()
    for row in kernels:
        groups[group_of(row["kernel"])] += row["ms"]
    record.set(cell=asdict(cell), step=times, ms_of_kernels=busy, ms_by_group=dict(groups), kernels=len(kernels))
    print(f"a step {times['median_ms']:.1f} ms; kernels {busy:.1f} ms: {dict(groups)}")
    for row in kernels[:80]:
        record.add(row)


# --------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Convolution:
    """The shapes of a convolution. x: (N, C, ...), weight: (C', C, ...)."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def result(self) -> tuple[int, ...]:
        sizes = zip(self.x[2:], self.weight[2:], self.stride, self.padding, strict=True)
        return (self.x[0], self.weight[0], *((size + 2 * pad - k) // step + 1 for size, k, step, pad in sizes))

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.result) * math.prod(self.weight[1:])

    @property
    def bytes(self) -> int:
        """Bytes of both operands and of the result in bfloat16."""
        return 2 * (math.prod(self.x) + math.prod(self.weight) + math.prod(self.result))

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.weight[2:]))
        stride = "" if set(self.stride) == {1} else f" /{','.join(map(str, self.stride))}"
        return f"{self.weight[1]} > {self.weight[0]} {sizes}{stride}, input {' x '.join(map(str, self.x))}"


class _Watch(TorchDispatchMode):
    """Records the convolutions that run inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Convolution] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, *_ = args
            dims = x.dim() - 2
            wide = (tuple(map(int, (*value, *value)[:dims])) for value in (stride, padding))
            self.found.append(Convolution(tuple(x.shape), tuple(weight.shape), *wide))
        return func(*args, **(kwargs or {}))


def convolutions_of(backbone: Backbone, views: str, cell: Cell) -> Counter[Convolution]:
    """Return the convolutions of a forward pass of some views ("vsd"), computed on torch's device "meta"."""
    frames = {letter: 1 if letter == "s" else cell.T for letter in views}
    with torch.device("meta"), torch.no_grad(), _Watch() as watch:
        given = [torch.empty(cell.B, 3, frames[letter], cell.side, cell.side) for letter in views]
        backbone.forward_views(given, cell.T, differences="d" in views)
    return Counter(watch.found)


def convolutions_of_step(cell: Cell) -> dict[Convolution, tuple[int, int]]:
    """Return convolution -> (forward passes, backward passes) of one step.

    The query encoder passes three views forward and backward. The key encoder passes two views of the query clips and
    three of the key clips forward.
    """
    with torch.device("meta"):
        backbone = build_backbone(cell.backbone, cell.width).eval()  # the convolutions are those of training
    backbone.pad_channels(8)
    query, look, keys = (convolutions_of(backbone, views, cell) for views in ("vsd", "sd", "vsd"))
    forward = query + look + keys
    return {conv: (count, query[conv]) for conv, count in forward.items()}


TILES = ((128, 128), (256, 128), (128, 256), (128, 64), (256, 64), (64, 64), (64, 128), (64, 256))
K_TILE = 64


def gemm_ms(M: int, N: int, K: int, taps: int, moved: int, rates: Rates) -> float:
    """Return the milliseconds of a matrix product (M, K) x (K, N) by the model of L2 traffic.

    taps: number of equal sections of K, each padded to a multiple of the tile. moved: bytes of operands and result.
    """
    depth = taps * math.ceil(K / taps / K_TILE) * K_TILE
    best = math.inf
    for rows, columns in TILES:
        tiles = math.ceil(M / rows) * math.ceil(N / columns)
        arithmetic = 2 * tiles * rows * columns * depth / (0.8 * rates.flops)
        from_l2 = tiles * (rows + columns) * depth * 2 / rates.l2_bytes
        best = min(best, max(arithmetic, from_l2, moved / rates.bytes))
    return best * 1e3


def models(conv: Convolution, rates: Rates) -> Row:
    """Return the roofline, the same for all three passes, and the L2 model's time of each pass, in milliseconds."""
    roofline = max(conv.flops / rates.flops, conv.bytes / rates.bytes) * 1e3
    out, channels, taps = *conv.weight[:2], math.prod(conv.weight[2:])
    pixels, pixels_in = (math.prod(shape) // shape[1] for shape in (conv.result, conv.x))
    same = set(conv.stride) == {1}
    model = partial(gemm_ms, moved=conv.bytes, rates=rates)
    return {
        "roofline_ms": roofline,
        "model_ms": {
            "forward": model(pixels, out, channels * taps, taps if channels >= 32 else 1),
            "dgrad": model(pixels_in if same else pixels, channels, out * taps, taps),
            "wgrad": model(out, channels * taps, pixels, 1),
        },
    }


def convolution_calls(conv: Convolution, device: torch.device) -> dict[str, Call]:
    """Return the three passes of a convolution on random bfloat16 values in channels_last memory."""
    form = torch.channels_last if len(conv.x) == 4 else torch.channels_last_3d
    x, weight, grad = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=form)
        for shape in (conv.x, conv.weight, conv.result)
    )
    zeros, ones = [0] * len(conv.stride), [1] * len(conv.stride)
    rest = (list(conv.stride), list(conv.padding), ones, False, zeros, 1)

    def backward(mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *rest, mask)

    return {
        "forward": lambda: torch.ops.aten.convolution(x, weight, None, *rest),
        "dgrad": lambda: backward([True, False, False]),
        "wgrad": lambda: backward([False, True, False]),
    }


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def measure_convolutions(device: torch.device, record: Record, arguments: argparse.Namespace) -> None:
    """Time each convolution of a step, those with the most work first, and sum them to the time of a step."""
    cell, rates = CELLS[device.type], measure_rates(device)
    counts = convolutions_of_step(cell)
    record.set(cell=asdict(cell), rates=asdict(rates), shapes=len(counts))
    sums: Counter[str] = Counter()

    def work(conv: Convolution) -> float:
        forward, backward = counts[conv]
        return models(conv, rates)["roofline_ms"] * (forward + 2 * backward)

    for number, conv in enumerate(sorted(counts, key=work, reverse=True)):
        forward, backward = counts[conv]
        stem = conv.weight[1] in (3, 16) and math.prod(conv.weight[2:]) > 9  # its input needs no gradient
        row: Row = {"what": str(conv), **asdict(conv), "forwards": forward, "backwards": backward, "stem": stem}
        row |= {"flops": conv.flops, "bytes": conv.bytes, **models(conv, rates)}
        try:
            calls = convolution_calls(conv, device)
            times = harness.time_in_turns(calls, device, REPETITIONS[device.type], warmup=2)
            row |= {f"{name}_ms": found["median_ms"] for name, found in times.items()} | {"times": times}
            if number < PROFILED_SHAPES[device.type]:
                row["kernels"] = kernel_times(partial(_call_all, list(calls.values())), device)[:8]
        except RuntimeError as error:  # such as too little memory: the other shapes are still worth measuring
            row["skipped"] = harness.reason(error)
        forward_ms = {
            "measured": row.get("forward_ms", 0.0),
            "model": row["model_ms"]["forward"],
            "roofline": row["roofline_ms"],
        }
        backs = ("wgrad",) if stem else ("dgrad", "wgrad")
        back_ms = {
            "measured": sum(row.get(f"{name}_ms", 0.0) for name in backs),
            "model": sum(row["model_ms"][name] for name in backs),
            "roofline": len(backs) * row["roofline_ms"],
        }
        for name, value in forward_ms.items():
            sums[name] += forward * value + backward * back_ms[name]
        record.add(row)
        record.set(ms_of_step=dict(sums))
        calls = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the graphs' pools
    print(f"milliseconds of a step's convolutions: {dict(sums)}")


# --------------------------------------------------------------------------------------------------- stem, equal frames


def as_blocks_weight(weight: Tensor) -> Tensor:
    """Return the weight (C', 16, 4, 4) on 2 x 2 blocks of pixels that is equivalent to (C', 3, 7, 7) with stride 2.

    With a zero row and a zero column in front, the kernel has 8 x 8 pixels. For output o it reads the pixels 2 o - 4 to
    2 o + 3, which are four blocks. The channels of a block are ordered by row, column and colour, and channels 12 to 15
    are zero.
    """
    wide = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (C', 3, 4, 2, 4, 2)
    return F.pad(wide.permute(0, 3, 5, 1, 2, 4).flatten(1, 3), (0, 0) * 2 + (0, 4)).contiguous()


def measure_stem(device: torch.device, record: Record, arguments: argparse.Namespace) -> None:
    """Time the first convolution of one view as it is, and on blocks with and without the cost of making them."""
    cell = CELLS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    view = torch.randn(cell.B, 3, cell.T, cell.side, cell.side, device=device, dtype=dtype)
    channels = 48 * cell.width // 64  # 45, padded
    weight = torch.randn(channels, 3, 7, 7, device=device, dtype=dtype) * 0.1
    frames = view.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    blocks = space_to_depth(view)

    def flat(clips: Tensor) -> Tensor:
        return clips.transpose(1, 2).flatten(0, 1)  # (B * T, 16, h, w), without a copy of channels_last_3d memory

    plain_weight, block_weight = (
        w.contiguous(memory_format=torch.channels_last).requires_grad_() for w in (weight, as_blocks_weight(weight))
    )
    providers: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "7 x 7, stride 2": (lambda: F.conv2d(frames, plain_weight, stride=2, padding=3), plain_weight),
        "4 x 4 on blocks": (lambda: F.conv2d(flat(blocks), block_weight), block_weight),
        "4 x 4 with space_to_depth": (lambda: F.conv2d(flat(space_to_depth(view)), block_weight), block_weight),
    }
    with torch.no_grad():
        truth, *others = (function() for function, _ in providers.values())
        error = max(float((other - truth).float().norm() / truth.float().norm()) for other in others)
        record.set(cell=asdict(cell), greatest_relative_difference=error)
        gradient = torch.randn_like(truth)
        del truth, others
    calls: dict[str, Call] = {}
    for name, (function, parameter) in providers.items():

        def forward(function: Callable[[], Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function()

        def both(function: Callable[[], Tensor] = function, parameter: Tensor = parameter) -> Any:
            return torch.autograd.grad(function(), parameter, gradient)

        calls |= {f"{name}, forward": forward, f"{name}, forward and wgrad": both}
    for name, found in harness.time_in_turns(calls, device, REPETITIONS[device.type], warmup=2).items():
        record.add({"what": name, **found})
    if error > (0.02 if dtype == torch.bfloat16 else 1e-4):
        raise ArithmeticError(f"the two forms of the stem differ by {error:.1e}")


def measure_equal_frames(device: torch.device, record: Record, arguments: argparse.Namespace) -> None:
    """Time a compiled backbone in training on three views: all frames of the static view given, or one of them."""
    cell = CELLS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = make_network(cell)
    configure(network, device)
    backbone = network.query.backbone.to(device).train()
    rgb, dynamic = (torch.randn(cell.B, 3, cell.T, cell.side, cell.side, device=device, dtype=dtype) for _ in range(2))
    still = torch.randn(cell.B, 3, 1, cell.side, cell.side, device=device, dtype=dtype)
    statics = {"whole": still.expand(-1, -1, cell.T, -1, -1).contiguous(), "once": still}

    def maps(static: Tensor) -> Sequence[Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            return backbone.forward_views([rgb, static, dynamic], cell.T, differences=True)

    def forward(static: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return maps(static)

    def both(static: Tensor) -> Any:
        loss = torch.stack([view.float().square().mean() for view in maps(static)]).sum()
        return torch.autograd.grad(loss, list(backbone.parameters()))

    whole, once = (torch.cat(list(forward(static))).float() for static in statics.values())
    error = float((whole - once).norm() / whole.norm())
    record.set(cell=asdict(cell), relative_difference=error)
    for title, function in (("forward", forward), ("forward and backward", both)):
        samples: dict[str, list[float]] = {name: [] for name in statics}
        calls = {name: partial(function, static) for name, static in statics.items()}
        for call in calls.values():
            harness.time_consecutive(call, device, 2)
        for name in harness.turns(list(calls), 3):
            samples[name] += harness.time_consecutive(calls[name], device, TIMED_STEPS[device.type])
        for name, values in samples.items():
            record.add({"what": f"static view {name}, {title}", **harness.milliseconds(values)})
    if error > (0.05 if dtype == torch.bfloat16 else 1e-4):
        raise ArithmeticError(f"the maps of the two forms of the static view differ by {error:.1e}")


# ----------------------------------------------------------------------------------------------------------------- main

MEASUREMENTS: dict[str, Callable[[torch.device, Record, argparse.Namespace], None]] = {
    "ceilings": measure_ceilings,
    "step": measure_step,
    "profile": measure_profile,
    "convolutions": measure_convolutions,
    "stem": measure_stem,
    "equal-frames": measure_equal_frames,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASUREMENTS))
    parser.add_argument("--plain", action="store_true", help="for `step`: only the plain step, at the first batch size")
    parser.add_argument("--search", action="store_true", help="let cuDNN try all algorithms on each new size")
    parser.add_argument("--save-as", metavar="NAME", help="write layers-NAME.json (default: what is measured)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder that holds one folder a device")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.search:
        torch.backends.cudnn.benchmark = True
        if device.type == "cuda":
            torch.backends.cudnn.benchmark_limit = 0  # 0: all algorithms, not the first ten
    record = Record(arguments.save_as or arguments.what, device, arguments.results)
    try:
        MEASUREMENTS[arguments.what](device, record, arguments)
        record.set(finished=True)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(f"Wrote {record.path}")


if __name__ == "__main__":
    main()
