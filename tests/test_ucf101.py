"""The experiment of the paper: plan, expected hours, refused input, table and report, and stops in each stage."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, PageReader, start_program, touch, write_lines

from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.methods import METHODS
from dclr.report import environment
from dclr.training import signals
from experiments import evidence, hours, published, runs, ucf101, ucf101_plan, ucf101_report
from experiments.hours import MACHINES, Work
from experiments.runs import Job, Stage
from experiments.ucf101_plan import RANDOM

H200, CARD, EIGHT = MACHINES

HERE = environment(evidence.here()) | {"commit": "abc1234567"}


def make_ucf101(root: Path, classes: int, splits: tuple[int, ...] = (1, 2, 3), whole: bool = False) -> Path:
    """Write UCF101's lists with two train and two test videos of each class in each split, and the videos.

    Args:
        whole: as many classes as UCF101 has. The videos are then empty files.
    """
    names = [f"C{number:03d}" for number in range(classes)]
    files = {name: [f"{name}/v_{name}_g{group:02d}_c01.mp4" for group in range(1, 5)] for name in names}
    write_lines(root, "ucfTrainTestlist/classInd.txt", *(f"{number} {name}" for number, name in enumerate(names, 1)))
    for split in splits:
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for number, name in enumerate(names, 1):
            for index, file in enumerate(files[name]):
                if (index + split) % 4 < 2:
                    lists["train"].append(f"{file} {number}")
                else:
                    lists["test"].append(file)
        for kind, lines in lists.items():
            write_lines(root, f"ucfTrainTestlist/{kind}list{split:02d}.txt", *lines)
    for seed, file in enumerate(file for each in files.values() for file in each):
        if whole:
            touch(root / "UCF-101", file)
        else:
            (root / "UCF-101" / file).parent.mkdir(parents=True, exist_ok=True)
            frames = np.random.default_rng(seed).integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
            write_video(root / "UCF-101" / file, frames)
    return root


def make_hmdb51(root: Path) -> Path:
    for name in (f"class{number:02d}" for number in range(51)):
        files = [f"{name}_{number}.avi" for number in range(2)]
        touch(root / "videos" / name, *files)
        for split in (1, 2, 3):
            lines = [f"{file} {1 + number} " for number, file in enumerate(files)]
            write_lines(root, f"testTrainMulti_7030_splits/{name}_test_split{split}.txt", *lines)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the lists of whole data sets, by name."""
    root = tmp_path_factory.mktemp("whole")
    return {"ucf": make_ucf101(root / "ucf", 101, whole=True), "hmdb": make_hmdb51(root / "hmdb")}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucf101.torch.cuda, "device_count", lambda: 1)
    # No test uses the device. Where DeepSpeed was imported, torch would conclude from the count that there is one.
    monkeypatch.setattr(ucf101.torch.cuda, "is_available", lambda: False)


def arguments(whole: dict[str, Path], work: Path, *more: str) -> list[str]:
    return ["--data", str(whole["ucf"]), "--hmdb51", str(whole["hmdb"]), "--work", str(work), *more]


def plan_of(given: list[str]) -> ucf101_plan.Plan:
    return ucf101.make_plan(ucf101.make_parser().parse_args(given))


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_dry_run_prints_hours_and_all_commands_and_runs_nothing(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "start", None)
    ucf101.main(arguments(whole, tmp_path / "work", "--dry-run", "--gpus", "8"))
    printed = capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    # 2 sets to check and pack; for each of 3 seeds: 12 classifiers and 2 retrievals of each network, its bias, and for
    # two networks their pretraining and their maps.
    assert "stage 151 of 151: " in printed
    assert printed.count(" torch.distributed.run --standalone --nproc_per_node 8 train.py pretrain ") == 6
    assert printed.count(" train.py finetune ") == printed.count(" train.py linear ") == 3 * 3 * 6
    assert printed.count(" eval.py accuracy ") == 3 * 3 * 12
    for machine in MACHINES:
        assert re.search(rf"^  {machine.name} +\d+\.\d: decode \d+\.\d, pretrain dclr ", printed, re.MULTILINE)
    assert "one 24 GB card" in next(line for line in printed.splitlines() if "(with --recompute)" in line)


@pytest.mark.parametrize("limits", [[], ["--max-missing", "6", "--max-bad", "2.5"]])
@pytest.mark.parametrize("budget", ["full", "small"])
def test_train_and_eval_understand_every_command(whole, tmp_path, budget, limits):
    given = arguments(whole, tmp_path, "--dry-run", "--seeds", "2", "--budget", budget, "--methods", *METHODS)
    jobs = [job for stage in ucf101_plan.stages(plan_of([*given, *limits])) for job in stage.jobs]
    assert len({job.log for job in jobs}) == len({job.writes for job in jobs}) == len(jobs)
    for job in jobs:
        entry, *words = [*job.command, *job.machine_flags]
        if entry == "eval.py":
            flags = vars(evaluation.make_parser().parse_args(words))
            accepted = {"max_missing": 6.0}
        else:
            flags = train.parse(words)
            command = flags.pop("command")
            trains = command in ("pretrain", "finetune", "linear")
            accepted = {"max_missing": 6.0, "max_bad": 2.5} if trains else {}
            if trains:
                train.resolve(command, dict(flags))
        passed = {name: flags[name] for name in ("max_missing", "max_bad") if name in flags}
        assert passed == (accepted if limits else {}), runs.title(job)
        assert "--max-" not in runs.title(job)  # a log stays valid when a limit is raised


def make_kinetics(root: Path, missing: int) -> Path:
    """Write lists of 400 train and 400 validation videos of Kinetics-400, and all but `missing` train videos."""
    rows = [f"c{number % 400},id{number:09d},0,10" for number in range(800)]
    for split, lines in (("train", rows[:400]), ("validate", rows[400:])):
        write_lines(
            root, f"{split}.csv", "label,youtube_id,time_start,time_end,split", *(f"{x},{split}" for x in lines)
        )
    touch(root / "videos", *(f"{line.split(',')[1]}.mp4" for line in rows[missing:]))
    return root


def test_missing_videos_are_refused_before_anything_runs_and_max_missing_allows_them(whole, tmp_path, capsys):
    kinetics = make_kinetics(tmp_path / "kinetics", missing=20)
    given = [*arguments(whole, tmp_path / "work"), "--kinetics400", str(kinetics), "--dry-run"]
    message = refused(given)
    assert message.startswith(f"{kinetics}: 380 of 400 listed train videos (20 not on disk)")
    assert "5 % are not there, and --max-missing allows 1 %" in message
    assert message.endswith("complete the data set, or raise --max-missing")
    assert refused([*given, "--max-missing", "4.9"]) == message.replace("allows 1 %", "allows 4.9 %")
    assert refused([*given, "--max-missing", "101"]) == "--max-missing is 101.0, but must be from 0 to 100"
    assert capsys.readouterr().out == ""
    ucf101.main([*given, "--max-missing", "5"])
    assert "Kinetics-400: " in capsys.readouterr().out
    sample = make_ucf101(tmp_path / "sample", 2, splits=(1,), whole=True)
    (sample / "UCF-101/C000/v_C000_g03_c01.mp4").unlink()
    assert "3 of 4 listed test videos" in refused(["--data", str(sample), "--budget", "small", "--dry-run"])


def test_kinetics_is_pretrained_on_and_not_evaluated(whole, tmp_path):
    kinetics = make_kinetics(tmp_path / "kinetics", missing=0)
    plan = plan_of([*arguments(whole, tmp_path / "work"), "--kinetics400", str(kinetics), "--dry-run"])
    stages = ucf101_plan.stages(plan)
    assert {stage.title for stage in stages if stage.kind == "pretrain dclr"} == {
        f"pretrain DCLR on Kinetics-400, seed {seed}" for seed in range(3)
    }
    assert "--preset kinetics400" in " ".join(next(s for s in stages if s.kind == "pretrain dclr").jobs[0].command)
    assert not [stage for stage in stages if stage.kind in ("finetune", "linear") and "Kinetics" in stage.title]
    pack = next(stage for stage in stages if stage.title == "pack Kinetics-400")
    assert "--compact" in pack.jobs[0].command


def test_every_method_has_a_label_and_the_arithmetic_of_the_page():
    assert ucf101_plan.LABELS.keys() == hours.GFLOP.keys() == METHODS.keys()
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    cells = [[cell.strip(" `") for cell in line.split("|")] for line in page.splitlines() if line.startswith("| `")]
    assert {row[1]: int(row[4]) for row in cells if row[1] in METHODS} == hours.GFLOP


# --------------------------------------------------------------------------------------------------------------- hours


def test_hours_are_those_of_the_measured_run_on_its_machine():
    rate = json.loads((REPOSITORY / "benchmarks/results/nvidia-h200/train.json").read_text())["rows"][1]
    assert rate["source"] == "store"
    dclr = Work(samples=200 * 9537, gflop=hours.GFLOP["dclr"], batch=64, network="DCLR")
    expected = 200 * 9537 / rate["samples_per_second"]
    assert hours.seconds(dclr, H200) == pytest.approx(expected + hours.START_S)
    # A 24 GB card recomputes DCLR's step, but not MoCo's (docs/performance.md, the table of batches that fit).
    moco = Work(samples=200 * 9537, gflop=hours.GFLOP["moco"], batch=64, network="MoCo")
    assert [hours.recomputes(work, CARD) for work in (dclr, moco)] == [True, False]
    assert not hours.recomputes(dclr, H200)
    assert hours.seconds(dclr, CARD) == pytest.approx(1.2 * expected / (165.2 / 989) + hours.START_S)
    # Eight GPUs are faster than one and less than eight times as fast.
    ratio = (hours.seconds(dclr, H200) - hours.START_S) / (hours.seconds(dclr, EIGHT) - hours.START_S)
    assert 6 < ratio < 8
    # Evaluation exchanges nothing.
    clips = Work(samples=100_000, gflop=hours.FORWARD_GFLOP)
    assert hours.seconds(clips, H200) - 30 == pytest.approx(8 * (hours.seconds(clips, EIGHT) - 30))


def whole_set(name: str, splits: dict[int, tuple[int, int]]) -> ucf101_plan.DataSet:
    """Return a data set with the numbers of videos of its official lists."""
    return ucf101_plan.DataSet(name=name, folder=Path(name), splits=splits, videos=sum(splits[1]), digest="")


@pytest.mark.parametrize(
    ("methods", "seeds", "kinetics", "row"),
    [
        (("dclr", "moco"), 3, False, "UCF101 and HMDB51, DCLR and MoCo, three seeds"),
        (("dclr",), 1, False, "UCF101 and HMDB51, only DCLR, one seed"),
        (("dclr", "moco"), 1, True, "Kinetics-400, UCF101 and HMDB51, DCLR and MoCo, one seed"),
    ],
)
def test_the_page_has_the_expected_hours(methods, seeds, kinetics, row):
    ucf = whole_set("UCF101", {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)})
    hmdb = replace(whole_set("HMDB51", dict.fromkeys((1, 2, 3), (3570, 1530))), videos=6766)
    plan = ucf101_plan.Plan(
        work=Path("work"), pretrained_on=whole_set("Kinetics-400", {1: (240_000, 20_000)}) if kinetics else ucf,
        evaluated_on=(ucf, hmdb), methods=methods, seeds=range(seeds), small=False, gpus=1, workers=2,
        limits={},
    )  # fmt: skip
    stages = ucf101_plan.stages(plan)
    expected = [f"{sum(hours.hours(stage.works, machine) for stage in stages):.1f}" for machine in MACHINES]
    assert f"| {row} | {' | '.join(expected)} |" in (REPOSITORY / "docs" / "reproduce.md").read_text()


def test_published_figures_name_their_source_and_those_of_our_notes_are_those_of_the_same_method_and_network():
    notes = (REPOSITORY / "docs" / "method.md").read_text().partition("## Figures of the field")[2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in notes.splitlines() if line.startswith("| ")]
    finetuned = {(method, pretrained, network): top1 for method, pretrained, network, *top1, _ in cells}
    # The sentence about R@1 states no network.
    recalls = dict(re.findall(r"(\w+)(?: \([^)]+\))? (\d+\.\d)", notes.partition("Retrieval R@1")[2]))
    for row in published.ROWS:
        shown = [row.ucf101, row.hmdb51, row.linear, row.retrieval]
        assert any(value is not None for value in shown)
        assert row.source
        assert row.protocol
        if published.NOTES in row.source:
            assert row.source.removesuffix(f", {published.NOTES}") in notes
            *top1, linear, recall = ("" if value is None else str(value) for value in shown)
            assert top1 == finetuned.get((row.method, row.pretrained, row.backbone), ["", ""]), row
            assert recall == (recalls[row.method] if row.backbone == published.NOT_STATED else ""), row
            assert linear == ""


# -------------------------------------------------------------------------------------------------------- refused input


def refused(given: list[str]) -> str:
    with pytest.raises(UserError) as error:
        ucf101.main(given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("one_gpu")
def test_wrong_input_is_refused_in_one_line(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "start", None)
    work = tmp_path / "work"
    given = arguments(whole, work)
    assert "no such folder" in refused(["--data", str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    for flag, name in (("--data", "UCF101"), ("--hmdb51", "HMDB51"), ("--kinetics400", "Kinetics-400")):
        message = refused([*given, flag, str(tmp_path / "empty")])
        assert message.startswith(f"{flag} {tmp_path / 'empty'} is not {name}, but looks like ")
    shutil.copytree(whole["ucf"], tmp_path / "ucf")
    (tmp_path / "ucf/ucfTrainTestlist/testlist02.txt").unlink()
    assert "testlist02.txt" in refused(["--data", str(tmp_path / "ucf")])
    (tmp_path / "ucf/ucfTrainTestlist/trainlist02.txt").unlink()
    assert "has no lists of split 2: get all official lists of UCF101" in refused(["--data", str(tmp_path / "ucf")])
    sample = make_ucf101(tmp_path / "sample", 2, whole=True)
    assert "has 2 classes, but UCF101 has 101: " in refused(["--data", str(sample)])
    assert "--methods: invalid choice: 'dlcr'" in refused([*given, "--methods", "dlcr"])
    assert refused([*given, "--seeds", "0"]) == "--seeds is 0, but must be at least 1"
    assert refused([*given, "--gpus", "2"]) == "--gpus is 2, but this machine shows 1: give at most that many"
    monkeypatch.setattr(ucf101.torch.cuda, "device_count", lambda: 0)
    assert refused(given).startswith("no GPU is visible, and a CPU would need months: ")
    assert not work.exists()


@pytest.mark.usefixtures("one_gpu")
def test_a_full_disk_and_a_work_folder_of_other_data_are_refused(whole, tmp_path, monkeypatch):
    work = tmp_path / "work"
    given = arguments(whole, work)
    monkeypatch.setattr(runs, "run_stages", lambda stages, times: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(ucf101.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50e9))
    assert "the stores need about 81 GB, but the disk has 50 GB free" in refused(given)
    monkeypatch.setattr(ucf101.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100e9))
    for more in ([], ["--seeds", "5", "--methods", "moco", "simsiam"]):  # more of the same is no contradiction
        with pytest.raises(KeyboardInterrupt):
            ucf101.main([*given, *more])
    other = tmp_path / "other"
    shutil.copytree(whole["ucf"], other)
    assert f"was started with UCF101 of {whole['ucf']}, and not {other}: " in refused([*given, "--data", str(other)])
    assert "was started with budget full, and not small" in refused([*given, "--budget", "small"])
    (work / "experiment.json").write_text("{")
    assert "experiment.json is damaged" in refused(given)


@pytest.mark.usefixtures("one_gpu")
def test_a_new_work_folder_with_a_folder_report_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run_stages", None)
    monkeypatch.setattr(ucf101.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e12))
    own = tmp_path / "thesis" / "report" / "report.md"
    own.parent.mkdir(parents=True)
    own.touch()
    message = refused(arguments(whole, tmp_path / "thesis"))
    assert message.startswith(f"--work {tmp_path / 'thesis'} has a folder report that is not of this experiment: ")
    assert own.exists()


# -------------------------------------------------------------------------------------------------------------- stages


def stage_of(root: Path, name: str, kind: str, seconds: float, code: str) -> Stage:
    job = Job(command=("-c", code), writes=root / f"{name}.done", log=root / f"{name}.log", keeps_output=True)
    return Stage(title=name, kind=kind, jobs=[job], seconds=seconds)


def test_stages_run_once_in_order_and_a_failed_one_is_named(tmp_path, capsys):
    times = tmp_path / "times.json"
    fails = f"import os, sys; print('why'); os.path.exists({str(tmp_path / 'fixed')!r}) or sys.exit(2)"
    stages = [stage_of(tmp_path, name, "kind", 10.0, code) for name, code in (("a", "print(1)"), ("b", fails))]
    with pytest.raises(UserError, match=r"^stage 2 of 2, b: \$ python -c .* ended with status 2; .*same command to co"):
        runs.run_stages(stages, times)
    printed = capsys.readouterr()
    assert re.search(
        r"^stage 1 of 2: a, about 0:10 of 0:20 left, log .*/a.log\n.*\n"
        r"stage 1 of 2 done in \d+:\d\d, about \d+:\d\d left$",
        printed.out,
        re.MULTILINE,
    )
    assert printed.err == "why\n"
    assert (tmp_path / "a.done").read_text().endswith("\n1\n")
    (tmp_path / "fixed").touch()
    runs.run_stages(stages, times)
    printed = capsys.readouterr()
    assert re.match(
        r"1 of 2 stages are done, about (\d+:\d\d) left\nstage 2 of 2: b, about \1 of \1 left, log ", printed.out
    )
    assert "stage 1" not in printed.out
    assert json.loads(times.read_text()).keys() == {"a", "b"}
    times.write_text("{")
    with pytest.raises(UserError, match=r"times.json is damaged"):
        runs.run_stages(stages, times)


def test_a_killed_stage_says_which_signal_ended_it(tmp_path):
    killed = stage_of(tmp_path, "a", "kind", 1.0, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(
        UserError, match=r"was ended by SIGKILL; its output is in .*; give the same command to continue"
    ):
        runs.run_stages([killed], tmp_path / "times.json")
    asked = stage_of(tmp_path, "b", "kind", 1.0, f"raise SystemExit({signals.STATUS})")
    with pytest.raises(UserError, match=r"wrote a checkpoint; give the same command to resume$"):
        runs.run_stages([asked], tmp_path / "times.json")


def test_the_error_of_a_command_is_shown_above_the_lines_of_its_launcher(tmp_path, capsys):
    noise = "; ".join(["print('first')", "print('train.py: error: no such folder')", "print('\\n'.join('noise' * 20))"])
    failed = stage_of(tmp_path, "a", "kind", 1.0, f"{noise}; raise SystemExit(1)")
    with pytest.raises(UserError, match="ended with status 1; "):
        runs.run_stages([failed], tmp_path / "times.json")
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["train.py: error: no such folder", *list("noise" * 20)[-runs.LAST_LINES :]]


SAVES = """
import signal, sys, time
from pathlib import Path

def save(number, frame):
    Path("saving").touch()
    while not Path("signalled_twice").exists():
        time.sleep(0.05)
    time.sleep(1)  # an experiment that does not wait has ended before
    Path("saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
Path("running").touch()
time.sleep(60)
"""


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Set the handler of a signal inside the context, and check that nothing has replaced it at the end."""
    before = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_the_running_command_write_its_checkpoint(tmp_path, monkeypatch, number):
    (tmp_path / "saves.py").write_text(SAVES)
    code = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path('saves.py')"
    stage = stage_of(tmp_path, "a", "kind", 1.0, code)

    def send() -> None:
        """Send the signal twice: the second one comes while the command writes its checkpoint."""
        for file in ("running", "saving"):
            while not (tmp_path / file).exists():
                time.sleep(0.05)
            os.kill(os.getpid(), number)
        (tmp_path / "signalled_twice").touch()

    monkeypatch.setattr(sys, "argv", ["ucf101"])
    sender = threading.Thread(target=send)
    with handled(number, signal.SIG_DFL):
        sender.start()
        assert runs.entry(lambda _: runs.run_stages([stage], tmp_path / "times.json")) == 130
        sender.join()
    assert (tmp_path / "saved").exists()


def test_under_nohup_an_experiment_survives_its_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ucf101"])
    with handled(signal.SIGHUP, signal.SIG_IGN):
        assert runs.entry(lambda _: os.kill(os.getpid(), signal.SIGHUP)) == 0


def test_time_left_follows_the_stages_of_the_same_kind(tmp_path):
    stages = [
        stage_of(tmp_path, name, kind, seconds, "")
        for name, kind, seconds in (("a", "x", 10.0), ("b", "x", 20.0), ("c", "y", 30.0), ("d", "z", 40.0))
    ]
    assert runs.seconds_left(stages, {}) == 100.0
    (tmp_path / "a.done").touch()
    # It took twice as long as expected. Nothing else is known, so the others will too.
    assert runs.seconds_left(stages, {"a": 20.0}) == 180.0
    (tmp_path / "c.done").touch()
    # b will take twice as long, like a of its kind. d will take 35 s for 40, like all finished stages.
    assert runs.seconds_left(stages, {"a": 20.0, "c": 15.0}) == pytest.approx(40.0 + 40.0 * 35 / 40)
    assert [runs.duration(seconds) for seconds in (5.4, 61, 3599, 3600, 100_000)] == [
        "0:05", "1:01", "59:59", "1:00 h", "27:46 h",
    ]  # fmt: skip


def test_another_number_of_processes_continues_the_same_log(tmp_path):
    job = Job(
        command=("train.py", "pretrain"), writes=tmp_path / "w", log=tmp_path / "log",
        processes=8, machine_flags=("--workers", "2"),
    )  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8"]
    assert runs.words_of(job) == [*launcher, "train.py", "pretrain", "--workers", "2"]
    job.log.write_text(runs.title(job) + "\n")
    runs.check_log(Job(command=job.command, writes=job.writes, log=job.log))
    with pytest.raises(UserError, match="belongs to another command"):
        runs.check_log(Job(command=("train.py", "linear"), writes=job.writes, log=job.log))


# ---------------------------------------------------------------------------------------------------- table and report


TOP1 = {"dclr": 0.75, "moco": 0.5, "random-weights": 0.25}
OFFSETS = {
    "finetune-ucf101": {"top1_video": 0.0},
    "finetune-hmdb51": {"top1_video": 0.001},
    "linear-ucf101": {"top1_video": 0.002},
    "linear-hmdb51": {"top1_video": 0.003},
    "retrieval-ucf101": {"recall_at_1": 0.004},
    "retrieval-hmdb51": {"recall_at_1": 0.005},
    "bias": {"foreground_ordinary": 0.006, "foreground_moving": 0.007, "foreground_static": 0.008},
    "maps": {},
}
"""What is added to TOP1 in each figure of each evaluation. Further splits add 0.01 each, further seeds 0.03 each."""
CHANCES = {
    "finetune-ucf101": {"chance_top1": 0.10},
    "finetune-hmdb51": {"chance_top1": 0.11},
    "linear-ucf101": {"chance_top1": 0.10},
    "linear-hmdb51": {"chance_top1": 0.11},
    "retrieval-ucf101": {"chance_at_1": 0.12},
    "retrieval-hmdb51": {"chance_at_1": 0.13},
    "bias": {"motion_chance": 0.14},
    "maps": {},
}


def pretend(job: Job) -> None:
    """Write what a command would leave. The second seed has no finite loss in step 20."""
    folder = job.writes.parent
    folder.mkdir(parents=True, exist_ok=True)
    if job.command[1] == "pack":
        return job.writes.touch()
    content: dict[str, Any] = {"environment": HERE, "seconds": 1.0, "steps": 20}
    if job.command[0] == "train.py":
        lines = [{"step": step, "loss": 5 + 1 / step, "knn/recall_at_1": 0.5} for step in (10, 20, 30)]
        if folder.name.endswith("-1"):
            lines[1]["loss"] = None
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        run = next(part for part in reversed(job.writes.parts) if part.rpartition("-")[0] in TOP1)
        name, _, seed = run.rpartition("-")
        words = job.command
        split = int(words[words.index("--split") + 1])
        classifier = folder.parent.name.removesuffix(f"-{split}")
        kind = classifier if words[1] == "accuracy" else folder.name
        figures = {
            figure: TOP1[name] + 0.03 * int(seed) + 0.01 * (split - 1) + offset
            for figure, offset in OFFSETS[kind].items()
        }
        content |= {"figures": figures | CHANCES[kind], "backbone": "r2plus1d_10", "width": 64}
        content["clips"] = {"clip_length": 16, "crop_size": 112}
        picture = {"accuracy": "confusion", "retrieval": "retrieval", "bias": "foreground", "maps": "maps"}[words[1]]
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / f"{picture}.png").write_bytes(f"picture of {run} {words[1]}".encode())
    job.writes.write_text(json.dumps(content))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The commands that were run. Nothing is published, and the curves are a small picture."""
    made: list[str] = []

    def start(job: Job, threads: int) -> Any:
        made.append(" ".join(runs.words_of(job)))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        data = job.command[job.command.index("--data") + 1]
        progress = "verifying videos: 9 of 12 (75 %), 3/s, 00:01 left"
        job.log.write_text(f"{runs.title(job)}\n{progress}\n{data}: all is <well>\n{progress}\nunreadable: 0\n")
        pretend(job)
        return SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(runs, "start", start)
    monkeypatch.setattr(runs, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    monkeypatch.setattr(ucf101.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e12))
    monkeypatch.setattr(ucf101.evidence, "published_file", lambda name: tmp_path / "published" / "device" / "x.json")
    monkeypatch.setattr(ucf101.evidence, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(ucf101.evidence, "write_page", lambda: None)
    return made


@pytest.mark.usefixtures("one_gpu")
def test_the_table_and_the_report_hold_every_seed_split_and_published_row(whole, tmp_path, started):
    work = tmp_path / "work"
    given = arguments(whole, work, "--seeds", "2")
    ucf101.main(given)
    count = len(started)
    result = json.loads((work / "ucf101.json").read_text())
    rows = result["rows"]
    assert list(rows) == ["DCLR", "MoCo", RANDOM, "chance"]
    several, first = [0.0, 0.01, 0.02, 0.03, 0.04, 0.05], [0.0, 0.03]
    columns = {
        "ucf101_finetune": (several, 0.0, 0.10),
        "ucf101_finetune_first": (first, 0.0, 0.10),
        "ucf101_linear": (several, 0.002, 0.10),
        "ucf101_linear_first": (first, 0.002, 0.10),
        "ucf101_recall": (first, 0.004, 0.12),
        "hmdb51_finetune": (several, 0.001, 0.11),
        "hmdb51_finetune_first": (first, 0.001, 0.11),
        "hmdb51_linear": (several, 0.003, 0.11),
        "hmdb51_linear_first": (first, 0.003, 0.11),
        "hmdb51_recall": (first, 0.005, 0.13),
        "foreground_ordinary": (first, 0.006, 0.14),
        "foreground_moving": (first, 0.007, 0.14),
        "foreground_static": (first, 0.008, 0.14),
    }  # fmt: skip
    assert list(result["figures"]) == list(columns)
    for name, (values, offset, chance) in columns.items():
        for row, top1 in (("DCLR", 0.75), ("MoCo", 0.5), (RANDOM, 0.25)):
            assert rows[row][name] == pytest.approx([top1 + offset + value for value in values]), (row, name)
        assert rows["chance"][name] == chance
    assert ucf101.by_seed(rows["DCLR"]["ucf101_finetune"], 2) == pytest.approx([0.76, 0.79])
    assert [each["holds"] for each in result["findings"]] == [True] * 4
    assert [panel["title"] for panel in result["panels"]] == [
        "loss (methods have different losses)", "R@1 of at most 500 test videos",
    ]  # fmt: skip
    loss, recall = ([panel["lines"][method] for method in ("DCLR", "MoCo")] for panel in result["panels"])
    assert loss == 2 * [{"steps": [10, 30], "values": 2 * [[5.1, 5.03333]]}]  # the steps that both seeds have
    assert recall == 2 * [{"steps": [10, 20, 30], "values": 2 * [[0.5, 0.5, 0.5]]}]
    assert (tmp_path / "published/device/x.json").exists()

    page, text = ((work / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
    for content in (page, text):
        assert all(row.source in content for row in published.ROWS)
        for data in whole.values():
            assert str(data.parent) not in content
        assert "verifying videos" not in content
        assert "train.py check" not in content
    for name in ("ucf", "hmdb"):
        assert f"<pre>{name}: all is &lt;well&gt;\nunreadable: 0</pre>" in page
        assert f"```\n{name}: all is <well>\nunreadable: 0\n```" in text
    # UCF101 finetuned (75 to 80 %), split 1 of it and linear, R@1; HMDB51 finetuned, R@1; the numbers of the sources.
    cells = "77.5 ± 1.9 | 76.5 ± 2.1 | 77.7 ± 1.9 | 76.9 ± 2.1 | 77.6 ± 1.9 | 77.0 ± 2.1"
    assert f"| DCLR | UCF101 | r2plus1d_10 | {cells} | 1 |" in text
    assert "| InfoNCE (MoCo) | UCF101 | S3D |  |  | 46.8 | 33.1 |  |  | " in text
    assert "| PRP | UCF101, split 1 | R(2+1)D | 72.1 |  |  |  | 35.0 |  | " in text
    assert re.findall(r"https?://", page) == []
    found = PageReader(page)
    assert found.title == ucf101_report.TITLE
    assert {row.method for row in published.ROWS} < set(found.cells)
    shown = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text)
    kinds = Counter(caption.split(":")[0] for caption, _ in shown)
    confusions = 3 * 4  # finetuned and linear on the first splits of two sets, for three networks
    assert kinds["Confusion matrix"] == confusions
    assert kinds["Activation maps"] == 2
    assert found.descriptions == [caption for caption, _ in shown]
    for caption, name in shown[1:]:
        content = (work / "report" / name).read_bytes().decode()
        row = caption.split(": ")[1].split(",")[0]
        assert content.startswith(f"picture of {ucf101.controlled.folder_of(row)}-0 ")

    own = [work / "report" / name for name in ("notes.md", "001-cat.png")]
    for file in own:
        file.touch()
    before = set((work / "report").iterdir())
    ucf101.main([*given, "--seeds", "1", "--methods", "dclr"])
    assert len(started) == count  # nothing runs twice
    assert set((work / "report").glob("*-*.png")) < before  # no pictures of the earlier report, which had more
    assert all(file.exists() for file in own)


def test_a_report_of_one_seed_judges_no_claim():
    rows = {"DCLR": {"ucf101_finetune": [0.5, 0.6, 0.7]}, "MoCo": {"ucf101_finetune": [0.1, 0.2, 0.3]}}
    rows = {row: values | {"ucf101_recall": [0.5], "foreground_moving": [0.5]} for row, values in rows.items()}
    assert ucf101.findings({"rows": rows, "seeds": [0]}) == []
    assert ucf101_report.claims({"findings": []}) == [
        "Not judged: the claims need DCLR, MoCo and at least two seeds."
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- real commands


RUNNER = """
import runpy, sys
print(sys.argv[1], flush=True)  # the first line of a log
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Forked:
    """A job in a forked process, which saves the imports of a new one. It has the methods of Popen."""

    def __init__(self, job: Job, runner: Path, environment: dict[str, str], on_poll: Callable[[Job], None]) -> None:
        self._job, self._on_poll = job, on_poll
        job.log.parent.mkdir(parents=True, exist_ok=True)
        program, *words = runs.words_of(job)
        self._process = start_program(
            runner, runs.title(job), REPOSITORY / program, *words,
            environment=environment, output=job.log, errors=job.log.with_suffix(".errors"),
        )  # fmt: skip
        self.terminate, self.kill = self._process.terminate, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        self._on_poll(self._job)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._job.command, timeout or 0.0)
        return self.returncode


@pytest.fixture
def run_small(tmp_path, clean_environment, monkeypatch) -> Any:
    """Return a function that runs --budget small as from a command line, and gives the exit status."""
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER)

    def run(*given: str, on_poll: Callable[[Job], None] = lambda job: None) -> int:
        monkeypatch.setattr(runs, "start", lambda job, threads: Forked(job, runner, clean_environment, on_poll))
        monkeypatch.setattr(sys, "argv", ["ucf101", *given, "--budget", "small"])
        return runs.entry(ucf101.main)

    return run


def same_table(work: Path, other: Path) -> None:
    """Check that two experiments ended with the same figures and the same curves, bit for bit."""
    ours, theirs = (json.loads((each / "ucf101.json").read_text()) for each in (work, other))
    assert {name: ours[name] for name in ("rows", "panels", "recipe")} == {
        name: theirs[name] for name in ("rows", "panels", "recipe")
    }


@pytest.mark.slow
def test_stopped_in_every_stage_and_resumed_the_table_is_that_of_an_uninterrupted_experiment(
    tmp_path, run_small, monkeypatch, capsys
):
    data = make_ucf101(tmp_path / "ucf", classes=2, splits=(1,))
    given = ["--data", str(data), "--methods", "dclr", "--work"]
    assert run_small(*given, str(tmp_path / "whole")) == 0

    stopped: set[str] = set()
    work = tmp_path / "stopped"

    def stop(job: Job) -> None:
        """Send SIGTERM to the experiment, once in each command: in training after a step, elsewhere at the start."""
        trains = "--epochs" in job.command
        name = " ".join(job.command[:2])
        begun = (job.writes.parent / "metrics.jsonl" if trains else job.log).is_file()
        if begun and name not in stopped:
            stopped.add(name)
            os.kill(os.getpid(), signal.SIGTERM)

    statuses = []
    while not statuses or statuses[-1] == 130:
        statuses.append(run_small(*given, str(work), on_poll=stop))
    protocols = {f"eval.py {name}" for name in ("accuracy", "retrieval", "bias", "maps")}
    assert stopped == {f"train.py {name}" for name in ("check", "pack", "pretrain", "finetune", "linear")} | protocols
    assert statuses == [130] * len(stopped) + [0], capsys.readouterr()

    def interrupt(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ucf101_report, "as_markdown", interrupt)
        assert run_small(*given, str(work)) == 130
    assert run_small(*given, str(work)) == 0
    same_table(work, tmp_path / "whole")
    for kind in ("html", "md"):
        content = (work / "report" / f"report.{kind}").read_text()
        assert len(content) > 10_000 * (kind == "html")
        assert "ucf: UCF101, 8 videos, 2 classes" in content  # of train.py check
        assert "verifying videos" not in content
        assert str(tmp_path) not in content
    assert len(list((work / "report").glob("*-maps.png"))) == 1


@pytest.mark.slow
def test_budget_small_runs_on_samples_of_ucf101_and_hmdb51(genuine, tmp_path, run_small):
    ucf, hmdb = genuine / "ucf101_sample", genuine / "hmdb51_sample"
    given = ["--data", str(ucf), "--hmdb51", str(hmdb), "--methods", "dclr", "--work", str(tmp_path / "work")]
    assert run_small(*given) == 0
    result = json.loads((tmp_path / "work" / "ucf101.json").read_text())
    assert result["recipe"]["splits"] == {"UCF101": [1, 3], "HMDB51": [1]}
    assert list(result["rows"]) == ["DCLR", RANDOM, "chance"]
    assert (tmp_path / "work" / "report" / "report.html").stat().st_size > 100_000
