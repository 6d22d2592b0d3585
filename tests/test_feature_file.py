"""Files of features: what is written is read, and other files are refused."""

import builtins
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY

from dclr.errors import UserError
from dclr.evaluation.feature_file import SUFFIXES, FeatureTable, read_features, write_features


def table(rows: int = 3, dtype: type = np.float32, clips: bool = False) -> FeatureTable:
    rng = np.random.default_rng(0)
    return FeatureTable(
        paths=["a/1.mp4", "b/ü 2.avi", "caf\udce9.mp4"][:rows],
        labels=["a", None, None][:rows],
        groups=["film", "", ""][:rows],
        splits=["train", "test", "val"][:rows],
        clips=np.arange(rows) if clips else None,
        embeddings={
            "pooled": rng.normal(size=(rows, 6)).astype(dtype),
            "motion": rng.normal(size=(rows, 4)).astype(dtype),
        },
        skipped={"bad\udcff.mp4": "it holds no video stream"},
        root="/data",
        fingerprint="0123",
        description="run/backbone.safetensors: r3d_18",
        clip_format={"length": 16, "mean": [0.5, 0.5, 0.5]},
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("rows", "dtype", "clips"), [(3, np.float32, False), (3, np.float16, True), (0, np.float32, False)]
)
def test_a_table_is_read_as_it_was_written(tmp_path: Path, suffix: str, rows: int, dtype: type, clips: bool) -> None:
    written = table(rows, dtype, clips)
    path = tmp_path / f"features{suffix}"
    write_features(written, path)
    read = read_features(path)
    assert replace(read, embeddings={}, clips=None) == replace(written, embeddings={}, clips=None)
    assert (read.clips is None) == (written.clips is None)
    np.testing.assert_array_equal(read.clips, written.clips)
    assert list(read.embeddings) == list(written.embeddings)
    for kind, values in written.embeddings.items():
        assert read.embeddings[kind].dtype == dtype
        assert read.embeddings[kind].shape == values.shape
        np.testing.assert_array_equal(read.embeddings[kind], values)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_tools_read_the_columns(tmp_path: Path) -> None:
    import pyarrow.parquet
    from safetensors.numpy import load_file

    for suffix in SUFFIXES:
        write_features(table(), tmp_path / f"x{suffix}")
    columns = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert columns.column_names == ["path", "label", "group", "split", "pooled", "motion"]
    assert columns["label"].to_pylist() == ["a", None, None]
    assert columns["path"].to_pylist() == ["a/1.mp4", "b/ü 2.avi", "caf\\xe9.mp4"]
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["label"].tolist() == ["a", "", ""]
        assert file["pooled"].shape == (3, 6)
    assert load_file(tmp_path / "x.safetensors")["pooled"].shape == (3, 6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_foreign_or_cut_file_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(UserError, match=f"no such file: {path}"):
        read_features(path)
    write_features(table(), path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"x" * 100, b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path} is not a file of features"):
            read_features(path)


def test_files_of_other_tables_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not a file of features"):
        read_features(tmp_path / "x.npz")
    broken = replace(table(), labels=["a"])
    write_features(broken, tmp_path / "y.npz")
    with pytest.raises(UserError, match="different lengths"):
        read_features(tmp_path / "y.npz")


def test_a_suffix_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.csv: a file of features ends in .parquet, .npz or .safetensors"):
        write_features(table(), tmp_path / "x.csv")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'dclr\[parquet\]'"):
        write_features(table(), tmp_path / "x.parquet")


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_features(table(), tmp_path / "none" / "x.npz")


def test_the_examples_of_the_documentation_read_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "use.md").read_text()
    section = page.split("\n## ")[1]
    monkeypatch.chdir(tmp_path)
    written = table()
    for suffix, code in zip(SUFFIXES, re.findall(r"```python\n(.*?)```", section, re.S), strict=True):
        write_features(written, Path(f"features{suffix}"))
        names: dict[str, Any] = {}
        exec(code, names)
        np.testing.assert_array_equal(names["embeddings"], written.embeddings["pooled"])
        assert list(names["paths"])[:2] == written.paths[:2]
        assert names["about"]["fingerprint"] == "0123"
