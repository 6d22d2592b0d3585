"""What must be the same on every machine of a run: dclr, its packages, the kind of device, the settings, the videos.

A run whose machines differ would not fail by itself. Its results would be different, or its ranks would wait for each
other for ever. So the ranks compare what they run with before they train. A difference ends all of them with one line.
"""

import hashlib
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dclr
from dclr import distributed, programs, report
from dclr.config import PATHS, Config, flag_of, flat, show
from dclr.errors import UserError
from dclr.training import engine
from dclr.training.connection import Peer

SOURCES = "dclr's sources"

NOT_COMPARED = ("commit", "GPU", "GPU identity")
"""Entries of `describe_machine` that may differ between machines."""

OF_ITS_MACHINE = {*PATHS, "workers"}
"""Settings that may differ between machines. What the paths lead to is compared (videos and --ds_config), or sent from
rank 0 to the others (weights)."""


def describe_machine() -> dict[str, str]:
    """Return what the other ranks must know of this rank's machine. `check_machines` compares it.

    It chooses the device of this process (engine.choose_device). If that GPU is missing, the entry "problem" says
    so to the other ranks, so that they do not wait for this rank.
    """
    try:
        device = engine.choose_device()
    except UserError as error:
        return {"problem": str(error)}
    entries = {
        SOURCES: digest_of_sources(),
        "commit": report.git_commit(),
        "Python": platform.python_version(),
        **report.package_versions(),
        "device": "a GPU" if device.type == "cuda" else "no GPU",
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        entries |= {"GPU": found.name, "GPU identity": str(found.uuid)}
    return entries


def digest_of_sources() -> str:
    """Return a digest of the files of the package dclr and of the user's own program, if there is one.

    The commit alone would not show files that were changed after it, and an installed package has no commit.
    """
    package = Path(dclr.__file__).parent
    files = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    named = {str(file.relative_to(package)): file for file in files if file.suffix in (".py", ".json")}
    own = programs.own_program()
    if own and os.path.isfile(own):  # not with python -c
        named["own program"] = Path(own)
    digest = hashlib.sha256()
    for name, file in sorted(named.items()):
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:10]


def check_machines(peers: list[Peer]) -> list[str]:
    """Compare the machines of all ranks (Heartbeat.peers).

    Returns:
        lines of warnings, the same on all ranks.

    Raises:
        UserError: a rank has no device, two ranks have one GPU, a machine runs other code or other packages, or the
            ranks of a machine do not follow each other (opening.py and sharing.py rely on it).
    """
    for number, peer in enumerate(peers):
        if "problem" in peer.about:
            raise UserError(peer.about["problem"])
        for name in {**peers[0].about, **peer.about}:
            here, there = (each.about.get(name, "unknown") for each in (peer, peers[0]))
            if name not in NOT_COMPARED and here != there:
                raise UserError(_difference(name, number, peer, peers[0]))
    newest: dict[str, int] = {}
    for number, peer in enumerate(peers):
        if newest.setdefault(peer.machine, number) < number - 1:
            raise UserError(
                f"{peer.host} has rank {newest[peer.machine]} and rank {number}, but other machines have the ranks "
                "between them: give each machine ranks that follow each other, srun --distribution=block or "
                "mpirun --map-by slot"
            )
        newest[peer.machine] = number
    owners: dict[tuple[str, str], int] = {}
    for number, peer in enumerate(peers):
        gpu = peer.about.get("GPU identity")
        first = owners.setdefault((peer.machine, gpu), number) if gpu else number
        if first != number:
            raise UserError(
                f"ranks {first} and {number} on {peer.host} use the same GPU: start at most one process for each GPU, "
                "and let CUDA_VISIBLE_DEVICES name other GPUs for each process, or all GPUs for every process"
            )
    gpus = {peer.about["GPU"]: peer.host for peer in peers if "GPU" in peer.about}
    if len(gpus) < 2:
        return []
    found = ", ".join(f"{gpu} ({host})" for gpu, host in gpus.items())
    return [f"the machines have different GPUs: {found}: each step waits for the slowest one"]


def _difference(name: str, number: int, peer: Peer, first: Peer) -> str:
    """Return the error for an entry in which a rank differs from rank 0."""
    here, there = (each.about.get(name, "unknown") for each in (peer, first))
    remedy = "install the same versions on every machine: pip install -c constraints.txt, or one shared environment"
    if name == SOURCES:
        here, there = (
            f"{each.about.get(name, 'unknown')} of commit {each.about.get('commit', 'unknown')}"
            for each in (peer, first)
        )
        remedy = "update all copies of dclr to one commit, or use one copy on a shared disk"
    elif name == "device":
        remedy = (
            "on the machine without a GPU, nvidia-smi shows whether the driver works, and python -m "
            "torch.utils.collect_env shows whether torch finds it"
        )
    return f"{name}: {here} on rank {number} on {peer.host}, but {there} on rank 0 on {first.host}: {remedy}"


def check_same(entries: Mapping[str, Any], remedy: str) -> None:
    """Compare values by name on all connected ranks. All ranks must call this with the same names.

    Raises:
        UserError: on all ranks, a value differs. The error names both machines, and ends with `remedy`.
    """
    if distributed.world_size() == 1:
        return
    everyone = distributed.gather_objects((socket.gethostname(), dict(entries)))
    host, first = everyone[0]
    for number, (other_host, other) in enumerate(everyone):
        for name in {**first, **other}:
            here, there = (each.get(name, "absent") for each in (other, first))
            if here != there:
                raise UserError(
                    f"{name}: {show(here)} on rank {number} on {other_host}, but {show(there)} on rank 0 on {host}: "
                    f"{remedy}"
                )


def check_settings(command: str, preset: str, config: Config, folder: Path | None) -> None:
    """Compare the settings of all ranks. `folder`: the run to continue, None for a new one.

    Raises:
        UserError: on all ranks, a setting differs.
    """
    check_same(
        {"run to continue": str(folder) if folder else "none"},
        "the folder of the run must be on a disk that all machines share",
    )
    settings = {flag_of(name): value for name, value in flat(config).items() if name not in OF_ITS_MACHINE}
    check_same(
        {"command": command, "--preset": preset, **settings}, "start the ranks of all machines with the same command"
    )
