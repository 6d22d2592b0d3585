"""Which batch fits a GPU, with and without --recompute? Counted without a GPU.

    python -m benchmarks.memory            four backbones, clips of 16 x 112 x 112
    python -m benchmarks.memory --quick    a small network, to try the command

Time to expect: 5 minutes on one core.

A step runs with torch's FakeTensors, which have shapes and no memory: the query encoder's forward pass, the key
encoder's pass over the key clip, and the backward pass, in bfloat16 with float32 parameters. A hook on every operation
counts the bytes of all tensors that exist at the same time. A sample is a video: the views of two clips in pretraining,
of one clip in finetuning. A step holds at most

    parameters (with gradient, momentum, a copy for the exchange, and the key encoder) and queue
    + batch x (views and frames + the peak of the passes)

Not counted: memory that cuDNN takes while it convolves, gaps between tensors, the heads, and the loss. The passes are
not compiled. torch.compile keeps nearly as much for the backward pass of r2plus1d_10 (docs/LOG.md). One step has been
measured, on an H200: r2plus1d_10 with DCLR at 128 clips. `measured` in the results is its peak. The table multiplies
every count by measured / counted of this step.

The same hook counts real passes on this CPU, each in a process of its own. The growth of the process is also measured.

Writes results/memory.json, from which benchmarks/tables.py makes a table.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import types
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import counts, counts_worker, harness
from benchmarks.step_providers import METHOD, Cell
from dclr import report
from dclr.kernels import Views
from dclr.methods.encoder import PAIRS, Encoder, run_backbone
from dclr.models import build_backbone

METHODS = {"DCLR": "vsd", "MoCo": "v", "finetune": "v"}
"""Letters of a clip's views that pass through the query encoder and, in pretraining, through the key encoder."""

BATCH = 8
"""Clips of the counted passes. Nearly all of their bytes are proportional to the number of clips."""

GPU_GB = (24, 40, 80, 140)
USABLE = 0.9
"""The share of a GPU's memory that tensors may take. CUDA itself and gaps between tensors need the rest."""

NETWORKS = ("r2plus1d_10", "r2plus1d_18", "r3d_18", "s3d")
H200 = harness.RESULTS / "nvidia-h200" / "step.json"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that still exist.

    Attributes:
        now, peak: bytes. Tensors that share memory count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.living: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self.living:
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def remove(_: Any) -> None:
            del self.living[key]
            self.now -= size

        self.living[key] = weakref.ref(storage, remove)
        self.now += size
        self.peak = max(self.peak, self.now)


@cache
@counts_worker.as_on_a_gpu()
def count_passes(cell: Cell, letters: str, key: bool, recompute: bool) -> dict[str, int]:
    """Return the bytes that a step's passes with views of `cell.B` clips keep for the backward pass, and their peak.

    key: True if as many views also pass through the key encoder.
    """
    mode = FakeTensorMode()

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor, torch.device("cpu"))

    sizes = asdict(cell) | {"static_once": True}
    backbone, views = counts_worker.make_backbone(sizes, fake), counts_worker.make_views(sizes, fake)
    if recompute:
        backbone.recompute()
    encoder: Any = types.SimpleNamespace(backbone=backbone)
    with mode, LiveBytes() as live:
        return passes(encoder, views, letters, key, live, bfloat16=True)


def passes(encoder: Encoder, views: Any, letters: str, key: bool, live: LiveBytes, bfloat16: bool) -> dict[str, int]:
    """Run the passes of a step, forward and backward. Return what is kept for the backward pass, and the peak."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        maps = list(run_backbone(encoder, views, letters).values())
        kept = live.now
        if key:
            with torch.no_grad():
                run_backbone(encoder, views, letters)
    torch.autograd.backward(maps, [torch.ones_like(each) for each in maps])
    return {"kept": kept, "peak": live.peak}


def fixed_bytes(cell: Cell, method: str) -> int:
    """Return the bytes that do not grow with the batch. The top of the file lists them. Parameters are float32."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_backbone(cell.backbone, cell.width).parameters())
    if method == "finetune":
        return 4 * 4 * parameters
    pairs = len(PAIRS) if method == "DCLR" else 1
    return 5 * 4 * parameters + pairs * METHOD.queue_length * METHOD.embedding_dim * 4


def inputs_bytes(cell: Cell, method: str) -> int:
    """Return the bytes of a sample's views in bfloat16, and twice those of its frames: one batch is prefetched."""
    views = counts.views_bytes(cell, static_once=True)
    both = 2 * views["read"] + views["written"]
    # Without auxiliary views there are T frames a clip, of 2 T + 1.
    share = 1.0 if method == "DCLR" else cell.T / (2 * cell.T + 1)
    return int(both / cell.B * share / (2 if method == "finetune" else 1))


def count(cell: Cell, method: str, recompute: bool) -> harness.Row:
    """Return the memory of a step: that of a sample, and that which does not grow with the batch."""
    found = count_passes(cell, METHODS[method], method != "finetune", recompute)
    inputs = inputs_bytes(cell, method)
    return {
        "backbone": cell.backbone,
        "method": method,
        "clip": [cell.T, cell.side, cell.side],
        "recompute": recompute,
        "kept_bytes": found["kept"] / cell.B,
        "inputs_bytes": inputs,
        "sample_bytes": inputs + found["peak"] / cell.B,
        "fixed_bytes": fixed_bytes(cell, method),
    }


def largest_batch(row: harness.Row, gigabytes: int, margin: float) -> int:
    """Return the largest multiple of 8 clips that fits, or a number below 8. margin: measured / counted memory."""
    room = (USABLE * gigabytes * 1e9 - row["fixed_bytes"]) / (margin * row["sample_bytes"])
    return int(room) // 8 * 8 or int(room)


def measured_step() -> dict[str, Any]:
    """Return the peak of the step that was measured on an H200, and its batch."""
    (row,) = (row for row in json.loads(H200.read_text())["rows"] if row["backbone"] == "r2plus1d_10")
    return {"backbone": "r2plus1d_10", "method": "DCLR", "B": row["B"], "bytes": row["providers"]["ours"]["peak_bytes"]}


def margin(result: dict[str, Any]) -> float:
    """Return measured / counted memory of the step that was measured."""
    measured = result["measured"]
    same = {"backbone": measured["backbone"], "method": measured["method"], "recompute": False}
    row = next((row for row in result["rows"] if same.items() <= row.items()), None)
    return measured["bytes"] / (row["fixed_bytes"] + measured["B"] * row["sample_bytes"]) if row else 1.0


# ------------------------------------------------------------------------------------------------------------- on a CPU


def pass_on_cpu(cell: Cell, recompute: bool, results: Any) -> None:
    """Put the counted peak of an eager step in float32, and the growth of this process, into the queue `results`."""
    torch.manual_seed(0)
    encoder: Any = types.SimpleNamespace(backbone=build_backbone(cell.backbone, cell.width).train())
    if recompute:
        encoder.backbone.recompute()
    rgb, still, dynamic = (torch.randn(cell.B, 3, T, cell.side, cell.side) for T in (cell.T, 1, cell.T))
    views = Views(rgb, still.expand(-1, -1, cell.T, -1, -1), dynamic)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with LiveBytes() as live:
        found = passes(encoder, views, "vsd", True, live, bfloat16=False)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    results.put({"kept_bytes": found["kept"], "peak_bytes": found["peak"], "growth_bytes": growth})


def measure_on_cpu(cell: Cell) -> list[harness.Row]:
    """Return the counted peak of a step and the measured growth of its process, without and with recomputing."""
    context, rows = multiprocessing.get_context("spawn"), []
    for recompute in (False, True):
        results = context.Queue()
        process = context.Process(target=pass_on_cpu, args=(cell, recompute, results))
        process.start()
        found = results.get(timeout=600)
        process.join()
        clip = [cell.T, cell.side, cell.side]
        rows.append({"backbone": cell.backbone, "B": cell.B, "clip": clip, "recompute": recompute, **found})
    return rows


# ------------------------------------------------------------------------------------------------------------------ run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, to try the command")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="backbones to count")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of memory.json")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        cells, on_cpu = [Cell(backbone="r3d_10", B=2, T=8, side=32, width=8)], Cell(B=2, T=8, side=32, width=8)
    else:
        cells, on_cpu = [Cell(backbone=name, B=BATCH) for name in arguments.networks], Cell(B=1)
    measured_here, rows = measure_on_cpu(on_cpu), list[harness.Row]()
    for cell in cells:
        for method in METHODS:
            for recompute in (False, True):
                rows.append(count(cell, method, recompute))
                print(f"{cell.backbone}, {method}, recompute {recompute}: {rows[-1]['sample_bytes'] / 2**30:.3f} GiB")
    content: dict[str, Any] = {
        "question": "which batch fits a GPU, with and without --recompute?",
        "command": harness.command("memory", sys.argv[1:]),
        "environment": report.environment(torch.device("cpu")),
        "measured": measured_step(),
        "cpu": measured_here,
        "rows": rows,
    }
    print(f"measured / counted on an H200: {margin(content):.2f}; on this CPU: {measured_here}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = "memory_quick.json" if arguments.quick else "memory.json"
    report.write_json(arguments.results / name, content)
    print(f"Wrote {arguments.results / name}")


def main(argv: Sequence[str] | None = None) -> None:
    harness.run_command(make_parser(), run, argv)


if __name__ == "__main__":
    main()
