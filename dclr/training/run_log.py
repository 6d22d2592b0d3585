"""The log of a training run: progress bar, TensorBoard and metrics.jsonl."""

import json
import math
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.lock import writing_to_run
from dclr.progress import ProgressBar
from dclr.report import json_numbers


class RunLog:
    """Writer of a run's metrics to the progress bar, to TensorBoard and to metrics.jsonl. Only rank 0 has one.

    A resumed run repeats the steps after its checkpoint, `start_step`. Their old values are dropped from both files.

    Every method that writes raises UserError if the folder cannot be written, or if another process has taken it over.
    """

    def __init__(self, folder: Path, title: str, total_steps: int, start_step: int = 0) -> None:
        self._folder, self._lines = folder, folder / "metrics.jsonl"
        with writing_to_run(self._folder):
            kept = []
            if self._lines.exists():
                kept = [
                    line for line in self._lines.read_text(errors="replace").splitlines() if _step(line) <= start_step
                ]
            atomic_write(self._lines, "".join(line + "\n" for line in kept).encode())
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = ProgressBar(total_steps, title, "step", start=start_step, file=sys.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the log. After an error of the run, an error of closing is ignored: it may only be a consequence."""
        with suppress(UserError) if kind else nullcontext():
            self.close()

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.advance()

    def write(self, step: int, metrics: dict[str, float], shown: dict[str, str]) -> None:
        """Write all `metrics` to the files, and show the texts `shown` on the progress bar."""
        with writing_to_run(self._folder):
            with self._lines.open("a") as file:
                file.write(json.dumps({"step": step, **json_numbers(metrics)}) + "\n")
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        self._bar.show(shown)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Write an image, (H, W, 3) uint8, to TensorBoard."""
        with writing_to_run(self._folder):
            self._board.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Write the values that TensorBoard still holds in a queue. Call this before a checkpoint.

        A resumed run does not repeat the steps before its checkpoint, so their values must be in the file by then.
        """
        with writing_to_run(self._folder):
            self._board.flush()

    def close(self) -> None:
        """Close the progress bar and the files."""
        self._bar.close()
        with writing_to_run(self._folder):
            self._board.close()


def _step(line: str) -> float:
    """Return the step number of a metrics.jsonl line, or infinity for an incomplete or invalid line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf
