"""Texts as one array, for files of arrays: numpy's own arrays of strings take 4 bytes a letter of the longest for each."""

from collections.abc import Iterable

import numpy as np


def packed(texts: Iterable[str]) -> np.ndarray:
    """uint8. Bytes that are not UTF-8 survive as they do in file names; no text may hold a null character."""
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def unpacked(texts: np.ndarray) -> list[str]:
    """What `packed` was given."""
    return texts.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
