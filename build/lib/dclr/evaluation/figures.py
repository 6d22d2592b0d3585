"""Pictures of an evaluation, written as files by matplotlib. Each `plot_*` function writes one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # writes files; needs no screen
from matplotlib import pyplot as plt


def plot_confusion_matrix(counts: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Plot numbers of videos, true class by predicted class. The colour shows the share of the true class's videos.

    Args:
        counts: (classes, classes) int. The numbers are printed in the cells if there are 20 classes or fewer.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.35 * len(classes), 24)
    figure, axes = plt.subplots(figsize=(side + 1.2, side))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 8 if len(classes) <= 40 else 4
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=10, wrap=True)
    if len(classes) <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's videos")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_retrieval_sheet(
    rows: Sequence[tuple[tuple[np.ndarray, str], Sequence[tuple[np.ndarray, str, bool]]]], title: str, path: Path
) -> None:
    """Plot one query per row, followed by its nearest train videos.

    Args:
        rows: for each query its frame and caption, then for each neighbour, nearest first, its frame, its caption and
            whether it has the query's class. A neighbour of the query's class gets a green border, any other a red one.
            Frames are (H, W, 3) uint8.
    """
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
    figure, grid = plt.subplots(
        lines, len(shown) + 1, figsize=(1.45 * (len(shown) + 1) + 1.2, 1.5 * lines + 0.7), squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
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
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0.06, 0, 1, 0.985), h_pad=0.3, w_pad=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _outline(axes: plt.Axes, box: np.ndarray) -> None:
    top, left, height, width = box
    axes.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color="tab:orange", linewidth=1.5))


def _changes(row: np.ndarray) -> str:
    """Return the changes that an augmentation makes, one per line, in the order in which they are applied."""
    words = ["grayscale"] if row["grayscale"] else []
    if row["jitter"]:
        names = ("brightness", "contrast", "saturation", "hue")
        words += [f"{names[step]} {row['factors'][step]:.2f}" for step in row["order"]]
    words += ["flipped"] if row["flip"] else []
    words += [f"blur {row['sigma']:.1f} pixels"] if row["sigma"] > 0 else []
    return "\n".join(words) or "no change of colour"


def plot_composites(
    rows: Sequence[tuple[tuple[str, str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]], title: str, path: Path
) -> None:
    """Plot one clip per row: its middle frame and foreground, the new background, the moving and the static composite.

    Args:
        rows: names of the clip's class and of the background's class; frames (T, H, W, 3) uint8; mask (T, H, W) bool;
            background of any size (H', W', 3) uint8; the composite (T, H, W, 3) uint8.
    """
    figure, grid = plt.subplots(len(rows), 7, figsize=(1.75 * 7, 1.6 * len(rows) + 0.6), squeeze=False)
    for line, ((name, other), frames, mask, background, composed) in zip(grid, rows, strict=True):
        last = len(frames) - 1
        middle = len(frames) // 2
        cells = (
            (frames[middle], f"{name}, t = {middle}"),
            (mask[middle], f"foreground, {mask.mean():.0%} of the clip"),
            (background, f"background: {other}"),
            *((composed[t], f"moving, t = {t}") for t in (0, middle, last)),
            (composed[middle], f"static, t = {middle}"),
        )
        for axes, (picture, caption) in zip(line, cells, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(caption, fontsize=7, pad=3)
            axes.axis("off")
    _finish(figure, title, path)


def plot_activation_maps(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, Mapping[str, np.ndarray]]], title: str, path: Path
) -> None:
    """Plot one clip per row: a frame, its foreground, then activation maps laid over the frame.

    Args:
        rows: name; frame (H, W, 3) uint8; mask (H, W) bool; maps by name, each (H', W') of any size, the same names in
            every row. The colours of each map go from its own smallest value (blue) to its own largest value (red).
    """
    columns = 2 + len(rows[0][3])
    figure, grid = plt.subplots(len(rows), columns, figsize=(1.6 * columns, 1.75 * len(rows) + 0.8), squeeze=False)
    for line, (name, frame, mask, maps) in zip(grid, rows, strict=True):
        height, width = mask.shape
        for axes, picture, caption in zip(line, (frame, mask), (name, "foreground"), strict=False):
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
