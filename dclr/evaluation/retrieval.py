"""Retrieval: find the train videos whose features are nearest to those of each test video. `eval.py retrieval`.

A video's feature is the mean over its test clips, minus the mean of its split, scaled to length 1. The released code
also scales the feature of each clip to length 1 before the mean over clips. Similarity is the cosine. The train split
is the gallery, and the test split gives the queries.

A cosine is an exact sum, rounded to float32 once (`normalized` says how). So the cosine of two videos depends on their
features only: not on the other videos, on the size of a chunk, on the number of threads or on the library that
multiplies matrices. Copies of a video are equally near. Of equally near videos, the first in the gallery is first.

Letters: Q queries, G gallery videos, D features.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dclr import distributed
from dclr.config import DataConfig, ModelConfig
from dclr.data.clips import evenly_spaced
from dclr.data.decode import UnreadableVideo, rgb_of
from dclr.data.display import shown
from dclr.data.videos import VideoSet
from dclr.evaluation import figures
from dclr.evaluation.benchmark import Benchmark
from dclr.evaluation.features import ClipOutputs, find_data, load_features, mean_of_clips, open_labelled, run_on_clips
from dclr.models import pool

RANKS = (1, 5, 10, 20, 50)
"""The numbers k of nearest videos for which R@k is reported."""

SHEET_QUERIES, SHEET_NEAREST = 8, 5

STEP = 2.0**-26
"""Features of length 1 are rounded to multiples of this number. See `normalized`."""

_QUERY_ROWS, _GALLERY_ROWS = 1024, 4096
"""Queries and gallery videos whose cosines are computed at once. They take 130 MB, and results do not depend on them.
"""


@dataclass(frozen=True)
class Retrieval:
    """Recall at each k of RANKS that the gallery is large enough for, and the nearest videos of each query."""

    recall: dict[int, float]  # k -> share of queries with a video of their class among the k nearest
    chance: dict[int, float]  # k -> the expected recall of a gallery in random order
    nearest: np.ndarray  # (Q, min(50, G)) int64: rows of the gallery, nearest first
    similarity: np.ndarray  # (Q, min(50, G)) float32: their cosines


def evaluate_retrieval(
    checkpoint: Path,
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    device: torch.device,
    folder: Path,
    normalise_clips: bool = False,
) -> dict[str, Any]:
    """Look up the test videos in the train split. Return the entries of report.json, on all ranks.

    Rank 0 prints R@k for each k of RANKS and writes retrieval.png to `folder`. It holds one feature of each video:
    0.5 GB for 240,000 videos and 512 numbers, and the same again while it compares them.

    Args:
        seed: the seed of random weights, used only if `checkpoint` is the word random.
        normalise_clips: see `mean_direction`.

    Raises:
        UserError: see load_backbone, find_data, open_split and Benchmark. A data set without labels.
    """
    backbone, loaded = load_features(checkpoint, model, seed)
    catalog = find_data(data)
    gallery_videos, query_videos = open_labelled(catalog, data, "retrieval")
    benchmark = Benchmark(catalog, data, train=gallery_videos, test=query_videos)
    backbone.to(device).eval()
    keep = mean_direction if normalise_clips else mean_of_clips
    gallery, queries = (
        run_on_clips(lambda clip: pool(backbone(clip)), videos, data, device, title, keep)
        for videos, title in ((gallery_videos, "gallery"), (query_videos, "queries"))
    )
    benchmark.add_failures({**gallery.failures, **queries.failures})
    result = distributed.on_rank_zero(
        lambda: write_retrieval(
            checkpoint, loaded, (gallery, queries), (gallery_videos, query_videos), benchmark, folder, normalise_clips
        )
    )
    return {"weights": loaded, "backbone": model.backbone, "width": model.width, **result}


def write_retrieval(
    checkpoint: Path,
    loaded: str,
    outputs: tuple[ClipOutputs, ClipOutputs],  # gallery, queries
    videos: tuple[VideoSet, VideoSet],
    benchmark: Benchmark,
    folder: Path,
    normalise_clips: bool,
) -> dict[str, Any]:
    """Print the table and write the picture that `evaluate_retrieval` names. Return entries of report.json."""
    (gallery, queries), (gallery_videos, query_videos) = outputs, videos
    result = retrieval(gallery, queries)

    counts = f"{len(queries.labels)} test videos looked up among {len(gallery.labels)} train videos"
    counts += ", features of clips of length 1" if normalise_clips else ""
    print(f"\n{loaded}\non {benchmark.catalog.root}: {counts}")
    print("".join([f"{'':10}", *(f"{f'R@{k}':>8}" for k in result.recall)]))
    for name, shares in (("retrieval", result.recall), ("chance", result.chance)):
        print("".join([f"{name:10}", *(f"{value:8.1%}" for value in shares.values())]))
    benchmark.print_faults()
    title = benchmark.title(
        checkpoint,
        f"recall at 1 {result.recall[1]:.1%} (chance {result.chance[1]:.1%})",
        counts,
        "each query and its nearest train videos, nearest first, with their cosine similarity",
    )
    plot_sheet(result, gallery, queries, gallery_videos, query_videos, title, folder / "retrieval.png")
    return {
        "figures": {
            **{f"recall_at_{k}": value for k, value in result.recall.items()},
            **{f"chance_at_{k}": value for k, value in result.chance.items()},
        },
        "gallery": len(gallery.labels),
        "queries": len(queries.labels),
        "normalise_clips": normalise_clips,
        "left_out": {**gallery_videos.unreadable, **query_videos.unreadable, **gallery.failures, **queries.failures},
        **benchmark.report(),
    }


def retrieval(gallery: ClipOutputs, queries: ClipOutputs) -> Retrieval:
    """Look up each query in the gallery. The values of both are features (N, R, D), whose mean over R is used."""
    ranks = [k for k in RANKS if k <= len(gallery.labels)]
    nearest, similarity = nearest_rows(normalized(queries), normalized(gallery), min(max(RANKS), len(gallery.labels)))
    hits = gallery.labels[nearest] == queries.labels[:, None]  # (Q, depth)
    classes = 1 + int(max(gallery.labels.max(), queries.labels.max()))
    same_class = torch.bincount(gallery.labels, minlength=classes)[queries.labels].tolist()  # (Q,)
    chance = {}
    for k in ranks:
        of_count = {count: chance_of_hit(count, len(gallery.labels), k) for count in set(same_class)}
        chance[k] = sum(of_count[count] for count in same_class) / len(same_class)
    return Retrieval(
        recall={k: hits[:, :k].any(1).float().mean().item() for k in ranks},
        chance=chance,
        nearest=nearest.numpy(),
        similarity=similarity.numpy(),
    )


def normalized(outputs: ClipOutputs) -> Tensor:
    """Return each video's mean feature, minus the mean of the split, scaled to length 1: (N, D) float32.

    The numbers are rounded to multiples of STEP = 2^-26, which changes them by at most 7.5e-9. Float32 holds these
    multiples from -1 to 1. Their products are multiples of 2^-52, and a sum of such products of two vectors of length 1
    is below 2. Float64 holds such sums exactly, so a product of matrices in float64 has no rounding error.
    """
    features = outputs.values.mean(1)  # a new tensor, so the rest needs no further memory
    features -= features.mean(0)
    return F.normalize(features, dim=1, out=features).div_(STEP).round_().mul_(STEP)


def mean_direction(outputs: Tensor) -> Tensor:
    """Scale the feature of each clip to length 1 and return their mean, as the released code does: (10, D) -> (1, D).

    A clip with a large feature then has no more weight than the other clips of its video.
    """
    return mean_of_clips(F.normalize(outputs, dim=1))


def nearest_rows(queries: Tensor, gallery: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Return the nearest rows of the gallery for each query, nearest first: (Q, depth) int64, and cosines in float32.

    The whole matrix of cosines is never stored: for 20,000 queries and 240,000 gallery videos it would have 19 GB.

    Args:
        queries: (Q, D), as `normalized` returns it.
        gallery: (G, D), the same.
        depth: at most G.
    """
    found = [_nearest_rows_of_block(block.double(), gallery, depth) for block in queries.split(_QUERY_ROWS)]
    rows, cosines = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(cosines)


def _nearest_rows_of_block(queries: Tensor, gallery: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    rows, cosines = torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0)
    for first in range(0, len(gallery), _GALLERY_ROWS):
        chunk = (queries @ gallery[first : first + _GALLERY_ROWS].double().T).float()
        if cosines.shape[1] < depth:
            wanted = chunk >= chunk.topk(min(depth, chunk.shape[1])).values[:, -1:]
        else:
            wanted = chunk > cosines[:, -1:]  # of two equally near rows the first counts, and it is found already
        most = int(wanted.sum(1).max())
        if most == 0:
            continue
        # topk gives equal cosines in any order. The rows are sorted, and then the stable sort keeps their order.
        candidates = chunk.topk(most).indices.sort().values
        rows = torch.cat([rows, first + candidates], 1)
        cosines = torch.cat([cosines, chunk.gather(1, candidates)], 1)
        order = cosines.sort(dim=1, descending=True, stable=True).indices[:, :depth]
        rows, cosines = rows.gather(1, order), cosines.gather(1, order)
    return rows, cosines


def chance_of_hit(same_class: int, gallery: int, k: int) -> float:
    """Return the probability that a random choice of k gallery videos holds a video of the query's class.

    `gallery` is the number of gallery videos, `same_class` the number of those with the query's class.

    With G = gallery and n = same_class: 1 - C(G - n, k) / C(G, k), where C is the binomial coefficient.
    """
    return 1 - math.comb(gallery - same_class, k) / math.comb(gallery, k)


def plot_sheet(
    result: Retrieval,
    gallery: ClipOutputs,
    queries: ClipOutputs,
    gallery_videos: VideoSet,
    query_videos: VideoSet,
    title: str,
    path: Path,
) -> None:
    """Plot some queries, each with its nearest train videos. The queries are evenly spaced over the test split."""
    classes = gallery_videos.classes
    rows = []
    for row in evenly_spaced(len(queries.labels), SHEET_QUERIES):
        label = int(queries.labels[row])
        nearest = [
            (
                middle_frame(gallery_videos, int(gallery.indices[g])),
                f"{classes[gallery.labels[g]]} {similarity:.2f}",
                figures.RIGHT if int(gallery.labels[g]) == label else figures.WRONG,
            )
            for g, similarity in zip(result.nearest[row][:SHEET_NEAREST], result.similarity[row], strict=False)
        ]
        rows.append(((middle_frame(query_videos, int(queries.indices[row])), f"query: {classes[label]}"), nearest))
    figures.plot_search_sheet(rows, title, path)


def middle_frame(videos: VideoSet, index: int) -> np.ndarray | None:
    """Return the middle frame of a video as it is shown, (H, W, 3) uint8 RGB; None if it can no longer be read."""
    try:
        frame = videos.read(index, np.array([videos.frames[index] // 2]))
    except UnreadableVideo:
        return None
    return shown(rgb_of(frame), frame.display)[0]
