"""Are activation maps inside the moving region? Maps of a clip's three views, before and after training.

    python -m experiments.activation_maps --data WEIZMANN            three seeds: about an hour on two cores
    python -m experiments.activation_maps --data WEIZMANN --quick    checks that it runs: about 5 minutes

DCLR and MoCo are pretrained as in weizmann.py, but on frames of 96 pixels, which give maps of 6 x 6 cells. With 48
pixels, a map has 3 x 3 cells, and a person fills one cell. `eval.py maps` then computes A_v, A_s and A_d of the 30 test
clips, and the share of each map inside the moving region. The figure of a uniform map is the moving region's share of
the pixels. Random weights are the initial weights of DCLR's runs.

Pre-registered after one run of DCLR and before all other runs (docs/LOG.md, 2026-11-26 and 27), each by more than two
standard errors over seeds:

- A_d of DCLR is inside the moving region more than a uniform map.
- A_v of DCLR is inside the moving region more than A_v of random weights, and more than A_v of MoCo.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dclr.evaluation.activation_maps import MAPS
from experiments import evidence, runs, weizmann
from experiments.runs import Chain, Options

CLIPS = ["--preset", "demo", "--clip-length", "8", "--clip-stride", "2", "--crop-size", "96"]
FIGURES = {name: [f"{name}, share inside the moving region", "%"] for name in MAPS}
RANDOM, UNIFORM = "random weights", "the same everywhere"


def plan(folder: Path, method: str, seed: int, data: Path, options: Options) -> Chain:
    """Return the pretraining of a network, and the evaluation of its maps."""
    run = folder / f"{method.lower()}-{seed}"
    schedule = weizmann.QUICK_PRETRAIN if options.quick else weizmann.PRETRAIN
    recipe = ["--data", str(data), *CLIPS, *weizmann.BATCH, *schedule, *weizmann.METHODS[method]]
    return [runs.train("pretrain", run, recipe, seed), runs.evaluate("maps", run, data, run / "maps")]


def table(folder: Path, options: Options) -> evidence.Rows:
    """Return the rows of the table."""

    def by_seed(method: str, suffix: str = "") -> dict[str, evidence.Values]:
        return {name: runs.figure_by_seed(folder, method, options.seeds, "maps", name + suffix) for name in MAPS}

    rows: evidence.Rows = {RANDOM: by_seed("dclr", "_untrained")}
    rows |= {method: by_seed(method.lower()) for method in weizmann.METHODS}
    rows[UNIFORM] = dict.fromkeys(MAPS, runs.figure(folder / f"dclr-{options.seeds[0]}" / "maps", "flat"))
    return rows


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims."""
    rows, found = result["rows"], []
    for name, other, claim in (
        ("A_d", UNIFORM, "A_d of DCLR is inside the moving region more than a uniform map"),
        ("A_v", RANDOM, "A_v of DCLR is inside the moving region more than A_v of random weights"),
        ("A_v", "MoCo", "A_v of DCLR is inside the moving region more than A_v of MoCo"),
    ):
        compare = evidence.above_level if other == UNIFORM else evidence.above
        found += compare(claim, rows["DCLR"][name], rows[other][name])
    return found


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, weizmann.more_flags)
    folder, data = options.work / "activation_maps", given.data.resolve()
    chains = [
        plan(folder, method, seed, data, options) for method in reversed(weizmann.METHODS) for seed in options.seeds
    ]
    runs.run(chains, options.parallel)
    result: evidence.Result = {
        "question": "are activation maps inside the moving region?",
        "recipe": {
            "clips": CLIPS,
            "batch": weizmann.BATCH,
            "pretraining": weizmann.PRETRAIN,
            "methods": weizmann.METHODS,
        },
        "figures": FIGURES,
        "ylabel": "share of a map",
        "rows": table(folder, options),
    }
    result["findings"] = findings(result)
    if evidence.publish("activation_maps", result, chains, options):
        for method in weizmann.METHODS:
            pictures = folder / f"{method.lower()}-{options.seeds[0]}" / "maps" / "pictures"
            kept = evidence.published_file("activation_maps").parent.name
            shutil.copy(pictures / "maps.png", evidence.PLOTS / kept / f"maps_{method.lower()}.png")


if __name__ == "__main__":
    sys.exit(runs.entry(main))
