"""Objects that the first rank of each machine makes and all ranks of the machine use, with one copy of their arrays."""

import mmap
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from dclr import distributed
from dclr.errors import UserError
from dclr.training import engine

T = TypeVar("T")

_ALIGNMENT = 64
"""Arrays begin at multiples of this number of bytes."""


def share_with_machine(value: T | None) -> T:
    """Return the value of the machine's first rank on all its ranks. The other ranks' values are not used.

    The arrays of the value are written to a temporary file, which all ranks of the machine map. So they are in memory
    once, and the system may free that memory while nobody reads them. A rank that changes an array changes its own.

    Raises:
        UserError: on all ranks, the temporary file cannot be written.
    """
    file = distributed.on_all_ranks(lambda: _write(value) if engine.local_rank() == 0 else None)
    files = distributed.gather_objects(file)
    try:
        return _read(Path(files[distributed.rank() - engine.local_rank()]))
    finally:
        distributed.gather_objects(None)  # all ranks have mapped the file
        if file is not None:
            os.unlink(file)


def _write(value: Any) -> str:
    """Write an object to a temporary file and return the file's name. Raises UserError."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    head = pickle.dumps((content, [len(array) for array in arrays]))
    try:
        descriptor, name = tempfile.mkstemp(prefix="dclr-")
        try:
            with open(descriptor, "wb") as file:
                parts: list[bytes | memoryview] = [len(head).to_bytes(8, "little"), head, *arrays]
                for part in parts:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    file.write(part)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write the list of videos to {tempfile.gettempdir()} ({error.strerror}): free disk space or set "
            "$TMPDIR to a folder that can be written"
        ) from error
    return name


def _read(file: Path) -> Any:
    """Return the object of a file of `_write`. Its arrays are mapped."""
    with file.open("rb") as opened:
        memory = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
    position = _ALIGNMENT
    length = int.from_bytes(memory[:8], "little")
    content, lengths = pickle.loads(memory[position : position + length])
    position += length
    buffers = []
    for length in lengths:
        position += -position % _ALIGNMENT
        buffers.append(memory[position : position + length])
        position += length
    return pickle.loads(content, buffers=buffers)
