"""Tests of the command lines of train.py and eval.py: results, messages, and the end of every wrong input."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, as_flags, launcher_command, numbers, run_program
from PIL import Image

from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.commands.launcher import print_error
from dclr.data.encode import write_video
from dclr.errors import NotConnected, UserError
from dclr.models import build_backbone, load_backbone, load_pretrained, save_backbone


def run(
    command: list[str], environment: dict[str, str], timeout: float = 200, folder: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, on one thread."""
    environment = {**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout)


def error_lines(text: str, program: str) -> list[str]:
    return [line for line in text.splitlines() if f"{program}: error:" in line]


# ---------------------------------------------------------------- as programs


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train.py", ["--data", "no/such/folder"], "no such folder: no/such/folder"),
        ("train.py", ["finetune", "--epoch", "3"], "unrecognized arguments: --epoch 3"),
        ("eval.py", ["accuracy", "--checkpoint", "no/such/run"], "--checkpoint no/such/run: no such file or folder"),
    ],
    ids=["while running", "command line", "eval"],
)
def test_a_wrong_input_exits_with_status_2_and_one_line_on_stderr(clean_environment, program, arguments, message):
    done = run_program(program, *arguments, environment=clean_environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: error: ")
    assert message in line


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_ctrl_c_while_packages_are_imported_exits_with_status_130_and_no_traceback(program, monkeypatch):
    real = __import__

    def interrupted(name, *arguments, **options):
        if name.startswith("dclr.commands."):
            raise KeyboardInterrupt
        return real(name, *arguments, **options)

    monkeypatch.setattr("builtins.__import__", interrupted)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(REPOSITORY / program), run_name="__main__")
    assert left.value.code == 130


def test_check_of_genuine_ucf101_files_prints_layout_counts_and_frames(clean_environment, genuine):
    done = run_program("train.py", "check", "--data", genuine / "ucf101_sample", environment=clean_environment)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{genuine / 'ucf101_sample'}: UCF101, 7 videos, 6 classes"
    assert lines[1] == "  recognised: split 1 of the lists in ucfTrainTestlist"
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert rows[rows.index(["class", "train", "test"]) :] == [
        ["class", "train", "test"],
        *(["ApplyEyeMakeup", "0", "1"], ["BaseballPitch", "0", "1"], ["Bowling", "0", "1"], ["IceDancing", "0", "1"]),
        *(["Rowing", "1", "0"], ["SoccerJuggling", "2", "0"], ["all", "3", "4"]),
    ]
    assert "readable: 7; frames: 107 to 251, median 164" in lines
    assert "unreadable: 0" in lines


def test_check_of_faulty_files_names_each_with_its_reason(genuine, capsys):
    train.main(["check", "--data", str(genuine / "faulty")])
    shown = capsys.readouterr().out
    assert "folder of videos, 10 videos, no labels" in shown
    lines = shown.split("unreadable: 7\n")[1].splitlines()
    assert lines.pop() == "warning: 3 of 10 listed train videos (7 unreadable)"
    assert lines == [
        "  audio_only.mp4: no video stream",
        "  declares_frames_has_none.mp4: opens, but no frame decodes",
        "  invalid_bitstream.webm: decoding stops at frame 0: Invalid data found when processing input",
        "  mid_stream_error.mp4: decoding stops at frame 28: Invalid data found when processing input",
        "  one_tiny_frame.mp4: no video stream",
        "  open_fails.mp4: cannot be opened: Invalid data found when processing input",
        "  zero_bytes.avi: empty file",
    ]


@pytest.mark.launcher
def test_two_processes_make_one_run_and_one_process_resumes_it(clean_environment, train_main, tiny_pretrain, tmp_path):
    """The launcher is deepspeed. tests/test_splits.py starts two processes by torchrun."""
    flags = as_flags({**tiny_pretrain, "epochs": 1, "knn_every": 1, "out": tmp_path / "run"})
    start = launcher_command("deepspeed")
    done = run([*start, *flags], clean_environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["processes"], report["steps"]) == (2, 4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "knn/top1" in line) for line in lines] == [(1, False), (2, False), (3, False), (4, True)]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert done.stdout.count("2 process(es) on cpu") == 1
    assert len(re.findall(r"^pretrain: .*\(100 %\)", done.stdout, re.MULTILINE)) >= 1

    train_main("pretrain", resume=tmp_path / "run", epochs=2)  # resumes in one process
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["processes"], report["steps"]) == (1, 8)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_the_run_starts_and_resumes_from_other_folders(
    clean_environment, train_main, tiny_pretrain, demo_videos, tmp_path, monkeypatch
):
    """Its data set is a relative path. The default --ds_config is not in the working folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "videos").symlink_to(demo_videos)
    del tiny_pretrain["ds_config"]
    flags = {**tiny_pretrain, "data": "videos", "epochs": 1, "out": "runs/a"}
    monkeypatch.chdir(first)
    train_main(**flags)
    monkeypatch.chdir(second)
    config = first / "runs" / "a" / "config.json"
    assert json.loads(config.read_text())["started_in"] == str(first)
    train_main(resume=first / "runs" / "a", epochs=2)
    assert len(numbers(first / "runs" / "a")) == 8
    assert json.loads(config.read_text())["data"]["data"] == str(first / "videos")
    assert os.listdir(second) == []
    train_main(config=config, out=first / "runs" / "b", epochs=1)
    assert numbers(first / "runs" / "b") == numbers(first / "runs" / "a")[:4]


@pytest.mark.parametrize("moved", ["to the working folder", "elsewhere"])
def test_a_run_whose_data_set_was_moved_finds_it_or_says_where_it_looked(
    train_main, tiny_pretrain, demo_videos, tmp_path, monkeypatch, moved
):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    (first / "videos").symlink_to(demo_videos)
    train_main(**{**tiny_pretrain, "data": "videos", "epochs": 1, "out": "runs/a"})
    run = first / "runs" / "a"
    monkeypatch.chdir(second)
    if moved == "to the working folder":
        (first / "videos").rename(second / "videos")
        train_main(resume=run, epochs=2)
    else:
        (first / "videos").rename(tmp_path / "gone")
        assert refused(train_main, resume=run, epochs=2) == (
            f"--resume {run}: its data set, videos, is neither in the folder that the run was started in, nor in "
            f"{second}: give --data"
        )
        train_main(resume=run, epochs=2, data=tmp_path / "gone")
    assert len(numbers(run)) == 8


def test_the_program_runs_from_another_folder_and_takes_the_rank_of_other_launchers(
    clean_environment, tiny_pretrain, tmp_path
):
    """`python train.py --local-rank 0` by hand is a run of one process. The configuration is found by its name."""
    tiny_pretrain["ds_config"] = "zero1"
    command = [sys.executable, str(REPOSITORY / "train.py"), "--local-rank", "0"]
    flags = as_flags({**tiny_pretrain, "epochs": 1, "out": "run"})
    done = run([*command, *flags], clean_environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    "given", [["--local-rank=1"], ["--local-rank", "1"], ["--local_rank=1"], ["--local_rank", "1"]]
)
def test_the_rank_that_a_launcher_adds_is_accepted_everywhere(given):
    words = ["finetune", "--data", "videos", "--epochs", "3"]
    for position in (0, 1, 3, 5):
        assert train.parse([*words[:position], *given, *words[position:]]) == train.parse(words)
    assert train.parse(given) == train.parse([])


@pytest.mark.slow
@pytest.mark.launcher
def test_a_wrong_input_under_the_launcher_exits_with_status_2_and_one_line_for_all_ranks(clean_environment):
    start = launcher_command("deepspeed")
    done = run([*start, "--data", "no/such/folder"], clean_environment)
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert error_lines(output, "train.py") == ["train.py: error: no such folder: no/such/folder"]
    assert "Traceback" not in output


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize(("kind", "waits"), [(UserError, 30), (NotConnected, 5)])
def test_ranks_other_than_0_wait_before_they_print_an_error(program, kind, waits, monkeypatch, capsys):
    """A launcher ends all processes at the first exit. Before rank 0 has printed, the user would see no message."""
    waited = []
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    for rank, expected in (("0", []), ("1", [(waits, "")])):
        monkeypatch.setenv("RANK", rank)
        print_error(program, kind("a line"))
        assert capsys.readouterr().err == f"{program}.py: error: a line\n"
        assert waited == expected


# ---------------------------------------------------------------- in this process


def refused(call, *arguments, **flags) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **flags)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_no_subcommand_pretrains_and_no_data_means_the_demo_videos_and_says_so(
    train_main, tiny_pretrain, demo_videos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dclr.data.datasets.DEMO_VIDEOS", demo_videos)
    monkeypatch.setattr("dclr.data.datasets.render_demo", lambda folder: folder)
    del tiny_pretrain["data"]
    train_main("--local_rank=0", **{**tiny_pretrain, "epochs": 1}, out=tmp_path / "run")
    assert f"no --data: using the built-in demo videos in {demo_videos}" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["command"], written["preset"]) == ("pretrain", "demo")
    assert written["method"]["temperature"] == 0.07


def test_a_run_is_repeated_from_its_configuration_in_another_folder(train_main, tiny_pretrain, tmp_path):
    train_main(**{**tiny_pretrain, "epochs": 1}, out=tmp_path / "run", static_pairs=False, seed=3)
    train_main(config=tmp_path / "run" / "config.json", out=tmp_path / "again")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "again")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "again"))
    assert second == {**first, "run": {**first["run"], "out": str(tmp_path / "again")}}


def test_data_without_a_preset_takes_the_published_recipe(train_main, tiny_pretrain, tmp_path, capsys):
    train_main(**{**tiny_pretrain, "epochs": 1}, out=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["preset"] == "ucf101"
    assert (written["optim"]["lr"], written["method"]["queue_length"]) == (0.01, 18)
    assert "no --data" not in capsys.readouterr().out


def test_missing_data_names_the_folder_and_an_empty_one_what_is_recognised(train_main, float32, tmp_path):
    assert refused(train_main, data=tmp_path / "gone", ds_config=float32) == f"no such folder: {tmp_path / 'gone'}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("not a video")
    message = refused(train_main, data=tmp_path / "empty", ds_config=float32)
    seen = "1 file that is not a video (.txt: 1)"
    assert message.startswith(
        f"no videos found in {tmp_path / 'empty'}: {seen}; recognised are UCF101, HMDB51, Kinetics"
    )
    assert refused(train_main, "check", data=tmp_path / "empty") == message


def test_ucf101_without_a_list_or_with_an_unknown_class_is_refused_by_file_and_line(
    train_main, float32, genuine, tmp_path
):
    shutil.copytree(genuine / "ucf101_sample", tmp_path / "ucf")
    lists = tmp_path / "ucf" / "ucfTrainTestlist"
    content = (lists / "trainlist01.txt").read_text()
    (lists / "trainlist01.txt").unlink()
    message = refused(train_main, data=tmp_path / "ucf", ds_config=float32)
    assert message == f"missing list file: {lists / 'trainlist01.txt'}"
    (lists / "trainlist01.txt").write_text("Juggling/v_Juggling_g01_c01.avi 1\n" + content)
    message = refused(train_main, data=tmp_path / "ucf", ds_config=float32)
    assert message == f"{lists / 'trainlist01.txt'}:1: class 'Juggling' is not in {lists / 'classInd.txt'}"
    assert "must be 1, 2 or 3" in refused(train_main, "check", data=tmp_path / "ucf", split=4)


def test_numbers_that_contradict_each_other_are_refused(train_main, tiny_pretrain, tmp_path):
    flags = {**tiny_pretrain, "out": tmp_path / "run"}
    message = refused(train_main, **{**flags, "queue_length": 3})
    assert message.startswith("--queue-length is 3, but must be at least --batch-size (4)")
    message = refused(train_main, **{**flags, "batch_size": 17})
    assert message == "--batch-size is 17, but there are only 16 readable training videos: lower it"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; ds_configs/ holds zero1.json, zero2.json and ddp.json"),
        ("{", "not valid JSON"),
        ('{"fp16": true}', "fp16 must be a JSON object"),
        ('{"zero_optimization": 1}', "zero_optimization must be a JSON object"),
        (
            '{"gradient_accumulation_steps": "auto"}',
            "gradient_accumulation_steps is 'auto', but must be a whole number",
        ),
        ('{"gradient_accumulation_steps": 0}', "gradient_accumulation_steps is 0, but must be a whole number from 1"),
        ('{"train_batch_size": 8}', "train_batch_size is 8, but --batch-size makes it 4"),
    ],
)
def test_an_unusable_deepspeed_configuration_is_refused_by_name(train_main, tiny_pretrain, tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    found = refused(train_main, **{**tiny_pretrain, "ds_config": path})
    assert found.startswith("--ds_config")
    assert message in found


def test_an_out_folder_that_cannot_be_written_or_holds_a_run_is_refused(train_main, tiny_pretrain, tmp_path):
    (tmp_path / "file").touch()
    message = refused(train_main, **tiny_pretrain, out=tmp_path / "file" / "run")
    assert message.startswith(f"--out {tmp_path / 'file' / 'run'}: cannot write there")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    message = refused(train_main, **tiny_pretrain, out=tmp_path / "run")
    assert message.startswith(f"--out {tmp_path / 'run'} already holds a run")


def test_pretrained_weights_of_another_backbone_or_none_at_all_are_refused(train_main, tiny, tmp_path):
    save_backbone(build_backbone("r3d_10", 4), tmp_path / "backbone.safetensors")
    message = refused(train_main, "finetune", **tiny, pretrained=tmp_path, out=tmp_path / "run")
    assert message.endswith("holds r3d_10 (width 4), but --backbone is r2plus1d_10: pass --backbone r3d_10")
    message = refused(train_main, "linear", **tiny, pretrained=tmp_path / "gone", out=tmp_path / "run")
    assert str(tmp_path / "gone") in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_resumed_is_refused_with_what_can(train_main, tiny_pretrain, tmp_path):
    message = refused(train_main, resume=tmp_path / "gone")
    assert (
        message
        == f"{tmp_path / 'gone' / 'config.json'}: No such file or directory; a run's folder holds its config.json"
    )
    assert refused(train_main, resume=True).startswith("--resume needs the run's folder")

    folder = tmp_path / "run"
    train_main(**{**tiny_pretrain, "epochs": 1}, out=folder)
    message = refused(train_main, "finetune", resume=folder)
    assert message.endswith(f"is a run of pretrain, not of finetune: train.py pretrain --resume {folder}")
    assert refused(train_main, resume=folder, backbone="r3d_10").startswith("--backbone is r3d_10, but the run in")
    assert refused(train_main, resume=folder, batch_size=8).startswith("--batch-size is 8, but the run in")
    assert refused(train_main, resume=folder, preset="demo").startswith("--preset is demo, but the run in")
    shutil.rmtree(folder / "checkpoints")
    assert "holds no complete checkpoint" in refused(train_main, resume=folder)


# ---------------------------------------------------------------- eval.py


@pytest.fixture
def finetuned(train_main, tiny, tmp_path) -> Path:
    train_main("finetune", **{**tiny, "epochs": 1}, out=tmp_path / "finetuned")
    return tmp_path / "finetuned"


def test_accuracy_prints_chance_and_writes_report_and_confusion_matrix(finetuned, demo_videos, capsys):
    capsys.readouterr()
    evaluation.main(["accuracy", "--data", str(demo_videos), "--checkpoint", str(finetuned), "--workers", "0"])
    shown = capsys.readouterr().out
    report = json.loads((finetuned / "accuracy" / "report.json").read_text())
    assert report["videos"] == np.sum(report["confusion"]) == 8
    assert report["figures"]["chance_top1"] == 1 / 8
    assert report["left_out"] == {}
    assert report["clips"]["clip_length"] == 8  # the run's own, without a flag
    assert np.trace(report["confusion"]) / 8 == report["figures"]["top1_video"]
    assert re.search(r"by video +\d+\.\d% +\d+\.\d%\nby clip +\d+\.\d% +\d+\.\d%\nchance +12\.5% +62\.5%", shown)
    assert str(finetuned / "accuracy" / "report.json") in shown
    with Image.open(finetuned / "accuracy" / "pictures" / "confusion.png") as image:
        assert image.width > 300


def test_retrieval_accepts_a_run_its_file_and_random_weights(finetuned, demo_videos, tmp_path, capsys):
    flags = ["--data", str(demo_videos), "--workers", "0"]
    evaluation.main(["retrieval", *flags, "--checkpoint", str(finetuned)])
    file, other = str(finetuned / "backbone.safetensors"), str(tmp_path / "other")
    evaluation.main(["retrieval", *flags, "--checkpoint", file, "--out", other])
    first, second = (json.loads(Path(f, "report.json").read_text()) for f in (finetuned / "retrieval", other))
    assert first["figures"] == second["figures"]
    assert (first["gallery"], first["queries"], first["normalise_clips"]) == (16, 8, False)
    assert first["figures"]["chance_at_1"] == pytest.approx(2 / 16)
    assert {"recall_at_1", "recall_at_5", "recall_at_10"} <= first["figures"].keys()
    assert (finetuned / "retrieval" / "pictures" / "retrieval.png").stat().st_size > 5000

    small = ["--width", "4", "--clip-length", "8", "--crop-size", "32"]
    evaluation.main(["retrieval", *flags, *small, "--checkpoint", "random", "--out", str(tmp_path / "random")])
    report = json.loads((tmp_path / "random" / "report.json").read_text())
    assert report["weights"] == "random weights of r2plus1d_10 (width 4), seed 0"
    assert "chance" in capsys.readouterr().out


def test_without_data_the_data_set_of_the_run_is_used_and_named(finetuned, demo_videos, tmp_path, capsys):
    evaluation.main(["accuracy", "--checkpoint", str(finetuned), "--workers", "0", "--out", str(tmp_path / "out")])
    assert f"data set: {demo_videos}, which {finetuned} was trained on" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["videos"] == 8


def test_an_untrained_network_takes_size_clips_and_data_set_from_a_run(finetuned, demo_videos, tmp_path):
    flags = {"checkpoint": Path("random"), "flags": {"like": str(finetuned)}}
    settings = evaluation.settings_of(**flags)
    assert {name: settings[name] for name in ("width", "clip_length", "crop_size", "data")} == {
        "width": 4, "clip_length": 8, "crop_size": 32, "data": str(demo_videos),
    }  # fmt: skip
    shutil.copy(finetuned / "backbone.safetensors", tmp_path / "alone.safetensors")  # the file alone knows its clips
    settings = evaluation.settings_of(Path("random"), {"like": str(tmp_path / "alone.safetensors")})
    expected = {"backbone": "r2plus1d_10", "width": 4, "clip_length": 8, "clip_stride": 2, "crop_size": 32}
    assert settings == expected


def test_a_run_that_is_not_finished_is_evaluated_from_its_newest_checkpoint(finetuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finetuned, run)
    for name in ("backbone", "classifier"):
        (run / f"{name}.safetensors").unlink()
    newest = max((run / "checkpoints").iterdir())
    finished = load_pretrained(finetuned)
    for given in (run, run / "checkpoints", newest, newest.with_suffix("")):
        stopped = load_pretrained(given)
        assert stopped.file == newest
        assert (stopped.fingerprint(), stopped.clips) == (finished.fingerprint(), finished.clips)
        assert stopped.classes == finished.classes
        assert load_backbone(given, build_backbone("r2plus1d_10", 4)).startswith(f"{newest}: r2plus1d_10 (width 4)")
    flags = ["--workers", "0", "--checkpoint", str(newest.with_suffix("")), "--out", str(tmp_path / "out")]
    evaluation.main(["accuracy", *flags])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["videos"] == 8
    evaluation.main(["bias", "--workers", "0", "--checkpoint", str(run), "--out", str(tmp_path / "bias")])
    foreground = json.loads((tmp_path / "bias" / "report.json").read_text())["foreground"]
    assert foreground["predicted_by"] == f"the classifier of {run}"


def test_videos_that_cannot_be_read_are_skipped_in_the_figures_and_listed(finetuned, demo_videos, tmp_path):
    shutil.copytree(demo_videos, tmp_path / "data")
    lost = (tmp_path / "data" / "splits" / "test.txt").read_text().split()[0]
    (tmp_path / "data" / lost).write_bytes(b"")
    command = ["accuracy", "--data", str(tmp_path / "data"), "--checkpoint", str(finetuned), "--workers", "0"]
    message = refused(evaluation.main, command)
    assert "7 of 8 listed test videos (1 unreadable)" in message
    assert message.endswith(f"the first is {lost}: complete the data set, or raise --max-missing")
    evaluation.main([*command, "--max-missing", "15"])
    report = json.loads((finetuned / "accuracy" / "report.json").read_text())
    assert (report["videos"], report["left_out"]) == (7, {lost: "empty file"})


def test_what_cannot_be_evaluated_is_refused(finetuned, demo_videos, genuine, tmp_path, monkeypatch):
    def call(command, **flags):
        return refused(evaluation.main, [command, *as_flags(flags)])

    monkeypatch.setattr(
        "dclr.data.datasets.render_demo", lambda folder: pytest.fail("rendered the demo for a wrong input")
    )
    for command in ("accuracy", "retrieval"):
        message = call(command, checkpoint=tmp_path / "gone")
        assert message.startswith(f"--checkpoint {tmp_path / 'gone'}: no such file or folder")
    (tmp_path / "without-weights").mkdir()
    for command in ("accuracy", "retrieval", "bias", "maps"):
        assert "without-weights" in call(command, checkpoint=tmp_path / "without-weights")
    gone = tmp_path / "moved-run"
    gone.mkdir()
    content = (finetuned / "config.json").read_text().replace(str(demo_videos), "/gone/videos")
    (gone / "config.json").write_text(content)
    shutil.copy(finetuned / "classifier.safetensors", gone)
    assert call("accuracy", checkpoint=gone).startswith(
        f"--data is needed: {gone} was trained on /gone/videos, which is not there"
    )
    message = call("retrieval", checkpoint=finetuned, like=finetuned)
    assert message.endswith("use it with --checkpoint random")
    assert call("retrieval", checkpoint="random", like=gone / "x").startswith(f"--like {gone / 'x'}: no such file")
    message = call("accuracy", checkpoint=finetuned, data=genuine / "ucf101_sample")
    assert "knows 8 classes and" in message
    (tmp_path / "flat").mkdir()
    write_video(tmp_path / "flat" / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8))
    assert "has no test split; it has: train" in call("retrieval", checkpoint=finetuned, data=tmp_path / "flat")
    message = call("retrieval", checkpoint=finetuned, data=demo_videos, backbone="r3d_10")
    assert "pass --backbone r2plus1d_10" in message
    (tmp_path / "file").touch()
    message = call("accuracy", checkpoint=finetuned, data=demo_videos, out=tmp_path / "file" / "out")
    assert message.startswith(f"--out {tmp_path / 'file' / 'out'}")
    pretrained = tmp_path / "pretrained"
    torch.manual_seed(0)
    save_backbone(build_backbone("r2plus1d_10", 4), pretrained / "backbone.safetensors")
    message = call("accuracy", checkpoint=pretrained, data=demo_videos)
    assert message == (
        f"--checkpoint: {pretrained} holds no classifier.safetensors or checkpoint: "
        "give the folder of a run, or a file; only a finetune or linear run has a classifier"
    )
    assert os.listdir(tmp_path / "flat") == ["a.mp4"]
