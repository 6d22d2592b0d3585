"""Write a network as one file that needs no code of dclr: `eval.py export`."""

import argparse
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr.errors import UserError

DESCRIPTION = "write a backbone, or a classifier, as a torch.export program or as ONNX, with a check of its outputs"


def add_flags(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("The checkpoint and the result")
    heading.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the folder of a run, or a file of weights. With a classifier, the exported file also gives logits",
    )
    heading.add_argument(
        "--format",
        choices=("torch", "onnx"),
        help="torch: a program that torch.export.load reads. onnx: a file for ONNX Runtime and other programs "
        "(default: by the suffix of --out)",
    )
    heading.add_argument("--out", required=True, metavar="FILE", help="the file to write: .pt2 (torch) or .onnx (onnx)")
    heading.add_argument(
        "--like",
        nargs="+",
        choices=("motion", "scene"),
        default=[],
        metavar="KIND",
        help="also give the embeddings motion or scene of the projection heads, which files of pretraining with DCLR "
        "have. Each takes one more pass through the backbone",
    )
    configuration.add_flags(parser, [configuration.DataConfig], only={"clip_length", "crop_size"})


def run(flags: dict[str, Any]) -> None:
    """Export the network. Print what was written and the largest difference of the outputs.

    Raises:
        UserError: see load_pretrained and export_network; --out exists or has another suffix than the format.
    """
    from dclr import report

    out = Path(flags["out"])
    form = _form(out, flags.get("format"))
    report.require_new_file(out)

    from dclr.evaluation.export import TOLERANCE, check_packages, describe, export_network
    from dclr.models import load_pretrained

    check_packages(form)
    pretrained = load_pretrained(flags["checkpoint"])
    clips = pretrained.clips
    size = configuration.DataConfig(
        clip_length=flags.get("clip_length", clips.length), crop_size=flags.get("crop_size", clips.crop)
    )
    print(pretrained.loaded)
    kinds = tuple(dict.fromkeys(flags["like"]))
    difference = export_network(pretrained, size.clip_length, size.crop_size, form, out, kinds)
    print(f"input   {describe(pretrained, size.clip_length, size.crop_size)['input']}")
    print(f"output  features: (batch, {pretrained.backbone.feature_dim})")
    if pretrained.classes:
        print(f"output  logits: (batch, {len(pretrained.classes)}); the names of the classes are in the file")
    for kind in kinds:
        print(f"output  {kind}: the embedding of a projection head, of length 1")
    print(
        f"checked: outputs differ from the model's by at most {difference:.1e} of the largest (limit {TOLERANCE:.0e})"
    )
    print(f"{out} written, {out.stat().st_size / 1e6:.1f} MB")


def _form(out: Path, given: str | None) -> str:
    """Return the format of the file. Raises UserError: its suffix is unknown, or is that of another format."""
    suffixes = {".pt2": "torch", ".onnx": "onnx"}
    form = suffixes.get(out.suffix)
    if form is None or given not in (None, form):
        what = f"for --format {given} its name must end in" if given else "its name must end in"
        right = " or ".join(suffix for suffix, name in suffixes.items() if given in (None, name))
        raise UserError(f"--out {out}: {what} {right}")
    return form
