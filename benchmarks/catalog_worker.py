"""One rank of benchmarks/catalog.py: starts a run on a data set, waits for its first batch and reads the memory in use.

    python -m benchmarks.catalog_worker DATA RESULT STARTED

Writes a JSON file: seconds since STARTED (time.time() of the parent), MiB of the rank before it starts its data worker,
and MiB of the rank, its worker and the worker's decoder process together after the first batch. Environment variables
give the rank, as a launcher sets them.
"""

import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dclr.config import make_config
from dclr.data.samples import PairSamples
from dclr.training import engine
from dclr.training.setup import prepare_run

FLAGS = {
    "width": 4, "clip_length": 8, "crop_size": 32, "batch_size": 16, "epochs": 1, "workers": 1, "fill_steps": 0,
    "queue_length": 32, "embedding_dim": 32, "ds_config": "ddp", "compile": "off",
}  # fmt: skip


def memory(processes: Sequence[int | str]) -> dict[str, float]:
    """Return the MiB that processes have together. A page that n processes share counts as 1/n for each.

    `own`: pages that are not part of a file, so the system cannot drop them. `pss`: all pages, including those of
    libraries and of the file that the ranks share.
    """
    found = {"own": 0.0, "pss": 0.0}
    for process in processes:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        sizes = {name: int(size) / 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", rollup, re.MULTILINE)}
        found["own"] += sizes["Pss_Anon"]
        found["pss"] += sizes["Pss"]
    return found


def child_of(process: int | str) -> int:
    children = Path(f"/proc/{process}/task").glob("*/children")
    return int(" ".join(child.read_text() for child in children).split()[0])


def main() -> None:
    data, result, started = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    seconds = {"imports": time.time() - started}
    device = engine.start_processes()
    config = make_config("pretrain", {**FLAGS, "data": str(data), "out": str(result.with_suffix(""))})
    seconds["processes"] = time.time() - started
    with tempfile.TemporaryDirectory() as folder:
        run = prepare_run("pretrain", "demo", config, Path(folder), device, resumed=False)
    seconds["videos"] = time.time() - started
    rank = memory(["self"])
    batches = run.batches(PairSamples(run.videos, config.data, 0), run.batch_sampler())
    batch = next(batches)
    seconds["first_batch"] = time.time() - started
    worker = child_of("self")
    found = {
        "videos": len(run.videos),
        "replaced": len(batch.failures),
        "seconds": seconds,
        "rank": rank,
        "with_worker": memory(["self", worker, child_of(worker)]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "fingerprint": run.videos.fingerprint(),
    }
    result.write_text(json.dumps(found))
    engine.stop_processes()


if __name__ == "__main__":
    main()
