"""Do features from real videos follow the movement? Fights on surveillance cameras, ice hockey, and Weizmann actions.

    python -m experiments.real --data DIR                                six methods, three seeds: about 12 hours (*)
    python -m experiments.real --data DIR --methods MoCo DCLR            the main comparison: about 4 hours (*)
    python -m experiments.real --data DIR --with-published --methods VideoMoCo   adds a method to the published result
    python -m experiments.real --data DIR --with-published --methods VideoMoCo --first-seed 2 --seeds 1   its next seed
    python -m experiments.real --data DIR --first-seed 3 --seeds 2       adds two seeds to the published result
    python -m experiments.real --data DIR --quick                        checks that it runs: about 10 minutes (*)
    python -m experiments.real --data DIR --large --methods MoCo DCLR --seeds 1     on a GPU (`make gpu-evidence`)

(*) on two cores. DIR has the folders surv, hockey and weizmann. Each has splits/train.txt, splits/test.txt and
splits/classes.txt, and surv has folds.txt with five folds. No scene (in weizmann: no person) is in two folds or on both
sides of a split.

- surv: 300 clips, fight or not. The same cameras are in both classes, so one frame says nothing about the class: a
  small network trained on labels is right on 53 % of single frames, and on 62 % of frame differences.
- hockey: 1,000 clips, fight or not. One frame suffices: 89 % of single frames are right.
- weizmann: 90 clips of 10 actions before nearly the same background.

Each method is pretrained once for each seed, without labels, on the train splits of all three sets: 1,098 clips, the
same steps, network, augmentation and optimizer. The features are then evaluated on each set:

- Linear probe and nearest neighbour, for four inputs (inputs.py): the full clip, shuffled frames, one frame repeated,
  and differences of frames.
- Finetuning, compared with training from scratch with the same budget.
- Foreground: moving people on the background of a clip of another class (eval.py bias).

On surv, probes and finetuning use all five folds, so every clip is a test clip once. Fold 1 is the test split. The
clips of folds 2 to 5 are in the pretraining of every method, without their labels. The other sets use their split.

No setting was chosen on these sets. The recipe is that of controlled.py, found on rendered videos: learning rate,
queue, momentum, jitter, and one mined positive. With clips of 8 frames of 48 x 48 and 54 epochs, one run of DCLR takes
about an hour on two cores. A stride of two frames fits the shortest clips, which have 20 frames.

With --large, clips have 16 frames of 112 x 112 and the network has its published width. One seed of MoCo and DCLR
should take an H200 about nine minutes (computed in docs/LOG.md, 2026-11-30, and not measured). In videos of fewer than
31 frames, a clip continues with the first frames. The videos are decoded as they are read. smaller.py makes a copy of
the sets that has less than 40 MB.

Pre-registered on 2026-11-29, before any run. A claim "above" holds if an exact permutation test over seeds gives at
most 5 % (evidence.permutation_share). With three seeds, each value must be above each value of the other method.

- surv: the probe of DCLR is above that of MoCo, and finetuning from DCLR is above finetuning from MoCo and from
  scratch.
- weizmann: the probe of DCLR is above that of MoCo.
- hockey: the probe of MoCo is not above that of DCLR.
- surv: the full clip is better than one frame for DCLR by more than for MoCo.
- surv and weizmann: DCLR recognises a moving foreground better than MoCo.

Added on 2026-11-30, after two seeds of MoCo and DCLR and before any run of the new method. "DCLR without mining" has no
mined positives, because with one, the dynamic pairs no longer recognise their own keys (docs/LOG.md, 2026-11-30).

- surv: the probe of DCLR without mining is above that of DCLR, and above that of MoCo.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dclr.errors import UserError
from experiments import controlled, controlled_set, evidence, methods, runs
from experiments.runs import Chain, Job, Options

SETS = ("surv", "hockey", "weizmann")
FOLDED = "surv"
FOLDS = ("1", "2", "3", "4", "5")
SHORT_SIDE = 64
"""Pixels of a stored frame's short side. Crops have 48."""
QUICK_STRIDE = {"surv": 6, "hockey": 20, "weizmann": 2}
"""A quick run has every sixth clip of each list of surv, and so on: 110 train clips in all."""

FINETUNE = ["--batch-size", "20", "--lr", "0.05", "--checkpoint-every", "40"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """The settings that decide what a run costs: its clips and its epochs."""

    clips: tuple[str, ...]
    """Flags of clips, network and speed."""
    epochs: int
    milestones: tuple[str, ...]
    finetune_epochs: dict[str, int]
    """Epochs of finetuning on each set."""
    packs: bool
    """True if videos are packed before the runs."""


DEMO = ("--preset", "demo", "--clip-stride", "2")
SMALL = Size(
    clips=(*DEMO, "--clip-length", "8", "--crop-size", "48", "--workers", "1"),
    epochs=54,  # of 34 steps
    milestones=("40", "48"),
    # About the same number of steps, 360 to 400, for surv and hockey. Weizmann has the epochs of weizmann.py.
    finetune_epochs={"surv": 30, "hockey": 10, "weizmann": 40},
    packs=True,
)
# Without compilation: so many short commands would compile for longer than they train.
LARGE = Size(
    clips=(
        *DEMO, "--clip-length", "16", "--crop-size", "112", "--width", "64", "--workers", "2", "--compile", "off",
    ),
    epochs=20,
    milestones=("15", "18"),
    finetune_epochs={"surv": 15, "hockey": 5, "weizmann": 20},
    packs=False,
)  # fmt: skip
QUICK: dict[str, Any] = {"epochs": 4, "milestones": ("2", "3"), "finetune_epochs": dict.fromkeys(SETS, 1)}
"""Settings of a quick run of either size. An epoch of its pretraining has 3 steps."""

WITHOUT_MINING = "DCLR without mining"
METHODS: dict[str, list[str]] = {
    "MoCo": controlled.METHODS["MoCo"],
    "DCLR": controlled.METHODS["DCLR"],
    WITHOUT_MINING: controlled.METHODS["without mining"],
    "VideoMoCo": methods.METHODS[methods.BOTH],
    methods.SIMSIAM: methods.METHODS[methods.SIMSIAM],
    methods.SIMCLR: methods.METHODS[methods.SIMCLR],
}
RANDOM, SUPERVISED, CHANCE = "random weights", "trained on labels from scratch", "chance"
ROWS = tuple(f"{name}: {row}" for name in SETS for row in (RANDOM, *METHODS, SUPERVISED, CHANCE))

FIGURES = {
    "full_probe": ["linear probe", "%"],
    "full_nearest": ["nearest", "%"],
    "finetuned": ["finetuned", "%"],
    "shuffled_probe": ["probe, shuffled frames", "%"],
    "static_probe": ["probe, one frame", "%"],
    "differences_probe": ["probe, differences", "%"],
    "foreground_moving": ["moving foreground", "%"],
    "foreground_static": ["static foreground", "%"],
    "foreground_contrasted": ["contrasted", "%"],
}
FROM_INPUTS = tuple(name for name in FIGURES if name.endswith(("_probe", "_nearest")))
FROM_BIAS = tuple(name for name in FIGURES if name.startswith("foreground_"))


def flags_of(method: str, size: Size, quick: bool) -> list[str]:
    """Return all flags of a method's pretraining, except data, seed and epochs."""
    own, recipe = METHODS[method], controlled.RECIPE[len(controlled_set.NETWORK) :]
    if method in methods.WITHOUT_QUEUE:
        recipe = methods.without_queue_flags(recipe)
    elif quick:
        recipe[recipe.index("--fill-steps") + 1] = "2"
    if "videomoco" in own:
        own = [*own, "--adversarial-from", str(size.epochs // 2)]
    return [*size.clips, *recipe, "--milestones", *size.milestones, "--checkpoint-every", "9", "--knn-every", "0", *own]


# ----------------------------------------------------------------------------------------------------------------- data


def read_list(file: Path) -> list[list[str]]:
    """Return the words of each line. Raises UserError if the file cannot be read."""
    try:
        return [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {file} cannot be read ({error}); the folder must have {', '.join(SETS)}") from None


def write_set(folder: Path, links: dict[str, Path], classes: Sequence[str], **splits: Iterable[Sequence[str]]) -> None:
    """Write a data set: links to folders with videos, and the lists of its splits.

    A link to a folder that is gone is made again, because the videos may have been moved.

    Raises:
        UserError: a link points to another folder; see write_list.
    """
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        link = folder / name
        if link.exists() and link.resolve() != target.resolve():
            raise UserError(
                f"--data: {folder} was made from {link.resolve()}, and not from {target}: give the first --data, or "
                "another --work"
            )
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, folder), target_is_directory=True)
    for split, lines in splits.items():
        write_list(folder / "splits" / f"{split}.txt", lines)
    write_list(folder / "splits" / "classes.txt", [[name] for name in classes])


def write_list(file: Path, lines: Iterable[Sequence[str]]) -> None:
    """Write one line for each sequence of words.

    Raises:
        UserError: the file has other lines, because the lists of --data were changed since the experiment began.
    """
    text = "".join(" ".join(line) + "\n" for line in lines)
    if file.exists() and file.read_text() != text:
        raise UserError(f"--data: the lists have changed since {file} was written: give another --work")
    file.write_text(text)


def list_sets(data: Path, folder: Path, options: Options) -> list[str]:
    """Write the data sets of the experiment into `folder`, with links to the videos of `data`. Return their names.

    These are the three sets, each fold of surv ("surv-1" and so on), and "union", whose train split has the train clips
    of all sets, without their classes.

    Raises:
        UserError: a list cannot be read or was changed, or folds.txt has other folds or no four words in a line.
    """
    union: dict[str, list[list[str]]] = {"train": [], "test": []}
    for name in SETS:
        source, every = data / name, slice(None, None, QUICK_STRIDE[name] if options.quick else 1)
        classes = [line[0] for line in read_list(source / "splits" / "classes.txt")]
        splits = {split: read_list(source / "splits" / f"{split}.txt")[every] for split in union}
        folders = {line[0].split("/")[0] for lines in splits.values() for line in lines}
        links = {each: source / each for each in sorted(folders)}
        write_set(folder / name, links, classes, **splits)
        for split, lines in splits.items():
            union[split] += [[f"{name}/{line[0]}", "0"] for line in lines]
        if name == FOLDED:
            listed = {line[0] for lines in splits.values() for line in lines}
            folded = [line for line in read_list(source / "folds.txt") if line[0] in listed]
            if short := [line for line in folded if len(line) != 4]:
                raise UserError(f"--data: {source / 'folds.txt'} must have four words a line, not {' '.join(short[0])}")
            if (found := sorted({line[-1] for line in folded})) != list(FOLDS):
                raise UserError(f"--data: {source / 'folds.txt'} has folds {found}, but must have {list(FOLDS)}")
            write_list(folder / "folds.txt", folded)
            for fold in FOLDS:
                write_set(
                    folder / f"{name}-{fold}",
                    links,
                    classes,
                    train=[line[:3] for line in folded if line[3] != fold],
                    test=[line[:3] for line in folded if line[3] == fold],
                )
    write_set(folder / "union", {name: data / name for name in SETS}, ["video"], **union)
    return [*SETS, *(f"{FOLDED}-{fold}" for fold in FOLDS), "union"]


def stores(data: Path, packs: bool, options: Options) -> dict[str, Path]:
    """Return the data sets by name, packed if `packs` is true. Stores that are missing are made."""
    folder = options.work / "real" / "sets"
    names = list_sets(data, folder, options)
    if not packs:
        return {name: folder / name for name in names}
    packed, chains = {}, []
    for name in names:
        store = folder / f"{name}-packed"
        chains.append([runs.pack(folder / name, store, SHORT_SIDE)])
        packed[name] = store
    runs.run(chains, parallel=1)  # one at a time, so that each uses the verifications of those before
    return packed


# ------------------------------------------------------------------------------------------------------------- commands


def features(checkpoint: Path | str, folder: Path, data: dict[str, Path], name: str, more: Sequence[str] = ()) -> Job:
    """Return the evaluation of a frozen network by inputs.py, in folder/inputs-NAME."""
    out = folder / f"inputs-{name}"
    folds = ["--folds", str(data[FOLDED].parent / "folds.txt")] if name == FOLDED else []
    line = ["-m", "experiments.inputs", "--checkpoint", str(checkpoint), "--data", str(data[name]), *folds, *more]
    return Job(command=(*line, "--out", str(out)), writes=out / "report.json", log=out / "eval.log")


def foreground(checkpoint: Path, folder: Path, data: dict[str, Path], name: str) -> Job:
    return runs.evaluate("bias", checkpoint, data[name], folder / f"bias-{name}", ("--foreground",))


def finetuned(folder: Path, seed: int, data: Path, name: str, size: Size, start: Sequence[str] = ()) -> Chain:
    """Return the finetuning from `start` (by default from scratch), and the evaluation of its accuracy."""
    number = size.finetune_epochs[name]
    milestones = [str(max(1, round(share * number))) for share in (0.6, 0.8)] if number > 2 else []
    flags = [
        *size.clips,
        *FINETUNE,
        "--epochs",
        str(number),
        *(["--milestones", *milestones] if milestones else []),
        *start,
    ]
    return [
        runs.train("finetune", folder, [*flags, "--data", str(data)], seed),
        runs.evaluate("accuracy", folder, data, folder / "accuracy"),
    ]


def parts_of(name: str, options: Options) -> list[str]:
    """Return the data sets on which a set is finetuned: its folds, or the set itself. Quick runs have two folds."""
    folds = FOLDS[:2] if options.quick else FOLDS
    return [f"{name}-{fold}" for fold in folds] if name == FOLDED else [name]


def transfers(
    work: Path, run: str, seed: int, data: dict[str, Path], size: Size, options: Options, start: Sequence[str]
) -> list[Chain]:
    """Return the finetuning of a run on each set or fold, in RUN-PART-SEED."""
    return [
        finetuned(work / f"{run}-{part}-{seed}", seed, data[part], name, size, start)
        for name in SETS
        for part in parts_of(name, options)
    ]


def chains_of_method(
    work: Path, method: str, seed: int, data: dict[str, Path], size: Size, options: Options
) -> list[Chain]:
    """Return the pretraining of a method with one seed, and the chains that start when it has ended."""
    folder = controlled.folder_of(method)
    run = work / f"{folder}-{seed}"
    flags = [*flags_of(method, size, options.quick), "--data", str(data["union"]), "--epochs", str(size.epochs)]
    pretraining = runs.train("pretrain", run, flags, seed)
    then = transfers(work, f"{folder}-finetune", seed, data, size, options, ("--pretrained", str(run)))
    then += [[features(run, run, data, name), foreground(run, run, data, name)] for name in SETS]
    return [[pretraining], *runs.after(pretraining, then)]


def chains_of_references(work: Path, seed: int, data: dict[str, Path], size: Size, options: Options) -> list[Chain]:
    """Return the chains of training from scratch and of random weights with one seed."""
    chains = []
    for name in SETS:
        for number, part in enumerate(parts_of(name, options)):
            run = work / f"scratch-{part}-{seed}"
            chain = [*finetuned(run, seed, data[part], name, size), features(run, run, data, part)]
            chains.append([*chain, foreground(run, run, data, name)] if number == 0 else chain)
    trained = chains[-1][0]
    like = ("--like", str(trained.writes.parent), "--seed", str(seed))
    random = [[features("random", work / f"random-{seed}", data, name, like)] for name in SETS]
    return [*chains, *runs.after(trained, random)]


# -------------------------------------------------------------------------------------------------------------- results


def mean(columns: Iterable[Sequence[float]]) -> list[float]:
    """Return the means of several lists, element by element."""
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def accuracy(work: Path, run: str, name: str, options: Options) -> list[float]:
    """Return the mean accuracy over the parts of a set, for each seed."""
    return mean(
        runs.figure_by_seed(work, f"{run}-{part}", options.seeds, "accuracy", "top1_video")
        for part in parts_of(name, options)
    )


def rows_of_methods(work: Path, name: str, names: Sequence[str], options: Options) -> evidence.Rows:
    """Return the rows of the methods for one set."""
    rows: evidence.Rows = {}
    for method in names:
        run = controlled.folder_of(method)
        rows[f"{name}: {method}"] = {
            "finetuned": accuracy(work, f"{run}-finetune", name, options),
            **{what: runs.figure_by_seed(work, run, options.seeds, f"inputs-{name}", what) for what in FROM_INPUTS},
            **{what: runs.figure_by_seed(work, run, options.seeds, f"bias-{name}", what) for what in FROM_BIAS},
        }
    return rows


def rows_of_references(work: Path, name: str, options: Options) -> evidence.Rows:
    """Return the rows of random weights, training from scratch and chance for one set."""
    seeds, parts = options.seeds, parts_of(name, options)
    random: dict[str, evidence.Values] = {
        what: runs.figure_by_seed(work, "random", seeds, f"inputs-{name}", what) for what in FROM_INPUTS
    }
    scratch: dict[str, evidence.Values] = {
        **{
            what: mean(runs.figure_by_seed(work, f"scratch-{part}", seeds, f"inputs-{part}", what) for part in parts)
            for what in FROM_INPUTS
        },
        **{what: runs.figure_by_seed(work, f"scratch-{parts[0]}", seeds, f"bias-{name}", what) for what in FROM_BIAS},
    }
    chance = runs.figure(work / f"random-{seeds[0]}" / f"inputs-{name}", "chance")
    return {
        f"{name}: {RANDOM}": {"finetuned": accuracy(work, "scratch", name, options), **random},
        f"{name}: {SUPERVISED}": scratch,
        # "Contrasted" has no chance level: a guess that ignores the clip is right on both composites or wrong on both.
        f"{name}: {CHANCE}": {what: chance for what in FIGURES if what != "foreground_contrasted"},
    }


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims; [] without MoCo or DCLR, or with fewer than three seeds."""
    rows, found = result["rows"], []
    if not {f"{FOLDED}: MoCo", f"{FOLDED}: DCLR"} <= rows.keys():
        return []

    def compare(
        claim: str, name: str, figure: str, other: str = "MoCo", above: bool = True, method: str = "DCLR"
    ) -> None:
        pair = rows[f"{name}: {method}"][figure], rows[f"{name}: {other}"][figure]
        found.extend(evidence.above_exact(claim, *pair) if above else evidence.not_above_exact(claim, *reversed(pair)))

    compare("surv: the probe of DCLR is above that of MoCo", "surv", "full_probe")
    compare("surv: finetuning from DCLR is above finetuning from MoCo", "surv", "finetuned")
    compare("surv: finetuning from DCLR is above training from scratch", "surv", "finetuned", RANDOM)
    compare("weizmann: the probe of DCLR is above that of MoCo", "weizmann", "full_probe")
    compare("hockey: the probe of MoCo is not above that of DCLR", "hockey", "full_probe", above=False)
    gains = [
        [full - still for full, still in zip(row["full_probe"], row["static_probe"], strict=True)]
        for row in (rows["surv: DCLR"], rows["surv: MoCo"])
    ]
    found += evidence.above_exact("surv: the full clip is better than one frame, for DCLR more than for MoCo", *gains)
    for name in ("surv", "weizmann"):
        compare(f"{name}: DCLR recognises a moving foreground better than MoCo", name, "foreground_moving")
    if f"surv: {WITHOUT_MINING}" in rows:
        for other in ("DCLR", "MoCo"):
            claim = f"surv: the probe of {WITHOUT_MINING} is above that of {other}"
            compare(claim, "surv", "full_probe", other, method=WITHOUT_MINING)
    return found


def published(options: Options, recipe: dict[str, Any], flags: dict[str, list[str]]) -> evidence.Result:
    """Return the published result, to which this run adds methods or seeds.

    Raises:
        UserError: as evidence.published does, and if a published method had other flags than `flags` has now.
    """
    result = evidence.published("real", recipe, options)
    evidence.check_flags(result["recipe"]["pretraining"], flags, options)
    return result


def more_flags(parser: ArgumentParser) -> None:
    runs.add_first_seed(parser)
    runs.add_with_published(parser)
    parser.add_argument("--large", action="store_true", help="clips of 16 x 112 x 112, published width, for a GPU")
    parser.add_argument("--data", type=Path, required=True, help=f"the folder with {', '.join(SETS)}")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME",
        help=f"{', '.join(METHODS)} (default: all)",
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    options, given = runs.parse(__doc__, arguments, more_flags)
    names = [method for method in METHODS if method in given.methods]
    size = replace(LARGE if given.large else SMALL, **(QUICK if options.quick else {}))
    flags = {method: flags_of(method, size, options.quick) for method in METHODS}
    recipe = {"epochs": size.epochs, "finetuning": FINETUNE, "finetuning epochs": size.finetune_epochs}
    more_seeds = options.seeds.start > 0
    taken = published(options, recipe, flags) if options.with_published or more_seeds else None
    if taken:
        references = () if options.with_published else (RANDOM, SUPERVISED)
        evidence.check_seeds(taken, [row for row in ROWS if row.split(": ")[1] in (*references, *names)], options)
    data, work = stores(given.data.resolve(), size.packs, options), options.work / "real"

    chains: list[Chain] = []
    for seed in options.seeds:
        for method in names:
            chains += chains_of_method(work, method, seed, data, size, options)
        if not options.with_published:
            chains += chains_of_references(work, seed, data, size, options)
    # Pretraining is longest and comes first, so that short commands fill the cores at the end.
    chains.sort(key=lambda chain: chain[0].after is not None)
    runs.run(chains, options.parallel)

    own: evidence.Rows = {}
    for name in SETS:
        own |= rows_of_methods(work, name, names, options)
        if not options.with_published:
            own |= rows_of_references(work, name, options)
    if taken:
        own = evidence.rows_with_more_seeds(taken, own) if more_seeds else taken["rows"] | own
    rows = evidence.in_order(own, ROWS)
    result: evidence.Result = {
        "question": "do features that are learned from real videos follow the movement?",
        "recipe": {"pretraining": {name: flags[name] for name in METHODS if f"{SETS[0]}: {name}" in rows}} | recipe,
        "figures": FIGURES,
        "rows": rows,
        "groups": list(SETS),
    }
    result["findings"] = findings(result)
    evidence.publish("real", result, chains, options, taken)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
