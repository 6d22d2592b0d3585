"""The training loop. It owns the step, the learning rate, the log line, the checkpoint and the stop.

pretrain.py and finetune.py supply a Task: what a micro-batch computes, and what is logged about it.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dclr import distributed
from dclr.config import OptimConfig
from dclr.data.failures import Failures
from dclr.data.samples import TrainSamples
from dclr.errors import UserError
from dclr.report import Stopwatch, json_numbers, peak_memory_gib
from dclr.training.engine import Engine
from dclr.training.nonfinite import NonfiniteGuard
from dclr.training.replicas import check_replicas
from dclr.training.run_log import RunLog
from dclr.training.setup import Run
from dclr.training.signals import Stopped, StopRequest

STATE_TYPES: dict[str, Any] = {
    "videos": int,
    "fingerprint": str,
    "summary": dict,
    "last": dict,
    "failures": list,
    "seconds": (int, float),
    "skipped": int,
}
"""What a checkpoint's state holds next to the step. The file may come from anywhere, so `load_state` checks each
type."""


class Task(Protocol):
    """What the loop trains: pretraining or finetuning."""

    samples: TrainSamples
    summary: dict[str, Any]
    """JSON values that checkpoints and report.json keep. A resumed run gets them back."""
    first_trained_step: int
    """Number (from 1) of a step that is always logged, also if --log-every would not log it. 0: no such step."""

    def begin_step(self, step: int) -> None:
        """Prepare for a step, counted from 0."""

    def forward(
        self, batch: Any, step: int, micro_step: int, watch: Stopwatch
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Compute one micro-batch.

        Args:
            batch: a micro-batch of `samples`, on the run's device.
            step: the optimizer step, counted from 0.
            micro_step: the micro-batch, counted from 0 over the whole run.

        Returns:
            The terms (name -> ()) that must be finite, and the loss () to train on. No loss: the step trains nothing.
        """
        ...

    def after_update(self, watch: Stopwatch) -> None:
        """Do the work that must follow the optimizer's update."""

    def metrics(self, lr: float, done: int, skipped: int, watch: Stopwatch) -> dict[str, float]:
        """Return the log line of the latest micro-batch: means over ranks.

        `skipped` of the `done` steps changed nothing.
        """
        ...

    def bar(self, metrics: dict[str, float]) -> dict[str, str]:
        """Return the few values that the progress bar shows, name -> text."""
        ...

    def measure(self, epochs: int) -> dict[str, float]:
        """Return what is measured on other videos after this number of epochs, or nothing. Every rank calls this."""
        ...

    def picture(self) -> np.ndarray | None:
        """Return a picture (H, W, 3) uint8 of the latest micro-batch, to be logged as "views"; None: there is none."""
        ...


@dataclass(frozen=True)
class Trained:
    """The result of `train`."""

    last: dict[str, float]  # the last log line
    steps: int  # steps since the last start
    skipped: int  # steps with a non-finite loss or gradient
    failures: Failures
    began: float  # time.monotonic() at the start, set back by the training time of earlier parts of a resumed run

    @property
    def seconds(self) -> float:
        """Seconds from the start until now, over all parts of a resumed run."""
        return time.monotonic() - self.began

    def report(self) -> dict[str, Any]:
        """Return the entries of report.json that hold these values."""
        return {"last": json_numbers(self.last), "skipped_steps": self.skipped}


def train(run: Run, task: Task, engine: Engine) -> Trained:
    """Train from step 0, or from the newest checkpoint of a resumed run, to the last step.

    Raises:
        UserError: on all ranks. See load_state, save and NonfiniteGuard; ranks that differ; too many unreadable videos.
        Stopped: a signal asked the run to stop. A checkpoint is written.
    """
    config, device = run.config, run.device
    state = load_state(run, engine)
    start, last, task.summary = state["step"], state["last"], state["summary"]
    sampler = run.batch_sampler(start)
    batches = run.batches(task.samples, sampler)
    run.write_config()
    log = RunLog(run.folder, run.command, sampler.stop, start) if run.main else None
    watch, mean_loss, failures = Stopwatch(device), MeanLoss(device), Failures()
    guard = NonfiniteGuard(engine, config.run.on_nonfinite, state["skipped"])
    if run.main:
        failures.reasons, failures.count = state["failures"]
    engine.train()
    began = time.monotonic() - state["seconds"]

    with StopRequest() as request, log or nullcontext():
        for step in range(start, sampler.stop):
            epoch = step // sampler.steps_per_epoch
            lr = learning_rate(config.optim, step, sampler.steps_per_epoch)
            engine.set_learning_rate(lr)
            task.begin_step(step)
            guard.begin(step + 1)
            for micro in range(engine.accumulation):
                with watch.section("data", host=True):
                    batch = next(batches)
                failures.add(batch.failures)
                terms, loss = task.forward(batch, step, step * engine.accumulation + micro, watch)
                guard.see(terms, batch.indices)
                if loss is not None:
                    mean_loss.add(loss)
                    with watch.section("backward"):
                        engine.backward(loss)
                    with watch.section("optimizer"):
                        engine.step()
            guard.end()
            if loss is not None:
                task.after_update(watch)
                run.report_compile_time()
            watch.step()

            done = step + 1
            stops = run.any_rank_stops(request, failures)
            epoch_ends = done % sampler.steps_per_epoch == 0
            saves = epoch_ends and ((epoch + 1) % config.run.checkpoint_every == 0 or done == sampler.stop)
            # A run that was asked to stop must write its checkpoint soon.
            with watch.pause():
                measured = task.measure(epoch + 1) if epoch_ends and not stops else {}
            logs = done % config.run.log_every == 0 or saves or done == task.first_trained_step or bool(measured)
            if log and (step == start or epoch_ends) and (picture := task.picture()) is not None:
                log.picture("views", picture, done)
            if logs or stops:
                guard.check()
                check_replicas(engine.module, done)
            if logs:
                last = task.metrics(lr, done, guard.skipped, watch) | guard.metrics() | measured
                if log:
                    log.write(done, last, task.bar(last))
            if saves or stops:
                if log:
                    log.flush()
                progress = {
                    "summary": task.summary,
                    "last": last,
                    "skipped": guard.skipped,
                    "seconds": time.monotonic() - began,
                }
                save(run, engine, done, progress, failures, mean_loss.take() if saves else None)
            if log:
                log.advance()
            if stops and done < sampler.stop:
                run.exchange.finish()
                again = shlex.quote(str(run.folder))
                raise Stopped(f"asked to stop: checkpoint written at step {done}; --resume {again} continues it")

    run.exchange.finish()
    return Trained(last, sampler.stop - start, guard.skipped, failures, began)


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of an optimizer step, counted from 0.

    The rate is a function of the step alone, without a state like that of torch.optim.lr_scheduler. So a resumed run
    has the rates of an uninterrupted one, also with another --epochs, --lr or --milestones.

        warm-up, W steps of --warmup-epochs   --lr * (step + 1) / W  (Goyal et al., arXiv 1706.02677, section 2.2)
        --schedule step                       --lr, divided by 10 for each milestone that the epoch has reached
        --schedule cosine, S steps in all     --lr * (1 + cos(pi * (step - W) / (S - W))) / 2
    """
    warmup, total = optim.warmup_epochs * steps_per_epoch, optim.epochs * steps_per_epoch
    if optim.schedule == "cosine":
        lr = optim.lr * (1 + math.cos(math.pi * max(step - warmup, 0) / (total - warmup))) / 2
    else:
        lr = optim.lr * 0.1 ** sum(step // steps_per_epoch >= milestone for milestone in optim.milestones)
    return lr * (step + 1) / warmup if step < warmup else lr


def common_metrics(lr: float, batch_size: int, device: torch.device, watch: Stopwatch) -> dict[str, float]:
    """Return the part of a log line that every task has: learning rate, speed and memory since the last line."""
    milliseconds = watch.read()
    return {
        "lr": lr,
        "samples_per_second": batch_size / milliseconds["total"] * 1e3,
        "data_wait_share": milliseconds["data"] / milliseconds["total"],
        "memory/peak_gib": peak_memory_gib(device),
        **{f"milliseconds/{name}": value for name, value in milliseconds.items()},
    }


def common_bar(metrics: dict[str, float]) -> dict[str, str]:
    """Return the part of the progress bar that every task has."""
    return {
        "lr": f"{metrics['lr']:.2g}",
        "samples/s": f"{metrics['samples_per_second']:.1f}",
        "wait": f"{metrics['data_wait_share']:.0%}",
    }


def measure_on_all_ranks(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what `measure`, which all ranks call, returns on all ranks. Random numbers are not used up.

    If it raises UserError, rank 0 prints a warning, and nothing is returned: a measurement must not end the run.
    """
    with distributed.without_timeout(), torch.random.fork_rng(devices=_cuda_devices()):
        try:
            return distributed.on_all_ranks(measure)
        except UserError as error:
            if distributed.rank() == 0:
                print(f"warning: not measured after this epoch: {error}", file=sys.stderr)
            return {}


def _cuda_devices() -> list[int]:
    """Return the device whose random state this process uses."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def load_state(run: Run, engine: Engine) -> dict[str, Any]:
    """Load the newest checkpoint into `engine` and return its state; for a new run, return the state at step 0.

    Raises:
        UserError: see Engine.resume; the state is not a training run's; the classes or the videos have changed; the run
            is already beyond --epochs.
    """
    if not run.resumed:
        return {"step": 0, "summary": {}, "last": {}, "failures": ({}, 0), "seconds": 0.0, "skipped": 0}
    state = engine.resume(run.folder / "checkpoints", lambda state: check_state(run, state))
    run.say(f"  resumed at step {state['step']}")
    return state


def check_state(run: Run, state: dict[str, Any]) -> None:
    """Check that a checkpoint's state fits the run. Raises UserError, see load_state."""
    wrong = [name for name, types in STATE_TYPES.items() if not isinstance(state.get(name), types)]
    if wrong or [type(entry) for entry in state["failures"]] != [dict, int]:
        raise UserError(
            f"--resume {run.folder}: its checkpoint is not one of a training run "
            f"({(wrong or ['failures'])[0]} is wrong)"
        )
    then, now = state.get("classes"), run.classes
    if isinstance(then, list) and now is not None and then != now:
        changes = [f"{name} is new" for name in now if name not in then]
        changes += [f"{name} is gone" for name in then if name not in now]
        raise UserError(
            f"--resume {run.folder}: {len(now)} classes now, {len(then)} then "
            f"({', '.join(changes[:3]) or 'in another order'}): restore the data set, or start another run"
        )
    videos, stop = len(run.videos), run.batch_sampler().stop
    if (state["videos"], state["fingerprint"]) != (videos, run.videos.fingerprint()):
        same = "as many, but not the same"
        found = same if state["videos"] == videos else f"{state['videos']} readable videos then, {videos} now"
        raise UserError(
            f"--resume {run.folder}: the videos of {run.videos.root} are not those it was trained on ({found}): "
            "restore them, or start another run"
        )
    if state["step"] > stop:
        raise UserError(
            f"--resume {run.folder}: it is at step {state['step']}, beyond the {stop} of --epochs: raise --epochs"
        )


def save(run: Run, engine: Engine, step: int, progress: dict[str, Any], failures: Failures, loss: float | None) -> None:
    """Write a checkpoint that `load_state` reads. The checkpoint with the lowest `loss` is kept.

    Raises:
        UserError: on all ranks, the checkpoint cannot be written.
    """
    state = {
        **progress,
        "failures": run.all_failures(failures),
        "videos": len(run.videos),
        "fingerprint": run.videos.fingerprint(),
        "classes": run.classes,
        "loss": loss,
    }
    engine.save(run.folder / "checkpoints", step, state, run.description)


class MeanLoss:
    """Average the loss over steps and ranks."""

    def __init__(self, device: torch.device) -> None:
        self._sum, self._count = torch.zeros((), device=device), 0

    def add(self, loss: Tensor) -> None:
        """Add a micro-batch's loss ()."""
        self._sum = self._sum + loss.detach()
        self._count += 1

    def take(self) -> float | None:
        """Return the mean since the last call; None: there was no loss, or a loss was not finite."""
        mean = distributed.mean_over_ranks(self._sum / max(self._count, 1)).item()
        count, self._count, self._sum = self._count, 0, torch.zeros_like(self._sum)
        return mean if count and math.isfinite(mean) else None
