"""Write the tables of docs/performance.md from the results committed under results/.

    python -m benchmarks.tables      run it after committing new results

Each folder of results/ is one device. Tables of a device without a GPU give speeds as ratios, because a ratio is
measured in one run, in turns. It holds on other machines far better than a time.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import communication, counts, harness, memory, retrieval
from benchmarks.harness import RELEASED
from benchmarks.step_providers import Cell

PAGE = harness.ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/tables.py -->\n", "<!-- end -->\n"  # the tables stand between them

Result = dict[str, Any]


def step_table(result: Result, gpu: bool) -> str:
    columns = ["network, batch, clip", "vs. released code", "vs. eager bf16", "vs. released code, both float32"]
    lines = []
    for row in result["rows"]:
        found = row["providers"]
        line = [
            f"{row['backbone']}, {row['B']}, {row['T']} x {row['side']} x {row['side']}",
            _speedup(found, "ours", RELEASED),
            _speedup(found, "ours", "eager bf16"),
            _speedup(found, "ours, float32", RELEASED),
        ]
        ours = found.get("ours", {})
        if gpu and "median_ms" in ours:
            line += [f"{ours['samples_per_second']:.0f}", f"{ours['share_of_peak']:.0%}"]
            line.append(f"{ours['peak_bytes'] / 2**30:.1f} GiB")
        elif gpu:
            line += [ours.get("skipped", "")[:40], "", ""]
        lines.append(line)
    return harness.table([*columns, *(["samples/s", "of the peak rate", "peak memory"] if gpu else [])], lines)


GPU_GIB = (24, 40, 80, 139)
"""The memory of common GPUs in GiB. An H200, sold with 141 GB, has 139."""


def memory_table(result: Result, gpu: bool) -> str:
    """Return the largest batch by the memory of a GPU, computed from the measured peak of each measured batch.

    Nearly all memory holds activations, which grow with the batch. So peak / batch is taken as the memory of a sample,
    and batches are rounded down to multiples of 8.
    """
    if not gpu:
        return ""
    lines = []
    for row in result["rows"]:
        if (peak := row["providers"].get("ours", {}).get("peak_bytes")) is None:
            continue
        sample = peak / row["B"]
        largest = [int(memory.USABLE * gib * 2**30 / sample) // 8 * 8 for gib in GPU_GIB]
        clip = f"{row['T']} x {row['side']} x {row['side']}"
        lines.append([f"{row['backbone']}, {clip}", f"{sample / 2**30:.2f} GiB", *map(str, largest)])
    return harness.table(["network, clip", "memory of a sample", *(f"{gib} GiB" for gib in GPU_GIB)], lines)


def _speedup(found: Result, ours: str, other: str) -> str:
    """Return the speedup of `ours` over `other`, the median of the rounds' ratios, or why one of them was skipped."""
    rows = [found.get(name, {}) for name in (other, ours)]
    if not all("ms_by_round" in row for row in rows):
        return next((row["skipped"][:40] for row in rows if "skipped" in row), "")
    ratios = sorted(theirs / own for theirs, own in zip(*(row["ms_by_round"] for row in rows), strict=True))
    return f"{ratios[len(ratios) // 2]:.2g}"


def loader_table(result: Result, gpu: bool) -> str:
    names = [name for name in result["rows"][0]["providers"] if name != RELEASED]
    lines = []
    for row in result["rows"]:
        found = row["providers"]
        line = [f"{row['data']}, {row['workers']}"]
        for name in names:
            speedup = found[name].get("times_released")
            line.append(found[name].get("skipped", "")[:40] if speedup is None else f"{speedup:.3g}")
        released = found[RELEASED]
        lines.append([*line, f"in {released['wrong_videos']} of {released['checked_videos']} videos"])
    return harness.table(["data, workers", *names, "wrong frames of released code"], lines)


def remote_table(result: Result, gpu: bool) -> str:
    """Return a row for each way of reading: its speed relative to the local store, and what a sample costs."""
    rows = result["rows"]
    lines = []
    for name, found in rows[0]["providers"].items():
        if "skipped" in found:
            lines.append([name, *[found["skipped"][:40]] * len(rows), "", "", ""])
            continue
        ratios = [f"{row['providers'][name]['times_local']:.2g}" for row in rows]
        processor = [row["providers"][name]["processor_ms_per_sample"]["median"] for row in rows]
        costs = [f"{found['bytes_per_sample'] / 1e6:.2f}", f"{found['requests_per_sample']:.2f}"]
        lines.append([name, *ratios, f"{min(processor):.1f} to {max(processor):.1f}", *costs])
    latencies = [f"latency {row['latency_ms']} ms" for row in rows]
    columns = ["read from", *latencies, "processor ms a sample", "MB a sample", "requests a sample"]
    return harness.table(columns, lines)


def train_table(result: Result, gpu: bool) -> str:
    columns = ["read from, processes", "waits for data", "speedup over videos", "speedup over one process"]
    lines = [
        [
            f"{row['source']}, {row['processes']}",
            f"{row['data_wait_share']:.1%}",
            f"{row['times_videos']:.2f}",
            f"{row['growth_from_one_process']:.2f}",
            *([f"{row['samples_per_second']:.0f}"] if gpu else []),
        ]
        for row in result["rows"]
    ]
    return harness.table([*columns, *(["samples/s"] if gpu else [])], lines)


def sharding_table(result: Result, gpu: bool) -> str:
    lines = [
        [
            name,
            f"{row['ratio_to_ddp']:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in row["ratio_by_round"]),
            f"{row['peak_gib']:.2f} GiB",
        ]
        for name, row in result["rows"].items()
    ]
    return harness.table(["variant", "time of a step relative to DDP", "by round", "peak memory of a process"], lines)


def retrieval_table(result: Result, gpu: bool) -> str:
    return harness.table(retrieval.COLUMNS, retrieval.lines(result["rows"]))


def catalog_table(result: Result, gpu: bool) -> str:
    """Return the start of a run by its number of videos. Its goals are in seconds and MB, so a CPU's are shown too."""
    from benchmarks import catalog  # needs av, which a GPU machine may not have

    return catalog.table(result["rows"])


def store_table(result: Result, gpu: bool) -> str:
    """Return the figures of a run from a store alone. A CPU's rates do not transfer to other machines."""
    if not gpu:
        return ""
    columns = ["steps of an epoch", "samples/s", "waits for data"]
    lines = [
        [str(result["steps_an_epoch"]), f"{row['samples_per_second']:.0f}", f"{row['data_wait_share']:.2%}"]
        for row in result["rows"]
        if row["processes"] == 1
    ]
    return harness.table(columns, lines)


def ceilings_table(result: Result, gpu: bool) -> str:
    if not gpu:
        return ""
    lines = [[row["what"], f"{row['bytes_per_second'] / 1e12:.2f} TB/s"] for row in result["rows"]]
    products = (result["ceilings"] or {}).get("flops_per_second", {})
    lines += [[f"matrix product, {name}", f"{rate / 1e12:.0f} TFLOP/s"] for name, rate in products.items()]
    return harness.table(["what", "rate"], lines)


def convolutions_table(result: Result, gpu: bool) -> str:
    """Return the milliseconds of each convolution: measured, by the model of L2 traffic, and by the roofline."""
    if not gpu:
        return ""
    passes = ("forward", "dgrad", "wgrad")
    columns = ["convolution", "forward, backward passes of a step", *(f"{name}, model" for name in passes), "roofline"]
    lines = []
    for row in result["rows"]:
        times = [row["skipped"][:40], "", ""] if "skipped" in row else [f"{row[f'{name}_ms']:.2f}" for name in passes]
        if "skipped" not in row:
            times = [f"{ms}, {row['model_ms'][name]:.2f}" for name, ms in zip(passes, times, strict=True)]
        count = f"{row['forwards']}, {row['backwards']}"
        lines.append([row["what"], count, *times, f"{row['roofline_ms']:.2f}"])
    sums = result.get("ms_of_step", {})
    lines.append(["a step", "", *[f"{name} {ms:.0f} ms" for name, ms in sums.items()], *[""] * (4 - len(sums))])
    return harness.table(columns, lines)


def goals_table(result: Result, gpu: bool) -> str:
    """Return the kernels' goals. On a CPU there are none, because "ours" is the reference there."""
    if not gpu:
        return ""
    # Older results say "as released" in their goals.
    goals = [goal | {"goal": goal["goal"].replace(RELEASED, "the released code")} for goal in result["goals"]]
    columns = {"goal": "goal", "precision": "precision", "worst": "worst", "worst_at": "where", "verdict": "verdict"}
    return harness.goal_table(goals, columns)


def baseline_table(result: Result, gpu: bool) -> str:
    lines = [
        [
            f"{harness.from_row(Cell, row)}",
            row["after"]["precision"].replace("ieee", "float32").replace("bf16", "bfloat16"),
            f"{row['speedup_median']:.2f}",
            f"{min(row['speedup_by_round']):.2f} to {max(row['speedup_by_round']):.2f}",
            *([f"{row['after']['samples_per_second']:.0f}"] if gpu else []),
        ]
        for row in result["rows"]
    ]
    older = result["rows"][0]["commit_before"]
    columns = ["network, batch, clip", "precision", f"speedup over {older}", "by round"]
    return harness.table([*columns, *(["samples/s"] if gpu else [])], lines)


def communication_table(result: Result, gpu: bool) -> str:
    return communication.bytes_table(result["rows"])


def many_gpus_table(result: Result, gpu: bool) -> str:
    return communication.model_table(result["model"])


def counts_tables(result: Result) -> list[str]:
    """Return three tables for each network: work by part, the static view, and the stem's input."""
    made = []
    where = f"counted without a GPU, {result['environment']['date'][:10]}"
    where += f", commits {result['commit_before']} and {result['environment']['commit']}"
    for row in result["rows"]:
        cell = harness.from_row(Cell, row)
        largest = {
            tree: max(row[tree]["largest_eager"], row[tree]["largest_compiled"]) / counts.LIMIT
            for tree in ("before", "after")
        }
        table = harness.table(counts.COLUMNS, counts.by_part(row))
        made.append(
            f"**Work of a training step by part: {cell}** ({where})\n\n{table}\n\n"
            f"Largest tensor: {largest['before']:.2f} x 2^31 elements before, {largest['after']:.2f} after.\n"
        )
        once = [
            [
                each["last"] or "none",
                f"{each['flops'] / 1e12:.1f}",
                f"{each['bytes'] / 1e9:.0f}",
                ", ".join(str(frames) for frames in each["frames"].values()),
            ]
            for each in row["static_view"]
        ]
        columns = ["equal frames once up to", "TFLOP", "GB", "frames after stem, layer1, layer2, layer3, layer4"]
        made.append(f"**The static view's share of a step: {cell}**\n\n{harness.table(columns, once)}\n")
    stem = [
        [name, *(f"{size / 1e9:.2f}" for size in (*sizes.values(), sum(sizes.values())))]
        for name, sizes in result["rows"][0]["stem_layouts"].items()
    ]
    columns = ["the view kernels write", "view kernels, GB", "rearranging, GB", "first convolution, GB", "sum, GB"]
    made.append(f"**Bytes of the stem's input in a step, 128 clips**\n\n{harness.table(columns, stem)}\n")
    return made


def fitting_table(result: Result) -> str:
    """Return the largest batch by network, method and memory of a GPU, without and with --recompute."""
    where = f"counted, not measured on a GPU, {result['environment']['date'][:10]}"
    where += f", commit {result['environment']['commit']}"
    margin, lines = memory.margin(result), []
    for plain, again in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        clip = " x ".join(map(str, plain["clip"]))
        line = [f"{plain['backbone']}, {plain['method']}, {clip}"]
        for row in (plain, again):
            line.append(f"{margin * row['sample_bytes'] / 1e9:.2f} GB")
            line += [str(memory.largest_batch(row, gigabytes, margin)) for gigabytes in memory.GPU_GB]
        lines.append(line)
    gpus = [f"{gigabytes} GB" for gigabytes in memory.GPU_GB]
    columns = [
        "network, method, clip",
        "memory of a sample",
        *gpus,
        "with `--recompute`",
        *(f"{gpu}, with it" for gpu in gpus),
    ]
    return (
        f"**Largest batch on one GPU, without and with `--recompute`** ({where})\n\n{harness.table(columns, lines)}\n"
    )


def predicted_kernel_table(result: Result) -> str:
    """Return a row for each kernel with its chosen settings, and the best of all settings that were compiled."""

    def named(row: Result) -> str:
        settings = row["settings"]
        taps = f", {settings['taps']}" if row["kernel"] == "weight gradient" else ""
        return f"{settings['rows']}, {settings['warps']}, {settings['stages']}{taps}"

    lines = []
    for row in result["rows"]:
        if not row["chosen"]:
            continue
        tried = [other for other in result["rows"] if other["what"] == row["what"] and not other.get("faults", [""])]
        best = min(tried, key=lambda other: other["ms"], default=row)
        library, code = row["library_ms"], row["code"]
        limit, theirs = max(row["parts_ms"], key=row["parts_ms"].get), sum(library.values())
        limit = "instructions" if limit == "issue" else limit
        lines.append(
            [
                row["what"],
                named(row),
                *(f"{ms:.2f}" for ms in row["parts_ms"].values()),
                f"{row['ms']:.2f} ({limit})",
                f"{theirs:.2f} ({library['convolution']:.2f} + {library['passes']:.2f})",
                f"{theirs / row['ms']:.2f}",
                f"{best['ms']:.2f} ({named(best)})" if best["ms"] < 0.99 * row["ms"] else "",
                f"{code['registers']}, {code['local']}",
                f"{code['shared'] / 1024:.0f}",
                "yes" if code["wgmma"] else "no",
            ]
        )
    columns = ["kernel", "rows, warps, stages, taps", "arithmetic", "memory", "L2", "instructions", "predicted"]
    columns += ["library", "speedup", "better setting", "registers, spilled bytes", "shared KiB", "wgmma"]
    return harness.table(columns, lines)


def predicted_step_table(result: Result) -> str:
    """Return a row for each choice of kernels."""
    lines = [[row["what"], f"{row['ms']:.0f}", f"{row['samples_per_second']:.0f}"] for row in result["steps"]]
    return harness.table(["step at 128 clips", "ms, predicted", "samples/s, predicted"], lines)


def predicted_tables(result: Result) -> list[str]:
    """Return the predicted times of the convolution kernels, and of a step with them."""
    where = f"model for an H200, {result['environment']['date'][:10]}, commit {result['environment']['commit']}"
    kernels, steps = predicted_kernel_table(result), predicted_step_table(result)
    return [
        f"**Convolution kernels, predicted before any run: ms for one view of 128 clips** ({where})\n\n{kernels}\n",
        f"**A training step with the convolution kernels, predicted before any run** ({where})\n\n{steps}\n",
    ]


# file, title of the table, function that makes it from the results and whether the device is a GPU
TABLES: list[tuple[str, str, Callable[[Result, bool], str]]] = [
    ("step", "A training step: speedup of ours over the others", step_table),
    ("step", "Largest batch on one GPU by its memory, computed from the measured peak", memory_table),
    ("baseline", "A training step: speedup over an older commit", baseline_table),
    ("loader", "Reading: speedup over released code in samples/s of one core", loader_table),
    ("remote", "Reading from a server: speed relative to the local store of planes", remote_table),
    ("train", "A whole run", train_table),
    ("catalog", "The start of a run with up to a million videos: two ranks, one worker each", catalog_table),
    ("sharding", "DeepSpeed's stages compared with plain DistributedDataParallel", sharding_table),
    (
        "communication",
        "Kilobytes that a rank sends in a step of 4 clips a rank: counted / by the model",
        communication_table,
    ),
    ("communication", "A MODEL, not a measurement: a step on 8 to 512 GPUs, 128 clips each", many_gpus_table),
    ("retrieval", "Retrieval: time and memory to find the 50 nearest videos", retrieval_table),
    ("train_store", "A whole run from a packed store", store_table),
    ("layers-ceilings", "The ceilings of the device", ceilings_table),
    ("layers-convolutions", "The convolutions of a step at batch 128: milliseconds", convolutions_table),
    ("info_nce", "The loss", goals_table),
    ("views", "The views", goals_table),
]


def tables(results: Path = harness.RESULTS) -> str:
    """Return the tables of all devices in markdown, the predicted tables, and those of results/counts.json."""
    made = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for name, title, make in TABLES:
            file = folder / f"{name}.json"
            if not file.is_file():
                continue
            result = json.loads(file.read_text())
            if table := make(result, folder.name != "cpu"):
                environment = result["environment"]
                where = f"{environment['device']}, {environment['date'][:10]}, commit {environment['commit']}"
                if file.with_suffix(".png").is_file():
                    where += f"; [picture](../benchmarks/results/{folder.name}/{name}.png)"
                made.append(f"**{title}** ({where})\n\n{table}\n")
    if (results / "convolutions_predicted.json").is_file():
        made += predicted_tables(json.loads((results / "convolutions_predicted.json").read_text()))
    if (results / "counts.json").is_file():
        made += counts_tables(json.loads((results / "counts.json").read_text()))
    if (results / "memory.json").is_file():
        made.append(fitting_table(json.loads((results / "memory.json").read_text())))
    return "\n".join(made)


def with_tables(page: str, made: str) -> str:
    """Return the page with the tables replaced."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: f"\n{made}\n", page, flags=re.DOTALL)


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(), tables()))


if __name__ == "__main__":
    main()
