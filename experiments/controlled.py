"""Does DCLR learn motion where MoCo learns the scene, and which of its components causes this? On the controlled set.

    python -m experiments.controlled                                                all: about 5 hours on two cores
    python -m experiments.controlled --seeds 1 --methods random MoCo DCLR           MoCo and DCLR: about 35 minutes
    python -m experiments.controlled --quick                                        only checks that it runs: 15 minutes
    python -m experiments.controlled --with-published --methods "without mining"    one method, next to published rows
    python -m experiments.controlled --first-seed 3 --seeds 2 --methods MoCo DCLR   two more seeds of these methods

Each method is pretrained without labels for the same 1,800 steps of 32 samples, on the same videos, with the same
network, optimizer and colour jitter. At five points of training, two linear probes are fitted to the frozen features of
the train split and scored on the test split: one for the motion class and one for the scene. The table also shows
chance, and the same probes of an untrained network and of the networks that controlled_set.py trains on labels.

Pre-registered, for the end of training and by two standard errors of the difference over seeds:

- The motion probe of DCLR is above that of MoCo, and above that of DCLR without dynamic pairs.
- The scene probe of DCLR is not below that of MoCo, and not below that of random weights.

DCLR mines one positive here, and not five as published: docs/evidence.md explains why.
"""

import math
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import controlled_set, evidence, runs
from experiments.runs import Chain, Options

MINED = 1
MINING = ["--mined-positives", str(MINED)]
METHODS: dict[str, list[str]] = {
    "DCLR": MINING,
    "MoCo": ["--method", "moco"],
    "without static pairs": [*MINING, "--no-static-pairs"],
    "without dynamic pairs": [*MINING, "--no-dynamic-pairs"],
    "without activation maps": [*MINING, "--no-activation-maps"],
    "without alignment": [*MINING, "--alignment-weight", "0"],
    "without mining": ["--mined-positives", "0"],
    "with 5 mined positives": [],  # as published
}
RANDOM = "random weights"
LABELS = ("motion", "scene")
ROWS = (RANDOM, *METHODS, *(f"supervised on {name}" for name in LABELS), "chance")
FIGURES = {
    "motion_probe": ["motion, linear probe", "%"],
    "motion_nearest": ["motion, nearest", "%"],
    "scene_probe": ["scene, linear probe", "%"],
    "scene_nearest": ["scene, nearest", "%"],
}
ON_GPU = {"minutes": ["minutes of training", "min"]}
"""A figure of runs on a GPU only. On a CPU, the time depends on how many runs share the cores."""

QUEUE = 2048
# These settings were found for DCLR with one or two seeds (docs/LOG.md, 2026-11-25 and 26), and MoCo gets the same.
# With a queue of 512, DCLR makes no progress for 600 steps. With full colour jitter, or with five mined positives (the
# last method above), it loses the scene.
RECIPE = [
    *controlled_set.NETWORK, "--batch-size", "32", "--queue-length", str(QUEUE), "--fill-steps", str(QUEUE // 32),
    "--lr", "0.03", "--key-momentum", "0.999", "--jitter", "0.5",
]  # fmt: skip
# 24 steps an epoch. The milestones are at 75 % and 90 % of the last epoch. All training commands of a run have the same
# milestones, so together they are one run.
EPOCHS, MILESTONES = (10, 20, 40, 60, 75), (56, 67)
QUICK_EPOCHS, QUICK_MILESTONES = (4, 6), (4, 5)


def probed_at(options: Options) -> tuple[int, ...]:
    """Return the epochs after which the features are evaluated. The last one is the end of training."""
    return QUICK_EPOCHS if options.quick else EPOCHS


def recipe(options: Options) -> dict[str, Any]:
    """Return the settings that all methods share."""
    milestones = QUICK_MILESTONES if options.quick else MILESTONES
    return {"pretraining": RECIPE, "epochs": probed_at(options), "milestones": milestones}


def folder_of(method: str) -> str:
    return method.lower().replace(",", "").replace(" ", "-")


# ------------------------------------------------------------------------------------------------------------- commands


def pretrained(folder: Path, flags: Sequence[str], seed: int, data: Path, options: Options) -> Chain:
    """Return the pretraining of a method, with its probes."""
    milestones = ["--milestones", *map(str, recipe(options)["milestones"])]
    return runs.pretrain_and_probe(folder, [*RECIPE, *milestones, *flags], seed, data, probed_at(options))


def labelled(folder: Path, seed: int, by_motion: Path, by_scene: Path, options: Options) -> list[Chain]:
    """Return the two networks of controlled_set.py that are trained on labels, and their probes on the same videos."""
    chains = []
    for name, data in (("motion", by_motion), ("scene", by_scene)):
        run = folder / f"supervised-{name}-{seed}"
        probe = runs.evaluate("bias", run / "backbone.safetensors", by_motion, run / "bias", ("--no-foreground",))
        chains.append([*controlled_set.supervised(run, seed, data, options), probe])
    return chains


# -------------------------------------------------------------------------------------------------------------- results


def along_training(folder: Path, method: str, options: Options, figure: str) -> dict[str, Any]:
    """Return a figure at all probes, as a line of a plot: {"steps", "values"}."""
    epochs, folders = probed_at(options), [folder / f"{folder_of(method)}-{seed}" for seed in options.seeds]
    steps_an_epoch = runs.report(folders[0])["steps"] // epochs[-1]
    values = [[runs.figure(each / f"bias-{epoch}", figure) for epoch in epochs] for each in folders]
    return {"steps": [epoch * steps_an_epoch for epoch in epochs], "values": values}


def thinned(
    metrics: Sequence[dict[str, Any]], name: str, minus: str = "", points: int = 40
) -> tuple[list[float], list[float]]:
    """Return (steps, values) of a logged number, or of `name` minus `minus`, as means over intervals of training.

    Single steps are noisy. Steps without the number are skipped: the queue was still filling, or the number was not
    finite.
    """
    logged = [
        (line["step"], line[name] - (line[minus] if minus else 0)) for line in metrics if line.get(name) is not None
    ]
    size = max(1, -(-len(logged) // points))
    intervals = [logged[first : first + size] for first in range(0, len(logged), size)]
    means = [[round(statistics.mean(column), 5) for column in zip(*each, strict=True)] for each in intervals]
    return [step for step, _ in means], [value for _, value in means]


def logged_line(by_seed: Sequence[Sequence[dict[str, Any]]], name: str, minus: str = "") -> dict[str, Any] | None:
    """Return the line of a logged number, or of `name` minus `minus`, at the steps at which all seeds have it.

    `by_seed`: the lines of each seed's metrics.jsonl. Without such a step, the result is None.
    """
    names = {name, minus} - {""}
    having = [[line for line in metrics if all(line.get(each) is not None for each in names)] for metrics in by_seed]
    steps = set.intersection(*({line["step"] for line in metrics} for metrics in having))
    if not steps:
        return None
    averaged = [thinned([line for line in metrics if line["step"] in steps], name, minus) for metrics in having]
    return {"steps": averaged[0][0], "values": [values for _, values in averaged]}


def logged_lines(
    folder: Path, methods: Sequence[str], seeds: range, name: str, minus: str = ""
) -> dict[str, dict[str, Any]]:
    """Return the line of a logged number for each method that logs it."""
    lines = {}
    for method in methods:
        by_seed = [runs.metrics(folder / f"{folder_of(method)}-{seed}") for seed in seeds]
        if line := logged_line(by_seed, name, minus):
            lines[method] = line
    return lines


def panels(folder: Path, methods: Sequence[str], options: Options, rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels along training: both probes, key similarity minus the hardest negative's, and the loss."""
    seeds, found = options.seeds, []
    for name in LABELS:
        figure = f"{name}_probe"
        levels = {"chance": rows["chance"][figure], "random features": statistics.fmean(rows[RANDOM][figure])}
        lines = {method: along_training(folder, method, options, figure) for method in methods}
        found.append(
            {"title": f"{name}, linear probe", "ylabel": "share of test videos", "lines": lines, "levels": levels}
        )
    for pair, meaning in (("vv", "clip"), ("vd", "motion"), ("vs", "scene")):
        lines = logged_lines(folder, methods, seeds, f"positive_similarity/{pair}", f"hardest_negative/{pair}")
        found.append({
            "title": f"pair {pair} ({meaning}): key minus hardest negative",
            "ylabel": "difference of cosine similarities",
            "lines": lines,
            "levels": {"as similar as the hardest negative": 0.0},
        })  # fmt: skip
    levels = {
        "equal logits": math.log(QUEUE + 1),
        f"equal logits, {MINED} mined positive": math.log((QUEUE + 1) / (MINED + 1)),
    }
    lines = logged_lines(folder, methods, seeds, "pair_loss/vv")
    found.append({"title": "pair vv: loss", "ylabel": "nats", "lines": lines, "levels": levels})
    return [panel for panel in found if panel["lines"]]


def at_the_end(
    folder: Path, run: str, probe: str, options: Options, trained: bool = True
) -> dict[str, evidence.Values]:
    """Return the figures of a run's probe, by seed."""
    found: dict[str, evidence.Values] = {
        figure: runs.figure_by_seed(folder, run, options.seeds, probe, figure) for figure in FIGURES
    }
    if trained and torch.cuda.is_available():
        found["minutes"] = [runs.report(folder / f"{run}-{seed}")["seconds"] / 60 for seed in options.seeds]
    return found


def rows_of_methods(folder: Path, methods: Sequence[str], options: Options) -> evidence.Rows:
    last = f"bias-{probed_at(options)[-1]}"
    return {method: at_the_end(folder, folder_of(method), last, options) for method in methods}


def row_of_random_weights(folder: Path, options: Options) -> evidence.Rows:
    return {RANDOM: at_the_end(folder, "random", "bias", options, trained=False)}


def rows_of_references(folder: Path, options: Options) -> evidence.Rows:
    """Return the rows of the networks trained on labels, and of chance."""
    rows: evidence.Rows = {}
    for name in LABELS:
        rows[f"supervised on {name}"] = at_the_end(folder, f"supervised-{name}", "bias", options)
    first = folder / f"random-{options.seeds[0]}" / "bias"
    rows["chance"] = {figure: runs.figure(first, figure.split("_")[0] + "_chance") for figure in FIGURES}
    return rows


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims whose rows were measured."""
    rows = result["rows"]
    found: list[evidence.Finding] = []
    for other, figure, compare, claim in (
        ("MoCo", "motion_probe", evidence.above, "the motion probe of DCLR is above that of MoCo"),
        (
            "without dynamic pairs",
            "motion_probe",
            evidence.above,
            "the motion probe of DCLR is above that of DCLR without dynamic pairs",
        ),
        ("MoCo", "scene_probe", evidence.not_below, "the scene probe of DCLR is not below that of MoCo"),
        (RANDOM, "scene_probe", evidence.not_below, "the scene probe of DCLR is not below that of random weights"),
    ):
        if "DCLR" in rows and other in rows:
            found += compare(claim, rows["DCLR"][figure], rows[other][figure])
    return found


def published(options: Options) -> evidence.Result:
    """Return the published result, to which this run adds methods or seeds.

    Raises:
        UserError: as evidence.published does, and if a published method had other flags than the method has now.
    """
    result = evidence.published("controlled", recipe(options), options)
    evidence.check_flags(result["recipe"]["methods"], METHODS, options)
    return result


def more_flags(parser: ArgumentParser) -> None:
    names = ["random", *METHODS]
    parser.add_argument(
        "--methods", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"{', '.join(names)} (default: all); without --with-published, random always runs",
    )  # fmt: skip
    runs.add_first_seed(parser)
    runs.add_with_published(parser)


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, more_flags)
    methods = [method for method in METHODS if method in given.methods]
    more_seeds = options.seeds.start > 0
    taken = published(options) if options.with_published or more_seeds else None
    if taken:
        evidence.check_seeds(taken, [*(() if options.with_published else (RANDOM,)), *methods], options)
    by_motion, by_scene = controlled_set.stores(options)
    folder = options.work / "controlled"
    chains: list[Chain] = []
    for seed in options.seeds:  # the longest chains first, so that the short ones fill the cores at the end
        chains += [
            pretrained(folder / f"{folder_of(method)}-{seed}", METHODS[method], seed, by_motion, options)
            for method in methods
        ]
        if not taken:
            chains += labelled(folder, seed, by_motion, by_scene, options)
        if not options.with_published:
            chains += [controlled_set.random_probe(folder / f"random-{seed}", seed, by_motion)]
    runs.run(chains, options.parallel)

    own = rows_of_methods(folder, methods, options)
    if not options.with_published:
        own |= row_of_random_weights(folder, options)
    if not taken:
        rows = own | rows_of_references(folder, options)
    elif more_seeds:
        rows = evidence.rows_with_more_seeds(taken, own)
    else:
        rows = taken["rows"] | own
    rows = evidence.in_order(rows, ROWS)
    plotted = panels(folder, methods, options, rows)
    if taken and more_seeds:
        plotted = evidence.panels_with_more_seeds(taken, plotted)
    elif taken:
        plotted = evidence.with_lines_of(taken["panels"], plotted, tuple(METHODS))
    if taken:
        print(f"from the published result: {', '.join(name for name in rows if name not in own)}")
    result: evidence.Result = {
        "question": "does DCLR learn motion where MoCo learns scene, and which of its components causes this?",
        "recipe": recipe(options) | {"methods": {method: METHODS[method] for method in METHODS if method in rows}},
        "figures": FIGURES | (ON_GPU if torch.cuda.is_available() else {}),
        "rows": rows,
        "panels": plotted,
    }
    result["findings"] = findings(result)
    evidence.publish("controlled", result, chains, options, taken)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
