"""Evaluate a checkpoint: accuracy | retrieval | bias | maps. Each prints a table and writes report.json and pictures.
Use a checkpoint: features | search | predict | export. Look at a run: report.

    python eval.py accuracy --data UCF101 --checkpoint runs/ucf-finetune
        Top-1 and top-5 accuracy of a classifier, by video and by clip, and its confusion matrix.
    python eval.py retrieval --data UCF101 --checkpoint runs/ucf
        For each test video, the nearest training videos by the features of the backbone: recall at 1 to 50.
    python eval.py bias --data UCF101 --checkpoint runs/ucf
        Background bias: how well features predict the motion and the scene, also on the backgrounds of other videos.
    python eval.py maps --data UCF101 --checkpoint runs/ucf
        The share of each activation map on moving regions, and pictures of the maps.
    python eval.py features --data VIDEOS --checkpoint runs/ucf --out features.parquet
        The embedding of each video of a folder, a list or a file, with or without labels.
    python eval.py search --data VIDEOS --checkpoint runs/ucf --query video.mp4 --like motion --html
        The videos nearest to a query, by motion, by scene or by both: a table, a picture and a page that plays them.
    python eval.py predict --data VIDEOS --checkpoint runs/ucf-finetune --out predictions.csv
        The most probable classes of each video, with their probabilities.
    python eval.py export --checkpoint runs/ucf-finetune --out network.onnx
        The network as one file for ONNX Runtime or torch.export, which needs no code of dclr.
    python eval.py report runs/ucf
        A page about the run, one HTML file: health checks in words, curves, views, nearest neighbours, settings.
    OMP_NUM_THREADS=1 python eval.py retrieval --checkpoint random --preset demo
        The smallest command: an untrained network on the built-in demo videos. It takes about 30 seconds on one core.
        Its recall at 1 is 12.5 %, which is chance.

    python eval.py accuracy --split all --data UCF101 --checkpoint runs/ucf-all
        Accuracy on every official split, for the runs of `train.py finetune --split all --out runs/ucf-all`.

A launcher can start each command except export and report in several processes:
torchrun --nproc_per_node 8 eval.py accuracy ... The result is the same.
Without --data, the first four use the data set of the checkpoint's run, or the built-in demo videos if there is none.
`eval.py SUBCOMMAND --help` explains every flag.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dclr import config as configuration
from dclr import hub, programs, progress
from dclr.commands import export, features, predict, run_report, search
from dclr.commands.launcher import join_launch, print_error, require_one_process
from dclr.commands.ranks import connected_ranks
from dclr.errors import UserError
from dclr.models.pretrained import stated_settings
from dclr.training.split_folders import begun_splits, split_folder

RANDOM = "random"
"""The word that --checkpoint takes for an untrained network."""

DESCRIPTIONS = {
    "accuracy": "top-1 and top-5 accuracy of a finetuned or linear classifier on the test split; confusion matrix",
    "retrieval": "nearest training videos of the test split's videos, by the features of a backbone",
    "bias": "how well frozen features predict the motion and the scene; actions on the backgrounds of other videos",
    "maps": "share of the activation maps on moving regions, for the trained and an untrained network, with pictures",
}

USES: dict[str, ModuleType] = {
    "features": features,
    "search": search,
    "predict": predict,
    "export": export,
    "report": run_report,
}
"""Commands that use a checkpoint or look at a run instead of measuring it. Each is a module of this package with
DESCRIPTION, add_flags(parser) and run(flags). `flags` holds the parsed flags, but no setting of DataConfig that was not
given."""


def make_parser() -> argparse.ArgumentParser:
    parser = configuration.Parser(
        prog=programs.name_of("eval"),
        description=programs.with_names(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{" + ",".join([*DESCRIPTIONS, *USES]) + "}"
    )
    for command, description in DESCRIPTIONS.items():
        sub = commands.add_parser(command, help=description, description=description, allow_abbrev=False)
        add_inputs(sub, command)
        # Without --max-bad: a video that fails is skipped and listed, and --max-missing counts it.
        clips = {f.name for f in dataclasses.fields(configuration.DataConfig)} - {"max_bad"}
        configuration.add_flags(sub, [configuration.DataConfig], only=clips)
        if command != "accuracy":
            configuration.add_flags(sub, [configuration.ModelConfig])
            configuration.add_flags(sub, [configuration.RunConfig], only={"seed"})
    for command, module in USES.items():
        sub = commands.add_parser(command, help=module.DESCRIPTION, description=module.DESCRIPTION, allow_abbrev=False)
        module.add_flags(sub)
    return parser


def add_inputs(parser: argparse.ArgumentParser, command: str) -> None:
    heading = parser.add_argument_group("The checkpoint, the result and the sources of settings")
    classifiers = "the folder of a finetune or linear run, its classifier.safetensors, or one of its checkpoints"
    backbones = (
        "the folder of a run (finished, stopped or still going), one of its files or checkpoints, weights of "
        "torchvision, a checkpoint of the released code, "
        "a checkpoint of another project whose names are torchvision's after a prefix, "
        "or the word random for an untrained network, the baseline"
    )
    accepted = {"accuracy": classifiers, "bias": f"{classifiers}, whose predictions are tested; or {backbones}"}
    heading.add_argument("--checkpoint", required=True, metavar="FILE", help=accepted.get(command, backbones))
    heading.add_argument(
        "--out",
        metavar="RUN",
        help=f"folder for report.json and pictures (default: {command} in the checkpoint's folder, or in runs/)",
    )
    if command != "accuracy":
        heading.add_argument(
            "--like",
            metavar="RUN",
            help="with --checkpoint random: take clips, network and data set from this run or file of weights",
        )
    heading.add_argument(
        "--preset",
        choices=configuration.PRESETS,
        metavar="NAME",
        help="take clips and network from this recipe. Use it for a checkpoint without a config.json in its folder "
        "(default: the published recipe)",
    )
    heading.add_argument(
        "--config",
        metavar="FILE",
        help="take clips, network and data set from the config.json of a run, or from a TOML file as train.py reads "
        "it. Flags override the file. Use it with random for an untrained network of the same shape",
    )
    if command == "retrieval":
        heading.add_argument(
            "--normalise-clips",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="scale the feature of each clip to length 1 before the mean over the clips of a video. "
            "Turn it on to evaluate as the released code does (default: off)",
        )
    if command == "bias":
        heading.add_argument(
            "--foreground",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="also test actions on the backgrounds of other videos. "
            "Turn it off to run only the probes (default: on)",
        )


def main(arguments: list[str]) -> None:
    flags = vars(make_parser().parse_args(programs.without_local_rank(arguments)))
    command = flags.pop("command")
    if command == "export":
        require_one_process(os.environ, f"eval.py {command}")
    if hub.is_on_hub(flags.get("checkpoint", "")):
        flags["checkpoint"] = str(hub.download(flags["checkpoint"]))
    if command in USES:
        USES[command].run(flags)
        return
    with connected_ranks() as device:
        evaluate_checkpoint(command, flags, device)


def evaluate_checkpoint(command: str, flags: dict[str, Any], device: torch.device) -> None:
    """Run a command of DESCRIPTIONS, on all ranks. Raises UserError for wrong input, see `evaluate`."""
    checkpoint, out = Path(flags.pop("checkpoint")), flags.pop("out", None)
    special = {name: flags.pop(name) for name in ("foreground", "normalise_clips") if name in flags}
    without_suffix = checkpoint.with_name(f"{checkpoint.name}.safetensors") if checkpoint.name else checkpoint
    exists = checkpoint.exists() or without_suffix.is_file()
    if not exists and (command == "accuracy" or str(checkpoint) != RANDOM):
        raise UserError(
            f"--checkpoint {checkpoint}: no such file or folder; give a run's folder, or a file as --help says"
        )
    folder = Path(out) if out else (checkpoint if checkpoint.is_dir() else Path("runs")) / command
    if flags.get("split") == configuration.ALL and command in ("accuracy", "retrieval"):
        evaluate_splits(command, checkpoint, flags, device, folder, **special)
    elif runs := [] if (checkpoint / "config.json").exists() else begun_splits(checkpoint):
        every = "use --split all for every split, or " if command in ("accuracy", "retrieval") else ""
        raise UserError(f"--checkpoint {checkpoint} holds runs on single splits: {every}give one of them, {runs[0]}")
    else:
        evaluate(command, checkpoint, flags, device, folder, **special)


def evaluate(
    command: str, checkpoint: Path, flags: dict[str, Any], device: torch.device, folder: Path, **special: bool
) -> dict[str, Any]:
    """Run one evaluation and return the content of its report.json, which is in `folder`, on all ranks.

    Args:
        special: the flags that only one command has, for its evaluation.

    Raises UserError for wrong input, see the function of each command.
    """
    settings = settings_of(checkpoint, flags)

    from dclr import distributed, report

    pictures = folder / "pictures"
    with ExitStack() as stack:
        distributed.only_on_rank_zero(lambda: stack.enter_context(report.removed_if_empty(pictures)))
        distributed.on_rank_zero(lambda: report.make_writable(pictures))
        began = time.monotonic()
        with naming_the_file(folder):
            content = {
                "command": command,
                "checkpoint": str(checkpoint),
                **measure(command, checkpoint, settings, device, folder, **special),
                "clips": dataclasses.asdict(pick(configuration.DataConfig, settings)),
                "seconds": round(time.monotonic() - began, 1),
                "processes": distributed.world_size(),
                "environment": report.environment(device),
            }
            distributed.only_on_rank_zero(lambda: report.write_json(folder / "report.json", content))
    written = f"{folder / 'report.json'} and {pictures}" if pictures.exists() else folder / "report.json"
    print(f"\n{written} written")
    return content


def measure(
    command: str, checkpoint: Path, settings: dict[str, Any], device: torch.device, folder: Path, **special: bool
) -> dict[str, Any]:
    """Return the entries of report.json that belong to one command. Its pictures and other files go to `folder`."""
    from dclr.evaluation.accuracy import evaluate_accuracy
    from dclr.evaluation.activation_maps import evaluate_activation_maps
    from dclr.evaluation.background import evaluate_background
    from dclr.evaluation.retrieval import evaluate_retrieval

    data = pick(configuration.DataConfig, settings)
    if command == "accuracy":
        return evaluate_accuracy(checkpoint, data, device, folder)
    model, seed, pictures = pick(configuration.ModelConfig, settings), settings.get("seed", 0), folder / "pictures"
    if command == "retrieval":
        return evaluate_retrieval(checkpoint, data, model, seed, device, pictures, **special)
    if command == "bias":
        return evaluate_background(checkpoint, data, model, seed, device, pictures, **special)
    boundary = pick(configuration.MethodConfig, settings).boundary
    return evaluate_activation_maps(checkpoint, data, model, seed, boundary, device, pictures)


@contextmanager
def naming_the_file(folder: Path) -> Iterator[None]:
    """Raise UserError in place of an OSError. It names the file, or `folder` if the file was to be written there."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason, file = error.strerror or error, error.filename
        if isinstance(file, str) and not Path(file).is_relative_to(folder):
            raise UserError(f"{file}: {reason}") from None
        raise UserError(f"--out {folder}: cannot write there ({reason})") from None


def evaluate_splits(
    command: str, checkpoint: Path, flags: dict[str, Any], device: torch.device, folder: Path, **special: bool
) -> None:
    """Evaluate on every official split. Print mean and standard deviation and write them to report.json.

    Each split has a report.json of its own, in `folder`/split-N. Each split has a checkpoint of its own too, if
    `checkpoint` is a folder that train.py --split all wrote. Retrieval also takes one checkpoint for all splits.

    Raises UserError: the data set has one official split; a split has no finished run; see `evaluate`.
    """
    from dclr import distributed, report
    from dclr.data.datasets import several_splits
    from dclr.evaluation.splits import describe_splits, over_splits

    begun = begun_splits(checkpoint)
    if command == "accuracy" and not begun:
        raise UserError(
            f"--split all: {checkpoint} has no runs on splits, such as split-1, which train.py finetune --split all "
            "makes: a classifier has seen the test videos of the other splits"
        )
    data = {name: value for name, value in flags.items() if name != "split"}
    settings = settings_of(begun[0] if begun else checkpoint, dict(data))
    numbers = several_splits(pick(configuration.DataConfig, settings))
    checkpoints = {number: split_folder(checkpoint, number) if begun else checkpoint for number in numbers}
    for number, run in checkpoints.items():
        if begun and not (run / "report.json").exists():
            trained_by = configuration.read_config(begun[0] / "config.json")[0]
            raise UserError(
                f"--split all: {checkpoint} has no finished run on split {number}: train.py {trained_by} --split all "
                f"--resume {checkpoint} trains it"
            )
    if not begun and (checkpoint / "config.json").exists() and distributed.rank() == 0:
        print(
            "warning: one checkpoint for all splits: if it was pretrained on a split of this data set, it has seen "
            "test videos of the other splits, without their labels",
            file=sys.stderr,
        )
    began = time.monotonic()
    results = {}
    for number, run in checkpoints.items():
        own = {**data, "split": number}
        results[number] = evaluate(command, run, own, device, folder / f"split-{number}", **special)
    figures = {number: result["figures"] for number, result in results.items()}
    print("\n" + "\n".join(describe_splits(figures)))
    means, deviations = over_splits(figures)
    content = {
        "command": command,
        "checkpoint": str(checkpoint),
        "split": configuration.ALL,
        **special,
        "splits": figures,
        "mean": means,
        "standard_deviation": deviations,
        "seconds": round(time.monotonic() - began, 1),
        "environment": results[numbers[0]]["environment"],
    }
    distributed.only_on_rank_zero(lambda: report.write_json(folder / "report.json", content))
    print(f"\n{folder / 'report.json'} written")


def settings_of(checkpoint: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Return flat settings for clips, network and data set.

    The sources are the preset, the config.json of the checkpoint's run, the checkpoint itself, the file given to
    --config, and the flags. A later source overrides an earlier one. An untrained network takes the settings of the run
    that --like names. Prints the name of the data set if only the run names it.

    A checkpoint may come from anywhere, so its config.json does not decide the permission to read videos outside of the
    data folder, or how many videos may be missing.

    Raises UserError if the checkpoint was trained on a data set that is not there, and none is given.
    """
    preset, file, like = (flags.pop(name, None) for name in ("preset", "config", "like"))
    if file is not None and preset is not None:
        raise UserError(f'--preset cannot be used with --config: write  preset = "{preset}"  into {file}')
    if like is not None and str(checkpoint) != RANDOM:
        raise UserError("--like gives an untrained network the settings of a run: use it with --checkpoint random")
    named, given = configuration.read_settings(Path(file)) if file is not None else (preset, {})
    if named and named not in configuration.PRESETS:
        raise UserError(f"--config {file}: preset is {named}, but must be one of {', '.join(configuration.PRESETS)}")
    given |= flags
    if like is not None and not Path(like).exists():
        raise UserError(f"--like {like}: no such file or folder; give a run's folder, or a file of weights")
    source = Path(like) if like is not None else checkpoint
    stored = settings_of_run(source) if str(source) != RANDOM else {}
    if preset is not None and stored:
        raise UserError(f"--preset {preset} has no effect: {source} names its own clips and network: leave it out")
    if stored.get("data") and "data" not in given:
        if configuration.is_url(stored["data"]):
            raise UserError(
                f"--data is needed: {source} was trained on {stored['data']}, and a server is only contacted if --data "
                "names it"
            )
        if not os.path.exists(stored["data"]):
            raise UserError(
                f"--data is needed: {source} was trained on {stored['data']}, which is not there; "
                "name the data set to evaluate it on"
            )
        print(f"data set: {stored['data']}, which {source} was trained on (--data names another)")
    return {**(configuration.PRESETS[named]["pretrain"] if named else {}), **stored, **given}


def settings_of_run(source: Path) -> dict[str, Any]:
    """Return the settings that a run's folder or a file of weights states: its config.json, and the file itself.

    Permissions are removed. A file that cannot be read states nothing: its use fails with an error that says why.

    Raises UserError if the config.json is not the configuration of a run.
    """
    folder = source if source.is_dir() else source.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    stored = configuration.read_config(folder / "config.json")[2] if (folder / "config.json").is_file() else {}
    for permission in ("allow_outside", "max_missing"):
        stored.pop(permission, None)
    with suppress(UserError):
        stored |= stated_settings(source)
    return stored


def pick(group: type, settings: dict[str, Any]) -> Any:
    """Return the group with those settings that belong to it."""
    return group(**{f.name: settings[f.name] for f in dataclasses.fields(group) if f.name in settings})


def start() -> int:
    """Run the command line of this process and return the exit status. 0: done. 2: wrong input. 130: Ctrl-C."""
    progress.protect_output()
    programs.run_as("eval")
    try:
        join_launch(os.environ, os.isatty(0))
        main(sys.argv[1:])
    except UserError as error:
        print_error("eval", error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
