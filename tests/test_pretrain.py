"""Pretraining runs of two short epochs: their files and metrics, repetition, interruption and failures."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metrics, numbers, saved, tensors_of
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dclr import kernels
from dclr.config import DataConfig, make_config
from dclr.data.pack import pack
from dclr.data.samples import PairSamples
from dclr.errors import UserError
from dclr.kernels.view_generation import generate_views_reference
from dclr.methods import DCLR
from dclr.methods.encoder import PAIRS
from dclr.models import build_backbone, load_backbone
from dclr.training import pretrain as pretraining
from dclr.training.checkpoint import newest
from dclr.training.engine import Engine
from dclr.training.pretrain import Pretraining, pretrain


@pytest.fixture
def run_tiny(tiny_pretrain, one_process, tmp_path):
    def run(name="run", resume=None, **changes):
        config = make_config("pretrain", {**tiny_pretrain, "out": str(tmp_path / name), **changes})
        return pretrain(config, "demo", one_process, resume)

    return run


@pytest.fixture(scope="module")
def finished(demo_videos, float32, one_process, tmp_path_factory) -> Path:
    """Return an uninterrupted run of 8 steps. Step 1 only fills the queue."""
    settings = {
        "data": str(demo_videos), "ds_config": str(float32), "width": 4, "clip_length": 8, "crop_size": 32,
        "batch_size": 4, "epochs": 2, "workers": 2, "log_every": 1, "queue_length": 18, "embedding_dim": 32,
        "mined_positives": 2, "fill_steps": 1, "key_momentum": 0.9,
        "out": str(tmp_path_factory.mktemp("pretrain") / "run"),
    }  # fmt: skip
    return pretrain(make_config("pretrain", settings), "demo", one_process)


def test_a_run_writes_every_documented_file(finished):
    left = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    assert {"config.json", "report.json", "metrics.jsonl", "backbone.safetensors"} <= left
    assert [name for name in sorted(left) if name.startswith("checkpoints/")] == [
        "checkpoints/step-0000004.safetensors",
        "checkpoints/step-0000008.safetensors",
    ]
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert not [name for name in left if name.endswith(".tmp") or "/." in name or name.startswith(".")]

    report = json.loads((finished / "report.json").read_text())
    assert (report["command"], report["preset"], report["steps"], report["processes"]) == ("pretrain", "demo", 8, 1)
    listed = {name: report["data"].pop(name) for name in ("coverage", "duplicates")}
    assert listed["coverage"]["train"]["used"] == listed["coverage"]["train"]["listed"] == 16
    assert not any(listed["duplicates"].values())
    assert all(report["data"].pop(name) is not None for name in ("recognised", "unused", "warnings", "shown"))
    assert report["data"] == {
        "folder": json.loads((finished / "config.json").read_text())["data"]["data"],
        "layout": "list file", "videos": 16, "unreadable": {}, "failed_while_training": {}, "failed_reads": 0,
    }  # fmt: skip
    assert report["precision"].startswith("float32")
    assert report["samples_per_second"] > 0
    assert report["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    last = metrics(finished)[-1]
    assert report["last"] == {name: value for name, value in last.items() if name != "step"}


def test_its_backbone_is_that_of_the_query_encoder_and_loads(finished):
    backbone = build_backbone("r2plus1d_10", 4)
    assert "written by dclr" in load_backbone(finished / "backbone.safetensors", backbone)
    saved = tensors_of(finished, "model")
    for name, tensor in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, saved[f"query.backbone.{name}"]), name
    assert not torch.equal(saved["query.backbone.stem.0.weight"], saved["key.backbone.stem.0.weight"])


def test_every_step_logs_the_documented_metrics(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 9))
    fill, *trained = lines
    assert "loss" not in fill
    for line in trained:
        total = sum(line[f"pair_loss/{pair}"] for pair in PAIRS)
        assert line["loss"] == pytest.approx(total + 0.1 * line["alignment"], rel=1e-6)
        assert line["alignment_share"] == pytest.approx(0.1 * line["alignment"] / line["loss"], rel=1e-6)
        assert line["pair_loss/ln_K_plus_1"] == pytest.approx(math.log(19))
        for pair in PAIRS:
            assert -1 <= line[f"positive_similarity/{pair}"] <= 1 + 1e-6
            assert -1 <= line[f"hardest_negative/{pair}"] <= 1 + 1e-6
        for section in ("data", "views", "forward", "backward", "optimizer", "key update", "total"):
            assert line[f"milliseconds/{section}"] > 0
        sections = sum(v for k, v in line.items() if k.startswith("milliseconds/")) - line["milliseconds/total"]
        assert sections <= line["milliseconds/total"]
    for line in lines:
        assert 0 <= line["data_wait_share"] <= 1
        assert 0.05 < line["memory/peak_gib"] < 100
        assert line["samples_per_second"] == pytest.approx(4e3 / line["milliseconds/total"])
        assert line["lr"] == 0.01
    assert [line["queue/filled_rows"] for line in lines] == [4, 8, 12, 16, 18, 18, 18, 18]
    assert [line["queue/oldest_row_age_steps"] for line in lines] == [1, 2, 3, 4, 4.5, 4.5, 4.5, 4.5]


def test_twenty_steps_with_the_kernels_are_those_of_the_reference(run_tiny, monkeypatch):
    """In each step of a run the kernels compute what the reference computes from the same embeddings.

    Training amplifies every rounding error, also that of the reference on another CPU (docs/LOG.md, 2026-11-27).
    Comparing whole loss curves therefore shows little. Here each step continues with the reference's results, and this
    test compares the kernels' losses, similarities, gradients and mined entries of that step. Mining is on from step 5.
    Embeddings of an untrained network are nearly equal, so the kernels may mine another entry that is as similar.
    kornia makes the views, because the interpreted view kernels take half a minute per step.
    """
    if not kernels.backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    compared = {"contrast": 0, "mined": 0}

    def contrast_by_both(queries, *others, **options):
        """Return the reference's result, and check that the kernels' result equals it within float32 rounding error."""
        inputs = [queries.detach().requires_grad_() for _ in range(2)]
        results = []
        for backend, own in zip(("reference", "triton"), inputs, strict=True):
            kernels.set_backend(backend)
            results.append(kernels.contrast(own, *others, **options))
            results[-1].losses.sum().backward()
        kernels.set_backend("reference")
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
        # The gradient is a difference of two means of unit vectors, divided by T B. The rounding error of the logits,
        # EPS / T, makes each mean inexact.
        rounding = torch.finfo(torch.float32).eps / (0.07**2 * queries.shape[1])
        assert rounding < 1e-4 * inputs[0].grad.abs().max()  # a gradient that is wrong by 0.1 % fails
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=rounding)
        compared["contrast"] += 1
        return kernels.contrast(queries, *others, **options)

    def mine_by_both(features, queue, m):
        kernels.set_backend("triton")
        found = kernels.mine_positives_by_each(features, queue, m)
        kernels.set_backend("reference")
        expected = kernels.mine_positives_by_each(features, queue, m)
        score = features.double() @ queue.double().transpose(1, 2)
        score = torch.cat([score, score.softmax(2).sum(0, keepdim=True)])
        torch.testing.assert_close(score.gather(2, found), score.gather(2, expected), rtol=1e-6, atol=1e-7)
        compared["mined"] += 1
        return expected

    monkeypatch.setattr("dclr.methods.dclr.contrast", contrast_by_both)
    monkeypatch.setattr("dclr.methods.dclr.mine_positives_by_each", mine_by_both)
    run_tiny("both", kernels="reference", epochs=6, lr=1e-4, width=8, seed=1)
    kernels.set_backend("auto")
    assert compared == {"contrast": 23, "mined": 23}


def test_the_second_loss_after_an_update_by_the_kernels_is_the_references(run_tiny, monkeypatch):
    """A gradient that is wrong by 1 % changes the second loss by 7e-4 or more."""
    if not kernels.backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    monkeypatch.setattr("dclr.training.pretrain.generate_views", generate_views_reference)
    losses = []
    for backend in ("reference", "triton"):
        run = run_tiny(backend, kernels=backend, epochs=1, lr=1e-4, width=8)
        losses.append([line["loss"] for line in metrics(run) if "loss" in line][:2])
    kernels.set_backend("auto")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_training_from_a_store_is_training_from_its_videos(finished, demo_videos, run_tiny, tmp_path, compact):
    """The demo's videos are small enough to be stored at full size, so all losses are equal.

    A compact store encodes the videos again, so its losses are only close.
    """
    pack(DataConfig(data=str(demo_videos)), out=str(tmp_path / "store"), compact=compact)
    run = run_tiny(data=str(tmp_path / "store"))
    of_videos, of_store = ([line for line in metrics(folder) if "loss" in line] for folder in (finished, run))
    names = ["loss", *(name for name in of_videos[0] if "pair_loss/" in name)]
    assert len(of_videos) == len(of_store) == 7
    found, expected = ([[line[name] for name in names] for line in lines] for lines in (of_store, of_videos))
    if compact:
        assert found != expected
        assert found[0][0] == pytest.approx(expected[0][0], rel=0.1)
    else:
        assert found == expected
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["layout"] == "list file (packed)"


def test_moco_logs_one_pair_and_no_metric_of_auxiliary_views(run_tiny, train_main, capfd):
    run = run_tiny(method="moco", epochs=2)
    assert "moco: rgb clips contrasted with rgb\n" in capfd.readouterr().out
    last = metrics(run)[-1]
    assert last["loss"] == last["pair_loss/vv"]
    named = {name for name in last if "/" in name or name.startswith(("alignment", "repel"))}
    kinds = ("milliseconds/", "memory/", "queue/", "nonfinite")
    assert {name for name in named if not name.startswith(kinds)} == {
        "pair_loss/vv", "pair_loss/ln_K_plus_1", "pair_loss/plateau", "positive_similarity/vv", "hardest_negative/vv",
        "nearest_key/vv", "nearest_key/mean", "batch_loss/vv", "batch_loss/plateau",
    }  # fmt: skip
    train_main("pretrain", resume=run, epochs=3)
    assert metrics(run)[-1]["step"] == 12


def test_settings_of_the_samples_reach_them(run_tiny, monkeypatch):
    class Caught(Exception):
        pass

    def samples_of(name: str, **settings) -> PairSamples:
        def caught(run, task, engine):
            raise Caught(task.samples)

        monkeypatch.setattr(pretraining, "train", caught)
        with pytest.raises(Caught) as found:
            run_tiny(name, **settings)
        return found.value.args[0]

    plain = samples_of("plain", jitter=0.0)
    changed = samples_of("changed", jitter=2.0, jitter_form="additive", distinct_starts=False)
    assert plain.distinct_starts
    assert not changed.distinct_starts
    plain, changed = plain.read(0, 0).rows, changed.read(0, 0).rows
    assert not plain["additive"].any()
    assert changed["additive"].all()
    assert (plain["factors"] == [1, 1, 1, 0]).all()
    assert (np.abs(changed["factors"][:, :3] - 1) > 0.4).any()  # the published strength is at most 0.4


def test_the_first_lines_name_the_kernels_that_run(run_tiny, capfd):
    run_tiny("auto", epochs=1)
    out = capfd.readouterr().out
    assert "kernels: reference (plain torch and kornia; the device is cpu)" in out
    assert "convolutions: library (the device is cpu)" in out
    run_tiny("reference", epochs=1, kernels="reference")
    assert "kernels: reference (plain torch and kornia; as chosen)" in capfd.readouterr().out
    kernels.set_backend("auto")


def test_convolutions_in_triton_are_refused_without_a_gpu_before_the_videos_are_opened(run_tiny, tmp_path):
    with pytest.raises(UserError, match=r"^--convolutions triton needs --kernels auto or triton and a GPU: "):
        run_tiny("run", convolutions="triton", data=str(tmp_path / "gone"))
    assert not list(tmp_path.rglob("config.json"))


def test_batches_that_do_not_fit_in_memory_are_refused(run_tiny, monkeypatch):
    monkeypatch.setattr("dclr.data.ring_buffer.available_memory", lambda: 2**16)
    with pytest.raises(
        UserError, match=r"^the largest frame of these videos is .* train.py pack, or lower --batch-size"
    ):
        run_tiny()


def test_kernels_that_cannot_run_are_refused(run_tiny, monkeypatch):
    monkeypatch.setattr(kernels.backend, "INTERPRETED", False)
    with pytest.raises(UserError, match='--kernels triton: backend "triton" cannot run on cpu: use a CUDA device'):
        run_tiny(kernels="triton")
    kernels.set_backend("auto")


def test_tensorboard_has_the_same_metrics_and_images_of_the_views(finished):
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    expected: dict[str, list] = {}
    for line in metrics(finished):
        for name, value in line.items():
            if name != "step":
                expected.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert set(board.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        assert [(event.step, event.value) for event in board.Scalars(name)] == values
    pictures = board.Images("views")
    assert [picture.step for picture in pictures] == [1, 4, 8]
    assert {(p.width, p.height) for p in pictures} == {(8 * 32, 4 * 3 * 32)}  # 8 frames; 4 clips of three views


def test_the_report_says_how_much_of_the_first_trained_loss_is_alignment(finished):
    report = json.loads((finished / "report.json").read_text())
    line = metrics(finished)[1]
    names = ("alignment", "alignment_other_form", "alignment_key_maps", "alignment_share")
    assert report["alignment_at_first_step"] == {"step": 2, **{name: line[name] for name in names}}


def test_fill_steps_fill_the_queue_and_train_nothing(run_tiny, tiny_pretrain, monkeypatch):
    """The first of two epochs has four fill steps. After it the query encoder still has its initial weights."""
    states = {}
    real = Engine.save

    def keep(self, folder, step, state, description):
        states[step] = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        real(self, folder, step, state, description)

    steps = []
    monkeypatch.setattr(Engine, "save", keep)
    monkeypatch.setattr(Engine, "step", lambda self, real=Engine.step: (steps.append(1), real(self))[1])
    run_tiny(fill_steps=4)
    assert len(steps) == 4
    torch.manual_seed(0)
    config = make_config("pretrain", {**tiny_pretrain, "fill_steps": 4})
    fresh = DCLR(config.model, config.method, seed=0).state_dict()
    parameters = [name for name in fresh if name.startswith(("query.", "key.")) and "running" not in name
                  and "num_batches" not in name]  # fmt: skip
    assert all(torch.equal(states[4][name], fresh[name]) for name in parameters)
    assert any(not torch.equal(states[8][name], fresh[name]) for name in parameters)
    assert states[4]["enqueued"].item() == 16
    changed = (states[4]["queue"] != fresh["queue"]).any(2).all(0)
    assert changed.tolist() == [True] * 16 + [False] * 2


def test_a_run_repeats_bit_for_bit_and_another_seed_differs(finished, run_tiny):
    """`finished` has two data workers, the repetition has none."""
    again = run_tiny("again")
    assert numbers(again) == numbers(finished)
    other = run_tiny("other", seed=1, epochs=1)
    assert numbers(other)[1]["loss"] != numbers(finished)[1]["loss"]


class Interrupted(Exception):
    """Stand-in for a kill."""


def interrupt_at(monkeypatch, step):
    """Make the run raise Interrupted while it computes the metrics of that step."""
    real = Pretraining.metrics

    def metrics(task, lr, done, *others):
        if done == step:
            raise Interrupted
        return real(task, lr, done, *others)

    monkeypatch.setattr(Pretraining, "metrics", metrics)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    finished, run_tiny, train_main, monkeypatch, tmp_path, workers
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted):
            run_tiny("cut", workers=workers)
    run = tmp_path / "cut"
    assert newest(run / "checkpoints").stem == "step-0000004"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]  # the resumed run repeats steps 5 and 6
    assert not (run / "backbone.safetensors").exists()

    train_main("pretrain", resume=run)
    assert numbers(run) == numbers(finished)
    ours, theirs = saved(run)[0], saved(finished)[0]
    assert ours.keys() == theirs.keys()
    # The tensors are both encoders, their batch statistics, the queue and its pointer, and the momentum.
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert all(tensor.abs().sum() > 0 for tensor in tensors_of(run, "momentum").values())
    files = [load_file(r / "backbone.safetensors") for r in (run, finished)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    reports = [json.loads((r / "report.json").read_text()) for r in (run, finished)]
    assert reports[0]["alignment_at_first_step"] == reports[1]["alignment_at_first_step"]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in board.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(finished)[1:]]


def test_resume_keeps_the_runs_settings_and_may_train_longer(run_tiny, train_main, finished):
    run = run_tiny("short", epochs=1, milestones=[1])
    before = json.loads((run / "config.json").read_text())
    train_main("--resume", "--out", str(run), "--epochs", "2", "--milestones")
    after = json.loads((run / "config.json").read_text())
    assert after["optim"]["epochs"] == 2
    assert {**after, "optim": before["optim"]} == before
    assert numbers(run) == numbers(finished)


def test_a_refused_resume_leaves_the_run_as_it_was(run_tiny, train_main):
    run = run_tiny(epochs=1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        train_main("pretrain", resume=run, backbone="r3d_10")
    assert "--backbone is r3d_10" in str(caught.value)
    with pytest.raises(UserError):
        train_main("pretrain", resume=run, ds_config="no.json")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_videos_that_cannot_be_read_are_listed_in_the_report(demo_videos, run_tiny, monkeypatch, tmp_path, capsys):
    """The manifest skips one video. Another video fails while training, once per epoch."""
    data = tmp_path / "data"
    shutil.copytree(demo_videos, data)
    listed = (data / "splits" / "train.txt").read_text().splitlines()
    (data / listed[0].split()[0]).write_bytes(b"")
    gone = listed[5].split()[0]
    real = PairSamples.read

    def read(self, epoch, index, into=None):
        (data / gone).unlink(missing_ok=True)  # after the manifest was made
        return real(self, epoch, index, into)

    monkeypatch.setattr(PairSamples, "read", read)
    run = run_tiny(data=str(data), batch_size=5, max_bad=100.0)  # 15 readable videos: an epoch visits each
    report = json.loads((run / "report.json").read_text())["data"]
    assert report["unreadable"] == {listed[0].split()[0]: "empty file"}
    assert report["failed_while_training"] == {gone: "no such file"}
    assert report["failed_reads"] == 2
    assert report["videos"] == 15
    assert capsys.readouterr().err.count(gone) == 1


def test_failures_before_an_interruption_stay_in_the_report(demo_videos, run_tiny, train_main, monkeypatch, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo_videos, data)
    path = data / (data / "splits" / "train.txt").read_text().split()[0]
    content = path.read_bytes()
    status = path.stat()
    real = PairSamples.read

    def read(self, epoch, index, into=None):
        path.unlink(missing_ok=True)
        return real(self, epoch, index, into)

    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        patch.setattr(PairSamples, "read", read)
        with pytest.raises(Interrupted):
            run_tiny(data=str(data), max_bad=100.0)
    path.write_bytes(content)  # the video is readable again
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    train_main("pretrain", resume=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())["data"]
    assert report["failed_while_training"] == {path.relative_to(data).as_posix(): "no such file"}
    assert report["failed_reads"] == 1


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_nonfinite_loss_stops_the_run_at_its_step_and_reaches_no_checkpoint(
    run_tiny, monkeypatch, tmp_path, log_every
):
    """This also holds for a step between two log lines: no checkpoint may contain non-finite values."""
    real = pretraining.make_views
    calls = []

    def spoiled(*arguments):
        query, key = real(*arguments)
        calls.append(1)
        if len(calls) == 6:
            query.rgb.fill_(math.nan)
        return query, key

    monkeypatch.setattr(pretraining, "make_views", spoiled)
    every_pair = ", ".join(f"pair_loss/{pair} nan" for pair in PAIRS)
    message = (
        rf"^non-finite values at step 6: {every_pair}, alignment nan, repel nan \(samples \d+, \d+, \d+, \d+\)\. "
        "Nothing was updated and the last checkpoint is intact: lower --lr, or use --on-nonfinite skip$"
    )
    with pytest.raises(UserError, match=message):
        run_tiny(log_every=log_every, epochs=3)
    assert newest(tmp_path / "run" / "checkpoints").stem == "step-0000004"
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path / "run")[0].values())
    if log_every == 1:
        assert metrics(tmp_path / "run")[-1]["step"] == 5


def test_a_run_that_would_only_fill_the_queue_is_refused(run_tiny, tmp_path):
    with pytest.raises(UserError, match=r"^--fill-steps is 8, but .*8 steps"):
        run_tiny(fill_steps=8)
    assert not (tmp_path / "run" / "config.json").exists()


def test_accumulated_micro_batches_log_one_step_each(run_tiny, float32, tmp_path):
    config = json.loads(float32.read_text())
    path = tmp_path / "two.json"
    path.write_text(json.dumps({**config, "gradient_accumulation_steps": 2}))
    run = run_tiny(ds_config=str(path))
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert saved(run)[0]["model/enqueued"].item() == 8 * 4
    assert np.isfinite([line["loss"] for line in lines[1:]]).all()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 0), (0, 1)])
def test_a_run_resumed_under_another_zero_stage_keeps_its_momentum(
    run_tiny, train_main, float32, tmp_path, capfd, before, after
):
    """The resumed run is compared with a run that keeps its first stage.

    Stage 0 rounds differently from stage 1, and stage 2 does not. At lr 1e-3 one rounding error can flip a ReLU within
    eight steps and change a gradient by 2 % (docs/LOG.md, 2026-11-28). At lr 1e-4 the losses differ by at most 1e-7.
    A momentum that is wrong by 0.1 % changes the second loss after resuming by 3e-5.
    """
    config = json.loads(float32.read_text())
    for stage in (before, after):
        text = json.dumps({**config, "zero_optimization": {"stage": stage}})
        (tmp_path / f"stage{stage}.json").write_text(text)
    finished = run_tiny("finished", epochs=2, lr=1e-4, ds_config=str(tmp_path / f"stage{before}.json"))
    run = run_tiny(epochs=1, lr=1e-4, ds_config=str(tmp_path / f"stage{before}.json"))
    train_main(resume=run, epochs=2, ds_config=tmp_path / f"stage{after}.json")
    assert re.findall(r"ZeRO stage (\d)", capfd.readouterr().out) == [str(stage) for stage in (before, before, after)]
    for step in range(5, 9):
        assert metrics(run)[step - 1]["loss"] == pytest.approx(metrics(finished)[step - 1]["loss"], rel=1e-6)
    momentum = tensors_of(run, "momentum")
    for name, tensor in tensors_of(finished, "momentum").items():
        torch.testing.assert_close(momentum[name], tensor, rtol=1e-4, atol=1e-6 * tensor.abs().max().item())


def test_a_run_stops_once_more_than_max_bad_of_the_videos_have_failed(demo_videos, run_tiny, monkeypatch, tmp_path):
    """One of 16 videos is 6.25 %, so the second failure exceeds a limit of 7 %. The checkpoint before it is intact."""
    data = tmp_path / "data"
    shutil.copytree(demo_videos, data)
    listed = [line.split()[0] for line in (data / "splits" / "train.txt").read_text().splitlines()]
    real, calls = PairSamples.read, []

    def read(self, epoch, index, into=None):
        calls.append(1)
        for count, name in ((4, listed[3]), (18, listed[9])):  # in the first epoch and in the second
            if len(calls) == count:
                (data / name).write_bytes(b"")
        return real(self, epoch, index, into)

    monkeypatch.setattr(PairSamples, "read", read)
    with pytest.raises(
        UserError, match=r"2 of the split's 16 videos cannot be read \(12.5 %\), and --max-bad allows 7 %; the first is"
    ):
        run_tiny(data=str(data), max_bad=7.0, epochs=4)
    assert newest(tmp_path / "run" / "checkpoints").stem in ("step-0000004", "step-0000008")
    with pytest.raises(UserError, match=r"2 of the split's 16 videos cannot be read .* raise --max-bad$"):
        run_tiny("again", data=str(data), max_bad=7.0)
    assert not (tmp_path / "again").exists()
