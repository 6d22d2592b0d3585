"""The results of the demo as one table, read from the report.json of each of its runs.

python -m dclr.evaluation.demo_table runs/demo
"""

import json
import sys
from pathlib import Path
from typing import Any

from dclr.errors import UserError

# The title of each compared network, and the folder of its evaluation.
ACCURACY = (("finetuned from DCLR", "finetune/accuracy"), ("trained from scratch", "scratch/accuracy"))
RETRIEVAL = (("DCLR features", "pretrain/retrieval"), ("random features", "random/retrieval"))


def read(folder: Path, run: str) -> dict[str, Any]:
    """Read the report.json of a run. Raises UserError: the file is missing or is not JSON."""
    file = folder / run / "report.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file} is missing: `make demo` writes it") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: `make demo` writes it") from None


def table(folder: Path) -> list[str]:
    """Return the lines of the table. Raises UserError: the report of a run is missing or is not a report."""
    runs = [run for _, run in (*ACCURACY, *RETRIEVAL)] + ["pretrain"]
    try:
        return _table(folder, {run: read(folder, run) for run in runs})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}: not the reports of `make demo` ({error!r})") from None


def _table(folder: Path, reports: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'':24}{'figure':>22}{'':3}{'here':>7}{'chance':>9}"]

    def add(title: str, name: str, value: float, chance: float) -> None:
        lines.append(f"{title:24}{name:>22}{'':3}{value:7.1%}{chance:9.1%}")

    for title, run in ACCURACY:
        figures = reports[run]["figures"]
        add(title, "top-1 by video", figures["top1_video"], figures["chance_top1"])
        add(title, "top-5 by video", figures["top5_video"], figures["chance_top5"])
        add(title, "top-1 by clip", figures["top1_clip"], figures["chance_top1"])
    for title, run in RETRIEVAL:
        figures = reports[run]["figures"]
        for k in (1, 5):
            add(title, f"retrieval R@{k}", figures[f"recall_at_{k}"], figures[f"chance_at_{k}"])
    pretraining, videos = reports["pretrain"], reports[ACCURACY[0][1]]["videos"]
    device, precision = pretraining["environment"]["device"], pretraining["precision"]
    lines.append("")
    lines.append(
        f"{videos} test videos, one seed; pretraining took {pretraining['seconds']:.0f} s "
        f"({pretraining['samples_per_second']} samples/s) on {device}, {precision}"
    )
    lines.append(f"pictures: {', '.join(str(p) for p in sorted(folder.glob('*/*/pictures/*.png')))}")
    lines.append(f"reports:  {', '.join(str(p) for p in sorted(folder.glob('**/report.json')))}")
    return lines


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise UserError("give the demo's folder: python -m dclr.evaluation.demo_table runs/demo")
        print("\n".join(table(Path(sys.argv[1]))))
    except UserError as error:
        print(f"dclr.evaluation.demo_table: error: {error}", file=sys.stderr)
        sys.exit(2)
