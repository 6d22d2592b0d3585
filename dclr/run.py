"""How every training run starts: processes, folder, configuration, videos, each settled on all ranks before the next."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dclr import config as configuration
from dclr import distributed, engine, report
from dclr.config import Config, DataConfig, OptimConfig
from dclr.data.catalog import Catalog, open_catalog
from dclr.data.demo import render_demo
from dclr.data.loader import Schedule, VideoSet, open_videos

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
    videos: VideoSet
    resumed: bool
    began: float

    @property
    def main(self) -> bool:
        return distributed.rank() == 0

    def say(self, message: str) -> None:
        if self.main:
            report.say(message)

    def schedule(self, start: int = 0) -> Schedule:
        return Schedule(
            len(self.videos.videos), self.config.optim.batch_size, self.config.optim.epochs,
            start=start, accumulation=int(self.ds_config.get("gradient_accumulation_steps", 1)),
            rank=distributed.rank(), ranks=distributed.world_size(),
        )  # fmt: skip

    def write_report(self, content: dict[str, Any], failures: dict[str, str], failed_reads: int) -> None:
        """report.json, on rank 0; failures are gathered from all ranks."""
        everyone = distributed.gather_objects((failures, failed_reads))
        if not self.main:
            return
        report.write_json(
            self.folder / "report.json",
            {
                "command": self.command,
                "preset": self.preset,
                "data": {
                    "folder": str(self.videos.catalog.root),
                    "layout": self.videos.catalog.layout,
                    "videos": len(self.videos.videos),
                    "unreadable": self.videos.unreadable,
                    "failed_while_training": {k: v for reasons, _ in everyone for k, v in reasons.items()},
                    "failed_reads": sum(count for _, count in everyone),
                },
                "processes": distributed.world_size(),
                "precision": self.precision,
                "seconds": round(time.time() - self.began, 1),
                "environment": report.environment(self.device),
                **content,
            },
        )


def start_run(command: str, preset: str, config: Config, device: torch.device, resume: Path | None) -> Run:
    """Settle everything a training loop needs. Raises UserError on all ranks where anything given is wrong."""
    began = time.time()
    ds_config = distributed.together(lambda: engine.read_ds_config(Path(config.run.ds_config)))
    engine.micro_batch_size(ds_config, config.optim.batch_size)
    precision = engine.settle_precision(ds_config, device)
    if not config.data.data:
        distributed.on_rank_zero(make_demo)
    catalog = distributed.together(lambda: open_data(config.data))
    videos = open_videos_once(catalog, config.data)
    Schedule(
        len(videos.videos), config.optim.batch_size, config.optim.epochs
    )  # refuses a batch larger than the data set

    folder = distributed.on_rank_zero(lambda: resume or report.open_run(config.run.out, command))
    if distributed.rank() == 0:
        configuration.write_config(folder / "config.json", command, preset, config)
    run = Run(command, preset, config, folder, device, ds_config, precision, videos, resume is not None, began)
    run.say(f"{command}: preset {preset}, {len(videos.videos)} videos of {catalog.root} ({catalog.layout})")
    if videos.unreadable:
        run.say(
            f"  {len(videos.unreadable)} videos cannot be read and are left out: listed in report.json, and by train.py check"
        )
    run.say(
        f"  {distributed.world_size()} process(es) on {device.type}, {torch.get_num_threads()} thread(s) each; {precision}"
    )
    run.say("  kernels: reference (plain torch and kornia)")
    run.say(f"  writing to {folder}")
    return run


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
    workers = max(1, data.workers)
    videos = distributed.together(lambda: open_videos(catalog, "train", workers) if first else None)
    return videos or open_videos(catalog, "train", workers, progress=False)


def learning_rate(optim: OptimConfig, epoch: int) -> float:
    """A tenth for each milestone that has passed."""
    return optim.lr * 0.1 ** sum(epoch >= milestone for milestone in optim.milestones)
