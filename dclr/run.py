"""How every training run starts: processes, folder, configuration, videos, each settled on all ranks before the next."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from dclr import config as configuration
from dclr import distributed, engine, report
from dclr.compiled import compile_backbone, compile_seconds, settle_compile
from dclr.config import Config, DataConfig, OptimConfig, PretrainConfig
from dclr.data.catalog import Catalog, open_catalog
from dclr.data.demo import render_demo
from dclr.data.loader import Failures, Schedule, TrainSamples, check_bad
from dclr.data.prefetch import batches_on
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.models import Backbone

DEMO_VIDEOS = Path("runs") / "demo-videos"


@dataclass
class Run:
    """A started run."""

    command: str
    preset: str
    config: Config
    folder: Path
    device: torch.device
    ds_config: dict[str, Any]
    precision: str
    compiles: bool
    videos: VideoSet
    resumed: bool
    told: bool = False  # how long compiling took

    @property
    def main(self) -> bool:
        return distributed.rank() == 0

    def say(self, message: str) -> None:
        if self.main:
            report.say(message)

    def write_config(self) -> None:
        """config.json, on rank 0. A resumed run calls it once its checkpoint is loaded, so that a refused flag leaves no trace."""
        if self.main:
            configuration.write_config(self.folder / "config.json", self.command, self.preset, self.config)

    def prepare(self, *backbones: Backbone) -> None:
        """As --pad-channels and --compile say. Before the engine wraps them: they are changed in place."""
        for backbone in backbones:
            backbone.pad_channels(self.config.run.pad_channels)
            if self.compiles:
                compile_backbone(backbone)

    def tell_compile_time(self) -> None:
        """Once, after the first step that went through all networks."""
        if self.compiles and not self.told:
            self.say(f"  compiled in {compile_seconds():.0f} s")
        self.told = True

    def schedule(self, start: int = 0) -> Schedule:
        return Schedule(
            len(self.videos), self.config.optim.batch_size, self.config.optim.epochs,
            start=start, accumulation=int(self.ds_config.get("gradient_accumulation_steps", 1)),
            rank=distributed.rank(), ranks=distributed.world_size(),
        )  # fmt: skip

    def batches(self, samples: TrainSamples, schedule: Schedule) -> Iterator[Any]:
        """The schedule's micro-batches on the run's device. Raises UserError on all ranks: there is too little memory for them."""
        return distributed.together(
            lambda: batches_on(
                self.device, samples, schedule, self.config.data.workers, distributed.processes_of_machine()
            )
        )

    def resume(self, own: engine.Engine) -> dict[str, Any]:
        """What the newest checkpoint holds beside the network, loaded into `own`; for a new run, the same at step 0.

        Raises UserError: see Engine.resume; a data set that has changed, or an end of training that has passed.
        """
        if not self.resumed:
            return {"step": 0, "summary": {}, "last": {}, "failures": ({}, 0), "seconds": 0.0}
        state = own.resume(self.folder / "checkpoints")
        videos, stop = len(self.videos), self.schedule().stop
        if state["videos"] != videos:
            raise UserError(
                f"--resume {self.folder}: it was trained on {state['videos']} readable videos and {self.videos.root} "
                f"has {videos} now, which changes every epoch's order; start another run"
            )
        if state["step"] > stop:
            raise UserError(
                f"--resume {self.folder}: it is at step {state['step']}, beyond the {stop} of --epochs: raise --epochs"
            )
        self.write_config()
        self.say(f"  resumed at step {state['step']}")
        return state

    def save(self, own: engine.Engine, step: int, state: dict[str, Any], failures: Failures, seconds: float) -> None:
        """A checkpoint that `resume` reads."""
        state = {
            **state,
            "failures": self.all_failures(failures),
            "seconds": seconds,
            "videos": len(self.videos),
        }
        own.save(self.folder / "checkpoints", step, state)

    def all_failures(self, failures: Failures) -> tuple[dict[str, str], int]:
        """Reasons by path and the number of failed reads, over all ranks. Rank 0 of a resumed run goes on from them."""
        everyone = distributed.gather_objects((failures.reasons, failures.count))
        return {k: v for reasons, _ in everyone for k, v in reasons.items()}, sum(count for _, count in everyone)

    def write_report(self, content: dict[str, Any], failures: Failures, seconds: float) -> None:
        """report.json, on rank 0. `seconds` of training, over all parts of a resumed run."""
        reasons, failed_reads = self.all_failures(failures)
        if not self.main:
            return
        report.write_json(
            self.folder / "report.json",
            {
                "command": self.command,
                "preset": self.preset,
                "data": {
                    "folder": str(self.videos.root),
                    "layout": self.videos.layout,
                    "videos": len(self.videos),
                    "unreadable": self.videos.unreadable,
                    "failed_while_training": reasons,
                    "failed_reads": failed_reads,
                },
                "processes": distributed.world_size(),
                "precision": self.precision,
                "compile_seconds": round(compile_seconds(), 1),
                "steps": self.schedule().stop,
                "seconds": round(seconds, 1),
                "samples_per_second": round(self.schedule().stop * self.config.optim.batch_size / seconds, 2),
                "environment": report.environment(self.device),
                **content,
            },
        )


def start_run(command: str, preset: str, config: Config, device: torch.device, resume: Path | None) -> Run:
    """Settle everything a training loop needs. Raises UserError on all ranks where anything given is wrong."""
    ds_config = distributed.together(lambda: engine.read_ds_config(Path(config.run.ds_config)))
    engine.micro_batch_size(ds_config, config.optim.batch_size)
    precision = engine.settle_precision(ds_config, device)
    choose_kernels(config.run.kernels, device)
    compiles, compiling = distributed.together(lambda: settle_compile(config.run.compile, device))
    if not config.data.data:
        distributed.on_rank_zero(make_demo)
    catalog = distributed.together(lambda: open_data(config.data))
    videos = open_videos_once(catalog, config.data)
    check_bad(videos, {}, config.data.max_bad)
    if command != "pretrain" and (videos.labels < 0).any():
        raise UserError(f"--data {catalog.root}: its videos have no labels, which {command} needs; use class folders")
    steps = Schedule(len(videos), config.optim.batch_size, config.optim.epochs).stop  # refuses too large a batch
    if isinstance(config, PretrainConfig) and config.method.fill_steps >= steps:
        raise UserError(
            f"--fill-steps is {config.method.fill_steps}, but must be below the run's {steps} steps, or nothing is trained: "
            "lower it, or raise --epochs"
        )

    folder = distributed.on_rank_zero(lambda: resume or report.open_run(config.run.out, command))
    run = Run(command, preset, config, folder, device, ds_config, precision, compiles, videos, resume is not None)
    if not run.resumed:
        run.write_config()
    run.say(f"{command}: preset {preset}, {len(videos)} videos of {catalog.root} ({catalog.layout})")
    if videos.unreadable:
        run.say(
            f"  {len(videos.unreadable)} videos cannot be read and are left out: listed in report.json, and by train.py check"
        )
    run.say(
        f"  {distributed.world_size()} process(es) on {device.type}, {torch.get_num_threads()} thread(s) each; {precision}"
    )
    run.say(f"  kernels: {kernels.describe(device)}")
    run.say(f"  {compiling}")
    run.say(f"  writing to {folder}")
    return run


def choose_kernels(backend: str, device: torch.device) -> None:
    """For this process. Raises UserError: they cannot run on `device`."""
    try:
        kernels.set_backend(backend)
        kernels.describe(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--kernels {backend}: {error}") from None


def make_demo() -> None:
    """Render the built-in demo videos, once."""
    report.say(f"no --data: using the built-in demo videos in {DEMO_VIDEOS}")
    render_demo(DEMO_VIDEOS)


def open_data(data: DataConfig) -> Catalog:
    """The data set that was asked for, or the demo videos where none was."""
    return open_catalog(Path(data.data), data.split) if data.data else open_catalog(DEMO_VIDEOS)


def open_videos_once(catalog: Catalog, data: DataConfig) -> VideoSet:
    """The train split's readable videos: verified by one process a machine, then read from its cache by the others."""
    first = engine.local_rank() == 0
    workers, timeout = max(1, data.workers), data.video_timeout
    videos = distributed.together(lambda: open_videos(catalog, "train", workers, timeout=timeout) if first else None)
    return videos or open_videos(catalog, "train", workers, progress=False, timeout=timeout)


def learning_rate(optim: OptimConfig, epoch: int) -> float:
    """A tenth for each milestone that has passed."""
    return optim.lr * 0.1 ** sum(epoch >= milestone for milestone in optim.milestones)


class FiniteLoss:
    """The first step whose loss was no finite number. Asked only where numbers are read anyway, so that nothing waits for the device;
    asked before every checkpoint. DeepSpeed's own look at the gradients would make every step wait, so its configurations turn it off."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.zeros(1, dtype=torch.int64, device=device)

    def see(self, loss: torch.Tensor, step: int) -> None:
        self._first = torch.where((self._first == 0) & ~loss.detach().isfinite(), step, self._first)

    def check(self) -> None:
        """Raises UserError on all ranks where any has seen one."""
        if steps := [step for step in distributed.gather_batch(self._first).tolist() if step]:
            raise UserError(
                f"the loss is not finite at step {min(steps)}: lower --lr; checkpoints before it are intact"
            )
