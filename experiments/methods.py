"""Which other methods learn motion on the controlled set? Do dropped frames or decayed queue entries help VideoMoCo?

    python -m experiments.methods                             all: three seeds of eleven methods, several hours
    python -m experiments.methods --seeds 1                   the first seed
    python -m experiments.methods --first-seed 1 --seeds 2    adds two seeds to the published result of the first
    python -m experiments.methods --quick                     checks that it runs

All methods get the recipe of controlled.py: the same videos, network, augmentation, optimizer, learning rate, and
batches of 32 samples. They stop after 960 steps. controlled.py has a probe at this step, and its learning rate is still
constant there. DCLR and MoCo are trained again for two reasons: the published probes at this step have no nearest
neighbours, and the code has changed since they were published.

Methods without a queue get the recipe without the queue's flags. The other methods spend the first 64 steps on filling
the queue, and these steps count.

No setting was tuned for any new method. The learning rate is 0.03, as in controlled.py. Published rates for batches of
32 samples, in proportion to the batch size, are 0.00375 (MoCo), 0.005 (VideoMoCo), 0.00625 (SimSiam) and 0.008 (DCLR,
from the batch of 40 of its released command). They differ by a factor of two. 0.03 is 4 to 8 times as high, because the
run is short.

VideoMoCo trains as MoCo in the first half of the epochs, as published. In the second half it drops 2 of 8 frames and
decays the logits of queue entries. "MoCo, same frames" is its baseline: query and key have the same frames, no frame is
dropped, and nothing decays. All variants with the same seed are equal in the first half, bit for bit.

The decay at the published rate can be computed. With 2,048 entries and batches of 32, the oldest entry is 64 steps old.
Its logits are multiplied by 0.99999^64 = 0.9994, which changes a logit by at most 0.009. A further row therefore decays
by position at a rate that matters: 0.99968^2048 = 0.52. At the published rate, this is the factor at the end of the
published queue of 65,536 entries.

One more row asks whether it matters what the key encoder sees of the query clip in DCLR: the static and the dynamic
view, or all three views as in the released code.

For runs with a generator, dropped_frames.py measures whether the generator drops the frames that matter.

Pre-registered on 2026-11-29, before any run, by two standard errors of the difference over seeds. It was already known
that the motion probe of DCLR is above that of MoCo at this step (35.5 and 20.3 %), so this is not among the claims.

- The motion probe of DCLR is above that of VideoMoCo, and above that of SimSiam.
- The motion probe of the SimCLR form is above that of MoCo: dynamic pairs teach motion without a queue, too.
- Dropping: the motion probe with a generator is above that with random frames. With random frames it is above that
  without dropping.
- Decay: at the published rate, neither probe changes. At the rate that matters, the motion probe is higher than without
  decay.
- The frames that the generator drops change the embedding more than random frames do (rank above 50 %), and more than
  the frames that it drops from other clips. Without them, the motion probe is worse than without random frames.

Added on the same day, before any run of DCLR: neither probe of DCLR changes if the key encoder sees three views.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import controlled, controlled_set, evidence, runs
from experiments.runs import Chain, Job, Options

EPOCHS, QUICK_EPOCHS = 40, 12
MILESTONES = ["--milestones", *map(str, controlled.MILESTONES)]  # later than EPOCHS: the learning rate is constant

QUEUE_FLAGS = ("--queue-length", "--fill-steps", "--key-momentum")
# These two do not change the training.
CHECKPOINTS = ["--checkpoint-every", "5", "--knn-every", "0"]

PLAIN, GENERATOR, RANDOM_FRAMES = "MoCo, same frames", "VideoMoCo, dropping only", "random frames dropped"
BOTH, DECAY, FAST = "VideoMoCo", "VideoMoCo, decay only", "decay by position to 0.52"
SIMCLR, SIMSIAM = "SimCLR form of DCLR", "SimSiam"
THREE_VIEWS = "DCLR, key encoder sees three views"


def videomoco(dropping: str, decay: str, *more: str) -> list[str]:
    return ["--method", "videomoco", "--dropping", dropping, "--decay", decay, *more]


# In the order of the runs. The questions about dropping come first.
METHODS: dict[str, list[str]] = {
    PLAIN: videomoco("none", "none"),
    GENERATOR: videomoco("generator", "none"),
    RANDOM_FRAMES: videomoco("random", "none"),
    SIMSIAM: ["--method", "simsiam"],
    SIMCLR: ["--method", "dclr-simclr"],
    "MoCo": controlled.METHODS["MoCo"],
    "DCLR": controlled.METHODS["DCLR"],
    THREE_VIEWS: [*controlled.METHODS["DCLR"], "--key-encoder-views", "all"],
    FAST: videomoco("none", "position", "--decay-rate", "0.99968"),
    BOTH: videomoco("generator", "steps"),
    DECAY: videomoco("none", "steps"),
}
WITH_GENERATOR = (GENERATOR, BOTH)
WITHOUT_QUEUE = (SIMCLR, SIMSIAM)
RANDOM = controlled.RANDOM
ROWS = (
    RANDOM, "DCLR", THREE_VIEWS, "MoCo", SIMCLR, SIMSIAM, PLAIN, BOTH, GENERATOR, RANDOM_FRAMES, DECAY, FAST, "chance",
)  # fmt: skip

DROPPED = {
    "rank": ["rank of the dropped frames", "%"],
    "rank_other_clips": ["rank, other clips' frames", "%"],
    "most_common": ["clips that lose the same frames", "%"],
    "motion_chosen": ["motion, without the dropped frames", "%"],
    "motion_random": ["motion, without random frames", "%"],
}
"""The figures of dropped_frames.py that the page shows. The result file has all figures."""


def epochs(options: Options) -> int:
    return QUICK_EPOCHS if options.quick else EPOCHS


def without_queue_flags(recipe: Sequence[str]) -> list[str]:
    """Return the flags of a recipe, each with one value, except those of the queue."""
    pairs = zip(recipe[::2], recipe[1::2], strict=True)
    return [word for flag, value in pairs if flag not in QUEUE_FLAGS for word in (flag, value)]


def flags_of(method: str, options: Options) -> list[str]:
    """Return all flags of a method's pretraining, except data, seed and epochs."""
    own = METHODS[method]
    if "videomoco" in own:
        own = [*own, "--adversarial-from", str(epochs(options) // 2)]
    recipe = without_queue_flags(controlled.RECIPE) if method in WITHOUT_QUEUE else controlled.RECIPE
    return [*recipe, *MILESTONES, *CHECKPOINTS, *own]


def chain(folder: Path, method: str, seed: int, data: Path, options: Options) -> Chain:
    """Return the pretraining of a method, its probe, and the measurement of its generator if it has one."""
    run = folder / f"{controlled.folder_of(method)}-{seed}"
    jobs = runs.pretrain_and_probe(run, flags_of(method, options), seed, data, [epochs(options)])
    if method in WITH_GENERATOR:
        out = run / "dropped_frames"
        command = ("-m", "experiments.dropped_frames", "--run", str(run), "--data", str(data), "--out", str(out))
        jobs.append(Job(command=command, writes=out / "report.json", log=out / "measure.log"))
    return jobs


# -------------------------------------------------------------------------------------------------------------- results


def table(folder: Path, options: Options) -> evidence.Rows:
    """Return the rows of the table."""
    rows: evidence.Rows = {}
    for method in METHODS:
        run = controlled.folder_of(method)
        rows[method] = controlled.at_the_end(folder, run, f"bias-{epochs(options)}", options)
        if method in WITH_GENERATOR:
            measured = runs.report(folder / f"{run}-{options.seeds[0]}" / "dropped_frames")["figures"]
            rows[method] |= {
                name: runs.figure_by_seed(folder, run, options.seeds, "dropped_frames", name) for name in measured
            }
    rows[RANDOM] = controlled.at_the_end(folder, "random", "bias", options, trained=False)
    first = folder / f"random-{options.seeds[0]}" / "bias"
    rows["chance"] = {name: runs.figure(first, name.split("_")[0] + "_chance") for name in controlled.FIGURES}
    rows["chance"] |= {"rank": 0.5, "rank_other_clips": 0.5}
    return evidence.in_order(rows, ROWS)


def panels(folder: Path, options: Options) -> list[dict[str, Any]]:
    """Return the panels along training: the generator's loss, and key similarity minus the hardest negative's."""
    with_queue = [method for method in METHODS if method not in WITHOUT_QUEUE]
    difference = controlled.logged_lines(
        folder, with_queue, options.seeds, "positive_similarity/vv", "hardest_negative/vv"
    )
    dropping = [GENERATOR, BOTH, RANDOM_FRAMES]
    return [
        {
            "title": "generator's loss: -100 times the change of the embedding",
            "ylabel": "change",
            "lines": controlled.logged_lines(folder, dropping, options.seeds, "generator_loss"),
        },
        {
            "title": "pair vv (clip): key minus hardest negative",
            "ylabel": "difference of cosine similarities",
            "lines": difference,
            "levels": {"as similar as the hardest negative": 0.0},
        },
    ]


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims."""
    rows = result["rows"]
    found: list[evidence.Finding] = []
    for more, less, claim in (
        ("DCLR", BOTH, "the motion probe of DCLR is above that of VideoMoCo"),
        ("DCLR", SIMSIAM, "the motion probe of DCLR is above that of SimSiam"),
        (SIMCLR, "MoCo", "the motion probe of the SimCLR form is above that of MoCo"),
        (GENERATOR, RANDOM_FRAMES, "the motion probe with a generator is above that with random frames"),
        (RANDOM_FRAMES, PLAIN, "the motion probe with random frames dropped is above that without dropping"),
        (FAST, PLAIN, "the motion probe with decay by position to 0.52 is above that without decay"),
    ):
        found += evidence.above(claim, rows[more]["motion_probe"], rows[less]["motion_probe"])
    for changed, base, change in (
        (DECAY, PLAIN, "decay at the published rate does not change"),
        (THREE_VIEWS, "DCLR", "three views in the key encoder do not change"),
    ):
        for label in controlled.LABELS:
            figure = f"{label}_probe"
            found += evidence.equal(f"{change} the {label} probe", rows[changed][figure], rows[base][figure])
    own = rows[GENERATOR]
    claim = "the frames that the generator drops change the embedding more than random frames"
    found += evidence.above_level(claim, own["rank"], rows["chance"]["rank"])
    claim = "the dropped frames change their clip's embedding more than the frames dropped from other clips"
    found += evidence.above(claim, own["rank"], own["rank_other_clips"])
    claim = "the motion probe is worse without the dropped frames than without random frames"
    found += evidence.above(claim, own["motion_random"], own["motion_chosen"])
    return found


def main(arguments: Sequence[str]) -> None:
    options, _ = runs.parse(__doc__, arguments, runs.add_first_seed)
    recipe = {"flags": {method: flags_of(method, options) for method in METHODS}, "epochs": epochs(options)}
    taken = evidence.published("methods", recipe, options) if options.seeds.start else None
    data, _ = controlled_set.stores(options)
    folder = options.work / "methods"
    chains: list[Chain] = []
    for seed in options.seeds:
        chains += [chain(folder, method, seed, data, options) for method in METHODS]
        chains += [controlled_set.random_probe(folder / f"random-{seed}", seed, data)]
    runs.run(chains, options.parallel)
    result: evidence.Result = {
        "question": "do other methods learn motion, and do dropped frames and fading queue entries help VideoMoCo?",
        "recipe": recipe,
        "figures": controlled.FIGURES | DROPPED,
        "rows": table(folder, options),
        "panels": panels(folder, options),
    }
    if taken:
        result = evidence.with_more_seeds(taken, result)
    result["findings"] = findings(result)
    evidence.publish("methods", result, chains, options, taken)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
