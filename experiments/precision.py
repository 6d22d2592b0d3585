"""Do the kernels and bfloat16 change what is learned? The same curve with them and without; the same accuracy in both precisions.

    python -m experiments.precision                    three seeds: about 3 hours on two cores, half of it where controlled.py has run
    python -m experiments.precision --with-published   the same half where it has run elsewhere: its published result stands for bfloat16
    python -m experiments.precision --quick            that it runs: about 20 minutes

The curve: 24 steps in float32, with the kernels and with the reference. Said beforehand: no loss differs by more than 0.1 %. Without a
GPU the kernels run in Triton's interpreter, on a small network and a few small clips. Training enlarges roundings until nothing keeps to
0.1 % (docs/LOG.md, 2026-11-27), so a third run tells how far: the reference once more, whose sums are rounded otherwise, by a second
thread or on a GPU by more padding. Asked instead, after curves of both had been seen: the first two losses differ by at most 1e-4, where
an update that is wrong by 1 % moves the second by 7e-4 or more; and over all steps, in powers of ten, the kernels are on average no
further from the reference than it is from itself, within two standard errors.
The accuracy: DCLR of controlled.py, whose runs are taken where they are there, in bfloat16 and in float32. Said beforehand: the means of
both probes differ by at most two standard errors of their difference. A CPU without fast bfloat16 trains in float32 whatever is asked for;
there only the curves are measured.
"""

import dataclasses
import json
import math
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dclr.data.demo import render_demo
from dclr.training.engine import read_ds_config, settle_precision
from experiments import controlled, controlled_set, evidence, runs
from experiments.runs import Chain, Options

BFLOAT16 = runs.ROOT / "ds_configs" / "ddp.json"  # the default
REFERENCE, TRITON, ROUNDED = CURVES = ("reference", "triton", "reference rounded otherwise")
# 24 steps, of which the first 4 fill the queue.
CURVE = [*controlled_set.NETWORK, "--fill-steps", "4", "--lr", "0.0001", "--log-every", "1"]
ON_GPU = ["--epochs", "1", "--batch-size", "32", "--queue-length", "128"]
INTERPRETED = ["--epochs", "6", "--batch-size", "4", "--queue-length", "16", "--width", "8", "--crop-size", "16"]
INTERPRETED_VIDEOS = 2  # of each motion: 4 steps an epoch
CURVE_TOLERANCE, FIRST_TOLERANCE = 1e-3, 1e-4
RESOLUTION = 1e-8  # of a loss in float32: what is equal counts as this far apart
PRECISIONS = ("bfloat16", "float32")
FIGURES = {"motion_probe": ["motion, linear probe", "%"], "scene_probe": ["scene, linear probe", "%"]}


def float32_config(folder: Path) -> Path:
    """The default DeepSpeed configuration without autocast."""
    config = json.loads(BFLOAT16.read_text())
    config["torch_autocast"]["enabled"] = False
    path = folder / "float32.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2))
    return path


def curve(folder: Path, name: str, seed: int, data: Path, ds_config: Path, gpu: bool) -> Chain:
    """The short run of this name, one of CURVES."""
    flags = [*CURVE, *(ON_GPU if gpu else INTERPRETED), "--data", str(data), "--ds_config", str(ds_config)]
    flags += ["--kernels", TRITON if name == TRITON else REFERENCE]
    environment = {"OMP_NUM_THREADS": "1"}  # however many the machine has, so that a second one makes the difference
    if name == TRITON and not gpu:
        environment["TRITON_INTERPRET"] = "1"
    elif name == ROUNDED and gpu:
        flags += ["--pad-channels", "16"]
    elif name == ROUNDED:
        environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    return [dataclasses.replace(runs.train("pretrain", folder, flags, seed), environment=environment)]


def curve_folder(work: Path, name: str, seed: int) -> Path:
    return work / f"{controlled.folder_of(name)}-{seed}"


def losses(folder: Path) -> tuple[list[int], list[float]]:
    """(steps, losses), of the steps that train."""
    lines = [line for line in runs.metrics(folder) if line.get("loss") is not None]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def apart(losses: list[float], reference: list[float]) -> list[float]:
    """How far two curves are from each other at each step, as shares of the reference's loss."""
    return [abs(loss - plain) / plain for loss, plain in zip(losses, reference, strict=True)]


def powers_of_ten(shares: list[float]) -> list[float]:
    return [math.log10(max(share, RESOLUTION)) for share in shares]


def same_curve(curves: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Findings, of the losses by seed and step of each of CURVES. Of one seed there is no spread, and no finding that needs it."""
    far = {name: [apart(*pair) for pair in zip(curves[name], curves[REFERENCE], strict=True)] for name in CURVES[1:]}
    seeds, steps = len(far[TRITON]), len(far[TRITON][0])
    first = max(share for of_seed in far[TRITON] for share in of_seed[:2])
    greatest = {name: max(map(max, of_seeds)) for name, of_seeds in far.items()}
    where = f"in {steps} steps of {seeds} seeds, at most {CURVE_TOLERANCE:.0e} was asked"
    findings = [
        evidence.finding(
            "with the kernels the first two losses are those of the reference", first <= FIRST_TOLERANCE,
            f"greatest difference {first:.1e}, at most {FIRST_TOLERANCE:.0e} was asked",
        ),
        evidence.finding(
            "with the kernels the loss follows that of the reference", greatest[TRITON] <= CURVE_TOLERANCE,
            f"greatest difference {greatest[TRITON]:.1e} of the loss {where}; of the {ROUNDED}, {greatest[ROUNDED]:.1e}",
        ),
    ]  # fmt: skip
    if seeds > 1:
        triton, rounded = (
            [statistics.mean(powers_of_ten(shares)) for shares in far[name]] for name in (TRITON, ROUNDED)
        )
        gap, error = evidence.difference(triton, rounded)
        means = f"on average over the steps 10^{statistics.mean(triton):.1f} of the loss, and 10^{statistics.mean(rounded):.1f}"
        findings += [
            evidence.finding(
                "with the kernels it is no further from the reference than it is from itself",
                gap <= evidence.STANDARD_ERRORS * error,
                f"{means}; {gap:+.1f} powers of ten, at most {evidence.STANDARD_ERRORS * error:.1f} was asked",
            )
        ]
    return findings


def same_accuracy(name: str, bfloat16: list[float], float32: list[float]) -> dict[str, Any]:
    """Of a figure's values over at least two seeds."""
    gap, error = evidence.difference(bfloat16, float32)
    detail = f"{100 * gap:+.1f} points, at most {100 * evidence.STANDARD_ERRORS * error:.1f} either way was asked"
    return evidence.finding(
        f"bfloat16 is as right as float32 on {name}", abs(gap) <= evidence.STANDARD_ERRORS * error, detail
    )


def accuracies(
    folder: Path, options: Options, taken: evidence.Result | None
) -> tuple[evidence.Rows, list[dict[str, Any]], list[dict[str, Any]]]:  # rows, panels, findings
    """Of the runs in both precisions. With one seed there is no spread to judge by, and no finding.

    `taken`: the result of controlled.py whose DCLR is the one in bfloat16, or None, and its run is in the folder.
    """
    rows: evidence.Rows = {name: {} for name in PRECISIONS}
    panels, findings = [], []
    of_dclr = {panel["title"]: panel["lines"]["DCLR"] for panel in taken["panels"]} if taken else {}
    for figure, (title, _) in FIGURES.items():
        lines = {
            "bfloat16": of_dclr.get(title) or controlled.along_training(folder, "DCLR", options, figure),
            "float32": controlled.along_training(folder, "float32", options, figure),
        }
        panels.append({"title": title, "ylabel": "share of test videos", "lines": lines})
        for name, line in lines.items():
            rows[name][figure] = [values[-1] for values in line["values"]]
        if len(options.seeds) > 1:
            bfloat16, float32 = ([values[-1] for values in line["values"]] for line in lines.values())
            findings.append(same_accuracy(title.split(",")[0], bfloat16, float32))
    return rows, panels, findings


def more_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--with-published", action="store_true",
        help="take DCLR in bfloat16 from controlled.py's published result of the same recipe, seeds and device",
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, more_flags)
    taken = controlled.published(options) if given.with_published else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, _ = controlled_set.stores(options)
    work, shared, seeds = options.work / "precision", options.work / "controlled", options.seeds
    ds_config, dclr, gpu = float32_config(work), controlled.METHODS["DCLR"], device.type == "cuda"
    curve_data = data if gpu else work / "videos"
    if not gpu:
        render_demo(curve_data, train_per_class=INTERPRETED_VIDEOS, test_per_class=1)
    chains: list[Chain] = []
    has_bfloat16 = settle_precision(read_ds_config(BFLOAT16), device).startswith("bfloat16")
    for seed in seeds:
        if has_bfloat16:
            in_float32 = [*dclr, "--ds_config", str(ds_config)]
            if not taken:
                chains.append(controlled.pretrained(shared / f"dclr-{seed}", dclr, seed, data, options))
            chains.append(controlled.pretrained(shared / f"float32-{seed}", in_float32, seed, data, options))
        for name in CURVES:
            chains.append(curve(curve_folder(work, name, seed), name, seed, curve_data, ds_config, gpu))
    runs.run(chains, options.parallel)

    measured = {name: [losses(curve_folder(work, name, seed)) for seed in seeds] for name in CURVES}
    curves = {name: [values for _, values in by_seed] for name, by_seed in measured.items()}
    steps = measured[REFERENCE][0][0]
    lines = {name: {"steps": steps, "values": values} for name, values in curves.items()}
    distances = {
        name: [powers_of_ten(apart(*pair)) for pair in zip(curves[name], curves[REFERENCE], strict=True)]
        for name in CURVES[1:]
    }
    apart_lines = {name: {"steps": steps, "values": values} for name, values in distances.items()}
    rows, panels, findings = accuracies(shared, options, taken) if has_bfloat16 else ({}, [], [])
    if taken and has_bfloat16:
        print(f"taken from controlled.py's published result: DCLR in bfloat16, {taken['environment']['commit']}")
    result = {
        "question": "do the kernels and bfloat16 change what is learned?",
        "recipe": {"curve": [*CURVE, *(ON_GPU if gpu else INTERPRETED)], "accuracy": controlled.RECIPE},
        "figures": FIGURES,
        "rows": rows,
        "findings": [*same_curve(curves), *findings],
        "panels": [
            {"title": "loss in float32, by kernels", "ylabel": "nats", "lines": lines},
            {"title": "how far from the reference", "ylabel": "powers of ten of its loss", "lines": apart_lines},
            *panels,
        ],
    }
    evidence.publish("precision", result, chains, options, taken if has_bfloat16 else None)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
