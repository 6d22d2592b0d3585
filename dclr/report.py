"""The output of a run: its folder, messages, times of a step and report.json."""

import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dclr.config import is_url
from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.lock import folder_lock
from dclr.programs import with_names
from dclr.progress import write_line


def say(message: str) -> None:
    """Print a line, above the progress bar if there is one."""
    write_line(with_names(message), sys.stdout)


@contextmanager
def open_run(out: str, command: str, resume: Path | None = None, replace: bool = False) -> Iterator[Path]:
    """Create the folder of a new run, or open that of the run to resume. It is locked inside the context.

    A new run gets the folder `out`, or the next free runs/COMMAND-N if `out` is empty. A new folder in which nothing
    was written is deleted at the end. So a refused command leaves nothing behind.

    Args:
        replace: a run in `out` that has no checkpoint may be replaced.

    Raises:
        UserError: another process writes there; the folder already holds a run, or cannot be written.
    """
    folder = resume or (Path(out) if out else _free_folder(command))
    with ExitStack() as stack:
        stack.enter_context(removed_if_empty(folder))
        make_writable(folder)
        try:
            stack.enter_context(folder_lock(folder))
        except OSError as error:  # the disk is full
            raise _not_writable(folder, error) from None
        if resume is None and (folder / "config.json").exists():
            if not replace or any((folder / "checkpoints").glob("step-*")):
                again = shlex.quote(str(folder))
                raise UserError(
                    f"--out {folder} already holds a run: --resume {again} continues it, another --out keeps both"
                )
            (folder / "config.json").unlink()
        yield folder


def _free_folder(command: str) -> Path:
    """Return the next free runs/COMMAND-N."""
    number = 1
    while (folder := Path("runs") / f"{command}-{number}").exists():
        number += 1
    return folder


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """At the end, delete `folder` and its parents as far as they were created in the context and are empty."""
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    finally:
        with suppress(OSError):
            for path in created:
                path.rmdir()


def make_writable(folder: Path) -> None:
    """Create `folder`. Raises UserError if no file can be written there, or if it is a URL."""
    if is_url(str(folder).replace(":/", "://", 1)):  # Path has made :/ of ://
        raise UserError(f"--out {folder} is a URL, but must be local: write to a disk, then upload the result")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # a process of this number on another machine may have deleted it
    except OSError as error:
        raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"--out {folder}: cannot write there ({error.strerror}); choose a folder that you may write to")


def require_new_file(out: Path) -> None:
    """Raise UserError unless `out` is a new file in a folder that can be written to, or that can be made."""
    if out.exists():
        raise UserError(f"--out {out} exists already: delete it, or give another name")
    with removed_if_empty(out.parent):
        make_writable(out.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def json_numbers(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return the metrics with None, which is null in JSON, in place of NaN and infinity."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, cores, versions, commit and date, which a result needs to be reproducible."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": package_versions(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages on which results depend, by name."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:  # such as deepspeed, which only training needs
            return "not installed"

    packages = ("torch", "torchvision", "triton", "deepspeed", "kornia", "av", "numpy")
    return {package: version_of(package) for package in packages}


def cpu_name() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str:
    """Return the commit of the source tree, with "+" added if files differ from it.

    Files that measurements write may differ. Outside a checkout, return the environment variable DCLR_COMMIT, or
    "unknown".
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    written = [f":!{path}" for path in ("docs", "README.md", "benchmarks/results", "experiments/results")]
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DCLR_COMMIT", "unknown")


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: allocated on the GPU, or resident if `device` is a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stopwatch:
    """Milliseconds of a step by section. On a GPU, events on the stream time a section. Only `read` waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._steps, self._since = 0, time.perf_counter()

    @contextmanager
    def section(self, name: str, host: bool = False) -> Iterator[None]:
        """Add the time inside this context to `name`. With `host`, measure the Python thread even on a GPU."""
        if self._cuda and not host:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin_s = time.perf_counter()
            yield
            self._host[name] += (time.perf_counter() - begin_s) * 1e3

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time inside this context as time of a step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin

    def step(self) -> None:
        """Count one more step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the mean milliseconds of a step since the last read: by section, and `total` for the whole step."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._host[name] += begin.elapsed_time(end)
        now, steps = time.perf_counter(), max(self._steps, 1)
        sections = {name: value / steps for name, value in self._host.items()}
        sections["total"] = (now - self._since) * 1e3 / steps
        self._host.clear()
        self._events.clear()
        self._steps, self._since = 0, now
        return sections
