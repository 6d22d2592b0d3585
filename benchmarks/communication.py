"""How many bytes does a rank send in a training step, and what does that cost on 8 to 512 GPUs?

    python -m benchmarks.communication                     2, 4 and 8 ranks on a CPU, today's tree and an older commit's
    python -m benchmarks.communication --commit acfd60c    compare with another commit
    python -m benchmarks.communication --ranks 2           fewer ranks

Time to expect: 10 minutes on two cores. See benchmarks/baseline.py for the older commit's files.

The operating system counts the bytes of each connection (benchmarks/communication_worker.py). Ranks are processes on
one machine that communicate by gloo. The clips have their true size: 16 frames of 171 x 128, views of 112 x 112. The
network is narrow, because only gradients and parameters depend on its width. The tables show next to each count the
bytes of the model, `sent_bytes`. The difference is gloo's headers.

The time of a step on many GPUs is a MODEL, `model_step`. Only the compute time of a step on one H200 was measured. The
assumptions are the constants below.

Prints both tables and writes communication.json and communication.png into results/cpu.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import baseline, harness
from benchmarks.harness import ROOT, Row
from dclr.config import MethodConfig, ModelConfig
from dclr.data.augmentation import PRETRAIN, draw_augmentation
from dclr.errors import UserError
from dclr.methods import DCLR

COMMIT = "acfd60c"
"""The last commit whose ranks gathered the views of all ranks' key clips."""

TASK: dict[str, Any] = {
    "batch": 4, "T": 16, "H": 128, "W": 171, "side": 112, "backbone": "r2plus1d_10", "width": 4, "queue_length": 512,
    "steps": 1,
}  # fmt: skip
"""What each rank computes."""

VARIANTS: dict[str, list[tuple[str, str, str | None]]] = {
    "before": [("dclr", "ddp.json", None), ("moco", "ddp.json", None)],
    "after": [
        ("dclr", "ddp.json", "crops"),
        ("dclr", "zero1.json", "crops"),
        ("dclr", "ddp.json", "views"),
        ("moco", "ddp.json", "crops"),
    ],
}
"""Method, DeepSpeed configuration and form of the clips, by tree. The older tree has one form."""

KINDS = ("clips", "keys", "maps", "gradients", "parameters", "exchange")
PARAMETER_BYTES = 226
"""Bytes of the augmentation's parameters, which are sent with a clip's crops."""

# --------------------------------------------------------------------------------------------- assumptions of the model

GPUS_A_MACHINE = 8
NVLINK = 450e9
"""Bytes a second of one GPU in one direction. NVIDIA's data sheet of the H200 gives 900 GB/s for both directions."""
NETWORKS = {"InfiniBand": 50e9, "Ethernet": 100e9 / 8 / GPUS_A_MACHINE}
"""Bytes a second of one GPU to other machines. InfiniBand: 400 Gb/s for each GPU, as in NVIDIA's data sheet of the DGX
H200. Ethernet: one card of 100 Gb/s, which the 8 GPUs of a machine share (an assumption about a plain cluster)."""
REACHED = 0.8
"""Share of both rates that a collective operation reaches (an assumption)."""
LATENCY = 20e-6
"""Seconds for each doubling of the ranks in a collective operation (an assumption)."""
BACKWARD = 0.5
"""Share of a step in which gradients can travel while the backward pass computes others (an assumption)."""
RATES = {"measured": 301, "goal": 530}
"""Samples a second of one H200 at 128 clips: as measured (results/nvidia-h200/step.json), and the goal."""
CLIPS = 128
"""Clips of a GPU. The batch grows with the number of GPUs. At 512 GPUs it is 65,536, so each step replaces the whole
queue even if the queue has 65,536 entries."""
GPUS = (8, 64, 512)


# ---------------------------------------------------------------------------------------------------------------- bytes


def crop_bytes(boxes: Sequence[Sequence[int]], frames: Sequence[int]) -> int:
    """Return the bytes of the crops of a clip in YUV 4:2:0.

    Args:
        boxes: top, left, height and width. A crop begins at an even row and column.
        frames: how many frames each box crops.
    """
    total = 0
    for (top, left, height, width), count in zip(boxes, frames, strict=True):
        h, w = height + top % 2, width + left % 2
        total += count * (h * w + 2 * ((h + 1) // 2) * ((w + 1) // 2))
    return total


def view_bytes(task: dict[str, Any], method: str, itemsize: int) -> int:
    """Return the bytes of a clip's views. The older tree sends all of them for every method."""
    values = 3 * task["side"] ** 2
    return itemsize * values * (2 * task["T"] + 1 if method == "dclr" else task["T"])


def sent_bytes(
    ranks: int, batch: int, *, clip: float, key: float, maps: float, parameters: int, zero: bool, gathers: bool = False
) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by kind, as a mean over ranks and shuffles. It receives as many.

        clips, maps     all-to-all: a clip stays on its rank with probability 1 / R    B b (R - 1) / R
        keys            all-gather: all ranks get all keys                             B b (R - 1)
        gradients       ring all-reduce of N float32                                   4 N 2 (R - 1) / R
        parameters      ring all-gather of N float32 under ZeRO-1                      4 N (R - 1) / R

    Args:
        ranks: R.
        batch: B, clips of a rank.
        clip, key, maps: b, bytes of one clip, of its keys and of its maps.
        parameters: N.
        zero: True if ZeRO-1 shards the optimizer's state.
        gathers: True if clips and maps are all-gathered like keys, as in the older commit.
    """
    leaving = (ranks - 1) / ranks
    to_all = (ranks - 1) if gathers else leaving
    return {
        "clips": batch * clip * to_all,
        "keys": batch * key * (ranks - 1),
        "maps": batch * maps * to_all,
        "gradients": 8 * parameters * leaving,
        "parameters": 4 * parameters * leaving if zero else 0.0,
    }


def modelled(task: dict[str, Any], variant: dict[str, Any], ranks: int, before: bool) -> dict[str, float]:
    """Return the model's bytes for a counted variant, with the shuffles of the counted steps."""
    found = variant["ranks"][0]
    views = view_bytes(task, "dclr" if before else variant["method"], found["view_itemsize"])
    if variant["form"] == "crops":
        stills = variant["method"] == "dclr"
        frames = (task["T"], 1) if stills else (task["T"],)
        sizes = [crop_bytes(b[: len(frames)], frames) for each in variant["ranks"] for b in each["key_boxes"]]
        sizes = [size + PARAMETER_BYTES for size in sizes]
    else:
        sizes = [views] * (task["batch"] * ranks)
    rows = found["row_bytes"]
    model = sent_bytes(
        ranks, task["batch"], clip=statistics.mean(sizes), key=rows["keys"], maps=rows.get("maps", 0),
        parameters=found["parameters"], zero="zero" in variant["ds_config"], gathers=before,
    )  # fmt: skip
    if not before:
        leaving = [list(leaving_sizes(sizes, task["batch"], step)) for step in range(1, 1 + task["steps"])]
        model["clips"] = sum(map(sum, leaving)) / ranks / task["steps"]
        share = sum(map(len, leaving)) / task["steps"] / len(sizes)
        model["maps"] = task["batch"] * rows.get("maps", 0) * share
    return model


def leaving_sizes(sizes: Sequence[int], batch: int, step: int) -> Iterator[int]:
    """Yield the sizes of the clips that leave their rank in a step of a run with the seed 0."""
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(step)).tolist()
    for position, clip in enumerate(order):
        if position // batch != clip // batch:
            yield sizes[clip]


# ---------------------------------------------------------------------------------------------------------------- times


def transfer_seconds(kind: str, sent: float, ranks: int, network: float) -> float:
    """Return the seconds of a collective operation in which each rank sends `sent` bytes.

    All-to-all (clips and maps): a GPU sends different bytes to each other GPU, over NVLink or over its share of the
    network. Rings (all others): the GPUs of a machine pass on the same bytes, so each byte crosses the network once for
    the whole machine, which uses the network of all its GPUs. The slower of NVLink and network counts.

    Args:
        kind: one of KINDS.
        network: bytes a second of one GPU to other machines.
    """
    machine = min(ranks, GPUS_A_MACHINE)
    if kind in ("clips", "maps"):
        outside = sent * (ranks - machine) / (ranks - 1)
        inside = sent - outside
    else:
        inside, outside = sent, sent / machine if ranks > machine else 0.0
    return max(inside / NVLINK, outside / network) / REACHED + LATENCY * math.log2(ranks)


def model_step(gpus: int, network: str, rate: str, clip: dict[str, float], parameters: int) -> Row:
    """Return the modelled milliseconds of a step by kind, before and after, and the share of it that is computing.

    Args:
        clip: bytes of one clip: "views" in bfloat16, "crops", "key", "maps".
        parameters: trained parameters of the network.
    """
    compute = CLIPS / RATES[rate]
    row: Row = {"gpus": gpus, "network": network, "rate": rate, "compute_ms": compute * 1e3}
    for tree, form in (("before", "views"), ("after", "crops")):
        sent = sent_bytes(
            gpus, CLIPS, clip=clip[form], key=clip["key"], maps=clip["maps"], parameters=parameters, zero=True,
            gathers=tree == "before",
        )  # fmt: skip
        seconds = {kind: transfer_seconds(kind, size, gpus, NETWORKS[network]) for kind, size in sent.items()}
        if tree == "before":  # a ring instead of an all-to-all
            seconds |= {k: transfer_seconds("keys", sent[k], gpus, NETWORKS[network]) for k in ("clips", "maps")}
        total = compute + sum(seconds.values())
        hidden = min(seconds["gradients"], BACKWARD * compute)
        row[tree] = {
            "sent_bytes": sent,
            "ms": {kind: 1e3 * each for kind, each in seconds.items()},
            "step_ms": 1e3 * total,
            "computing": compute / total,
            "computing_overlapped": compute / (total - hidden),
            "samples_per_second": gpus * CLIPS / total,
        }
    row["before"]["received_gib"] = (gpus - 1) * CLIPS * clip["views"] / 2**30
    return row


def published_clip(counted: dict[str, float]) -> dict[str, float]:
    """Return the bytes of one clip of the published size: views in bfloat16, mean crops of 171 x 128, key and maps.

    `counted`: the bytes of a clip's keys and maps in the counted steps. They do not depend on the network's width.
    """
    rng = np.random.default_rng(0)
    height, width = TASK["H"], TASK["W"]
    draws = [[draw_augmentation(rng, height, width, PRETRAIN)["box"].tolist() for _ in range(2)] for _ in range(2000)]
    crops = statistics.mean(crop_bytes(boxes, (TASK["T"], 1)) for boxes in draws) + PARAMETER_BYTES
    return {"views": view_bytes(TASK, "dclr", 2), "crops": crops, "key": counted["keys"], "maps": counted["maps"]}


def count_parameters(backbone: str) -> int:
    """Return the trained parameters of DCLR with a backbone of the published width."""
    with torch.device("meta"):
        network = DCLR(ModelConfig(backbone=backbone, width=64), MethodConfig())
    return sum(p.numel() for p in network.query.parameters())


def model(clip: dict[str, float], parameters: int) -> list[Row]:
    """Return a row for each number of GPUs, network and compute time."""
    networks = {8: ("InfiniBand",)}  # one machine: no network
    return [
        model_step(gpus, network, rate, clip, parameters)
        for rate in RATES
        for gpus in GPUS
        for network in networks.get(gpus, tuple(NETWORKS))
    ]


# --------------------------------------------------------------------------------------------------------------- launch


def launch(tree: Path, ranks: int, variants: Sequence[tuple[str, str, str | None]]) -> dict[str, Any]:
    """Count the bytes that `ranks` ranks of a source tree send. Raises SystemExit with the error of a failed rank."""
    task = TASK | {"variants": [dict(zip(("method", "ds_config", "form"), each, strict=True)) for each in variants]}
    worker = Path(__file__).with_name("communication_worker.py")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        out, processes = Path(folder) / "counts.json", []
        for rank in range(ranks):
            environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (Path(folder) / f"log{rank}").open("w") as log:
                command = [sys.executable, "-P", str(worker), json.dumps(task), str(out)]
                processes.append(
                    subprocess.Popen(command, cwd=tree, env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                                     stdout=log, stderr=log)
                )  # fmt: skip
        statuses = [process.wait() for process in processes]
        if any(statuses) or not out.is_file():
            logs = [Path(folder) / f"log{rank}" for rank, status in enumerate(statuses) if status]
            said = logs[0].read_text(errors="replace").strip().splitlines() if logs else ["no result"]
            raise SystemExit(f"a launch of {ranks} ranks failed: {(said or ['no message'])[-1][:300]}")
        return json.loads(out.read_text())


def count(ranks: int, trees: dict[str, Path]) -> list[Row]:
    """Return a row for each tree and variant: counted and modelled bytes that a rank sends in a step."""
    rows = []
    for tree, variants in VARIANTS.items():
        found = launch(trees[tree], ranks, variants)
        for variant in found["variants"]:
            sent = [each["sent"] for each in variant["ranks"]]
            counted = {kind: statistics.mean(each.get(kind, 0) for each in sent) for kind in (*KINDS, "other")}
            rows.append(
                {"tree": tree, "ranks": ranks, **{name: variant[name] for name in ("method", "ds_config", "form")}}
                | {
                    "counted": counted,
                    "counted_most": {kind: max(each.get(kind, 0) for each in sent) for kind in KINDS},
                    "modelled": modelled(TASK, variant, ranks, tree == "before"),
                    "heartbeat": statistics.mean(found["heartbeat"]),
                    "row_bytes": variant["ranks"][0]["row_bytes"],
                    "precision": variant["ranks"][0]["precision"],
                    "parameters": variant["ranks"][0]["parameters"],
                }
            )
    return rows


# --------------------------------------------------------------------------------------------------------------- tables


def name_of(row: Row) -> str:
    """Return a row's method, DeepSpeed configuration and form of the clips, for a table."""
    form = "all views to all ranks" if row["tree"] == "before" else row["form"]
    zero = "ZeRO-1" if "zero" in row["ds_config"] else "DDP"
    return f"{row['method']}, {zero}, {form}"


def bytes_table(rows: Sequence[Row]) -> str:
    """Return the bytes that a rank sends in a step: counted / modelled."""
    lines = []
    for row in sorted(rows, key=lambda row: row["ranks"]):
        cells = [
            f"{row['counted'][kind] / 1e3:,.1f} / {row['modelled'][kind] / 1e3:,.1f}" if row["counted"][kind] else ""
            for kind in KINDS[:-1]
        ]
        lines.append([f"{row['ranks']}", name_of(row), *cells, f"{row['counted']['exchange'] / 1e3:.1f}"])
    return harness.table(["ranks", "method, sharding, clips", *KINDS], lines)


def model_table(rows: Sequence[Row]) -> str:
    """Return the modelled step on many GPUs."""
    lines = []
    for row in rows:
        before, after = row["before"], row["after"]
        network = "NVLink" if row["gpus"] <= GPUS_A_MACHINE else row["network"]
        gradients = after["ms"]["gradients"] + after["ms"]["parameters"]
        lines.append(
            [
                f"{row['gpus']}, {network}",
                f"{row['compute_ms']:.0f} ({row['rate']})",
                f"{before['ms']['clips']:,.1f}",
                f"{after['ms']['clips']:,.1f}",
                f"{after['ms']['keys']:,.1f}",
                f"{gradients:,.1f}",
                f"{before['computing']:.0%}",
                f"{after['computing']:.0%}",
                f"{after['computing_overlapped']:.0%}",
                f"{before['received_gib']:,.1f} GiB",
            ]
        )
    columns = ["GPUs, network", "compute, ms", "clips before, ms", "clips, ms", "keys, ms"]
    columns += [
        "gradients and parameters, ms",
        "computing before",
        "computing",
        "computing, gradients overlapped",
        "views received before",
    ]
    return harness.table(columns, lines)


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot the bytes of clips, keys and maps by the number of ranks."""
    figure, panel = plt.subplots(figsize=(9, 3.8))
    # Lines with equal values cover each other, so each has another mark, and the first marks are larger.
    for name, mark, size in zip(dict.fromkeys(map(name_of, rows)), "osD^vx", (14, 11, 9, 8, 7, 6), strict=False):
        own = [row for row in rows if name_of(row) == name]
        sent = [sum(row["counted"][kind] for kind in ("clips", "keys", "maps")) / 1e6 for row in own]
        panel.plot([row["ranks"] for row in own], sent, f"{mark}-", markersize=size, fillstyle="none", label=name)
    panel.set_xscale("log", base=2)
    ranks = sorted({row["ranks"] for row in rows})
    panel.set_xticks(ranks, [str(count) for count in ranks])
    panel.set_yscale("log")
    panel.set_xlabel("ranks")
    panel.set_ylabel("MB that a rank sends in a step")
    panel.grid(True, alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    harness.add_titles(figure, "Clips, keys and maps, 4 clips a rank: bytes counted", caption)
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--commit", default=COMMIT, help=f"the older commit (default {COMMIT})")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    return parser


def run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> None:
    if min(arguments.ranks) < 2:
        raise UserError(f"--ranks is {min(arguments.ranks)}, but must be at least 2: one rank sends nothing")
    measured = harness.Run("communication", argv, arguments, torch.device("cpu"))
    trees = {"before": baseline.fill(arguments.commit), "after": ROOT}
    for ranks in arguments.ranks:
        measured.rows += count(ranks, trees)
        print(bytes_table([row for row in measured.rows if row["ranks"] == ranks]), flush=True)
    dclr = next(row for row in measured.rows if (row["tree"], row["method"]) == ("after", "dclr"))
    clip, parameters = published_clip(dclr["row_bytes"]), count_parameters("r2plus1d_10")
    modelled_steps = model(clip, parameters)
    print(model_table(modelled_steps))
    content = {
        "question": "how many bytes does a rank send in a training step, and what does that cost on many GPUs?",
        "commit_before": arguments.commit,
        "task": TASK,
        "clip_bytes": clip,
        "parameters": parameters,
        "model": modelled_steps,
    }
    caption = measured.caption("gloo on one machine, bytes counted by the operating system")
    measured.publish(plot(measured.rows, caption), content)


def main(argv: Sequence[str] | None = None) -> None:
    harness.run_command(make_parser(), lambda arguments: run(arguments, argv), argv)


if __name__ == "__main__":
    main()
