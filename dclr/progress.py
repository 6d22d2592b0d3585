"""Progress bars. Without a terminal, such as in a log file, a line every ten seconds takes the place of a bar.

Nothing here raises OSError: a closed pipe or a full disk behind stdout must not end a run.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TextIO
from weakref import WeakSet

from tqdm import tqdm

from dclr.errors import UserError

INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""


_on_terminal: WeakSet[tqdm] = WeakSet()
"""The bars that stand on a terminal now."""


class SafeFile:
    """A text file whose `write` and `flush` raise no error.

    The file may be closed, its disk may be full, and its encoding may lack a character.

    Attributes:
        error: the first error; None if everything was written.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.error: OSError | ValueError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._recording():
            try:
                self._file.write(text)
            except UnicodeEncodeError:
                encoding = self._file.encoding
                self._file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._recording():
            self._file.flush()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self.error = self.error or error


def protect_output() -> None:
    """Make every later `print` of this process, also of other packages, survive the end of its terminal or pipe."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # it was closed (`>&-`), and the next file to be opened would get what C code prints
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if (file := getattr(sys, name)) is not None and not isinstance(file, SafeFile):
            setattr(sys, name, SafeFile(file))


def check_output() -> None:
    """Raise UserError if a part of the standard output could not be written. Call this where the output is the result.

    A reader that stops early, such as `head`, is not an error.
    """
    if isinstance(sys.stdout, SafeFile):
        sys.stdout.flush()
        error = sys.stdout.error
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"the standard output is incomplete ({error.strerror}): write it to another place")


def write_line(message: str, file: TextIO | None) -> None:
    """Write a line to stdout or stderr, above the progress bar if there is one. None, a closed stdout, is ignored."""
    if file is None:
        return
    # tqdm.write would flush sys.stdout itself, which raises OSError.
    for bar in _on_terminal:
        bar.clear()
    safe = SafeFile(file)
    safe.write(f"{message}\n")
    safe.flush()
    for bar in _on_terminal:
        bar.refresh()


class ProgressBar:
    """The progress of a task of `total` units.

    On a terminal this is a tqdm bar. Elsewhere it is a line every INTERVAL seconds and a last line, such as
    "verifying videos: 120 of 1,400 (9 %), 31/s, 0:41 left".
    """

    def __init__(
        self, total: int, title: str, unit: str, *, start: int = 0, shown: bool = True, file: TextIO | None = None
    ) -> None:
        """`start`: units that were done before. `shown`: False for no output. `file`: by default sys.stderr."""
        file = sys.stderr if file is None else file
        self.total, self.count = total, start
        self._title, self._start, self._values = title, start, dict[str, str]()
        self._file = file if shown and file is not None else None
        self._began = self._written = time.monotonic()
        self._count_written = start
        self._bar: tqdm | None = None
        if self._file is not None and is_terminal(self._file):
            self._bar = tqdm(
                total=total,
                initial=start,
                desc=title,
                unit=unit,
                unit_scale=total >= 100_000,
                dynamic_ncols=True,
                mininterval=1.0,
                file=SafeFile(self._file),
            )
            _on_terminal.add(self._bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units. While nothing finishes, call this with 0, so that lines are still written."""
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._written >= INTERVAL:
            self._write_line()

    def show(self, values: Mapping[str, str]) -> None:
        """Show these values (name -> text) next to the progress, from its next update on."""
        self._values = dict(values)
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Leave the last state of the bar on the terminal, or write a last line if there is something new."""
        if self._bar is not None:
            _on_terminal.discard(self._bar)
            self._bar.close()
        elif self.count != self._count_written:
            self._write_line()

    def _write_line(self) -> None:
        self._written, self._count_written = time.monotonic(), self.count
        seconds = self._written - self._began
        values = "".join(f", {name} {value}" for name, value in self._values.items())
        write_line(f"{self._title}: {describe(self.count, self.total, self._start, seconds)}{values}", self._file)


def describe(count: int, total: int, start: int, seconds: float) -> str:
    """Return the progress in words.

    Args:
        count: units that are done, of `total`. They include the `start` units that were done before.
        seconds: time that the other units took.
    """
    text = f"{count:,} of {total:,} ({100 * count // max(total, 1)} %)"
    rate = (count - start) / seconds if seconds else 0.0
    if rate == 0:
        return text
    speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
    left = f", {tqdm.format_interval((total - count) / rate)} left" if count < total else ""
    return f"{text}, {speed}{left}"


def is_terminal(file: TextIO) -> bool:
    """Return True if `file` is a terminal. A closed file is not a terminal."""
    try:
        return file.isatty()
    except (OSError, ValueError):
        return False
