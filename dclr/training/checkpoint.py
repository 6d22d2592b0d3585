"""Checkpoints on disk: one safetensors file each, that is complete or not there.

    RUN/checkpoints/step-0000120.safetensors    tensors by name, and the run's state as JSON in the file's metadata
    RUN/checkpoints/unfinished                  what is being written, or what a kill left of it; nobody reads it

A file gets its name only when every byte of it is on the disk, by a rename, which a kill or a loss of power does either wholly or not at
all. So the newest checkpoint is the one with the highest number: no pointer to it can be stale or torn. (DeepSpeed's own checkpoints are
several pickles and a file `latest`, written without a barrier and in place: a kill could leave it naming a torn one.)
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dclr.errors import UserError
from dclr.files import write_whole

KEPT = 2
"""The newest that are kept. The one of the lowest loss is kept beside them."""

UNFINISHED = "unfinished"

_FORMAT = "dclr checkpoint 1"
"""Raise the number when what is in the file changes."""

_NAME = re.compile(r"step-(\d{7,})\.safetensors")


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step under `folder`; None: there is none, or no such folder."""
    return max(_complete(folder), key=_step, default=None)


def write(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write step-N under `folder`, then delete those that are neither among the newest nor the best.

    `state` is anything that JSON holds; the best is the one of the lowest state["loss"] (None: it has no loss yet).
    Raises OSError; the checkpoints that were there are intact then.
    """
    folder.mkdir(
        exist_ok=True
    )  # not its parents: a run's folder that has vanished must not come back with nothing else in it
    path = folder / f"step-{step:07d}.safetensors"
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "state": json.dumps({**state, "step": step})}
    write_whole(path, save(content, metadata), aside=folder / UNFINISHED)
    _delete_old(folder)
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, on the CPU, and the state, with `step`. Nothing is unpickled.

    Raises UserError: the file cannot be read, is damaged, or is none of ours; it names the checkpoint before it where there is one.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            state = _state(opened.metadata())
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        earlier = [other for other in _complete(path.parent) if _step(other) < _step(path)]
        way_out = (
            f"delete it, and --resume goes on from {max(earlier, key=_step).name}" if earlier else "start another run"
        )
        raise UserError(f"--resume: {path} is no checkpoint that can be read ({reason}): {way_out}") from None
    return tensors, state


def _state(metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or metadata.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT!r}")
    state = json.loads(metadata.get("state", ""))
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or state["step"] < 0:
        raise ValueError("its state names no step")
    return state


def _complete(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _delete_old(folder: Path) -> None:
    every = sorted(_complete(folder), key=_step)
    losses = {path: loss for path in every if (loss := _loss(path)) is not None}
    best = min(losses, key=lambda path: losses[path], default=None)
    for path in every[:-KEPT]:
        if path != best:
            path.unlink(missing_ok=True)


def _loss(path: Path) -> float | None:
    """What `write` was told; None also for a file that cannot be read, which is kept only while it is among the newest."""
    try:
        with safe_open(path, framework="pt") as opened:
            return _state(opened.metadata()).get("loss")
    except (OSError, SafetensorError, ValueError):
        return None
