"""Does pretraining help on real videos, and do the features follow the person or the background? Weizmann actions.

    python -m experiments.weizmann --data WEIZMANN                three seeds: about 50 minutes on two cores
    python -m experiments.weizmann --data WEIZMANN --quick        checks that it runs: about 5 minutes

The set has 60 train and 30 test clips of 10 actions, and no person is in both splits. For each seed, DCLR and MoCo are
pretrained on the train clips for the same 480 steps. Then they are finetuned with the same budget as a network from
scratch. Frozen features are evaluated by a linear probe, by retrieval (R@1), and on two kinds of composites:

- moving foreground: the moving person on the background of another clip;
- static foreground: one frame of this composite, repeated.

"Contrasted" is the share of videos that are right with the moving and wrong with the static foreground. A network that
is always wrong on still pictures has a high "contrasted", so all three are reported. The linear probe predicts the
class. For the network trained on labels, its own classifier predicts. DCLR mines five positives, as published.

Pre-registered, each by more than two standard errors of the difference over seeds:

- Finetuning from DCLR is better than from MoCo and from scratch.
- DCLR recognises a moving foreground better than MoCo.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

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
    """Return the finetuning from `start` (by default from scratch), and the evaluation of its accuracy."""
    flags = ["--data", str(data), *CLIPS, *BATCH, *(QUICK_FINETUNE if options.quick else FINETUNE), *start]
    return [runs.train("finetune", folder, flags, seed), runs.evaluate("accuracy", folder, data, folder / "accuracy")]


def features(checkpoint: Path | str, folder: Path, data: Path, flags: Sequence[str] = ()) -> Chain:
    """Return the evaluations of a frozen backbone."""
    return [
        runs.evaluate("bias", checkpoint, data, folder / "bias", ("--foreground", *flags)),
        runs.evaluate("retrieval", checkpoint, data, folder / "retrieval", flags),
    ]


def plan(work: Path, seed: int, data: Path, options: Options) -> list[Chain]:
    """Return the chains of one seed: from scratch, random features, and each method."""
    untrained, scratch = work / f"random-{seed}", work / f"scratch-{seed}"
    bias, _ = features(scratch, scratch, data)
    chains = [
        [*finetuned(scratch, seed, data, options), bias],
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
    """Return the rows of the table."""

    def from_bias(run: str) -> dict[str, evidence.Values]:
        return {name: runs.figure_by_seed(work, run, seeds, "bias", name) for name in FROM_BIAS}

    rows: evidence.Rows = {}
    names = {"random weights": ("random", "scratch")} | {m: (m.lower(), f"{m.lower()}-finetune") for m in METHODS}
    for row, (run, transfer) in names.items():
        rows[row] = {
            "finetuned": runs.figure_by_seed(work, transfer, seeds, "accuracy", "top1_video"),
            "recall_at_1": runs.figure_by_seed(work, run, seeds, "retrieval", "recall_at_1"),
            **from_bias(run),
        }
    rows["trained on labels from scratch"] = from_bias("scratch")
    chance = runs.figure(work / f"random-{seeds[0]}" / "bias", "motion_chance")
    by_class: dict[str, evidence.Values] = dict.fromkeys(("finetuned", *FROM_BIAS), chance)
    # "Contrasted" has no chance level: a guess that ignores the clip is right on both composites or wrong on both.
    del by_class["foreground_contrasted"]
    rows["chance"] = {
        **by_class,
        "recall_at_1": runs.figure(work / f"random-{seeds[0]}" / "retrieval", "chance_at_1"),
    }
    return rows


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims."""
    rows, found = result["rows"], []
    for figure, other, claim in (
        ("finetuned", "random weights", "finetuning from DCLR is better than from scratch"),
        ("finetuned", "MoCo", "finetuning from DCLR is better than from MoCo"),
        ("foreground_moving", "MoCo", "DCLR recognises a moving foreground better than MoCo"),
    ):
        found += evidence.above(claim, rows["DCLR"][figure], rows[other][figure])
    return found


def more_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="the folder with splits/train.txt and test.txt")


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, more_flags)
    work, data = options.work / "weizmann", given.data.resolve()
    chains = [chain for seed in options.seeds for chain in plan(work, seed, data, options)]
    runs.run(chains, options.parallel)
    result: evidence.Result = {
        "question": "does pretraining help on real videos, and do its features follow the person or the background?",
        "recipe": {"clips": CLIPS, "batch": BATCH, "pretraining": PRETRAIN, "finetuning": FINETUNE, "methods": METHODS},
        "figures": FIGURES,
        "rows": table(work, options.seeds),
    }
    result["findings"] = findings(result)
    evidence.publish("weizmann", result, chains, options)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
