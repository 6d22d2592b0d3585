"""Experiments run what they say, once, and tell what was measured. What stands in for train.py and eval.py only writes reports."""

import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import train
from benchmarks.harness import plt
from dclr.data.catalog import open_catalog
from dclr.errors import UserError
from experiments import activation_maps, controlled, controlled_set, evidence, precision, runs, weizmann
from experiments.runs import Job

ENVIRONMENT = {"device": "a device", "date": "2026-11-25T00:00:00+00:00", "commit": "abc", "versions": {"torch": "2"}}


def flag(job: Job, name: str, default: str = "") -> str:
    return job.command[job.command.index(name) + 1] if name in job.command else default


def written_by_train(job: Job) -> None:
    """What the command leaves behind. A loss of 5 + 1 / step; keys that are nearer than the hardest negative by 0.25."""
    job.writes.parent.mkdir(parents=True, exist_ok=True)
    if job.command[1] == "pack":
        return job.writes.touch()
    epochs, lines = int(flag(job, "--epochs")), []
    for step in range(10, 24 * epochs + 1, 10):
        line: dict[str, float] = {"step": step}
        if step > 10:  # before, the queue fills
            line |= {"loss": 5 + 1 / step, "pair_loss/vv": 4.0}
            for pair in ("vv",) if "moco" in job.command else ("vv", "vd", "vs"):
                line |= {f"positive_similarity/{pair}": 0.5, f"hardest_negative/{pair}": 0.25}
        lines.append(json.dumps(line) + "\n")
    (job.writes.parent / "metrics.jsonl").write_text("".join(lines))
    report = {"steps": 24 * epochs, "seconds": 60.0 * epochs, "environment": {"commit": "abc1234567"}}
    job.writes.write_text(json.dumps(report))


MOTION = {"random": 0.125, "dclr": 0.75, "moco": 0.25, "supervised": 0.96875, "scratch": 0.96875, "float32": 0.75}
MOTION |= {"without": 0.5625}
"""What the features of a run tell of the motion, by the first word of its folder's name; by seed 1 % more."""


def written_by_eval(job: Job) -> None:
    run = next(part for part in reversed(job.writes.parts) if part.split("-")[0] in MOTION)
    motion, seed = MOTION[run.split("-")[0]], int(run.split("-")[-1])
    figures = {"motion_probe": motion + seed / 100, "motion_nearest": motion, "motion_chance": 0.125}
    figures |= {"scene_probe": 0.5, "scene_nearest": 0.5, "scene_chance": 1 / 24}
    figures |= {f"foreground_{name}": 0.5 for name in ("ordinary", "moving", "static", "contrasted")}
    figures |= {"recall_at_1": 0.5, "chance_at_1": 0.1, "top1_video": motion, "top1_clip": 0.125}
    figures |= {name: motion + seed / 100 for name in ("A_v", "A_s", "A_d")} | {"flat": 0.1}
    figures |= {f"{name}_untrained": 0.125 for name in ("A_v", "A_s", "A_d")}
    figures["chance_top1"] = 1 / 24 if "scene" in run else 0.125
    job.writes.parent.mkdir(parents=True, exist_ok=True)
    if job.command[1] == "maps":
        (job.writes.parent / "pictures").mkdir()
        (job.writes.parent / "pictures" / "maps.png").write_text(f"of {run}")
    report = {"figures": figures, "videos": 256, "environment": {"commit": "abc1234567"}}
    job.writes.write_text(json.dumps(report))


class Ended:
    """Of a process that has ended well."""

    returncode = 0

    def poll(self) -> int:
        return 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that have been run, each of which only writes what it would have measured."""
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
    """A folder in which results and the page lie; videos are listed and not rendered."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "evidence.md")
    sections = [evidence.MARKER.format(name) + evidence.END for name in ("controlled_set", "controlled", "weizmann")]
    (tmp_path / "evidence.md").write_text("Before.\n\n" + "\nBetween.\n\n".join(sections) + "\nAfter.\n")
    monkeypatch.setattr(controlled_set, "render_demo", render_lists)
    monkeypatch.setattr(precision, "render_demo", render_lists)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def render_lists(folder: Path, **counts: int) -> None:
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / "splits" / f"{split}.txt").write_text("videos/up/up_0000.mp4 0 scene03\n")


def job(folder: Path, script: Path, name: str) -> Job:
    return Job(command=(str(script), name), writes=folder / f"{name}.done", log=folder / f"{name}.log")


def script(root: Path, text: str) -> Path:
    path = root / "script.py"
    path.write_text("import os, sys, time\nfrom pathlib import Path\nname = sys.argv[1]\n" + text)
    return path


# -------------------------------------------------------------------------------------------------------------- running


def test_chains_run_side_by_side_their_commands_in_order_and_the_cores_are_shared(root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    own = script(
        root,
        "with open('log.txt', 'a') as log: log.write(f'{name} begins {os.environ[\"OMP_NUM_THREADS\"]}\\n')\n"
        "deadline = time.monotonic() + 10\n"  # of the first two, each waits for the other
        "while name in ('a1', 'b1') and not ('a1 b' in (t := open('log.txt').read()) and 'b1 b' in t):\n"
        "    assert time.monotonic() < deadline\n"
        "with open('log.txt', 'a') as log: log.write(f'{name} ends\\n')\n"
        "Path(f'{name}.done').touch()\n",
    )
    chains = [[job(root, own, name) for name in names] for names in (["a1", "a2"], ["b1", "b2"], ["c1"])]
    runs.run(chains, parallel=2)
    lines = (root / "log.txt").read_text().splitlines()
    assert {line.split()[2] for line in lines if "begins" in line} == {"4"}
    assert lines.index("a1 ends") < lines.index("a2 begins 4")
    assert lines.index("b1 ends") < lines.index("b2 begins 4")
    assert set(line[:2] for line in lines[:2]) == {"a1", "b1"}
    running = 0
    for line in lines:
        running += 1 if "begins" in line else -1
        assert running <= 2


def test_a_chain_that_is_begun_is_finished_before_the_next(root, calls):
    first, last, other = (runs.train("finetune", root / name, ["--epochs", "1"], 0) for name in ("a", "b", "c"))
    runs.run([[first, last], [other]], parallel=1)
    assert [line.split("/")[-1] for line in calls] == ["a", "b", "c"]


def test_what_is_done_is_not_run_again_and_the_rest_is(root, calls):
    flags, data = ["--workers", "1"], Path("videos")
    chain = runs.pretrain_and_probe(root / "dclr-0", flags, 0, data, (2, 4, 6))
    runs.run([chain], parallel=1)
    assert len(calls) == 6
    runs.run([chain], parallel=1)
    assert len(calls) == 6
    # Cut off in the second stage: its pretraining goes on, though report.json is there, and is measured.
    for epoch in (4, 6):
        (root / "dclr-0" / f"bias-{epoch}" / "report.json").unlink()
    runs.run([chain], parallel=1)
    again = calls[6:]
    assert [line.split()[0] for line in again] == ["train.py", "eval.py"] * 2
    assert "--epochs 4 " in again[0]
    assert again[1].endswith("bias-4")


def test_the_stages_of_a_run_differ_in_epochs_alone_and_resume(tmp_path):
    options = runs.Options(seeds=range(1), parallel=1, work=tmp_path, quick=False)
    chain = controlled.pretrained(tmp_path / "moco-0", controlled.METHODS["MoCo"], 0, Path("data"), options)
    stages = [list(job.command) for job in chain if job.command[0] == "train.py"]
    epochs = []
    for stage in stages:
        place = stage.index("--epochs") + 1
        epochs.append(int(stage[place]))
        stage[place] = "E"
    assert all(stage == stages[0] for stage in stages)
    assert stages[0][stages[0].index("--resume") + 1] == "auto"
    assert epochs == sorted(set(epochs))
    assert epochs == list(controlled.EPOCHS)
    # Milestones lie before the end, which the learning rate would otherwise not see.
    assert max(controlled.MILESTONES) < epochs[-1]
    assert max(controlled.QUICK_MILESTONES) < controlled.QUICK_EPOCHS[-1]


def test_a_command_that_fails_stops_the_experiment_with_its_last_lines(root, capsys):
    own = script(
        root,
        "import signal\n"
        "def stop(*_): Path('stopped').touch(); sys.exit(75)\n"
        "if name == 'long':\n"
        "    signal.signal(signal.SIGTERM, stop)\n"
        "    Path('ready').touch()\n"
        "    time.sleep(60)\n"
        "while not Path('ready').exists(): time.sleep(0.01)\n"
        "print('\\n'.join(f'line {n}' for n in range(30)))\n"
        "print('train.py: error: no such folder', file=sys.stderr)\n"
        "sys.exit(2)\n",
    )
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        runs.run([[job(root, own, "long")], [job(root, own, "bad"), job(root, own, "after")]], parallel=2)
    assert time.monotonic() - began < 30
    assert str(refused.value) == f"$ python {own} bad ended with status 2; its output is in {root / 'bad.log'}"
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "train.py: error: no such folder"
    assert "line 29" in shown
    assert "line 0" not in shown
    assert (root / "stopped").exists()
    assert not (root / "after.log").exists()


def test_a_command_that_ends_well_without_its_file_and_one_that_was_stopped_are_told(root):
    own = script(root, "sys.exit(int(name))\n")
    with pytest.raises(UserError, match=f"0 has not written {root / '0.done'}; its output is in"):
        runs.run([[job(root, own, "0")]], parallel=1)
    with pytest.raises(UserError, match="75 was asked to stop, and has; the same command goes on"):
        runs.run([[job(root, own, "75")]], parallel=1)


def test_a_result_of_another_recipe_is_not_taken_for_this_ones(root, calls):
    runs.run([[runs.train("finetune", root / "run", ["--epochs", "2"], 0)]], parallel=1)
    with pytest.raises(UserError, match=r"is of another command .*--epochs 2.*: give another --work, or delete"):
        runs.run([[runs.train("finetune", root / "run", ["--epochs", "3"], 0)]], parallel=1)
    assert len(calls) == 1


def test_ctrl_c_ends_what_is_running(root):
    own = script(root, "Path('pid').write_text(str(os.getpid())); Path('ready').touch(); time.sleep(60)\n")

    def sleep(seconds: float) -> None:
        if (root / "ready").exists():
            patch.undo()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            runs.run([[job(root, own, "long")]], parallel=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((root / "pid").read_text()), 0)


def test_the_exit_status_tells_refused_from_stopped(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def refuse(arguments: Any) -> None:
        raise UserError("no\nsuch folder")

    def terminated(arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    try:
        monkeypatch.setattr("sys.argv", ["experiments/controlled.py"])
        assert runs.entry(refuse) == 2
        assert capsys.readouterr().err == "controlled: error: no\\nsuch folder\n"
        assert runs.entry(terminated) == 130
        assert runs.entry(lambda arguments: None) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_wrong_flags_are_refused_by_name():
    with pytest.raises(UserError, match=r"^--seeds is 0, but must be at least 1$"):
        runs.parse("", ["--seeds", "0"])
    with pytest.raises(UserError, match=r"^--parallel is -1, but must be at least 1$"):
        runs.parse("", ["--parallel", "-1"])
    options, _ = runs.parse("", ["--quick"])
    assert options.work == Path("runs/evidence-quick")


def test_a_missing_figure_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/report.json is missing or damaged"):
        runs.figure(tmp_path, "motion_probe")
    (tmp_path / "report.json").write_text(json.dumps({"figures": {"motion_probe": 0.5}}))
    with pytest.raises(UserError, match=r"report.json has no scene_probe, but: motion_probe"):
        runs.figure(tmp_path, "scene_probe")


# -------------------------------------------------------------------------------------------------------------- commands


def planned(main: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that an experiment would run."""
    found: list[runs.Chain] = []

    class Planned(Exception):
        pass

    def run(chains: list[runs.Chain], parallel: int) -> None:
        found.extend(chains)
        if any(job.command[1] != "pack" for chain in chains for job in chain):
            raise Planned

    monkeypatch.setattr(runs, "run", run)
    with pytest.raises(Planned):
        main(arguments)
    return [job for chain in found for job in chain]


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize("experiment", [controlled_set, controlled, weizmann, activation_maps, precision])
def test_train_and_eval_understand_every_command(root, monkeypatch, experiment, quick):
    data = ["--data", str(root)] if experiment in (weizmann, activation_maps) else []
    jobs = planned(experiment.main, [*data, *quick, "--work", str(root / "work")], monkeypatch)
    assert len({job.log for job in jobs}) == len(jobs)
    for job in jobs:
        entry, *arguments = job.command
        if entry == "train.py":
            flags = train.parse(arguments)
            command, preset = flags.pop("command"), flags.pop("preset", "demo")
            for name in ("local_rank", "resume", "short_side", *(["out"] if command == "pack" else [])):
                flags.pop(name, None)
            if command != "pack":
                train.configuration.resolve(command, preset, flags)
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
    for _ in range(2):  # a second time over the first
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


# -------------------------------------------------------------------------------------------------------------- findings


def test_an_honest_set_is_told_from_others():
    found = {
        controlled_set.MOTION: {"motion": [0.96, 0.94]},
        controlled_set.SCENE: {"scene": [0.99, 0.99]},
        controlled_set.SINGLE: {"motion": [0.18, 0.19]},
        controlled_set.RANDOM: {"motion": [0.1, 0.11], "scene": [0.3, 0.3]},
    }
    # 12.5 % + 3 sqrt(0.125 x 0.875 / 256) = 18.7 %
    assert controlled_set.near_chance(0.125, 256) == pytest.approx(0.18701, abs=1e-5)
    assert [each["holds"] for each in controlled_set.findings(found, 0.125, 256)] == [True] * 4
    worse = {
        controlled_set.MOTION: {"motion": [0.94, 0.94]},
        controlled_set.SCENE: {"scene": [0.94, 0.95]},
        controlled_set.SINGLE: {"motion": [0.19, 0.19]},
        controlled_set.RANDOM: {"motion": [0.19, 0.19], "scene": [0.3, 0.3]},
    }
    for place, name in enumerate(
        (controlled_set.MOTION, controlled_set.SCENE, controlled_set.RANDOM, controlled_set.SINGLE)
    ):
        holds = [each["holds"] for each in controlled_set.findings(found | {name: worse[name]}, 0.125, 256)]
        assert holds == [number != place for number in range(4)]


def test_curves_that_part_are_told_and_how_far_roundings_alone_part_them():
    plain = [[10.0, 8.0, 5.0], [12.0, 6.0, 4.0]]

    def holds(triton, rounded):
        found = precision.same_curve({precision.REFERENCE: plain, precision.TRITON: triton, precision.ROUNDED: rounded})
        return [each["holds"] for each in found], [each["detail"] for each in found]

    near = [[10.0, 8.0007, 5.0], [12.0, 6.0, 4.0038]]
    assert holds(near, near)[0] == [True, True, True]
    for place in (0, 1):
        wrong = [plain[0], [12.0, 6.0, 4.0038]]
        wrong[1][place] *= 1.0002
        assert holds(wrong, near)[0] == [False, True, True]
    # 1.2e-3 at the last step, and the reference itself is as far; of one seed that cannot be judged.
    far = [[10.0, 8.0, 5.0], [12.0, 6.0, 3.9952]]
    verdicts, details = holds(far, far)
    assert verdicts == [True, False, True]
    assert "1.2e-03 of the loss in 3 steps of 2 seeds" in details[1]
    assert details[1].endswith("of the reference rounded otherwise, 1.2e-03")
    one = {precision.REFERENCE: plain[:1], precision.TRITON: far[:1], precision.ROUNDED: far[:1]}
    assert len(precision.same_curve(one)) == 2
    # Both seeds a thousand times as far as roundings are: three powers of ten at the last step of three, one on average.
    verdicts, details = holds([[10.0, 8.0, 5.05], [12.0, 6.0, 4.04]], [[10.0, 8.0, 5.00005], [12.0, 6.0, 4.00004]])
    assert verdicts == [True, False, False]
    assert "10^-6.0 of the loss, and 10^-7.0; +1.0 powers of ten, at most 0.0 was asked" in details[2]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_reference_is_rounded_otherwise_by_one_thing_alone(gpu):
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


def test_precisions_that_differ_are_told():
    # Standard error of the difference: sqrt((0.01 + 0.01) / 3) = 8.2 points, twice that 16.3.
    assert precision.same_accuracy("motion", [0.4, 0.5, 0.6], [0.56, 0.66, 0.76])["holds"]
    for first, second in (([0.4, 0.5, 0.6], [0.57, 0.67, 0.77]), ([0.57, 0.67, 0.77], [0.4, 0.5, 0.6])):
        assert not precision.same_accuracy("motion", first, second)["holds"]


def test_a_method_is_above_another_by_two_standard_errors_and_one_seed_says_nothing():
    less = [0.4, 0.5, 0.6]
    assert [each["holds"] for each in evidence.above("better", [0.57, 0.67, 0.77], less)] == [True]
    (found,) = evidence.above("better", [0.56, 0.66, 0.76], less)
    assert found == {"claim": "better", "holds": False, "detail": "+16.0 points, more than 16.3 was asked"}
    assert not evidence.above("better", less, [0.57, 0.67, 0.77])[0]["holds"]
    assert evidence.above("better", [0.9], [0.1]) == []


def test_dclr_is_held_against_moco_and_against_itself_without_dynamic_pairs():
    probes = {
        "DCLR": [0.7, 0.72],
        "MoCo": [0.5, 0.52],
        "without dynamic pairs": [0.8, 0.82],
        "without mining": [0.1, 0.1],
    }
    rows: evidence.Rows = {row: {"motion_probe": values, "scene_probe": values} for row, values in probes.items()}
    rows |= {
        "random weights": {"motion_probe": [0.1, 0.1], "scene_probe": [0.72, 0.74]},
        "chance": {"motion_probe": 0.125, "scene_probe": 0.04},
    }
    found = controlled.findings(rows)
    assert [(each["claim"].split()[-1], each["holds"]) for each in found] == [
        ("MoCo's", True), ("pairs", False), ("MoCo's", True), ("features", True)
    ]  # fmt: skip
    rows["random weights"]["scene_probe"] = [0.8, 0.8]
    assert [each["holds"] for each in controlled.findings(rows)] == [True, False, True, False]
    assert controlled.findings({"MoCo": rows["MoCo"], "chance": rows["chance"]}) == []


def test_a_mean_is_not_below_another_by_two_standard_errors():
    more = [0.5, 0.6, 0.7]
    (found,) = evidence.not_below("kept", [0.34, 0.44, 0.54], more)
    assert found == {"claim": "kept", "holds": True, "detail": "-16.0 points, at least -16.3 was asked"}
    assert not evidence.not_below("kept", [0.33, 0.43, 0.53], more)[0]["holds"]
    assert evidence.not_below("kept", [0.1], [0.9]) == []


def test_logged_numbers_are_thinned_to_means_of_equal_parts():
    metrics = [{"step": 10 * n, "loss": float(n)} for n in range(1, 9)] + [{"step": 90, "loss": None}, {"step": 100}]
    assert evidence.thinned(metrics, "loss", points=4) == ([15, 35, 55, 75], [1.5, 3.5, 5.5, 7.5])
    assert evidence.thinned(metrics, "loss", points=40) == (
        [10 * n for n in range(1, 9)],
        [float(n) for n in range(1, 9)],
    )


# -------------------------------------------------------------------------------------------------------------- evidence


def made_up(seeds: int, **more: Any) -> evidence.Result:
    """A result of 50 %, 60 %, ... by seed."""
    values = [0.5 + seed / 10 for seed in range(seeds)]
    return {
        "question": "?",
        "seeds": list(range(seeds)),
        "figures": {"probe": ["motion, linear probe", "%"], "minutes": ["minutes", "min"]},
        "rows": {
            "DCLR": {"probe": values, "minutes": [10.0] * seeds},
            "MoCo": {"probe": values},
            "chance": {"probe": 0.125},
        },
        "findings": [evidence.finding("it learns", True, "really"), evidence.finding("it is fast", False, "1 s")],
        "environment": ENVIRONMENT,
        **more,
    }


def test_a_table_tells_mean_and_spread_and_of_one_seed_no_spread():
    lines = list(evidence.body(made_up(3)))
    assert lines[0].splitlines()[0] == "|  | motion, linear probe | minutes |"
    assert lines[1:4] == [
        "| DCLR | 60.0 ± 10.0 % | 10.0 ± 0.0 |",
        "| MoCo | 60.0 ± 10.0 % |  |",
        "| chance | 12.5 % |  |",
    ]
    assert lines[5:] == ["- Holds: it learns (really).", "- **Does not hold**: it is fast (1 s)."]
    assert "mean ± s.d. over 3 seeds" in next(evidence.described("a", "cpu", made_up(3)))
    assert list(evidence.body(made_up(1)))[1] == "| DCLR | 50.0 % | 10.0 |"
    first = next(evidence.described("a", "cpu", made_up(1)))
    assert first == "a device, 2026-11-25, commit abc; one seed; [plot](evidence/cpu/a.png)"


def test_the_page_shows_every_device_and_says_what_is_not_measured(tmp_path):
    page = "".join(f"{name}:\n" + evidence.MARKER.format(name) + "old\n" + evidence.END for name in ("one", "two"))
    for device in ("cpu", "nvidia-h200"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "one.json").write_text(json.dumps(made_up(3)))
    made = evidence.with_sections(page, tmp_path)
    one, two = made.split("two:\n")
    assert one.count("| DCLR | 60.0 ± 10.0 % | 10.0 ± 0.0 |") == 2
    assert one.index("evidence/cpu/one.png") < one.index("evidence/nvidia-h200/one.png")
    assert two == evidence.MARKER.format("two") + "\nNot measured yet.\n\n" + evidence.END
    assert evidence.with_sections(made, tmp_path) == made


@pytest.mark.parametrize("seeds", [1, 3])
def test_bars_have_an_error_bar_and_a_dot_for_each_seed_and_of_one_seed_no_error_bar(seeds, tmp_path):
    figure = evidence.plot(made_up(seeds))
    panel = figure.axes[0]
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == pytest.approx([0.5 + (seeds - 1) / 20] * 2)  # minutes and chance are no bars
    errors = [container.errorbar for container in panel.containers if getattr(container, "errorbar", None) is not None]
    assert len(errors) == (2 if seeds > 1 else 0)
    for error in errors:
        (segment,) = error.lines[2][0].get_segments()
        assert [height for _, height in segment] == pytest.approx([0.5, 0.7])
    dots = [line.get_ydata().tolist() for line in panel.lines if line.get_marker() == "."]
    assert dots == [[0.5 + seed / 10 for seed in range(seeds)]] * 2
    figure.savefig(tmp_path / "bars.png")
    plt.close(figure)


@pytest.mark.parametrize("seeds", [1, 3])
def test_curves_have_bands_over_seeds_and_of_one_seed_none(seeds, tmp_path):
    values = [[0.1 + seed / 10, 0.5 + seed / 10] for seed in range(seeds)]
    line = {"steps": [100, 200], "values": values}
    panel = {"title": "motion", "ylabel": "share", "lines": {"DCLR": line, "MoCo": line}, "levels": {"chance": 0.125}}
    figure = evidence.plot(made_up(seeds, panels=[panel, panel, panel]))
    assert len(figure.axes) == 3
    drawn = figure.axes[0]
    mean = [statistics.mean(of_step) for of_step in zip(*values, strict=True)]
    assert drawn.lines[0].get_ydata() == pytest.approx(mean)
    assert [text.get_text() for text in drawn.texts] == ["chance"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["DCLR", "MoCo"]
    assert len(drawn.collections) == (2 if seeds > 1 else 0)
    if seeds > 1:
        band = drawn.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((0.1, 0.7))
    figure.savefig(tmp_path / "curves.png")
    plt.close(figure)


def test_the_comparison_runs_once_and_publishes_its_table(root, calls, capsys):
    arguments = ["--seeds", "2", "--methods", "MoCo", "DCLR", "--work", str(root / "work")]
    controlled.main(arguments)
    # Two stores; for each seed two methods of five stages and probes, two networks with labels and random weights.
    assert len(calls) == 2 + 2 * (2 * 5 * 2 + 2 * 3 + 1)
    page = (root / "evidence.md").read_text()
    minutes = " 75.0 ± 0.0 |" if torch.cuda.is_available() else ""  # times are told on a GPU alone
    assert f"| DCLR | 75.5 ± 0.7 % | 75.0 ± 0.0 % | 50.0 ± 0.0 % | 50.0 ± 0.0 % |{minutes}\n" in page
    assert "| random weights | 13.0 ± 0.7 % | 12.5 ± 0.0 % |" in page
    assert "| supervised on motion | 97.4 ± 0.7 % |" in page
    assert "| chance | 12.5 % | 12.5 % | 4.2 % | 4.2 % |" in page
    assert "commit abc1234567; mean ± s.d. over 2 seeds" in page
    # 75.5 ± 0.7 against 25.5 ± 0.7 %: standard error sqrt((0.00005 + 0.00005) / 2) = 0.7 points
    assert (
        "- Holds: DCLR's features tell more of the motion than MoCo's (+50.0 points, more than 1.4 was asked)." in page
    )
    assert "without dynamic pairs" not in page
    assert page.count("Not measured yet.") == 2  # the other experiments
    assert page.startswith("Before.")
    assert page.endswith("After.\n")
    (file,) = (root / "results").glob("*/controlled.json")
    assert (root / "plots" / file.parent.name / "controlled.png").stat().st_size > 10_000
    result = json.loads(file.read_text())
    assert result["command"] == "python -m experiments.controlled --seeds 2 --methods MoCo DCLR --work work"
    panels = {panel["title"]: panel for panel in result["panels"]}
    probes = panels["motion, linear probe"]["lines"]["DCLR"]
    assert probes["steps"] == [24 * epoch for epoch in controlled.EPOCHS]
    assert probes["values"] == [[0.75] * 5, [0.76] * 5]
    margins = {title: panel["lines"] for title, panel in panels.items() if "hardest" in title}
    assert [list(lines) for lines in margins.values()] == [["DCLR", "MoCo"], ["DCLR"], ["DCLR"]]
    assert set(margins["pair vv, the clip itself: key against the hardest negative"]["MoCo"]["values"][0]) == {0.25}

    calls.clear()
    controlled.main(arguments)
    assert calls == []


def test_methods_are_put_beside_what_is_published_and_nothing_else_is_run(root, calls, capsys):
    work = str(root / "work")
    controlled.main(["--seeds", "2", "--methods", "MoCo", "DCLR", "--work", work])
    (file,) = (root / "results").glob("*/controlled.json")
    before = json.loads(file.read_text())
    before["environment"]["commit"] = "abc1234567 and fedcba9876"
    before["rows"]["DCLR"]["motion_probe"] = [0.5, 0.51]  # not what a run here would give
    file.write_text(json.dumps(before))
    calls.clear()
    capsys.readouterr()

    added = ["--with-published", "--methods", "without mining", "without dynamic pairs"]
    controlled.main(["--seeds", "2", *added, "--work", str(root / "elsewhere")])
    assert "taken from what is published: random weights, DCLR, MoCo, supervised on motion," in capsys.readouterr().out
    runs_of = {line.split("--out ")[1].split("/")[-1] for line in calls if line.startswith("train.py pretrain")}
    assert runs_of == {f"without-{part}-{seed}" for part in ("mining", "dynamic-pairs") for seed in (0, 1)}
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
    claims = {each["claim"]: each for each in after["findings"]}
    assert claims["they tell more of it than without dynamic pairs"]["detail"].startswith("-6.2 points")
    assert len(after["findings"]) == len(before["findings"]) + 1
    assert [panel["title"] for panel in after["panels"]] == [panel["title"] for panel in before["panels"]]
    for ours, theirs in zip(after["panels"], before["panels"], strict=True):
        assert {name: ours["lines"][name] for name in theirs["lines"]} == theirs["lines"]
        assert list(ours["lines"])[len(theirs["lines"]) :] == ["without dynamic pairs", "without mining"]
        assert ours.get("levels") == theirs.get("levels")
    assert "| without mining | 56.8 ± 0.7 % |" in (root / "evidence.md").read_text()


def test_rows_of_another_recipe_other_seeds_or_another_device_are_not_put_beside_new_ones(root, calls, monkeypatch):
    add = ["--with-published", "--methods", "without mining", "--work", str(root / "work")]
    with pytest.raises(UserError, match=r"controlled.json cannot be read .*; without the flag, every row is run"):
        controlled.main(add)
    controlled.main(["--seeds", "2", "--methods", "DCLR", "--work", str(root / "work")])
    (file,) = (root / "results").glob("*/controlled.json")
    calls.clear()
    with pytest.raises(UserError, match=r"has seeds \[0, 1\], and this would be \[0, 1, 2\]; without"):
        controlled.main(add)
    with pytest.raises(UserError, match=r"has epochs \[10, 20, 40, 60, 75\], and this would be \[4, 6\]"):
        precision.main(["--with-published", "--quick", "--seeds", "2", "--work", str(root / "work")])
    add += ["--seeds", "2"]
    text = file.read_text()
    file.write_text(text.replace('"0.03"', '"0.1"'))
    with pytest.raises(UserError, match=r"has pretraining .*'0.1'.*, and this would be .*'0.03'"):
        controlled.main(add)
    file.write_text(text)
    with monkeypatch.context() as patch:
        patch.setitem(controlled.METHODS, "DCLR", ["--mined-positives", "3"])
        with pytest.raises(UserError, match=r"published as DCLR was run with .*, and no method here is"):
            controlled.main(add)
    result = json.loads(text)
    result["environment"]["device"] = "another device"
    file.write_text(json.dumps(result))
    with pytest.raises(UserError, match="has device another device, and this would be"):
        controlled.main(add)
    assert calls == []


def test_less_does_not_replace_what_is_published_and_a_quick_try_replaces_nothing(root, calls, capsys):
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
        assert f"{file} is of more seeds or rows and stays" in publish(less, seeds)
    assert "a quick try, so nothing is published" in publish(made_up(3), 3, quick=True)
    assert (file.read_text(), (root / "evidence.md").read_text()) == (before, page)
    assert json.loads((root / "work" / "controlled.json").read_text())["rows"].keys() == {"DCLR", "chance"}
    assert (root / "quick" / "controlled.png").is_file()
    publish(made_up(3), 3)
    assert len(json.loads(file.read_text())["seeds"]) == 3
    assert "over 3 seeds" in (root / "evidence.md").read_text()


def test_a_set_that_is_not_honest_ends_with_an_error(root, calls, capsys):
    arguments = ["--seeds", "1", "--work", str(root / "work")]
    controlled_set.main(arguments)
    assert capsys.readouterr().out.count("- Holds:") == 4
    for name in ("motion", "scene"):
        file = root / "work" / "controlled" / f"supervised-{name}-0" / "accuracy" / "report.json"
        file.write_text(file.read_text().replace('"top1_video": 0.96875', '"top1_video": 0.9'))
    with pytest.raises(SystemExit, match="not honest"):
        controlled_set.main(arguments)
    page = (root / "evidence.md").read_text()
    assert "- **Does not hold**: motion can be learned (90.0%, at least 95% was asked)." in page


def test_weizmann_tells_methods_beside_scratch_random_and_chance(root, calls):
    weizmann.main(["--data", str(root / "data"), "--seeds", "2", "--work", str(root / "work")])
    rows = json.loads((root / "work" / "weizmann.json").read_text())["rows"]
    assert list(rows) == ["random weights", "MoCo", "DCLR", "trained on labels from scratch", "chance"]
    assert rows["random weights"]["finetuned"] == [0.96875] * 2  # the run from scratch
    assert rows["DCLR"]["finetuned"] == [0.75] * 2
    assert rows["MoCo"]["motion_probe"] == [0.25, 0.26]
    assert rows["chance"] == {
        "finetuned": 0.125, "motion_probe": 0.125, "recall_at_1": 0.1,
        "foreground_ordinary": 0.125, "foreground_moving": 0.125, "foreground_static": 0.125,
    }  # fmt: skip
    found = json.loads((root / "work" / "weizmann.json").read_text())["findings"]
    assert [each["holds"] for each in found] == [False, True, False]  # 75 % against 96.9, 25; 50 against 50
    started = [line for line in calls if line.startswith("train.py finetune") and "--pretrained" in line]
    assert len(started) == 4
    assert all(
        line.split("--pretrained ")[1].split()[0] == line.split("--out ")[1].replace("-finetune", "")
        for line in started
    )


def test_maps_are_told_beside_moco_random_weights_and_a_flat_map(root, calls):
    arguments = ["--data", str(root / "data"), "--seeds", "2", "--work", str(root / "work")]
    activation_maps.main([*arguments, "--quick"])
    assert not (root / "results").exists()
    calls.clear()
    shutil.rmtree(root / "work")
    activation_maps.main(arguments)
    assert len(calls) == 2 * 2 * 2
    assert [line.split()[1] for line in calls if "dclr-0" in line] == ["pretrain", "maps"]
    assert sum("--method moco" in line for line in calls) == 2
    (file,) = (root / "results").glob("*/activation_maps.json")
    result = json.loads(file.read_text())
    assert list(result["rows"]) == ["random weights", "MoCo", "DCLR", "the same everywhere"]
    assert result["rows"]["DCLR"] == {name: [0.75, 0.76] for name in ("A_v", "A_s", "A_d")}
    assert result["rows"]["random weights"]["A_v"] == [0.125] * 2
    assert result["rows"]["the same everywhere"] == {"A_v": 0.1, "A_s": 0.1, "A_d": 0.1}
    # 0.755 against a bare 0.1, whose spread is none; against 0.125; against 0.255
    assert [(each["holds"], each["detail"].split(" points")[0]) for each in result["findings"]] == [
        (True, "+65.5"), (True, "+63.0"), (True, "+50.0")
    ]  # fmt: skip
    plots = root / "plots" / file.parent.name
    assert (plots / "activation_maps.png").stat().st_size > 10_000
    assert [(plots / f"maps_{name}.png").read_text() for name in ("dclr", "moco")] == ["of dclr-0", "of moco-0"]
    figure = evidence.plot(result)
    assert figure.axes[0].get_ylabel() == "share of a map"
    plt.close(figure)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_precision_shares_the_comparisons_runs_and_says_so_where_there_is_no_bfloat16(
    root, calls, monkeypatch, has_bfloat16
):
    monkeypatch.setattr(precision, "settle_precision", lambda config, device: "bfloat16" if has_bfloat16 else "float32")
    precision.main(["--seeds", "2", "--quick", "--work", str(root / "work")])
    made = calls.copy()
    calls.clear()
    result = json.loads((root / "work" / "precision.json").read_text())
    assert list(result["rows"]) == (["bfloat16", "float32"] if has_bfloat16 else [])
    assert [each["holds"] for each in result["findings"]][:1] == [True]
    assert len(result["findings"]) == (5 if has_bfloat16 else 3)
    config = json.loads((root / "work" / "precision" / "float32.json").read_text())
    assert config["torch_autocast"]["enabled"] is False
    controlled.main(["--quick", "--seeds", "2", "--methods", "DCLR", "--work", str(root / "work")])
    pretrained = [line for line in calls if line.startswith("train.py pretrain")]
    assert bool(pretrained) != has_bfloat16
    assert sum("--kernels triton" in line for line in made) == 2


def test_precision_takes_bfloat16_from_what_is_published(root, calls, monkeypatch, capsys):
    monkeypatch.setattr(precision, "settle_precision", lambda config, device: "bfloat16")
    controlled.main(["--seeds", "2", "--methods", "DCLR", "--work", str(root / "work")])
    calls.clear()
    precision.main(["--seeds", "2", "--with-published", "--work", str(root / "elsewhere")])
    assert "DCLR in bfloat16, abc1234567" in capsys.readouterr().out
    runs_of = {line.split("/")[-1].rsplit("-", 1)[0] for line in calls if "train.py pretrain" in line}
    assert runs_of == {"float32", "reference", "triton", "reference-rounded-otherwise"}
    assert sum("--kernels reference" in line for line in calls) == 2 * 2
    result = json.loads((root / "elsewhere" / "precision.json").read_text())
    assert result["rows"]["bfloat16"]["motion_probe"] == [0.75, 0.76]
    panel = result["panels"][2]
    assert panel["lines"]["bfloat16"] == panel["lines"]["float32"]
    assert [each["holds"] for each in result["findings"]] == [True] * 5
