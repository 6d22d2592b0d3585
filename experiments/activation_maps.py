"""Do activation maps lie on what moves? Where networks respond to a clip, its still and its difference, before training and after.

    python -m experiments.activation_maps --data WEIZMANN            three seeds: about an hour on two cores
    python -m experiments.activation_maps --data WEIZMANN --quick    that it runs: about 5 minutes

DCLR and MoCo are pretrained as in weizmann.py, on frames twice as wide: maps of its 48 pixels are 3 x 3, where a person is a cell. Of the
30 test clips then `eval.py maps` takes A_v, A_s and A_d, and how much of each lies on what moves. A map that is the same everywhere has the
moving pixels' own share; random weights are those that the runs began with.
Said beforehand, when one run of DCLR had been seen (docs/LOG.md, 2026-11-26), each by more than two standard errors over seeds: DCLR's A_d
lies on what moves more than a map that is the same everywhere; its A_v more than that of random weights, and more than MoCo's.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dclr.evaluation.activation_maps import MAPS
from experiments import evidence, runs, weizmann
from experiments.runs import Chain, Options

CLIPS = ["--preset", "demo", "--clip-length", "8", "--clip-stride", "2", "--crop-size", "96"]
FIGURES = {name: [f"{name}, share on what moves", "%"] for name in MAPS}
RANDOM, FLAT = "random weights", "the same everywhere"


def plan(folder: Path, method: str, seed: int, data: Path, options: Options) -> Chain:
    """A network, and its maps."""
    run = folder / f"{method.lower()}-{seed}"
    schedule = weizmann.QUICK_PRETRAIN if options.quick else weizmann.PRETRAIN
    recipe = ["--data", str(data), *CLIPS, *weizmann.BATCH, *schedule, *weizmann.METHODS[method]]
    return [runs.train("pretrain", run, recipe, seed), runs.evaluate("maps", run, data, run / "maps")]


def table(folder: Path, options: Options) -> evidence.Rows:
    """What the runs of these seeds have found."""

    def by_seed(method: str, which: str = "") -> dict[str, evidence.Values]:
        maps = [folder / f"{method.lower()}-{seed}" / "maps" for seed in options.seeds]
        return {name: [runs.figure(each, name + which) for each in maps] for name in MAPS}

    rows: evidence.Rows = {RANDOM: by_seed("DCLR", "_untrained")}
    rows |= {method: by_seed(method) for method in weizmann.METHODS}
    rows[FLAT] = dict.fromkeys(MAPS, runs.figure(folder / f"dclr-{options.seeds[0]}" / "maps", "flat"))
    return rows


def findings(rows: evidence.Rows) -> list[dict[str, Any]]:
    """What was said beforehand."""
    found = []
    for name, other, claim in (
        ("A_d", FLAT, "DCLR's A_d lies on what moves more than a map that is the same everywhere"),
        ("A_v", RANDOM, "DCLR's A_v lies on what moves more than that of random weights"),
        ("A_v", "MoCo", "DCLR's A_v lies on what moves more than MoCo's"),
    ):
        ours, theirs = rows["DCLR"][name], rows[other][name]
        assert isinstance(ours, list)
        found += evidence.above(claim, ours, theirs if isinstance(theirs, list) else [theirs] * len(ours))
    return found


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, weizmann.more_flags)
    folder, data = options.work / "activation_maps", given.data.resolve()
    chains = [
        plan(folder, method, seed, data, options) for method in reversed(weizmann.METHODS) for seed in options.seeds
    ]
    runs.run(chains, options.parallel)
    rows = table(folder, options)
    result = {
        "question": "do activation maps lie on what moves?",
        "recipe": {
            "clips": CLIPS, "batch": weizmann.BATCH, "pretraining": weizmann.PRETRAIN, "methods": weizmann.METHODS
        },
        "figures": FIGURES,
        "ylabel": "share of a map",
        "rows": rows,
        "findings": findings(rows),
    }  # fmt: skip
    if evidence.publish("activation_maps", result, chains, options):
        for method in weizmann.METHODS:
            pictures = folder / f"{method.lower()}-{options.seeds[0]}" / "maps" / "pictures"
            kept = evidence.published_file("activation_maps").parent.name
            shutil.copy(pictures / "maps.png", evidence.PLOTS / kept / f"maps_{method.lower()}.png")


if __name__ == "__main__":
    sys.exit(runs.entry(main))
