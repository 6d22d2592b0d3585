"""Measure a checkpoint: accuracy | retrieval | bias | maps. Prints a table, writes report.json and pictures. One process.

    python eval.py accuracy  --data UCF101 --checkpoint runs/ucf-finetune     top-1 and top-5 by video and by clip
    python eval.py retrieval --data UCF101 --checkpoint runs/ucf              nearest neighbours of test videos in the train split
    python eval.py bias      --data UCF101 --checkpoint runs/ucf              what features tell of motion and of scene
    python eval.py maps      --data UCF101 --checkpoint runs/ucf              whether activation maps lie on what moves

`eval.py SUBCOMMAND --help` explains every flag. Without --data: the built-in demo videos.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr.errors import UserError

DESCRIPTIONS = {
    "accuracy": "top-1 and top-5 of a finetuned or linear classifier on the test split, with a confusion matrix",
    "retrieval": "nearest neighbours of the test split's videos in the train split, by a backbone's features",
    "bias": "what frozen features tell of motion and of scene; actions on other videos' backgrounds, moving and frozen",
    "maps": "activation maps of test clips, before training and after: how much of each lies on what moves, and pictures",
}


def make_parser() -> argparse.ArgumentParser:
    parser = configuration.Parser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(DESCRIPTIONS) + "}")
    for command, description in DESCRIPTIONS.items():
        sub = commands.add_parser(command, help=description, description=description, allow_abbrev=False)
        what = sub.add_argument_group("what is measured, and where the result goes")
        kinds = "a finetune or linear run's folder, or its classifier.safetensors"
        if command != "accuracy":
            backbones = (
                "a run's folder, its backbone.safetensors, torchvision's weights, the authors' checkpoint, or the word random "
                "for an untrained network, the baseline"
            )
            kinds = f"{kinds}: what it predicts is tested; or {backbones}" if command == "bias" else backbones
        what.add_argument("--checkpoint", required=True, metavar="FILE", help=kinds)
        what.add_argument(
            "--out",
            metavar="RUN",
            help=f"folder for report.json and pictures (default: {command} in the checkpoint's run, or runs/)",
        )
        what.add_argument(
            "--preset", choices=configuration.PRESETS, metavar="NAME",
            help="clips and network of this recipe, for a checkpoint without a config.json beside it (default: the published ones)",
        )  # fmt: skip
        if command == "bias":
            what.add_argument(
                "--foreground", action=argparse.BooleanOptionalAction, default=True,
                help="also test actions on the backgrounds of other videos. Turn it off to run only the probes",
            )  # fmt: skip
        # Not --max-bad: what fails is left out of the figures, and listed.
        clips = {f.name for f in dataclasses.fields(configuration.DataConfig)} - {"max_bad"}
        configuration.add_flags(sub, [configuration.DataConfig], only=clips)
        if command != "accuracy":
            configuration.add_flags(sub, [configuration.ModelConfig])
            configuration.add_flags(sub, [configuration.RunConfig], only={"seed"})
    return parser


def main(arguments: list[str]) -> None:
    configuration.refuse_old_switches(arguments)
    flags = vars(make_parser().parse_args(arguments))
    command, checkpoint, out = flags.pop("command"), Path(flags.pop("checkpoint")), flags.pop("out", None)
    foreground = flags.pop("foreground", False)
    if not checkpoint.exists() and not (command != "accuracy" and str(checkpoint) == "random"):
        raise UserError(
            f"--checkpoint {checkpoint}: no such file or folder; give a run's folder, or a file as --help says"
        )
    settings = settings_of(checkpoint, flags)
    folder = Path(out) if out else (checkpoint if checkpoint.is_dir() else Path("runs")) / command

    import torch

    from dclr import report
    from dclr.data.datasets import make_demo
    from dclr.evaluation.accuracy import measure_accuracy, measure_retrieval
    from dclr.evaluation.activation_maps import measure_maps
    from dclr.evaluation.background import measure_bias

    report.make_writable(folder / "pictures")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.time()
    data = pick(configuration.DataConfig, settings)
    if not data.data:
        make_demo()
    if command == "accuracy":
        result = measure_accuracy(checkpoint, data, device, folder / "pictures")
    else:
        network = pick(configuration.ModelConfig, settings), settings.get("seed", 0)
        if command == "retrieval":
            result = measure_retrieval(checkpoint, data, *network, device, folder / "pictures")
        elif command == "maps":
            boundary = pick(configuration.MethodConfig, settings).boundary
            result = measure_maps(checkpoint, data, *network, boundary, device, folder / "pictures")
        else:
            result = measure_bias(checkpoint, data, *network, device, folder / "pictures", foreground)
    content = {
        "command": command,
        "checkpoint": str(checkpoint),
        **result,
        "clips": dataclasses.asdict(data),
        "seconds": round(time.time() - began, 1),
        "environment": report.environment(device),
    }
    report.write_json(folder / "report.json", content)
    print(f"\n{folder / 'report.json'} and {folder / 'pictures'} written")


def settings_of(checkpoint: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """How clips are cut and which network it is: defaults, preset, the configuration beside the checkpoint, flags; last one wins.

    The data set is the flag's alone, and so is what its lists may name, but a run on the demo videos is measured on them.
    """
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    preset = flags.pop("preset", None)
    stored = configuration.read_config(beside)[2] if beside.is_file() else {}
    stored = {**(configuration.PRESETS[preset]["pretrain"] if preset else {}), **stored}
    if stored.get("data") and "data" not in flags:
        raise UserError(
            f"--data is needed: {checkpoint} was trained on {stored['data']}; name the data set to measure it on"
        )
    stored.pop("allow_outside", None)  # a checkpoint may come from anywhere
    return {**stored, **flags}


def pick(group: type, settings: dict[str, Any]) -> Any:
    """A configuration group from the settings that are its own."""
    return group(**{f.name: settings[f.name] for f in dataclasses.fields(group) if f.name in settings})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
