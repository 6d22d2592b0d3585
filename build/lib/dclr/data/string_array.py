"""Lists of strings as one uint8 array, for files of arrays and for memory that worker processes share.

NumPy's own arrays of strings take 4 bytes for each letter of the longest string, in every entry.
"""

from collections.abc import Iterable

import numpy as np


def pack_strings(strings: Iterable[str]) -> np.ndarray:
    """Return the strings as UTF-8 in one uint8 array, each followed by a null character.

    Bytes of a file name that are not UTF-8 are kept (surrogateescape). No string may contain a null character.
    """
    text = "".join(f"{string}\0" for string in strings)
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)


def unpack_strings(packed: np.ndarray) -> list[str]:
    """Return the strings that `pack_strings` was given."""
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


class StringArray:
    """Strings in one uint8 array, read one at a time by index.

    Attributes:
        packed: uint8, the strings as `pack_strings` returns them.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.packed = pack_strings(strings)
        self._starts = np.append(0, np.flatnonzero(self.packed == 0) + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        (string,) = unpack_strings(self.packed[self._starts[index] : self._starts[index + 1]])
        return string
