"""Search: the videos whose embeddings are nearest to the embedding of a query video.

A video's embedding is the mean over its clips, minus the mean of the gallery. Similarity is the cosine. `retrieval`
has the same definition, but it subtracts the mean of its own split from each query.

Letters: N rows of a gallery, D numbers of an embedding.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from dclr import distributed
from dclr.config import DataConfig
from dclr.data.catalog import Catalog
from dclr.data.given_videos import EVERYTHING, absolute_path, catalog_of_files, everything
from dclr.data.videos import NoReadableVideo
from dclr.errors import UserError
from dclr.evaluation.embedding import check_head
from dclr.evaluation.feature_file import FeatureTable, read_features
from dclr.evaluation.feature_table import Request, feature_table, feature_table_of_ranks
from dclr.models import Pretrained

_ROWS_AT_ONCE = 8192
"""Rows of a gallery that are computed at once. A whole gallery in float32 could need twice the memory of its file."""


@dataclass(frozen=True)
class Neighbour:
    """A video of the gallery that is near a query."""

    row: int
    similarity: float


@dataclass(frozen=True)
class Found:
    """The result of one query."""

    query: str
    """The query as the user gave it."""
    own_rows: list[int]
    """The rows of the gallery that are the query itself. They are not among the neighbours."""
    neighbours: list[Neighbour]
    """Nearest first."""


class Gallery:
    """The videos that are searched: one row of a table for each, and one kind of embedding.

    Attributes:
        root: the folder or the packed store with the videos.
    """

    def __init__(self, table: FeatureTable, kind: str, root: Path | None = None) -> None:
        """Select the embeddings of a kind and compute their mean.

        Args:
            kind: the kind of embedding, a key of `table.embeddings`.
            root: the folder or store that was opened. By default it is the one that the table names, on this machine: a
                file of features must not choose a server to connect to.

        Raises:
            UserError: the table has no such embeddings, no rows, or numbers that are not finite.
        """
        if kind not in table.embeddings:
            raise UserError(f"{table.root} has no {kind} embeddings, only {', '.join(table.embeddings)}")
        self.root = root or Path(table.root)
        self.table = table if table.clips is None else mean_of_clips(table)
        self.rows = self.table.embeddings[kind]
        if not len(self.rows):
            raise UserError(f"{table.root} has no {kind} embeddings of any video")
        total = np.zeros(self.rows.shape[1])
        for _, rows in self._chunks():
            total += rows.sum(0, dtype=np.float64)
        if not np.isfinite(total).all():
            raise UserError(f"{table.root}: its {kind} embeddings are not finite")
        self.mean = (total / len(self)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, row: int) -> Path:
        """Return the file of a video. In a packed store it is only a name."""
        return self.root / self.table.paths[row]

    def rows_of(self, query: str) -> list[int]:
        """Return the rows of the file `query`, or of the path `query` in the gallery if there is no such file.

        Links are followed. Copies of the file are other files.
        """
        if not os.path.exists(query):
            return [row for row, path in enumerate(self.table.paths) if path == query]
        names = {os.path.basename(query), os.path.basename(os.path.realpath(query))}
        same_name = [row for row, path in enumerate(self.table.paths) if os.path.basename(path) in names]
        return [row for row in same_name if _is_same_file(query, self.file(row))]

    def nearest(self, query: np.ndarray, count: int, without: list[int]) -> list[Neighbour]:
        """Return the rows nearest to a query, nearest first. Of equally near rows, the first in the gallery is first.

        Args:
            query: (D,) the query's embedding.
            count: the most rows that are returned.
            without: rows that are not returned.
        """
        similarity = np.empty(len(self), np.float32)
        direction = _unit(query.astype(np.float32)[None] - self.mean)[0]
        for start, rows in self._chunks():
            # A sum for each row, and not a product of matrices: equal rows must give equal sums wherever they are.
            similarity[start : start + len(rows)] = (_unit(rows - self.mean) * direction).sum(1)
        similarity[without] = -np.inf
        count = min(count, len(self) - len(without))
        if not count:
            return []
        least = np.partition(similarity, -count)[-count]
        candidates = np.flatnonzero(similarity >= least)  # more than `count` if rows are equally near
        chosen = candidates[np.argsort(-similarity[candidates], kind="stable")][:count]
        return [Neighbour(int(row), float(similarity[row])) for row in chosen]

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row and the rows (n, D) float32 of consecutive chunks."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield start, self.rows[start : start + _ROWS_AT_ONCE].astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Scale each row (N, D) to length 1. A row of zeros stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _is_same_file(query: str, file: Path) -> bool:
    try:
        return os.path.samefile(query, file)
    except OSError:  # not on disk, or in a packed store
        return False


def mean_of_clips(table: FeatureTable) -> FeatureTable:
    """Return a table of clips as a table of videos. The clips of a video are consecutive rows."""
    starts = [next(rows) for _, rows in groupby(range(len(table.paths)), key=table.paths.__getitem__)]
    counts = np.diff([*starts, len(table.paths)])[:, None]
    embeddings = {
        kind: np.add.reduceat(rows.astype(np.float32), starts) / counts for kind, rows in table.embeddings.items()
    }
    return replace(
        table,
        paths=[table.paths[row] for row in starts],
        labels=[table.labels[row] for row in starts],
        groups=[table.groups[row] for row in starts],
        splits=[table.splits[row] for row in starts],
        clips=None,
        embeddings=embeddings,
    )


def search(
    source: Catalog | FeatureTable,
    pretrained: Pretrained,
    data: DataConfig,
    queries: Sequence[str],
    kind: str,
    count: int,
    device: torch.device,
) -> tuple[list[Found], Gallery] | None:
    """Embed the queries, and the videos of a catalog if there is no table of them, and find the nearest videos.

    Each rank embeds a share of the videos. Rank 0 does the rest and gets the result, the others None.

    Args:
        source: the videos to search, or their embeddings.
        queries: video files, or paths that the searched data set lists.
        count: the most videos that each query finds.

    Raises:
        UserError: a query cannot be read, the network or the table has no such embedding, or no video can be read.
    """
    check_head(pretrained, kind)
    embedded = distributed.on_rank_zero(lambda: embed_queries(source, pretrained, data, queries, kind, device))
    table: FeatureTable | None
    if isinstance(source, FeatureTable):
        table = source
    else:
        table = feature_table_of_ranks(Request(source, pretrained, data, (kind,)), device)

    def look_up() -> tuple[list[Found], Gallery]:
        assert table is not None  # on rank 0
        root = source.root.resolve() if isinstance(source, Catalog) else None
        gallery, found = Gallery(table, kind, root), []
        for query in queries:
            own_rows = gallery.rows_of(query)
            if query not in embedded and not own_rows:
                raise UserError(f"--query {query} cannot be read: {gallery.table.skipped.get(query, 'it has no row')}")
            embedding = embedded[query] if query in embedded else gallery.rows[own_rows[0]]
            found.append(Found(query, own_rows, gallery.nearest(embedding, count, own_rows)))
        return found, gallery

    return distributed.only_on_rank_zero(look_up)


def embed_queries(
    source: Catalog | FeatureTable,
    pretrained: Pretrained,
    data: DataConfig,
    queries: Sequence[str],
    kind: str,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Return the embedding (D,) of each query that is a file.

    Raises:
        UserError: a file cannot be read, or a query is neither a file nor a path in `source`.
    """
    if isinstance(source, FeatureTable):
        listed = source.paths
    else:
        listed = [video.path for video in everything(source).videos(EVERYTHING)]
    files = [query for query in queries if os.path.exists(query)]
    for query in queries:
        if query not in files and query not in listed:
            raise UserError(f"--query {query}: no such file, and the searched videos do not have this path")
    return embed_files(files, pretrained, data, kind, device) if files else {}


def embed_files(
    files: Sequence[str], pretrained: Pretrained, data: DataConfig, kind: str, device: torch.device
) -> dict[str, np.ndarray]:
    """Return the embedding (D,) of each file. Raises UserError: a file cannot be read."""
    catalog = catalog_of_files([Path(file) for file in files])
    try:
        table = feature_table(Request(catalog, pretrained, data, (kind,)), device)
        skipped = table.skipped
    except NoReadableVideo as error:
        skipped = error.reasons
    rows = {}
    for file in files:
        path = os.path.relpath(absolute_path(file), catalog.root)
        if path in skipped:
            raise UserError(f"--query {file} cannot be read: {skipped[path]}")
        rows[file] = table.embeddings[kind][table.paths.index(path)]
    return rows


def read_gallery(file: Path, pretrained: Pretrained, kind: str) -> FeatureTable:
    """Read the embeddings of the videos to search.

    Raises:
        UserError: it is not a file of features, it is from other weights, or it has no embeddings of this kind.
    """
    table = read_features(file)
    if table.fingerprint != pretrained.fingerprint():
        raise UserError(
            f"--features {file} was written with other weights ({table.description}): "
            f"write it with {pretrained.file}, or give its --checkpoint"
        )
    if kind not in table.embeddings:
        raise UserError(
            f"--features {file} has no {kind} embeddings, only {', '.join(table.embeddings)}: "
            f"write it with eval.py features --like {kind}"
        )
    if not all(isinstance(table.clip_format.get(name), int) for name in ("length", "stride", "crop")):
        raise UserError(f"--features {file} does not say how its clips were made: write it with eval.py features")
    return table


def clips_of(table: FeatureTable | None, pretrained: Pretrained) -> dict[str, int]:
    """Return the settings of the clips of the table, or of those that the network was trained on."""
    clips = asdict(pretrained.clips) if table is None else table.clip_format
    return {"clip_length": clips["length"], "clip_stride": clips["stride"], "crop_size": clips["crop"]}
