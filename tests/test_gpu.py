"""Training and views run on a GPU and compute the same as on a CPU (`make gpu`)."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import dclr.training.pretrain
from dclr.config import resolve
from dclr.data import augmentation
from dclr.data.demo import render_demo
from dclr.kernels import ViewParams, generate_views
from dclr.models import build_backbone
from dclr.report import Stopwatch
from dclr.training.compile import compile_backbone
from dclr.training.nonfinite import NonfiniteGuard
from dclr.training.pretrain import Pretraining, pretrain
from dclr.training.signals import Stopped

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).parents[1]


def test_views_on_the_gpu_agree_with_the_cpu():
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 8, 120, 160, 3), generator=rng, dtype=torch.uint8)
    draws = [
        augmentation.draw_augmentation(augmentation.np.random.default_rng(i), 120, 160, augmentation.PRETRAIN)
        for i in range(6)
    ]
    params = ViewParams(augmentation.to_augmentation(draws[:3]), augmentation.to_augmentation(draws[3:]), (112, 112))
    on_cpu = generate_views(frames, frames[:, 0], params)
    on_gpu = generate_views(frames.cuda(), frames[:, 0].cuda(), params)
    blocks_on_cpu = generate_views(frames, frames[:, 0], params, blocks=True)
    blocks_on_gpu = generate_views(frames.cuda(), frames[:, 0].cuda(), params, blocks=True)
    on_cpu, on_gpu = (*on_cpu, *blocks_on_cpu), (*on_gpu, *blocks_on_gpu)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        # 3e-5 of a normalised pixel is 2e-3 of a grey level. The GPU's float32 arithmetic has another order.
        assert torch.allclose(gpu.cpu(), cpu, atol=3e-5)


def test_a_short_pretraining_runs_on_the_gpu(tmp_path, one_process):
    data = render_demo(tmp_path / "videos", train_per_class=2, test_per_class=1, progress=False)
    flags = {
        "data": str(data),
        "out": str(tmp_path / "run"),
        "epochs": 3,
        "batch_size": 8,
        "fill_steps": 2,
        "log_every": 1,
    }
    run = pretrain(resolve("pretrain", "demo", {**flags, "queue_length": 16}), "demo", one_process)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert lines[-1]["loss"] > 0


def test_a_compiled_backbone_agrees_with_the_plain_one_in_bfloat16():
    torch.manual_seed(0)
    plain = build_backbone("r2plus1d_10").cuda()
    compiled = build_backbone("r2plus1d_10").cuda()
    compiled.load_state_dict(plain.state_dict())
    compiled.pad_channels(8)
    compile_backbone(compiled)
    clip = torch.randn(6, 3, 16, 112, 112, device="cuda")
    truth = build_backbone("r2plus1d_10").cuda().double()
    truth.load_state_dict(plain.state_dict())
    with torch.no_grad():
        exact = truth(clip.double()).float()
        with torch.autocast("cuda", torch.bfloat16):
            errors = [(network(clip).float() - exact).norm() / exact.norm() for network in (plain, compiled)]
    assert errors[0] < 0.05
    assert errors[1] < 1.5 * errors[0]


def test_a_compiled_backbone_on_the_views_of_a_step_agrees_with_the_plain_one_in_bfloat16():
    """In training: maps, gradients and running statistics of three views, with one frame for the static view."""
    torch.manual_seed(0)
    truth, plain, compiled = (build_backbone("r2plus1d_10").cuda().train() for _ in range(3))
    for backbone in (plain, compiled):
        backbone.load_state_dict(truth.state_dict())
    truth.double()
    compiled.pad_channels(8)
    compile_backbone(compiled)
    views = [torch.randn(4, 3, frames, 112, 112, device="cuda") for frames in (16, 1, 16)]
    probes = [torch.randn(4, 512, 2, 7, 7, device="cuda") for _ in views]

    def results(backbone: torch.nn.Module) -> list[torch.Tensor]:
        dtype = next(backbone.parameters()).dtype
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            maps = backbone.forward_views([view.to(dtype) for view in views], 16, differences=True)
        loss = torch.stack([(view * probe).sum() for view, probe in zip(maps, probes, strict=True)]).sum()
        gradients = torch.autograd.grad(loss, list(backbone.parameters()))
        running = [value for name, value in backbone.named_buffers() if "running" in name]
        return [torch.cat([each.detach().double().flatten() for each in group]) for group in (maps, gradients, running)]

    exact = results(truth)
    errors = [
        [float((found - right).norm() / right.norm()) for found, right in zip(results(backbone), exact, strict=True)]
        for backbone in (plain, compiled)
    ]
    assert errors[0][0] < 0.05, errors
    assert errors[0][2] < 0.01, errors
    for ours, theirs in zip(errors[1], errors[0], strict=True):
        assert ours < 1.5 * theirs, errors


def test_a_batch_of_more_than_two_to_the_31_values_is_not_wrong():
    """Three views of 128 clips have activations of 2.8e9 values, more than a 32-bit index counts.

    Source: pytorch/pytorch#163539.
    """
    torch.manual_seed(0)
    backbone = build_backbone("r2plus1d_10").cuda().eval()
    backbone.pad_channels(8)
    clip = torch.randn(384, 3, 16, 112, 112, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        whole = backbone(clip).float()
        in_groups = torch.cat([backbone(clips) for clips in clip.split(48)]).float()
    assert (whole - in_groups).norm() / in_groups.norm() < 0.01


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_stopped_and_resumed_on_a_gpu_gives_the_losses_of_the_uninterrupted_one(
    tmp_path, one_process, monkeypatch, deterministic
):
    """The losses are equal bit for bit with deterministic algorithms.

    Without them, atomic additions round differently in each run. The losses of ten steps then agree within 1 %.
    """
    data = render_demo(tmp_path / "videos", train_per_class=2, test_per_class=1, progress=False)
    flags = {
        "data": str(data), "epochs": 6, "batch_size": 8, "fill_steps": 2, "log_every": 1, "queue_length": 16,
        "lr": 1e-4, "compile": "off", "deterministic": deterministic,
    }  # fmt: skip

    def run(name: str, resume: Path | None = None) -> list[float]:
        config = resolve("pretrain", "demo", {**flags, "out": str(tmp_path / name)})
        folder = pretrain(config, "demo", one_process, resume)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    whole = run("whole")
    step, calls = Stopwatch.step, []

    def stopped(watch):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step(watch)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Stopwatch, "step", stopped)
            with pytest.raises(Stopped):
                run("cut")
        found = run("cut", tmp_path / "cut")
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(whole) == 10
    assert found == whole if deterministic else found == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("file", ["ddp.json", "zero1.json", "zero2.json"])
def test_nothing_in_a_step_makes_the_host_wait(tmp_path, one_process, monkeypatch, file, on_nonfinite):
    """The driver raises an error if the host waits for the device, in every step after the first ones, which compile.

    Lines of the log and pictures may wait. This test is the last in the file: if ZeRO's compiled code reads a
    misaligned address, as it once did, every later test of the process fails too.
    """
    data = render_demo(tmp_path / "videos", train_per_class=4, test_per_class=1, progress=False)
    watched = []
    step = Stopwatch.step

    def counted(watch):
        step(watch)
        watched.append(torch.cuda.get_sync_debug_mode())
        if len(watched) == 4:
            torch.cuda.set_sync_debug_mode("error")

    def allowed(function):
        """Return `function` with permission to wait. It reads the device between steps, for the log or a picture."""

        def wrapped(*arguments):
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            result = function(*arguments)
            if len(watched) < 12:  # the checkpoint and the report after the last step wait too
                torch.cuda.set_sync_debug_mode(mode)
            return result

        return wrapped

    monkeypatch.setattr(Stopwatch, "step", counted)
    monkeypatch.setattr(Pretraining, "metrics", allowed(Pretraining.metrics))
    monkeypatch.setattr(dclr.training.pretrain, "view_grid", allowed(dclr.training.pretrain.view_grid))
    monkeypatch.setattr(NonfiniteGuard, "check", allowed(NonfiniteGuard.check))
    flags = {
        "data": str(data), "out": str(tmp_path / "run"), "epochs": 3, "batch_size": 8, "fill_steps": 2, "log_every": 5,
        "queue_length": 16, "checkpoint_every": 3, "ds_config": str(REPOSITORY / "ds_configs" / file), "workers": 2,
        "on_nonfinite": on_nonfinite,
    }  # fmt: skip
    try:
        pretrain(resolve("pretrain", "demo", flags), "demo", one_process)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched.count(2) >= 6  # 2: error
