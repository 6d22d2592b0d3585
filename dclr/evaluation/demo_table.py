"""One table of a demo: `python -m dclr.evaluation.demo_table runs/demo` reads the report.json of each of its runs."""

import json
import sys
from pathlib import Path
from typing import Any

from dclr.errors import UserError

# What is compared, and which figure of which evaluation it is.
ACCURACY = (("finetuned from DCLR", "finetune/accuracy"), ("trained from scratch", "scratch/accuracy"))
RETRIEVAL = (("DCLR features", "pretrain/retrieval"), ("random features", "random/retrieval"))


def read(folder: Path, run: str) -> dict[str, Any]:
    file = folder / run / "report.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file} is missing: `make demo` writes it") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: `make demo` writes it") from None


def table(folder: Path) -> list[str]:
    """The lines of the table. Raises UserError: a run's report is missing, or not one."""
    runs = [run for _, run in (*ACCURACY, *RETRIEVAL)] + ["pretrain"]
    try:
        return _table(folder, {run: read(folder, run) for run in runs})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}: not the reports of `make demo` ({error!r})") from None


def _table(folder: Path, reports: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'':24}{'figure':>22}{'':3}{'here':>7}{'chance':>9}"]
    for title, run in ACCURACY:
        figures = reports[run]["figures"]
        for name, k in (("top-1 by video", 1), ("top-5 by video", 5)):
            lines.append(f"{title:24}{name:>22}{'':3}{figures[f'top{k}_video']:7.1%}{figures[f'chance_top{k}']:9.1%}")
        lines.append(f"{title:24}{'top-1 by clip':>22}{'':3}{figures['top1_clip']:7.1%}{figures['chance_top1']:9.1%}")
    for title, run in RETRIEVAL:
        figures = reports[run]["figures"]
        for k in (1, 5):
            lines.append(
                f"{title:24}{f'retrieval R@{k}':>22}{'':3}{figures[f'recall_at_{k}']:7.1%}{figures[f'chance_at_{k}']:9.1%}"
            )
    pretraining, videos = reports["pretrain"], reports[ACCURACY[0][1]]["videos"]
    lines.append("")
    lines.append(
        f"{videos} test videos, one seed; pretraining took {pretraining['seconds']:.0f} s "
        f"({pretraining['samples_per_second']} samples/s) on {pretraining['environment']['device']}, {pretraining['precision']}"
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
