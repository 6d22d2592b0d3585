"""One provider of benchmarks/retrieval.py in a process of its own, so that its peak memory is its own.

    python benchmarks/retrieval_worker.py PROVIDER Q G D DEPTH OUT

Writes the rows of the nearest gallery videos, (Q, DEPTH) int64, to OUT, and prints seconds and peak memory as JSON.
faiss may run in an environment without torch, so each provider imports what it needs.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

CLASSES = 400
"""Classes of the synthetic features, as many as Kinetics-400 has."""

ROWS_AT_ONCE = 1024, 4096
"""Queries and gallery videos of a chunk in `topk of chunks`, as in ours."""


def make_features(rows: int, features: int, seed: int) -> np.ndarray:
    """Return synthetic features (N, D) float32: a mean for each class plus noise, in the order of the classes."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, features), dtype=np.float32)
    made = np.random.default_rng(seed).standard_normal((rows, features), dtype=np.float32)
    made *= 3
    for row in range(rows):
        made[row] += centres[row * CLASSES // rows]
    return made


def unit(features: np.ndarray) -> np.ndarray:
    """Subtract the mean from features and scale them to length 1, in place."""
    features -= features.mean(0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features


def ours(queries: np.ndarray, gallery: np.ndarray, depth: int) -> np.ndarray:
    import torch

    from dclr.evaluation.features import ClipOutputs
    from dclr.evaluation.retrieval import retrieval

    def outputs(features: np.ndarray) -> ClipOutputs:
        labels = torch.arange(len(features)) * CLASSES // len(features)
        return ClipOutputs(torch.from_numpy(features)[:, None], labels, torch.arange(len(features)), {})

    found = retrieval(outputs(gallery), outputs(queries)).nearest
    assert found.shape[1] == depth
    return found


def full_sort(queries: np.ndarray, gallery: np.ndarray, depth: int) -> np.ndarray:
    """Sort the whole matrix of cosines, as retrieval did before it worked by chunks."""
    import torch

    cosines = torch.from_numpy(unit(queries)) @ torch.from_numpy(unit(gallery)).T
    return cosines.sort(dim=1, descending=True, stable=True).indices[:, :depth].numpy()


def topk_of_chunks(queries: np.ndarray, gallery: np.ndarray, depth: int) -> np.ndarray:
    """Take torch.topk of each chunk of float32 products, then of all that was found so far. Ties have no order."""
    import torch

    at_once, rows = ROWS_AT_ONCE
    right, found = torch.from_numpy(unit(gallery)), []
    for left in torch.from_numpy(unit(queries)).split(at_once):
        values, indices = torch.empty(len(left), 0), torch.empty(len(left), 0, dtype=torch.int64)
        for first in range(0, len(right), rows):
            chunk = (left @ right[first : first + rows].T).topk(min(depth, len(right) - first))
            values, indices = torch.cat([values, chunk.values], 1), torch.cat([indices, first + chunk.indices], 1)
            values, order = values.topk(min(depth, values.shape[1]))
            indices = indices.gather(1, order)
        found.append(indices)
    return torch.cat(found).numpy()


def faiss_flat(queries: np.ndarray, gallery: np.ndarray, depth: int) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(unit(gallery))
    return np.asarray(index.search(unit(queries), depth)[1])


PROVIDERS = {
    "ours": ours,
    "full sort": full_sort,
    "topk of chunks": topk_of_chunks,
    "faiss IndexFlatIP": faiss_flat,
}


def main() -> None:
    provider, out = sys.argv[1], sys.argv[6]
    Q, G, D, depth = map(int, sys.argv[2:6])
    queries, gallery = make_features(Q, D, seed=1), make_features(G, D, seed=2)
    # The imports are not timed, but their memory counts.
    PROVIDERS[provider](make_features(64, D, seed=3), make_features(128, D, seed=4), depth)
    begin = time.perf_counter()
    nearest = PROVIDERS[provider](queries, gallery, depth)
    seconds = time.perf_counter() - begin
    np.save(out, nearest)
    print(json.dumps({"seconds": seconds, "peak_gib": peak_gib()}))


def peak_gib() -> float:
    """Return the peak memory of this process in GiB.

    getrusage would also count the memory of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main()
