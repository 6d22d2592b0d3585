"""The results of a search: the printed table, results.csv, the sheet nearest.png and the page search.html."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from dclr.errors import printable
from dclr.evaluation import figures
from dclr.evaluation.previews import FPS, address, make_previews
from dclr.evaluation.search import Found, Gallery
from dclr.evaluation.search_page import Block, Cell, likeness_of_class, search_page
from dclr.files import atomic_write
from dclr.models import Pretrained

SHOWN_QUERIES, SHOWN_NEAREST = 8, 20
"""Most queries in the sheet and on the page, and most videos for each. The table and results.csv have all."""

LIKENESS = {
    "pooled": "by both motion and scene (the pooled feature)",
    "motion": "by motion (the head of the dynamic view)",
    "scene": "by scene (the head of the static view)",
}


def title_of(kind: str, pretrained: Pretrained) -> str:
    """Return one line that says what was searched by what. It has no folders, because pictures are published."""
    backbone = pretrained.backbone
    file = f"{pretrained.file.resolve().parent.name}/{pretrained.file.name}"
    return f"Nearest videos {LIKENESS[kind]}: {file}, {backbone.name} (width {backbone.width})"


def print_table(found: Sequence[Found], gallery: Gallery, kind: str) -> None:
    """Print rank, similarity, class and path of the videos that were found."""
    table = gallery.table
    print(f"{len(gallery):,} videos of {printable(table.root)}, nearest {LIKENESS[kind]}; similarity is a cosine")
    for name in list(table.skipped)[:1]:
        print(f"skipped: {len(table.skipped):,} videos, such as {printable(name)}: {printable(table.skipped[name])}")
    for each in found:
        itself = "; it is among the searched videos and does not find itself" if each.own_rows else ""
        print(f"\nquery: {printable(each.query)}{itself}")
        if not each.neighbours:
            print("there is no other video to find")
            continue
        labels = [table.labels[neighbour.row] or "" for neighbour in each.neighbours]
        width = max(map(len, [*labels, "class"]))
        known = any(labels)
        print(f"{'rank':>4} {'similarity':>10}  {'class'.ljust(width) + '  ' if known else ''}path")
        for rank, (neighbour, label) in enumerate(zip(each.neighbours, labels, strict=True), 1):
            column = f"{printable(label):{width}}  " if known else ""
            print(f"{rank:4} {neighbour.similarity:10.3f}  {column}{printable(table.paths[neighbour.row])}")


def write_results(
    found: Sequence[Found], gallery: Gallery, title: str, folder: Path, html: bool, timeout: float
) -> None:
    """Write results.csv and nearest.png, and search.html if `html`, into a folder.

    Args:
        title: one line for the sheet and the page.
        timeout: seconds without a frame after which a decoder process is killed.
    """
    write_csv(found, gallery, folder / "results.csv")
    blocks = make_blocks(found, gallery, html, timeout)
    cells = [cell for block in blocks for cell in (block.query, *block.nearest)]
    hidden = {cell.name: cell.preview for cell in cells if isinstance(cell.preview, str)}
    for name in list(hidden)[:1]:
        print(
            f"warning: {len(hidden)} videos cannot be shown, such as {printable(name)}: {printable(hidden[name])}",
            file=sys.stderr,
        )
    plot_sheet(blocks, f"{title}\nEach query and its nearest videos, with cosine similarity", folder / "nearest.png")
    if html:
        remarks = [
            f"Searched: {len(gallery):,} videos of {gallery.root.name}. Similarity is a cosine, at most 1.",
            f"The previews play {FPS} frames per second.",
        ]
        if any(likeness_of_class(cell, block.query) for block in blocks for cell in block.nearest):
            remarks[1] += " Green: the query's class. Red: another class."
        atomic_write(folder / "search.html", search_page(title, remarks, blocks).encode())


def write_csv(found: Sequence[Found], gallery: Gallery, path: Path) -> None:
    """Write a line for each video that was found. The bytes of file names that are not UTF-8 are kept."""
    table, lines = gallery.table, io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(["query", "rank", "similarity", "path", "label", "group", "split"])
    for each in found:
        for rank, neighbour in enumerate(each.neighbours, 1):
            columns = (table.paths, table.labels, table.groups, table.splits)
            row = [column[neighbour.row] or "" for column in columns]
            writer.writerow([each.query, rank, f"{neighbour.similarity:.6f}", *row])
    atomic_write(path, lines.getvalue().encode("utf-8", "surrogateescape"))


def make_blocks(found: Sequence[Found], gallery: Gallery, play: bool, timeout: float) -> list[Block]:
    """Return the first queries and their nearest videos as the picture and the page show them."""
    table, found = gallery.table, found[:SHOWN_QUERIES]
    rows = {neighbour.row for each in found for neighbour in each.neighbours[:SHOWN_NEAREST]}
    rows |= {each.own_rows[0] for each in found if each.own_rows}
    paths = [table.paths[row] for row in sorted(rows)]
    previews = make_previews(gallery.root, paths, play, timeout) if paths else {}

    def cell(row: int, rank: int = 0, similarity: float = 0.0) -> Cell:
        path = table.paths[row]
        return Cell(path, previews[path], table.labels[row] or "", rank, similarity, address(gallery.file(row)))

    blocks = []
    for each in found:
        if each.own_rows:
            query = cell(each.own_rows[0])
        else:
            file = Path(each.query)
            preview = make_previews(file.parent, [file.name], play, timeout)[file.name]
            query = Cell(file.name, preview, address=address(file))
        nearest = each.neighbours[:SHOWN_NEAREST]
        blocks.append(Block(query, [cell(one.row, rank, one.similarity) for rank, one in enumerate(nearest, 1)]))
    return blocks


def plot_sheet(blocks: Sequence[Block], title: str, path: Path) -> None:
    """Plot the middle frames of the queries and of the videos that were found."""
    colours = {"same": figures.RIGHT, "other": figures.WRONG, "": figures.UNKNOWN}

    def content(cell: Cell, first_line: str) -> tuple[np.ndarray | None, str]:
        name = cell.label or PurePosixPath(cell.name).name
        picture = None if isinstance(cell.preview, str) else cell.preview.picture
        return picture, f"{first_line}\n{printable(name)}"

    rows = []
    for block in blocks:
        nearest = [
            (*content(cell, f"{cell.rank}.  {cell.similarity:.2f}"), colours[likeness_of_class(cell, block.query)])
            for cell in block.nearest
        ]
        rows.append((content(block.query, "query"), nearest))
    figures.plot_search_sheet(rows, title, path)
