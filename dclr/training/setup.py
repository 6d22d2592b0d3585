"""How every training run starts: processes, folder, configuration, videos, each settled on all ranks before the next."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kernels
from dclr import config as configuration
from dclr import distributed, report
from dclr.config import Config, DataConfig, OptimConfig, PretrainConfig
from dclr.data.catalog import Catalog
from dclr.data.datasets import make_demo, open_data
from dclr.data.failures import Failures, check_bad
from dclr.data.loader import BatchSampler
from dclr.data.prefetch import batches_on
from dclr.data.samples import TrainSamples
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.models import Backbone
from dclr.training import engine
from dclr.training.compile import compile_backbone, compile_seconds, settle_compile
from dclr.training.signals import Stopped, StopRequest

_MOVING: dict[str, Any] = {
    "videos": int, "fingerprint": str, "summary": dict, "last": dict, "failures": list, "seconds": (int, float), "skipped": int
}  # fmt: skip
"""What a checkpoint's state holds beside the step, which checkpoint.py looks at. Each may come from somebody else's file."""


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
    exchange: distributed.Exchange = field(default_factory=distributed.Exchange)
    told: bool = False  # how long compiling took
    failed: int = 0  # videos on the ranks, added up, that `agree` has looked at

    @property
    def main(self) -> bool:
        return distributed.rank() == 0

    def say(self, message: str) -> None:
        if self.main:
            report.say(message)

    def write_config(self) -> None:
        """config.json. A resumed run calls it once its checkpoint is loaded, so that a refused flag leaves no trace."""
        path = self.folder / "config.json"
        self.write(lambda: configuration.write_config(path, self.command, self.preset, self.config))

    def prepare(self, *backbones: Backbone) -> None:
        """As --pad-channels and --compile say. Before the engine wraps them: they are changed in place."""
        if self.compiles:
            # Compiled code may count on weights that begin at multiples of 16 bytes. In the flat buffers of ZeRO they do not, but neither
            # the graphs of this process nor the cache on disk (torch 2.11, extract_tensor_metadata_for_cache_key) tell networks apart
            # by that: what was compiled for ddp.json ends in "misaligned address" here (docs/LOG.md).
            torch.compiler.reset()
            torch.compiler.config.cache_key_tag = f"ZeRO {self.ds_config.get('zero_optimization', {}).get('stage', 0)}"
        for backbone in backbones:
            backbone.pad_channels(self.config.run.pad_channels)
            if self.compiles:
                compile_backbone(backbone)

    def tell_compile_time(self) -> None:
        """Once, after the first step that went through all networks."""
        if self.compiles and not self.told:
            self.say(f"  compiled in {compile_seconds():.0f} s")
        self.told = True

    def schedule(self, start: int = 0) -> BatchSampler:
        return BatchSampler(
            len(self.videos), self.config.optim.batch_size, self.config.optim.epochs,
            start=start, accumulation=int(self.ds_config.get("gradient_accumulation_steps", 1)),
            rank=distributed.rank(), ranks=distributed.world_size(),
        )  # fmt: skip

    def batches(self, samples: TrainSamples, schedule: BatchSampler) -> Iterator[Any]:
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
            return {"step": 0, "summary": {}, "last": {}, "failures": ({}, 0), "seconds": 0.0, "skipped": 0}
        state = own.resume(self.folder / "checkpoints")
        wrong = [name for name, kinds in _MOVING.items() if not isinstance(state.get(name), kinds)]
        if wrong or [type(part) for part in state["failures"]] != [dict, int]:
            raise UserError(
                f"--resume {self.folder}: its checkpoint is of no training run ({(wrong or ['failures'])[0]})"
            )
        videos, stop = len(self.videos), self.schedule().stop
        if (state["videos"], state["fingerprint"]) != (videos, self.videos.fingerprint()):
            same = "as many, but not the same"
            told = same if state["videos"] == videos else f"{state['videos']} readable videos then, {videos} now"
            raise UserError(
                f"--resume {self.folder}: the videos of {self.videos.root} are not those it was trained on ({told}): "
                "bring them back, or start another run"
            )
        if state["step"] > stop:
            raise UserError(
                f"--resume {self.folder}: it is at step {state['step']}, beyond the {stop} of --epochs: raise --epochs"
            )
        self.write_config()
        self.say(f"  resumed at step {state['step']}")
        return state

    def save(
        self,
        own: engine.Engine,
        step: int,
        state: dict[str, Any],
        failures: Failures,
        seconds: float,
        loss: float | None,
    ) -> None:
        """A checkpoint that `resume` reads. `loss`: what the best checkpoint, which is kept, is the lowest of.

        Raises UserError on all ranks: it cannot be written.
        """
        state = {
            **state,
            "failures": self.all_failures(failures),
            "seconds": seconds,
            "videos": len(self.videos),
            "fingerprint": self.videos.fingerprint(),
            "loss": loss,
        }
        own.save(self.folder / "checkpoints", step, state)

    def agree(self, request: StopRequest, failures: Failures) -> bool:
        """Once a step: whether any rank was asked to stop. All ranks learn it at the same step.

        Raises UserError on all: more than --max-bad of the videos have failed.
        """
        asked, failed = self.exchange.add(request.asked, len(failures.reasons))
        if failed > self.failed:
            self.failed = failed
            check_bad(self.videos, self.all_failures(failures)[0], self.config.data.max_bad)
        return asked > 0

    def write(self, work: Callable[[], None]) -> None:
        """`work`, on rank 0, which writes into the run's folder. Raises UserError on all ranks: it cannot."""

        def attempt() -> None:
            try:
                work()
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder} ({error.strerror}): make room or mend it, then --resume"
                ) from None

        distributed.on_rank_zero(attempt)

    def stopped(self, step: int) -> Stopped:
        """To be raised once the checkpoint of that step is written."""
        self.exchange.finish()
        return Stopped(f"asked to stop: checkpoint written at step {step}; --resume {self.folder} goes on")

    def all_failures(self, failures: Failures) -> tuple[dict[str, str], int]:
        """Reasons by path and the number of failed reads, over all ranks. Rank 0 of a resumed run goes on from them."""
        everyone = distributed.gather_objects((failures.reasons, failures.count))
        return {k: v for reasons, _ in everyone for k, v in reasons.items()}, sum(count for _, count in everyone)

    def write_report(self, content: dict[str, Any], failures: Failures, seconds: float) -> None:
        """report.json, on rank 0. `seconds` of training, over all parts of a resumed run."""
        reasons, failed_reads = self.all_failures(failures)
        content = {
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
        }
        self.write(lambda: report.write_json(self.folder / "report.json", content))


def start_run(command: str, preset: str, config: Config, device: torch.device, resume: Path | None) -> Run:
    """Settle everything a training loop needs. Raises UserError on all ranks where anything given is wrong."""
    ds_config = distributed.together(lambda: engine.read_ds_config(Path(config.run.ds_config)))
    engine.micro_batch_size(ds_config, config.optim.batch_size)
    precision = engine.settle_precision(ds_config, device)
    choose_kernels(config.run.kernels, device)
    choose_algorithms(config.run.deterministic)
    compiles, compiling = distributed.together(lambda: settle_compile(config.run.compile, device))
    if not config.data.data:
        distributed.on_rank_zero(make_demo)
    catalog = distributed.together(lambda: open_data(config.data))
    videos = open_videos_once(catalog, config.data)
    check_bad(videos, {}, config.data.max_bad)
    if command != "pretrain" and (videos.labels < 0).any():
        raise UserError(f"--data {catalog.root}: its videos have no labels, which {command} needs; use class folders")
    steps = BatchSampler(len(videos), config.optim.batch_size, config.optim.epochs).stop  # refuses too large a batch
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
    if catalog.missing:
        run.say(f"  {len(catalog.missing)} listed videos are not on disk: named by train.py check")
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


def choose_algorithms(deterministic: bool) -> None:
    """For this process. An operation that has no deterministic algorithm raises RuntimeError, which names it."""
    if deterministic:
        # What cuBLAS needs for it, read when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def open_videos_once(catalog: Catalog, data: DataConfig) -> VideoSet:
    """The train split's readable videos: verified by one process a machine, then read from its cache by the others."""
    first = engine.local_rank() == 0
    workers, timeout = max(1, data.workers), data.video_timeout
    with distributed.patience():
        videos = distributed.together(
            lambda: open_videos(catalog, "train", workers, timeout=timeout) if first else None
        )
        videos = videos or open_videos(catalog, "train", workers, progress=False, timeout=timeout)
        if len(set(distributed.gather_objects(videos.fingerprint()))) > 1:
            raise UserError(
                f"--data {catalog.root}: the processes find different videos there; every machine must see the same files"
            )
    return videos


def learning_rate(optim: OptimConfig, epoch: int) -> float:
    """A tenth for each milestone that has passed."""
    return optim.lr * 0.1 ** sum(epoch >= milestone for milestone in optim.milestones)


class MeanLoss:
    """Of the steps since it was last asked for, over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._sum, self._count = torch.zeros((), device=device), 0

    def add(self, loss: torch.Tensor) -> None:
        self._sum = self._sum + loss.detach()
        self._count += 1

    def take(self) -> float | None:
        """None: there was no loss, or one was not finite."""
        mean = distributed.mean_over_ranks(self._sum / max(self._count, 1)).item()
        count, self._count, self._sum = self._count, 0, torch.zeros_like(self._sum)
        return mean if count and math.isfinite(mean) else None
