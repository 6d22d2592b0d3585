"""Is the controlled set honest? Before it judges a method: can motion and scene be learned from it, and motion from motion alone?

    python -m experiments.controlled_set                three seeds: about half an hour on two cores
    python -m experiments.controlled_set --quick        that it runs: about 3 minutes

The set is the demo videos (dclr/data/demo.py), more of them: 8 motions, each on 24 backgrounds equally often, so a video's motion says
nothing about its scene. The seeds are those of training; the videos are the same for all. Three networks are trained with labels from
scratch: on motions, on scenes (the same videos, listed by scene), and on motions from one frame at a time. Said beforehand:

- the network trained on motions, and the one trained on scenes, are right on at least 95 % of the test videos;
- a linear probe of random features is near chance on motion, and so is the network that sees single frames: at most three standard
  errors of guessing above it.

Exit status 1: one of these does not hold, and no comparison on the set means anything.
"""

import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dclr.data.demo import render_demo
from experiments import evidence, runs
from experiments.runs import Chain, Job, Options

TRAIN, TEST = 96, 32  # videos of each motion
QUICK_TRAIN, QUICK_TEST = 24, 8  # the fewest with which every scene is in the train split
RENDERING = 0  # seed of the videos
SHORT_SIDE = 32  # pixels; the demo preset's crops are as large
NETWORK = ["--preset", "demo", "--workers", "1"]  # r2plus1d_10 of width 16 on 8 frames of 32 x 32
SUPERVISED = [*NETWORK, "--epochs", "40", "--milestones", "32", "36"]
QUICK_SUPERVISED = [*NETWORK, "--epochs", "2"]
FRAME = ["--clip-length", "1"]

LEARNED = 0.95
STANDARD_ERRORS = 3.0

MOTION = "supervised on motion, top-1 by video"
SCENE = "supervised on scene, top-1 by video"
SINGLE = "supervised on single frames, top-1 by frame"
RANDOM = "random features, linear probe"


def stores(options: Options) -> tuple[Path, Path]:
    """The packed videos, listed by motion and by scene, made where they are missing."""
    folder = options.work / "set"
    videos, by_scene = folder / "videos", folder / "videos-by-scene"
    counts = (QUICK_TRAIN, QUICK_TEST) if options.quick else (TRAIN, TEST)
    render_demo(videos, train_per_class=counts[0], test_per_class=counts[1], seed=RENDERING)
    list_by_scene(videos, by_scene)
    chains, packed = [], []
    for source in (videos, by_scene):
        store = source.with_name(source.name + "-packed")
        line = ("train.py", "pack", "--data", str(source), "--short-side", str(SHORT_SIDE), "--out", str(store))
        chains.append([Job(command=line, writes=store / "dclr-index.npz", log=store.with_suffix(".log"))])
        packed.append(store)
    runs.run(chains, parallel=1)  # the second finds the videos verified
    return packed[0], packed[1]


def list_by_scene(videos: Path, folder: Path) -> None:
    """A data set of the same videos, by a link, whose classes are the scenes and whose groups are the motions."""
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    if not (folder / "videos").is_symlink():
        (folder / "videos").symlink_to(os.path.relpath(videos / "videos", folder), target_is_directory=True)
    lines = {split: (videos / "splits" / f"{split}.txt").read_text().split("\n")[:-1] for split in ("train", "test")}
    scenes = sorted({line.split()[2] for of_split in lines.values() for line in of_split})
    for split, of_split in lines.items():
        listed = [(path, scenes.index(scene), Path(path).parent.name) for path, _, scene in map(str.split, of_split)]
        text = "".join(f"{path} {scene} {motion}\n" for path, scene, motion in listed)
        (folder / "splits" / f"{split}.txt").write_text(text)
    (folder / "splits" / "classes.txt").write_text("".join(f"{scene}\n" for scene in scenes))


def random_probe(folder: Path, seed: int, data: Path) -> Chain:
    """An untrained network's features, into folder/bias."""
    flags = ("--no-foreground", "--seed", str(seed), *NETWORK)
    return [runs.evaluate("bias", "random", data, folder / "bias", flags)]


def supervised(folder: Path, seed: int, data: Path, options: Options, more: Sequence[str] = ()) -> Chain:
    """A network trained with labels, and its accuracy."""
    flags = (*(QUICK_SUPERVISED if options.quick else SUPERVISED), *more, "--data", str(data))
    return [runs.train("finetune", folder, flags, seed), runs.evaluate("accuracy", folder, data, folder / "accuracy")]


def near_chance(chance: float, videos: int) -> float:
    """The highest share of `videos` that guessing reaches but for 1 time in 700."""
    return chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / videos)


def findings(found: dict[str, dict[str, list[float]]], chance: float, videos: int) -> list[dict[str, Any]]:
    """What was said beforehand, of the means over seeds. `chance`: of guessing the motions of that many test videos."""
    limit = near_chance(chance, videos)
    motion, scene = statistics.fmean(found[MOTION]["motion"]), statistics.fmean(found[SCENE]["scene"])
    probe, frame = statistics.fmean(found[RANDOM]["motion"]), statistics.fmean(found[SINGLE]["motion"])
    return [
        evidence.finding("motion can be learned", motion >= LEARNED, f"{motion:.1%}, at least {LEARNED:.0%} was asked"),
        evidence.finding("scene can be learned", scene >= LEARNED, f"{scene:.1%}, at least {LEARNED:.0%} was asked"),
        evidence.finding(
            "random features are near chance on motion", probe <= limit, f"{probe:.1%}, at most {limit:.1%}"
        ),
        evidence.finding("a frame does not tell the motion", frame <= limit, f"{frame:.1%}, at most {limit:.1%}"),
    ]


def main(arguments: Sequence[str]) -> None:
    options, _ = runs.parse(__doc__, arguments)
    by_motion, by_scene = stores(options)
    folder = options.work / "controlled"
    chains = []
    for seed in options.seeds:
        chains += [
            supervised(folder / f"supervised-motion-{seed}", seed, by_motion, options),
            supervised(folder / f"supervised-scene-{seed}", seed, by_scene, options),
            supervised(folder / f"supervised-frame-{seed}", seed, by_motion, options, FRAME),
            random_probe(folder / f"random-{seed}", seed, by_motion),
        ]
    runs.run(chains, options.parallel)

    def values(run: str, evaluation: str, name: str) -> list[float]:
        return [runs.figure(folder / f"{run}-{seed}" / evaluation, name) for seed in options.seeds]

    found = {
        MOTION: {"motion": values("supervised-motion", "accuracy", "top1_video")},
        SCENE: {"scene": values("supervised-scene", "accuracy", "top1_video")},
        SINGLE: {"motion": values("supervised-frame", "accuracy", "top1_clip")},
        RANDOM: {name: values("random", "bias", f"{name}_probe") for name in ("motion", "scene")},
    }
    chance = {name: values(f"supervised-{name}", "accuracy", "chance_top1")[0] for name in ("motion", "scene")}
    videos = runs.report(folder / "supervised-motion-0" / "accuracy")["videos"]
    judged = findings(found, chance["motion"], videos)
    result = {
        "question": "can motion and scene be learned from the controlled set, and motion from motion alone?",
        "recipe": {
            "supervised": SUPERVISED,
            "videos of a motion": {"train": TRAIN, "test": TEST},
            "rendering": RENDERING,
        },
        "figures": {"motion": ["motion", "%"], "scene": ["scene", "%"]},
        "rows": found | {"chance": chance},
        "findings": judged,
    }
    evidence.publish("controlled_set", result, chains, options)
    if not options.quick and not all(each["holds"] for each in judged):
        sys.exit("the controlled set is not honest: see the lines that do not hold")


if __name__ == "__main__":
    sys.exit(runs.entry(main))
