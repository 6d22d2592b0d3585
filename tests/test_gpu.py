"""What runs on a CPU runs on a GPU, and computes the same (`make gpu`)."""

import json

import pytest
import torch

from dclr import views
from dclr.config import resolve
from dclr.data.demo import render_demo
from dclr.pretrain import pretrain
from kernels import ViewParams, generate_views

pytestmark = pytest.mark.gpu


def test_views_on_the_gpu_agree_with_the_cpu():
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 8, 120, 160, 3), generator=rng, dtype=torch.uint8)
    draws = [views.draw_augmentation(views.np.random.default_rng(i), 120, 160, views.PRETRAIN) for i in range(6)]
    params = ViewParams(views.to_augmentation(draws[:3]), views.to_augmentation(draws[3:]), (112, 112))
    on_cpu = generate_views(frames, frames[:, 0], params)
    on_gpu = generate_views(frames.cuda(), frames[:, 0].cuda(), params)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        # 3e-5 of a normalised pixel is 2e-3 of a grey level: float32 arithmetic in another order.
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
