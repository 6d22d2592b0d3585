"""What every benchmark of a kernel shares: honest times, peak memory, the device's measured ceilings, files of results.

Nothing here is run by itself. `interleaved` measures all providers of one question in one loop, so that a clock that changes meets
all of them alike and their ratios can be trusted.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch

from dclr.report import write_json

matplotlib.use("Agg")  # writes files; needs no screen
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"

Precision = Literal["ieee", "tf32", "bf16"]
"""Arithmetic of a matrix product: float32 as it is, float32 rounded to tf32 first, bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call: the median, and the quantiles between which the middle three fifths of the repetitions lie."""

    median_ms: float
    low_ms: float
    """20 % quantile"""
    high_ms: float
    """80 % quantile"""
    repetitions: int
    captured: bool | None
    """Replayed from a CUDA graph. False: launched kernel by kernel, so that the host's time may be in it. None: not on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device was measured to do at best."""

    bytes_per_second: float
    """of a large copy, bytes read plus bytes written"""
    flops_per_second: dict[Precision, float]
    """of a large matrix product"""


def interleaved(
    providers: dict[str, Callable[[], Any]], device: torch.device, repetitions: int = 50, warmup: int = 3
) -> dict[str, Timing]:
    """Times of all `providers`, measured in one loop whose rounds run each of them once, in an order that rotates.

    On CUDA a provider is captured in a graph, if it can be (a warning says if not), and its replays are timed by events. Before each, a
    buffer of several times the L2 cache is written: inputs come from memory, as they do in training, and the device is busy while the
    host launches what follows, so that the host's time does not count. Nothing waits for the device before the end.

    Args:
        providers: by name, functions without arguments. One that computes a gradient does so itself, by torch.autograd.grad.
        repetitions: measured rounds.
        warmup: calls of each before the first round.
    """
    captured: dict[str, bool | None] = dict.fromkeys(providers)
    if device.type == "cuda":
        replays = {name: _captured(name, provider, warmup) for name, provider in providers.items()}
        captured.update({name: replays[name] is not provider for name, provider in providers.items()})
        samples = _time_by_events(replays, device, repetitions)
    else:
        samples = _time_by_clock(providers, repetitions, warmup)

    timings = {}
    for name, milliseconds in samples.items():
        low, median, high = (float(value) for value in np.quantile(milliseconds, (0.2, 0.5, 0.8)))
        timings[name] = Timing(
            median_ms=median, low_ms=low, high_ms=high, repetitions=repetitions, captured=captured[name]
        )
    return timings


def consecutive(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Milliseconds of each of `count` calls, one right after the other. On CUDA from event to event on the stream: nothing waits before
    the end, and the host's time counts where the device waits for it."""
    if device.type == "cuda":
        borders = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        borders[0].record()
        for border in borders[1:]:
            call()
            border.record()
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(end) for begin, end in pairwise(borders)]
    milliseconds = []
    for _ in range(count):
        begin_s = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - begin_s) * 1e3)
    return milliseconds


def peak_extra_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that one call holds beyond what was allocated before it, its result included; None where torch does not count them."""
    if device.type != "cuda":
        return None
    function()  # what stays allocated after a first call (cuBLAS's workspace) is no cost of a call
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device) -> Ceilings | None:
    """Measured on a copy of 1 GiB and products of 8192 x 8192 matrices of random numbers (zeros would be faster); None on a CPU."""
    if device.type != "cuda":
        return None
    side, size = 8192, 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    factors = torch.randn(2, side, side, device=device)
    halves = factors.bfloat16()

    def product(precision: Precision) -> None:
        with float32_products(precision):
            left, right = halves if precision == "bf16" else factors
            left @ right

    precisions: tuple[Precision, ...] = ("ieee", "tf32", "bf16")
    providers: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    providers |= {precision: partial(product, precision) for precision in precisions}
    times = interleaved(providers, device, repetitions=15)
    return Ceilings(
        bytes_per_second=2 * size / (times["copy"].median_ms / 1e3),
        flops_per_second={precision: 2 * side**3 / (times[precision].median_ms / 1e3) for precision in precisions},
    )


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Inside, float32 matrix products are rounded as `precision` says.

    "bf16" allows tf32 as well: bfloat16 fits into tf32 whole, so code that widens its arguments loses nothing and keeps the fast units.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def results_folder(device: torch.device, results: Path = RESULTS) -> Path:
    """Where results of this device are kept: results/nvidia-h200, results/cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return results / "-".join(name.lower().split())


def write(folder: Path, name: str, content: dict[str, Any], figure: Figure) -> None:
    """NAME.json and NAME.png into `folder`, and once more into the folder that the environment variable OUT names, if it is set: from
    a borrowed machine that one is brought home."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", content)
    figure.savefig(folder / f"{name}.png", dpi=130)
    plt.close(figure)
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        for suffix in ("json", "png"):
            shutil.copy(folder / f"{name}.{suffix}", out)


def command(script: str, arguments: Sequence[str]) -> str:
    """What was typed, with a folder's name for its path: where things lie is nobody's business."""
    named = [Path(argument).resolve().name if "/" in argument else argument for argument in arguments]
    return " ".join([f"python -m benchmarks.{script}", *named])


def reason(error: Exception) -> str:
    """The first line of an error, for a table."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def table_line(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def table_header(columns: Sequence[str]) -> str:
    return table_line(columns) + "\n|" + "---|" * len(columns)


def rounds(names: list[str], repetitions: int) -> Iterator[str]:
    """Whose turn it is: every name once a round, and each round begins with another."""
    for turn in range(repetitions):
        first = turn % len(names)
        yield from names[first:] + names[:first]


def _time_by_clock(
    providers: dict[str, Callable[[], Any]], repetitions: int, warmup: int
) -> dict[str, list[float]]:  # milliseconds by provider
    for provider in providers.values():
        for _ in range(warmup):
            provider()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for name in rounds(list(providers), repetitions):
        begin = time.perf_counter()
        providers[name]()
        samples[name].append((time.perf_counter() - begin) * 1e3)
    return samples


def _time_by_events(
    replays: dict[str, Callable[[], Any]], device: torch.device, repetitions: int
) -> dict[str, list[float]]:  # milliseconds by provider
    # At least 256 MB, which keeps the device busy for 50 microseconds or more: longer than the host needs for one turn of the loop.
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 * 2**20)
    cold = torch.empty(size, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    discarded = 1  # in the first round the device still waits for the host
    for name in rounds(list(replays), discarded + repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()
        begin.record()
        replays[name]()
        end.record()
        events[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: [begin.elapsed_time(end) for begin, end in pairs[discarded:]] for name, pairs in events.items()}


def _captured(name: str, provider: Callable[[], Any], warmup: int) -> Callable[[], Any]:
    """The replay of a CUDA graph of `provider`; `provider` itself, and a warning, where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            provider()
    try:
        # The outer context brings the current stream back when the capture fails: the inner one does not.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            provider()
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"{name} is timed without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=3)
        return provider
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
