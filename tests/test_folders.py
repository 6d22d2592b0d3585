"""Every file and folder of a data set is used or counted by a reason, in check, at the start and in report.json."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dclr.data import store
from dclr.data.catalog import (
    Catalog,
    Video,
    catalog_arrays,
    describe_reading,
    describe_warnings,
    make_catalog,
    reading_entry,
)
from dclr.data.check import describe_catalog
from dclr.data.datasets import open_catalog
from dclr.data.string_array import pack_strings
from dclr.errors import UserError


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


# ---------------------------------------------------------------- what a catalog says


def read_oddly(root: Path) -> Catalog:
    """Return a catalog with each kind of line about how it was read."""
    touch(root, "a/1.mp4")
    return make_catalog(
        root,
        "class folders",
        ("a",),
        {"train": [Video(path="a/1.mp4", label=0)]},
        recognised=["the first folder is the class"],
        unused={"no video": [f"{number}.txt" for number in range(7)], "hidden": [".x\n.mp4"]},
        warnings=["class b\x1b[2J has no training videos"],
    )


def test_lines_and_report_name_the_first_files_of_each_reason(tmp_path: Path) -> None:
    catalog = read_oddly(tmp_path)
    assert describe_reading(catalog) == [
        "recognised: the first folder is the class",
        "not used, no video: 7 (0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more)",
        "not used, hidden: 1 (.x\\n.mp4)",
    ]
    assert describe_warnings(catalog) == ["warning: class b\\x1b[2J has no training videos"]
    assert reading_entry(catalog) == {
        "recognised": ["the first folder is the class"],
        "unused": {
            "no video": {"count": 7, "first": ["0.txt", "1.txt", "2.txt", "3.txt", "4.txt"]},
            "hidden": {"count": 1, "first": [".x\n.mp4"]},
        },
        "warnings": ["class b\x1b[2J has no training videos"],
    }


def test_a_class_name_cannot_break_the_table_of_check(tmp_path: Path) -> None:
    catalog = replace(read_oddly(tmp_path), classes=("new\nline",))
    assert all("\n" not in line for line in describe_catalog(catalog))
    assert any("new\\nline" in line for line in describe_catalog(catalog))


def pack_lists(catalog: Catalog, folder: Path, leave_out: tuple[str, ...] = (), **changed: np.ndarray) -> Path:
    """Write the index of a packed store with this catalog and no readable video."""
    folder.mkdir()
    lists = {name: array for name, array in catalog_arrays({1: catalog}).items() if name not in leave_out}
    nothing = np.zeros(1, np.int64)
    index = {
        "version": np.array(store.VERSION),
        "compact": np.array(True),
        "short_side": np.array(128),
        "source": pack_strings(["videos"]),
        **lists,
        "reasons": pack_strings(["not packed"]),
        "stamps": np.zeros((1, 2), np.int64),
        **dict.fromkeys(("frames", "heights", "widths", "sizes", "offsets"), nothing),
        "shards": nothing - 1,
        "crc32": nothing.astype(np.uint32),
        "bt709": nothing.astype(bool),
        "full_range": nothing.astype(bool),
        **changed,
    }
    store.save_arrays(folder / store.INDEX, index)
    return folder


def test_a_store_says_how_its_videos_were_read(tmp_path: Path) -> None:
    catalog = read_oddly(tmp_path / "data")
    packed = open_catalog(pack_lists(catalog, tmp_path / "store"))
    assert describe_reading(packed) == describe_reading(catalog)
    assert describe_warnings(packed) == describe_warnings(catalog)


def test_a_store_of_an_older_version_says_nothing(tmp_path: Path) -> None:
    catalog = read_oddly(tmp_path / "data")
    packed = open_catalog(pack_lists(catalog, tmp_path / "store", leave_out=store.READING))
    assert (packed.recognised, packed.unused, packed.warnings) == ((), {}, ())


@pytest.mark.parametrize("name", store.READING)
def test_a_damaged_array_of_the_reading_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = pack_lists(read_oddly(tmp_path / "data"), tmp_path / "store", **{name: np.ones(5, np.uint32)})
    with pytest.raises(UserError, match=f"{store.INDEX} cannot be used: {name} must be"):
        open_catalog(folder)
