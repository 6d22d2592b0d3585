"""Embed all videos of a data set, with or without labels and splits, as a FeatureTable.

A row is the mean over the test clips of a video, or one of these clips. It depends on the file and on the weights only:
the clips of a video are computed together, and never with those of another video.

Letters: N rows, D numbers of an embedding.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dclr import distributed
from dclr.config import DataConfig
from dclr.data.catalog import Catalog
from dclr.data.given_videos import EVERYTHING, everything, splits_of
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import NoReadableVideo, open_videos
from dclr.errors import UserError, printable
from dclr.evaluation.embedding import make_embedder
from dclr.evaluation.feature_file import FeatureTable
from dclr.evaluation.features import embed_videos
from dclr.models import Pretrained
from dclr.progress import ProgressBar

MISSING = "its list names it, and it is not on disk"
"""The reason why a listed video without a file has no row."""

Result = tuple[int, dict[str, np.ndarray] | str]
"""Position of a listed video, and its rows by kind, or the reason why it has none."""

LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Request:
    """What is embedded: the videos, the network, and what a row holds."""

    catalog: Catalog
    pretrained: Pretrained
    data: DataConfig
    kinds: tuple[str, ...] = ("pooled",)
    """Kinds of embeddings, see `make_embedder`."""
    by_clip: bool = False
    """True: a row is a clip. False: a row is a video."""
    half: bool = False
    """True: float16. False: float32."""

    @cached_property
    def listed(self) -> Catalog:
        """The catalog with the one split EVERYTHING. The position of a video is its position in this split."""
        return everything(self.catalog)

    def __len__(self) -> int:
        return len(self.listed.videos(EVERYTHING))

    def rows(self, embeddings: dict[str, Tensor], path: str) -> dict[str, np.ndarray]:
        """Return the rows of a video, kind -> (1 or TEST_CLIPS, D), from the embeddings of its clips.

        Raises:
            UserError: a number is too large for float16.
        """
        rows = {}
        for kind, clips in embeddings.items():
            values = (clips if self.by_clip else clips.mean(0, keepdim=True)).numpy()
            if self.half and np.abs(values).max() > LARGEST_HALF:
                raise UserError(
                    f"--half: the {kind} embedding of {path} has a number above {LARGEST_HALF:,.0f}, which float16 "
                    "does not have: leave --half out"
                )
            rows[kind] = values.astype(np.float16) if self.half else values
        return rows


@dataclass(frozen=True)
class Rows:
    """The rows of some listed videos, video after video in the order of their positions."""

    positions: list[int]
    """The videos that have rows."""
    embeddings: dict[str, np.ndarray]
    """Kind -> (N, D). Without rows there are no kinds."""
    skipped: dict[int, str]
    """Position -> reason, of the videos that have no rows."""


def feature_table(request: Request, device: torch.device) -> FeatureTable:
    """Embed all videos without a progress bar, and hold the table in memory.

    Raises:
        UserError: no video can be read, the network has no such embedding, or an embedding is not finite.
    """
    return join(request, [collect(embed_listed(request, range(len(request)), device, ""))])


def feature_table_of_ranks(request: Request, device: torch.device) -> FeatureTable | None:
    """Do what `feature_table` does, with a share of the videos on each rank. Rank 0 gets the table, the others None.

    Rank 0 shows a progress bar.

    Raises:
        UserError: on all ranks, no video can be read; on one rank, an embedding is not finite.
    """
    title = "embedding videos" if distributed.rank() == 0 else ""
    own = collect(embed_listed(request, distributed.own_share(len(request)), device, title))
    everyone = distributed.gather_objects((own.positions, own.skipped))
    embeddings = {}
    for kind in request.kinds:
        rows = own.embeddings.get(kind, np.empty(0, np.float32))
        embeddings[kind] = distributed.gather_rows(torch.from_numpy(rows)).numpy()
    positions = [position for positions, _ in everyone for position in positions]
    skipped = {position: reason for _, reasons in everyone for position, reason in reasons.items()}
    return distributed.only_on_rank_zero(lambda: join(request, [Rows(positions, embeddings, skipped)]))


def embed_listed(
    request: Request, positions: Sequence[int], device: torch.device, title: str, done: int = 0
) -> Iterator[Result]:
    """Yield the position and the rows of each listed video at `positions`, in this order.

    A video that cannot be read gives the reason in place of rows.

    Args:
        title: labels the progress bar; empty: no progress is shown.
        done: number of videos that were embedded before, for the progress bar.

    Raises:
        UserError: the network has no such embedding, or an embedding is not finite.
    """
    if not positions:
        return
    embed = make_embedder(request.pretrained, request.kinds)
    request.pretrained.backbone.to(device).eval()
    request.pretrained.heads.to(device).eval()
    listed = request.listed.videos(EVERYTHING)
    chosen = replace(request.listed, splits={EVERYTHING: tuple(listed[position] for position in positions)})
    embedded: Iterator[dict[str, Tensor] | str] = iter(())
    workers, timeout = max(1, request.data.workers), request.data.video_timeout
    try:
        videos = open_videos(chosen, EVERYTHING, workers, progress=bool(title), timeout=timeout)
        unreadable = videos.unreadable
        embedded = embed_videos(embed, TestClips(videos, request.data), device)
    except NoReadableVideo as error:
        unreadable = error.reasons
    # The bar begins after the verification, so that its rate is that of the network.
    with ProgressBar(done + len(positions), title, "video", start=done, shown=bool(title)) as bar:
        for position in positions:
            path = listed[position].path
            found = unreadable[path] if path in unreadable else next(embedded)
            bar.advance()
            if isinstance(found, str):
                if path not in unreadable:
                    print(f"warning: {printable(path)} can no longer be read ({found}); it is skipped", file=sys.stderr)
                yield position, found
            else:
                yield position, request.rows(found, path)


def collect(results: Iterable[Result]) -> Rows:
    """Return the results of `embed_listed` as Rows."""
    positions: list[int] = []
    skipped: dict[int, str] = {}
    found: dict[str, list[np.ndarray]] = {}
    for position, result in results:
        if isinstance(result, str):
            skipped[position] = result
            continue
        positions.append(position)
        for kind, rows in result.items():
            found.setdefault(kind, []).append(rows)
    return Rows(positions, {kind: np.concatenate(rows) for kind, rows in found.items()}, skipped)


def join(request: Request, parts: Iterable[Rows]) -> FeatureTable:
    """Return the table of all listed videos. Its memory is allocated once, so a part may be read when it is needed.

    Args:
        parts: the rows of all listed videos, in the order of the positions.

    Raises:
        NoReadableVideo: no video has a row.
    """
    listed, splits = request.listed.videos(EVERYTHING), splits_of(request.catalog)
    each = TEST_CLIPS if request.by_clip else 1
    positions: list[int] = []
    skipped: dict[str, str] = {}
    embeddings: dict[str, np.ndarray] = {}
    for part in parts:
        first = len(positions) * each
        for kind, rows in part.embeddings.items() if part.positions else ():
            if kind not in embeddings:
                embeddings[kind] = np.empty((len(listed) * each, rows.shape[1]), rows.dtype)
            embeddings[kind][first : first + len(rows)] = rows
        positions += part.positions
        skipped |= {listed[position].path: reason for position, reason in part.skipped.items()}
    if not positions:
        first_path, reason = next(iter(skipped.items()))
        raise NoReadableVideo(
            f"{request.catalog.root}: none of the {len(listed)} videos can be read ({first_path}: {reason}); "
            "see train.py check",
            skipped,
        )
    skipped |= {video.path: MISSING for video in request.listed.missing.get(EVERYTHING, ())}
    videos = [listed[position] for position in positions for _ in range(each)]
    classes = request.catalog.classes
    return FeatureTable(
        paths=[video.path for video in videos],
        labels=[classes[video.label] if video.label >= 0 else None for video in videos],
        groups=[video.group for video in videos],
        splits=[splits[video.path] for video in videos],
        clips=np.tile(np.arange(TEST_CLIPS), len(positions)) if request.by_clip else None,
        embeddings={kind: rows[: len(videos)] for kind, rows in embeddings.items()},
        skipped=skipped,
        root=str(request.catalog.root.resolve()),
        fingerprint=request.pretrained.fingerprint(),
        description=request.pretrained.loaded,
        clip_format=clip_format(request),
    )


def clip_format(request: Request) -> dict[str, object]:
    """Return how clips are read: the fields of ClipFormat, and the number of clips of a video."""
    data = request.data
    used = replace(request.pretrained.clips, length=data.clip_length, stride=data.clip_stride, crop=data.crop_size)
    return {**asdict(used), "clips": TEST_CLIPS}
