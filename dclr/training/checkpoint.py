"""Checkpoints on disk. Each is one safetensors file that is either complete or not there.

    RUN/checkpoints/step-0000120.safetensors    tensors by name. The file's metadata hold the run's state as JSON, and
                                                the description of the network: evaluation and --pretrained read it too
    RUN/checkpoints/unfinished                  a file that is being written, or that a kill has left; nobody reads it

A file gets its name by a rename, after all of its bytes are on the disk. A kill or a power failure leaves the rename
done or not done. So the newest checkpoint is the one with the highest number, and no pointer to it can be out of date.
DeepSpeed's own checkpoints are several pickles and a file `latest`, written in place and without a barrier: a kill can
leave `latest` naming an incomplete checkpoint.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dclr import distributed
from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.lock import check_lock
from dclr.models.weights import CHECKPOINT_FORMAT, checkpoints_in, step_of

KEPT = 2
"""Number of newest checkpoints that are kept, in addition to the one with the lowest loss."""

UNFINISHED = "unfinished"


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in `folder`, or None if there is none or no such folder."""
    complete = checkpoints_in(folder)
    return complete[-1] if complete else None


def newest_for_all(folder: Path) -> Path | None:
    """Return the checkpoint that `newest` finds on rank 0, on every rank.

    On a network file system, two processes may see different files for some seconds.
    """
    return distributed.on_rank_zero(lambda: newest(folder))


def write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    description: dict[str, str] | None = None,
) -> Path:
    """Write the checkpoint of a step, then delete checkpoints that are neither among the newest nor the best.

    Args:
        state: anything that JSON can hold. The best checkpoint has the lowest state["loss"]. None stands for no loss.
        description: metadata that tell a reader how to use the weights. See models/weights.py.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written. Earlier checkpoints are intact.
        UserError: another process has taken the run's folder over (lock.py). Nothing is written.
    """
    run = folder.parent
    check_lock(run)
    # Without parents: if the run's folder has vanished, it must not come back with a checkpoint as its only content.
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:07d}.safetensors"
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**(description or {}), "format": CHECKPOINT_FORMAT, "state": json.dumps({**state, "step": step})}
    unfinished = folder / UNFINISHED
    # A process that was suspended while it wrote may still have the old file open. It must not write into this one.
    unfinished.unlink(missing_ok=True)
    atomic_write(path, save(content, metadata), unfinished, before_rename=lambda: check_lock(run))
    _delete_old(folder)
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors by name, on the CPU, and its state, which includes `step`. Nothing is unpickled.

    Raises:
        UserError: the file cannot be read, is damaged or has another format. The message names the previous
            checkpoint, if there is one.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            state = _state(opened.metadata())
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        earlier = [other for other in checkpoints_in(path.parent) if step_of(other) < step_of(path)]
        remedy = (
            f"delete it, and --resume continues from {max(earlier, key=step_of).name}"
            if earlier
            else "start another run"
        )
        raise UserError(f"--resume: {path} is not a readable checkpoint ({reason}): {remedy}") from None
    return tensors, state


def _state(metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or metadata.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"its format is not {CHECKPOINT_FORMAT!r}")
    state = json.loads(metadata.get("state", ""))
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or state["step"] < 0:
        raise ValueError("its state names no step")
    return state


def _delete_old(folder: Path) -> None:
    every = checkpoints_in(folder)
    losses = {path: loss for path in every if (loss := _loss(path)) is not None}
    best = min(losses, key=lambda path: losses[path], default=None)
    for path in every[:-KEPT]:
        if path != best:
            path.unlink(missing_ok=True)


def _loss(path: Path) -> float | None:
    """Return the loss that `write` stored; None also for an unreadable file, which is kept only among the newest."""
    try:
        with safe_open(path, framework="pt") as opened:
            loss = _state(opened.metadata()).get("loss")
    except (OSError, SafetensorError, ValueError, RecursionError):
        return None
    return loss if isinstance(loss, float) else None
