"""Train a backbone or a classifier: pretrain | finetune | linear | check | pack.

The program runs alone, under the deepspeed launcher, or under torchrun. A launcher starts one process for each GPU.

    deepspeed train.py --ds_config ds_configs/zero1.json
        Pretrain on the built-in demo videos. It takes about 5 minutes on two cores and writes runs/pretrain-1.
    OMP_NUM_THREADS=1 python train.py --epochs 2 --fill-steps 2
        The smallest run: 12 steps on the demo videos in less than a minute on one core. It shows that everything works.
    python train.py check --data UCF101
        Print the layout of a data set, its counts by class and split, and every video that cannot be read.
    deepspeed train.py pretrain --data UCF101 --preset ucf101 --out runs/ucf
        Pretrain with the published recipe: 200 epochs of UCF101.
    deepspeed train.py pretrain --config runs/ucf/config.json --lr 0.02 --out runs/ucf-2
        Repeat that run with another learning rate. --config also reads a TOML file.
    deepspeed train.py finetune --data UCF101 --preset ucf101 --pretrained runs/ucf --out runs/ucf-finetune
        Train the whole network on labels, from the pretrained backbone. `linear` trains only a classifier on top.
        With --split all, the command trains on each official split in turn.
    python train.py pack --data UCF101 --out UCF101-packed --workers 12
        Decode the videos once, into a store that is fast to read: --data UCF101-packed.

Without a subcommand, train.py pretrains. `train.py SUBCOMMAND --help` explains every flag.
"""

import argparse
import importlib.util
import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr import programs, progress
from dclr.commands.launcher import join_launch, print_error, require_one_process
from dclr.distributed import launched_rank
from dclr.errors import UserError
from dclr.training import checkpoint, signals
from dclr.training.split_folders import begun_splits, split_folder

DESCRIPTIONS = {
    "pretrain": "learn a backbone from videos without labels (DCLR)",
    "finetune": "train the whole network on labels, from pretrained weights or from random ones",
    "linear": "train a linear classifier on a frozen backbone",
    "check": "decode every video once and report what a data set holds",
    "pack": "decode every video once into a store that is fast to read; without --out, only print its size",
}

CONFIG_EXAMPLE = """example of a TOML file for --config:

    preset = "ucf101"
    data = "UCF101"
    epochs = 50
    milestones = [30, 40]
    deterministic = true

Names are those of the flags. They may also stand in the tables of a config.json, for example epochs in [optim].
"""


def make_parser() -> argparse.ArgumentParser:
    parser = configuration.Parser(
        prog=programs.name_of("train"),
        description=programs.with_names(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(DESCRIPTIONS) + "}")
    for command, description in DESCRIPTIONS.items():
        sub = commands.add_parser(
            command,
            help=description,
            description=description,
            epilog=CONFIG_EXAMPLE if command in configuration.COMMANDS else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if command in configuration.COMMANDS:
            add_sources(sub)
            configuration.add_flags(sub, configuration.groups(command).values(), command=command)
        else:
            shown = {"data", "allow_outside", "workers", "video_timeout"} | ({"split"} if command == "check" else set())
            configuration.add_flags(sub, [configuration.DataConfig], only=shown)
    commands.choices["check"].add_argument_group("The result").add_argument(
        "--report",
        default="",
        metavar="FILE",
        help="write all missing and unreadable videos to this JSON file. The output names the first ten of each kind",
    )
    add_store_flags(commands.choices["pack"])
    return parser


def add_sources(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("Sources of settings. Flags override all of them")
    heading.add_argument(
        "--preset",
        choices=configuration.PRESETS,
        metavar="NAME",
        help=f"recipe: {', '.join(configuration.PRESETS)} (default: demo without --data, else "
        f"{configuration.DATA_PRESET}, whose values are the defaults below)",
    )
    heading.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file with settings (example below), or the config.json of a run to repeat. It overrides the preset, "
        "which a TOML file may name. The settings out and allow_outside of a config.json are ignored. "
        "With --resume, its settings must be those of the run, or settings that may change. "
        "It cannot be used with --preset",
    )
    heading.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue the run in this folder, or in --out if no folder is given, with the settings of that run. "
        "auto: continue the run in --out if there is a checkpoint, else begin it. "
        "Use auto to repeat one command until the run is done",
    )


def add_store_flags(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("The store")
    heading.add_argument(
        "--out",
        default=argparse.SUPPRESS,
        metavar="STORE",
        help="folder of the store. An interrupted store is continued. Start the same command on several machines to "
        "share the work (default: only print how large it would be)",
    )
    heading.add_argument(
        "--short-side",
        type=int,
        default=argparse.SUPPRESS,
        metavar="PIXELS",
        help="shorter side of the stored frames in pixels. Frames are never enlarged. "
        "Raise it with --crop-size (default: 128)",
    )
    heading.add_argument(
        "--compact",
        action="store_true",
        default=argparse.SUPPRESS,
        help="store small videos with a keyframe every 12 frames, in place of raw planes. They take at most a twelfth "
        "of the space and are slower to read. Use it for data sets as large as Kinetics",
    )


def parse(arguments: list[str]) -> dict[str, Any]:
    """Return name -> value of the command line. A flag that is not given is absent, None or "".

    Without a subcommand, the command is pretrain.
    """
    given = programs.without_local_rank(arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["pretrain", *given]
    return vars(make_parser().parse_args(given))


def main(arguments: list[str]) -> None:
    """Run one command line. Raises UserError for wrong input, and `signals.Stopped` if a signal stops a run."""
    flags = parse(arguments)
    command = flags.pop("command")
    if command in ("check", "pack"):
        require_one_process(os.environ, f"train.py {command}")
    if command == "check":
        from dclr.data.check import check

        report = flags.pop("report")
        check(configuration.DataConfig(**flags), report)
        progress.check_output()
    elif command == "pack":
        from dclr.data.pack import pack

        store = {name: flags.pop(name) for name in ("out", "short_side", "compact") if name in flags}
        pack(configuration.DataConfig(**flags), **store)
    else:
        train(command, flags)


def train(command: str, flags: dict[str, Any]) -> None:
    """Run pretrain, finetune or linear, in this process and in the others of its launcher.

    Raises UserError, and `signals.Stopped` if a signal stops the run.
    """
    for package in ("deepspeed", "tensorboard"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"training needs the package {package}, which is not installed: pip install 'dclr[train]'")
    replace = flags.get("resume") == "auto"
    from dclr.evaluation.monitor import open_accuracy, open_knn
    from dclr.training import connection, engine, machines
    from dclr.training.finetune import finetune
    from dclr.training.heartbeat import Heartbeat
    from dclr.training.pretrain import pretrain
    from dclr.training.splits import finetune_splits

    # The heartbeat begins first: if one rank fails in any of the lines below, the others do not wait for it.
    with (
        ExitStack() as at_end,
        signals.LauncherWatch() as launcher,
        Heartbeat(describe=machines.describe_machine) as heartbeat,
    ):
        warnings = machines.check_machines(heartbeat.peers)
        all_splits = takes_all_splits(command, flags)
        config, preset, folder = (resolve_splits if all_splits else resolve)(command, flags)
        interface = connection.choose_interface(heartbeat.peers)
        device = engine.start_processes()
        at_end.callback(engine.stop_processes)  # after the heartbeat has ended on all ranks
        if launched_rank() == 0:
            if interface:
                print(interface, flush=True)
            for line in warnings:
                print(f"warning: {line}", file=sys.stderr)
        machines.check_settings(f"{command} on all splits" if all_splits else command, preset, config, folder)
        # The inner context ends first: a rank that leaves must not be asked to stop again.
        with closing(launcher):
            if isinstance(config, configuration.PretrainConfig):
                pretrain(config, preset, device, folder, replace, open_knn)
            elif all_splits:
                finetune_splits(command, config, preset, flags, device, folder, open_accuracy)
            else:
                finetune(command, config, preset, device, folder, replace, open_accuracy)


def takes_all_splits(command: str, flags: dict[str, Any]) -> bool:
    """Return whether the command is for all official splits: --split all, or --resume with a folder of such runs.

    Raises UserError if one split of such a folder is named.
    """
    if command not in ("finetune", "linear"):
        return False
    split, resume = flags.get("split"), flags.get("resume")
    folder = flags.get("out") if resume in ("", "auto") else resume
    holds_splits = folder and not Path(folder, "config.json").exists() and begun_splits(Path(folder))
    if folder and holds_splits and split not in (None, configuration.ALL):
        run = split_folder(Path(folder), split)
        raise UserError(f"--split is {split}, but {folder} holds runs on all splits: use --resume {run}")
    return bool(holds_splits) or split == configuration.ALL


def resolve_splits(command: str, flags: dict[str, Any]) -> tuple[configuration.Config, str, Path | None]:
    """Do what `resolve` does for runs on all splits. Then remove from `flags` all but those that every run has.

    Splits without a run take the settings of the last split that has one.
    """
    flags.pop("split", None)
    resume = flags.get("resume")
    folder = run_to_resume(None if resume == "auto" else resume, flags)
    if resume == "auto":
        run_to_resume(resume, flags)
        folder = Path(flags["out"]) if begun_splits(Path(flags["out"])) else None
    if folder is None:
        config, preset, _ = resolve(command, flags)
        flags.pop("out", None)
        return config, preset, None
    out = flags.pop("out", folder)
    if Path(out) != folder:
        raise UserError(f"--out is {out}, but --resume continues the runs in {folder}: leave --out out")
    if not begun_splits(folder):
        raise UserError(f"--resume {folder}: no run of --split all is there: leave --split out, or give another folder")
    flags["resume"] = str(begun_splits(folder)[-1])
    config, preset, _ = resolve(command, flags)
    return config, preset, folder


def resolve(command: str, flags: dict[str, Any]) -> tuple[configuration.Config, str, Path | None]:
    """Return the settings, the name of their preset, and the folder of the run to resume (None: a new run).

    Raises UserError if flags, files and presets contradict each other.
    """
    preset, file, resume = (flags.pop(name, None) for name in ("preset", "config", "resume"))
    if file is not None and preset is not None:
        raise UserError(f'--preset cannot be used with --config: write  preset = "{preset}"  into {file}')
    named, values = configuration.read_settings(Path(file), command) if file is not None else ("", {})
    preset = preset or named
    folder = run_to_resume(resume, {**values, **flags})
    if folder is not None:
        config, preset = resolve_resumed(command, preset, flags, folder, file, values)
        return config, preset, folder
    has_data = bool({**values, **flags}.get("data"))
    preset = preset or (configuration.DATA_PRESET if has_data else "demo")
    return configuration.resolve(command, preset, flags, file=values), preset, None


def resolve_resumed(
    command: str, preset: str, flags: dict[str, Any], folder: Path, file: str | None, values: dict[str, Any]
) -> tuple[configuration.Config, str]:
    """Return the settings of the run in `folder` with the flags that may change, and the name of its preset.

    Args:
        preset: the preset that --preset or the file names; "" if none does.
        flags: the flags that were given. Settings of the file that may change and do change are added to them.
        file: the file given to --config, with its settings `values`. Its `out` is ignored.

    Raises UserError if a flag or a setting of the file contradicts the run.
    """
    written_by, preset_of_run, stored = configuration.read_config(folder / "config.json")
    if written_by != command:
        raise UserError(
            f"--resume {folder} is a run of {written_by}, not of {command}: train.py {written_by} --resume {folder}"
        )
    if preset not in ("", preset_of_run):
        where = f" in {file}" if file else ""
        raise UserError(f"--preset is {preset}{where}, but the run in {folder} has {preset_of_run}: leave it out")
    out = flags.pop("out", folder)
    if Path(out) != folder:
        raise UserError(f"--out is {out}, but --resume continues the run in {folder}: leave --out out")
    configuration.check_resume(folder, flags, stored)
    if file:
        both = configuration.flat(configuration.resolve(command, preset_of_run, flags, resumed={**stored, **values}))
        given = {name: both[name] for name in values if name not in flags and name != "out"}
        configuration.check_resume(folder, given, stored, file)
        flags |= {name: value for name, value in given.items() if value != stored.get(name)}
    data = stored.get("data")
    if "data" not in flags and data and not configuration.is_url(data) and not os.path.exists(data):
        raise UserError(
            f"--resume {folder}: its data set, {data}, is neither in the folder that the run was started in, "
            f"nor in {Path.cwd()}: give --data"
        )
    return configuration.resolve(command, preset_of_run, flags, resumed={**stored, "out": str(folder)}), preset_of_run


def run_to_resume(resume: str | None, flags: dict[str, Any]) -> Path | None:
    """Return the folder of the run that --resume continues, or None to begin a run.

    Raises UserError if no folder is named.
    """
    if resume is None:
        return None
    if resume and resume != "auto":
        return Path(resume)
    if "out" not in flags:
        right = "--resume auto --out RUN" if resume else "--resume RUN, or --resume --out RUN"
        raise UserError(f"--resume needs the run's folder: {right}")
    folder = Path(flags["out"])
    if resume == "auto" and checkpoint.newest(folder / "checkpoints") is None:
        if (folder / "report.json").exists():
            raise UserError(f"--resume auto: {folder} holds a finished run without checkpoints: give another --out")
        return None
    return folder


def run(arguments: list[str]) -> int:
    """Call `main` and return the exit status.

    0: done. 2: wrong input. 75: stopped by a signal, with a checkpoint to resume from. 130: Ctrl-C before training.
    """
    try:
        join_launch(os.environ, os.isatty(0))
        main(arguments)
    except UserError as error:
        print_error("train", error)
        return 2
    except signals.Stopped as stopped:
        if launched_rank() == 0:
            print(f"{programs.name_of('train')}: {stopped}", flush=True)
        return signals.STATUS
    except KeyboardInterrupt:
        return 130
    return 0


def start() -> int:
    """Run the command line of this process and return the exit status."""
    progress.protect_output()
    return run(sys.argv[1:])
