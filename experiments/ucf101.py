"""The experiment of the paper: pretrain on UCF101 or Kinetics-400, then finetune and evaluate on UCF101 and HMDB51.

    python -m experiments.ucf101 --data UCF101 --hmdb51 HMDB51                     all: DCLR and MoCo, three seeds
    python -m experiments.ucf101 --data UCF101 --hmdb51 HMDB51 --dry-run           the commands and the expected hours
    python -m experiments.ucf101 --data UCF101 --kinetics400 KINETICS --seeds 1    pretrain on Kinetics-400 instead
    python -m experiments.ucf101 --data SAMPLE --budget small                      checks that it runs, on a few videos

If it is stopped or fails, the same command continues it, also with another --gpus or on another machine. --work holds
everything: the packed stores, the runs with their logs, and at the end report.html and report.md.

The stages, in order: check and pack each data set. Then for each seed and each method: pretrain; finetune and train a
linear classifier on each official split, and measure their accuracy; retrieval, background bias and activation maps.
Then the same from random weights, without pretraining and without the maps.

Protocols (docs/method.md, "Evaluation protocols"). Recipes are those of the presets ucf101 and kinetics400, with the
network r2plus1d_10. Pretraining on UCF101 uses the train videos of split 1, as is usual. So the network has seen test
videos of the splits 2 and 3, without their labels. The figures of split 1 do not have this flaw, so they have columns
of their own. Retrieval, background bias and maps use split 1. The last epoch is evaluated, never the best one on test
videos.

Pre-registered on 2026-11-29, before any run on the whole data sets, each by more than two standard errors of the
difference over seeds, on UCF101:

- Finetuning from DCLR is better than from MoCo and from scratch.
- R@1 of DCLR is above that of MoCo.
- DCLR recognises a moving foreground better than MoCo.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dclr import config as configuration
from dclr import report
from dclr.data.store import is_store
from dclr.errors import UserError
from dclr.lock import FolderInUse, folder_lock
from experiments import controlled, evidence, hours, runs, ucf101_report
from experiments.runs import Stage
from experiments.ucf101_plan import (
    CLIPS_A_VIDEO,
    KNOWN,
    LABELS,
    RANDOM,
    DataSet,
    Plan,
    Planned,
    cores,
    label,
    open_set,
    stages,
)

SEEDS = 3
LIMITS = ("max_missing", "max_bad")
"""Settings that this command passes on to training and evaluation, if they are given."""

# -------------------------------------------------------------------------------------------------------------- results


def figures(plan: Plan) -> dict[str, list[str]]:
    """Return the columns of the table."""
    found: dict[str, list[str]] = {}
    for data in plan.evaluated_on:
        several = f"{len(data.splits)} split{'s' * (len(data.splits) > 1)}"
        found |= {
            f"{data.slug}_finetune": [f"{data.name} finetuned, {several}", "%"],
            f"{data.slug}_finetune_first": [f"{data.name} finetuned, split {data.first}", "%"],
            f"{data.slug}_linear": [f"{data.name} linear, {several}", "%"],
            f"{data.slug}_linear_first": [f"{data.name} linear, split {data.first}", "%"],
            f"{data.slug}_recall": [f"{data.name} R@1, split {data.first}", "%"],
        }
    return found | {
        "foreground_ordinary": ["ordinary test clips", "%"],
        "foreground_moving": ["moving foreground", "%"],
        "foreground_static": ["static foreground", "%"],
    }


def table(plan: Plan) -> evidence.Rows:
    """Return the rows. Each figure has the values of all splits of the first seed, then of the second, and so on."""
    rows: evidence.Rows = {}
    for method in (*plan.methods, RANDOM):
        row: dict[str, evidence.Values] = {}
        for data in plan.evaluated_on:
            for command in ("finetune", "linear"):
                by_split = {
                    split: [accuracy(plan, command, method, seed, data, split) for seed in plan.seeds]
                    for split in data.splits
                }
                row[f"{data.slug}_{command}"] = [
                    value for seed in zip(*by_split.values(), strict=True) for value in seed
                ]
                row[f"{data.slug}_{command}_first"] = by_split[data.first]
            row[f"{data.slug}_recall"] = from_report(plan, method, f"retrieval-{data.slug}", "recall_at_1")
        row |= {
            name: from_report(plan, method, "bias", name) for name in figures(plan) if name.startswith("foreground")
        }
        rows[label(method)] = {name: row[name] for name in figures(plan)}
    rows["chance"] = chance(plan)
    return rows


def accuracy(plan: Plan, command: str, method: str, seed: int, data: DataSet, split: int) -> float:
    return runs.figure(plan.run(method, seed) / f"{command}-{data.slug}-{split}" / "accuracy", "top1_video")


def from_report(plan: Plan, method: str, evaluation: str, name: str) -> list[float]:
    """Return a figure of each seed."""
    return [runs.figure(plan.run(method, seed) / evaluation, name) for seed in plan.seeds]


def chance(plan: Plan) -> dict[str, evidence.Values]:
    run, found = plan.run(RANDOM, plan.seeds[0]), dict[str, evidence.Values]()
    for data in plan.evaluated_on:
        by_class = runs.figure(run / f"finetune-{data.slug}-{data.first}" / "accuracy", "chance_top1")
        names = ("finetune", "finetune_first", "linear", "linear_first")
        found |= {f"{data.slug}_{name}": by_class for name in names}
        found[f"{data.slug}_recall"] = runs.figure(run / f"retrieval-{data.slug}", "chance_at_1")
    by_class = runs.figure(run / "bias", "motion_chance")
    return found | {name: by_class for name in figures(plan) if name.startswith("foreground")}


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims whose rows were measured."""
    rows, seeds = result["rows"], len(result["seeds"])
    found: list[evidence.Finding] = []
    for figure, other, claim in (
        ("ucf101_finetune", "MoCo", "finetuning from DCLR on UCF101 is better than from MoCo"),
        ("ucf101_finetune", RANDOM, "finetuning from DCLR on UCF101 is better than from scratch"),
        ("ucf101_recall", "MoCo", "R@1 of DCLR on UCF101 is above that of MoCo"),
        ("foreground_moving", "MoCo", "DCLR recognises a moving foreground better than MoCo"),
    ):
        if {"DCLR", other} <= rows.keys():
            found += evidence.above(claim, *(by_seed(rows[row][figure], seeds) for row in ("DCLR", other)))
    return found


def by_seed(values: Sequence[float], seeds: int) -> list[float]:
    """Return the mean over splits for each seed."""
    splits = len(values) // seeds
    return [statistics.fmean(values[first : first + splits]) for first in range(0, len(values), splits)]


def panels(plan: Plan) -> list[dict[str, Any]]:
    """Return the curves of pretraining: the loss, key minus hardest negative, and nearest neighbours."""
    found = []
    for title, ylabel, logged, minus in (
        ("loss (methods have different losses)", "loss", "loss", ""),
        ("pair vv (clip): key minus hardest negative", "difference of cosine similarities",
         "positive_similarity/vv", "hardest_negative/vv"),
        ("pair vd (motion): key minus hardest negative", "difference of cosine similarities",
         "positive_similarity/vd", "hardest_negative/vd"),
        ("R@1 of at most 500 test videos", "share of test videos", "knn/recall_at_1", ""),
    ):  # fmt: skip
        found.append({"title": title, "ylabel": ylabel, "lines": logged_lines(plan, logged, minus)})
    return [panel for panel in found if panel["lines"]]


def logged_lines(plan: Plan, name: str, minus: str = "") -> dict[str, dict[str, Any]]:
    """Return the line of a logged number, or of `name` minus `minus`, for each method that logs it."""
    lines = {}
    for method in plan.methods:
        by_seed = [runs.metrics(plan.run(method, seed)) for seed in plan.seeds]
        if line := controlled.logged_line(by_seed, name, minus):
            lines[LABELS[method]] = line
    return lines


# ----------------------------------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = configuration.Parser(
        prog="python -m experiments.ucf101", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, metavar="UCF101", help="folder of UCF101 with its lists")
    parser.add_argument("--hmdb51", type=Path, help="folder of HMDB51 with its lists (default: without HMDB51)")
    parser.add_argument("--kinetics400", type=Path, help="folder of Kinetics-400: pretrain on it, not on UCF101")
    parser.add_argument(
        "--methods", nargs="+", choices=LABELS, default=["dclr", "moco"], metavar="NAME",
        help=f"{', '.join(LABELS)} (default: dclr moco); training from random weights always runs",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help=f"number of seeds: 0, 1, ... (default: {SEEDS}; small: 1)")
    parser.add_argument(
        "--budget", choices=("full", "small"), default="full",
        help="small: a tiny network and a few steps, for samples of the data sets. It only checks that everything runs",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, help="processes of each command, one for each GPU (default: all GPUs)")
    parser.add_argument(
        "--workers", type=int, help="decoding processes for each GPU (default: cores / GPUs, from 2 to 12; small: 0)"
    )
    parser.add_argument("--work", type=Path, help="folder of the stores, runs and report (default: runs/ucf101)")
    parser.add_argument("--dry-run", action="store_true", help="print commands and expected hours, and run nothing")
    configuration.add_flags(parser, [configuration.DataConfig], only=set(LIMITS))
    return parser


def make_plan(given: argparse.Namespace) -> Plan:
    """Return the plan of a command line. Raises UserError for a wrong number, data set or GPU."""
    limits = {name: getattr(given, name) for name in LIMITS if hasattr(given, name)}
    max_missing = configuration.DataConfig(**limits).max_missing
    for flag in ("seeds", "gpus"):
        if (value := getattr(given, flag)) is not None and value < 1:
            raise UserError(f"--{flag} is {value}, but must be at least 1")
    if given.workers is not None and given.workers < 0:
        raise UserError(f"--workers is {given.workers}, but must be at least 0")
    small, there = given.budget == "small", torch.cuda.device_count()
    if given.gpus and given.gpus > there and not (small or given.dry_run):
        raise UserError(f"--gpus is {given.gpus}, but this machine shows {there}: give at most that many")
    if not there and not small and not given.dry_run:
        raise UserError("no GPU is visible, and a CPU would need months: use --budget small or --dry-run here")
    folders = {"UCF101": given.data, "HMDB51": given.hmdb51, "Kinetics-400": given.kinetics400}
    sets = {
        name: open_set(name, Path(os.path.abspath(folder)), not small, max_missing)
        for name, folder in folders.items()
        if folder
    }
    gpus = given.gpus or (1 if small else max(1, there))
    name = "ucf101" + "-from-kinetics400" * bool(given.kinetics400) + "-small" * small
    return Plan(
        work=Path(os.path.abspath(given.work or Path("runs") / name)),
        pretrained_on=sets.get("Kinetics-400", sets["UCF101"]),
        evaluated_on=tuple(sets[each] for each in ("UCF101", "HMDB51") if each in sets),
        methods=tuple(dict.fromkeys(given.methods)),
        seeds=range(given.seeds or (1 if small else SEEDS)),
        small=small,
        gpus=gpus,
        workers=(0 if small else max(2, min(12, cores() // gpus))) if given.workers is None else given.workers,
        limits=limits,
    )


def describe(plan: Plan, stages: Sequence[Planned]) -> list[str]:
    """Return the lines that are printed before anything runs."""
    lines = [
        f"{data.name}: {data.folder}, {data.videos:,} videos, "
        f"{'split' if len(data.splits) == 1 else 'splits'} {', '.join(map(str, data.splits))}"
        for data in plan.sets
    ]
    lines.append(
        f"{len(stages)} stages: {', '.join(map(label, plan.methods))} and {RANDOM}, pretrained on "
        f"{plan.pretrained_on.name}, seeds {', '.join(map(str, plan.seeds))}; in {plan.work}"
    )
    if plan.small:
        whole = runs.duration(sum(stage.seconds for stage in stages))
        return [*lines, f"expected: about {whole}; figures of --budget small mean nothing"]
    lines.append(f"expected hours, estimated from one measured run ({hours.measured_rate():.0f} samples/s of DCLR):")
    wide = max(len(machine.name) for machine in hours.MACHINES)
    for machine in hours.MACHINES:
        by_kind: dict[str, float] = {}
        for stage in stages:
            by_kind[stage.kind] = by_kind.get(stage.kind, 0.0) + hours.hours(stage.works, machine)
        parts = ", ".join(f"{kind} {spent:.1f}" for kind, spent in by_kind.items())
        recomputes = any(hours.recomputes(work, machine) for stage in stages for work in stage.works)
        recomputed = " (with --recompute)" if recomputes else ""
        lines.append(f"  {machine.name:{wide}} {sum(by_kind.values()):7.1f}: {parts}{recomputed}")
    return [*lines, "  These may be wrong by a factor of two: experiments/hours.py says what was measured and assumed."]


def check_disk(plan: Plan) -> None:
    """Raise UserError if the disk is too full for the stores that are still missing. `pack` checks the exact size."""
    missing = [data for data in plan.sets if not is_store(plan.store(data)) and not plan.store(data).exists()]
    needed = sum(KNOWN[data.name].store_gb for data in missing) * 1e9
    folder = next(each for each in (plan.work, *plan.work.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    if not plan.small and needed > free:
        raise UserError(
            f"--work {plan.work}: the stores need about {needed / 1e9:.0f} GB, but the disk has {free / 1e9:.0f} GB "
            "free: free some space, or give --work on another disk"
        )


def check_work(plan: Plan) -> None:
    """Write down which data sets the work folder belongs to.

    Raises UserError if it was started with others, or if it has a folder `report` that is not of this experiment.
    """
    file = plan.work / "experiment.json"
    if (plan.work / "report").exists() and not file.exists():
        raise UserError(
            f"--work {plan.work} has a folder report that is not of this experiment: rename it, or give another --work"
        )
    now = {data.name: {"folder": str(data.folder), "lists": data.digest} for data in plan.sets}
    own: dict[str, Any] = {
        "budget": "small" if plan.small else "full",
        "pretrained on": plan.pretrained_on.name,
        "data": now,
    }
    try:
        before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else own
        for name in ("budget", "pretrained on"):
            if before[name] != own[name]:
                raise UserError(
                    f"--work {plan.work} was started with {name} {before[name]}, and not {own[name]}: "
                    "give the same flags as at the first start, or another --work"
                )
        for name, data in now.items():
            then = before["data"].get(name, data)
            if then != data:
                other = then["folder"] if then["folder"] != data["folder"] else "other lists"
                raise UserError(
                    f"--work {plan.work} was started with {name} of {other}, and not {data['folder']}: "
                    "give the same folder with the same lists, or another --work"
                )
        own["data"] = before["data"] | now
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: give another --work, or delete {plan.work}") from None
    report.write_json(file, own)


def main(arguments: Sequence[str]) -> None:
    given = make_parser().parse_args(arguments)
    plan = make_plan(given)
    todo = stages(plan)
    print("\n".join(describe(plan, todo)), flush=True)
    if given.dry_run:
        for number, stage in enumerate(todo, 1):
            print(f"stage {number} of {len(todo)}: {stage.title}, about {runs.duration(stage.seconds)}")
            for job in stage.jobs:
                print("  python " + shlex.join(runs.words_of(job)))
        return
    check_disk(plan)
    with ExitStack() as stack:
        try:
            plan.work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(plan.work))
        except FolderInUse as error:
            raise UserError(str(error).replace("--out", "--work")) from None
        except OSError as error:
            raise UserError(
                f"--work {plan.work}: cannot write there ({error.strerror}); choose a folder that you may write to"
            ) from None
        check_work(plan)
        run(plan, todo, arguments)


def run(plan: Plan, todo: Sequence[Planned], arguments: Sequence[str]) -> None:
    """Run the stages, write the result and the report, and publish the result of a whole run on UCF101."""
    times = plan.work / "times.json"
    runs.run_stages(todo, times)
    quick = plan.small or plan.pretrained_on.name != "UCF101"
    named = runs.published(arguments)
    options = runs.Options(seeds=plan.seeds, parallel=1, work=plan.work, quick=quick, arguments=named)
    result: evidence.Result = {
        "question": "does DCLR learn better features than MoCo on the data sets of the paper?",
        "recipe": {
            "pretraining": {method: plan.recipe("pretrain", method) for method in plan.methods},
            "pretrained on": plan.pretrained_on.name,
            **{command: plan.recipe(command) for command in ("finetune", "linear")},
            "splits": {data.name: list(data.splits) for data in plan.evaluated_on},
        },
        "figures": figures(plan),
        "rows": table(plan),
        "panels": panels(plan),
    }
    result["findings"] = findings(result | {"seeds": list(plan.seeds)})
    trained = [[job for job in stage.jobs if job.writes.name == "report.json"] for stage in todo]
    evidence.publish("ucf101", result, trained, options)
    written = json.loads((plan.work / "ucf101.json").read_text())
    made = ucf101_report.write(
        plan.work / "report", written, rows_of_report(plan), facts(plan, written),
        table_of_times(todo, runs.read_times(times)),
        [check_output(plan, data) for data in plan.sets],
    )  # fmt: skip
    print("".join(f"wrote {file}\n" for file in made), end="")


def rows_of_report(plan: Plan) -> list[ucf101_report.Run]:
    """Return what the report says about each of our rows."""
    found = []
    limits = "".join(f", {configuration.flag_of(name)} {percent:g}" for name, percent in plan.limits.items())
    for method in (*plan.methods, RANDOM):
        run = plan.run(method, plan.seeds[0])
        classified = [
            run / f"{command}-{data.slug}-{data.first}" / "accuracy"
            for command in ("finetune", "linear")
            for data in plan.evaluated_on
        ]
        retrieved = [run / f"retrieval-{data.slug}" for data in plan.evaluated_on]
        measured = runs.report(classified[0])
        width, size = measured["width"], measured["clips"]["crop_size"]
        found.append(
            ucf101_report.Run(
                row=label(method),
                evaluations=(*classified, *retrieved, run / "bias", run / "maps"),
                pretrained="nothing" if method == RANDOM else plan.pretrained_on.name,
                network=measured["backbone"] + (f", width {width}" if width != 64 else ""),
                protocol=f"{CLIPS_A_VIDEO} clips of {measured['clips']['clip_length']} frames of {size} x {size}, "
                f"the last epoch{limits}",
            )
        )
    return found


def facts(plan: Plan, result: evidence.Result) -> list[str]:
    """Return the lines about the data sets, the machine and the flags."""
    where = result["environment"]
    sets = "; ".join(
        f"{data.name} with {data.videos:,} videos, split {', '.join(map(str, data.splits))}" for data in plan.sets
    )
    budget = "--budget small, which only checks that everything runs: its figures mean nothing. " if plan.small else ""
    return [
        f"{budget}{sets}.",
        f"Command: {result['command']}",
        f"{where['device']}, {plan.gpus} process{'es' * (plan.gpus > 1)}, {where['date'][:10]}, "
        f"commit {where['commit']}, torch {where['versions']['torch']}.",
        *(
            f"{command}: {' '.join(plan.recipe(command, plan.methods[0]))}"
            for command in ("pretrain", "finetune", "linear")
        ),
    ]


def check_output(plan: Plan, data: DataSet) -> str:
    """Return what train.py check printed about a data set, with the name of its folder in place of the path."""
    _, *lines = (plan.work / f"check-{data.slug}.txt").read_text(errors="replace").splitlines()  # without the command
    found = [line for line in lines if not line.startswith("verifying videos: ")]
    return "\n".join(found).replace(str(data.folder), data.folder.name)


def table_of_times(done: Sequence[Stage], taken: dict[str, float]) -> ucf101_report.Table:
    """Return the measured and the expected time of each kind of stage."""
    lines = []
    for kind in dict.fromkeys(each.kind for each in done):
        of = [each for each in done if each.kind == kind]
        measured = sum(taken.get(each.title, 0.0) for each in of)
        expected = sum(each.seconds for each in of)
        lines.append([kind, str(len(of)), runs.duration(measured), runs.duration(expected)])
    return ucf101_report.Table(["stages", "number", "measured", "expected"], lines)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
