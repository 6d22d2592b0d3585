"""Pictures of an evaluation, written as files by matplotlib. Each `plot_*` function writes one picture."""

import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

# Files need no screen. A notebook keeps its own backend, which shows pictures in the page.
if not os.environ.get("MPLBACKEND", "").startswith("module://"):
    matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from dclr.errors import printable
from dclr.files import atomic_file

QUERY, RIGHT, WRONG, UNKNOWN = "black", "tab:green", "tab:red", "tab:gray"
"""The colours of the borders in the sheets of retrieval and search. UNKNOWN: the class of the query or of the video is
not known."""

SEARCH_COLUMNS = 5
"""Videos at the right of a query in a row of a search sheet."""

LEVELS = ("chance", "plateau", "loss_plateau", "ln_K_plus_1")
"""Log names, after the last "/", of reference values. Other curves are compared with them."""

CROP = "tab:orange"
"""The colour of the outline of a crop."""


@contextmanager
def _names_as_text() -> Iterator[None]:
    """Plot the names of classes and files as they are: a $ does not start a formula.

    A character that matplotlib's font lacks, such as a Chinese one, becomes a box without a warning.
    """
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@_names_as_text()
def plot_confusion_matrix(counts: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Plot numbers of videos, true class by predicted class. The colour shows the share of the true class's videos.

    Args:
        counts: (classes, classes) int. The numbers are printed in the cells if there are 20 classes or fewer.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.35 * len(classes), 24)
    figure, axes = plt.subplots(figsize=(side + 1.2, side))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = min(8, 50 * side / len(classes))  # 70 % of the height of a cell
    large = max(10, 0.7 * side)
    names = [_shortened(name, 2.5, size) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), names, fontsize=size)
    axes.set_xlabel("predicted class", fontsize=large)
    axes.set_ylabel("true class", fontsize=large)
    axes.set_title(_wrapped(title, side + 1.2, large), fontsize=large)
    if len(classes) <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's videos")
    _save(figure, path, dpi=110, bbox_inches="tight")


@_names_as_text()
def plot_search_sheet(
    blocks: Sequence[tuple[tuple[np.ndarray | None, str], Sequence[tuple[np.ndarray | None, str, str]]]],
    title: str,
    path: Path,
) -> None:
    """Plot queries at the left, each with its nearest videos at its right, SEARCH_COLUMNS a row.

    Args:
        blocks: for each query its frame and caption, then for each video found, nearest first, its frame, its caption
            and the colour of its border. Frames are (H, W, 3) uint8, or None for a video that cannot be read.
    """
    heights = [max(1, -(-len(nearest) // SEARCH_COLUMNS)) for _, nearest in blocks]
    columns = 1 + min(SEARCH_COLUMNS, max(1, *(len(nearest) for _, nearest in blocks)))
    figure, grid = _grid(sum(heights), columns, (1.7, 1.75))
    row = 0
    for height, ((frame, caption), nearest) in zip(heights, blocks, strict=True):
        _bordered(grid[row, 0], frame, caption, QUERY)
        right = grid[row : row + height, 1:].reshape(-1)
        for axes, (picture, words, colour) in zip(right, nearest, strict=False):
            _bordered(axes, picture, words, colour)
        row += height
    _finish(figure, title, path, _meanings_of({QUERY, *(colour for _, nearest in blocks for _, _, colour in nearest)}))


@_names_as_text()
def plot_curves(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path) -> None:
    """Plot curves over the step.

    Args:
        lines: name in the log -> (step, value), at least one point each. LEVELS are grey, hardest negatives dashed.
    """
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, points in lines.items():
        level = name.rpartition("/")[2] in LEVELS
        style: dict[str, Any] = {"color": "0.5", "linestyle": ":"} if level else {}
        if name.startswith("hardest_negative"):
            style = {"linestyle": "--"}
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 3 else "", **style)
    axes.set_xlabel("step")
    axes.set_title(printable(title), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=1 + (len(lines) > 5))
    _save(figure, path, dpi=110)


def _meanings_of(colours: set[str]) -> list[Patch]:
    """Return the legend of borders."""
    meanings = {QUERY: "query", RIGHT: "same class as the query", WRONG: "another class", UNKNOWN: "class not known"}
    return [
        Patch(fill=False, edgecolor=colour, linewidth=3, label=words)
        for colour, words in meanings.items()
        if colour in colours
    ]


def _bordered(axes: plt.Axes, frame: np.ndarray | None, caption: str, colour: str) -> None:
    """Show a frame with a border, and its caption above it. Each line of the caption is shortened to the width."""
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    if frame is None:
        axes.text(0.5, 0.5, "cannot be read", transform=axes.transAxes, ha="center", va="center", fontsize=7)
        axes.set_box_aspect(0.75)
    else:
        axes.imshow(frame)
    axes.set_title("\n".join(_shortened(line, 1.6, 7) for line in caption.split("\n")), fontsize=7, pad=5)
    for edge in axes.spines.values():
        edge.set(color=colour, linewidth=3)


@_names_as_text()
def plot_mistakes(cells: Sequence[tuple[np.ndarray, str, str, float]], title: str, path: Path) -> None:
    """Plot videos whose predicted class is wrong, side by side.

    Args:
        cells: for each video a frame (H, W, 3) uint8, the true class, the predicted class and its probability.
    """
    columns = min(6, len(cells))
    figure, grid = _grid(-(-len(cells) // columns), columns, (1.7, 1.65))
    for axes, (frame, true, predicted, probability) in zip(grid.flat, cells, strict=False):
        axes.imshow(frame)
        percent = f" {probability:.0%}"
        words = f"true: {_shortened(true, 1.2, 7)}\npredicted: {_shortened(predicted, 0.8, 7)}{percent}"
        axes.set_title(words, fontsize=7, pad=3)
    _finish(figure, title, path)


@_names_as_text()
def plot_view_sheet(
    samples: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Sequence[np.ndarray]]],
    shown: Sequence[int],
    title: str,
    path: Path,
) -> None:
    """Plot what the network sees of some clips: the source frames, and the rgb, static and dynamic view below them.

    The last column shows the still that the static view is made of, and what the augmentations changed. Crops are
    outlined in the source.

    Args:
        samples: name; source frames (T, H, W, 3) uint8; the still (H, W, 3) uint8; the augmentations of the frames and
            of the still (dtype kernels.types.AUGMENTATION, with the box in pixels of the source as it is shown); the
            three views, each (T, h, w, 3) uint8.
        shown: positions of the frames to show, one column each.
    """
    lines = 4 * len(samples)
    figure, grid = _grid(lines, len(shown) + 1, (1.45, 1.3), left=1.4)
    for number, (name, source, still, clip_row, still_row, views) in enumerate(samples):
        block = grid[4 * number : 4 * number + 4]
        for line, label, pictures in zip(
            block, (f"{name}\nsource", "rgb view", "static view", "dynamic view"), (source, *views), strict=True
        ):
            for axes, t in zip(line, shown, strict=False):
                axes.imshow(pictures[t])
            line[0].text(-0.12, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
        for axes, t in zip(block[0], shown, strict=False):
            _outline(axes, clip_row["box"])
            axes.set_title(f"t = {t}", fontsize=7, pad=2)
        block[0][-1].imshow(still)
        _outline(block[0][-1], still_row["box"])
        block[0][-1].set_title("still", fontsize=7, pad=2)
        difference = "rgb[t] - rgb[t-1]\nat half contrast"
        for line, words in zip(block[1:], (_changes(clip_row), _changes(still_row), difference), strict=True):
            line[-1].text(0, 0.5, words, transform=line[-1].transAxes, va="center", fontsize=6.5)
    legend = [Patch(fill=False, edgecolor=CROP, linewidth=1.5, label="the random crop that the view shows")]
    _finish(figure, title, path, legend)


def _outline(axes: plt.Axes, box: np.ndarray) -> None:
    top, left, height, width = box
    axes.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=CROP, linewidth=1.5))


def _changes(row: np.ndarray) -> str:
    """Return the changes that an augmentation makes, one per line, in the order in which they are applied."""
    words = ["grayscale"] if row["grayscale"] else []
    if row["jitter"]:
        names = ("brightness", "contrast", "saturation", "hue")
        values = [f"{factor:.2f}" for factor in row["factors"]]
        if row["additive"]:
            values[0] = f"{row['factors'][0] - 1:+.2f}"
        words += [f"{names[step]} {values[step]}" for step in row["order"]]
    words += ["flipped"] if row["flip"] else []
    words += [f"blur {row['sigma']:.1f} pixels"] if row["sigma"] > 0 else []
    return "\n".join(words) or "no change of colour"


@_names_as_text()
def plot_composites(
    rows: Sequence[tuple[tuple[str, str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]], title: str, path: Path
) -> None:
    """Plot one clip per row: its middle frame and foreground, the new background, the moving and the static composite.

    Args:
        rows: names of the clip's class and of the background's class; frames (T, H, W, 3) uint8; mask (T, H, W) bool;
            background of any size (H', W', 3) uint8; the composite (T, H, W, 3) uint8.
    """
    figure, grid = _grid(len(rows), 7, (1.75, 1.5))
    for line, ((name, other), frames, mask, background, composed) in zip(grid, rows, strict=True):
        last = len(frames) - 1
        middle = len(frames) // 2
        cells = (
            (frames[middle], f"{_shortened(name, 1.1, 7)}, t = {middle}"),
            (mask[middle], f"foreground, {mask.mean():.0%} of the clip"),
            (background, f"background: {_shortened(other, 0.9, 7)}"),
            *((composed[t], f"moving, t = {t}") for t in (0, middle, last)),
            (composed[middle], f"static, t = {middle}"),
        )
        for axes, (picture, caption) in zip(line, cells, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(caption, fontsize=7, pad=3)
    _finish(figure, title, path)


@_names_as_text()
def plot_activation_maps(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, Mapping[str, np.ndarray]]], title: str, path: Path
) -> None:
    """Plot one clip per row: a frame, its foreground, then activation maps laid over the frame.

    Args:
        rows: name; frame (H, W, 3) uint8; mask (H, W) bool; maps by name, each (H', W') of any size, the same names in
            every row. The colours of each map go from its own smallest value (blue) to its own largest value (red).
    """
    columns = 2 + len(rows[0][3])
    figure, grid = _grid(len(rows), columns, (1.6, 1.7), below=0.4)
    for line, (name, frame, mask, maps) in zip(grid, rows, strict=True):
        height, width = mask.shape
        for axes, picture, caption in zip(line, (frame, mask), (name, "foreground"), strict=False):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(_shortened(caption, 1.5, 7), fontsize=7, pad=3)
        for axes, (caption, values) in zip(line[2:], maps.items(), strict=True):
            axes.imshow(frame)
            axes.imshow(
                values, cmap="jet", alpha=0.5, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            axes.set_title(caption, fontsize=7, pad=3)
    colours = ScalarMappable(Normalize(0, 1), "jet")
    bar = figure.colorbar(colours, ax=grid, location="bottom", shrink=0.35, aspect=40, alpha=0.5, pad=0.01)
    bar.ax.set_xticks([0, 1], ["the map's smallest value", "its largest value"], fontsize=8)
    _finish(figure, title, path)


# ---------------------------------------------------------------- the page


def _grid(
    rows: int, columns: int, cell: tuple[float, float], left: float = 0.0, below: float = 0.3
) -> tuple[plt.Figure, np.ndarray]:
    """Return a figure and its cells without axes, (rows, columns).

    Args:
        cell: width and height in inches of a cell.
        left, below: inches of free room at the left of the cells, and below them for a legend.
    """
    size = (cell[0] * columns + left, cell[1] * rows + 0.7 + below)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid


def _finish(figure: plt.Figure, title: str, path: Path, legend: Sequence[Any] = ()) -> None:
    """Write the title above the cells and the legend below them, and save the figure."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=0.03, h_pad=0.05)  # inches
    figure.suptitle(_wrapped(title, figure.get_figwidth(), 9), fontsize=9)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    _save(figure, path, dpi=100)


def _save(figure: plt.Figure, path: Path, **options: Any) -> None:
    """Write a figure atomically and close it.

    Raises:
        OSError: the file cannot be written.
        ValueError: `path` has not the suffix of a picture.
    """
    with atomic_file(path) as aside:
        figure.savefig(aside, format=path.suffix.removeprefix("."), **options)
    plt.close(figure)


def _characters(inches: float, points: float) -> int:
    """Return how many characters of a font size fit. A character is about 0.6 times as wide as it is high."""
    return int(inches * 72 / (0.6 * points))


def _wrapped(text: str, inches: float, points: float) -> str:
    """Break lines that are longer than `inches`."""
    lines = [textwrap.wrap(printable(line), _characters(inches, points)) or [""] for line in text.split("\n")]
    return "\n".join(part for line in lines for part in line)


def _shortened(text: str, inches: float, points: float) -> str:
    """Return the text, or its beginning and its end with an ellipsis between them if it is longer than `inches`."""
    most, text = _characters(inches, points), printable(text)
    return text if len(text) <= most else f"{text[: most - 6]}…{text[-5:]}"
