"""Print or write the predicted classes of videos: `eval.py predict`."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dclr import config as configuration
from dclr.commands.features import CLIP_FLAGS
from dclr.commands.ranks import connected_ranks
from dclr.errors import UserError
from dclr.programs import command_of

if TYPE_CHECKING:
    from dclr.evaluation.predictions import Predictions

DESCRIPTION = "the most probable classes of each video of a folder, a list or a file, with their probabilities"

MOST_PRINTED = 100
"""Most videos whose classes are printed. More of them need --out."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("The classifier and the result")
    heading.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the folder of a finetune or linear run, or a file of weights with a classifier",
    )
    heading.add_argument(
        "--out",
        metavar="FILE",
        help="the file to write, .csv or .parquet: one row a video. Without it, the classes are printed",
    )
    heading.add_argument("--top", type=int, default=5, metavar="K", help="classes of a video (default: 5)")
    configuration.add_flags(parser, [configuration.DataConfig], only=CLIP_FLAGS)


def run(flags: dict[str, Any]) -> None:
    """Predict the classes of all videos and print them, or write them to --out.

    Raises:
        UserError: the checkpoint has no classifier, --out exists or has an unknown suffix, there are no videos, or too
            many to print.
    """
    checkpoint, top = flags.pop("checkpoint"), flags.pop("top")
    out = Path(flags["out"]) if flags.get("out") else None
    flags.pop("out", None)
    if top < 1:
        raise UserError(f"--top is {top}, but must be at least 1")
    if not flags.get("data"):
        raise UserError("--data is needed: a folder of videos, a list of them, or a video file")

    with connected_ranks() as device:
        predict(checkpoint, out, top, flags, device)


def predict(checkpoint: str, out: Path | None, top: int, flags: dict[str, Any], device: torch.device) -> None:
    """Predict on all ranks, and print or write on rank 0. Raises UserError: see `run`."""
    from dclr import distributed, report
    from dclr.data.catalog import print_reading
    from dclr.data.datasets import open_data
    from dclr.data.given_videos import EVERYTHING, everything
    from dclr.evaluation.predictions import check_suffix, predict_videos
    from dclr.models import load_pretrained

    if out:
        check_suffix(out)
        distributed.on_rank_zero(lambda: report.require_new_file(out))
    pretrained = load_pretrained(checkpoint)
    if pretrained.classifier is None:
        raise UserError(
            f"--checkpoint {checkpoint} has no classifier: give the folder of a finetune or linear run, or train one "
            f"with  {command_of('train')} finetune --data DATA --pretrained {shlex.quote(checkpoint)}"
        )
    data = configuration.DataConfig(**{**pretrained.clips.settings, **flags})
    catalog = open_data(data)
    count = len(everything(catalog).videos(EVERYTHING))
    if count > MOST_PRINTED and not out:
        raise UserError(f"--data {data.data} has {count:,} videos, too many to print: give --out predictions.csv")
    print(pretrained.loaded)
    if distributed.rank() == 0:
        print_reading(catalog)
    predictions = predict_videos(pretrained.classifier, pretrained.classes, catalog, data, device)
    distributed.only_on_rank_zero(lambda: show(predictions, out, top))


def show(predictions: "Predictions", out: Path | None, top: int) -> None:
    """Write the predictions to `out`, or print them if it is None. Raises UserError: the file cannot be written."""
    from dclr.evaluation.predictions import print_predictions, write_predictions

    if out is None:
        print()
        print_predictions(predictions, top)
        return
    write_predictions(predictions, out, top)
    skipped = f", {len(predictions.skipped):,} skipped with their reasons" if predictions.skipped else ""
    print(f"\n{out} written: {len(predictions.paths):,} videos{skipped}")
