"""A run that was stopped at any step by any signal resumes bit for bit, or says why it cannot."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import as_flags, assert_same_end, steps

from dclr import files
from dclr.commands import train
from dclr.errors import UserError
from dclr.lock import folder_lock
from dclr.report import Stopwatch
from dclr.training import pretrain as pretraining
from dclr.training import signals
from dclr.training.signals import Stopped


def signal_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Send the signal to this process while it computes that step (counted from 1)."""
    real, calls = Stopwatch.step, []

    def counted(self):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        real(self)

    monkeypatch.setattr(Stopwatch, "step", counted)


class Killed(BaseException):
    """Stand-in for SIGKILL: nothing in the run may catch it."""


@pytest.fixture(scope="module")
def accumulating(float32, tmp_path_factory) -> Path:
    """Write a DeepSpeed configuration with two micro-batches per step."""
    path = tmp_path_factory.mktemp("ds") / "two.json"
    path.write_text(json.dumps({**json.loads(float32.read_text()), "gradient_accumulation_steps": 2}))
    return path


@pytest.fixture
def flags(tiny_pretrain, accumulating) -> dict:
    return {**tiny_pretrain, "ds_config": str(accumulating)}


@pytest.fixture(scope="module")
def uninterrupted(demo_videos, accumulating, one_process, tmp_path_factory) -> Path:
    """Run 8 steps of two micro-batches. Step 1 only fills the queue, and mining is on from step 5."""
    from dclr.config import PRESETS, make_config

    settings = {
        **PRESETS["ucf101"]["pretrain"],
        "data": str(demo_videos), "ds_config": str(accumulating), "width": 4, "clip_length": 8, "crop_size": 32,
        "batch_size": 4, "epochs": 2, "workers": 0, "log_every": 1, "queue_length": 18, "embedding_dim": 32,
        "mined_positives": 2, "fill_steps": 1, "key_momentum": 0.9,
        "out": str(tmp_path_factory.mktemp("whole") / "run"),
    }  # fmt: skip
    return pretraining.pretrain(make_config("pretrain", settings), "demo", one_process)


# ---------------------------------------------------------------- resume bit for bit


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_a_run_stopped_after_any_step_resumes_bit_for_bit(
    train_main, flags, uninterrupted, monkeypatch, tmp_path, step
):
    """The stop comes while the queue fills, in the middle of an epoch, or before or after mining starts."""
    with monkeypatch.context() as patch:
        signal_at(patch, step, signal.SIGUSR1)
        with pytest.raises(
            Stopped, match=f"^asked to stop: checkpoint written at step {step}; --resume .*run continues it$"
        ):
            train_main(**flags, out=tmp_path / "run", resume="auto")
    assert steps(tmp_path / "run")[-1] == step
    train_main(**flags, out=tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", uninterrupted)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["start"] == "random weights, and later a checkpoint of this run"


def test_a_finished_run_that_is_started_again_keeps_its_report(train_main, flags, uninterrupted, tmp_path):
    """Its date must stay: the model card shows only evaluations that are newer."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = (tmp_path / "run" / "report.json").read_bytes()
    train_main(**flags, out=tmp_path / "run", resume="auto")
    assert (tmp_path / "run" / "report.json").read_bytes() == before


@pytest.mark.parametrize("kill_at", [11, 14])
def test_a_run_killed_between_two_micro_batches_of_a_step_resumes_bit_for_bit(
    train_main, flags, uninterrupted, monkeypatch, tmp_path, kill_at
):
    """The kill comes when half of the gradient is summed. The resumed run repeats the step from the last checkpoint."""
    real, calls = pretraining.make_views, []

    def views(*arguments):
        calls.append(1)
        if len(calls) == kill_at + 1:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "make_views", views)
        with pytest.raises(Killed):
            train_main(**flags, out=tmp_path / "run")
    assert steps(tmp_path / "run") == [4]
    train_main(resume=tmp_path / "run")
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_the_same_command(
    train_main, flags, uninterrupted, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretraining, "metrics", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train_main(**flags, out=tmp_path / "run", resume="auto")
    assert (tmp_path / "run" / "config.json").exists()
    train_main(**flags, out=tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", uninterrupted)
    train_main(**flags, out=tmp_path / "run", resume="auto")  # the run is finished, so nothing is done
    assert_same_end(tmp_path / "run", uninterrupted)


def test_finetuning_with_dropout_resumes_bit_for_bit(train_main, tiny, monkeypatch, tmp_path):
    flags = {**tiny, "dropout": 0.5, "lr": 0.05}
    train_main("finetune", **flags, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        with pytest.raises(Stopped):
            train_main("finetune", **flags, out=tmp_path / "run", resume="auto")
    assert steps(tmp_path / "run") == [3]
    train_main("finetune", **flags, out=tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_every_operation_of_a_run_has_a_deterministic_algorithm(train_main, flags, uninterrupted, tmp_path):
    """torch raises an error for an operation that has none. tests/test_gpu.py checks the same on a GPU."""
    try:
        train_main(**flags, out=tmp_path / "run", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_end(tmp_path / "run", uninterrupted)


def test_resume_auto_needs_a_folder_and_refuses_a_finished_run(train_main, flags, tmp_path):
    with pytest.raises(UserError, match=r"needs the run's folder: --resume auto --out RUN$"):
        train_main(resume="auto")
    train_main(**flags, out=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"holds a finished run without checkpoints: give another --out$"):
        train_main(**flags, out=tmp_path / "run", resume="auto")


# ---------------------------------------------------------------- the folder


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(train_main, flags, tmp_path):
    """The first run has written its configuration and no checkpoint yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with folder_lock(run):
        for resume in ({}, {"resume": "auto"}):
            with pytest.raises(UserError, match=rf"^{run} is being written by process {os.getpid()} on .*, since 20"):
                train_main(**flags, out=run, **resume)
    assert (run / "config.json").read_text() == "{}"
    assert os.listdir(run) == ["config.json"]


@pytest.mark.parametrize("when", ["before", "in"])
def test_a_run_whose_folder_another_one_has_continued_stops_and_writes_nothing_more(
    train_main, flags, monkeypatch, tmp_path, capsys, when
):
    """The other run takes the lock over before a log line, or while the checkpoint of step 4 is written."""
    run, other = tmp_path / "run", json.dumps({"process": 9, "host": "node7", "since": "2026"})
    real_step, real_sync, calls = Stopwatch.step, os.fsync, []

    def take_over() -> None:
        (run / "dclr-lock.json").write_text(other)

    def stepped(self):
        calls.append(1)
        if len(calls) == 3 and when == "before":
            take_over()
        real_step(self)

    def synced(descriptor):
        if when == "in" and "unfinished" in os.readlink(f"/proc/self/fd/{descriptor}"):
            take_over()
        real_sync(descriptor)

    monkeypatch.setattr(Stopwatch, "step", stepped)
    monkeypatch.setattr(files.os, "fsync", synced)
    assert train.run(as_flags({**flags, "out": run})) == 2
    assert (
        f"train.py: error: {run} has been taken over by process 9 on node7, since 2026: this command stops and writes "
        "nothing more there\n"
    ) in capsys.readouterr().err
    assert (run / "dclr-lock.json").read_text() == other
    assert steps(run) == []
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == ([1, 2] if when == "before" else [1, 2, 3, 4])
    assert not (run / "report.json").exists()


def test_a_refused_run_leaves_nothing_behind(train_main, flags, tmp_path):
    """DeepSpeed refuses its configuration after the data set is open and the network is built."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "no_such_setting": True}}))
    with pytest.raises(UserError, match="DeepSpeed refuses it"):
        train_main(**{**flags, "ds_config": tmp_path / "ds.json"}, out=tmp_path / "runs" / "run")
    assert os.listdir(tmp_path) == ["ds.json"]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_each_signal_ends_a_run_with_status_75_after_its_step(train_main, flags, monkeypatch, tmp_path, capsys, number):
    """The signal comes twice, as Ctrl-C does under a launcher. The second signal changes nothing."""
    before = [signal.getsignal(n) for n in signals.SIGNALS]
    signal_at(monkeypatch, 2, number)
    monkeypatch.setattr(pretraining, "average_statistics", lambda module: pytest.fail("the run continued"))
    real = os.replace

    def replace(source, target):
        if source.name == "unfinished":
            os.kill(os.getpid(), number)
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    assert train.run(as_flags({**flags, "out": tmp_path / "run"})) == 75
    output = capsys.readouterr().out
    assert f"train.py: asked to stop: checkpoint written at step 2; --resume {tmp_path / 'run'} continues it" in output
    assert "pretrain: 2 of 8 (25 %)" in output
    assert steps(tmp_path / "run") == [2]
    assert [signal.getsignal(n) for n in signals.SIGNALS] == before


def test_a_signal_in_the_last_step_changes_nothing(train_main, flags, uninterrupted, monkeypatch, tmp_path):
    signal_at(monkeypatch, 8, signal.SIGTERM)
    train_main(**flags, out=tmp_path / "run")
    assert_same_end(tmp_path / "run", uninterrupted)
    assert (tmp_path / "run" / "backbone.safetensors").exists()


# ---------------------------------------------------------------- disks and data that fail


def test_a_full_disk_is_reported_and_the_last_checkpoint_is_intact(
    train_main, flags, uninterrupted, monkeypatch, tmp_path
):
    real, calls = os.fsync, []

    def full(descriptor):
        if "unfinished" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError) as caught:
            train_main(**flags, out=tmp_path / "run")
    assert str(caught.value) == (
        f"the checkpoint of step 8 cannot be written to {tmp_path / 'run' / 'checkpoints'} (No space left on device): "
        "the last checkpoint, step-0000004.safetensors, is intact; free disk space or fix the folder's permissions, "
        "then use --resume"
    )
    train_main(resume=tmp_path / "run")
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """Mount a file system of 4 MB. This needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(path: Path) -> None:
    """Write to the file until its file system is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


@pytest.mark.parametrize("fault", ["full", "read-only", "vanished"])
def test_a_run_whose_folder_fails_says_so_in_one_line_and_can_resume(
    train_main, flags, uninterrupted, monkeypatch, small_disk, fault
):
    """On a real file system any write can fail first, not only that of a checkpoint."""
    run = small_disk / "run"
    real, calls = pretraining.make_views, []

    def views(*arguments):
        calls.append(1)
        if len(calls) == 11:  # step 6
            if fault == "full":
                fill(small_disk / "other")
            elif fault == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
            else:
                shutil.move(run, small_disk / "away")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "make_views", views)
        with pytest.raises(UserError) as caught:
            train_main(**flags, out=run)
    message = str(caught.value)
    assert message.startswith(f"cannot write to {run} (")
    assert "\n" not in message
    if fault == "full":
        (small_disk / "other").unlink()
    elif fault == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    else:
        assert not run.exists()
        shutil.move(small_disk / "away", run)
    assert steps(run) == [4]
    train_main(resume=run)
    assert_same_end(run, uninterrupted)


@pytest.mark.parametrize("change", ["removed", "swapped", "replaced"])
def test_a_data_set_that_changed_since_the_run_started_is_refused(
    train_main, flags, demo_videos, monkeypatch, tmp_path, change
):
    data = tmp_path / "data"
    shutil.copytree(demo_videos, data)
    flags["data"] = str(data)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        with pytest.raises(Stopped):
            train_main(**flags, out=tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    first, second = (data / line.split()[0] for line in (data / "splits" / "train.txt").read_text().splitlines()[:2])
    if change == "removed":
        first.write_bytes(b"")
        counts = r"\(16 readable videos then, 15 now\)"
    elif change == "swapped":
        first.rename(data / "aside")
        second.rename(first)
        (data / "aside").rename(second)
        counts = r"\(as many, but not the same\)"
    else:
        shutil.copy(data / (data / "splits" / "test.txt").read_text().split()[0], first)
        counts = r"\(as many, but not the same\)"
    with pytest.raises(
        UserError, match=rf"are not those it was trained on {counts}: restore them, or start another run$"
    ):
        train_main(resume=tmp_path / "run", max_bad=100)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert steps(tmp_path / "run") == [3]
