"""--split all: a run on each official split, their mean and standard deviation, and how they are continued."""

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest
from helpers import REPOSITORY, as_flags, free_port, make_list, steps, write_lines

from dclr.commands import evaluate
from dclr.errors import UserError
from dclr.evaluation.splits import describe_splits, over_splits
from dclr.training import finetune as finetuning
from dclr.training.signals import Stopped


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 6 videos of 3 classes, and lists of two splits: split 2 trains on the test videos of split 1."""
    folder = tmp_path_factory.mktemp("splits")
    halves = [[(f"{half}{label}.mp4", label) for label in range(3)] for half in "ab"]
    make_list(folder, train=halves[0], test=halves[1])
    for name in ("train", "test"):
        (folder / f"{name}.txt").unlink()
    for number, (train, test) in enumerate([halves, halves[::-1]], start=1):
        write_lines(folder, f"trainlist0{number}.txt", *(f"{path} {label}" for path, label in train))
        write_lines(folder, f"testlist0{number}.txt", *(f"{path} {label}" for path, label in test))
    return folder


@pytest.fixture
def few(tiny: dict[str, Any], data: Path) -> dict[str, Any]:
    return {**tiny, "data": str(data), "batch_size": 2, "epochs": 2}


def settings(run: Path) -> dict[str, Any]:
    stored = json.loads((run / "config.json").read_text())
    return {**stored["data"], **stored["optim"], "out": stored["run"]["out"]}


def listed(run: Path) -> list[str]:
    return json.loads((run / "report.json").read_text())["data"]["recognised"]


def test_a_run_on_every_split_in_its_own_folder(train_main, few, tmp_path, capsys) -> None:
    out = tmp_path / "all"
    train_main("linear", **few, split="all", out=out)
    assert sorted(path.name for path in out.iterdir()) == ["split-1", "split-2"]
    for number in (1, 2):
        run = out / f"split-{number}"
        assert (settings(run)["split"], settings(run)["out"]) == (number, str(run))
        assert listed(run)[0] == f"split {number} of the lists numbered 1 and 2"
        assert (run / "classifier.safetensors").is_file()
    assert f"done: 2 splits in {out}; evaluate them: python eval.py accuracy --split all --checkpoint {out}" in (
        capsys.readouterr().out
    )

    # The same command again is refused. Resuming finds nothing to do, and more epochs continue every split.
    with pytest.raises(UserError) as refusal:
        train_main("linear", **few, split="all", out=out)
    assert str(refusal.value) == (
        f"--out {out} already holds runs on splits: --resume {out} continues them, another --out keeps both"
    )
    before = [(out / f"split-{number}" / "report.json").stat().st_mtime_ns for number in (1, 2)]
    train_main("linear", resume=out)
    assert [(out / f"split-{number}" / "report.json").stat().st_mtime_ns for number in (1, 2)] == before
    train_main("linear", resume=out, split="all", epochs=3)
    assert [steps(out / f"split-{number}")[-1] for number in (1, 2)] == [3, 3]
    (out / "split-2" / "checkpoints" / "step-0000003.safetensors").unlink()
    (out / "split-2" / "checkpoints" / "step-0000002.safetensors").unlink()
    (out / "split-2" / "checkpoints" / "step-0000001.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match="split-2 holds a finished run without checkpoints: leave --epochs out"):
        train_main("linear", resume=out, epochs=4)
    train_main("linear", resume=out)


@pytest.mark.parametrize("again", ["resume", "auto", "without a checkpoint"])
def test_an_interrupted_command_continues_at_the_split_that_is_missing(
    train_main, few, tmp_path, monkeypatch, again
) -> None:
    out, calls = tmp_path / "all", []
    real = finetuning.count_correct

    def stop_in_split_2(*arguments):
        calls.append(1)
        if len(calls) == (3 if again == "without a checkpoint" else 4):
            raise Stopped("asked to stop")
        return real(*arguments)

    flags = {**few, "out": out, "split": "all", "lr": 0.125}
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "count_correct", stop_in_split_2)
        with pytest.raises(Stopped) as stopped:
            train_main("linear", **flags, **({"resume": "auto"} if again == "auto" else {}))
    assert str(stopped.value) == f"split 2: asked to stop; --resume {out} continues all splits"
    assert not (out / "split-2" / "report.json").exists()
    first = (out / "split-1" / "report.json").read_bytes()
    if again == "auto":
        train_main("linear", **flags, resume="auto")
    else:
        train_main("linear", resume=out)
    assert (out / "split-1" / "report.json").read_bytes() == first
    assert steps(out / "split-2")[-1] == 2
    assert settings(out / "split-2")["lr"] == 0.125
    assert listed(out / "split-2")[0] == "split 2 of the lists numbered 1 and 2"


def test_what_is_refused(train_main, few, tiny, tmp_path) -> None:
    def refused(message: str, *command: str, **flags: Any) -> None:
        with pytest.raises(UserError) as refusal:
            train_main(*command, **flags)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)

    refused("--split is all, which only finetune, linear, accuracy and", "pretrain", data=few["data"], split="all")
    refused(f"{tiny['data']} has lists for one: leave", "finetune", **tiny, split="all", out=tmp_path / "one")
    refused("the set of demo videos has lists for one", "finetune", split="all", out=tmp_path / "one")
    refused("no such folder: gone", "finetune", split="all", data="gone", out=tmp_path / "one")
    refused("argument --split: 'some' must be a number or all", "finetune", **few, split="some")
    refused("--resume needs the run's folder", "finetune", split="all", resume="")
    refused(f"--resume {tmp_path}: no run of --split all is there", "finetune", split="all", resume=tmp_path)
    assert not (tmp_path / "one").exists()

    out = tmp_path / "all"
    train_main("linear", **{**few, "epochs": 1}, split="all", out=out)
    refused("--split is 2, but", "linear", resume=out, split=2)
    refused("is a run of linear, not of finetune", "finetune", resume=out)
    refused("--out is elsewhere, but --resume continues the runs in", "linear", resume=out, out="elsewhere")
    refused("--seed is 3, but the run in", "linear", resume=out, seed=3)
    refused("--split is 1 in", "linear", resume=out, config=out / "split-1" / "config.json")


# ---------------------------------------------------------------- evaluation


def test_mean_and_standard_deviation_of_a_sample() -> None:
    figures = {1: {"top1": 0.5, "only": 1.0}, 2: {"top1": 0.6}, 3: {"top1": 0.7}}
    means, deviations = over_splits(figures)
    assert means == {"top1": pytest.approx(0.6)}
    assert deviations == {"top1": pytest.approx(0.1)}
    assert describe_splits(figures) == [
        "       split 1   split 2   split 3      mean      sd",
        "top1     50.0%     60.0%     70.0%     60.0%   10.0%",
        "sd: standard deviation over the 3 splits (n - 1)",
    ]


def test_accuracy_and_retrieval_on_all_splits(train_main, few, data, tmp_path, capsys) -> None:
    out = tmp_path / "all"
    train_main("linear", **few, split="all", out=out)
    for command, name in (("accuracy", "top1_video"), ("retrieval", "recall_at_1")):
        flags = ["--checkpoint", str(out), "--data", str(data), "--workers", "0"]
        evaluate.main([command, *flags, "--split", "all"])
        content = json.loads((out / command / "report.json").read_text())
        values = []
        for number in (1, 2):
            own = json.loads((out / command / f"split-{number}" / "report.json").read_text())
            assert (own["clips"]["split"], own["checkpoint"]) == (number, str(out / f"split-{number}"))
            assert content["splits"][str(number)] == own["figures"]
            values.append(own["figures"][name])
        assert content["mean"][name] == statistics.mean(values)
        assert content["standard_deviation"][name] == statistics.stdev(values)
        assert f"{statistics.mean(values):.1%}" in capsys.readouterr().out

    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(UserError) as refusal:
            evaluate.main(list(arguments))
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)

    single = ["--checkpoint", str(out / "split-1"), "--data", str(data), "--split", "all"]
    refused("split-1 has no runs on splits, such as split-1", "accuracy", *single)
    refused("--split is all, which only finetune, linear, accuracy", "maps", *single)
    # The run's features may be looked up on other splits.
    evaluate.main(["retrieval", *single, "--workers", "0", "--normalise-clips"])
    written = [out / "split-1" / "retrieval" / folder / "report.json" for folder in (".", "split-1", "split-2")]
    assert all(json.loads(report.read_text())["normalise_clips"] for report in written)
    assert "warning: one checkpoint for all splits" in capsys.readouterr().err
    folder = ["--checkpoint", str(out), "--data", str(data)]
    one = f"give one of them, {out / 'split-1'}"
    refused(f"{out} holds runs on single splits: use --split all for every split, or {one}", "accuracy", *folder)
    refused(f"{out} holds runs on single splits: {one}", "maps", *folder)
    shutil.rmtree(out / "split-2")
    refused(
        f"{out} has no finished run on split 2: train.py linear --split all --resume {out} trains it",
        *("accuracy", "--checkpoint", str(out), "--data", str(data), "--split", "all"),
    )


@pytest.mark.slow
def test_two_processes_train_on_all_splits_and_continue_after_a_signal(few, tmp_path, clean_environment) -> None:
    out = tmp_path / "all"
    program = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--master_port"]
    flags = as_flags({**few, "epochs": 1_000_000, "split": "all", "out": out})
    command = [*program, str(free_port()), "train.py", "linear", *flags]
    with subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment, stdout=PIPE, stderr=STDOUT, text=True) as run:
        while not (out / "split-1" / "metrics.jsonl").exists() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        assert run.stdout is not None
        text = run.stdout.read()
    assert f"--resume {out} continues all splits" in text
    epochs = steps(out / "split-1")[-1] + 5  # one step an epoch
    resumed = as_flags({"resume": out, "epochs": epochs})
    command = [*program, str(free_port()), "train.py", "linear", *resumed]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "split 1 (1 of 2): continued" in done.stdout
    assert "split 2 (2 of 2): begun" in done.stdout
    assert [steps(out / f"split-{number}")[-1] for number in (1, 2)] == [epochs, epochs]
    assert json.loads((out / "split-2" / "report.json").read_text())["processes"] == 2
