"""How much arithmetic and memory traffic does a training step take, in an older commit and today?

    python -m benchmarks.counts            r2plus1d_10 and r2plus1d_18, 128 clips of 16 x 112 x 112
    python -m benchmarks.counts --quick    small sizes, to try the command

Time to expect: 5 minutes on one core. No GPU is needed: tensors have shapes and no memory.

Every count is made twice: in the files of an older commit ("before", see benchmarks/baseline.py) and in today's tree
("after"). For each pass of a backbone, benchmarks/counts_worker.py counts FLOP and bytes by part (stem, layer1 to
layer4) and kind. Kinds are convolutions, copies, and the rest, which is batch normalisation with ReLU and the residual
sums. There are two counts of bytes:

    eager       each aten operation reads its arguments and writes its results once
    compiled    each kernel that torch.compile plans for an H200 reads and writes its buffers once

A convolution's backward pass counts as two kernels, which both read the output's gradient. The optimizer and the heads
are not counted.

The bytes of the views and the loss are computed: frames read once, views written once, and the queues read once for
the loss and once for mining. Two comparisons are computed from the shapes of the convolutions: computing equal frames
of the static view once up to some stage, and the two ways to write the stem's layout.

Writes results/counts.json, from which benchmarks/tables.py makes a table.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline, harness
from benchmarks.step_providers import METHOD, Cell
from dclr import report

PARTS = ("stem", "layer1", "layer2", "layer3", "layer4")
KINDS = ("convolution", "normalisation", "copy")
CELLS = (Cell(B=128), Cell(B=128, backbone="r2plus1d_18"))
QUICK_CELLS = (Cell(B=2, T=8, side=32, H=48, W=64, width=8),)

LIMIT = 2**31
"""Number of elements from which libraries need 64-bit offsets. No tensor of a step may reach it at 128 clips."""

Convolution = tuple[str, list[int], list[int], list[int]]
"""Part, and shapes of input, weight and output."""


# ---------------------------------------------------------------------------------------------------------------- count


def count_tree(tree: Path, cell: Cell, static_once: bool) -> dict[str, Any]:
    """Return the counts of a source tree, by pass.

    static_once: True if the tree takes a static view of one frame, expanded.

    Raises RuntimeError with the last line of the process's errors if it failed.
    """
    worker = Path(__file__).with_name("counts_worker.py")
    question = json.dumps(asdict(cell) | {"static_once": static_once})
    done = subprocess.run(
        [sys.executable, "-P", str(worker), question],
        env=os.environ | {"PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tree,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"counting in {tree.name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(passes: dict[str, Any]) -> dict[str, Any]:
    """Return the sums over the passes: FLOP and bytes by "part, kind", their totals, and the largest tensor."""
    found: dict[str, Any] = {}
    counts = {"flops": ("eager", "flops"), "eager_bytes": ("eager", "bytes"), "compiled_bytes": ("compiled", "bytes")}
    for name, (mode, key) in counts.items():
        cells = [(where, count) for each in passes.values() for where, count in each[mode][key].items()]
        found[name] = {where: sum(count for other, count in cells if other == where) for where, _ in cells}
        found[f"{name}_total"] = sum(count for _, count in cells)
        found[f"{name}_by_pass"] = {each: sum(passes[each][mode][key].values()) for each in passes}
    # Both are needed, because torch.compile can add tensors and remove them.
    found["largest_eager"] = max(each["eager"]["largest"] for each in passes.values())
    found["largest_compiled"] = max(each["compiled"]["largest"] for each in passes.values())
    return found


def views_bytes(cell: Cell, static_once: bool) -> dict[str, int]:
    """Return the bytes that making the views of both clips reads and writes at least, in bfloat16.

    The source is YUV 4:2:0, 1.5 bytes a pixel: a clip of T frames and a still.
    """
    frames = 2 * cell.B * (2 * cell.T + (1 if static_once else cell.T))
    read = 2 * cell.B * (cell.T + 1) * cell.H * cell.W * 3 // 2
    return {"read": read, "written": frames * 3 * cell.side**2 * 2}


def loss_bytes() -> dict[str, int]:
    """Return the bytes of float32 queue entries that the loss and mining read."""
    entry = METHOD.queue_length * METHOD.embedding_dim * 4
    return {"loss": 5 * entry, "mining": 2 * entry}


# --------------------------------------------------------------------------------------------------------- equal frames


def frames_computed(convolutions: Sequence[Convolution], T: int, last: str | None) -> list[tuple[int, int, int, int]]:
    """Return for each convolution how many frames of a static view it reads and writes, and how many the view has.

    Frames are equal if all that they were computed from is equal. A convolution in time pads with zeros, so its outputs
    at both ends differ from those in the middle.

    Args:
        convolutions: in the order of a forward pass; in a block, both factored convolutions, then the shortcut.
        T: frames of the view.
        last: the last part that computes equal frames once. None: no part does.

    Returns:
        (read, written, frames of the input, frames of the output) for each convolution.
    """
    once = () if last is None else PARTS[: PARTS.index(last) + 1]
    frames, block_input, found = [0] * T, [0] * T, []
    seen_in_block = 0
    for number, (part, given, weight, made) in enumerate(convolutions):
        before = frames
        if len(weight) == 5:  # the shortcut, which has no extent in time
            before = block_input
            stride = round(given[2] / made[2])
            shortcut = block_input[::stride]
            frames = canonical(list(zip(frames, shortcut, strict=True)))
            after = shortcut
        elif weight[2:] == [3, 1]:  # a factored convolution in time
            stride = round(given[2] / made[2])
            padded = [None, *frames, None]
            frames = canonical([tuple(padded[t : t + 3]) for t in range(0, len(frames), stride)])
            after = frames
            seen_in_block += 1
        else:
            after = frames
        count = (lambda each: len(set(each))) if part in once else len
        found.append((count(before), count(after), len(before), len(after)))
        following = convolutions[number + 1] if number + 1 < len(convolutions) else None
        if part == "stem":
            block_input, seen_in_block = frames, 0
        elif seen_in_block == 2 and (following is None or len(following[2]) == 4):  # a block ends here
            if len(weight) == 4:
                frames = canonical(list(zip(frames, block_input, strict=True)))
            block_input, seen_in_block = frames, 0
    return found


def canonical(values: Sequence[Any]) -> list[int]:
    """Return the values as numbers: equal values have equal numbers."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def static_view_cost(convolutions: Sequence[Convolution], cell: Cell, last: str | None) -> dict[str, float]:
    """Return FLOP and bytes of the static view in a step: three forward passes and one backward pass.

    A convolution moves its input and its output in bfloat16, once forward and twice backward. Batch normalisation with
    ReLU moves 6 bytes an element forward and 10 backward.

    convolutions: those of a pass with three views.
    """
    flops = size = 0.0
    for (_, given, weight, made), (read, written, all_in, all_out) in zip(
        convolutions, frames_computed(convolutions, cell.T, last), strict=True
    ):
        inputs, outputs = math.prod(given) / 3 * read / all_in, math.prod(made) / 3 * written / all_out
        flops += (3 + 2) * 2 * outputs * math.prod(weight[1:])
        size += 3 * (2 * (inputs + outputs) + 6 * outputs) + 2 * 2 * (inputs + outputs) + 10 * outputs
    return {"flops": flops, "bytes": size}


def equal_frames(convolutions: Sequence[Convolution], cell: Cell) -> list[dict[str, Any]]:
    """Return the cost of the static view if equal frames are computed once up to a stage, and its frames by stage."""
    rows = []
    for last in (None, "layer1", "layer2", "layer4"):
        computed = frames_computed(convolutions, cell.T, last)
        frames = {
            part: written
            for (part, _, weight, _), (_, written, *_) in zip(convolutions, computed, strict=True)
            if len(weight) == 4  # the convolutions of a block, without its shortcut
        }
        rows.append({"last": last, **static_view_cost(convolutions, cell, last), "frames": frames})
    return rows


def stem_layouts(cell: Cell) -> dict[str, dict[str, float]]:
    """Return the bytes of the stem's input in a step, from the view kernels to the first convolution, in bfloat16.

    plain     view kernels write 3 channels; before each pass a kernel rearranges them to 16 channels of blocks
    blocks    view kernels write the blocks

    The rgb and the dynamic view have T frames, the static view has one. The auxiliary views of the query clip pass
    through both encoders. The query encoder's first convolution reads its input again for the gradient of its weight.
    """
    side = math.ceil(cell.side / 2) + 3
    plain, blocks = 2 * 3 * cell.side**2, 2 * 16 * side**2  # bytes of a frame
    all_views, auxiliary = 2 * cell.T + 1, cell.T + 1  # frames
    written = cell.B * 2 * all_views
    passes = cell.B * (2 * all_views + auxiliary)
    convolved = (passes + cell.B * all_views) * blocks
    return {
        "plain": {"view_kernels": written * plain, "rearranging": passes * (plain + blocks), "convolution": convolved},
        "blocks": {"view_kernels": written * blocks, "rearranging": 0, "convolution": convolved},
    }


# ------------------------------------------------------------------------------------------------------------------ run


def count(cell: Cell, before: Path, after: Path) -> harness.Row:
    """Return all counts of a cell."""
    old, new = count_tree(before, cell, static_once=False), count_tree(after, cell, static_once=True)
    convolutions = old["key encoder, key clip"]["eager"]["convolutions"]
    return asdict(cell) | {
        "before": summarise(old) | {"views_bytes": views_bytes(cell, static_once=False)},
        "after": summarise(new) | {"views_bytes": views_bytes(cell, static_once=True)},
        "loss_bytes": loss_bytes(),
        "static_view": equal_frames(convolutions, cell),
        "stem_layouts": stem_layouts(cell),
    }


def by_part(row: harness.Row) -> list[list[str]]:
    """Return the lines of a table: FLOP and compiled bytes by part, before and after."""
    lines = []
    for part in (*PARTS, "sum"):
        cells = [part]
        for key, scale in (("flops", 1e12), ("compiled_bytes", 1e9)):
            for kind in ("convolution",) if key == "flops" else ("convolution", "normalisation"):
                for tree in ("before", "after"):
                    counts = row[tree][key].items()
                    wanted = [v for k, v in counts if part in (k.split(", ")[0], "sum") and kind_of(k) == kind]
                    cells.append(f"{sum(wanted) / scale:.1f}")
        lines.append(cells)
    return lines


def kind_of(key: str) -> str:
    """Return the kind of a key "part, kind". Copies count as normalisation, because they copy its tensors."""
    kind = key.split(", ")[1]
    return "normalisation" if kind == "copy" else kind


COLUMNS = ["part", "TFLOP before", "after", "GB of convolutions before", "after", "GB of the rest before", "after"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=baseline.COMMIT, help=f"the older commit (default {baseline.COMMIT})")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of counts.json")
    return parser


def run(arguments: argparse.Namespace) -> None:
    environment = report.environment(torch.device("cpu"))
    before, rows = baseline.fill(arguments.commit), list[harness.Row]()
    for cell in QUICK_CELLS if arguments.quick else CELLS:
        row = count(cell, before, harness.ROOT)
        rows.append(row)
        print(f"\n{cell}\n\n{harness.table(COLUMNS, by_part(row))}\n")
        for tree in ("before", "after"):
            largest = max(row[tree]["largest_eager"], row[tree]["largest_compiled"])
            print(f"largest tensor {tree}: {largest / LIMIT:.2f} x 2^31 elements")
    content = {
        "question": "how much arithmetic and memory traffic does a training step take, before and after?",
        "command": harness.command("counts", sys.argv[1:]),
        "commit_before": arguments.commit,
        "environment": environment,
        "rows": rows,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = "counts_quick.json" if arguments.quick else "counts.json"
    report.write_json(arguments.results / name, content)
    print(f"Wrote {arguments.results / name}")


def main(argv: Sequence[str] | None = None) -> None:
    harness.run_command(make_parser(), run, argv)


if __name__ == "__main__":
    main()
