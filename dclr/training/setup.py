"""The start of every training run: kernels, precision, data set, folder and configuration, checked on all ranks."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dclr
from dclr import distributed, kernels, report
from dclr.config import AUTOMATIC, Config, DataConfig, FinetuneConfig, PretrainConfig, write_config
from dclr.data.catalog import describe_warnings
from dclr.data.datasets import make_demo
from dclr.data.failures import Failures, check_bad
from dclr.data.loader import BatchSampler
from dclr.data.prefetch import batches_on
from dclr.data.samples import TrainSamples
from dclr.data.videos import VideoSet
from dclr.errors import UserError
from dclr.lock import writing_to_run
from dclr.methods import METHODS
from dclr.models import Backbone, ClipFormat, backbone_without_memory, map_size
from dclr.models.weights import metadata_of, stored_statistics
from dclr.training import checkpoint, engine, machines
from dclr.training.batchnorm import check_batch_statistics
from dclr.training.compile import compile_backbone, compile_seconds, resolve_compile, start_compiling
from dclr.training.convolutions import resolve_convolutions
from dclr.training.opening import check_listed, describe_data, open_data_once, return_freed_memory
from dclr.training.signals import StopRequest

PUBLISHED_FILL_STEPS = 256

PUBLISHED_SIZE = 64 * 112
"""Width times side of the published recipe, as a measure of its cost."""

SLOW_ON_A_CPU = (
    "warning: no GPU is used. A step of the published size is 22 trillion operations, half a minute or more. "
    "--preset demo has a small network and small clips"
)

Monitor = Callable[[torch.nn.Module], dict[str, float]]
"""A measurement of a network on fixed videos during training: name in the log -> value. See evaluation/monitor.py."""

OpenMonitor = Callable[[DataConfig, torch.device], Monitor]
"""Opens the videos of a measurement. Raises UserError if the data set has none for it."""


@dataclass
class Run:
    """A started training run: its settings, its videos and its folder."""

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
    exchange: distributed.DelayedSum = field(default_factory=distributed.DelayedSum)
    compile_time_reported: bool = False
    failed_videos: int = 0
    """Videos that had failed on all ranks together when `any_rank_stops` last looked."""
    description: dict[str, str] = field(default_factory=dict)
    """The description of the network for files of weights (models/weights.py). `prepare` sets it."""
    listed: dict[str, Any] = field(default_factory=dict)
    """Entries of report.json about the data set, from `check_listed` and `open_data_once`."""

    @property
    def main(self) -> bool:
        """True on rank 0."""
        return distributed.rank() == 0

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes that the network tells apart; None in pretraining, which uses no labels."""
        return None if self.command == "pretrain" else list(self.videos.classes)

    @property
    def clips(self) -> ClipFormat:
        """The clips that the network is trained on."""
        data = self.config.data
        return ClipFormat(data.clip_length, data.clip_stride, data.crop_size)

    def say(self, message: str) -> None:
        """Print one line, on rank 0."""
        if self.main:
            report.say(message)

    def open_monitor(self, open_monitor: OpenMonitor) -> Monitor:
        """Open a measurement, which all ranks call together.

        Raises:
            UserError: on all ranks, the data set has no videos for it.
        """
        with distributed.without_timeout():
            monitor = distributed.on_all_ranks(lambda: open_monitor(self.config.data, self.device))
        return_freed_memory()
        return monitor

    def write_config(self) -> None:
        """Write config.json. Call this when nothing can be refused any more: a refused run leaves nothing behind."""
        path = self.folder / "config.json"
        self.write(lambda: write_config(path, self.command, self.preset, self.config))

    def prepare(self, *backbones: Backbone) -> None:
        """Apply --pad-channels, --convolutions, --recompute and --compile to backbones of one kind, in place.

        Call it before the engine wraps the backbones. In a resumed run they also get the statistics of its weights.
        `check_backbone` has checked the settings.
        """
        fused, convolutions = distributed.on_all_ranks(
            lambda: resolve_convolutions(
                self.config.run.convolutions, backbones[0], self.device, uses_bfloat16(self.ds_config)
            )
        )
        self.say(f"  {convolutions}")
        newest = checkpoint.newest_for_all(self.folder / "checkpoints") if self.resumed else None
        if newest is not None:
            for backbone in backbones:
                backbone.statistics = stored_statistics(newest)
        self.description = metadata_of(backbones[0], self.clips)
        if self.compiles:
            stage = self.ds_config.get("zero_optimization", {}).get("stage", 0)
            start_compiling(stage, self.config.run.recompute)
        for backbone in backbones:
            backbone.pad_channels(self.config.run.pad_channels)
            backbone.fuse(fused)
            if self.compiles:
                compile_backbone(backbone)
            elif self.config.run.recompute:
                backbone.recompute()

    def report_compile_time(self) -> None:
        """Print how long compiling took, once. Call it after each step that has used all networks."""
        if self.compiles and not self.compile_time_reported:
            self.say(f"  compiled in {compile_seconds():.0f} s")
        self.compile_time_reported = True

    def batch_sampler(self, start: int = 0) -> BatchSampler:
        """Return this rank's batch sampler from step `start` to the last step."""
        return BatchSampler(
            len(self.videos),
            self.config.optim.batch_size,
            self.config.optim.epochs,
            start=start,
            accumulation=int(self.ds_config.get("gradient_accumulation_steps", 1)),
            rank=distributed.rank(),
            ranks=distributed.world_size(),
        )

    def batches(self, samples: TrainSamples, sampler: BatchSampler) -> Iterator[Any]:
        """Yield the sampler's micro-batches on the run's device.

        Raises:
            UserError: on all ranks, there is too little memory for them.
        """
        workers, processes = self.config.data.workers, distributed.processes_of_machine()
        return distributed.on_all_ranks(lambda: batches_on(self.device, samples, sampler, workers, processes))

    def any_rank_stops(self, request: StopRequest, failures: Failures) -> bool:
        """Return whether any rank was asked to stop. Called once a step; all ranks learn of it at the same step.

        Raises:
            UserError: on all ranks, more than --max-bad percent of the videos have failed.
        """
        asked, failed = self.exchange.add(request.asked, len(failures.reasons))
        if failed > self.failed_videos:
            self.failed_videos = failed
            check_bad(self.videos, self.all_failures(failures)[0], self.config.data.max_bad)
        return asked > 0

    def write(self, work: Callable[[], None]) -> None:
        """Run `work`, which writes into the run's folder, on rank 0.

        Raises:
            UserError: on all ranks, the folder cannot be written, or another process has taken it over.
        """

        def attempt() -> None:
            with writing_to_run(self.folder):
                work()

        distributed.on_rank_zero(attempt)

    def all_failures(self, failures: Failures) -> tuple[dict[str, str], int]:
        """Return the failed videos of all ranks (path -> reason) and the number of failed reads.

        Rank 0 of a resumed run starts with the failures from before it was resumed.
        """
        everyone = distributed.gather_objects((failures.reasons, failures.count))
        return {k: v for reasons, _ in everyone for k, v in reasons.items()}, sum(count for _, count in everyone)

    def write_report(self, content: dict[str, Any], failures: Failures, seconds: float, steps_now: int) -> None:
        """Write report.json: what every run reports, and `content`.

        If a finished run was resumed and had no step left, the report that it has is kept.

        Args:
            seconds: the training time over all parts of a resumed run.
            steps_now: the steps since the last start.
        """
        file = self.folder / "report.json"
        reasons, failed_reads = self.all_failures(failures)
        steps = self.batch_sampler().stop
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
                "shown": {name: len(found) for name, found in self.videos.source.displays.unusual().items()},
                **self.listed,
            },
            "processes": distributed.world_size(),
            "precision": self.precision,
            "compile_seconds": round(compile_seconds(), 1),
            "steps": steps,
            "seconds": round(seconds, 1),
            "samples_per_second": round(steps * self.config.optim.batch_size / seconds, 2),
            "environment": report.environment(self.device),
            **content,
        }
        self.write(lambda: report.write_json(file, content) if steps_now or not file.exists() else None)


@contextmanager
def start_run(
    command: str, preset: str, config: Config, device: torch.device, resume: Path | None, replace: bool = False
) -> Iterator[Run]:
    """Open the run's folder, check all settings, open the videos and print what runs.

    Inside the context, no other process writes to the folder. See report.open_run for `resume` and `replace`.

    Raises:
        UserError: on all ranks, a setting, the data set or the folder is wrong.
    """
    with ExitStack() as stack:
        folder = distributed.on_rank_zero(
            lambda: stack.enter_context(report.open_run(config.run.out, command, resume, replace))
        )
        yield prepare_run(command, preset, config, folder, device, resume is not None)


def prepare_run(command: str, preset: str, config: Config, folder: Path, device: torch.device, resumed: bool) -> Run:
    """Check all settings, open the videos and print what runs.

    Raises:
        UserError: on all ranks, a setting or the data set is wrong.
    """
    ds_config = distributed.on_all_ranks(lambda: engine.read_ds_config(find_ds_config(config.run.ds_config)))
    settings = {f"--ds_config {name}": value for name, value in ds_config.items()}
    machines.check_same(settings, "give all processes the same file")
    micro_batch = engine.micro_batch_size(ds_config, config.optim.batch_size)
    if command != "linear":  # whose BatchNorm does not use statistics of the batch
        check_batch_statistics(config, micro_batch)
    check_micro_batch(config, micro_batch)
    precision = engine.resolve_precision(ds_config, device)
    choose_kernels(config.run.kernels, device)
    choose_algorithms(config.run.deterministic)
    compiles, compiling = distributed.on_all_ranks(lambda: resolve_compile(config.run.compile, device))
    machines.check_same(
        {"precision": precision, "kernels": kernels.describe(device), "compiled": compiles},
        "use machines of one kind, or choose what all of them can do with --ds_config, --kernels and --compile",
    )
    distributed.on_all_ranks(lambda: check_backbone(config, device, uses_bfloat16(ds_config), compiles))
    if not config.data.data:
        distributed.on_rank_zero(make_demo)
    videos, catalog, few_labels = open_data_once(command, config)
    config = choose_fill_steps(config, len(videos))
    check_videos(config, videos)
    listed = check_listed(command, catalog, videos)
    reading = describe_data(catalog, few_labels) if catalog is not None else []
    warnings = describe_warnings(catalog) if catalog is not None else []
    del catalog  # a million videos are a gigabyte of Python objects
    return_freed_memory()

    run = Run(command, preset, config, folder, device, ds_config, precision, compiles, videos, resumed)
    run.listed = {**listed, **few_labels}
    run.say(f"{command}: preset {preset}, {len(videos)} videos of {videos.root} ({videos.layout})")
    for line in reading:
        run.say(f"  {line}")
    for line in warnings if run.main else []:
        print(line, file=sys.stderr)
    if videos.unreadable:
        run.say(
            f"  {len(videos.unreadable)} videos cannot be read and are skipped: "
            "report.json and train.py check --report FILE list them"
        )
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    run.say(
        f"  {distributed.world_size()} process(es) on {device.type}, "
        f"{torch.get_num_threads()} thread(s) each; ZeRO stage {stage}; {precision}"
    )
    run.say(f"  kernels: {kernels.describe(device)}")
    run.say(f"  {compiling}")
    if isinstance(config, PretrainConfig) and config.method.fill_steps:
        run.say(f"  the first {config.method.fill_steps} of {run.batch_sampler().stop} steps only fill the queue")
    if device.type == "cpu" and config.model.width * config.data.crop_size >= PUBLISHED_SIZE and run.main:
        print(SLOW_ON_A_CPU, file=sys.stderr)
    run.say(f"  writing to {folder}")
    return run


def check_backbone(config: Config, device: torch.device, bfloat16: bool, compiles: bool) -> None:
    """Check the settings that depend on the backbone, before all videos are verified, which may take hours.

    Args:
        bfloat16: whether the run computes in bfloat16.
        compiles: whether the backbones will be compiled.

    Raises:
        UserError: the clips are too small for the backbone; see resolve_convolutions; --recompute has no effect on it.
    """
    backbone = backbone_without_memory(config.model.backbone, config.model.width)
    map_size(backbone, config.data.clip_length, config.data.crop_size)
    resolve_convolutions(config.run.convolutions, backbone, device, bfloat16)
    if config.run.recompute and not compiles and not backbone.recompute():
        raise UserError(
            f"--recompute has no effect on {backbone.name}, which does not define `recompute`: leave the flag out, or "
            "use --compile on"
        )


def uses_bfloat16(ds_config: dict[str, Any]) -> bool:
    """Return whether a run computes in bfloat16. `ds_config`: as `engine.resolve_precision` leaves it."""
    return bool(ds_config.get("torch_autocast", {}).get("enabled"))


def check_micro_batch(config: Config, micro_batch: int) -> None:
    """Raise UserError if a micro-batch has fewer clips than the method needs. `micro_batch`: its clips on one rank."""
    if not isinstance(config, PretrainConfig):
        return
    name, ranks = config.method.method, distributed.world_size()
    method, found = METHODS[name], f"--batch-size {config.optim.batch_size} gives micro-batches of"
    if micro_batch < method.smallest_micro_batch:
        raise UserError(
            f"{found} {micro_batch} clip(s) on each of {ranks} process(es), but --method {name} needs at least "
            f"{method.smallest_micro_batch}: raise --batch-size, or lower gradient_accumulation_steps in --ds_config"
        )
    if method.in_batch_negatives and micro_batch * ranks < 2:
        raise UserError(
            f"{found} 1 clip, but --method {name} takes the other clips of a micro-batch as negatives: "
            "raise --batch-size, or lower gradient_accumulation_steps in --ds_config"
        )


def find_ds_config(name: str) -> Path:
    """Return the file that --ds_config names: a path, or a file of ds_configs/ without or with folder and suffix."""
    own = Path(dclr.__file__).parent / "ds_configs" / f"{Path(name).stem}.json"
    is_own = Path(name).parent in (Path(), Path("ds_configs")) and os.path.exists(own)
    return own if is_own and not os.path.exists(name) else Path(name)


def choose_fill_steps(config: Config, videos: int) -> Config:
    """Return the settings with a number in place of AUTOMATIC for --fill-steps. The run's config.json keeps the number.

    A run of 2,560 or more steps gets the published 256, and a shorter run gets a tenth of its steps. If more are needed
    to fill the queue, the run gets what fills it, but at most half of its steps.
    """
    if not isinstance(config, PretrainConfig) or config.method.fill_steps != AUTOMATIC:
        return config
    steps = videos // config.optim.batch_size * config.optim.epochs
    fills_queue = math.ceil(config.method.queue_length / (config.optim.batch_size * config.method.keys_per_sample))
    chosen = max(min(PUBLISHED_FILL_STEPS, steps // 10), min(fills_queue, steps // 2))
    return dataclasses.replace(config, method=dataclasses.replace(config.method, fill_steps=chosen))


def check_videos(config: Config, videos: VideoSet) -> None:
    """Check that the train split's videos are enough for the run.

    Raises:
        UserError: too many unreadable videos; fewer videos than a batch; no step left after --fill-steps.
    """
    check_bad(videos, {}, config.data.max_bad)
    few = config.transfer.few_labels if isinstance(config, FinetuneConfig) else ""
    if few and len(videos) < config.optim.batch_size:
        raise UserError(
            f"--batch-size is {config.optim.batch_size}, but {few} leaves {len(videos)} readable training videos: "
            f"lower --batch-size, or raise {few.split()[0]}"
        )
    steps = BatchSampler(len(videos), config.optim.batch_size, config.optim.epochs).stop
    if isinstance(config, PretrainConfig) and config.method.fill_steps >= steps:
        raise UserError(
            f"--fill-steps is {config.method.fill_steps}, but must be below the run's {steps} steps, "
            "or nothing is trained: lower it, or raise --epochs"
        )


def choose_kernels(backend: str, device: torch.device) -> None:
    """Choose the implementation of the kernels for this process.

    Raises:
        UserError: they cannot run on `device`.
    """
    try:
        kernels.set_backend(backend)
        kernels.describe(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--kernels {backend}: {error}") from None


def choose_algorithms(deterministic: bool) -> None:
    """Choose torch's algorithms for this process.

    With `deterministic`, an operation without a deterministic algorithm raises a RuntimeError that names it.
    """
    if deterministic:
        # cuBLAS reads this when it is first used, and is not deterministic without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
