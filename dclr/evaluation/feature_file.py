"""Files of features: a table with a row for each video or each clip, as .parquet, .npz or .safetensors.

The columns have the same names in all formats: path, label, group, split, with clips also clip, and one column for each
kind of embedding. A video without a label has an empty label in .npz and .safetensors, and a null in .parquet. What
belongs to the whole table is JSON under the name dclr: in the metadata of .parquet and .safetensors, and as an array of
one string in .npz. No format needs pickle.

Letters: N rows, D numbers of an embedding.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dclr.data.string_array import pack_strings, unpack_strings
from dclr.errors import UserError, first_line
from dclr.files import atomic_file

VERSION = 1
"""Version of the format: raise it when the meaning of a column or of the metadata changes."""

SUFFIXES = (".parquet", ".npz", ".safetensors")

METADATA = "dclr"
"""The name of the JSON text that holds what belongs to the whole table."""

STRINGS = ("path", "label", "group", "split")
"""The columns of strings."""

ROWS_A_GROUP = 10_000
"""Rows that a reader of a parquet file holds in memory at a time."""


@dataclass(frozen=True)
class FeatureTable:
    """The embeddings of N videos or clips, in the order of the catalog."""

    paths: list[str]
    """Relative to `root`."""
    labels: list[str | None]
    """Names of classes; None: unlabelled."""
    groups: list[str]
    """The film or scene that a video was cut from; empty if the data set does not say."""
    splits: list[str]
    """train, val or test."""
    clips: np.ndarray | None
    """(N,) int64, the number of the clip in its video, from 0. None if a row is a whole video."""
    embeddings: dict[str, np.ndarray]
    """Kind ("pooled", "motion", "scene") -> (N, D) float32 or float16."""
    skipped: dict[str, str]
    """Path -> reason, of the videos that have no row."""
    root: str
    """The folder that paths start from."""
    fingerprint: str
    """Identifies the weights that the embeddings are from. See `weights_fingerprint` in features.py."""
    description: str = ""
    """One line: the weights that the embeddings are from."""
    clip_format: dict[str, Any] = field(default_factory=dict)
    """How clips were read: length, stride, crop, mean and std (see ClipFormat), and clips, their number per video."""


def check_suffix(path: Path) -> None:
    """Raise UserError if no file of features has this suffix, or if the package that writes it is missing."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a file of features ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.suffix == ".parquet":
        _pyarrow(path)


def parts_folder(out: Path) -> Path:
    """Return the folder of the finished parts of a file of features, see feature_parts.py."""
    return out.with_name(f"{out.name}.parts")


def check_out(out: Path) -> None:
    """Raise UserError if a file of features cannot be written to `out`, or if it exists."""
    check_suffix(out)
    if out.exists():
        left = f", and {parts_folder(out)} is left over from writing it" if parts_folder(out).exists() else ""
        raise UserError(f"--out {out} exists{left}: delete it, or give another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")


def _pyarrow(path: Path) -> ModuleType:
    """Return pyarrow.parquet. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow: pip install 'dclr[parquet]', or give a name that ends in .npz or .safetensors"
        ) from None
    return pyarrow.parquet


# ---------------------------------------------------------------- writing


def write_features(table: FeatureTable, path: Path) -> None:
    """Write a table in the format of the suffix. The write is atomic.

    Raises:
        UserError: the suffix is unknown, a package is missing, or the file cannot be written.
    """
    check_suffix(path)
    # JSON escapes the bytes of a file name that are not UTF-8, so they come back unchanged.
    metadata = {
        "version": VERSION,
        **{name: getattr(table, name) for name in ("root", "fingerprint", "description", "clip_format")},
        "kinds": list(table.embeddings),
        "skipped": table.skipped,
    }
    write = {".parquet": _write_parquet, ".npz": _write_npz, ".safetensors": _write_safetensors}[path.suffix]
    try:
        with atomic_file(path) as aside:
            write(table, metadata, aside)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _strings(table: FeatureTable) -> dict[str, list[str]]:
    """Return the columns of strings. A missing label is empty."""
    labels = [label or "" for label in table.labels]
    return dict(zip(STRINGS, (table.paths, labels, table.groups, table.splits), strict=True))


def _numbers(table: FeatureTable) -> dict[str, np.ndarray]:
    """Return the columns of numbers: the numbers of the clips, if rows are clips, and the embeddings."""
    return {**({} if table.clips is None else {"clip": table.clips}), **table.embeddings}


def _write_npz(table: FeatureTable, metadata: dict[str, Any], aside: Path) -> None:
    columns: dict[str, Any] = {METADATA: np.array(json.dumps(metadata)), **_numbers(table)}
    columns |= {name: np.array(column, dtype=np.str_) for name, column in _strings(table).items()}
    with aside.open("wb") as file:
        np.savez(file, **columns)


def _write_safetensors(table: FeatureTable, metadata: dict[str, Any], aside: Path) -> None:
    from safetensors.numpy import save_file

    # The header of a safetensors file may have 100 MB, which the paths of a million videos would fill.
    skipped = metadata.pop("skipped")
    columns = {**_strings(table), "skipped": list(skipped), "reason": list(skipped.values())}
    tensors = {name: pack_strings(column) for name, column in columns.items()}
    numbers = {name: np.ascontiguousarray(column) for name, column in _numbers(table).items()}
    save_file({**tensors, **numbers}, aside, metadata={METADATA: json.dumps(metadata)})


def _write_parquet(table: FeatureTable, metadata: dict[str, Any], aside: Path) -> None:
    import pyarrow

    # Parquet's strings are UTF-8. The metadata has the paths whose bytes are not.
    strings = {name: [as_utf8(value) for value in column] for name, column in _strings(table).items()}
    metadata["other_bytes"] = {
        name: {row: value for row, value in enumerate(column) if value != strings[name][row]}
        for name, column in _strings(table).items()
    }
    columns = {name: pyarrow.array(column, pyarrow.string()) for name, column in strings.items()}
    columns["label"] = pyarrow.array([label or None for label in strings["label"]], pyarrow.string())
    for name, numbers in _numbers(table).items():
        values = pyarrow.array(np.ascontiguousarray(numbers).reshape(-1))
        fixed = numbers.ndim == 2
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, numbers.shape[1]) if fixed else values
    made = pyarrow.table(columns).replace_schema_metadata({METADATA: json.dumps(metadata)})
    # Dictionaries make strings that repeat small, and embeddings only slower to write.
    _pyarrow(aside).write_table(made, aside, use_dictionary=list(STRINGS), row_group_size=ROWS_A_GROUP)


def as_utf8(text: str) -> str:
    r"""Return a string with its bytes that are not UTF-8 written as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- reading


def read_features(path: Path) -> FeatureTable:
    """Read a table that `write_features` wrote.

    Raises:
        UserError: the file does not exist, a package is missing, or the file is not a file of features.
    """
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}; write it with eval.py features")
    if path.suffix == ".parquet":
        _pyarrow(path)
    read = {".parquet": _read_parquet, ".npz": _read_npz, ".safetensors": _read_safetensors}[path.suffix]
    try:
        table = read(path)
        _check(table)
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None
    except Exception as error:  # readers raise many kinds of errors on a damaged or foreign file
        reason = first_line(error)
        raise UserError(f"{path} is not a file of features, as eval.py features writes it: {reason}") from None
    return table


def _check(table: FeatureTable) -> None:
    """Raise ValueError unless all columns have the same number of rows."""
    columns: list[Any] = [table.labels, table.groups, table.splits, *table.embeddings.values()]
    columns += [] if table.clips is None else [table.clips]
    if not table.embeddings or any(len(column) != len(table.paths) for column in columns):
        raise ValueError("its columns have different lengths, or it holds no embeddings")
    if any(column.ndim != 2 or column.dtype.kind != "f" for column in table.embeddings.values()):
        raise ValueError("its embeddings are not rows of numbers")


def _table(
    metadata: dict[str, Any], strings: dict[str, list[str]], numbers: dict[str, np.ndarray], skipped: dict[str, str]
) -> FeatureTable:
    """Return the table of these columns."""
    if metadata["version"] != VERSION:
        raise ValueError(f"it has version {metadata['version']} of the format, and this program reads {VERSION}")
    return FeatureTable(
        paths=strings["path"],
        labels=[label or None for label in strings["label"]],
        groups=strings["group"],
        splits=strings["split"],
        clips=numbers.get("clip"),
        embeddings={kind: numbers[kind] for kind in metadata["kinds"]},
        skipped=skipped,
        **{name: metadata[name] for name in ("root", "fingerprint", "description", "clip_format")},
    )


def _read_npz(path: Path) -> FeatureTable:
    with np.load(path, allow_pickle=False) as file:
        metadata = json.loads(file[METADATA].item())
        strings = {name: file[name].tolist() for name in STRINGS}
        numbers = {name: file[name] for name in file.files if name not in (METADATA, *STRINGS)}
    return _table(metadata, strings, numbers, metadata["skipped"])


def _read_safetensors(path: Path) -> FeatureTable:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = json.loads(file.metadata()[METADATA])
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    strings = {name: unpack_strings(columns.pop(name)) for name in (*STRINGS, "skipped", "reason")}
    skipped = dict(zip(strings["skipped"], strings["reason"], strict=True))
    return _table(metadata, strings, columns, skipped)


def _read_parquet(path: Path) -> FeatureTable:
    read = _pyarrow(path).read_table(path)
    metadata = json.loads(read.schema.metadata[METADATA.encode()])
    strings = {name: [value or "" for value in read.column(name).to_pylist()] for name in STRINGS}
    for name, values in metadata["other_bytes"].items():
        for row, value in values.items():
            strings[name][int(row)] = value
    numbers = {}
    for name in read.column_names:
        if name not in STRINGS:
            column = read.column(name).combine_chunks()
            size = None if name == "clip" else column.type.list_size
            values = column if size is None else column.flatten()
            numbers[name] = values.to_numpy(zero_copy_only=False).reshape(-1, *([] if size is None else [size]))
    return _table(metadata, strings, numbers, metadata["skipped"])
