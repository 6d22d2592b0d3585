"""Run the commands of an experiment: several at a time, each once, and resume them after an interruption.

A chain holds the commands of one network in order: pretrain to the first probe, evaluate, pretrain to the second probe,
and so on. A chain may have to wait for a command of another chain: finetuning starts after the pretraining. A command
is done when the file that it writes last exists. Its output goes to a log, and the first line of the log is the
command. If a log starts with another command, the experiment stops, because its files come from another recipe.

The experiment of ucf101.py is a list of stages. `run_stages` runs them in order. After each stage it prints how long
the remaining stages will probably take.
"""

import argparse
import dataclasses
import json
import os
import re
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

from dclr import config as configuration
from dclr.commands import train as train_command
from dclr.data.store_files import INDEX
from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.models.pretrained import CLIP_SETTINGS
from dclr.training import signals

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 12
"""Number of output lines shown after a command fails."""
SETTINGS_OF_RESULTS = set(CLIP_SETTINGS) | {
    setting.name
    for group in (configuration.MethodConfig, configuration.ModelConfig, configuration.OptimConfig)
    for setting in dataclasses.fields(group)
}
"""Settings that may change a result and that a preset may hold."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command: a script of this repository and its arguments."""

    command: tuple[str, ...]
    writes: Path
    """The file that the command writes last."""
    log: Path
    until: Path | None = None
    """The command is done when this file exists. By default it is `writes`."""
    after: Path | None = None
    """The command starts when this file exists. Another chain writes it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables, added to the inherited ones."""
    keeps_output: bool = False
    """The command writes no file: its output, once it has ended, becomes `writes`."""
    processes: int = 1
    """Number of processes that torchrun starts. It may be another one when the experiment is resumed."""
    machine_flags: tuple[str, ...] = ()
    """Flags that do not change the result, for the machine or as limits. They may differ in a resumed experiment."""

    @property
    def done(self) -> bool:
        return (self.until or self.writes).exists()

    @property
    def can_start(self) -> bool:
        return self.after is None or self.after.exists()


Chain = list[Job]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands that belong together, such as a training and the evaluation of what was trained."""

    title: str
    kind: str
    """Stages of one kind have about the same ratio of measured to expected time."""
    jobs: Chain
    seconds: float
    """The expected time."""

    @property
    def done(self) -> bool:
        return all(job.done for job in self.jobs)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line flags that all experiments have."""

    seeds: range
    parallel: int
    work: Path
    quick: bool
    with_published: bool = False
    """Only --methods run. The other rows are those of the published result."""
    arguments: tuple[str, ...] = ()
    """The arguments as typed, but of a path only its last component, so that results do not publish local folders."""


def parse(
    description: str | None, arguments: Sequence[str], more: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[Options, argparse.Namespace]:
    """Return the common options, and all parsed flags. `more` adds an experiment's own flags to the parser.

    Raises:
        UserError: --seeds or --parallel is below 1, or --first-seed is negative.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (default: 3)")
    parser.add_argument(
        "--parallel", type=int, help="number of runs at the same time. They share the cores (default: 2; 1 with a GPU)"
    )
    parser.add_argument(
        "--work", type=Path, help="folder of the runs (default: runs/evidence; runs/evidence-quick with --quick)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps, which only check that the experiment runs; nothing is published",
    )
    if more:
        more(parser)
    given = parser.parse_args(arguments)
    for flag in ("seeds", "parallel"):
        if (value := getattr(given, flag)) is not None and value < 1:
            raise UserError(f"--{flag} is {value}, but must be at least 1")
    if (first := getattr(given, "first_seed", 0)) < 0:
        raise UserError(f"--first-seed is {first}, but must be at least 0")
    parallel = given.parallel or (1 if torch.cuda.is_available() else 2)
    work = given.work or Path("runs") / ("evidence-quick" if given.quick else "evidence")
    options = Options(
        seeds=range(first, first + given.seeds),
        parallel=parallel,
        work=work,
        quick=given.quick,
        with_published=getattr(given, "with_published", False),
        arguments=published(arguments),
    )
    return options, given


def published(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments of a command as results name them: of a path only its last component."""
    return tuple(Path(each).resolve().name if "/" in each else each for each in arguments)


def add_first_seed(parser: argparse.ArgumentParser) -> None:
    """Add --first-seed, for experiments that can add seeds to their published result."""
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="the first seed that runs (default: 0). If it is above 0, the new seeds are added to the published "
        "result. What runs must be in it with all seeds below this one, and with no others",
    )


def add_with_published(parser: argparse.ArgumentParser) -> None:
    """Add --with-published, for experiments that can add methods to their published result."""
    parser.add_argument(
        "--with-published",
        action="store_true",
        help="run only --methods; take the other rows from the published result, which must have the same recipe and "
        "device and all seeds that run",
    )


def train(command: str, folder: Path, flags: Iterable[str], seed: int) -> Job:
    """Return the job of `train.py COMMAND` that writes into `folder`."""
    line = ("train.py", command, *flags, "--seed", str(seed), "--resume", "auto", "--out", str(folder))
    return Job(command=line, writes=folder / "report.json", log=folder / "train.log")


def pack(source: Path, store: Path, short_side: int) -> Job:
    """Return the job of `train.py pack` that writes the data set `source` into `store`."""
    line = ("train.py", "pack", "--data", str(source), "--short-side", str(short_side), "--out", str(store))
    return Job(command=line, writes=store / INDEX, log=store.with_suffix(".log"))


def evaluate(protocol: str, checkpoint: Path | str, data: Path, out: Path, flags: Iterable[str] = ()) -> Job:
    """Return the job of `eval.py PROTOCOL` that writes into `out`.

    Args:
        checkpoint: a run's folder, a file of weights, or "random".
    """
    line = ("eval.py", protocol, "--data", str(data), "--checkpoint", str(checkpoint), *flags, "--out", str(out))
    return Job(command=line, writes=out / "report.json", log=out / "eval.log")


def after(job: Job, chains: Iterable[Chain]) -> list[Chain]:
    """Return the same chains. They start when `job`, which is in another chain, has ended."""
    return [[replace(chain[0], after=job.writes), *chain[1:]] for chain in chains]


def pretrain_and_probe(folder: Path, flags: Iterable[str], seed: int, data: Path, epochs: Sequence[int]) -> Chain:
    """Return one pretraining run that stops at each of `epochs`. A probe follows each stop, in folder/bias-EPOCH.

    The training commands differ only in --epochs. A resumed run is exact (tests/test_resume.py), so together they equal
    a run that was never stopped. A training command is done when its probe is done, because the run's report.json
    belongs to the newest command only.
    """
    chain = []
    for epoch in epochs:
        probe = evaluate("bias", folder, data, folder / f"bias-{epoch}", ("--no-foreground",))
        whole = train("pretrain", folder, (*flags, "--data", str(data), "--epochs", str(epoch)), seed)
        chain += [replace(whole, until=probe.writes, log=folder / f"train-{epoch}.log"), probe]
    return chain


# -------------------------------------------------------------------------------------------------------------- running


def run(chains: Sequence[Chain], parallel: int) -> None:
    """Run every command that is not done, `parallel` chains at a time. Each chain gets an equal share of the cores.

    If this function ends early, for example by Ctrl-C, it also ends the running commands. Training writes a checkpoint
    first.

    Raises:
        UserError: a command failed (its last lines are printed) or was asked to stop, or a log belongs to another
        command, or a run has other settings than its command gives now.
    """
    for chain in chains:
        for job in chain:
            check_log(job)
            check_settings(job)
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    waiting = [todo for chain in chains if (todo := [job for job in chain if not job.done])]
    running: list[tuple[subprocess.Popen[bytes], Chain]] = []
    try:
        while waiting or running:
            for chain in [chain for chain in waiting if chain[0].can_start][: parallel - len(running)]:
                waiting.remove(chain)
                running.append((start(chain[0], threads), chain))
            if not running:
                raise RuntimeError(f"no command writes {waiting[0][0].after}")
            time.sleep(0.05)
            for process, chain in [pair for pair in running if pair[0].poll() is not None]:
                running.remove((process, chain))
                check_end(chain[0], process.returncode)
                if len(chain) > 1:
                    # In front, so that a started network is finished before the next one starts.
                    waiting.insert(0, chain[1:])
    finally:
        end([process for process, _ in running])


def title(job: Job) -> str:
    """Return the first line of a job's log, which names its recipe."""
    return "$ " + shlex.join(("python", *job.command))


def words_of(job: Job) -> list[str]:
    """Return the arguments of python that start the job. A job of several processes is started by torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.processes))
    return [*(launcher if job.processes > 1 else ()), *job.command, *job.machine_flags]


def check_log(job: Job) -> None:
    """Raise UserError if the job's log belongs to another command."""
    with suppress(FileNotFoundError), job.log.open(errors="replace") as file:
        if (before := file.readline().strip()) not in ("", title(job)):
            raise UserError(
                f"{job.log} belongs to another command ({before:.400}): "
                f"give another --work, or delete {job.log.parent} to run {title(job)}"
            )


def check_settings(job: Job) -> None:
    """Raise UserError if the run of a training job exists and has other settings than its command gives now.

    A command names a preset, and a newer version of the program may have changed the values of the preset.
    """
    folder = job.writes.parent
    if job.command[0] != "train.py" or not (folder / "config.json").exists():
        return
    given = train_command.parse([*job.command[1:]])
    command = given.pop("command")
    config, _, _ = train_command.resolve(command, given | {"resume": None})
    _, _, stored = configuration.read_config(folder / "config.json")
    for name, value in configuration.flat(config).items():
        then = stored.get(name, value)
        if name in SETTINGS_OF_RESULTS - given.keys() and then != value and value != configuration.AUTOMATIC:
            raise UserError(
                f"{folder} was trained with {configuration.as_flag(name, then)}, but {title(job)} now means "
                f"{configuration.as_flag(name, value)}: give another --work, or delete {folder}"
            )


def start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    """Start the job's process. Its output replaces the log."""
    print("$ " + shlex.join(("python", *words_of(job))), flush=True)
    shared = str(max(1, threads // job.processes))
    environment = os.environ | {"OMP_NUM_THREADS": shared, "PYTHONUNBUFFERED": "1"} | job.environment
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as log:
        log.write(title(job) + "\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, *words_of(job)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def check_end(job: Job, status: int) -> None:
    """Raise UserError if the job failed or was asked to stop."""
    if status == signals.STATUS:
        raise UserError(f"{title(job)} was asked to stop and wrote a checkpoint; give the same command to resume")
    if status == 0 and job.keeps_output:
        atomic_write(job.writes, job.log.read_bytes())
    if status == 0 and job.writes.exists():
        return
    lines = [line for line in job.log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    last = lines[1:][-LAST_LINES:]
    # torchrun prints many lines after the error message of the command.
    said = [line for line in lines[1:-LAST_LINES] if ": error: " in line][-1:]
    print("\n".join([*said, *last]), file=sys.stderr)
    reason = f"ended with status {status}" if status else f"did not write {job.writes}"
    if status < 0:
        reason = f"was ended by {signal.Signals(-status).name}"
    raise UserError(f"{title(job)} {reason}; its output is in {job.log}")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to stop, give them three minutes for a step and a checkpoint, then kill them."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 180
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --------------------------------------------------------------------------------------------------------------- stages


def run_stages(stages: Sequence[Stage], times: Path) -> None:
    """Run every stage that is not done, in order, and print a line before and after each.

    `times` is a JSON file with the seconds that each stage has taken, including earlier starts of the experiment.

    Raises:
        UserError: see `run`. The message names the stage.
    """
    for stage in stages:
        for job in stage.jobs:
            check_log(job)
            check_settings(job)
    taken = read_times(times)
    if done := sum(stage.done for stage in stages):
        left = duration(seconds_left(stages, taken))
        print(f"{done} of {len(stages)} stages are done, about {left} left", flush=True)
    for number, stage in enumerate(stages, 1):
        if stage.done:
            continue
        name = f"stage {number} of {len(stages)}"
        log = next(job.log for job in stage.jobs if not job.done)
        own = duration(seconds_left([*(each for each in stages if each.done), stage], taken))
        left = duration(seconds_left(stages, taken))
        print(f"{name}: {stage.title}, about {own} of {left} left, log {log}", flush=True)
        began = time.monotonic()
        try:
            run([stage.jobs], parallel=1)
        except UserError as error:
            advice = "" if "give the same command" in str(error) else "; give the same command to continue"
            raise UserError(f"{name}, {stage.title}: {error}{advice}") from None
        finally:
            taken[stage.title] = taken.get(stage.title, 0.0) + time.monotonic() - began
            times.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(times, (json.dumps(taken, indent=2) + "\n").encode())
        left = duration(seconds_left(stages, taken))
        print(f"{name} done in {duration(taken[stage.title])}, about {left} left", flush=True)


def read_times(file: Path) -> dict[str, float]:
    """Return the seconds of each stage, by title. Raises UserError if the file is damaged."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it and give the same command again") from None


def seconds_left(stages: Sequence[Stage], taken: dict[str, float]) -> float:
    """Return the time that the remaining stages will probably take.

    The expected time of a stage is multiplied by the ratio of measured to expected time of the finished stages of its
    kind. If there are none, the ratio is that of all finished stages. If no stage is finished, it is 1.
    """
    done = [stage for stage in stages if stage.done and stage.title in taken]

    def factor(of: Sequence[Stage]) -> float | None:
        expected = sum(stage.seconds for stage in of)
        return sum(taken[stage.title] for stage in of) / expected if expected else None

    overall = factor(done) or 1.0
    return sum(
        stage.seconds * (factor([other for other in done if other.kind == stage.kind]) or overall)
        for stage in stages
        if not stage.done
    )


def duration(seconds: float) -> str:
    """Return "mm:ss", or "h:mm h" from one hour on."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def entry(main: Callable[[Sequence[str]], None]) -> int:
    """Call `main` with the command line and return the exit status: 0 done, 2 refused or failed, 130 stopped.

    SIGTERM, SIGUSR1 and SIGHUP stop it like Ctrl-C, so that the running commands end too. Further ones change nothing:
    a terminal that is closed may send SIGHUP twice. SIGHUP stays ignored if it was ignored before, as under nohup.
    """
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


# -------------------------------------------------------------------------------------------------- results of the runs


def report(folder: Path) -> dict[str, Any]:
    """Return the content of report.json. Raises UserError if the file is missing or damaged."""
    file = folder / "report.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is missing or damaged ({error}): delete {folder} and give the same command again"
        ) from None


def figure(folder: Path, name: str) -> float:
    """Return one figure of an evaluation. Raises UserError if its report does not have it."""
    figures = report(folder)["figures"]
    if name not in figures:
        raise UserError(f"{folder / 'report.json'} has no figure {name}, only {', '.join(figures)}")
    return figures[name]


def figure_by_seed(folder: Path, run: str, seeds: range, evaluation: str, name: str) -> list[float]:
    """Return one figure for each seed, from the evaluations folder/RUN-SEED/EVALUATION."""
    return [figure(folder / f"{run}-{seed}" / evaluation, name) for seed in seeds]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Each has its `step`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reports(chains: Sequence[Chain]) -> list[dict[str, Any]]:
    """Return the reports of all training runs and evaluations of these chains."""
    folders = {job.writes.parent for chain in chains for job in chain if job.writes.name == "report.json"}
    return [report(folder) for folder in sorted(folders)]


def precisions(chains: Sequence[Chain]) -> set[str]:
    """Return the precisions in which the networks were trained: "float32", "bfloat16" or both."""
    return {re.split(r"\W", each["precision"])[0] for each in reports(chains) if "precision" in each}
