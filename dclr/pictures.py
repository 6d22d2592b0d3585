"""Pictures of an evaluation: the confusion matrix and the retrieval sheet."""

from collections.abc import Sequence
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
