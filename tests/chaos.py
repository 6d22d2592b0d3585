"""Kill a run of two ranks at random moments, often while it writes a checkpoint, and start it again each time.

    python tests/chaos.py --kills 100        about 10 minutes on two cores; `make chaos`
    python tests/chaos.py --kills 5          about 2 minutes; `make test-slow` makes five kills too

After every kill this program checks the newest checkpoint. It must be complete and not older than the one before the
kill. At most one checkpoint interval of steps may be lost. A run that reaches its end must equal an uninterrupted run
bit for bit: the weights, the momentum and the logged metrics.

The ranks are forked from a process that has imported every module, which saves ten seconds per start. Each start runs
train.py with the same command. A failed check ends this program with its reason and exit status 1. The last line of the
output is a summary as JSON.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from dclr.commands import train  # noqa: E402
from dclr.data.demo import render_demo  # noqa: E402

# pretrain is imported before the ranks are forked, so that they start fast.
from dclr.training import checkpoint, engine, pretrain  # noqa: E402, F401

RANKS = 2
INTERVAL = 4  # steps between checkpoints: one epoch of 16 videos
EPOCHS = 10
LONGEST = 60.0  # seconds within which a run must end after one of its ranks has been killed
TIMES = ("milliseconds/", "samples_per_second", "data_wait_share", "memory/")  # metrics that differ between equal runs

engine.import_deepspeed()


class Failed(Exception):
    """A check has failed."""


def command(folder: Path, run: Path) -> list[str]:
    return [
        "pretrain", "--data", str(folder / "videos"), "--ds_config", str(folder / "ds_config.json"), "--out", str(run),
        "--resume", "auto", "--width", "4", "--clip-length", "8", "--crop-size", "32", "--batch-size", "4",
        "--epochs", str(EPOCHS), "--workers", "1", "--log-every", "1", "--queue-length", "18", "--embedding-dim", "32",
        "--mined-positives", "2", "--fill-steps", "1", "--key-momentum", "0.9",
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> list[int]:
    """Start the ranks and return their process ids. Each leads a session, so that its workers can be found later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(RANKS):
        process = os.fork()
        if process == 0:
            os.setsid()
            status = 70
            try:
                out = os.open(log.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                status = train.run(arguments)
            except BaseException:
                traceback.print_exc()
                status = 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        processes.append(process)
    return processes


def wait(processes: list[int], seconds: float, until: Callable[[], bool] = lambda: False) -> dict[int, int]:
    """Wait until all processes have ended, `until` is true or the time is over. Return the exit statuses so far."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(ended) < len(processes) and not until() and time.monotonic() < deadline:
        for process in processes:
            if process not in ended:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    ended[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return ended


def kill(processes: list[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def left_behind(sessions: list[int]) -> list[str]:
    """Return the ids of running processes of these sessions: workers that outlived their rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in sessions and fields[0] != "Z":
                found.append(entry.name)
    return found


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and memory. A line that a kill cut short is skipped."""
    lines = []
    if (run / "metrics.jsonl").exists():
        for text in (run / "metrics.jsonl").read_text().splitlines():
            try:
                lines.append({k: v for k, v in json.loads(text).items() if not k.startswith(TIMES)})
            except ValueError:
                continue
    return lines


def last_written(run: Path) -> int:
    """Return the time in nanoseconds at which metrics.jsonl was last written, or 0 if there is none."""
    return (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else 0


def check_after_kill(run: Path, before: int) -> int:
    """Check the newest checkpoint and return its step, or 0 if there is none.

    Raises:
        Failed: the checkpoint has a non-finite value, is older than step `before`, or is more than INTERVAL steps
            behind the last logged step.
    """
    path = checkpoint.newest(run / "checkpoints")
    if path is None:
        step = 0
    else:
        tensors, state = checkpoint.read(path)
        step = state["step"]
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise Failed(f"{path} holds non-finite values")
    if step < before:
        raise Failed(f"the newest checkpoint is of step {step}, but there was one of step {before} before")
    last = max((line["step"] for line in logged(run)), default=0)
    if last - step > INTERVAL:
        raise Failed(
            f"step {last} was done and the newest checkpoint is of step {step}: more than {INTERVAL} steps lost"
        )
    return step


def check_end(run: Path, uninterrupted: Path) -> None:
    """Check that a killed run equals the uninterrupted one: weights, momentum, queue, batch statistics and metrics."""
    for name in ("backbone.safetensors",):
        ours, theirs = load_file(run / name), load_file(uninterrupted / name)
        different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        if different or ours.keys() != theirs.keys():
            raise Failed(f"{name} differs from the uninterrupted run's: {different[:3]}")
    ours, theirs = (checkpoint.read(checkpoint.newest(r / "checkpoints"))[0] for r in (run, uninterrupted))
    different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    if different or ours.keys() != theirs.keys():
        raise Failed(f"the last checkpoint differs from the uninterrupted run's: {different[:3]}")
    if logged(run) != logged(uninterrupted):
        raise Failed("metrics.jsonl differs from the uninterrupted run's")
    curves = [
        [(event.step, event.value) for event in EventAccumulator(str(r / "tensorboard")).Reload().Scalars("loss")]
        for r in (run, uninterrupted)
    ]
    if curves[0] != curves[1]:
        raise Failed("TensorBoard's loss differs from the uninterrupted run's")


def attempt(folder: Path, run: Path, draw: random.Random, how: str, seconds: float) -> tuple[str, list[int]]:
    """Start the run and kill it as `how` says. Return a description of its end and its sessions."""
    unfinished = run / "checkpoints" / checkpoint.UNFINISHED
    unfinished.unlink(missing_ok=True)  # left by an earlier kill; a new file means that a write has started
    before = last_written(run)
    processes = start(command(folder, run), folder / "log")
    if how == "while writing":
        skipped = draw.randrange(2)  # the first or the second write of this attempt
        ended = {}
        for _ in range(skipped + 1):
            ended |= wait(processes, LONGEST, until=lambda: unfinished.exists())
            if _ < skipped and not ended:
                ended |= wait(processes, LONGEST, until=lambda: not unfinished.exists())
        if not ended:
            time.sleep(draw.uniform(0, 0.001))
    else:
        ended = {}
        if how == "one rank":  # only a rank that has connected can name the other
            ended = wait(processes, LONGEST, until=lambda: last_written(run) > before)
        ended |= wait([p for p in processes if p not in ended], draw.uniform(0, seconds))
    if any(status != 0 for status in ended.values()):
        raise Failed(f"a rank ended by itself with status {max(ended.values())}: see {folder}/log.*")
    if ended:
        ended |= wait([p for p in processes if p not in ended], LONGEST)
        if len(ended) < RANKS or any(ended.values()):
            raise Failed(f"one rank ended and the other did not, or with a status other than 0: {ended}")
        return "done", processes

    if how != "one rank":
        kill(processes)
        return ("while writing" if unfinished.exists() else "between writes"), processes
    victim, survivor = draw.sample(processes, RANKS)
    kill([victim])
    began = time.monotonic()
    ended = wait([survivor], LONGEST)
    if not ended:
        kill([survivor])
        raise Failed(f"rank {processes.index(survivor)} did not end within {LONGEST:.0f} s after the other was killed")
    if ended[survivor] == 0:
        raise Failed("one rank was killed and the other ended with status 0")
    output = (folder / f"log.{processes.index(survivor)}").read_text()
    if f"rank {processes.index(victim)} has failed" not in output:
        raise Failed(
            f"the other rank did not name the one that was killed: see {folder}/log.{processes.index(survivor)}"
        )
    return f"one rank, the other ended after {time.monotonic() - began:.0f} s", processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-rank-every", type=int, default=10, help="one kill in this many hits one rank only")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="dclr-chaos-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    began = time.monotonic()

    render_demo(folder / "videos", train_per_class=2, test_per_class=1, progress=False)
    config = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    config["torch_autocast"]["enabled"] = False
    (folder / "ds_config.json").write_text(json.dumps(config))
    uninterrupted = folder / "uninterrupted"
    started = time.monotonic()
    processes = start(command(folder, uninterrupted), folder / "log")
    ended = wait(processes, 10 * LONGEST)
    if list(ended.values()) != [0] * RANKS:
        raise Failed(f"the uninterrupted run ended with {ended}: see {folder}/log.*")
    whole = time.monotonic() - started
    print(
        f"uninterrupted: {EPOCHS * INTERVAL} steps in {whole:.1f} s; now {options.kills} kills, in {folder}", flush=True
    )

    kinds: Counter[str] = Counter()
    sessions: list[int] = []
    kills, finished, number, step = 0, 0, 0, 0
    while kills < options.kills or step > 0:  # the last run is not killed any more
        run = folder / f"run-{number}"
        if kills >= options.kills:
            how, seconds = "never", 10 * LONGEST
        elif kills % options.one_rank_every == options.one_rank_every // 2:
            how, seconds = "one rank", whole / 2
        else:
            how, seconds = draw.choice(["while writing", "any time"]), whole / 2
        outcome, own = attempt(folder, run, draw, how, seconds)
        sessions += own
        if outcome == "done":
            check_end(run, uninterrupted)
            finished += 1
            number, step = number + 1, 0
            print(f"run {number} reached its end and equals the uninterrupted run", flush=True)
            continue
        kills += 1
        kinds[outcome.split(",")[0]] += 1
        step = check_after_kill(run, step)
        print(f"kill {kills}: {outcome}; continues from step {step}", flush=True)
    if finished == 0:  # every kill came before the first checkpoint
        raise Failed("no run reached its end")
    deadline = time.monotonic() + 20
    while (orphans := left_behind(sessions)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if orphans:
        raise Failed(f"processes were left behind: {orphans}")
    print(json.dumps({"kills": kills, **kinds, "finished": finished, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        print(f"chaos: {failure}", file=sys.stderr)
        sys.exit(1)
