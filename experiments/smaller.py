"""Copy the data sets of real.py with smaller videos, for a machine to which little can be sent.

    python -m experiments.smaller --data DIR --out COPY        surv, hockey and weizmann: 46 MB become 34 MB

Frames get a short side of 112 pixels and are encoded again as H.264. Their number stays the same. The lists are copied.
Videos that the copy already has are kept, so the same command continues an interrupted copy.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dclr.data.decode import UnreadableVideo, resized_planes, rgb_of, verify_video
from dclr.data.encode import write_video
from dclr.data.pack import small_size
from dclr.errors import UserError
from experiments import real, runs

SHORT_SIDE = 112
"""Short side of the frames in pixels. Crops of real.py --large have the same size."""
CRF = 24
"""Rate factor of x264: larger numbers give smaller files."""


def copy_video(source: Path, target: Path) -> None:
    """Write the video with a short side of SHORT_SIDE pixels. Raises UserError if it cannot be read."""
    try:
        record = verify_video(source)
        height, width = small_size(record.height, record.width, SHORT_SIDE)
        frames = [rgb_of(planes) for planes in resized_planes(source, record, height, width)]
    except UnreadableVideo as error:
        raise UserError(f"--data: {source} cannot be read: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"unfinished-{target.name}")
    write_video(unfinished, np.concatenate(frames), crf=CRF)
    unfinished.rename(target)


def copy_set(source: Path, target: Path) -> None:
    """Copy one data set: the videos that its splits list, and its lists. Raises UserError if a file cannot be read."""
    lists = [source / "splits" / f"{name}.txt" for name in ("train", "test", "classes")]
    lists += [source / "folds.txt"] if (source / "folds.txt").exists() else []
    videos = [line[0] for split in lists[:2] for line in real.read_list(split)]
    for path in videos:
        if not (target / path).exists():
            copy_video(source / path, target / path)
    for file in lists:
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target / file.relative_to(source))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help=f"the folder with {', '.join(real.SETS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the copy")
    given = parser.parse_args(arguments)
    if given.out.resolve() == given.data.resolve():
        raise UserError(f"--out {given.out} is the folder of --data: give another one")
    for name in real.SETS:
        copy_set(given.data / name, given.out / name)
        size = sum(file.stat().st_size for file in (given.out / name).rglob("*") if file.is_file())
        print(f"{name}: {size / 1e6:.1f} MB in {given.out / name}", flush=True)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
