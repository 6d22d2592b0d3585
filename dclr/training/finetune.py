"""Finetuning and linear probing: the loop, from a backbone (or from scratch) to classifier.safetensors."""

import time
from pathlib import Path

import torch
from torch.nn import functional as F

from dclr import distributed
from dclr.config import FinetuneConfig
from dclr.data.failures import Failures
from dclr.data.samples import ClipSamples
from dclr.models import Classifier, build_backbone, count_correct, load_backbone, save_backbone, save_classifier
from dclr.report import RunLog, Stopwatch, json_numbers, peak_memory_gib
from dclr.training.batchnorm import average
from dclr.training.engine import Engine
from dclr.training.nonfinite import FiniteGuard
from dclr.training.replicas import check_same
from dclr.training.setup import MeanLoss, learning_rate, start_run
from dclr.training.signals import StopRequest
from kernels import augment


def supervise(
    command: str, config: FinetuneConfig, preset: str, device: torch.device, resume: Path | None = None
) -> Path:
    """`finetune` the whole network or train a `linear` classifier on the frozen backbone; returns the run's folder.

    Raises UserError: see start_run, load_backbone, Engine, Engine.resume and Run.save; a data set without labels. Stopped: a signal asked
    for it, and a checkpoint is written.
    """
    torch.manual_seed(config.run.seed)
    backbone = build_backbone(config.model.backbone, config.model.width)
    loaded = "from scratch"
    if resume:
        loaded = "the run's checkpoint"
    elif config.transfer.pretrained:
        loaded = distributed.together(lambda: load_backbone(Path(config.transfer.pretrained), backbone))
    elif command == "linear":
        loaded = "frozen random features (no --pretrained): a baseline"
    run = start_run(command, preset, config, device, resume)
    run.say(f"  start: {loaded}")
    run.prepare(backbone)
    classes = run.videos.classes
    dropout = config.transfer.dropout if command == "finetune" else 0.0
    classifier = Classifier(backbone, len(classes), dropout, frozen=command == "linear")
    engine = Engine(classifier, run.ds_config, config.optim, device)
    state = run.resume(engine)
    start, last = state["step"], state["last"]

    schedule = run.schedule(start)
    samples = ClipSamples(run.videos, config.data, config.run.seed)
    batches = run.batches(samples, schedule)
    log = RunLog(run.folder, command, schedule.stop, start) if run.main else None
    watch, failures, mean_loss = Stopwatch(device), Failures(), MeanLoss(device)
    finite = FiniteGuard(engine, config.run.on_nonfinite, state["skipped"])
    size = (config.data.crop_size, config.data.crop_size)
    if run.main:
        failures.reasons, failures.count = state["failures"]
    engine.train()
    began = time.time() - state["seconds"]

    with StopRequest() as request:
        for step in range(start, schedule.stop):
            epoch = step // schedule.steps_per_epoch
            lr = learning_rate(config.optim, epoch)
            engine.set_learning_rate(lr)
            # Dropout's random state is a function of the step, so a resumed run drops what the uninterrupted one did.
            torch.manual_seed((config.run.seed * 1_000_003 + step) * 4_096 + distributed.rank())
            finite.begin(step + 1)
            for _ in range(engine.accumulation):
                with watch.part("data", host=True):
                    batch = next(batches)
                failures.add(batch.failures)
                with watch.part("augment"):
                    clip = augment(batch.frames, batch.augmentation, size, engine.view_dtype)
                with watch.part("forward"):
                    logits = engine(clip)
                    loss = F.cross_entropy(logits, batch.labels)
                finite.see({"loss": loss}, batch.indices)
                mean_loss.add(loss)
                with watch.part("backward"):
                    engine.backward(loss)
                with watch.part("optimizer"):
                    engine.step()
            finite.end()
            run.tell_compile_time()
            watch.step()
            done = step + 1
            asked_to_stop = run.agree(request, failures)
            epoch_ended = done % schedule.steps_per_epoch == 0
            regular = epoch_ended and ((epoch + 1) % config.run.checkpoint_every == 0 or done == schedule.stop)
            logs = done % config.run.log_every == 0 or regular

            if logs or asked_to_stop:
                finite.check()
                check_same(classifier, done)
            if logs:
                correct = count_correct(logits, batch.labels, 1) / len(logits)
                values = torch.tensor([loss.item(), correct], device=device)
                last = dict(zip(("loss", "train_top1"), distributed.mean_over_ranks(values).tolist(), strict=True))
                milliseconds = watch.read()
                last |= {
                    "lr": lr,
                    "samples_per_second": config.optim.batch_size / milliseconds["total"] * 1e3,
                    "data_wait_share": milliseconds["data"] / milliseconds["total"],
                    "memory/peak_gib": peak_memory_gib(device),
                    **{f"milliseconds/{name}": value for name, value in milliseconds.items()},
                }
                last |= finite.metrics()
                if log:
                    log.write(done, last, shown(last))
            if regular or asked_to_stop:
                if log:
                    log.flush()
                mean = mean_loss.take() if regular else None
                run.save(
                    engine,
                    done,
                    {"summary": {}, "last": last, "skipped": finite.skipped},
                    failures,
                    time.time() - began,
                    mean,
                )
            if asked_to_stop and done < schedule.stop:
                raise run.stopped(done)
            if log:
                log.advance()

    if log:
        log.close()
    run.exchange.finish()
    average(classifier)
    run.write(lambda: save_backbone(classifier.backbone, run.folder / "backbone.safetensors"))
    run.write(lambda: save_classifier(classifier, classes, run.folder / "classifier.safetensors"))
    content = {"start": loaded, "last": json_numbers(last), "skipped_steps": finite.skipped}
    run.write_report(content, failures, time.time() - began)
    run.say(
        f"done: {run.folder / 'classifier.safetensors'}; measure it with: python eval.py accuracy --checkpoint {run.folder}"
    )
    return run.folder


def shown(metrics: dict[str, float]) -> dict[str, str]:
    """What the progress bar has room for."""
    return {
        "loss": f"{metrics['loss']:.3f}",
        "top1": f"{metrics['train_top1']:.0%}",
        "lr": f"{metrics['lr']:.2g}",
        "samples/s": f"{metrics['samples_per_second']:.1f}",
        "wait": f"{metrics['data_wait_share']:.0%}",
    }
