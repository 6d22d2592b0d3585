"""Train: pretrain | finetune | linear | check | pack. One process a device, under the deepspeed launcher, torchrun or alone.

    deepspeed train.py --ds_config ds_configs/zero1.json                      the built-in demo videos, about 5 minutes on two cores
    deepspeed train.py pretrain --data UCF101 --preset ucf101 --out runs/ucf  the published recipe
    deepspeed train.py finetune --data UCF101 --preset ucf101 --pretrained runs/ucf --out runs/ucf-finetune
    python train.py check --data UCF101                                       what was recognised, and which videos cannot be read
    python train.py pack --data UCF101 --out UCF101-packed --workers 12       decoded once, to read fast: --data UCF101-packed from then on

No subcommand means pretrain. `train.py SUBCOMMAND --help` explains every flag.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr.distributed import launched_rank
from dclr.errors import UserError
from dclr.training import checkpoint, signals

DESCRIPTIONS = {
    "pretrain": "learn a backbone from videos without labels (DCLR)",
    "finetune": "train the whole network on labels, from pretrained weights or from scratch",
    "linear": "train a linear classifier on a frozen backbone",
    "check": "say what a data set is recognised as, and decode every video once",
    "pack": "decode every video once into a store that is quick to read; without --out, say how large it would be",
}


def make_parser() -> argparse.ArgumentParser:
    parser = configuration.Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(DESCRIPTIONS) + "}")
    for command, description in DESCRIPTIONS.items():
        sub = commands.add_parser(command, help=description, description=description, allow_abbrev=False)
        sub.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
        if command == "check":
            shown = {"data", "split", "allow_outside", "workers", "video_timeout"}
            configuration.add_flags(sub, [configuration.DataConfig], only=shown)
            continue
        if command == "pack":
            shown = {"data", "allow_outside", "workers", "video_timeout"}
            configuration.add_flags(sub, [configuration.DataConfig], only=shown)
            store = sub.add_argument_group("what is written")
            store.add_argument(
                "--out", default=argparse.SUPPRESS, metavar="STORE",
                help="folder of the store; an interrupted one is gone on with (default: only say how large it would be)",
            )  # fmt: skip
            store.add_argument(
                "--short-side", type=int, default=argparse.SUPPRESS, metavar="PIXELS",
                help="shorter side of the stored frames, never enlarged; raise it with --crop-size (default: 128)",
            )  # fmt: skip
            store.add_argument(
                "--compact", action="store_true", default=argparse.SUPPRESS,
                help="small videos, re-encoded with a keyframe every 12 frames, instead of planes; "
                "a twelfth of the space or less, slower to read; for data sets as large as Kinetics",
            )  # fmt: skip
            continue
        start = sub.add_argument_group("where settings come from; a flag given here overrides both")
        presets = ", ".join(configuration.PRESETS)
        start.add_argument(
            "--preset", choices=configuration.PRESETS, metavar="NAME",
            help=f"a recipe: {presets} (default: demo without --data, else ucf101)",
        )  # fmt: skip
        start.add_argument(
            "--resume", nargs="?", const="", metavar="RUN",
            help="go on with the run in this folder (without a value: in --out), with its settings; auto: with the one in --out where "
            "there is a checkpoint, else begin it, so that the same command can be given again and again",
        )  # fmt: skip
        configuration.add_flags(sub, configuration.groups(configuration.COMMANDS[command]).values(), command=command)
    return parser


def parse(arguments: list[str]) -> dict[str, Any]:
    """Command line -> names and values; only flags that were given are in it. No subcommand means pretrain."""
    own = [a for a in arguments if not a.startswith("--local_rank")]
    if not own or (own[0].startswith("-") and own[0] not in ("-h", "--help")):
        own = ["pretrain", *own]
    configuration.refuse_old_switches(own)
    return vars(make_parser().parse_args(own))


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    command = flags.pop("command")
    flags.pop("local_rank")
    if command == "check":
        from dclr.data.check import check

        check(configuration.DataConfig(**flags))
        return
    if command == "pack":
        from dclr.data.pack import pack

        store = {name: flags.pop(name) for name in ("out", "short_side", "compact") if name in flags}
        pack(configuration.DataConfig(**flags), **store)
        return

    preset, resume = flags.pop("preset", None), flags.pop("resume", None)
    folder = run_to_resume(resume, flags)
    stored = None
    if folder is not None:
        written_by, preset_of_run, stored = configuration.read_config(folder / "config.json")
        if written_by != command:
            raise UserError(
                f"--resume {folder} is a run of {written_by}, not of {command}: train.py {written_by} --resume {folder}"
            )
        out = flags.pop("out", str(folder))
        if Path(out) != folder:
            raise UserError(f"--out is {out}, but --resume goes on in {folder}: leave --out out")
        if preset not in (None, preset_of_run):
            raise UserError(f"--preset is {preset}, but the run in {folder} has {preset_of_run}: leave the flag out")
        configuration.check_resume(folder, flags, stored)
        stored["out"], preset = str(folder), preset_of_run
    preset = preset or ("ucf101" if flags.get("data") else "demo")
    config = configuration.resolve(command, preset, flags, stored)
    from dclr.training import engine
    from dclr.training.finetune import supervise
    from dclr.training.heartbeat import Lifeline
    from dclr.training.pretrain import pretrain

    device = engine.start_processes()
    try:
        with Lifeline():
            if isinstance(config, configuration.PretrainConfig):
                pretrain(config, preset, device, folder)
            else:
                supervise(command, config, preset, device, folder)
    finally:
        engine.stop_processes()


def run_to_resume(resume: str | None, flags: dict[str, Any]) -> Path | None:
    """The folder that --resume names, of a run to go on with; None: begin one. Raises UserError: it names none."""
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
        # Left by a run that never came to a checkpoint: a new one may take its place.
        (folder / "config.json").unlink(missing_ok=True)
        return None
    return folder


def refuse(error: UserError) -> None:
    """One line for all processes of a run: rank 0's. The others wait, for a launcher ends all at the first exit, and it must not come
    before that line; one that is still there after a while has something to say that rank 0 does not know."""
    if launched_rank() > 0:
        time.sleep(30)
    print(f"train.py: error: {error}", file=sys.stderr)


def run(arguments: list[str]) -> int:
    """`main`; returns the exit status: 0 done, 2 refused, 75 asked to stop with a checkpoint written, 130 Ctrl-C before training began."""
    try:
        main(arguments)
    except UserError as error:
        refuse(error)
        return 2
    except signals.Stopped as stopped:
        if launched_rank() == 0:
            print(f"train.py: {stopped}", flush=True)
        return signals.STATUS
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
