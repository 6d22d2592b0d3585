"""Finetuning or a linear probe on every official split of a data set (--split all), one run after the other.

split_folders.py says where the runs are.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dclr import config as configuration
from dclr import distributed, report
from dclr.config import FinetuneConfig
from dclr.data.datasets import several_splits
from dclr.errors import UserError
from dclr.programs import command_of
from dclr.training import checkpoint
from dclr.training.finetune import finetune
from dclr.training.setup import OpenMonitor
from dclr.training.signals import Stopped
from dclr.training.split_folders import begun_splits, split_folder

FINISHED, CONTINUED, BEGUN = "finished before", "continued", "begun"


def finetune_splits(
    command: str,
    config: FinetuneConfig,
    preset: str,
    flags: dict[str, Any],
    device: torch.device,
    resume: Path | None,
    open_accuracy: OpenMonitor | None = None,
) -> Path:
    """Train a classifier on each official split and return the folder of the runs.

    Args:
        config: the settings of all runs but for --split and --out.
        flags: the flags that were given, without --split and --out. Runs that are continued take them over.
        resume: folder of runs to continue; None begins them in `config.run.out`.
        open_accuracy: see finetune.

    Raises:
        UserError: the data set has one official split; `config.run.out` already holds runs; see finetune.
        Stopped: a signal asked the run to stop. A checkpoint is written.
    """
    numbers = distributed.on_rank_zero(lambda: several_splits(config.data))
    with ExitStack() as stack:

        def open_folder() -> Path:
            out = config.run.out
            if resume is None and out and begun_splits(Path(out)):
                raise UserError(
                    f"--out {out} already holds runs on splits: --resume {out} continues them, another --out keeps both"
                )
            return stack.enter_context(report.open_run(out, command, resume))

        def settings_of(run: Path, number: int) -> tuple[FinetuneConfig, str]:
            if not (run / "config.json").exists():
                new = replace(config, data=replace(config.data, split=number), run=replace(config.run, out=str(run)))
                return new, preset
            _, preset_of_run, stored = configuration.read_config(run / "config.json")
            configuration.check_resume(run, flags, stored)
            own = configuration.resolve(command, preset_of_run, flags, resumed={**stored, "out": str(run)})
            assert isinstance(own, FinetuneConfig)
            return own, preset_of_run

        folder = distributed.on_rank_zero(open_folder)
        for position, number in enumerate(numbers, start=1):
            run = split_folder(folder, number)
            state = distributed.on_rank_zero(lambda: state_of(run, flags.get("epochs")))  # noqa: B023 (called at once)
            if distributed.rank() == 0:
                report.say(f"split {number} ({position} of {len(numbers)}): {state}")
            if state == FINISHED:
                continue
            own, own_preset = distributed.on_all_ranks(lambda: settings_of(run, number))  # noqa: B023
            try:
                finetune(command, own, own_preset, device, run if state == CONTINUED else None, True, open_accuracy)
            except Stopped as stopped:
                raise Stopped(f"split {number}: {stopped}; --resume {folder} continues all splits") from None
    if distributed.rank() == 0:
        report.say(
            f"done: {len(numbers)} splits in {folder}; evaluate them: "
            f"{command_of('eval')} accuracy --split all --checkpoint {folder}"
        )
    return folder


def state_of(run: Path, epochs: int | None) -> str:
    """Return FINISHED, CONTINUED or BEGUN: what is to be done with the run on one split.

    A run writes report.json at its end, and config.json when it begins or is continued.

    Args:
        epochs: the value of --epochs. A finished run of another number of epochs is continued; None: no run is.

    Raises UserError: a finished run would have to be continued, but it has no checkpoint any more.
    """
    end, start = run / "report.json", run / "config.json"
    finished = end.exists() and start.exists() and end.stat().st_mtime_ns >= start.stat().st_mtime_ns
    if finished and epochs in (None, configuration.read_config(start)[2].get("epochs")):
        return FINISHED
    if checkpoint.newest(run / "checkpoints"):
        return CONTINUED
    if finished:
        raise UserError(f"--resume: {run} holds a finished run without checkpoints: leave --epochs out")
    return BEGUN
