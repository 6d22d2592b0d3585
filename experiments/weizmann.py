"""Does pretraining help on genuine videos, and do its features follow the person or the background? Weizmann actions.

    python -m experiments.weizmann --data WEIZMANN                three seeds: about 50 minutes on two cores
    python -m experiments.weizmann --data WEIZMANN --quick        that it runs: about 5 minutes

60 train and 30 test clips of 10 actions; no person is in both splits. For each seed DCLR and MoCo are pretrained on the train clips for the
same 480 steps, and finetuned with the same budget as a network from scratch. Frozen features are probed, looked up (R@1), and tested on
composites: a person who moves before another clip's background (moving foreground), and the same frozen to one frame (static foreground).
Contrasted is right on the first and wrong on its frozen partner; never being right on a still picture helps there, so all three are told.
The linear probe predicts; for the network trained on labels, its own classifier.
Said beforehand, each by more than two standard errors of the difference over seeds: finetuning from DCLR is better than from MoCo and
from scratch; DCLR recognises a moving foreground better than MoCo.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import evidence, runs
from experiments.runs import Chain, Options

METHODS = {"MoCo": ["--method", "moco"], "DCLR": []}
CLIPS = ["--preset", "demo", "--clip-length", "8", "--clip-stride", "2", "--crop-size", "48"]
BATCH = ["--batch-size", "20"]  # 3 steps an epoch
PRETRAIN = ["--epochs", "160", "--milestones", "120", "144", "--fill-steps", "26", "--checkpoint-every", "40"]
FINETUNE = ["--epochs", "40", "--milestones", "24", "32", "--lr", "0.05", "--checkpoint-every", "40"]
QUICK_PRETRAIN = ["--epochs", "2", "--fill-steps", "2"]
QUICK_FINETUNE = ["--epochs", "1"]

FIGURES = {
    "finetuned": ["finetuned, top-1 by video", "%"],
    "motion_probe": ["linear probe", "%"],
    "recall_at_1": ["R@1", "%"],
    "foreground_ordinary": ["ordinary test clips", "%"],
    "foreground_moving": ["moving foreground", "%"],
    "foreground_static": ["static foreground", "%"],
    "foreground_contrasted": ["contrasted", "%"],
}
FROM_BIAS = [name for name in FIGURES if name == "motion_probe" or name.startswith("foreground_")]


def finetuned(folder: Path, seed: int, data: Path, options: Options, start: Sequence[str] = ()) -> Chain:
    """From `start`, or from scratch, and its accuracy."""
    flags = ["--data", str(data), *CLIPS, *BATCH, *(QUICK_FINETUNE if options.quick else FINETUNE), *start]
    return [runs.train("finetune", folder, flags, seed), runs.evaluate("accuracy", folder, data, folder / "accuracy")]


def features(checkpoint: Path | str, folder: Path, data: Path, flags: Sequence[str] = ()) -> Chain:
    """What is measured on a frozen backbone."""
    return [
        runs.evaluate("bias", checkpoint, data, folder / "bias", ("--foreground", *flags)),
        runs.evaluate("retrieval", checkpoint, data, folder / "retrieval", flags),
    ]


def plan(work: Path, seed: int, data: Path, options: Options) -> list[Chain]:
    """A seed's chains: from scratch, random features, and each method."""
    untrained, scratch = work / f"random-{seed}", work / f"scratch-{seed}"
    chains = [
        [*finetuned(scratch, seed, data, options), *features(scratch, scratch, data)[:1]],
        features("random", untrained, data, (*CLIPS, "--seed", str(seed))),
    ]
    for method, flags in METHODS.items():
        run = work / f"{method.lower()}-{seed}"
        recipe = ["--data", str(data), *CLIPS, *BATCH, *(QUICK_PRETRAIN if options.quick else PRETRAIN), *flags]
        transfer = work / f"{method.lower()}-finetune-{seed}"
        chains.append([
            runs.train("pretrain", run, recipe, seed),
            *finetuned(transfer, seed, data, options, ("--pretrained", str(run))),
            *features(run, run, data),
        ])  # fmt: skip
    return chains


def table(work: Path, seeds: range) -> evidence.Rows:
    """What the runs of these seeds have found."""
    rows: evidence.Rows = {}
    names = {"random weights": ("random", "scratch")} | {m: (m.lower(), f"{m.lower()}-finetune") for m in METHODS}
    for row, (run, transfer) in names.items():
        rows[row] = {
            "finetuned": [runs.figure(work / f"{transfer}-{seed}" / "accuracy", "top1_video") for seed in seeds],
            "recall_at_1": [runs.figure(work / f"{run}-{seed}" / "retrieval", "recall_at_1") for seed in seeds],
        }
        for name in FROM_BIAS:
            rows[row][name] = [runs.figure(work / f"{run}-{seed}" / "bias", name) for seed in seeds]
    rows["trained on labels from scratch"] = {
        name: [runs.figure(work / f"scratch-{seed}" / "bias", name) for seed in seeds] for name in FROM_BIAS
    }
    chance = runs.figure(work / f"random-{seeds[0]}" / "bias", "motion_chance")
    by_class = dict.fromkeys(("finetuned", *FROM_BIAS), chance)
    del by_class["foreground_contrasted"]  # a guess that does not look at the clip is wrong on both or right on both
    by_order = runs.figure(work / f"random-{seeds[0]}" / "retrieval", "chance_at_1")
    rows["chance"] = {**by_class, "recall_at_1": by_order}
    return rows


def findings(rows: evidence.Rows) -> list[dict[str, Any]]:
    """What was said beforehand."""
    found = []
    for figure, other, claim in (
        ("finetuned", "random weights", "finetuning from DCLR is better than from scratch"),
        ("finetuned", "MoCo", "finetuning from DCLR is better than from MoCo"),
        ("foreground_moving", "MoCo", "DCLR recognises a moving foreground better than MoCo"),
    ):
        more, less = rows["DCLR"][figure], rows[other][figure]
        assert isinstance(more, list)
        assert isinstance(less, list)
        found += evidence.above(claim, more, less)
    return found


def more_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="the folder with splits/train.txt and test.txt")


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, more_flags)
    work, data = options.work / "weizmann", given.data.resolve()
    chains = [chain for seed in options.seeds for chain in plan(work, seed, data, options)]
    runs.run(chains, options.parallel)
    rows = table(work, options.seeds)
    result = {
        "question": "does pretraining help on genuine videos, and do its features follow the person or the background?",
        "recipe": {"clips": CLIPS, "batch": BATCH, "pretraining": PRETRAIN, "finetuning": FINETUNE, "methods": METHODS},
        "figures": FIGURES,
        "rows": rows,
        "findings": findings(rows),
    }
    evidence.publish("weizmann", result, chains, options)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
