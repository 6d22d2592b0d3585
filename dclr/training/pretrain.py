"""Pretraining without labels by a method of METHODS: what one micro-batch computes, and what is logged about it."""

import math
import shlex
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dclr import distributed
from dclr.config import PRESETS, PretrainConfig, as_flag, flat, resolve
from dclr.data.augmentation import pretrain_recipe, view_grid
from dclr.data.samples import PairBatch, PairSamples, TrainSamples
from dclr.kernels import Views, generate_views
from dclr.kernels.space_to_depth import depth_to_space
from dclr.methods import METHODS, Method
from dclr.models import Backbone, build_backbone, load_backbone, save_backbone
from dclr.programs import command_of
from dclr.report import Stopwatch
from dclr.training.batchnorm import average_statistics
from dclr.training.engine import Engine
from dclr.training.exchange import Clips, clips_of, crops_are_smaller, send_crops, send_views
from dclr.training.loop import common_bar, common_metrics, measure_on_all_ranks, train
from dclr.training.setup import Monitor, OpenMonitor, Run, start_run

GRID_CLIPS = 4
"""Clips in the picture of the three views."""


def pretrain(
    config: PretrainConfig,
    preset: str,
    device: torch.device,
    resume: Path | None = None,
    replace: bool = False,
    open_knn: OpenMonitor | None = None,
) -> Path:
    """Pretrain a backbone and return the run's folder, which then holds backbone.safetensors.

    Args:
        resume: folder of the run to continue; None begins a run.
        replace: the new run may replace a run in --out that has no checkpoint.
        open_knn: opens the measurement of the backbone that --knn-every asks for.

    Raises:
        UserError: see check_start, start_run, Engine and train.
        Stopped: a signal asked the run to stop. A checkpoint is written.
    """
    if resume is None:
        check_start(config)
    with start_run("pretrain", preset, config, device, resume, replace) as run:
        config = cast(PretrainConfig, run.config)
        torch.manual_seed(config.run.seed)
        network = METHODS[config.method.method].build(config)
        partners = ", ".join(("rgb", *config.method.auxiliary_views))
        start = load_start(network, config.start.init) if not run.resumed else "the run's checkpoint"
        run.say(f"  start: {start}")
        run.say(f"  {config.method.method}: rgb clips contrasted with {partners}")
        run.prepare(*(module for module in network.modules() if isinstance(module, Backbone)))
        engine = Engine(network, run.ds_config, config.optim, device)
        recipe = pretrain_recipe(config.method.jitter, config.method.augmentation, config.method.jitter_form)
        same_frames, distinct = network.same_frames, config.method.distinct_starts
        crops = crops_are_smaller(config, recipe, run.videos, engine.view_dtype)
        samples = PairSamples(run.videos, config.data, config.run.seed, recipe, same_frames, distinct)
        knn = run.open_monitor(open_knn) if open_knn and config.monitor.knn_every else None
        task = Pretraining(network, engine, config, samples, knn, crops)
        trained = train(run, task, engine)

        average_statistics(network.query.backbone)
        file = run.folder / "backbone.safetensors"
        run.write(lambda: save_backbone(network.query.backbone, file, run.clips, network.query.heads))
        start = f"{config.start.init or 'random weights'}, and later a checkpoint of this run" if run.resumed else start
        content = {"start": start, **task.summary, **trained.report()}
        run.write_report(content, trained.failures, trained.seconds, trained.steps)
        run.say(f"done: {file}")
        for line in next_steps(run):
            run.say(f"  {line}")
        return run.folder


def next_steps(run: Run) -> list[str]:
    """Return lines with commands that use the backbone, as the user can type them."""
    data = f" --data {shlex.quote(run.config.data.data)}" if run.config.data.data else ""
    checkpoint = shlex.quote(str(run.folder))
    if not run.videos.classes or (run.videos.labels < 0).any():
        features = shlex.quote(f"{run.folder}-features.npz")
        return [f"next: {command_of('eval')} features --checkpoint {checkpoint}{data} --out {features}"]
    same = ("clip_length", "clip_stride", "crop_size", "split", "allow_outside", "backbone", "width")
    preset = run.preset if run.preset in PRESETS else "ucf101"
    ours, theirs = flat(run.config), flat(resolve("finetune", preset, {}))
    flags = "".join(f" {as_flag(name, ours[name])}" for name in same if ours[name] != theirs[name])
    out = shlex.quote(f"{run.folder}-finetune")
    return [
        f"next: {command_of('train')} finetune --preset {preset}{data}{flags} --pretrained {checkpoint} --out {out}",
        f"  or: {command_of('eval')} retrieval --checkpoint {checkpoint}{data}",
    ]


def check_start(config: PretrainConfig) -> None:
    """Try to load the weights that --init names, if any, before all videos are verified, which may take minutes.

    Raises:
        UserError: on all ranks, see load_backbone.
    """
    if init := config.start.init:
        trial = build_backbone(config.model.backbone, config.model.width)
        distributed.on_all_ranks(lambda: load_backbone(Path(init), trial))


def load_start(network: Method, init: str) -> str:
    """Load the weights that --init names, if any, into the query encoder, and the key encoder if there is one.

    Heads are loaded where the file has heads of the same name and shape.

    Returns:
        one line that says what the run starts from.

    Raises:
        UserError: on all ranks, see load_backbone.
    """
    if not init:
        return "random weights"
    query = network.query
    start = distributed.on_all_ranks(lambda: load_backbone(Path(init), query.backbone, query.heads))
    network.reset_key()
    return start


class Pretraining:
    """The Task of pretraining (see loop.py)."""

    def __init__(
        self,
        network: Method,
        engine: Engine,
        config: PretrainConfig,
        samples: PairSamples,
        knn: Monitor | None = None,
        crops: bool = True,
    ) -> None:
        """`crops`: clips that another rank encodes travel as crops, and not as views, see exchange.py."""
        self.network, self.engine, self.config, self._knn = network, engine, config, knn
        self._measured: dict[str, float] = {}
        self.samples: TrainSamples = samples
        self.summary: dict[str, Any] = {}
        self.fill_steps = config.method.fill_steps if network.has_queue else 0
        self.first_trained_step = self.fill_steps + 1
        # On a GPU the view kernels write the layout that the stem reads.
        self._blocks = engine.device.type == "cuda" and network.takes_blocks and network.query.backbone.takes_blocks
        self._crops = crops
        self._query: Views | None = None
        self._size = (0, 0)  # height and width of the views in _query
        self._output: Any = None

    def begin_step(self, step: int) -> None:
        self._output = None
        batch_size = self.config.optim.batch_size
        self.network.begin_step(step // (len(self.samples.videos) // batch_size), batch_size)

    def forward(
        self, batch: PairBatch, step: int, micro_step: int, watch: Stopwatch
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Make the views, then fill the queue (in the first --fill-steps steps) or compute the loss."""
        with watch.section("views"):
            self._query, key = self._make_views(batch, micro_step)
            self._size = batch.query_params.size
        if step < self.fill_steps:
            with watch.section("fill"), self.engine.autocast():
                return self.network.fill(self._query, key, micro_step), None
        with watch.section("forward"):
            self._output = self.engine(self._query, key, micro_step)
        return self.network.terms(self._output), self._output.loss

    def _make_views(self, batch: PairBatch, micro_step: int) -> tuple[Views, Views]:
        """Return the views of the query clips and of the key clips that this rank encodes."""
        boundary, dtype, used = self.config.method.boundary, self.engine.view_dtype, self.config.method.auxiliary_views
        shuffle, kinds = self.network.shuffle(len(batch.indices), micro_step), self.network.shuffled
        clips = clips_of(batch)
        if shuffle is not None and self._crops:
            clips |= send_crops(shuffle, batch, kinds, stills="static" in used)
        query, key = make_views(clips["query"], clips["key"], boundary, dtype, self._blocks)
        if shuffle is not None and not self._crops:
            views = {"query": query, "key": key}
            views |= send_views(shuffle, views, kinds, used)
            query, key = views["query"], views["key"]
        return query, key

    def after_update(self, watch: Stopwatch) -> None:
        """Move the key encoder towards the query encoder."""
        with watch.section("key update"):
            self.network.update_key()

    def metrics(self, lr: float, done: int, skipped: int, watch: Stopwatch) -> dict[str, float]:
        """Return the state of the queue and, after the --fill-steps steps, losses and similarities."""
        config, batch_size = self.config, self.config.optim.batch_size
        metrics = common_metrics(lr, batch_size, self.engine.device, watch)
        if self.network.has_queue:
            written = batch_size * config.method.keys_per_sample
            filled = min((done - skipped) * written, config.method.queue_length)
            metrics |= {"queue/filled_rows": float(filled), "queue/oldest_row_age_steps": filled / written}
        if self._output is not None:
            metrics |= self.network.metrics(self._output)
        if math.isfinite(metrics.get("loss", math.nan)):
            for name, first in self.network.first_step(metrics).items():
                self.summary.setdefault(name, {"step": done, **first})
        return metrics

    def bar(self, metrics: dict[str, float]) -> dict[str, str]:
        if "loss" not in metrics:
            return {"loss": "filling queue", **common_bar(metrics)}
        shown = {"loss": f"{metrics['loss']:.3f}"}
        if "loss_plateau" in metrics:
            shown["plateau"] = f"{metrics['loss_plateau']:.3f}"
        if "nearest_key/mean" in metrics:
            shown["nearest"] = f"{metrics['nearest_key/mean']:.0%}"
        if self._measured:
            shown["R@1"] = f"{self._measured['knn/recall_at_1']:.0%} (chance {self._measured['knn/chance']:.0%})"
        return {**shown, **common_bar(metrics)}

    def measure(self, epochs: int) -> dict[str, float]:
        """Return the k-NN accuracy of the features, every --knn-every epochs."""
        if self._knn is None or epochs % self.config.monitor.knn_every:
            return {}
        knn, backbone = self._knn, self.network.query.backbone
        measured = measure_on_all_ranks(lambda: knn(backbone))
        self._measured = measured or self._measured
        return measured

    def picture(self) -> np.ndarray | None:
        """Return a picture of the query clips' rgb, static and dynamic views, three rows for each clip."""
        if self._query is None:
            return None
        shown = Views(*(view[:GRID_CLIPS] for view in self._query))
        if self._blocks:
            shown = Views(*(depth_to_space(view, self._size) for view in shown))
        return view_grid(shown, GRID_CLIPS)


def make_views(
    query: Clips, key: Clips, boundary: Any, dtype: torch.dtype, blocks: bool = False
) -> tuple[Views, Views]:
    """Return the views of the query clips and of the key clips. `blocks`: see generate_views."""
    first, second = (generate_views(*clips, boundary=boundary, dtype=dtype, blocks=blocks) for clips in (query, key))
    return first, second
