"""Write the page of a training run: `eval.py report`."""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dclr import config as configuration
from dclr.commands.launcher import require_one_process
from dclr.commands.ranks import connected_ranks
from dclr.errors import UserError, printable
from dclr.training.split_folders import begun_splits

if TYPE_CHECKING:
    from dclr.evaluation.page import Html

DESCRIPTION = "write a page about a training run: health checks in words, curves, views, neighbours, settings"

DATA_FLAGS = {"data", "allow_outside", "workers", "video_timeout"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("The run and its page")
    heading.add_argument(
        "run", metavar="RUN", help="the folder of a run of train.py: finished, stopped or still training"
    )
    heading.add_argument(
        "--out",
        metavar="FILE",
        help="the page, one .html file that needs no network. A page of this name is replaced "
        "(default: report.html in the run's folder)",
    )
    configuration.add_flags(parser, [configuration.DataConfig], only=DATA_FLAGS)


def run(flags: dict[str, Any]) -> None:
    """Write the page and print the findings. Raises UserError for wrong input."""
    require_one_process(os.environ, "eval.py report")
    folder = Path(flags.pop("run"))
    out = Path(flags.pop("out", None) or folder / "report.html")
    if out.suffix != ".html":
        raise UserError(f"--out {out}: a page is an .html file; give such a name")
    if not (folder / "config.json").exists() and (runs := begun_splits(folder)):
        raise UserError(f"{folder} holds runs on single splits: give one of them, {runs[0]}")

    from dclr.evaluation.health import check_health
    from dclr.evaluation.run_page import WORDS, run_page
    from dclr.evaluation.run_record import read_run
    from dclr.files import atomic_write
    from dclr.report import make_writable

    record = read_run(folder)
    config = config_of(record.command, record.settings, flags)
    make_writable(out.parent)
    findings = check_health(record)
    for finding in findings:
        print(printable(f"{WORDS[finding.state]:12}  {finding.name}: {finding.sentence}"))
    with tempfile.TemporaryDirectory() as made:
        sections = measure(folder, config, "data" in flags, Path(made))
        name = f"{folder.resolve().name}: {record.command}"
        content = run_page(record, name, findings, sections, Path(made))
    try:
        atomic_write(out, content.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None
    print(f"\n{out} written")


def config_of(command: str, settings: dict[str, Any], flags: dict[str, Any]) -> configuration.Config:
    """Return the configuration of a run with the settings that the user gave.

    Settings that do not exist today are not used. Nor is the permission to read videos outside of the data folder,
    because the run's folder may come from anywhere. Raises UserError for a value outside its bounds.
    """
    known = {f.name for group in configuration.groups(command).values() for f in dataclasses.fields(group)}
    used = {name: value for name, value in settings.items() if name in known and name != "allow_outside"}
    return configuration.make_config(command, {**used, **flags})


def measure(folder: Path, config: configuration.Config, data_given: bool, pictures: Path) -> list["Html"]:
    """Return the sections of the page that need the weights and the data set of a run.

    Args:
        data_given: the user has named the data set.
        pictures: a folder for temporary files.
    """
    from dclr.data.datasets import make_demo
    from dclr.evaluation.run_sections import Measured
    from dclr.methods import METHODS

    source, missing = config.data.data, ""
    if not source:
        make_demo()
    elif not data_given and configuration.is_url(source):
        missing = f"the run was trained on {source}, and a server is only contacted if --data names it"
    elif not data_given and not os.path.exists(source):
        missing = f"the run was trained on {source}, which is not there; --data names it at another place"
    with connected_ranks() as device:
        measured = Measured(folder, config.data, config.model, config.run.seed, device, pictures, missing)
        if not isinstance(config, configuration.PretrainConfig):
            return [measured.accuracy()]
        same_frames = METHODS[config.method.method].same_frames
        return [measured.views(config, same_frames), measured.neighbours(), measured.motion_and_scene()]
