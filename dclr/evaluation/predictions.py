"""Predicted classes of videos with probabilities: `eval.py predict`, and the predictions.csv of `eval.py accuracy`.

The probabilities of a video are the softmax of the mean of the logits over its test clips. So the first class is the
one that `eval.py accuracy` compares with the label.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dclr.config import DataConfig
from dclr.data.catalog import Catalog
from dclr.data.given_videos import EVERYTHING, everything, splits_of
from dclr.data.samples import TestClips
from dclr.errors import UserError, printable
from dclr.evaluation.feature_file import as_utf8
from dclr.evaluation.feature_table import MISSING
from dclr.evaluation.features import mean_of_clips, open_split, run_on_samples
from dclr.files import atomic_file
from dclr.models import Classifier

SUFFIXES = (".csv", ".parquet")

NAME_COLUMN = 28
"""Characters of a class's name in the printed table."""


@dataclass(frozen=True)
class Predictions:
    """The predicted classes of N videos, and the videos that have none."""

    paths: list[str]
    """Relative to the root of the data set."""
    labels: list[str]
    """The class that the data set gives, which the classifier may not know. Empty: unlabelled."""
    splits: list[str]
    """train, val or test."""
    classes: tuple[str, ...]
    """Names of the classifier's classes."""
    logits: Tensor
    """(N, classes) float32, means over the test clips."""
    skipped: dict[str, str]
    """Path -> reason."""

    def best(self, top: int) -> list[list[tuple[str, float]]]:
        """Return, for each video, the `top` most probable classes with their probabilities, see `best_classes`."""
        return best_classes(self.logits, self.classes, top)


def best_classes(logits: Tensor, classes: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """Return, for each row of logits (N, classes), the `top` most probable classes with their probabilities.

    If there are fewer classes, all are returned. The order is that of the logits, because softmax can round unequal
    logits to equal probabilities.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
    probabilities = logits.double().softmax(1).gather(1, order)
    return [
        [(classes[index], probability) for index, probability in zip(*row, strict=True)]
        for row in zip(order.tolist(), probabilities.tolist(), strict=True)
    ]


def predict_videos(
    classifier: Classifier, classes: tuple[str, ...], catalog: Catalog, data: DataConfig, device: torch.device
) -> Predictions:
    """Predict the class of every video of all splits of a data set, each video once.

    Rank 0 gets the logits of all videos. On the other ranks, `logits` is empty.

    Raises:
        UserError: see open_split; no video can be read, or a logit is not finite.
    """
    listed, splits = everything(catalog), splits_of(catalog)
    videos = open_split(listed, EVERYTHING, data)
    missing = {video.path: MISSING for video in listed.missing.get(EVERYTHING, ())}
    classifier.to(device).eval()
    outputs = run_on_samples(classifier, TestClips(videos, data), device, "predict", mean_of_clips, "it is skipped")
    indices = outputs.indices.tolist()
    paths = [videos.path(index) for index in indices]
    labels = [name_of_label(catalog.classes, int(videos.labels[index])) for index in indices]
    skipped = {**videos.unreadable, **missing, **outputs.failures}
    return Predictions(paths, labels, [splits[path] for path in paths], classes, outputs.values[:, 0], skipped)


def name_of_label(classes: tuple[str, ...], label: int) -> str:
    """Return the name of a label, the empty string for an unlabelled video."""
    return classes[label] if label >= 0 else ""


# ---------------------------------------------------------------- files


def check_suffix(out: Path) -> None:
    """Raise UserError if no file of predictions has this suffix, or if the package that writes it is missing."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: its name must end in {' or '.join(SUFFIXES)}")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                f"--out {out} needs pyarrow: pip install 'dclr[parquet]', or give a name that ends in .csv"
            ) from None


def write_predictions(predictions: Predictions, out: Path, top: int) -> None:
    """Write a table with a row for each video: first the predicted videos, then the skipped ones. The write is atomic.

    One row a video, with the classes side by side, can be joined with other tables by its path. The columns are path,
    split, label, class_1, probability_1, class_2, ..., skipped. Text is UTF-8. A byte of a file name that is not UTF-8
    is written as \\xff.

    Raises:
        UserError: the suffix is unknown, a package is missing, or the file cannot be written.
    """
    check_suffix(out)
    top = min(top, len(predictions.classes))
    write = _write_csv if out.suffix == ".csv" else _write_parquet
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as aside:
            write(_columns(top), _rows(predictions, top), aside)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


Row = Mapping[str, str | float | None]


def _columns(top: int) -> list[str]:
    ranks = range(1, top + 1)
    return [
        "path",
        "split",
        "label",
        *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability")),
        "skipped",
    ]


def _rows(predictions: Predictions, top: int) -> Iterator[Row]:
    """Yield the row of each video, column -> value. A column without a value is None."""
    nothing: dict[str, str | float | None] = dict.fromkeys(_columns(top))
    described = zip(predictions.paths, predictions.splits, predictions.labels, predictions.best(top), strict=True)
    for path, split, label, best in described:
        row = {**nothing, "path": as_utf8(path), "split": split, "label": as_utf8(label) or None}
        for rank, (name, probability) in enumerate(best, start=1):
            row |= {f"class_{rank}": as_utf8(name), f"probability_{rank}": probability}
        yield row
    for path, reason in predictions.skipped.items():
        yield {**nothing, "path": as_utf8(path), "skipped": as_utf8(reason)}


def _write_csv(columns: list[str], rows: Iterator[Row], aside: Path) -> None:
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            # Six digits are more than the floating-point difference between machines.
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def _write_parquet(columns: list[str], rows: Iterator[Row], aside: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    types = {name: pyarrow.float64() if name.startswith("probability_") else pyarrow.string() for name in columns}
    table = pyarrow.Table.from_pylist(list(rows), schema=pyarrow.schema(types.items()))
    pyarrow.parquet.write_table(table, aside)


# ---------------------------------------------------------------- the terminal


def print_predictions(predictions: Predictions, top: int) -> None:
    """Print a line for each video with its classes and their probabilities, and a line for each skipped video."""
    for path, best in zip(predictions.paths, predictions.best(top), strict=True):
        print(printable(path))
        for name, probability in best:
            shown = printable(name)
            shown = shown if len(shown) <= NAME_COLUMN else shown[: NAME_COLUMN - 1] + "…"
            print(f"    {shown:{NAME_COLUMN}} {probability:6.1%}")
    for path, reason in predictions.skipped.items():
        print(f"{printable(path)}: skipped: {printable(reason)}")
