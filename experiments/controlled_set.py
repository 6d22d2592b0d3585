"""Is the controlled set valid? Can motion and scene be learned from it, and is the motion visible only in the movement?

    python -m experiments.controlled_set                three seeds: about half an hour on two cores
    python -m experiments.controlled_set --quick        checks that it runs: about 3 minutes

The set has more videos of the kind of the demo (dclr/data/demo.py): 8 motions on 24 backgrounds. Each background is
equally frequent in all motions, so the motion of a video says nothing about its scene. Seeds differ in training, and
the videos are the same for all seeds. Three networks are trained on labels from scratch: on the motions, on the scenes
(the same videos, listed by scene), and on the motions from single frames. Pre-registered thresholds:

- The network trained on motions and the network trained on scenes are right on at least 95 % of the test videos.
- A linear probe of random features is near chance on motion, and so is the network that sees single frames. Near chance
  means at most three standard errors of guessing above chance.

Exit status 1 means that one of these claims does not hold. Then no comparison on the set is meaningful.
"""

import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from dclr.data.demo import render_demo
from experiments import evidence, runs
from experiments.runs import Chain, Options

TRAIN, TEST = 96, 32
"""Videos of each motion in the two splits."""
QUICK_TRAIN, QUICK_TEST = 24, 8
"""The fewest videos with which every scene is in the train split."""
RENDERING = 0
"""Seed of the videos."""
SHORT_SIDE = 32
"""Pixels of a stored frame's short side. The crops of the demo preset have the same size."""
NETWORK = ["--preset", "demo", "--workers", "1"]  # r2plus1d_10 of width 16 on 8 frames of 32 x 32
SUPERVISED = [*NETWORK, "--epochs", "40", "--milestones", "32", "36"]
QUICK_SUPERVISED = [*NETWORK, "--epochs", "2"]
FRAME = ["--clip-length", "1"]

LEARNED = 0.95
STANDARD_ERRORS = 3.0

FIGURES = {"motion": ["motion", "%"], "scene": ["scene", "%"]}
MOTION = "supervised on motion, top-1 by video"
SCENE = "supervised on scene, top-1 by video"
SINGLE = "supervised on single frames, top-1 by frame"
RANDOM = "random features, linear probe"


def counts(options: Options) -> dict[str, int]:
    """Return the number of videos of each motion, by split."""
    train, test = (QUICK_TRAIN, QUICK_TEST) if options.quick else (TRAIN, TEST)
    return {"train": train, "test": test}


def stores(options: Options) -> tuple[Path, Path]:
    """Return the packed videos, listed by motion and listed by scene. Stores that are missing are made."""
    folder = options.work / "set"
    videos, by_scene = folder / "videos", folder / "videos-by-scene"
    number = counts(options)
    render_demo(videos, train_per_class=number["train"], test_per_class=number["test"], seed=RENDERING)
    list_by_scene(videos, by_scene)
    chains, packed = [], []
    for source in (videos, by_scene):
        store = source.with_name(source.name + "-packed")
        chains.append([runs.pack(source, store, SHORT_SIDE)])
        packed.append(store)
    runs.run(chains, parallel=1)  # one at a time, so that the second uses the verification of the first
    return packed[0], packed[1]


def list_by_scene(videos: Path, folder: Path) -> None:
    """Make a data set of the same videos (by a link) whose classes are the scenes and whose groups are the motions."""
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    if not (folder / "videos").is_symlink():
        (folder / "videos").symlink_to(os.path.relpath(videos / "videos", folder), target_is_directory=True)
    lines = {split: (videos / "splits" / f"{split}.txt").read_text().split("\n")[:-1] for split in ("train", "test")}
    scenes = sorted({line.split()[2] for split in lines for line in lines[split]})
    for split in lines:
        listed = [
            (path, scenes.index(scene), Path(path).parent.name) for path, _, scene in map(str.split, lines[split])
        ]
        text = "".join(f"{path} {scene} {motion}\n" for path, scene, motion in listed)
        (folder / "splits" / f"{split}.txt").write_text(text)
    (folder / "splits" / "classes.txt").write_text("".join(f"{scene}\n" for scene in scenes))


def random_probe(folder: Path, seed: int, data: Path) -> Chain:
    """Return the probe of an untrained network, in folder/bias."""
    flags = ("--no-foreground", "--seed", str(seed), *NETWORK)
    return [runs.evaluate("bias", "random", data, folder / "bias", flags)]


def supervised(folder: Path, seed: int, data: Path, options: Options, more: Sequence[str] = ()) -> Chain:
    """Return the training of a network on labels, and the evaluation of its accuracy."""
    flags = (*(QUICK_SUPERVISED if options.quick else SUPERVISED), *more, "--data", str(data))
    return [runs.train("finetune", folder, flags, seed), runs.evaluate("accuracy", folder, data, folder / "accuracy")]


def near_chance(chance: float, videos: int) -> float:
    """Return the highest share of `videos` that counts as near chance. Guessing exceeds it about once in 700 times."""
    return chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / videos)


def findings(result: evidence.Result) -> list[evidence.Finding]:
    """Return the pre-registered claims, judged by the means over seeds."""
    rows, chance = result["rows"], result["rows"]["chance"]["motion"]
    videos = round(result["recipe"]["videos of a motion"]["test"] / chance)  # chance is 1 / motions
    limit = near_chance(chance, videos)
    found = []
    for row, figure, claim in (
        (MOTION, "motion", "a network trained on labels learns the motion"),
        (SCENE, "scene", "a network trained on labels learns the scene"),
    ):
        mean = statistics.fmean(rows[row][figure])
        found.append(evidence.finding(claim, mean >= LEARNED, f"{mean:.1%}, threshold at least {LEARNED:.0%}"))
    for row, claim in (
        (RANDOM, "random features are near chance on motion"),
        (SINGLE, "a network that sees single frames is near chance on motion"),
    ):
        mean = statistics.fmean(rows[row]["motion"])
        found.append(evidence.finding(claim, mean <= limit, f"{mean:.1%}, threshold at most {limit:.1%}"))
    return found


def main(arguments: Sequence[str]) -> None:
    options, _ = runs.parse(__doc__, arguments)
    by_motion, by_scene = stores(options)
    folder, seeds = options.work / "controlled", options.seeds
    chains = []
    for seed in seeds:
        chains += [
            supervised(folder / f"supervised-motion-{seed}", seed, by_motion, options),
            supervised(folder / f"supervised-scene-{seed}", seed, by_scene, options),
            supervised(folder / f"supervised-frame-{seed}", seed, by_motion, options, FRAME),
            random_probe(folder / f"random-{seed}", seed, by_motion),
        ]
    runs.run(chains, options.parallel)

    def values(run: str, evaluation: str, name: str) -> list[float]:
        return runs.figure_by_seed(folder, run, seeds, evaluation, name)

    result: evidence.Result = {
        "question": "can motion and scene be learned from the controlled set, and motion from motion alone?",
        "recipe": {"supervised": SUPERVISED, "videos of a motion": counts(options), "rendering": RENDERING},
        "figures": FIGURES,
        "rows": {
            MOTION: {"motion": values("supervised-motion", "accuracy", "top1_video")},
            SCENE: {"scene": values("supervised-scene", "accuracy", "top1_video")},
            SINGLE: {"motion": values("supervised-frame", "accuracy", "top1_clip")},
            RANDOM: {name: values("random", "bias", f"{name}_probe") for name in FIGURES},
            "chance": {name: values(f"supervised-{name}", "accuracy", "chance_top1")[0] for name in FIGURES},
        },
    }
    result["findings"] = findings(result)
    evidence.publish("controlled_set", result, chains, options)
    if not options.quick and not all(each["holds"] for each in result["findings"]):
        sys.exit("the controlled set is not valid: see the claims that do not hold")


if __name__ == "__main__":
    sys.exit(runs.entry(main))
