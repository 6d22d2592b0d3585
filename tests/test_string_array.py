"""Lists of strings as one array: every string comes back, also names that are not UTF-8."""

import os

import pytest

from dclr.data.string_array import StringArray, pack_strings, unpack_strings

STRINGS = ["a", "", "ß/é.mp4", os.fsdecode(b"not \xff utf-8.avi"), "x" * 300]


@pytest.mark.parametrize("strings", [STRINGS, [], [""]])
def test_strings_come_back(strings: list[str]) -> None:
    assert unpack_strings(pack_strings(strings)) == strings
    array = StringArray(strings)
    assert len(array) == len(strings)
    assert [array[index] for index in range(len(array))] == strings
    assert unpack_strings(array.packed) == strings
