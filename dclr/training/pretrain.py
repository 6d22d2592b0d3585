"""Pretraining: the loop, from videos to backbone.safetensors."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from dclr import distributed
from dclr.config import PretrainConfig
from dclr.data.augmentation import pretrain_recipe, view_grid
from dclr.data.failures import Failures
from dclr.data.samples import PairBatch, PairSamples
from dclr.method import DCLR, Output
from dclr.models import save_backbone
from dclr.report import RunLog, Stopwatch, json_numbers, peak_memory_gib
from dclr.training.batchnorm import average
from dclr.training.engine import Engine
from dclr.training.nonfinite import FiniteGuard
from dclr.training.replicas import check_same
from dclr.training.setup import MeanLoss, learning_rate, start_run
from dclr.training.signals import StopRequest
from kernels import Views, generate_views

GRID_CLIPS = 4  # clips in the picture of the three views


def pretrain(config: PretrainConfig, preset: str, device: torch.device, resume: Path | None = None) -> Path:
    """Train, checkpointing on the way; returns the run's folder.

    Raises UserError: see start_run, Engine, Engine.resume and Run.save; Stopped: a signal asked for it, and a checkpoint is written.
    """
    run = start_run("pretrain", preset, config, device, resume)
    torch.manual_seed(config.run.seed)
    method = DCLR(config.model, config.method, seed=config.run.seed)
    run.say(f"  {config.method.method}: rgb clips contrasted with {', '.join(('rgb', *config.method.auxiliary_views))}")
    run.prepare(method.query.backbone, method.key.backbone)
    engine = Engine(method, run.ds_config, config.optim, device)
    state = run.resume(engine)
    start, summary, last = state["step"], state["summary"], state["last"]

    schedule = run.schedule(start)
    samples = PairSamples(run.videos, config.data, config.run.seed, pretrain_recipe(config.method.jitter))
    batches = run.batches(samples, schedule)
    log = RunLog(run.folder, "pretrain", schedule.stop, start) if run.main else None
    watch, failures, mean_loss = Stopwatch(device), Failures(), MeanLoss(device)
    finite = FiniteGuard(engine, config.run.on_nonfinite, state["skipped"])
    if run.main:
        failures.reasons, failures.count = state["failures"]
    fill_steps = config.method.fill_steps
    engine.train()
    began = time.time() - state["seconds"]

    with StopRequest() as request:
        for step in range(start, schedule.stop):
            epoch = step // schedule.steps_per_epoch
            lr = learning_rate(config.optim, epoch)
            engine.set_learning_rate(lr)
            output = None
            finite.begin(step + 1)
            for part in range(engine.accumulation):
                with watch.part("data", host=True):
                    batch = next(batches)
                failures.add(batch.failures)
                with watch.part("views"):
                    query, key = make_views(batch, config.method.boundary, engine.view_dtype)
                micro_step = step * engine.accumulation + part
                if step < fill_steps:
                    with watch.part("fill"), engine.autocast():
                        keys = method.fill(key, micro_step)
                    finite.see(key_terms(method, keys), batch.indices)
                    continue
                with watch.part("forward"):
                    output = engine(query, key, micro_step)
                finite.see(loss_terms(method, output), batch.indices)
                mean_loss.add(output.loss)
                with watch.part("backward"):
                    engine.backward(output.loss)
                with watch.part("optimizer"):
                    engine.step()
            finite.end()
            if output is not None:
                with watch.part("key update"):
                    method.update_key()
                run.tell_compile_time()
            watch.step()
            done = step + 1
            asked_to_stop = run.agree(request, failures)
            epoch_ended = done % schedule.steps_per_epoch == 0
            regular = epoch_ended and ((epoch + 1) % config.run.checkpoint_every == 0 or done == schedule.stop)
            logs = done % config.run.log_every == 0 or regular or done == fill_steps + 1

            if log and (step == start or epoch_ended):
                log.picture("views", view_grid(query, GRID_CLIPS), done)
            if logs or asked_to_stop:
                finite.check()
                check_same(method, done)
            if logs:
                last = measure(output, method, config, engine, lr, done - finite.skipped, watch) | finite.metrics()
                if log:
                    log.write(done, last, shown(last))
                if "alignment_at_first_step" not in summary and math.isfinite(last.get("loss", math.nan)):
                    names = ("alignment", "alignment_other_form", "alignment_key_maps", "alignment_share")
                    summary["alignment_at_first_step"] = {"step": done, **{k: last[k] for k in names if k in last}}
            if regular or asked_to_stop:
                if log:
                    log.flush()
                loss = mean_loss.take() if regular else None
                moving = {"summary": summary, "last": last, "skipped": finite.skipped}
                run.save(engine, done, moving, failures, time.time() - began, loss)
            if asked_to_stop and done < schedule.stop:
                raise run.stopped(done)
            if log:
                log.advance()

    if log:
        log.close()
    run.exchange.finish()
    average(method.query.backbone)
    run.write(lambda: save_backbone(method.query.backbone, run.folder / "backbone.safetensors"))
    content = {**summary, "last": json_numbers(last), "skipped_steps": finite.skipped}
    run.write_report(content, failures, time.time() - began)
    run.say(f"done: {run.folder / 'backbone.safetensors'}")
    return run.folder


def make_views(batch: PairBatch, boundary: Any, dtype: torch.dtype) -> tuple[Views, Views]:
    """Views of the query clips and of the key clips."""
    query = (batch.query_frames, batch.query_stills, batch.query_params)
    key = (batch.key_frames, batch.key_stills, batch.key_params)
    return generate_views(*query, boundary=boundary, dtype=dtype), generate_views(*key, boundary=boundary, dtype=dtype)


def loss_terms(method: DCLR, output: Output) -> dict[str, torch.Tensor]:
    """The loss and what it is made of, by the names of the log."""
    terms = {
        "loss": output.loss.detach(),
        **by_pair("pair_loss", method, output.losses),
        "alignment": output.alignment,
        "repel": output.repel,
    }
    return {name: value for name, value in terms.items() if value is not None}


def key_terms(method: DCLR, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys (P, B, D) -> one number a pair, finite if all of its keys are: they are of length 1."""
    return by_pair("key", method, keys.float().sum((1, 2)))


def by_pair(name: str, method: DCLR, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """(P,) -> a number a pair, named name/pair."""
    return {f"{name}/{pair}": value for pair, value in zip(method.pairs, values, strict=True)}


def measure(
    output: Output | None, network: DCLR, config: PretrainConfig, engine: Engine, lr: float, done: int, watch: Stopwatch
) -> dict[str, float]:
    """The step's numbers, means over ranks, by the names TensorBoard and metrics.jsonl show; without losses while the queue fills.

    done: steps whose keys are in the queue.
    """
    method, batch_size = config.method, config.optim.batch_size
    milliseconds = watch.read()
    metrics = {
        "lr": lr,
        "queue/filled_rows": float(min(done * batch_size, method.queue_length)),
        "queue/oldest_row_age_steps": min(done * batch_size, method.queue_length) / batch_size,
        "samples_per_second": batch_size / milliseconds["total"] * 1e3,
        "data_wait_share": milliseconds.get("data", 0.0) / milliseconds["total"],
        "memory/peak_gib": peak_memory_gib(engine.device),
        **{f"milliseconds/{name}": value for name, value in milliseconds.items()},
    }
    if output is None:
        return metrics
    terms = {
        **loss_terms(network, output),
        "alignment_other_form": output.alignment_other_form,
        "alignment_key_maps": output.alignment_key_maps,
        **by_pair("positive_similarity", network, output.positive),
        **by_pair("hardest_negative", network, output.hardest_negative),
    }
    named = {name: value for name, value in terms.items() if value is not None}
    values = distributed.mean_over_ranks(torch.stack([value.float() for value in named.values()])).tolist()
    metrics |= dict(zip(named, values, strict=True))
    metrics["pair_loss/ln_K_plus_1"] = math.log(
        method.queue_length + 1
    )  # the loss of a network that tells nothing apart
    if "alignment" in metrics:
        share = method.alignment_weight * metrics["alignment"] / metrics["loss"] if metrics["loss"] else 0.0
        metrics["alignment_share"] = share
    return metrics


def shown(metrics: dict[str, float]) -> dict[str, str]:
    """What the progress bar has room for."""
    bar = {"loss": f"{metrics['loss']:.3f}" if "loss" in metrics else "filling queue"}
    bar["lr"] = f"{metrics['lr']:.2g}"
    bar["samples/s"] = f"{metrics['samples_per_second']:.1f}"
    bar["wait"] = f"{metrics['data_wait_share']:.0%}"
    return bar
