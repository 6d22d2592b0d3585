"""Experiments run their commands once and publish results. Stand-ins for train.py and eval.py only write reports."""

import importlib
import json
import math
import os
import re
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_lines

from benchmarks.harness import plt
from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.config import DataConfig, resolve, write_config
from dclr.data.datasets import open_catalog, open_data
from dclr.data.decode import verify_video
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.methods import VideoMoCo
from dclr.methods.generator import drop, lowest
from dclr.report import environment
from dclr.training import checkpoint
from experiments import (
    activation_maps,
    controlled,
    controlled_set,
    dropped_frames,
    evidence,
    inputs,
    methods,
    plots,
    precision,
    real,
    runs,
    smaller,
    weizmann,
)
from experiments.runs import Job

PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "kornia", "av", "numpy")
ENVIRONMENT = {
    "device": "a device", "cores": 2, "python": "3.11.7", "versions": dict.fromkeys(PACKAGES, "2"),
    "date": "2026-11-25T00:00:00+00:00", "commit": "abc",
}  # fmt: skip
HERE = environment(evidence.here()) | {"commit": "abc1234567"}


def flag(job: Job, name: str) -> str:
    return job.command[job.command.index(name) + 1]


def written_by_train(job: Job) -> None:
    """Write what train.py leaves: losses of 5 + 1 / step, and keys 0.25 more similar than the hardest negative."""
    job.writes.parent.mkdir(parents=True, exist_ok=True)
    if job.command[1] == "pack":
        return job.writes.touch()
    epochs, lines = int(flag(job, "--epochs")), []
    for step in range(10, 24 * epochs + 1, 10):
        line: dict[str, float] = {"step": step}
        if step > 10:  # before, the queue fills
            line |= {"loss": 5 + 1 / step, "pair_loss/vv": 4.0}
            if "generator" in job.command or "random" in job.command:
                line["generator_loss"] = -0.5
            for pair in ("vv",) if "moco" in job.command else ("vv", "vd", "vs"):
                line |= {f"positive_similarity/{pair}": 0.5, f"hardest_negative/{pair}": 0.25}
        lines.append(json.dumps(line) + "\n")
    (job.writes.parent / "metrics.jsonl").write_text("".join(lines))
    report = {"steps": 24 * epochs, "seconds": 60.0 * epochs, "environment": HERE}
    report["precision"] = "float32: this CPU has no fast bfloat16"
    job.writes.write_text(json.dumps(report))


MOTION = {"random": 0.125, "dclr": 0.75, "moco": 0.25, "supervised": 0.96875, "scratch": 0.96875, "float32": 0.75}
MOTION |= {"without": 0.5625, "simclr": 0.5, "simsiam": 0.25, "videomoco": 0.25, "decay": 0.25}
"""Motion probe of a run, by the first word of its folder's name. Each further seed adds 1 %."""


def written_by_eval(job: Job) -> None:
    run = next(part for part in reversed(job.writes.parts) if part.split("-")[0] in MOTION)
    motion, seed = MOTION[run.split("-")[0]], int(run.split("-")[-1])
    figures = {"motion_probe": motion + seed / 100, "motion_nearest": motion, "motion_chance": 0.125}
    figures |= {"scene_probe": 0.5, "scene_nearest": 0.5, "scene_chance": 1 / 24}
    figures |= {f"foreground_{name}": 0.5 for name in ("ordinary", "moving", "static", "contrasted")}
    figures |= {"recall_at_1": 0.5, "chance_at_1": 0.1, "top1_video": motion, "top1_clip": 0.125}
    figures |= {name: motion + seed / 100 for name in ("A_v", "A_s", "A_d")} | {"flat": 0.1}
    figures |= {f"{name}_untrained": 0.125 for name in ("A_v", "A_s", "A_d")}
    figures |= {name: motion for name in ("motion_whole", "motion_chosen", "motion_random")}
    figures |= {"rank": 0.75 + seed / 100, "rank_other_clips": 0.75}
    figures |= {f"{name}_probe": motion + seed / 100 for name in inputs.INPUTS} | {"chance": 0.5}
    figures |= {f"{name}_nearest": motion for name in inputs.INPUTS}
    figures["chance_top1"] = 1 / 24 if "scene" in run else 0.125
    job.writes.parent.mkdir(parents=True, exist_ok=True)
    if job.command[1] == "maps":
        (job.writes.parent / "pictures").mkdir()
        (job.writes.parent / "pictures" / "maps.png").write_text(f"of {run}")
    job.writes.write_text(json.dumps({"figures": figures, "environment": HERE}))


class Ended:
    """A process that has ended with status 0."""

    returncode = 0

    def poll(self) -> int:
        return 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that were run. Each only writes what it would have measured."""
    made: list[str] = []

    def start(job: Job, threads: int) -> Ended:
        made.append(" ".join(job.command))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text(runs.title(job) + "\n")
        (written_by_train if job.command[0] == "train.py" else written_by_eval)(job)
        return Ended()

    monkeypatch.setattr(runs, "start", start)
    return made


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results and the page. Videos are listed and not rendered."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "evidence.md")
    sections = [
        evidence.MARKER.format(name) + evidence.END
        for name in ("controlled_set", "controlled", "methods", "weizmann", "real")
    ]
    (tmp_path / "evidence.md").write_text("Before.\n\n" + "\nBetween.\n\n".join(sections) + "\nAfter.\n")
    monkeypatch.setattr(controlled_set, "render_demo", render_lists)
    monkeypatch.setattr(precision, "render_demo", render_lists)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def render_lists(folder: Path, **counts: int) -> None:
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / "splits" / f"{split}.txt").write_text("videos/up/up_0000.mp4 0 scene03\n")


def list_real_sets(folder: Path) -> None:
    """List videos of the three sets of real.py, two classes of 60 videos each. No video is there."""
    for name in real.SETS:
        (folder / name / "splits").mkdir(parents=True)
        lines = [f"{label}/{number}.mp4 {label} scene{number}" for label in (0, 1) for number in range(60)]
        folds = [number // 12 + 1 for _ in (0, 1) for number in range(60)]
        (folder / name / "folds.txt").write_text(
            "".join(f"{line} {fold}\n" for line, fold in zip(lines, folds, strict=True))
        )
        for split in ("train", "test"):
            own = [line for line, fold in zip(lines, folds, strict=True) if (fold == 1) == (split == "test")]
            (folder / name / "splits" / f"{split}.txt").write_text("".join(f"{line}\n" for line in own))
        (folder / name / "splits" / "classes.txt").write_text("calm\nfight\n")


def job(folder: Path, script: Path, name: str) -> Job:
    return Job(command=(str(script), name), writes=folder / f"{name}.done", log=folder / f"{name}.log")


def script(root: Path, text: str) -> Path:
    path = root / "script.py"
    path.write_text("import os, signal, sys, time\nfrom pathlib import Path\nname = sys.argv[1]\n" + text)
    return path


# -------------------------------------------------------------------------------------------------------------- running


def test_chains_run_side_by_side_their_commands_in_order_and_the_cores_are_shared(root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    own = script(
        root,
        "with open('log.txt', 'a') as log: log.write(f'{name} begins {os.environ[\"OMP_NUM_THREADS\"]}\\n')\n"
        "deadline = time.monotonic() + 10\n"  # the first two wait for each other
        "while name in ('a1', 'b1') and not ('a1 b' in (t := open('log.txt').read()) and 'b1 b' in t):\n"
        "    assert time.monotonic() < deadline\n"
        "with open('log.txt', 'a') as log: log.write(f'{name} ends\\n')\n"
        "Path(f'{name}.done').touch()\n",
    )
    chains = [[job(root, own, name) for name in names] for names in (["a1", "a2"], ["b1", "b2"], ["c1"])]
    runs.run(chains, parallel=2)
    lines = (root / "log.txt").read_text().splitlines()
    assert lines.index("a1 ends") < lines.index("a2 begins 4")
    assert lines.index("b1 ends") < lines.index("b2 begins 4")
    running = 0
    for line in lines:
        running += 1 if "begins" in line else -1
        assert running <= 2


def test_a_chain_waits_for_the_command_that_it_needs_and_later_chains_start_before_it(root):
    own = script(
        root,
        "deadline = time.monotonic() + 10\n"
        "while name == 'pretrain' and not Path('other.done').exists():\n"
        "    assert time.monotonic() < deadline\n"
        "with open('log.txt', 'a') as log: log.write(f'{name} ')\n"
        "Path(f'{name}.done').touch()\n",
    )
    names = ("pretrain", "finetune", "accuracy", "other")
    pretrain, finetune, accuracy, other = (job(root, own, name) for name in names)
    waiting = runs.after(pretrain, [[finetune, accuracy]])
    runs.run([[pretrain], *waiting, [other]], parallel=2)
    assert (root / "log.txt").read_text() == "other pretrain finetune accuracy "
    finetune.writes.unlink()
    runs.run([[pretrain], *waiting], parallel=2)
    assert (root / "log.txt").read_text() == "other pretrain finetune accuracy finetune "
    finetune.writes.unlink()
    pretrain.writes.unlink()
    with pytest.raises(RuntimeError, match=f"no command writes {pretrain.writes}"):
        runs.run(waiting, parallel=2)


def test_done_commands_do_not_run_again_and_a_started_chain_is_finished_first(root, calls):
    chain = runs.pretrain_and_probe(root / "dclr-0", ["--workers", "1"], 0, Path("videos"), (2, 4, 6))
    other = [runs.train("finetune", root / "other", ["--epochs", "1"], 0)]
    runs.run([chain, other], parallel=1)
    assert [line.split()[0] for line in calls] == ["train.py", "eval.py"] * 3 + ["train.py"]
    assert calls[-1].endswith("other")
    runs.run([chain, other], parallel=1)
    assert len(calls) == 7
    # Interrupted in the second pretraining, which continues although report.json exists. Its probe follows.
    for epoch in (4, 6):
        (root / "dclr-0" / f"bias-{epoch}" / "report.json").unlink()
    runs.run([chain], parallel=1)
    again = calls[7:]
    assert [line.split()[0] for line in again] == ["train.py", "eval.py"] * 2
    assert "--epochs 4 " in again[0]
    assert again[1].endswith("bias-4")


def test_the_training_commands_of_a_run_differ_in_epochs_alone_and_resume(tmp_path):
    options = runs.Options(seeds=range(1), parallel=1, work=tmp_path, quick=False)
    chain = controlled.pretrained(tmp_path / "moco-0", controlled.METHODS["MoCo"], 0, Path("data"), options)
    stages = [job for job in chain if job.command[0] == "train.py"]
    epochs = [int(flag(stage, "--epochs")) for stage in stages]
    assert {flag(stage, "--resume") for stage in stages} == {"auto"}
    without = [[part for part in stage.command if part not in map(str, epochs)] for stage in stages]
    assert all(command == without[0] for command in without)
    assert epochs == list(controlled.EPOCHS) == sorted(set(epochs))
    # A milestone after the end would never change the learning rate.
    assert max(controlled.MILESTONES) < controlled.EPOCHS[-1]
    assert max(controlled.QUICK_MILESTONES) < controlled.QUICK_EPOCHS[-1]


def test_a_failed_command_stops_the_experiment_and_shows_its_last_lines(root, capsys):
    own = script(
        root,
        "def stop(*_): Path('stopped').touch(); sys.exit(75)\n"
        "if name == 'long':\n"
        "    signal.signal(signal.SIGTERM, stop)\n"
        "    Path('ready').touch()\n"
        "    time.sleep(60)\n"
        "while not Path('ready').exists(): time.sleep(0.01)\n"
        "print('\\n'.join(f'line {n}' for n in range(30)))\n"
        "print('train.py: error: no such folder', file=sys.stderr)\n"
        "sys.exit(int(name))\n",
    )
    with pytest.raises(UserError) as refused:
        runs.run([[job(root, own, "long")], [job(root, own, "2"), job(root, own, "after")]], parallel=2)
    assert str(refused.value) == f"$ python {own} 2 ended with status 2; its output is in {root / '2.log'}"
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "train.py: error: no such folder"
    assert "line 29" in shown
    assert "line 0" not in shown
    assert (root / "stopped").exists()
    assert not (root / "after.log").exists()
    with pytest.raises(UserError, match=f"0 did not write {root / '0.done'}; its output is in"):
        runs.run([[job(root, own, "0")]], parallel=1)
    with pytest.raises(UserError, match="75 was asked to stop and wrote a checkpoint; give the same command"):
        runs.run([[job(root, own, "75")]], parallel=1)


def test_results_of_another_recipe_are_refused(root, calls):
    runs.run([[runs.train("finetune", root / "run", ["--epochs", "2"], 0)]], parallel=1)
    with pytest.raises(UserError, match=r"belongs to another command .*--epochs 2.*: give another --work, or delete"):
        runs.run([[runs.train("finetune", root / "run", ["--epochs", "3"], 0)]], parallel=1)
    assert len(calls) == 1


def test_a_run_with_other_values_of_its_preset_is_refused(root, calls):
    flags = ["--preset", "demo", "--data", "videos", "--epochs", "4"]
    job = runs.train("pretrain", root / "dclr-0", flags, 0)
    runs.run([[job]], parallel=1)
    config = resolve("pretrain", "demo", {"data": "videos", "epochs": 2, "workers": 3})  # a chain's earlier command
    write_config(root / "dclr-0" / "config.json", "pretrain", "demo", config)
    runs.run([[job]], parallel=1)
    earlier = replace(config, optim=replace(config.optim, weight_decay=0.5))
    write_config(root / "dclr-0" / "config.json", "pretrain", "demo", earlier)
    with pytest.raises(
        UserError, match=r"dclr-0 was trained with --weight-decay 0\.5, but .* now means --weight-decay"
    ):
        runs.run([[job]], parallel=1)
    assert len(calls) == 1


def test_sigterm_ends_an_experiment_as_ctrl_c_does(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    try:
        assert runs.entry(terminated) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize(
    "experiment", [controlled_set, controlled, methods, weizmann, activation_maps, precision, real]
)
def test_train_and_eval_understand_every_command(root, monkeypatch, experiment, quick):
    jobs: list[Job] = []

    class Planned(Exception):
        pass

    def run(chains: list[runs.Chain], parallel: int) -> None:
        jobs.extend(job for chain in chains for job in chain)
        if any(job.command[1] != "pack" for job in jobs):
            raise Planned

    monkeypatch.setattr(runs, "run", run)
    data = ["--data", str(root)] if experiment in (weizmann, activation_maps, real) else []
    list_real_sets(root)
    with pytest.raises(Planned):
        experiment.main([*data, *quick, "--work", str(root / "work")])
    assert len({job.log for job in jobs}) == len(jobs)
    for job in jobs:
        entry, *arguments = job.command
        if entry == "train.py":
            flags = train.parse(arguments)
            if (command := flags.pop("command")) != "pack":
                train.resolve(command, flags)
        elif entry == "-m":
            measure = {"experiments.dropped_frames": dropped_frames, "experiments.inputs": inputs}[arguments.pop(0)]
            measure.make_parser().parse_args(arguments)
        else:
            evaluation.make_parser().parse_args(arguments)


def test_scenes_are_the_classes_of_the_second_list(tmp_path):
    videos = tmp_path / "videos"
    lists = {
        "train": ["up/a.mp4 0 scene07", "down/a.mp4 1 scene07", "up/b.mp4 0 scene03"],
        "test": ["down/c.mp4 1 scene03", "up/c.mp4 0 scene11"],
    }
    (videos / "splits").mkdir(parents=True)
    (videos / "splits" / "classes.txt").write_text("up\ndown\n")
    for split, lines in lists.items():
        (videos / "splits" / f"{split}.txt").write_text("".join(f"videos/{line}\n" for line in lines))
        for line in lines:
            file = videos / "videos" / line.split()[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for _ in range(2):  # the second call overwrites the first
        controlled_set.list_by_scene(videos, tmp_path / "by-scene")
    by_motion, by_scene = open_catalog(videos), open_catalog(tmp_path / "by-scene")
    assert by_scene.classes == ("scene03", "scene07", "scene11")
    assert not by_scene.missing
    for split, lines in lists.items():
        assert len(by_scene.splits[split]) == len(lines)
        for motion, scene in zip(by_motion.splits[split], by_scene.splits[split], strict=True):
            assert scene.path == motion.path
            assert by_scene.classes[scene.label] == motion.group
            assert scene.group == by_motion.classes[motion.label]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_reference_with_other_rounding_differs_in_one_setting(gpu):
    plain, kernels, rounded = (
        job
        for name in precision.CURVES
        for job in precision.curve(Path("run"), name, 0, Path("videos"), Path("ds.json"), gpu)
    )
    assert plain.environment == {"OMP_NUM_THREADS": "1"}
    assert rounded.environment["OMP_NUM_THREADS"] == ("1" if gpu else "2")
    assert kernels.environment == plain.environment | ({} if gpu else {"TRITON_INTERPRET": "1"})
    assert [*kernels.command] == ["triton" if flag == "reference" else flag for flag in plain.command]
    more = [flag for flag in rounded.command if flag not in plain.command]
    assert more == (["--pad-channels", "16"] if gpu else [])


# ------------------------------------------------------------------------------------------------------------- findings


def test_only_a_valid_set_meets_all_claims():
    def holds(motion, scene, random, single):
        rows = {
            controlled_set.MOTION: {"motion": motion},
            controlled_set.SCENE: {"scene": scene},
            controlled_set.RANDOM: {"motion": random, "scene": [0.3, 0.3]},
            controlled_set.SINGLE: {"motion": single},
            "chance": {"motion": 0.125, "scene": 0.04},
        }
        found = controlled_set.findings({"rows": rows, "recipe": {"videos of a motion": {"train": 96, "test": 32}}})
        return [each["holds"] for each in found]

    # 12.5 % + 3 sqrt(0.125 x 0.875 / 256) = 18.7 %
    assert controlled_set.near_chance(0.125, 256) == pytest.approx(0.18701, abs=1e-5)
    good = [[0.96, 0.94], [0.99, 0.99], [0.1, 0.11], [0.18, 0.19]]
    bad = [[0.94, 0.94], [0.94, 0.95], [0.19, 0.19], [0.19, 0.19]]
    assert holds(*good) == [True] * 4
    for wrong in range(4):
        found = holds(*(bad[number] if number == wrong else good[number] for number in range(4)))
        assert found == [number != wrong for number in range(4)]


def test_curves_that_differ_are_reported_with_the_difference_that_rounding_alone_makes():
    plain = [[10.0, 8.0, 5.0], [12.0, 6.0, 4.0]]

    def compare(triton, rounded, seeds=2):
        curves = {precision.REFERENCE: plain, precision.TRITON: triton, precision.ROUNDED: rounded}
        found = precision.compare_curves({name: by_seed[:seeds] for name, by_seed in curves.items()})
        return [each["holds"] for each in found], [each["detail"] for each in found]

    near = [[10.0, 8.0007, 5.0], [12.0, 6.0, 4.0038]]
    assert compare(near, near)[0] == [True, True, True]
    for step in (0, 1):
        wrong = [plain[0], [12.0, 6.0, 4.0038]]
        wrong[1][step] *= 1.0002
        assert compare(wrong, near)[0] == [False, True, True]
    # 1.2e-3 at the last step, and the reference with other rounding is as far. One seed gives no third claim.
    far = [[10.0, 8.0, 5.0], [12.0, 6.0, 3.9952]]
    verdicts, details = compare(far, far)
    assert verdicts == [True, False, True]
    assert "1.2e-03 in 3 steps of 2 seeds" in details[1]
    assert details[1].endswith("the reference with other rounding differs by 1.2e-03")
    assert compare(far, far, seeds=1)[0] == [True, True]
    # 1000 times the rounding difference at the last of three steps: one power of ten on average.
    verdicts, details = compare([[10.0, 8.0, 5.05], [12.0, 6.0, 4.04]], [[10.0, 8.0, 5.00005], [12.0, 6.0, 4.00004]])
    assert verdicts == [True, False, False]
    assert "10^-6.0 and 10^-7.0: +1.0 powers of ten, threshold at most 0.0" in details[2]


def test_two_means_differ_by_two_standard_errors_and_one_seed_gives_no_claim():
    # Standard error of the difference: sqrt((0.01 + 0.01) / 3) = 8.2 points, twice that 16.3. Of the 20 divisions, two
    # have at least the difference of `near` and `less`: these two, and one with 0.6 in place of 0.56.
    less, near, far = [0.4, 0.5, 0.6], [0.56, 0.66, 0.76], [0.57, 0.67, 0.77]
    (found,) = evidence.above("better", near, less)
    assert found == {
        "claim": "better",
        "holds": False,
        "detail": "+16.0 points, threshold more than 16.3, exact test 0.100",
    }
    (found,) = evidence.not_below("kept", less, near)
    assert found == {"claim": "kept", "holds": True, "detail": "-16.0 points, threshold at least -16.3"}
    assert evidence.above("better", far, less)[0]["holds"]
    assert not evidence.above("better", less, far)[0]["holds"]
    assert not evidence.not_below("kept", less, far)[0]["holds"]
    assert precision.compare_accuracy("motion", less, near)[0]["holds"]
    for pair in ((less, far), (far, less)):
        assert not precision.compare_accuracy("motion", *pair)[0]["holds"]
    for compare in (evidence.above, evidence.not_below, precision.compare_accuracy):
        assert compare("one seed", [0.9], [0.1]) == []


def test_dclr_is_compared_with_moco_random_weights_and_itself_without_dynamic_pairs():
    probes = {
        "DCLR": [0.7, 0.72],
        "MoCo": [0.5, 0.52],
        "without dynamic pairs": [0.8, 0.82],
        "without mining": [0.1, 0.1],
    }
    rows: evidence.Rows = {row: {"motion_probe": values, "scene_probe": values} for row, values in probes.items()}
    rows["random weights"] = {"motion_probe": [0.1, 0.1], "scene_probe": [0.72, 0.74]}
    found = controlled.findings({"rows": rows})
    assert [(each["claim"].split()[-1], each["holds"]) for each in found] == [
        ("MoCo", True), ("pairs", False), ("MoCo", True), ("weights", True)
    ]  # fmt: skip
    rows["random weights"]["scene_probe"] = [0.8, 0.8]
    assert [each["holds"] for each in controlled.findings({"rows": rows})] == [True, False, True, False]
    assert controlled.findings({"rows": {"MoCo": rows["MoCo"]}}) == []


def test_the_findings_of_the_page_are_those_that_were_published():
    """The page computes them again from the rows, in today's words. Verdicts and numbers must be those of the file.

    Most files are older than the exact test next to a threshold.
    """
    for file in evidence.RESULTS.glob("*/*.json"):
        result, module = json.loads(file.read_text()), importlib.import_module(f"experiments.{file.stem}")
        for now, then in zip(module.findings(result), result["findings"], strict=True):
            assert now["holds"] == then["holds"], then
            details = [re.sub(r"(threshold .*), exact test [\d.]+$", r"\1", each["detail"]) for each in (now, then)]
            numbers = [set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", detail)) for detail in details]
            assert numbers[0] == numbers[1], then


def test_logged_numbers_are_thinned_to_means_over_intervals(tmp_path):
    metrics = [{"step": 10 * n, "loss": float(n)} for n in range(1, 9)] + [{"step": 90, "loss": None}, {"step": 100}]
    assert controlled.thinned(metrics, "loss", points=4) == ([15, 35, 55, 75], [1.5, 3.5, 5.5, 7.5])
    assert controlled.thinned(metrics, "loss") == ([10 * n for n in range(1, 9)], [float(n) for n in range(1, 9)])
    for seed in range(2):
        (tmp_path / f"dclr-{seed}").mkdir()
        lines = [{"step": n, "loss": float(n + seed)} for n in range(1, 4) if (n, seed) != (2, 1)]
        (tmp_path / f"dclr-{seed}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (line,) = controlled.logged_lines(tmp_path, ["DCLR"], range(2), "loss").values()
    assert line == {"steps": [1, 3], "values": [[1.0, 3.0], [2.0, 4.0]]}  # one seed has no value at step 2
    similarities = [{"step": n, "key": 0.5, "negative": 0.25 * n} for n in (1, 2)]
    assert controlled.thinned(similarities, "key", minus="negative") == ([1, 2], [0.25, 0.0])


# ------------------------------------------------------------------------------------------------------------- the page


def made_up(seeds: int, **more: Any) -> evidence.Result:
    """Return a result of 50 %, 60 %, ... by seed."""
    values = [0.5 + seed / 10 for seed in range(seeds)]
    result = {
        "question": "?",
        "seeds": list(range(seeds)),
        "figures": {name: [name, "%"] for name in ("motion_probe", "scene_probe")} | {"minutes": ["minutes", "min"]},
        "rows": {
            "DCLR": {"motion_probe": values, "scene_probe": values, "minutes": [10.0] * seeds},
            "MoCo": {"motion_probe": values, "scene_probe": values},
            "chance": {"motion_probe": 0.125},
        },
        "recipe": {"epochs": 2, "methods": {"DCLR": ["--lr", "0.1"]}},
        "environment": ENVIRONMENT,
    }
    return result | {"findings": controlled.findings(result)} | more


def test_the_page_shows_means_spreads_findings_and_every_device(tmp_path):
    names = ("controlled", "weizmann")
    page = "".join(f"{name}:\n" + evidence.MARKER.format(name) + "old\n" + evidence.END for name in names)
    for device, seeds in (("cpu", 3), ("nvidia-h200", 1)):
        (tmp_path / device).mkdir()
        (tmp_path / device / "controlled.json").write_text(json.dumps(made_up(seeds)))
    made = evidence.with_sections(page, tmp_path)
    first, second = made.split("weizmann:\n")
    cpu, gpu = first.split("One seed. a device, 2026-11-25. [Plot](evidence/nvidia-h200/controlled.png).\n")
    assert cpu.endswith("""
Mean ± standard deviation over 3 seeds. a device, 2026-11-25. [Plot](evidence/cpu/controlled.png).
Commits of the runs: abc.

|  | motion_probe | scene_probe | minutes |
|---|---|---|---|
| DCLR | 60.0 ± 10.0 % | 60.0 ± 10.0 % | 10.0 ± 0.0 |
| MoCo | 60.0 ± 10.0 % | 60.0 ± 10.0 % |  |
| chance | 12.5 % |  |  |

- **Does not hold**: the motion probe of DCLR is above that of MoCo (+0.0 points, threshold more than 16.3, exact test
  0.700).
- Holds: the scene probe of DCLR is not below that of MoCo (+0.0 points, threshold at least -16.3).

""")
    assert "| DCLR | 50.0 % | 50.0 % | 10.0 |" in gpu
    assert second == evidence.MARKER.format("weizmann") + "\nNot measured yet.\n\n" + evidence.END
    assert evidence.with_sections(made, tmp_path) == made


@pytest.mark.parametrize("seeds", [1, 3])
def test_plots_show_means_and_the_spread_over_several_seeds(seeds):
    figure = plots.plot(made_up(seeds))
    panel = figure.axes[0]
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == pytest.approx([0.5 + (seeds - 1) / 20] * 4)  # minutes and chance are not bars
    errors = [container.errorbar for container in panel.containers if getattr(container, "errorbar", None) is not None]
    assert len(errors) == (2 if seeds > 1 else 0)
    for error in errors:
        for segment in error.lines[2][0].get_segments():
            assert [height for _, height in segment] == pytest.approx([0.5, 0.7])
    plt.close(figure)

    values = [[0.1 + seed / 10, 0.5 + seed / 10] for seed in range(seeds)]
    line = {"steps": [100, 200], "values": values}
    curves = {"title": "motion", "ylabel": "share", "lines": {"DCLR": line, "triton": line}, "levels": {"chance": 0.1}}
    figure = plots.plot(made_up(seeds, panels=[curves] * 3))
    assert len(figure.axes) == 3
    panel = figure.axes[0]
    assert panel.lines[0].get_ydata() == pytest.approx(
        [statistics.mean(by_step) for by_step in zip(*values, strict=True)]
    )
    assert [text.get_text() for text in panel.texts] == ["chance"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DCLR", "Triton kernels"]
    assert len(panel.collections) == (2 if seeds > 1 else 0)
    if seeds > 1:
        band = panel.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((0.1, 0.7))
    plt.close(figure)


def test_less_does_not_replace_what_is_published_and_a_quick_run_replaces_nothing(root, capsys):
    def publish(result: evidence.Result, seeds: int, quick: bool = False) -> str:
        work = root / ("quick" if quick else "work")
        options = runs.Options(seeds=range(seeds), parallel=1, work=work, quick=quick)
        evidence.publish("controlled", result, [], options)
        return capsys.readouterr().out

    publish(made_up(2), 2)
    (file,) = (root / "results").glob("*/controlled.json")
    before, page = file.read_text(), (root / "evidence.md").read_text()
    fewer_rows = made_up(2)
    del fewer_rows["rows"]["MoCo"]
    for less, seeds in ((made_up(1), 1), (fewer_rows, 2)):
        assert f"{file} has seeds, rows or figures that this result lacks, and stays" in publish(less, seeds)
    assert "this run is not published" in publish(made_up(3), 3, quick=True)
    assert (file.read_text(), (root / "evidence.md").read_text()) == (before, page)
    assert json.loads((root / "work" / "controlled.json").read_text())["rows"].keys() == {"DCLR", "chance"}
    assert (root / "quick" / "controlled.png").is_file()
    publish(made_up(3), 3)
    assert len(json.loads(file.read_text())["seeds"]) == 3
    assert "over 3 seeds" in (root / "evidence.md").read_text()


def test_a_result_with_fewer_columns_or_another_recipe_replaces_nothing():
    """For example, a result of UCF101 alone after one of UCF101 and HMDB51, or one with smaller clips."""
    both = {"seeds": [0], "rows": {"DCLR": {}}, "figures": {"ucf101": ["", "%"], "hmdb51": ["", "%"]}}
    both["recipe"] = {"clips": ["--crop-size", "112"], "pretraining": {"MoCo": ["--lr", "0.1"]}}
    one = both | {"figures": {"ucf101": ["", "%"]}}
    assert evidence.why_not_replaced(both, one) == "seeds, rows or figures that this result lacks"
    assert evidence.why_not_replaced(one, both) == ""
    assert evidence.why_not_replaced(both, both) == ""
    smaller_clips = both | {"recipe": both["recipe"] | {"clips": ("--crop-size", "64")}}
    assert evidence.why_not_replaced(both, smaller_clips) == "another recipe (clips)"
    more = both | {"recipe": both["recipe"] | {"pretraining": {"MoCo": ["--lr", "0.1"], "DCLR": []}, "epochs": 2}}
    assert evidence.why_not_replaced(both, more) == evidence.why_not_replaced(more, both) == ""
    changed = both | {"recipe": both["recipe"] | {"pretraining": {"MoCo": ["--lr", "0.2"]}}}
    assert evidence.why_not_replaced(both, changed) == "another recipe (pretraining)"


def test_a_result_names_the_machines_versions_and_precisions_of_all_its_runs(root, calls):
    run = runs.train("finetune", root / "run", ["--epochs", "2"], 0)
    runs.run([[run]], parallel=1)
    found = evidence.environment_of([[run]], None)
    assert {name: found[name] for name in HERE.keys() - {"date"}} == {
        name: HERE[name] for name in HERE.keys() - {"date"}
    }
    assert found["precision"] == "float32"
    report = json.loads(run.writes.read_text())
    report["environment"] |= {"device": "an older GPU", "versions": HERE["versions"] | {"torch": "1.0"}}
    run.writes.write_text(json.dumps(report))
    found = evidence.environment_of([[run]], made_up(1) | {"environment": HERE | {"commit": "abc and def"}})
    assert found["device"] == evidence.AND.join(sorted(["an older GPU", HERE["device"]]))
    assert found["versions"]["torch"] == f"1.0 and {HERE['versions']['torch']}"
    assert found["versions"]["numpy"] == HERE["versions"]["numpy"]
    assert found["commit"] == "abc and abc1234567 and def"
    assert found["precision"] == "float32 and not recorded for earlier runs"


# ---------------------------------------------------------------------------------------------------------- experiments


def test_the_comparison_runs_once_and_publishes_its_table(root, calls):
    arguments = ["--seeds", "2", "--methods", "MoCo", "DCLR", "--work", str(root / "work")]
    controlled.main(arguments)
    # Two stores. For each seed: two methods with five trainings and probes, two networks on labels, and random weights.
    assert len(calls) == 2 + 2 * (2 * 5 * 2 + 2 * 3 + 1)
    page = (root / "evidence.md").read_text()
    minutes = " 75.0 ± 0.0 |" if torch.cuda.is_available() else ""  # times are reported only for a GPU
    assert f"| DCLR | 75.5 ± 0.7 % | 75.0 ± 0.0 % | 50.0 ± 0.0 % | 50.0 ± 0.0 % |{minutes}\n" in page
    assert "| random weights | 13.0 ± 0.7 % | 12.5 ± 0.0 % |" in page
    assert "| supervised on motion | 97.4 ± 0.7 % |" in page
    assert "| chance | 12.5 % | 12.5 % | 4.2 % | 4.2 % |" in page
    # 75.5 ± 0.7 against 25.5 ± 0.7 %: standard error sqrt((0.00005 + 0.00005) / 2) = 0.7 points
    said = "the motion probe of DCLR is above that of MoCo (+50.0 points, threshold more than 1.4, exact test 0.167)"
    assert f"- Holds: {said}." in page
    assert "without dynamic pairs" not in page
    (file,) = (root / "results").glob("*/controlled.json")
    assert (root / "plots" / file.parent.name / "controlled.png").stat().st_size > 10_000
    result = json.loads(file.read_text())
    assert result["command"] == "python -m experiments.controlled --seeds 2 --methods MoCo DCLR --work work"
    assert result["environment"]["commit"] == "abc1234567"
    panels = {panel["title"]: panel for panel in result["panels"]}
    probes = panels["motion, linear probe"]["lines"]["DCLR"]
    assert probes["steps"] == [24 * epoch for epoch in controlled.EPOCHS]
    assert probes["values"] == [[0.75] * 5, [0.76] * 5]
    margins = [panel["lines"] for title, panel in panels.items() if "hardest" in title]
    assert [list(lines) for lines in margins] == [["DCLR", "MoCo"], ["DCLR"], ["DCLR"]]
    assert set(margins[0]["MoCo"]["values"][0]) == {0.25}

    calls.clear()
    controlled.main(arguments)
    assert calls == []


def test_with_published_runs_only_the_given_methods_and_keeps_the_published_rows(root, calls):
    controlled.main(["--seeds", "2", "--methods", "MoCo", "DCLR", "--work", str(root / "work")])
    (file,) = (root / "results").glob("*/controlled.json")
    before = json.loads(file.read_text())
    before["environment"]["commit"] = "abc1234567 and fedcba9876"
    before["rows"]["DCLR"]["motion_probe"] = [0.5, 0.51]  # another value than a run here would give
    for panel in before["panels"]:  # the title of an older result
        panel["title"] = panel["title"].replace(
            "pair vv (clip): key minus", "pair vv, the clip itself: key against the"
        )
    file.write_text(json.dumps(before))
    calls.clear()

    added = ["--with-published", "--methods", "without mining", "without dynamic pairs"]
    controlled.main(["--seeds", "2", *added, "--work", str(root / "elsewhere")])
    started = {line.split("--out ")[1].split("/")[-1] for line in calls if line.startswith("train.py pretrain")}
    assert started == {f"without-{part}-{seed}" for part in ("mining", "dynamic-pairs") for seed in (0, 1)}
    assert not any("finetune" in line or "--checkpoint random" in line for line in calls)
    after = json.loads(file.read_text())
    assert list(after["rows"]) == [
        "random weights", "DCLR", "MoCo", "without dynamic pairs", "without mining", "supervised on motion",
        "supervised on scene", "chance",
    ]  # fmt: skip
    assert {row: after["rows"][row] for row in before["rows"]} == before["rows"]
    assert after["rows"]["without mining"]["motion_probe"] == [0.5625, 0.5725]
    assert after["environment"]["commit"] == "abc1234567 and fedcba9876"
    assert list(after["recipe"]["methods"]) == ["DCLR", "MoCo", "without dynamic pairs", "without mining"]
    assert len(after["findings"]) == len(before["findings"]) + 1
    for ours, theirs in zip(after["panels"], before["panels"], strict=True):
        assert {name: ours["lines"][name] for name in theirs["lines"]} == theirs["lines"]
        assert list(ours["lines"])[len(theirs["lines"]) :] == ["without dynamic pairs", "without mining"]


def test_seeds_of_some_methods_are_added_next_to_rows_with_fewer_seeds(root, calls, capsys):
    controlled.main(["--seeds", "2", "--methods", "MoCo", "DCLR", "without mining", "--work", str(root / "work")])
    (file,) = (root / "results").glob("*/controlled.json")
    before = json.loads(file.read_text())
    del before["environment"]["precision"]  # as in an older result
    for panel in before["panels"]:  # the title of an older result
        panel["title"] = panel["title"].replace(
            "pair vv (clip): key minus", "pair vv, the clip itself: key against the"
        )
    file.write_text(json.dumps(before))
    calls.clear()

    more = ["--first-seed", "2", "--seeds", "3", "--work", str(root / "later")]
    with pytest.raises(UserError, match=r"--with-published: .* seeds \[0, 1\], but this run needs \[0, 1, 2, 3, 4\]"):
        controlled.main([*more, "--with-published", "--methods", "MoCo"])
    with pytest.raises(UserError, match=r"--first-seed: .* has seeds \[0, 1\], but this run needs \[0, 1, 2\]"):
        controlled.main(["--first-seed", "3", "--work", str(root / "later")])
    assert calls == []
    controlled.main([*more, "--methods", "MoCo", "DCLR"])
    started = {line.split("--out ")[1].split("/")[-1] for line in calls if line.startswith("train.py pretrain")}
    assert started == {f"{method}-{seed}" for method in ("moco", "dclr") for seed in (2, 3, 4)}
    assert not any("finetune" in line for line in calls)
    after = json.loads(file.read_text())
    assert after["seeds"] == [0, 1, 2, 3, 4]
    assert after["environment"]["precision"] == "float32 and not recorded for earlier runs"
    assert list(after["rows"]) == list(before["rows"])
    assert after["rows"]["DCLR"]["motion_probe"] == [0.75, 0.76, 0.77, 0.78, 0.79]
    assert after["rows"]["random weights"]["motion_probe"] == [0.125, 0.135, 0.145, 0.155, 0.165]
    for row in ("without mining", "supervised on motion", "chance"):
        assert after["rows"][row] == before["rows"][row]
    titles = [plots.label(panel["title"]) for panel in before["panels"]]
    assert [panel["title"] for panel in after["panels"]] == titles
    probes = after["panels"][0]
    assert {name: len(line["values"]) for name, line in probes["lines"].items()} == {
        "DCLR": 5, "MoCo": 5, "without mining": 2,
    }  # fmt: skip
    assert probes["levels"]["random features"] == pytest.approx(0.145)
    assert (after["recipe"], after["figures"]) == (before["recipe"], before["figures"])
    page = (root / "evidence.md").read_text()
    assert "Mean ± standard deviation over 5 seeds, or over the number that a row names. " in page
    assert "Precision: float32, not recorded for earlier runs." in page
    assert "\n| without mining (2 seeds) | 56.8 ± 0.7 % |" in page
    assert "\n| DCLR | 77.0 ± 1.6 % |" in page
    assert "from the published result: without mining, supervised on motion, supervised on scene, chance\n" in (
        capsys.readouterr().out
    )

    last = ["--first-seed", "5", "--seeds", "1", "--work", str(root / "last")]
    calls.clear()
    for method, own in (("without mining", 2), ("without alignment", 0)):
        with pytest.raises(UserError, match=f"the next seed of the published {method} is {own}; --with-published adds"):
            controlled.main([*last, "--methods", method])
    assert calls == []  # refused before hours of training

    next_seed = ["--with-published", "--methods", "without mining", "--first-seed", "2", "--seeds", "1"]
    controlled.main([*next_seed, "--work", str(root / "last")])
    started = {line.split("--out ")[1].split("/")[-1] for line in calls if line.startswith("train.py pretrain")}
    assert started == {"without-mining-2"}
    assert not any("--checkpoint random" in line for line in calls)
    last_result = json.loads(file.read_text())
    assert last_result["seeds"] == [0, 1, 2, 3, 4]
    assert last_result["rows"]["without mining"]["motion_probe"] == pytest.approx([0.5625, 0.5725, 0.5825])
    assert {row: last_result["rows"][row] for row in after["rows"] if row != "without mining"} == {
        row: after["rows"][row] for row in after["rows"] if row != "without mining"
    }
    lines = {name: len(line["values"]) for name, line in last_result["panels"][0]["lines"].items()}
    assert lines == {"DCLR": 5, "MoCo": 5, "without mining": 3}
    calls.clear()
    for seeds, refusal in ((["--first-seed", "2"], "the next seed of the published without mining is 3"), ([], None)):
        with pytest.raises(UserError, match=refusal or "--seeds is 1, but the published without mining.* has 3 seeds"):
            controlled.main([*next_seed[:3], *seeds, "--seeds", "1", "--work", str(root / "last")])
    assert calls == []


def test_differences_of_groups_with_different_numbers_of_seeds():
    more, less = [0.5, 0.7], [0.1, 0.2, 0.3, 0.4]
    gap, error = evidence.difference(more, less)
    assert gap == pytest.approx(0.35)
    assert error == pytest.approx(math.sqrt(0.02 / 2 + (0.05 / 3) / 4))
    (found,) = evidence.above("above", more, less)
    assert found["holds"]
    assert "exact test 0.067" in found["detail"]  # 1 of 15 divisions
    for compare in (evidence.above, evidence.not_below, evidence.equal):
        assert compare("?", [0.5], less) == compare("?", more, [0.1]) == []


def test_with_published_refuses_another_recipe_and_other_seeds_but_not_another_processor(root, calls, capsys):
    options = runs.Options(seeds=range(2), parallel=1, work=root / "work", quick=False, with_published=True)
    with pytest.raises(UserError, match=r"controlled.json cannot be read .*; leave the flag out to run everything"):
        controlled.published(options)
    controlled.main(["--seeds", "2", "--methods", "DCLR", "--work", str(root / "work")])
    (file,) = (root / "results").glob("*/controlled.json")
    text = file.read_text()
    result = json.loads(text)
    assert controlled.published(options) == result
    for other, refusal in (
        (result | {"seeds": [0]}, r"has seeds \[0\], but this run needs \[0, 1\]"),
        (json.loads(text.replace('"0.03"', '"0.1"')), r"has pretraining .*'0.1'.*, but this run needs .*'0.03'"),
        (result | {"recipe": result["recipe"] | {"epochs": [4, 6]}}, r"has epochs \[4, 6\], but this run needs"),
        (result | {"recipe": result["recipe"] | {"methods": {"DCLR": []}}}, "no method here has these flags"),
    ):
        file.write_text(json.dumps(other))
        with pytest.raises(UserError, match=refusal):
            controlled.published(options)
    other = result | {"environment": ENVIRONMENT}
    file.write_text(json.dumps(other))
    capsys.readouterr()
    assert controlled.published(options) == other
    printed = capsys.readouterr().out
    assert printed == f"--with-published: {file} comes from a device; precision: not recorded for earlier runs\n"


def test_a_set_that_is_not_valid_ends_with_an_error(root, calls, capsys):
    arguments = ["--seeds", "1", "--work", str(root / "work")]
    controlled_set.main(arguments)
    assert capsys.readouterr().out.count("- Holds:") == 4
    for name in ("motion", "scene"):
        file = root / "work" / "controlled" / f"supervised-{name}-0" / "accuracy" / "report.json"
        file.write_text(file.read_text().replace('"top1_video": 0.96875', '"top1_video": 0.9'))
    with pytest.raises(SystemExit, match="not valid"):
        controlled_set.main(arguments)
    assert (
        "- **Does not hold**: a network trained on labels learns the motion (90.0%"
        in (root / "evidence.md").read_text()
    )


def test_weizmann_compares_methods_with_scratch_random_weights_and_chance(root, calls):
    weizmann.main(["--data", str(root / "data"), "--seeds", "2", "--work", str(root / "work")])
    result = json.loads((root / "work" / "weizmann.json").read_text())
    rows = result["rows"]
    assert list(rows) == ["random weights", "MoCo", "DCLR", "trained on labels from scratch", "chance"]
    assert rows["random weights"]["finetuned"] == [0.96875] * 2  # the run from scratch
    assert rows["DCLR"]["finetuned"] == [0.75] * 2
    assert rows["MoCo"]["motion_probe"] == [0.25, 0.26]
    assert rows["chance"] == {
        "finetuned": 0.125, "motion_probe": 0.125, "recall_at_1": 0.1,
        "foreground_ordinary": 0.125, "foreground_moving": 0.125, "foreground_static": 0.125,
    }  # fmt: skip
    assert [each["holds"] for each in result["findings"]] == [False, True, False]  # 75 % against 96.9, 25; 50 and 50
    started = [line for line in calls if line.startswith("train.py finetune") and "--pretrained" in line]
    assert len(started) == 4
    for line in started:
        assert line.split("--pretrained ")[1].split()[0] == line.split("--out ")[1].replace("-finetune", "")


def test_real_videos_are_compared_on_three_sets_and_seeds_can_be_added(root, calls):
    list_real_sets(root / "data")
    flags = ["--data", str(root / "data"), "--methods", "MoCo", "DCLR"]
    real.main([*flags, "--seeds", "2", "--work", str(root / "work")])
    pretrained = [line for line in calls if line.startswith("train.py pretrain")]
    assert len(pretrained) == 4
    assert all("sets/union-packed" in line for line in pretrained)
    finetuned = [line for line in calls if line.startswith("train.py finetune")]
    assert len(finetuned) == 2 * 3 * (5 + 1 + 1)  # seeds, rows, folds of surv and the other sets
    assert sum("--pretrained" in line for line in finetuned) == 2 * 2 * 7
    folded = [line for line in calls if "experiments.inputs" in line and "--folds" in line]
    assert len(folded) == 2 * 3
    assert all("--data " + str(root / "work" / "real" / "sets" / "surv-packed") in line for line in folded)

    union = (root / "work" / "real" / "sets" / "union" / "splits" / "train.txt").read_text().splitlines()
    assert len(union) == 3 * 2 * 48
    assert {line.split()[1] for line in union} == {"0"}  # no classes
    tests = []
    for fold in real.FOLDS:
        lists = root / "work" / "real" / "sets" / f"surv-{fold}" / "splits"
        train, test = (
            {line.split()[0] for line in (lists / f"{split}.txt").read_text().splitlines()}
            for split in ("train", "test")
        )
        assert not train & test
        tests += test
    assert len(tests) == len(set(tests)) == 120

    (file,) = (root / "results").glob("*/real.json")
    rows = json.loads(file.read_text())["rows"]
    names = ["random weights", "MoCo", "DCLR", "trained on labels from scratch", "chance"]
    assert list(rows) == [f"{name}: {row}" for name in real.SETS for row in names]
    assert rows["surv: DCLR"]["full_probe"] == [0.75, 0.76]
    assert rows["surv: random weights"]["finetuned"] == [0.96875] * 2  # from scratch
    assert rows["surv: trained on labels from scratch"]["static_probe"] == pytest.approx([0.96875, 0.97875])
    assert rows["surv: chance"]["finetuned"] == 0.5
    assert json.loads(file.read_text())["findings"] == []  # two seeds cannot reach the threshold
    real.main([*flags, "--first-seed", "2", "--seeds", "1", "--work", str(root / "later")])
    result = json.loads(file.read_text())
    assert result["seeds"] == [0, 1, 2]
    assert result["rows"]["surv: DCLR"]["full_probe"] == [0.75, 0.76, 0.77]
    # DCLR 75 %, MoCo 25 %, from scratch 97 %; all inputs alike, and foregrounds 50 %.
    assert [each["holds"] for each in result["findings"]] == [True, True, False, True, True, False, False, False]
    assert list(result["recipe"]["pretraining"]) == ["MoCo", "DCLR"]
    (root / "data" / "surv" / "folds.txt").write_text("0/0.mp4 0 scene0 1\n")
    with pytest.raises(UserError, match=r"folds.txt has folds \['1'\], but must have \['1', '2', '3', '4', '5'\]"):
        real.main([*flags, "--work", str(root / "third")])
    with pytest.raises(
        UserError, match=r"surv/splits/classes.txt cannot be read .*; the folder must have surv, hockey"
    ):
        real.main(["--data", str(root), "--work", str(root / "fourth")])


COMPARED = (
    ("MoCo", "moco", "moco-finetune"), ("DCLR", "dclr", "dclr-finetune"), ("random weights", "random", "scratch")
)  # fmt: skip
"""Row, and the folders of its pretrained network and of its finetuned one, without the seed."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str, str], float]:
    """(folder of the run, evaluation, figure) -> value. Each evaluation that runs writes values that no other has."""
    found: dict[tuple[str, str, str], float] = {}

    def start(job: Job, threads: int) -> Ended:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text(runs.title(job) + "\n")
        if job.command[0] == "train.py":
            written_by_train(job)
            return Ended()
        written_by_eval(job)
        report = json.loads(job.writes.read_text())
        for figure in report["figures"]:
            key = (job.writes.parts[-3], job.writes.parts[-2], figure)
            found[key] = report["figures"][figure] = (len(found) + 1) / 2**20  # sums of these are exact
        job.writes.write_text(json.dumps(report))
        return Ended()

    monkeypatch.setattr(runs, "start", start)
    return found


def test_every_cell_of_real_videos_is_that_figure_of_that_run(root, measured):
    list_real_sets(root / "data")
    flags = ["--data", str(root / "data"), "--methods", "MoCo", "DCLR"]
    real.main([*flags, "--seeds", "2", "--work", str(root / "work")])
    rows = json.loads((root / "work" / "real.json").read_text())["rows"]
    columns = {"full_probe", "full_nearest", "shuffled_probe", "static_probe", "differences_probe"}

    def mean(run: str, seed: int, evaluation: str, figure: str, parts: list[str]) -> float:
        return statistics.fmean(measured[f"{run}-{part}-{seed}", evaluation.format(part), figure] for part in parts)

    for name in real.SETS:
        parts = [f"surv-{fold}" for fold in range(1, 6)] if name == "surv" else [name]
        for row, run, transfer in COMPARED:
            expected = {
                figure: [measured[f"{run}-{seed}", f"inputs-{name}", figure] for seed in (0, 1)] for figure in columns
            }
            expected["finetuned"] = [mean(transfer, seed, "accuracy", "top1_video", parts) for seed in (0, 1)]
            if row != "random weights":
                for figure in ("foreground_moving", "foreground_static", "foreground_contrasted"):
                    expected[figure] = [measured[f"{run}-{seed}", f"bias-{name}", figure] for seed in (0, 1)]
            assert rows[f"{name}: {row}"] == expected
        supervised = {
            figure: [mean("scratch", seed, "inputs-{}", figure, parts) for seed in (0, 1)] for figure in columns
        }
        for figure in ("foreground_moving", "foreground_static", "foreground_contrasted"):
            supervised[figure] = [measured[f"scratch-{parts[0]}-{seed}", f"bias-{name}", figure] for seed in (0, 1)]
        assert rows[f"{name}: trained on labels from scratch"] == supervised


def test_every_cell_of_weizmann_is_that_figure_of_that_run(root, measured):
    weizmann.main(["--data", str(root / "data"), "--seeds", "2", "--work", str(root / "work")])
    rows = json.loads((root / "work" / "weizmann.json").read_text())["rows"]
    from_bias = [f"foreground_{name}" for name in ("ordinary", "moving", "static", "contrasted")] + ["motion_probe"]
    for row, run, transfer in COMPARED:
        expected = {figure: [measured[f"{run}-{seed}", "bias", figure] for seed in (0, 1)] for figure in from_bias}
        expected["finetuned"] = [measured[f"{transfer}-{seed}", "accuracy", "top1_video"] for seed in (0, 1)]
        expected["recall_at_1"] = [measured[f"{run}-{seed}", "retrieval", "recall_at_1"] for seed in (0, 1)]
        assert rows[row] == expected
    supervised = {figure: [measured[f"scratch-{seed}", "bias", figure] for seed in (0, 1)] for figure in from_bias}
    assert rows["trained on labels from scratch"] == supervised


def test_methods_can_be_added_to_the_published_result_on_real_videos(root, calls):
    list_real_sets(root / "data")
    flags = ["--data", str(root / "data"), "--work"]
    real.main([*flags, str(root / "work"), "--seeds", "3", "--methods", "MoCo", "DCLR"])
    (file,) = (root / "results").glob("*/real.json")
    before = json.loads(file.read_text())
    before["rows"]["surv: DCLR"]["full_probe"] = [0.5, 0.51, 0.52]  # another value than a run here would give
    file.write_text(json.dumps(before))
    calls.clear()

    added = ["--methods", real.WITHOUT_MINING]
    real.main([*flags, str(root / "added"), "--seeds", "3", "--with-published", *added])
    pretrained = [line for line in calls if line.startswith("train.py pretrain")]
    assert ["--mined-positives 0 " in line for line in pretrained] == [True] * 3
    assert sum(line.startswith("train.py finetune") for line in calls) == 3 * 7
    assert not any("scratch" in line or "--checkpoint random" in line for line in calls)
    after = json.loads(file.read_text())
    names = ["random weights", "MoCo", "DCLR", "DCLR without mining", "trained on labels from scratch", "chance"]
    assert list(after["rows"]) == [f"{name}: {row}" for name in real.SETS for row in names]
    assert {row: after["rows"][row] for row in before["rows"]} == before["rows"]
    assert list(after["recipe"]["pretraining"]) == ["MoCo", "DCLR", "DCLR without mining"]
    claims = [each["claim"] for each in after["findings"]]
    assert claims[:-2] == [each["claim"] for each in before["findings"]]
    assert claims[-2:] == [
        f"surv: the probe of DCLR without mining is above that of {other}" for other in ("DCLR", "MoCo")
    ]

    with pytest.raises(UserError, match=r"--seeds is 2, but the published surv: DCLR without mining, .* has 3 seeds"):
        real.main([*flags, str(root / "fewer"), "--seeds", "2", "--with-published", *added])
    with pytest.raises(UserError, match="--first-seed is 3, but the next seed of the published surv: VideoMoCo is 0"):
        real.main([*flags, str(root / "later"), "--first-seed", "3", "--methods", "VideoMoCo"])
    calls.clear()
    real.main([*flags, str(root / "one"), "--seeds", "1", "--with-published", "--methods", "VideoMoCo"])
    one = ["--first-seed", "1", "--seeds", "1", "--with-published", "--methods", "VideoMoCo"]
    real.main([*flags, str(root / "next"), *one])
    assert len([line for line in calls if line.startswith("train.py pretrain")]) == 2
    assert not any("scratch" in line or "--checkpoint random" in line for line in calls)
    with_two = json.loads(file.read_text())
    assert with_two["seeds"] == [0, 1, 2]
    assert len(with_two["rows"]["surv: VideoMoCo"]["full_probe"]) == 2
    assert {row: with_two["rows"][row] for row in after["rows"]} == after["rows"]
    file.write_text(json.dumps(after).replace('"0.999"', '"0.99"'))
    with pytest.raises(
        UserError, match=r"the published MoCo was run with .*0\.99.*, but no method here has these flags"
    ):
        real.main([*flags, str(root / "other"), "--seeds", "3", "--with-published", *added])


def test_the_sets_of_a_work_folder_are_not_those_of_other_videos(tmp_path):
    write = {"classes": ["a"], "train": [["0/0.mp4", "0"]]}
    for data in ("first", "second"):
        (tmp_path / data / "0").mkdir(parents=True)
    real.write_set(tmp_path / "set", {"0": tmp_path / "first" / "0"}, **write)
    real.write_set(tmp_path / "set", {"0": tmp_path / "first" / "0"}, **write)
    with pytest.raises(UserError, match=r"^--data: .*set was made from .*first/0, and not from .*second/0: give the"):
        real.write_set(tmp_path / "set", {"0": tmp_path / "second" / "0"}, **write)
    (tmp_path / "first").rename(tmp_path / "third")  # the same videos in another folder
    real.write_set(tmp_path / "set", {"0": tmp_path / "third" / "0"}, **write)
    assert (tmp_path / "set" / "0").resolve() == tmp_path / "third" / "0"


def test_large_runs_read_videos_and_have_clips_and_a_network_of_the_published_size(root, calls):
    list_real_sets(root / "data")
    work = root / "work"
    real.main(["--data", str(root / "data"), "--large", "--methods", "DCLR", "--seeds", "1", "--work", str(work)])
    assert not any(" pack " in line for line in calls)
    trained = [line for line in calls if line.startswith("train.py")]
    for line in trained:
        for flag in ("--clip-length 16", "--crop-size 112", "--width 64"):
            assert flag in line
    (pretrained,) = (line for line in trained if line.startswith("train.py pretrain"))
    assert f"--data {work / 'real' / 'sets' / 'union'} " in pretrained
    # Networks that need no other run are trained first.
    last = max(number for number, line in enumerate(calls) if "train.py" in line and "--pretrained" not in line)
    assert last < min(number for number, line in enumerate(calls) if "--pretrained" in line or "random" in line)
    assert trained[0] == pretrained
    recipe = json.loads((work / "real.json").read_text())["recipe"]
    assert recipe["epochs"] == real.LARGE.epochs == int(pretrained.split("--epochs ")[1].split()[0])


def make_real_sets(folder: Path) -> None:
    """Write the three sets of real.py with two videos each."""
    for name in real.SETS:
        write_lines(folder / name / "splits", "train.txt", "a/one.mp4 0 x")
        write_lines(folder / name / "splits", "test.txt", "two.mp4 1 y")
        write_lines(folder / name / "splits", "classes.txt", "calm", "fight")
        for seed, file in enumerate(("a/one.mp4", "two.mp4")):
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(seed).integers(0, 256, (5 + seed, 128, 170, 3), dtype=np.uint8)
            write_video(folder / name / file, noise)
    write_lines(folder / "surv", "folds.txt", "a/one.mp4 0 x 1", "two.mp4 1 y 2")


def test_a_smaller_copy_has_the_lists_and_all_frames_and_is_continued(tmp_path, capsys):
    data, copy = tmp_path / "data", tmp_path / "copy"
    make_real_sets(data)
    flags = ["--data", str(data), "--out", str(copy)]
    smaller.main(flags)
    assert capsys.readouterr().out.count(" MB in ") == 3
    for name in real.SETS:
        for file, frames in (("a/one.mp4", 5), ("two.mp4", 6)):
            record = verify_video(copy / name / file)
            assert (record.frames, record.height, record.width) == (frames, 112, 148)
            assert (copy / name / file).stat().st_size < (data / name / file).stat().st_size
        for file in ("train.txt", "test.txt", "classes.txt"):
            assert (copy / name / "splits" / file).read_bytes() == (data / name / "splits" / file).read_bytes()
    assert (copy / "surv" / "folds.txt").read_bytes() == (data / "surv" / "folds.txt").read_bytes()

    kept = copy / "surv" / "two.mp4"
    before = kept.stat().st_mtime_ns
    (copy / "surv" / "a" / "one.mp4").unlink()
    smaller.main(flags)
    assert kept.stat().st_mtime_ns == before
    assert (copy / "surv" / "a" / "one.mp4").exists()

    with pytest.raises(UserError, match=r"^--out .*copy is the folder of --data: give another one$"):
        smaller.main(["--data", str(copy), "--out", str(data / ".." / "copy")])
    (data / "hockey" / "two.mp4").write_bytes(b"no video")
    (copy / "hockey" / "two.mp4").unlink()
    with pytest.raises(UserError, match=r"^--data: .*hockey/two\.mp4 cannot be read"):
        smaller.main(flags)
    assert not (copy / "hockey" / "two.mp4").exists()


def test_the_permutation_test_counts_all_divisions_into_groups():
    assert evidence.permutation_share([3.0, 4.0, 5.0], [0.0, 1.0, 2.0]) == pytest.approx(1 / 20)
    assert evidence.permutation_share([0.0, 1.0, 2.0], [3.0, 4.0, 5.0]) == 1
    # {2, 5} sums to 7, as do {3, 4} and, of the larger ones, {4, 5}, {3, 5}: four of six divisions.
    assert evidence.permutation_share([2.0, 5.0], [3.0, 4.0]) == pytest.approx(4 / 6)
    assert evidence.permutation_share([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) == evidence.permutation_share(
        [1, 2, 3], [1, 2, 3]
    )
    (found,) = evidence.above_exact("claim", [0.3, 0.4, 0.5], [0.0, 0.1, 0.2])
    assert found == {"claim": "claim", "holds": True, "detail": "+30.0 points, exact test 0.050, threshold 0.05"}
    (found,) = evidence.not_above_exact("claim", [0.3, 0.4, 0.5], [0.0, 0.1, 0.2])
    assert not found["holds"]
    assert evidence.above_exact("claim", [0.3, 0.4], [0.0, 0.1]) == []


def test_a_known_level_is_no_second_sample():
    assert evidence.sign_share([1.0, 2.0, 3.0]) == 1 / 8
    assert evidence.sign_share([-1.0, -2.0, -3.0]) == 1
    # Sums of 4 or more with signs: 1 + 2 + 3 = 6, -1 + 2 + 3 = 4. So 4, the sum of (-1, 2, 3), is reached twice.
    assert evidence.sign_share([-1.0, 2.0, 3.0]) == 2 / 8
    # mean 0.6, standard deviation 0.1: standard error 0.1 / sqrt(3) = 5.77 points
    (found,) = evidence.above_level("above chance", [0.5, 0.6, 0.7], 0.5)
    assert not found["holds"]
    assert found["detail"] == "+10.0 points, threshold more than 11.5, exact test 0.250"  # one difference is 0
    assert evidence.above_level("above chance", [0.5, 0.6, 0.7], 0.4)[0]["holds"]
    assert evidence.above_level("above chance", [0.5], 0.4) == []


def test_inputs_shuffle_repeat_and_subtract_frames(demo_videos):
    from dclr.models import build_backbone, pool

    torch.manual_seed(0)
    backbone = build_backbone("r2plus1d_10", 4).eval()
    clips = torch.randn(2, 3, 8, 16, 16)
    order = inputs.shuffled_order(8)
    assert sorted(order.tolist()) == list(range(8))
    assert order.tolist() != list(range(8))
    assert inputs.shuffled_order(2).tolist() == [1, 0]
    with torch.no_grad():
        found = inputs.features_of_inputs(backbone)(clips)
        expected = [
            clips,
            torch.stack([clips[:, :, t] for t in order.tolist()], 2),
            torch.stack([clips[:, :, 4]] * 8, 2),
            torch.stack([clips[:, :, t] - clips[:, :, t - 1] for t in range(8)], 2),
        ]
        for number, each in enumerate(expected):
            torch.testing.assert_close(found[:, number], pool(backbone(each)), rtol=1e-5, atol=1e-6)


def test_folds_are_test_videos_once_and_figures_are_shares_of_all_videos(tmp_path):
    """Only the full clip's features tell the classes apart."""
    labels = torch.tensor([0, 1] * 10)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 4, 3, generator=generator)
    features[:, 0] = torch.nn.functional.one_hot(labels, 3).float() + 0.01 * features[:, 0]
    paths = tuple(f"{number}.mp4" for number in range(20))
    embedded = inputs.Embedded(features, labels, paths, (True,) * 12 + (False,) * 8, 2)
    file = tmp_path / "folds.txt"
    file.write_text("".join(f"{path} 0 group {number // 4}\n" for number, path in enumerate(paths)))
    parts = inputs.divisions(embedded, inputs.read_folds(file))
    assert [test.nonzero().flatten().tolist() for _, test in parts] == [list(range(4 * f, 4 * f + 4)) for f in range(5)]
    assert all((train == ~test).all() for train, test in parts)
    figures = inputs.figures_of(embedded, parts)
    assert (figures["full_probe"], figures["full_nearest"], figures["chance"]) == (1, 1, 0.5)
    assert 0.2 <= figures["static_probe"] < 1
    ((train, test),) = inputs.divisions(embedded, None)
    assert train.tolist() == [True] * 12 + [False] * 8 == (~test).tolist()
    file.write_text("".join(f"{path} 0 group {number % 2}\n" for number, path in enumerate(paths[1:])))
    with pytest.raises(UserError, match=r"must list the videos of --data: 0.mp4 is not in --folds \(1 differ\)"):
        inputs.divisions(embedded, inputs.read_folds(file))
    for text, refusal in (
        ("0.mp4 0 1\n", "line 1 is '0.mp4 0 1', but must be \"path label group fold\""),
        ("0.mp4 0 g 1\n", "has 1 folds, but must have at least 2"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=refusal):
            inputs.read_folds(file)
    with pytest.raises(UserError, match="cannot be read"):
        inputs.read_folds(tmp_path / "none.txt")


def test_inputs_are_measured_on_a_network_and_a_data_set(demo_videos, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    weights = tmp_path / "run"
    config = resolve("pretrain", "demo", {"width": 4, "crop_size": 16, "clip_length": 8, "workers": 0})
    weights.mkdir()
    write_config(weights / "config.json", "pretrain", "demo", config)
    inputs.main(["--checkpoint", "random", "--like", str(weights), "--data", str(demo_videos), *out])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["parts"] == 1
    assert set(report["figures"]) == {f"{name}_{what}" for name in inputs.INPUTS for what in ("probe", "nearest")} | {
        "chance"
    }
    assert f"{'full_probe':22}{report['figures']['full_probe']:8.4f}" in capsys.readouterr().out


def test_maps_are_compared_with_moco_random_weights_and_a_uniform_map(root, calls):
    arguments = ["--data", str(root / "data"), "--seeds", "2", "--work", str(root / "work")]
    activation_maps.main(arguments)
    assert [line.split()[1] for line in calls if "dclr-0" in line] == ["pretrain", "maps"]
    assert sum("--method moco" in line for line in calls) == 2
    (file,) = (root / "results").glob("*/activation_maps.json")
    result = json.loads(file.read_text())
    assert list(result["rows"]) == ["random weights", "MoCo", "DCLR", activation_maps.UNIFORM]
    assert result["rows"]["DCLR"] == {name: [0.75, 0.76] for name in ("A_v", "A_s", "A_d")}
    assert result["rows"]["random weights"]["A_v"] == [0.125] * 2
    assert result["rows"][activation_maps.UNIFORM] == {"A_v": 0.1, "A_s": 0.1, "A_d": 0.1}
    # 0.755 against a single 0.1, which has no spread; against 0.125; against 0.255
    assert [(each["holds"], each["detail"].split(" points")[0]) for each in result["findings"]] == [
        (True, "+65.5"), (True, "+63.0"), (True, "+50.0")
    ]  # fmt: skip
    pictures = [root / "plots" / file.parent.name / f"maps_{name}.png" for name in ("dclr", "moco")]
    assert [picture.read_text() for picture in pictures] == ["of dclr-0", "of moco-0"]


def test_other_methods_are_compared_at_a_probe_of_the_comparison_with_a_constant_learning_rate(root, calls):
    methods.main(["--seeds", "2", "--work", str(root / "work")])
    started = [line for line in calls if line.startswith("train.py pretrain")]
    assert len(started) == 2 * len(methods.METHODS)
    assert methods.EPOCHS in controlled.EPOCHS
    assert min(controlled.MILESTONES) > methods.EPOCHS
    for line in started:
        assert f"--epochs {methods.EPOCHS} " in line
        assert ("--queue-length" in line) == ("simclr" not in line and "simsiam" not in line)
        assert ("--adversarial-from 20 " in line) == ("--method videomoco" in line)
    measured = [line.split("--run ")[1].split()[0] for line in calls if "experiments.dropped_frames" in line]
    assert [Path(run).name for run in measured] == [
        f"{name}-{seed}" for seed in (0, 1) for name in ("videomoco-dropping-only", "videomoco")
    ]
    (file,) = (root / "results").glob("*/methods.json")
    result = json.loads(file.read_text())
    assert tuple(result["rows"]) == methods.ROWS
    assert result["rows"]["VideoMoCo"]["rank"] == [0.75, 0.76]
    assert "rank" not in result["rows"]["DCLR"]
    verdicts = [each["holds"] for each in result["findings"]]
    # DCLR 75 and the SimCLR form 50 %, all others 25 % (random frames 12.5 %); ranks 75.5, 50 and 75 %.
    assert verdicts == [True, True, True, True, False, False, True, True, True, True, True, False, False]
    assert list(result["panels"][0]["lines"]) == ["VideoMoCo, dropping only", "VideoMoCo", "random frames dropped"]
    assert len(result["panels"][1]["lines"]) == 9
    calls.clear()
    methods.main(["--seeds", "2", "--work", str(root / "work")])
    assert calls == []


def test_lists_that_change_after_the_first_command_are_refused(root):
    list_real_sets(root / "data")
    options = runs.Options(seeds=range(1), parallel=1, work=root, quick=False)
    real.list_sets(root / "data", root / "sets", options)
    real.list_sets(root / "data", root / "sets", options)
    folds = root / "data" / "surv" / "folds.txt"
    lines = folds.read_text().splitlines()
    folds.write_text("\n".join([lines[0][:-1] + "5", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"the lists have changed since .*sets/folds.txt was written: give another"):
        real.list_sets(root / "data", root / "sets", options)
    folds.write_text("\n".join([lines[0].removeprefix("0/0.mp4 "), *lines[1:]]) + "\n")
    real.list_sets(root / "data", root / "other", options)  # the first word of this line is no listed video
    folds.write_text("\n".join(["0/0.mp4 scene0 1", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"folds.txt must have four words a line, not 0/0.mp4 scene0 1"):
        real.list_sets(root / "data", root / "third", options)


def test_folders_that_only_the_test_list_names_are_linked_too(root):
    list_real_sets(root / "data")
    (root / "data" / "hockey" / "splits" / "test.txt").write_text("other/1.mp4 0 scene1\n")
    options = runs.Options(seeds=range(1), parallel=1, work=root, quick=False)
    real.list_sets(root / "data", root / "sets", options)
    assert {"0", "1", "other"} <= {path.name for path in (root / "sets" / "hockey").iterdir() if path.is_symlink()}


def test_seeds_are_added_to_the_published_result(root, calls):
    methods.main(["--seeds", "3", "--work", str(root / "at-once")])
    (file,) = (root / "results").glob("*/methods.json")
    at_once = json.loads(file.read_text())
    file.unlink()
    with pytest.raises(UserError, match=r"--first-seed: .*methods.json cannot be read .*; leave the flag out"):
        methods.main(["--first-seed", "1", "--seeds", "2", "--work", str(root / "later")])
    with pytest.raises(UserError, match="--first-seed is -1, but must be at least 0"):
        methods.main(["--first-seed", "-1"])
    methods.main(["--seeds", "1", "--work", str(root / "first")])
    with pytest.raises(UserError, match=r"has seeds \[0\], but this run needs \[0, 1\]"):
        methods.main(["--first-seed", "2", "--seeds", "1", "--work", str(root / "later")])
    calls.clear()
    methods.main(["--first-seed", "1", "--seeds", "2", "--work", str(root / "later")])
    assert not any("-0/" in line or line.endswith("-0") for line in calls)
    added = json.loads(file.read_text())
    assert added["command"] == "python -m experiments.methods --first-seed 1 --seeds 2 --work later"
    for name in ("seeds", "rows", "panels", "findings", "recipe"):
        assert added[name] == at_once[name], name


def test_ranks_of_dropped_frames_are_those_among_all_sets():
    changes = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    assert dropped_frames.ranks(changes).tolist() == [[0, 0.5, 1], [1, 0.5, 0], [0.75, 0.75, 0]]
    found = dropped_frames.rank_figures(changes, torch.tensor([2, 0, 0]))
    assert found["rank"] == pytest.approx((1 + 1 + 0.75) / 3)
    # Clip 0 loses set 0 twice, clip 1 sets 2 and 0, clip 2 sets 2 and 0.
    assert found["rank_other_clips"] == pytest.approx((0 + (0 + 1) / 2 + (0 + 0.75) / 2) / 3)
    assert found["most_common"] == pytest.approx(2 / 3)
    assert (found["change_chosen"], found["change_largest"]) == pytest.approx(((3 + 3 + 1) / 3, (3 + 3 + 1) / 3))


def test_dropped_frames_are_measured_on_the_run_s_checkpoint(demo_videos, tmp_path, capsys):
    """The figures of a run with made-up weights equal those that are computed here, one clip at a time."""
    data, run = tmp_path / "videos", tmp_path / "run"
    (data / "splits").mkdir(parents=True)
    (data / "videos").symlink_to(demo_videos / "videos")
    (data / "splits" / "classes.txt").write_text((demo_videos / "splits" / "classes.txt").read_text())
    for split in ("train", "test"):
        lines = (demo_videos / "splits" / f"{split}.txt").read_text().splitlines()
        listed = [f"{line.rsplit(maxsplit=1)[0]} scene{number % 2}" for number, line in enumerate(lines)]
        (data / "splits" / f"{split}.txt").write_text("\n".join(listed) + "\n")
    flags = {"method": "videomoco", "width": 4, "crop_size": 16, "clip_length": 8, "workers": 0, "adversarial_from": 0}
    config = resolve("pretrain", "demo", {**flags, "queue_length": 64, "embedding_dim": 32})
    torch.manual_seed(0)
    network = VideoMoCo.build(config)
    torch.nn.init.normal_(network.query.heads["vv"].weight)
    run.mkdir()
    write_config(run / "config.json", "pretrain", "demo", config)
    with pytest.raises(UserError, match="has no checkpoint"):
        dropped_frames.load_method(run)
    weights = {f"model/{name}": tensor for name, tensor in network.state_dict().items()}
    checkpoint.write(run / "checkpoints", 1, weights, {"loss": 1.0})

    dropped_frames.main(["--run", str(run), "--data", str(data), "--out", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    assert f"{'rank':20}{figures['rank']:10.4f}" in capsys.readouterr().out
    settings = DataConfig(**{**vars(config.data), "data": str(data)})
    clips, labels, scenes = dropped_frames.middle_clips(open_data(settings), "test", settings)
    assert (clips.shape, sorted(labels.tolist()), set(scenes)) == ((8, 3, 8, 16, 16), [*range(8)], {"scene0", "scene1"})
    network.eval()
    changes = []
    with torch.no_grad():
        for clip in clips:
            mask = lowest(network.generator(clip[None]))
            pair = torch.stack([clip, drop(clip[None], mask, "mean")[0]])
            whole, dropped = network.query.embed({"v": network.query.backbone(pair)}, {})["vv"]
            changes.append((whole - dropped).abs().mean())
    assert figures["change_chosen"] == pytest.approx(float(torch.stack(changes).mean()), rel=1e-4)
    assert figures["change_chosen"] <= figures["change_largest"]

    write_config(run / "config.json", "pretrain", "demo", resolve("pretrain", "demo", {**flags, "dropping": "random"}))
    with pytest.raises(UserError, match="must be a run of pretrain --method videomoco --dropping generator"):
        dropped_frames.load_method(run)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_precision_shares_the_runs_of_the_comparison_and_needs_bfloat16_for_accuracies(
    root, calls, monkeypatch, has_bfloat16
):
    monkeypatch.setattr(
        precision, "resolve_precision", lambda config, device: "bfloat16" if has_bfloat16 else "float32"
    )
    precision.main(["--seeds", "2", "--quick", "--work", str(root / "work")])
    assert sum("--kernels triton" in line for line in calls) == 2
    calls.clear()
    result = json.loads((root / "work" / "precision.json").read_text())
    assert list(result["rows"]) == (["bfloat16", "float32"] if has_bfloat16 else [])
    assert [each["holds"] for each in result["findings"]] == [True] * (5 if has_bfloat16 else 3)
    config = json.loads((root / "work" / "precision" / "float32.json").read_text())
    assert config["torch_autocast"]["enabled"] is False
    controlled.main(["--quick", "--seeds", "2", "--methods", "DCLR", "--work", str(root / "work")])
    assert any(line.startswith("train.py pretrain") for line in calls) != has_bfloat16


def test_precision_takes_bfloat16_from_the_published_result(root, calls, monkeypatch):
    monkeypatch.setattr(precision, "resolve_precision", lambda config, device: "bfloat16")
    controlled.main(["--seeds", "2", "--methods", "DCLR", "--work", str(root / "work")])
    (file,) = (root / "results").glob("*/controlled.json")
    published = json.loads(file.read_text())

    def set_precision(text: str) -> None:
        file.write_text(json.dumps(published | {"environment": published["environment"] | {"precision": text}}))

    set_precision("bfloat16")
    calls.clear()
    precision.main(["--seeds", "2", "--with-published", "--work", str(root / "elsewhere")])
    started = {line.split("/")[-1].rsplit("-", 1)[0] for line in calls if "train.py pretrain" in line}
    assert started == {"float32", "reference", "triton", "reference-rounded-otherwise"}
    assert sum("--kernels reference" in line for line in calls) == 2 * 2
    result = json.loads((root / "elsewhere" / "precision.json").read_text())
    assert result["rows"]["bfloat16"]["motion_probe"] == [0.75, 0.76]
    panel = result["panels"][2]
    assert panel["lines"]["bfloat16"] == panel["lines"]["float32"]
    set_precision("bfloat16 and float32")
    with pytest.raises(
        UserError, match=r"controlled\.json has runs in float32, but DCLR must be in bfloat16; leave the"
    ):
        precision.main(["--seeds", "2", "--with-published", "--work", str(root / "refused")])
