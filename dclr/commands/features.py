"""Write the embeddings of videos to a file: `eval.py features`."""

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dclr import config as configuration
from dclr.distributed import share_cores
from dclr.errors import UserError, printable
from dclr.programs import command_of

if TYPE_CHECKING:
    from dclr.evaluation.feature_file import FeatureTable

DESCRIPTION = "embed all videos of a folder, a list or a file: a row each, as .parquet, .npz or .safetensors"

KINDS = ("pooled", "motion", "scene")

CLIP_FLAGS = {
    "data", "split", "allow_outside", "clip_length", "clip_stride", "crop_size", "workers", "video_timeout",
}  # fmt: skip
"""Fields of DataConfig that this command uses. It has no limits on videos that fail: each has its reason in the
file."""

SHOWN_SKIPPED = 5
"""Most skipped videos that are printed. The file names all."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("The network, the result and its rows")
    heading.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the folder of a run, also of one that is still running, or a file of weights",
    )
    heading.add_argument(
        "--out",
        required=True,
        metavar="FEATURES",
        help="the file to write. Its suffix is the format: .parquet (needs pyarrow), .npz or .safetensors. "
        "FEATURES.parts holds what is finished, and the same command continues it",
    )
    heading.add_argument(
        "--like",
        nargs="+",
        choices=KINDS,
        default=["pooled"],
        metavar="KIND",
        help="kinds of embeddings, each a column: pooled is the backbone's mean over time and space; "
        "motion and scene are of projection heads, which files of pretraining with DCLR have (default: pooled)",
    )
    heading.add_argument(
        "--clips",
        action="store_true",
        help="write a row for each of a video's 10 clips, in place of their mean",
    )
    heading.add_argument(
        "--half",
        action="store_true",
        help="write float16, half the size. The cosine of two embeddings changes by less than 0.0001. "
        "If all embeddings are nearly equal, cosines after subtracting the mean change more",
    )
    configuration.add_flags(parser, [configuration.DataConfig], only=CLIP_FLAGS)


def run(flags: dict[str, Any]) -> None:
    """Embed the videos. Under a launcher, each process makes its share. Raises UserError for wrong input."""
    out, checkpoint = Path(flags.pop("out")), Path(flags.pop("checkpoint"))
    kinds, by_clip, half = tuple(dict.fromkeys(flags.pop("like"))), flags.pop("clips"), flags.pop("half")

    process, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if process > 0 and out.exists():
        return  # all parts existed, and process 0 has already written the file

    from dclr.evaluation.feature_file import check_out

    check_out(out)
    data_given = bool(flags.get("data"))
    if not data_given:
        refuse_unless_demo(checkpoint)

    from dclr.data.catalog import print_reading
    from dclr.data.datasets import make_demo, open_data
    from dclr.evaluation.feature_parts import Process, make_features
    from dclr.evaluation.feature_table import Request
    from dclr.models import load_pretrained

    began = time.monotonic()
    pretrained = load_pretrained(checkpoint)
    if not data_given:
        make_demo()
    data = configuration.DataConfig(**{**pretrained.clips.settings, **flags})
    catalog = open_data(data)
    request = Request(catalog, pretrained, data, kinds, by_clip, half)
    if process == 0:
        print(f"{pretrained.loaded}\n{catalog.root}: {count(len(request))}, {catalog.layout}", flush=True)
        print_reading(catalog)
    table = make_features(request, out, device_of_process(), Process(process, processes))
    if table is not None:
        print_summary(table, out, checkpoint, time.monotonic() - began)
    elif process == 0:
        print(f"process 0 has finished its share; the last of the {processes} processes writes {out}")


def refuse_unless_demo(checkpoint: Path) -> None:
    """Raise UserError unless the checkpoint is of a run on the built-in demo videos."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    trained_on = None
    for config in (folder / "config.json", folder.parent / "config.json"):
        if config.is_file():
            trained_on = configuration.read_config(config)[2].get("data")
            break
    if trained_on == "":
        return
    own = f" (the run was trained on {trained_on})" if trained_on else ""
    raise UserError(f"--data is needed: a folder of videos, a list of them, or a video file{own}")


def device_of_process() -> torch.device:
    """Return the GPU of this process, or the CPU, whose cores the processes of a machine then share."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    share_cores()
    return torch.device("cpu")


def print_summary(table: "FeatureTable", out: Path, checkpoint: Path, seconds: float) -> None:
    """Print what the file holds, what was skipped, and the next step."""
    videos = count(len(set(table.paths)))
    kinds = ", ".join(f"{kind} ({rows.shape[1]} {rows.dtype})" for kind, rows in table.embeddings.items())
    rows = f"{len(table.paths):,} clips of {videos}" if table.clips is not None else videos
    print(f"\n{out}: {rows}, {kinds}, in {seconds:.0f} s")
    if table.skipped:
        print(f"skipped: {count(len(table.skipped))}, named with their reasons in the file")
        for path, reason in list(table.skipped.items())[:SHOWN_SKIPPED]:
            print(f"  {printable(path)}: {printable(reason)}")
    file = Path(table.root) / table.paths[0]
    query = str(file) if file.exists() else table.paths[0]  # a packed store has no file for each video
    kind = next(iter(table.embeddings))
    like = [] if "pooled" in table.embeddings else ["--like", kind]
    names = ["--checkpoint", str(checkpoint), "--features", str(out), *like, "--query", query]
    print(f"next: {command_of('eval')} search {shlex.join(names)}")


def count(videos: int) -> str:
    return f"{videos:,} video{'' if videos == 1 else 's'}"
