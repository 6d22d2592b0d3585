"""What the experiment of the paper runs: the data sets, and the stages with their commands and expected work.

See ucf101.py for the stages in order and the protocols.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from dclr import config as configuration
from dclr.data.coverage import coverage
from dclr.data.datasets import layout_of, official_splits, open_catalog
from dclr.data.store import is_store
from dclr.data.store_files import INDEX
from dclr.errors import UserError
from dclr.methods import METHODS
from experiments import controlled, hours, runs
from experiments.hours import Work
from experiments.runs import Job, Stage

LABELS = {
    "dclr": "DCLR",
    "moco": "MoCo",
    "dclr-simclr": "SimCLR form of DCLR",
    "videomoco": "VideoMoCo",
    "simsiam": "SimSiam",
}
RANDOM = "random weights"

CLIPS_A_VIDEO = 10
MAPS = 200
"""Test videos whose activation maps are computed."""

# ------------------------------------------------------------------------------------------------------------ data sets


@dataclass(frozen=True)
class Known:
    """What is known about a data set."""

    flag: str
    classes: int
    splits: tuple[int, ...]
    lists: str
    store_gb: int
    """Size of its store (docs/data.md); 0 if it was never estimated."""
    compact: bool


KNOWN = {
    "UCF101": Known("--data", 101, (1, 2, 3), "the folders UCF-101 and ucfTrainTestlist", 81, False),
    "HMDB51": Known("--hmdb51", 51, (1, 2, 3), "the folders videos and testTrainMulti_7030_splits", 0, False),
    "Kinetics-400": Known("--kinetics400", 400, (1,), "the lists train.csv and validate.csv", 190, True),
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set whose lists have been read."""

    name: str
    folder: Path
    splits: dict[int, tuple[int, int]]
    """Number of train and of test videos, by official split."""
    videos: int
    digest: str
    """hash of the paths and labels of all splits"""

    @property
    def slug(self) -> str:
        return self.name.lower().replace("-", "")

    @property
    def first(self) -> int:
        """The split of pretraining, retrieval, background bias and maps: 1, unless a sample has no videos there."""
        return min(self.splits)


def open_set(name: str, folder: Path, whole: bool, max_missing: float) -> DataSet:
    """Read the lists of a data set.

    Args:
        whole: all lists and classes must be there. If false, splits without train or test videos are skipped.
        max_missing: percent of the listed videos of a train or test split that may be missing on disk, 0 to 100.

    Raises:
        UserError: it is another data set, its lists are wrong or incomplete, `whole` is true for a sample, or too many
            videos are missing.
    """
    known = KNOWN[name]
    if not folder.is_dir():
        raise UserError(f"{known.flag} {folder}: no such folder")
    if is_store(folder):
        raise UserError(f"{known.flag} {folder} is a packed store: give the folder with the videos of {name}")
    found = layout_of(folder)[0]
    if found != name:
        raise UserError(f"{known.flag} {folder} is not {name}, but looks like {found}: it must hold {known.lists}")
    numbers = official_splits(folder)
    if whole and set(numbers) != set(known.splits):
        missing = ", ".join(map(str, sorted(set(known.splits) - set(numbers))))
        raise UserError(f"{known.flag} {folder} has no lists of split {missing}: get all official lists of {name}")
    catalogs = {number: open_catalog(folder, number) for number in numbers}
    counts = {
        number: (len(catalog.splits["train"]), len(catalog.splits.get("test", ())))
        for number, catalog in catalogs.items()
    }
    splits = {number: both for number, both in counts.items() if all(both)}
    if not splits or (whole and len(splits) < len(counts)):
        empty = next(number for number in counts if number not in splits)
        raise UserError(f"{known.flag} {folder}: split {empty} has no train or no test videos on disk")
    classes = len(catalogs[numbers[0]].classes)
    if whole and classes != known.classes:
        raise UserError(
            f"{known.flag} {folder} has {classes} classes, but {name} has {known.classes}: "
            "give the whole data set, or --budget small for a sample"
        )
    for number in splits:  # training and evaluation would refuse the same, but after hours
        for split in ("train", "test"):
            coverage(catalogs[number], split, {}).check(max_missing)
    entries = [
        (number, split, video.path, video.label)
        for number, catalog in catalogs.items()
        for split, videos in catalog.splits.items()
        for video in videos
    ]
    digest = hashlib.sha256(repr(entries).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    videos = len({path for _, _, path, _ in entries})
    return DataSet(name=name, folder=folder, splits=splits, videos=videos, digest=digest)


# ----------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, and on which machine."""

    work: Path
    pretrained_on: DataSet
    evaluated_on: tuple[DataSet, ...]
    methods: tuple[str, ...]
    seeds: range
    small: bool
    gpus: int
    workers: int
    """decoding processes of each training process"""
    limits: dict[str, float]
    """Percent of --max-missing and --max-bad, by name of the setting, as far as they were given."""

    @property
    def sets(self) -> tuple[DataSet, ...]:
        """Every data set, once."""
        return tuple({each.name: each for each in (*self.evaluated_on, self.pretrained_on)}.values())

    def store(self, data: DataSet) -> Path:
        return self.work / f"store-{data.slug}"

    def run(self, method: str, seed: int) -> Path:
        """Return the folder of a pretraining run and of all runs that start from it. `method` may be RANDOM."""
        return self.work / f"{controlled.folder_of(LABELS.get(method, method))}-{seed}"

    def recipe(self, command: str, method: str = "") -> list[str]:
        """Return the flags of a training run, except for data, seed and initial weights."""
        if command != "pretrain":
            return ["--preset", "demo", *SMALL_CLASSIFIER] if self.small else ["--preset", "ucf101"]
        if not self.small:
            preset = "kinetics400" if self.pretrained_on.name == "Kinetics-400" else "ucf101"
            return ["--preset", preset, "--knn-every", "20", "--method", method]
        queue = SMALL_QUEUE if METHODS[method].has_queue else []
        return ["--preset", "demo", *SMALL_PRETRAINING, *queue, "--method", method]

    def on_gpus(self, job: Job, work: Work) -> Job:
        """Return the job with the number of processes, the flags that this machine needs, and the limits.

        The limits do not change a result, and may be raised when the experiment is resumed.
        """
        flags = ["--workers", str(self.workers)]
        for name, percent in self.limits.items():
            if name == "max_missing" or job.command[0] == "train.py":  # eval.py has no --max-bad
                flags += [configuration.flag_of(name), f"{percent:g}"]
        if not self.small and hours.recomputes(work, hours.machine_here(self.gpus)):
            flags.append("--recompute")
        return replace(job, processes=self.gpus, machine_flags=tuple(flags))


# A few steps of two clips: a sample has as few as two train videos.
SMALL = ["--batch-size", "2", "--checkpoint-every", "1", "--log-every", "1"]
SMALL_PRETRAINING = [*SMALL, "--epochs", "4", "--milestones", "3", "--knn-every", "0"]
SMALL_QUEUE = ["--queue-length", "8", "--fill-steps", "2"]
SMALL_CLASSIFIER = [*SMALL, "--epochs", "2", "--milestones", "1", "--test-every", "0"]
SMALL_S = 15.0
"""Expected seconds of a command of --budget small, most of which is the start of Python."""


@dataclass(frozen=True, kw_only=True)
class Planned(Stage):
    """A stage with the amount of work of each of its commands."""

    works: tuple[Work, ...]


def stages(plan: Plan) -> list[Planned]:
    """Return all stages in order, each with the work of its commands."""
    found = []
    for data in plan.sets:
        found += [check(plan, data), pack(plan, data)]
    for seed in plan.seeds:
        for method in (*plan.methods, RANDOM):
            if method != RANDOM:
                found.append(pretrain(plan, method, seed))
            for data in plan.evaluated_on:
                for split in data.splits:
                    found.append(classify(plan, "finetune", method, seed, data, split))
                    found.append(classify(plan, "linear", method, seed, data, split))
                found.append(retrieve(plan, method, seed, data))
            found.append(measure_bias(plan, method, seed))
            if method != RANDOM:
                found.append(draw_maps(plan, method, seed))
    return found


def planned(plan: Plan, title: str, kind: str, *jobs: tuple[Job, Work]) -> Planned:
    """Return a stage with its expected time on this machine."""
    works = tuple(work for _, work in jobs)
    machine = hours.machine_here(plan.gpus)
    seconds = SMALL_S * len(jobs) if plan.small else sum(hours.seconds(work, machine) for work in works)
    return Planned(title=title, kind=kind, jobs=[job for job, _ in jobs], seconds=seconds, works=works)


def check(plan: Plan, data: DataSet) -> Planned:
    name = f"check-{data.slug}"
    job = Job(
        command=("train.py", "check", "--data", str(data.folder)), keeps_output=True,
        writes=plan.work / f"{name}.txt", log=plan.work / f"{name}.log", machine_flags=("--workers", str(cores())),
    )  # fmt: skip
    return planned(plan, f"check {data.name}", "decode", (job, Work(decoded=data.videos)))


def pack(plan: Plan, data: DataSet) -> Planned:
    store = plan.store(data)
    compact = ("--compact",) if KNOWN[data.name].compact else ()
    job = Job(
        command=("train.py", "pack", "--data", str(data.folder), "--out", str(store), *compact),
        writes=store / INDEX, log=plan.work / f"pack-{data.slug}.log",
        machine_flags=("--workers", str(cores())),
    )  # fmt: skip
    return planned(plan, f"pack {data.name}", "decode", (job, Work(decoded=data.videos)))


def pretrain(plan: Plan, method: str, seed: int) -> Planned:
    data, recipe = plan.pretrained_on, plan.recipe("pretrain", method)
    settings = configuration.resolve("pretrain", recipe[1], {}).optim  # of the preset, for every method
    work = Work(
        samples=settings.epochs * data.splits[data.first][0], gflop=hours.GFLOP[method], batch=settings.batch_size,
        network="MoCo" if method == "moco" else "DCLR",
    )  # fmt: skip
    flags = [*recipe, "--data", str(plan.store(data)), "--split", str(data.first)]
    if method == "videomoco":  # the published recipe drops frames in the second half
        flags += ["--adversarial-from", str((4 if plan.small else settings.epochs) // 2)]
    job = plan.on_gpus(runs.train("pretrain", plan.run(method, seed), flags, seed), work)
    return planned(plan, f"pretrain {LABELS[method]} on {data.name}, seed {seed}", f"pretrain {method}", (job, work))


def classify(plan: Plan, command: str, method: str, seed: int, data: DataSet, split: int) -> Planned:
    """Return the stage that finetunes, or trains a linear classifier, and measures the accuracy."""
    run, store = plan.run(method, seed), plan.store(data)
    folder, recipe = run / f"{command}-{data.slug}-{split}", plan.recipe(command)
    settings, (train, test) = configuration.resolve(command, recipe[1], {}).optim, data.splits[split]
    gflop = hours.FORWARD_GFLOP * (3 if command == "finetune" else 1)
    network = "finetune" if command == "finetune" else ""
    training = Work(samples=settings.epochs * train, gflop=gflop, batch=settings.batch_size, network=network)
    start = [] if method == RANDOM else ["--pretrained", str(run)]
    own = ["--data", str(store), "--split", str(split)]
    trained = runs.train(command, folder, [*recipe, *own, *start], seed)
    evaluated = runs.evaluate("accuracy", folder, store, folder / "accuracy", ("--split", str(split)))
    testing = embedding(CLIPS_A_VIDEO * test)
    title = f"{command}, {label(method)}, {data.name} split {split}, seed {seed}"
    return planned(
        plan, title, command, (plan.on_gpus(trained, training), training), (plan.on_gpus(evaluated, testing), testing)
    )


def retrieve(plan: Plan, method: str, seed: int, data: DataSet) -> Planned:
    work = embedding(CLIPS_A_VIDEO * sum(data.splits[data.first]))
    job = of_features(plan, "retrieval", method, seed, data, f"retrieval-{data.slug}", work)
    return planned(plan, f"retrieval, {label(method)}, {data.name}, seed {seed}", "evaluate", (job, work))


def measure_bias(plan: Plan, method: str, seed: int) -> Planned:
    data = plan.evaluated_on[0]
    train, test = data.splits[data.first]
    # The clips of both splits, the composites, and their repeated middle frames.
    work = embedding(CLIPS_A_VIDEO * (train + 3 * test))
    job = of_features(plan, "bias", method, seed, data, "bias", work)
    return planned(plan, f"background bias, {label(method)}, {data.name}, seed {seed}", "evaluate", (job, work))


def draw_maps(plan: Plan, method: str, seed: int) -> Planned:
    data = plan.evaluated_on[0]
    work = embedding(2 * 3 * min(MAPS, data.splits[data.first][1]))
    job = of_features(plan, "maps", method, seed, data, "maps", work)
    return planned(plan, f"activation maps, {label(method)}, {data.name}, seed {seed}", "evaluate", (job, work))


def of_features(plan: Plan, protocol: str, method: str, seed: int, data: DataSet, name: str, work: Work) -> Job:
    """Return the evaluation of a pretrained network, or of random weights."""
    run, flags = plan.run(method, seed), ["--split", str(data.first)]
    if method == RANDOM:
        flags += [*plan.recipe("finetune")[:2], "--seed", str(seed)]
    checkpoint = "random" if method == RANDOM else run
    return plan.on_gpus(runs.evaluate(protocol, checkpoint, plan.store(data), run / name, flags), work)


def embedding(clips: int) -> Work:
    return Work(samples=clips, gflop=hours.FORWARD_GFLOP)


def label(method: str) -> str:
    return LABELS.get(method, method)


def cores() -> int:
    return len(os.sched_getaffinity(0))
