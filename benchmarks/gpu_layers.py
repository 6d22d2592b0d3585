"""Everything worth measuring in 30 minutes of one GPU, the most valuable first. `make gpu-layers DATA=DIR` runs it.

    python -m benchmarks.gpu_layers --data UCF101                    all parts, 30 minutes
    python -m benchmarks.gpu_layers --parts step stem --minutes 9    only these parts, in at most 9 minutes
    python -m benchmarks.gpu_layers --list                           print the parts, their minutes and commands

Each part is a process of its own with a time limit. A part that fails or takes too long does not stop the next, and
its results so far are kept. Each part writes its own JSON file into results/DEVICE at once. `layers.json` there lists
the parts with their outcome and seconds. The exit status is 1 if a part failed or was stopped, and 0 if parts were only
skipped. It needs no git and no installation: PYTHON=python3 and a copy of the project are enough. A part that needs
DeepSpeed, an older commit or a data set is skipped without it, and the reason is printed.

Run `make gpu-baseline` in a checkout first. It writes the older commit's files to .baseline/, for the part "baseline".
In a copy without git, set DCLR_COMMIT to the commit of the copy, so that results name it.

If the environment variable OUT names a folder, gpu-layers.tar.gz is written there after each part. It holds all results
and logs of the run, for machines that keep only this folder. Logs are in runs/gpu-layers.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline, harness, layers
from benchmarks.harness import ROOT, Row
from dclr import report

LOGS = ROOT / "runs" / "gpu-layers"
SHOWN_LINES = 40
"""Lines of a part's output that are printed after it."""

LEAST_S = 20.0
"""A part does not begin if less time is left: imports and compiling take that long."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One measurement in a process of its own. `{results}` and `{data}` in its arguments stand for the folders."""

    name: str
    minutes: float
    module: str
    arguments: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()
    """Further arguments without a GPU, where the command is only tried."""
    variables: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Packages, "data" or "baseline"."""

    def command(self, results: Path, data: Path | None, kind: str) -> list[str]:
        words = [*self.arguments, *(self.on_cpu if kind == "cpu" else ())]
        given = {"{results}": str(results), "{data}": str(data)}
        return [sys.executable, "-m", self.module, *(given.get(word, word) for word in words)]

    def missing(self, data: Path | None) -> str | None:
        """Return why the part cannot run, or None if it can."""
        for need in self.needs:
            if need == "data":
                if data is None:
                    return "no data set is given: make gpu-layers DATA=DIR"
            elif need == "baseline":
                if not (baseline.FOLDER / baseline.COMMIT).is_dir():
                    return f"{baseline.FOLDER.name}/{baseline.COMMIT} is missing: run `make gpu-baseline` in a checkout"
            elif find_spec(need) is None:
                return f"{need} is not installed"
        return None


RESULTS = ("--results", "{results}")


def layer(what: str, minutes: float, name: str | None = None, more: Sequence[str] = (), **variables: str) -> Part:
    """Return a part that runs benchmarks/layers.py."""
    name = name or what
    arguments = (what, "--save-as", name, *more, *RESULTS)
    return Part(name=name, minutes=minutes, module="benchmarks.layers", arguments=arguments, variables=variables)


def on_gpu(name: str, minutes: float, *chosen: str, needs: Sequence[str] = ("deepspeed", "av")) -> Part:
    """Return a part that runs tests that need a GPU. chosen: pytest's arguments."""
    return Part(
        name=f"tests-{name}",
        minutes=minutes,
        module="benchmarks.gpu_tests",
        arguments=(name, *RESULTS, *chosen),
        variables={"TRITON_INTERPRET": "0"},
        needs=tuple(needs),
    )


def own_convolutions(what: str, minutes: float) -> Part:
    """Return a part that runs benchmarks/convolutions.py. Without a GPU its kernels run in Triton's interpreter."""
    return Part(
        name=f"convolution-{what}",
        minutes=minutes,
        module="benchmarks.convolutions",
        arguments=(what, *RESULTS),
        variables={"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"},
    )


def kernels(name: str, minutes: float, other: str) -> Part:
    """Return a part that runs a benchmark of kernels for 1 minute. other: the provider to compare with on a CPU."""
    return Part(
        name=name,
        minutes=minutes,
        module=f"benchmarks.{name}",
        arguments=("--minutes", "1", *RESULTS),
        on_cpu=("--quick", "--providers", other, "ours"),
    )


HEURISTIC_B = {layers.HEURISTIC_B: "1"}

PARTS = (
    layer("ceilings", 1),
    layer("step", 3),
    layer("profile", 1.5),
    layer("convolutions", 2.5),
    own_convolutions("check", 2),
    own_convolutions("kernels", 5),
    own_convolutions("step", 7),
    layer("step", 1, "step-heuristic-b", ["--plain"], **HEURISTIC_B),
    layer("step", 2, "step-search", ["--plain", "--search"]),
    layer("stem", 0.7),
    layer("equal-frames", 1.5),
    on_gpu("backbone", 2, "tests/test_gpu.py", "-k", "backbone or two_to_the_31 or agree"),
    # Each stage has its own process: an error of the driver fails every later test of a process.
    *(on_gpu(name, 1, "tests/test_gpu.py", "-k", f"host_wait and {name}") for name in ("ddp", "zero1", "zero2")),
    on_gpu("resume", 1.5, "tests/test_gpu.py", "-k", "stopped_and_resumed or short_pretraining"),
    on_gpu("skipped-steps", 1, "tests/test_nonfinite.py"),
    on_gpu("loss", 2, "tests/test_info_nce.py", needs=["av"]),
    on_gpu("views", 1.5, "tests/test_view_generation.py", "tests/test_prefetch.py", needs=["av"]),
    Part(
        name="baseline",
        minutes=3,
        module="benchmarks.baseline",
        arguments=("--rounds", "4", *RESULTS),
        on_cpu=("--rounds", "1", "--steps", "1", "--batch-sizes", "4", "--providers", "ours, float32"),
        needs=("baseline", "deepspeed"),
    ),
    Part(
        name="released",
        minutes=3,
        module="benchmarks.step",
        arguments=("--batch-sizes", "128", "--backbones", "r2plus1d_10", "--rounds", "3", *RESULTS),
        on_cpu=("--quick", "--batch-sizes", "2", "--rounds", "1", "--providers", "ours"),
        needs=("deepspeed",),
    ),
    kernels("info_nce", 1.5, "eager"),
    kernels("views", 2, "reference"),
    Part(
        name="whole-run",
        minutes=4,
        module="benchmarks.train",
        arguments=(
            *("--data", "{data}", "--sources", "store", "--processes", "1", *RESULTS),
            *("--epoch-steps", "64", "--steps", "192", "--frames", "64"),
        ),
        on_cpu=("--epoch-steps", "2", "--steps", "4", "--frames", "40", "--workers", "1"),
        needs=("deepspeed", "av", "data"),
    ),
    layer("convolutions", 1.5, "convolutions-heuristic-b", **HEURISTIC_B),
    layer("convolutions", 3, "convolutions-search", ("--search",)),
)
"""The parts, the most valuable first. A part that needs the results of another comes after it."""


FAST_L2 = 7e12
"""Bytes per second. If L2 is faster, the model of L2 traffic (benchmarks/layers.py) does not explain the times."""


class Stop(Exception):
    """SIGTERM was sent to this process, so it ends."""


def run_part(part: Part, command: list[str], limit_s: float, log: Path) -> Row:
    """Run a part's process and return its outcome. After `limit_s` seconds the process and its children are ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {name: value for name, value in os.environ.items() if name != "OUT"} | part.variables
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables["PYTHONUNBUFFERED"] = "1"
    began_s, status = time.monotonic(), None
    with log.open("w") as file:
        # A process group of its own can be ended as a whole. It stays in this session, so it ends with the session.
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(process)
    outcome = {"outcome": "passed"} if status == 0 else {"outcome": "failed", "reason": _said(log, status)}
    if status is None:
        outcome = {"outcome": "stopped", "reason": f"it took longer than its limit of {limit_s:.0f} s"}
    return {"part": part.name, **outcome, "seconds": round(time.monotonic() - began_s, 1), "limit_s": round(limit_s, 1)}


def end_group(process: "subprocess.Popen[Any]") -> None:
    """End the processes that are left in a process's group: by SIGTERM, and after 5 seconds by SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _said(log: Path, status: int | None) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1].strip()[:300] if lines else 'no output'}"


def run(
    parts: Sequence[Part], minutes: float, data: Path | None, results: Path, logs: Path, device: torch.device
) -> list[Row]:
    """Run the parts in their order until the time is over. Return a row for each, which layers.json holds too."""
    folder = harness.results_folder(device, results)
    environment, rows = report.environment(device), list[Row]()
    deadline_s = time.monotonic() + 60 * minutes
    for number, part in enumerate(parts):
        left_s = deadline_s - time.monotonic()
        limit_s = min(60 * part.minutes, left_s)
        title = f"[{number + 1} of {len(parts)}, {left_s / 60:.1f} minutes left] {part.name}"
        missing = part.missing(data)
        if not missing and limit_s < min(LEAST_S, 60 * part.minutes):
            missing = f"{max(left_s, 0):.0f} s are left"
        if missing:
            rows.append({"part": part.name, "outcome": "skipped", "reason": missing})
            print(f"\n{title}: skipped: {missing}", flush=True)
        else:
            command = part.command(results, data, device.type)
            print(f"\n{title}: at most {limit_s:.0f} s: {' '.join(command)}", flush=True)
            log = logs / f"{part.name}.log"
            rows.append(run_part(part, command, limit_s, log))
            print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
            print(f"{part.name}: {rows[-1]['outcome']} after {rows[-1]['seconds']} s", flush=True)
        if part.name == "ceilings" and (note := note_about_l2(folder)):
            rows[-1]["note"] = note
            print(note, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        report.write_json(
            folder / "layers.json",
            {"question": "what was measured, and what failed?", "environment": environment, "rows": rows},
        )
        if out := os.environ.get("OUT"):
            pack(Path(out), folder, logs)
    return rows


def note_about_l2(folder: Path) -> str | None:
    """Return what to do if reads from L2 are too fast to limit the convolutions, else None."""
    file = folder / "layers-ceilings.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    rate = max((row["bytes_per_second"] for row in rows if row["what"].startswith("L2 read")), default=0.0)
    if rate <= FAST_L2:
        return None
    return (
        f"NOTE: L2 reads at {rate / 1e12:.1f} TB/s, and the model of convolutions assumes 5.5. So reads from L2 do not "
        "explain the library's times. Look at the kernel names in layers-convolutions.json first, and change the plan."
    )


def pack(out: Path, folder: Path, logs: Path) -> None:
    """Write the results and logs to gpu-layers.tar.gz in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / "gpu-layers.tar.gz.part"
    with tarfile.open(unfinished, "w:gz") as archive:
        for name, source in (("results", folder), ("logs", logs)):
            if source.is_dir():
                archive.add(source, f"{name}/{source.name}")
    unfinished.replace(out / "gpu-layers.tar.gz")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set's folder, for the whole run")
    parser.add_argument("--minutes", type=float, default=30.0, help="time of all parts together (default 30)")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"only these of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder that holds one folder a device")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the parts' output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    parts = [part for part in PARTS if part.name in (arguments.parts or [part.name])]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = arguments.data.resolve() if arguments.data else None
    if data and not data.is_dir():
        parser.exit(2, f"--data {arguments.data}: no such folder\n")
    if not arguments.minutes > 0:
        parser.exit(2, f"--minutes is {arguments.minutes:g}, but must be above 0\n")
    if arguments.list:
        for part in parts:
            print(f"{part.name}, {part.minutes:g} minutes: {' '.join(part.command(Path('results'), data, 'cuda')[1:])}")
        return 0

    def stop(number: int, frame: Any) -> None:
        raise Stop

    for part in parts:
        if why := part.missing(data):
            print(f"{part.name} will be skipped: {why}")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        rows = run(parts, arguments.minutes, data, arguments.results.resolve(), arguments.logs.resolve(), device)
    except (Stop, KeyboardInterrupt):
        print("stopped; what was measured is kept", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    columns = ["part", "outcome", "seconds", "reason"]
    print("\n" + harness.table(columns, [[str(row.get(name, "")) for name in columns] for row in rows]))
    return 1 if any(row["outcome"] in ("failed", "stopped") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
