"""The folders of runs on the official splits of a data set (--split all).

OUT/split-1/    the run on split 1: config.json, report.json, classifier.safetensors and so on
OUT/split-2/    the run on split 2
"""

from pathlib import Path


def split_folder(folder: Path, number: int) -> Path:
    """Return the folder of the run on one split."""
    return folder / f"split-{number}"


def begun_splits(folder: Path) -> list[Path]:
    """Return the folders of runs on single splits that a folder holds, sorted by the number of the split."""
    runs = [path.parent for path in folder.glob("split-*/config.json") if path.parent.name[6:].isdecimal()]
    return sorted(runs, key=lambda run: int(run.name[6:]))
