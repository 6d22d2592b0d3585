"""The commands of an experiment: two at a time, none twice, gone on with where they were cut off.

A chain is one network's commands in order: pretrain to the first probe, measure it, pretrain to the second, ... A command is done once
the file that it writes last is there. Its output goes into a log, whose first line is the command itself: a log of another command is
refused, since what lies beside it was made by another recipe.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dclr.errors import UserError
from dclr.training import signals

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 12
"""Of a failed command's output: what is shown."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command: a script of the repository and its arguments."""

    command: tuple[str, ...]
    writes: Path
    """the file that it writes last"""
    log: Path
    until: Path | None = None
    """a file of a later command, which makes this one unnecessary; by default the one that it writes"""
    environment: dict[str, str] = field(default_factory=dict)
    """beside what it inherits"""

    @property
    def done(self) -> bool:
        return (self.until or self.writes).exists()


Chain = list[Job]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment is told on the command line."""

    seeds: range
    parallel: int
    work: Path
    quick: bool
    arguments: tuple[str, ...] = ()
    """as typed, but of a path its last part: where things lie is nobody's business"""


def parse(
    description: str | None, arguments: Sequence[str], more: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[Options, argparse.Namespace]:
    """The common flags, and those that `more` adds to the parser. Raises UserError: fewer than one seed or run at a time."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... (default: 3)")
    parser.add_argument(
        "--parallel", type=int, help="runs at a time, which share the cores (default: 2; one where there is a GPU)"
    )
    parser.add_argument("--work", type=Path, help="folder of the runs (default: runs/evidence)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps, to see that it runs; nothing is published (runs/evidence-quick)",
    )
    if more:
        more(parser)
    given = parser.parse_args(arguments)
    for flag in ("seeds", "parallel"):
        if (value := getattr(given, flag)) is not None and value < 1:
            raise UserError(f"--{flag} is {value}, but must be at least 1")
    parallel = given.parallel or (1 if torch.cuda.is_available() else 2)
    work = given.work or Path("runs") / ("evidence-quick" if given.quick else "evidence")
    typed = tuple(Path(each).resolve().name if "/" in each else each for each in arguments)
    return Options(seeds=range(given.seeds), parallel=parallel, work=work, quick=given.quick, arguments=typed), given


def train(command: str, folder: Path, flags: Iterable[str], seed: int) -> Job:
    """`train.py pretrain`, `finetune` or `linear` into the folder."""
    line = ("train.py", command, *flags, "--seed", str(seed), "--resume", "auto", "--out", str(folder))
    return Job(command=line, writes=folder / "report.json", log=folder / "train.log")


def evaluate(protocol: str, checkpoint: Path | str, data: Path, out: Path, flags: Iterable[str] = ()) -> Job:
    """`eval.py accuracy`, `retrieval` or `bias` of a run's folder, of its weights, or of the word random."""
    line = ("eval.py", protocol, "--data", str(data), "--checkpoint", str(checkpoint), *flags, "--out", str(out))
    return Job(command=line, writes=out / "report.json", log=out / "eval.log")


def pretrain_and_probe(folder: Path, flags: Iterable[str], seed: int, data: Path, epochs: Sequence[int]) -> Chain:
    """One pretraining, stopped at each of `epochs` to measure the backbone it has come to, into folder/bias-EPOCH.

    The stages differ in --epochs alone, and a resumed run goes on bit for bit (tests/test_resume.py): together they are the run that
    was never stopped. A stage is done once its probe is: report.json is of the newest stage and says nothing about the earlier ones.
    """
    chain = []
    for epoch in epochs:
        probe = evaluate("bias", folder, data, folder / f"bias-{epoch}", ("--no-foreground",))
        whole = train("pretrain", folder, (*flags, "--data", str(data), "--epochs", str(epoch)), seed)
        chain += [replace(whole, until=probe.writes, log=folder / f"train-{epoch}.log"), probe]
    return chain


# -------------------------------------------------------------------------------------------------------------- running


def run(chains: Sequence[Chain], parallel: int) -> None:
    """Every command that is not done, the chains side by side, `parallel` at a time, with an equal share of the cores each.

    Raises UserError: a command failed (its last lines are printed), was asked to stop, or a log is of another command. Whatever ends this
    early, Ctrl-C among it, also ends the commands that are running; training writes a checkpoint first.
    """
    for chain in chains:
        for job in chain:
            check_log(job)
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    waiting = [todo for chain in chains if (todo := [job for job in chain if not job.done])]
    running: list[tuple[subprocess.Popen[bytes], Chain]] = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                chain = waiting.pop(0)
                running.append((start(chain[0], threads), chain))
            time.sleep(0.05)
            for process, chain in [pair for pair in running if pair[0].poll() is not None]:
                running.remove((process, chain))
                check_end(chain[0], process.returncode)
                if len(chain) > 1:  # before other chains: a network that is begun is finished first
                    waiting.insert(0, chain[1:])
    finally:
        end([process for process, _ in running])


def title(job: Job) -> str:
    """The first line of its log."""
    return "$ " + shlex.join(("python", *job.command))


def check_log(job: Job) -> None:
    """Raises UserError: what is there was made by another command."""
    with suppress(FileNotFoundError), job.log.open(errors="replace") as file:
        if (before := file.readline().strip()) not in ("", title(job)):
            raise UserError(
                f"{job.log} is of another command ({before:.400}): give another --work, or delete {job.log.parent} to run {title(job)}"
            )


def start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    """Its output goes to its log, which begins anew."""
    print(title(job), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"} | job.environment
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as log:
        log.write(title(job) + "\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, *job.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def check_end(job: Job, status: int) -> None:
    """Raises UserError: not a good end."""
    if status == signals.STATUS:
        raise UserError(f"{title(job)} was asked to stop, and has; the same command goes on")
    if status == 0 and job.writes.exists():
        return
    lines = [line for line in job.log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    print("\n".join(lines[1:][-LAST_LINES:]), file=sys.stderr)
    what = f"ended with status {status}" if status else f"has not written {job.writes}"
    raise UserError(f"{title(job)} {what}; its output is in {job.log}")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks them to stop, waits for a minute (a step, and its checkpoint), then ends them."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 60
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def entry(main: Callable[[Sequence[str]], None]) -> int:
    """`main` with the command line's arguments; returns the exit status: 0 done, 2 refused or failed, 130 stopped."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C: what is running is ended too
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# -------------------------------------------------------------------------------------------------- what the runs have written


def report(folder: Path) -> dict[str, Any]:
    """Raises UserError: missing or damaged."""
    file = folder / "report.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged ({error}): delete {folder} and give the same command") from None


def figure(folder: Path, name: str) -> float:
    """Of an evaluation. Raises UserError: it was not measured there."""
    figures = report(folder)["figures"]
    if name not in figures:
        raise UserError(f"{folder / 'report.json'} has no {name}, but: {', '.join(figures)}")
    return figures[name]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each with its `step`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def commits(chains: Sequence[Chain]) -> set[str]:
    """Of the source trees that made these runs, usually one."""
    reports = {job.writes.parent for chain in chains for job in chain if job.writes.name == "report.json"}
    return {report(folder)["environment"]["commit"] for folder in reports}
