"""The harness of all benchmarks: command line, grid, times taken in turns, goals, results files, captions and tables.

This module is not run by itself. A benchmark supplies its question, its providers and its grid. A provider is one
implementation of what is measured. A cell is one point of the grid, and a row is what was measured in one cell.

Every results file holds the question, the command, the device, the versions, the commit and the date. Files lie in
results/DEVICE, for example results/nvidia-h200 or results/cpu.
"""

import argparse
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib
import numpy as np
import torch

from dclr.errors import UserError
from dclr.kernels import describe
from dclr.kernels.backend import runs_triton
from dclr.report import environment, write_json

matplotlib.use("Agg")  # writes files; needs no screen
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

RELEASED = "as released"
"""The provider that repeats the steps of the released code. Results files carry this name, so it does not change."""

Precision = Literal["ieee", "tf32", "bf16"]
"""Arithmetic of a matrix product: float32, float32 rounded to tf32 first, or bfloat16."""

COPIED_FLOATS = 300_000_000
"""Number of float32 values in the copies that measure the bandwidth: 1.2 GB."""

Call = Callable[[], Any]
Row = dict[str, Any]
T = TypeVar("T")


class NotAvailable(Exception):
    """A provider cannot run here. The message says why."""


# ---------------------------------------------------------------------------------------------------------------- times


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The highest rates that the device reached in this run."""

    bytes_per_second: float
    """Rate of a large copy by a kernel: bytes read plus bytes written."""
    flops_per_second: dict[Precision, float]
    """Rate of a large matrix product."""
    memcpy_bytes_per_second: float | None = None
    """Rate of the same copy by the driver (cudaMemcpy in a CUDA graph), which is bytes_per_second in older results."""


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Return the median, the 20 % quantile (low) and the 80 % quantile (high)."""
    low, median, high = (float(value) for value in np.quantile(list(values), (0.2, 0.5, 0.8)))
    return {"median": median, "low": low, "high": high}


def milliseconds(values: Iterable[float]) -> dict[str, float]:
    """Return the quantiles of times in milliseconds, under the names of results files."""
    return {f"{name}_ms": value for name, value in quantiles(values).items()}


def turn(names: Sequence[T], number: int) -> list[T]:
    """Return the order of a round: every name once, and each round begins with another name."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def turns(names: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield the names in the order of all rounds."""
    for number in range(rounds):
        yield from turn(names, number)


def time_in_turns(
    providers: dict[str, Call], device: torch.device, repetitions: int = 50, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Measure all `providers` in one loop of rounds, so that a changing clock rate affects all of them alike.

    On CUDA each provider is captured in a CUDA graph if possible (a warning says if not), and events time its replays.
    A buffer larger than the L2 cache is written before each replay. So inputs come from memory, as in training, and the
    device is busy while the host launches what follows. The loop never waits for the device before its end.

    Args:
        providers: functions without arguments, by name. A function that measures a gradient computes it itself.
        repetitions: measured rounds.
        warmup: calls of each provider before the first round.

    Returns:
        By provider: median_ms, low_ms, high_ms, repetitions and captured. captured is True if a CUDA graph was
        replayed, and None if the device is not CUDA. If it is False, the times may include time of the host.
    """
    captured: dict[str, bool | None] = dict.fromkeys(providers)
    if device.type == "cuda":
        replays = {name: _capture(name, provider, warmup) for name, provider in providers.items()}
        captured.update({name: replays[name] is not provider for name, provider in providers.items()})
        samples = _time_by_events(replays, device, repetitions)
    else:
        samples = _time_by_clock(providers, device, repetitions, warmup)
    return {
        name: milliseconds(samples[name]) | {"repetitions": repetitions, "captured": captured[name]}
        for name in providers
    }


def time_consecutive(call: Call, device: torch.device, count: int) -> list[float]:
    """Return the milliseconds of each of `count` consecutive calls.

    On CUDA these are the distances of events on the stream. The host does not wait before the end. Its time counts only
    where the device waits for it.
    """
    if device.type == "cuda":
        borders = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        borders[0].record()
        for border in borders[1:]:
            call()
            border.record()
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(end) for begin, end in pairwise(borders)]
    borders_s = [time.perf_counter()]
    for _ in range(count):
        call()
        borders_s.append(time.perf_counter())
    return [(end_s - begin_s) * 1e3 for begin_s, end_s in pairwise(borders_s)]


def peak_extra_memory(call: Call, device: torch.device) -> int | None:
    """Return the most bytes that one call, with its result, adds to what was allocated before. None on a CPU."""
    if device.type != "cuda":
        return None
    call()  # a first call also allocates what later calls reuse, such as cuBLAS's workspace
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_ceilings(device: torch.device) -> Ceilings | None:
    """Measure copies of 1.2 GB and products of 8192 x 8192 random matrices (zeros are faster). Return None on a CPU.

    The copy is an elementwise kernel, as the memory-bound kernels of a step are. A memcpy node of a CUDA graph is up to
    twice as slow (pytorch/pytorch#191284). The size is not a power of two, which could load some memory channels more
    than others.
    """
    if device.type != "cuda":
        return None
    side = 8192
    source = torch.randn(COPIED_FLOATS, device=device)
    target, size = torch.empty_like(source), source.nbytes
    factors = torch.randn(2, side, side, device=device)
    halves = factors.bfloat16()

    def product(precision: Precision) -> None:
        with float32_products(precision):
            left, right = halves if precision == "bf16" else factors
            left @ right

    precisions: tuple[Precision, ...] = ("ieee", "tf32", "bf16")
    providers: dict[str, Call] = {
        "copy": lambda: torch.mul(source, 1.5, out=target),
        "memcpy": lambda: target.copy_(source),
    }
    providers |= {precision: partial(product, precision) for precision in precisions}
    times = time_in_turns(providers, device, repetitions=15)
    return Ceilings(
        bytes_per_second=2 * size / (times["copy"]["median_ms"] / 1e3),
        flops_per_second={precision: 2 * side**3 / (times[precision]["median_ms"] / 1e3) for precision in precisions},
        memcpy_bytes_per_second=2 * size / (times["memcpy"]["median_ms"] / 1e3),
    )


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Compute float32 matrix products inside the context with the given precision.

    "bf16" allows tf32 as well. A bfloat16 number fits into tf32, so code that widens its arguments loses nothing.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _time_by_clock(
    providers: dict[str, Call], device: torch.device, repetitions: int, warmup: int
) -> dict[str, list[float]]:
    """Return milliseconds by provider."""
    for provider in providers.values():
        time_consecutive(provider, device, warmup)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for name in turns(list(providers), repetitions):
        samples[name] += time_consecutive(providers[name], device, 1)
    return samples


def _time_by_events(replays: dict[str, Call], device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """Return milliseconds by provider."""
    # At least 256 MB keep the device busy for 50 microseconds, longer than the host needs for one turn of the loop.
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 * 2**20)
    cold = torch.empty(size, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    discarded = 1  # in the first round the device still waits for the host
    for name in turns(list(replays), discarded + repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()
        begin.record()
        replays[name]()
        end.record()
        events[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: [begin.elapsed_time(end) for begin, end in pairs[discarded:]] for name, pairs in events.items()}


def _capture(name: str, provider: Call, warmup: int) -> Call:
    """Return the replay of a CUDA graph of `provider`; where capturing fails, warn and return `provider` itself."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            provider()
    try:
        # The outer context restores the current stream when the capture fails. The inner one does not.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            provider()
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"{name} is timed without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=3)
        return provider
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


# ------------------------------------------------------------------------------------------------------------ providers


def check_and_time(
    names: Sequence[str],
    prepare: Callable[[str], tuple[Call, dict[str, Any]]],
    device: torch.device,
    repetitions: int,
    warmup: int = 3,
) -> dict[str, dict[str, Any]]:
    """Return by provider its times, its peak extra memory and the result of its check, or {"skipped": reason}.

    prepare: returns the call to time and the result of its check. It may raise; then the provider is skipped.
    """
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name in names:
        try:
            call, check = prepare(name)
            found[name] = check | {"peak_extra_bytes": peak_extra_memory(call, device)}
            calls[name] = call
        except Exception as error:  # of any kind, because the other providers are still worth measuring
            found[name] = {"skipped": reason(error)}
    try:
        times = time_in_turns(calls, device, repetitions, warmup) if calls else {}
    except torch.OutOfMemoryError as error:  # each fits alone, but the graphs of all do not fit together
        return found | {name: {"skipped": reason(error)} for name in calls}
    return {name: times.get(name, {}) | found[name] for name in names}


def reason(error: Exception) -> str:
    """Return in one line, for a table, why a provider was skipped."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, NotAvailable | UserError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def spread(found: dict[str, Any]) -> str:
    """Return a provider's milliseconds for a table: median (20 % to 80 %)."""
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    mark = " (no graph)" if found.get("captured") is False else ""
    return f"{found['median_ms']:.4g} ({found['low_ms']:.4g} to {found['high_ms']:.4g}){mark}"


# ---------------------------------------------------------------------------------------------------------------- goals


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A value that every row of the given size should reach."""

    text: str
    least: float
    value: Callable[[Row], float | None]
    """Computes the value of a row, or None where it was not measured."""
    size: dict[str, int] = field(default_factory=dict)
    """The goal is for rows with these entries. If empty, it is for all rows."""


def speedup(over: str, quantity: str = "median_ms") -> Callable[[Row], float | None]:
    """Return the value of a goal: the quantity of provider `over` divided by that of "ours"."""

    def value(row: Row) -> float | None:
        theirs, own = (row["providers"].get(name, {}).get(quantity) for name in (over, "ours"))
        return None if theirs is None or own is None else theirs / max(own, 1e-9)

    return value


def judge(rows: Iterable[Row], goal: Goal, where: Callable[[Row], str]) -> dict[str, Any]:
    """Judge a goal by its worst row. `where` names the cell of a row."""
    values = [
        (value, where(row))
        for row in rows
        if goal.size.items() <= row.items() and (value := goal.value(row)) is not None
    ]
    if not values:
        return {"worst": None, "worst_at": None, "verdict": "not measured in this run"}
    worst, worst_at = min(values)
    return {"worst": worst, "worst_at": worst_at, "verdict": "met" if worst >= goal.least else "not met"}


def judge_kernels(
    rows: Sequence[Row],
    goals: Sequence[Goal],
    where: Callable[[Row], str],
    genuine: bool,
    typical: tuple[str, Callable[[Row], bool]],
) -> list[dict[str, Any]]:
    """Judge each goal in each precision by its worst row. Return also the worst value of the typical rows.

    Args:
        where: names the cell of a row.
        genuine: True if ours ran its Triton kernels on a GPU. Otherwise no goal is judged.
        typical: the name of this value in the results, and a function that says which rows are typical.
    """
    name, is_typical = typical
    verdicts = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for goal in goals:
            these = [row for row in rows if row["precision"] == precision and goal.size.items() <= row.items()]
            failed = [where(row) for row in these if "skipped" in row["providers"].get("ours", {})]
            verdict: dict[str, Any] = {"goal": goal.text, "precision": precision, name: None, "worst": None}
            if not genuine:
                verdict |= {"worst_at": None, "verdict": "not measured on this device"}
            elif failed:
                verdict |= {"worst_at": failed[0], "verdict": "not met: ours failed"}
            else:
                verdict |= judge(these, goal, where)
                verdict[name] = judge(filter(is_typical, these), goal, where)["worst"]
            verdicts.append(verdict)
    return verdicts


def goal_table(verdicts: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return a table of verdicts. `columns` gives the head of each entry of a verdict."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    return table(list(columns.values()), [[cell(verdict[name]) for name in columns] for verdict in verdicts])


# -------------------------------------------------------------------------------------------------------------- one run


def make_parser(description: str | None, providers: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share, with --quick and --providers if there are `providers`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if providers:
        parser.add_argument("--providers", nargs="+", choices=list(providers), help="measure only these")
        parser.add_argument("--quick", action="store_true", help="measure the first cell only, with fewer repetitions")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no new cell or round after this time"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that holds one folder for each device")
    return parser


def add_kernel_options(parser: argparse.ArgumentParser, precisions: Iterable[str]) -> None:
    """Add the options of benchmarks that time single calls."""
    parser.add_argument("--precision", nargs="+", choices=list(precisions), help="measure each on the whole grid")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B")
    parser.add_argument("--repetitions", type=int, help="measured rounds of a cell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> None:
    """Run a command. A UserError ends it with one line and exit status 2, a RuntimeError with exit status 1."""
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        parser.exit(2, f"{error}\n")
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")


class Run:
    """One run of a benchmark, from its command line to its results files.

    Attributes:
        environment: device, versions, commit and date.
        implementation: what "ours" is. None before `show_device`.
        ceilings: the device's ceilings. None before `show_device`, and on a CPU.
        rows: one for each measured cell.
        stopped: why the grid was not finished. None if it was.
        failed: True if an error stopped the run.
        not_reached: names of the cells that were not measured.
    """

    def __init__(
        self, name: str, argv: Sequence[str] | None, arguments: argparse.Namespace, device: torch.device
    ) -> None:
        options = [*(getattr(arguments, "precision", None) or ()), *(["quick"] * getattr(arguments, "quick", False))]
        self.name, self.device, self.minutes = "_".join([name, *options]), device, arguments.minutes
        self.command = command(name, sys.argv[1:] if argv is None else argv)
        self.folder = results_folder(device, arguments.results)
        self.environment = environment(device)
        self.implementation: str | None = None
        self.ceilings: Ceilings | None = None
        self.rows: list[Row] = []
        self.stopped: str | None = None
        self.failed = False
        self.not_reached: list[str] = []
        self._begin = time.monotonic()

    def show_device(self, also: str = "") -> None:
        """Measure the device's ceilings. Print them, the device, and what "ours" is, followed by `also`."""
        self.implementation = f"ours is: {describe(self.device)}{also}"
        print(f"{self.environment['device']}, torch {self.environment['versions']['torch']}; {self.implementation}")
        self.ceilings = measure_ceilings(self.device)
        if self.ceilings is None:
            print("The ceilings of this device are not measured: no shares of a ceiling, no peak memory.")
        else:
            products = self.ceilings.flops_per_second.items()
            rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in products)
            copies = (self.ceilings.bytes_per_second, self.ceilings.memcpy_bytes_per_second or 0.0)
            kernel, memcpy = (f"{rate / 1e12:.2f} TB/s" for rate in copies)
            print(f"Measured ceilings: copy {kernel} (memcpy in a graph {memcpy}), {rates}")

    @property
    def genuine(self) -> bool:
        """True if ours runs its Triton kernels on a GPU."""
        return self.device.type == "cuda" and runs_triton(self.device)

    def out_of_time(self) -> bool:
        """Return whether --minutes are over. If so, set `stopped`."""
        if time.monotonic() - self._begin > 60 * self.minutes:
            self.stopped = f"{self.minutes:g} minutes were over"
        return self.stopped is not None

    def measure(self, cells: Sequence[T], measure: Callable[[T], Row], show: Callable[[Row], str]) -> None:
        """Measure the cells in their order and print each row. The first cell is always measured.

        Raises SystemExit if nothing was measured.
        """
        for cell in cells:
            if self.rows and self.out_of_time():
                break
            try:
                self.rows.append(measure(cell))
            except RuntimeError as error:  # after some errors a process can no longer use the GPU
                self.stopped, self.failed = f"{cell}: {reason(error)}", True
                break
            print(show(self.rows[-1]), flush=True)
        if not self.rows:
            raise SystemExit(f"nothing was measured: {self.stopped or 'the grid has no such cell'}")
        self.not_reached = [str(cell) for cell in cells[len(self.rows) :]]
        if self.stopped:
            print(f"\nstopped, {self.stopped}; not measured: {'; '.join(self.not_reached)}")

    def caption(self, detail: str) -> str:
        """Return the lines below a picture: where and when it was measured, and `detail`."""
        versions, date = self.environment["versions"], self.environment["date"][:10]
        commit = self.environment["commit"]
        return f"{self.environment['device']}, {date}, torch {versions['torch']}, commit {commit}\n{detail}"

    def publish(self, figure: Figure, content: dict[str, Any]) -> None:
        """Write the results: `content` and what every results file holds. --precision and --quick add to the name."""
        shared = {
            "command": self.command,
            "environment": self.environment,
            "seconds": round(time.monotonic() - self._begin, 1),
            "stopped": self.stopped,
            "not_reached": self.not_reached,
            "rows": self.rows,
        }
        if self.implementation:
            shared["implementation"] = self.implementation
            shared["ceilings"] = None if self.ceilings is None else asdict(self.ceilings)
        write(self.folder, self.name, shared | content, figure)
        print(f"Wrote {self.folder / self.name}.json and .png")

    def refuse_failures(self, names: Iterable[str], allowed: str | None = None) -> None:
        """Raise SystemExit if an error ended the run, or one of `names` was skipped, unless the reason is `allowed`."""
        for row in self.rows:
            for name in names:
                why = row["providers"].get(name, {}).get("skipped", allowed)
                if why != allowed:
                    raise SystemExit(f"{name} failed: {why}")
        if self.failed:
            raise SystemExit(f"an error stopped the run: {self.stopped}")


def from_row(kind: type[T], row: Row) -> T:
    """Return the cell, a dataclass, of a row. Older rows may lack fields that have a default."""
    return kind(**{each.name: row[each.name] for each in fields(kind) if each.name in row})  # type: ignore[arg-type]


def command(script: str, arguments: Sequence[str]) -> str:
    """Return the command line. Only the last name of each path is kept, because results are published."""
    named = [Path(argument).resolve().name if "/" in argument else argument for argument in arguments]
    return " ".join([f"python -m benchmarks.{script}", *named])


# -------------------------------------------------------------------------------------------------------- files, tables


def results_folder(device: torch.device, results: Path = RESULTS) -> Path:
    """Return the folder of this device's results: results/nvidia-h200, results/cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return results / "-".join(name.lower().split())


def write(folder: Path, name: str, content: dict[str, Any], figure: Figure) -> None:
    """Write NAME.json and NAME.png into `folder`.

    If the environment variable OUT names a folder, write copies there, for machines that keep only this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", content)
    figure.savefig(folder / f"{name}.png", dpi=130)
    plt.close(figure)
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        for suffix in ("json", "png"):
            shutil.copy(folder / f"{name}.{suffix}", out)


def add_titles(figure: Figure, title: str, caption: str, **legend: Any) -> None:
    """Set title, legend and caption, and lay the panels out between them."""
    figure.suptitle(title, y=0.985)
    top = 0.97
    if legend:
        figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.955), frameon=False, fontsize=9, **legend)
        top = 0.94
    figure.text(0.5, 0.012, caption, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.035 + 0.015 * caption.count("\n"), 1, top))


def label_log_axis(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, 20, ..."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def most_measured(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the precision that most rows have, for a picture."""
    precisions = [row["precision"] for row in rows]
    return [row for row in rows if row["precision"] == max(dict.fromkeys(precisions), key=precisions.count)]


def table_line(columns: Sequence[str]) -> str:
    """Return one line of a markdown table."""
    return "| " + " | ".join(columns) + " |"


def table_header(columns: Sequence[str]) -> str:
    """Return the first two lines of a markdown table."""
    return table_line(columns) + "\n|" + "---|" * len(columns)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    return "\n".join([table_header(columns), *(table_line(row) for row in rows)])
