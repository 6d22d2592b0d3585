"""Do the kernels and bfloat16 change what is learned? The same curve with them and without; the same accuracy in both precisions.

    python -m experiments.precision                    three seeds: about 3 hours on two cores, half of it where controlled.py has run
    python -m experiments.precision --with-published   the same half where it has run elsewhere: its published result stands for bfloat16
    python -m experiments.precision --quick            that it runs: about 5 minutes

The curve: 24 steps in float32, with the kernels and with the reference, at a learning rate at which roundings do not grow (docs/LOG.md,
"The curve test is a matter of luck"). Said beforehand: no loss differs by more than 0.1 %. Without a GPU the kernels run in Triton's
interpreter, on a small network and a few small clips.
The accuracy: DCLR of controlled.py, whose runs are taken where they are there, in bfloat16 and in float32. Said beforehand: the means of
both probes differ by at most two standard errors of their difference. A CPU without fast bfloat16 trains in float32 whatever is asked for;
there only the curves are measured.
"""

import dataclasses
import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dclr.data.demo import render_demo
from dclr.engine import read_ds_config, settle_precision
from experiments import controlled, controlled_set, evidence, runs
from experiments.runs import Chain, Options

BFLOAT16 = runs.ROOT / "ds_configs" / "ddp.json"  # the default
KERNELS = ("reference", "triton")
# 24 steps, of which the first 4 fill the queue.
CURVE = [*controlled_set.NETWORK, "--fill-steps", "4", "--lr", "0.0001", "--log-every", "1"]
ON_GPU = ["--epochs", "1", "--batch-size", "32", "--queue-length", "128"]
INTERPRETED = ["--epochs", "6", "--batch-size", "4", "--queue-length", "16", "--width", "8", "--crop-size", "16"]
INTERPRETED_VIDEOS = 2  # of each motion: 4 steps an epoch
CURVE_TOLERANCE = 1e-3
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


def curve(folder: Path, kernels: str, seed: int, data: Path, ds_config: Path, gpu: bool) -> Chain:
    """One short run with these kernels."""
    flags = [*CURVE, *(ON_GPU if gpu else INTERPRETED), "--data", str(data), "--ds_config", str(ds_config)]
    job = runs.train("pretrain", folder, [*flags, "--kernels", kernels], seed)
    interpreter = {} if gpu or kernels == "reference" else {"TRITON_INTERPRET": "1"}
    return [dataclasses.replace(job, environment=interpreter)]


def losses(folder: Path) -> tuple[list[int], list[float]]:
    """(steps, losses), of the steps that train."""
    lines = [line for line in runs.metrics(folder) if line.get("loss") is not None]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def same_curve(by_kernels: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Of the losses by seed and step with each of the two kernels."""
    pairs = zip(by_kernels["reference"], by_kernels["triton"], strict=True)
    worst = max(abs(ours - plain) / plain for of_seed in pairs for plain, ours in zip(*of_seed, strict=True))
    steps, seeds = len(by_kernels["triton"][0]), len(by_kernels["triton"])
    detail = f"greatest difference {worst:.1e} of the loss in {steps} steps of {seeds} seeds, at most {CURVE_TOLERANCE:.0e} was asked"
    return evidence.finding("with the kernels the loss follows that of the reference", worst <= CURVE_TOLERANCE, detail)


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
        for kernels in KERNELS:
            chains.append(curve(work / f"{kernels}-{seed}", kernels, seed, curve_data, ds_config, gpu))
    runs.run(chains, options.parallel)

    curves = {kernels: [losses(work / f"{kernels}-{seed}") for seed in seeds] for kernels in KERNELS}
    by_kernels = {kernels: [values for _, values in by_seed] for kernels, by_seed in curves.items()}
    lines = {kernels: {"steps": curves[kernels][0][0], "values": values} for kernels, values in by_kernels.items()}
    rows, panels, findings = accuracies(shared, options, taken) if has_bfloat16 else ({}, [], [])
    if taken and has_bfloat16:
        print(f"taken from controlled.py's published result: DCLR in bfloat16, {taken['environment']['commit']}")
    result = {
        "question": "do the kernels and bfloat16 change what is learned?",
        "recipe": {"curve": [*CURVE, *(ON_GPU if gpu else INTERPRETED)], "accuracy": controlled.RECIPE},
        "figures": FIGURES,
        "rows": rows,
        "findings": [same_curve(by_kernels), *findings],
        "panels": [{"title": "loss in float32, by kernels", "ylabel": "nats", "lines": lines}, *panels],
    }
    evidence.publish("precision", result, chains, options, taken if has_bfloat16 else None)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
