"""Training a classifier on labels: finetuning the whole network, or a linear probe on a frozen backbone."""

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dclr import distributed
from dclr.config import FinetuneConfig
from dclr.data.augmentation import FINETUNE
from dclr.data.samples import ClipBatch, ClipSamples, TrainSamples
from dclr.errors import UserError
from dclr.kernels import augment
from dclr.models import (
    Backbone,
    Classifier,
    build_backbone,
    count_correct,
    load_backbone,
    save_backbone,
    save_classifier,
)
from dclr.models.weights import metadata_of_classifier
from dclr.programs import command_of
from dclr.report import Stopwatch
from dclr.training.batchnorm import average_statistics
from dclr.training.engine import Engine
from dclr.training.loop import common_bar, common_metrics, measure_on_all_ranks, train
from dclr.training.setup import Monitor, OpenMonitor, Run, start_run


def finetune(
    command: str,
    config: FinetuneConfig,
    preset: str,
    device: torch.device,
    resume: Path | None = None,
    replace: bool = False,
    open_accuracy: OpenMonitor | None = None,
) -> Path:
    """Train a classifier and return the run's folder, which then holds classifier.safetensors.

    Args:
        command: "finetune" trains the whole network; "linear" trains a linear classifier on the frozen backbone.
        resume: folder of the run to continue; None begins a run.
        replace: the new run may replace a run in --out that has no checkpoint.
        open_accuracy: opens the measurement of the classifier that --test-every asks for.

    Raises:
        UserError: see start_run, load_backbone, Engine and train; a data set without labels.
        Stopped: a signal asked the run to stop. A checkpoint is written.
    """
    torch.manual_seed(config.run.seed)
    backbone, start = make_backbone(command, config, resume)
    with start_run(command, preset, config, device, resume, replace) as run:
        run.say(f"  start: {start}")
        run.prepare(backbone)
        classes = run.videos.classes
        dropout = config.transfer.dropout if command == "finetune" else 0.0
        frozen = command == "linear"
        classifier = Classifier(backbone, len(classes), dropout, frozen, frozen and config.transfer.normalised_probe)
        run.description |= metadata_of_classifier(classifier.fc)
        engine = Engine(classifier, run.ds_config, config.optim, device)
        test = open_test(run, open_accuracy) if open_accuracy and config.transfer.test_every else None
        recipe = FINETUNE["crop" if command == "linear" else config.transfer.finetune_augmentation]
        task = Finetuning(engine, config, ClipSamples(run.videos, config.data, config.run.seed, recipe), test)
        trained = train(run, task, engine)

        average_statistics(classifier)
        run.write(lambda: save_backbone(classifier.backbone, run.folder / "backbone.safetensors", run.clips))
        written = run.folder / "classifier.safetensors"
        run.write(lambda: save_classifier(classifier, classes, written, run.clips))
        if run.resumed:
            start = f"{config.transfer.pretrained or 'random weights'}, and later a checkpoint of this run"
        run.write_report({"start": start, **trained.report()}, trained.failures, trained.seconds, trained.steps)
        data = f" --data {shlex.quote(config.data.data)}" if config.data.data else ""
        run.say(f"done: {written}")
        run.say(f"  next: {command_of('eval')} accuracy --checkpoint {shlex.quote(str(run.folder))}{data}")
        return run.folder


def open_test(run: Run, open_accuracy: OpenMonitor) -> Monitor | None:
    """Return the measurement of the classifier, or None if the data set has no labelled test videos."""
    try:
        return run.open_monitor(open_accuracy)
    except UserError as error:
        run.say(f"  no test accuracy during training: {error}")
        return None


def make_backbone(command: str, config: FinetuneConfig, resume: Path | None) -> tuple[Backbone, str]:
    """Return the backbone to start from and one line that says what its weights are.

    Raises:
        UserError: on all ranks, see load_backbone.
    """
    backbone = build_backbone(config.model.backbone, config.model.width)
    if resume:
        return backbone, "the run's checkpoint"
    if config.transfer.pretrained:
        return backbone, distributed.on_all_ranks(lambda: load_backbone(Path(config.transfer.pretrained), backbone))
    if command == "linear":
        return backbone, "frozen random features (no --pretrained): a baseline"
    return backbone, "from scratch"


class Finetuning:
    """The Task of finetuning and of the linear probe (see loop.py)."""

    first_trained_step = 0

    def __init__(self, engine: Engine, config: FinetuneConfig, samples: ClipSamples, test: Monitor | None) -> None:
        self.engine, self.config, self._test = engine, config, test
        self._measured: dict[str, float] = {}
        self.samples: TrainSamples = samples
        self.summary: dict[str, Any] = {}

    def begin_step(self, step: int) -> None:
        """Seed dropout with the step, so that a resumed run drops the same features as an uninterrupted run."""
        torch.manual_seed((self.config.run.seed * 1_000_003 + step) * 4_096 + distributed.rank())

    def forward(
        self, batch: ClipBatch, step: int, micro_step: int, watch: Stopwatch
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Augment the clips and compute the cross-entropy of their labels."""
        size = (self.config.data.crop_size, self.config.data.crop_size)
        with watch.section("augment"):
            clip = augment(batch.frames, batch.augmentation, size, self.engine.view_dtype)
        with watch.section("forward"):
            self._logits, self._labels = self.engine(clip), batch.labels
            self._loss = F.cross_entropy(self._logits, batch.labels)
        return {"loss": self._loss}, self._loss

    def after_update(self, watch: Stopwatch) -> None:
        """Do nothing: only pretraining has a key encoder."""

    def metrics(self, lr: float, done: int, skipped: int, watch: Stopwatch) -> dict[str, float]:
        """Return loss and top-1 accuracy of the latest micro-batch."""
        correct = count_correct(self._logits, self._labels, 1) / len(self._logits)
        values = torch.tensor([self._loss.item(), correct], device=self.engine.device)
        return {
            **dict(zip(("loss", "train_top1"), distributed.mean_over_ranks(values).tolist(), strict=True)),
            **common_metrics(lr, self.config.optim.batch_size, self.engine.device, watch),
        }

    def bar(self, metrics: dict[str, float]) -> dict[str, str]:
        return {
            "loss": f"{metrics['loss']:.3f}",
            "top1": f"{metrics['train_top1']:.0%}",
            **({"test": f"{self._measured['test/top1']:.0%}"} if self._measured else {}),
            **common_bar(metrics),
        }

    def measure(self, epochs: int) -> dict[str, float]:
        """Return the accuracy on test videos, every --test-every epochs."""
        if self._test is None or epochs % self.config.transfer.test_every:
            return {}
        test, classifier = self._test, self.engine.module
        measured = measure_on_all_ranks(lambda: test(classifier))
        self._measured = measured or self._measured
        return measured

    def picture(self) -> None:
        """Return None: clips are not logged as pictures."""
