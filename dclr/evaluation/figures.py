"""Pictures: the confusion matrix and the retrieval sheet of an evaluation, the views of a sample."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # writes files; needs no screen
from matplotlib import pyplot as plt


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """counts: (classes, classes) int, true by predicted. Each row is shown as a share of its videos; the number of videos stands in
    the cells where there is room (20 classes or fewer)."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.35 * len(classes), 24)
    figure, axes = plt.subplots(figsize=(side + 1.2, side))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 8 if len(classes) <= 40 else 4
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    if len(classes) <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's videos")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def retrieval_sheet(
    rows: Sequence[tuple[tuple[np.ndarray, str], Sequence[tuple[np.ndarray, str, bool]]]], title: str, path: Path
) -> None:
    """A row a query: its middle frame (H, W, 3) uint8 and name, then its nearest videos, nearest first, each with a frame, a caption
    and whether it is of the query's class (green frame) or not (red)."""
    columns = 1 + max(len(nearest) for _, nearest in rows)
    figure, grid = plt.subplots(len(rows), columns, figsize=(1.7 * columns, 1.85 * len(rows) + 0.5), squeeze=False)
    for line, ((frame, name), nearest) in zip(grid, rows, strict=True):
        cells = [(frame, name, None), *nearest]
        for axes, cell in zip(line, cells + [None] * (columns - len(cells)), strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if cell is None:
                axes.axis("off")
                continue
            picture, caption, right = cell
            axes.imshow(picture)
            axes.set_title(caption, fontsize=7, pad=5)
            colour = "black" if right is None else "tab:green" if right else "tab:red"
            for edge in axes.spines.values():
                edge.set(color=colour, linewidth=3)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def view_sheet(
    samples: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Sequence[np.ndarray]]],
    shown: Sequence[int],
    title: str,
    path: Path,
) -> None:
    """What the network sees of some clips: of each the source frames, and the rgb, static and dynamic view below them.

    Args:
        samples: name; source frames (T, H, W, 3) uint8; the still (H, W, 3) uint8; the augmentations drawn for the frames and for the still
            (dtype kernels.types.AUGMENTATION); the three views, each (T, h, w, 3) uint8.
        shown: frames to show, a column each; the still stands in one more, and crops are outlined in the source.
    """
    lines = 4 * len(samples)
    figure, grid = plt.subplots(
        lines, len(shown) + 1, figsize=(1.45 * (len(shown) + 1) + 1.2, 1.5 * lines + 0.7), squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for number, (name, source, still, clip_row, still_row, views) in enumerate(samples):
        for line, label in enumerate((f"{name}\nsource", "rgb", "static", "dynamic")):
            for axes, t in zip(grid[4 * number + line], shown, strict=False):
                axes.imshow(source[t] if line == 0 else views[line - 1][t])
                if line == 0:
                    _outline(axes, clip_row["box"])
                    axes.set_title(f"t = {t}", fontsize=7, pad=2)
            first = grid[4 * number + line][0]
            first.text(-0.12, 0.5, label, transform=first.transAxes, ha="right", va="center", fontsize=8)
        last = grid[4 * number][-1]
        last.imshow(still)
        _outline(last, still_row["box"])
        last.set_title("still", fontsize=7, pad=2)
        for line, row in ((1, clip_row), (2, still_row)):
            axes = grid[4 * number + line][-1]
            axes.text(0, 0.5, _draws(row), transform=axes.transAxes, va="center", fontsize=6.5)
        axes = grid[4 * number + 3][-1]
        axes.text(0, 0.5, "rgb[t] - rgb[t-1]\nat half contrast", transform=axes.transAxes, va="center", fontsize=6.5)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0.06, 0, 1, 0.985), h_pad=0.3, w_pad=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _outline(axes: plt.Axes, box: np.ndarray) -> None:
    top, left, height, width = box
    axes.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color="tab:orange", linewidth=1.5))


def _draws(row: np.ndarray) -> str:
    """What was drawn, in words, in the order in which it is applied."""
    words = ["grayscale"] if row["grayscale"] else []
    if row["jitter"]:
        names = ("brightness", "contrast", "saturation", "hue")
        words += [f"{names[step]} {row['factors'][step]:.2f}" for step in row["order"]]
    words += ["flipped"] if row["flip"] else []
    words += [f"blur {row['sigma']:.1f} pixels"] if row["sigma"] > 0 else []
    return "\n".join(words) or "no change of colour"


def foreground_sheet(
    rows: Sequence[tuple[tuple[str, str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]], title: str, path: Path
) -> None:
    """A row a clip: its middle frame and what moves in it, the other video's background, the clip on it at three times, its frozen partner.

    Args:
        rows: names of the clip's class and of the background's; frames (T, H, W, 3) uint8; mask (T, H, W) bool; background of any size
            (H', W', 3) uint8; the composed frames (T, H, W, 3) uint8.
    """
    figure, grid = plt.subplots(len(rows), 7, figsize=(1.75 * 7, 1.6 * len(rows) + 0.6), squeeze=False)
    for line, ((name, other), frames, mask, background, composed) in zip(grid, rows, strict=True):
        last = len(frames) - 1
        middle = len(frames) // 2
        cells = (
            (frames[middle], f"{name}, t = {middle}"),
            (mask[middle], f"what moves: {mask.mean():.0%} of the clip"),
            (background, f"background of {other}"),
            *((composed[t], f"moving, t = {t}") for t in (0, middle, last)),
            (composed[middle], f"static: t = {middle}, always"),
        )
        for axes, (picture, caption) in zip(line, cells, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(caption, fontsize=7, pad=3)
            axes.axis("off")
    _finish(figure, title, path)


def map_sheet(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, Mapping[str, np.ndarray]]], title: str, path: Path
) -> None:
    """A row a clip: a frame, what moves in it, then activation maps laid over it.

    Args:
        rows: name; frame (H, W, 3) uint8; mask (H, W) bool; maps by name, each (H', W') of any size, the same names in every row. Each
            map is drawn from its own least value (blue) to its greatest (red): where, not how strongly.
    """
    columns = 2 + len(rows[0][3])
    figure, grid = plt.subplots(len(rows), columns, figsize=(1.6 * columns, 1.7 * len(rows) + 0.6), squeeze=False)
    for line, (name, frame, mask, maps) in zip(grid, rows, strict=True):
        height, width = mask.shape
        for axes, picture, caption in zip(line, (frame, mask), (name, "what moves"), strict=False):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(caption, fontsize=7, pad=3)
        for axes, (caption, values) in zip(line[2:], maps.items(), strict=True):
            axes.imshow(frame)
            axes.imshow(
                values, cmap="jet", alpha=0.5, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            axes.set_title(caption, fontsize=7, pad=3)
        for axes in line:
            axes.axis("off")
    _finish(figure, title, path)


def _finish(figure: plt.Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=0.4, w_pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
