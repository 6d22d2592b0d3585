"""How fast is the contrastive loss over a queue, with the mining of its positives? Four implementations in one run.

    python -m benchmarks.info_nce                     bfloat16 on the whole grid, tf32 at the sizes of the goals
    python -m benchmarks.info_nce --quick             both at the sizes of the goals only, fewer repetitions
    python -m benchmarks.info_nce --precision tf32    one precision on the whole grid; also bf16, ieee, or several
    python -m benchmarks.info_nce --minutes 8         begin no new cell after 8 minutes; the goals' sizes come first

Time to expect: on an H200, 39 of today's 78 cells took 73 seconds, most of it torch.compile, which compiles anew for
each cell (a precision, with mining or not, forward only or with backward, B, K). Without a GPU the grid is small and in
float32: 30 seconds on two cores. There "ours" is the reference, and the output says so. Result to expect on an H200 in
bfloat16, with mining, forward and backward: 12.3 times the released code at B 40, K 2048.

Providers:
    as released     the steps of the released loss: pair by pair, concatenate, softmax, multiply by labels, log
    eager           the reference in kernels/info_nce.py: all pairs at once, logsumexp
    torch.compile   the eager provider, compiled for fixed sizes
    ours            info_nce and mine_positives_by_each of `kernels`

With mining, positives are found as in training (dclr/methods/dclr.py): three rankings serve five pairs. "Forward and
backward" includes the gradient of the queries, which is the only one. Errors are those of the measured call, compared
with float64. The float64 loss takes the positives that this call mined, so another choice between equally similar queue
entries is not an error. "With decay" multiplies the logits of each queue entry by a number of its own, as VideoMoCo
does (dclr/methods/videomoco.py). It is measured at the sizes of the goals, and no goal counts it. "Same rows" is the
share of queries for which the same queue entries are mined as in float64, over all pairs.

Prints tables and writes info_nce.json and info_nce.png into results/DEVICE. --precision and --quick add to the file
names.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import RELEASED, Ceilings, Goal, Precision, Row, speedup
from dclr.kernels import info_nce, mine_positives_by_each
from dclr.kernels.info_nce import info_nce_reference, mine_positives_by_each_reference

P, D, M = 5, 128, 5  # pairs, embedding size, mined positives
TEMPERATURE = 0.07

BATCH_SIZES = {"cuda": (5, 40, 128, 512, 1024), "cpu": (5, 40)}
QUEUE_LENGTHS = {"cuda": (2048, 16384, 65536), "cpu": (256, 2048)}
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cuda": ("bf16", "tf32"), "cpu": ("ieee",)}
REPETITIONS = {"cuda": 50, "cpu": 15}
QUICK_REPETITIONS = 10

SMALL, LARGE, LARGEST = {"B": 40, "K": 2048}, {"B": 128, "K": 65536}, {"B": 1024, "K": 65536}
GOALS = (
    Goal(text="8 times the released code at B 40, K 2048", value=speedup(RELEASED), least=8, size=SMALL),
    Goal(
        text="with mining, 3 times torch.compile at B 40, K 2048",
        value=speedup("torch.compile"),
        least=3,
        size=SMALL | {"mining": True},
    ),
    Goal(
        text="with mining, 8 times the released code at B 128, K 65536",
        value=speedup(RELEASED),
        least=8,
        size=LARGE | {"mining": True},
    ),
    Goal(text="2 times torch.compile at B 128, K 65536", value=speedup("torch.compile"), least=2, size=LARGE),
    Goal(text="never slower than torch.compile", value=speedup("torch.compile"), least=1),
    Goal(
        text="peak extra memory under 2 % of eager's (50 times less) at B 1024, K 65536",
        value=speedup("eager", quantity="peak_extra_bytes"),
        least=50,
        size=LARGEST,
    ),
)

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]
"""What a provider computes: the tensors of `Inputs` -> losses (P,) and mined entries (P, B, M) int64, or None."""


class Inputs(NamedTuple):
    """The arguments of a provider."""

    queries: Tensor  # (P, B, D)
    keys: Tensor  # (P, B, D)
    queue: Tensor  # (P, K, D)
    features: Tensor | None  # (2, B, D) static and dynamic features of the query clips; None: without mining
    logit_scale: Tensor | None = None  # (K,) the factor of each queue entry's logits; None: without decay


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid."""

    precision: Precision
    mining: bool
    backward: bool
    B: int
    K: int
    decay: bool = False

    def __str__(self) -> str:
        return f"{self.precision}, {self.kind}, B {self.B}, K {self.K}"

    @property
    def kind(self) -> str:
        mining = "with decay" if self.decay else "with mining" if self.mining else "without mining"
        return f"{mining}, {'forward and backward' if self.backward else 'forward'}"


# ------------------------------------------------------------------------------------------------------------ providers


def as_released(
    queries: Tensor, keys: Tensor, queue: Tensor, features: Tensor | None, logit_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute the steps of the released loss, one pair at a time.

    In bfloat16 the products are in bfloat16 and the softmax is in float32, as under autocast.
    """
    B, K = queries.shape[1], queue.shape[1]
    with torch.no_grad():
        if features is None:
            mined = None
            labels = [_label(queries.new_empty(B, 0, dtype=torch.int64), K)] * P
        else:
            static, dynamic = (
                (feature @ past.clone().T).softmax(dim=1, dtype=torch.float32)
                for feature, past in zip(features, queue[1:3], strict=True)
            )
            rankings = [similarity.topk(M, dim=1).indices for similarity in (static, dynamic, static + dynamic)]
            mined = by_pair(*rankings)
            static_label, dynamic_label, both_label = (_label(entries, K) for entries in rankings)
            labels = [both_label, static_label, dynamic_label, static_label, dynamic_label]
    losses = []
    for pair in range(P):
        own = (queries[pair] * keys[pair]).sum(dim=1, keepdim=True)
        past = queries[pair] @ queue[pair].clone().T
        if logit_scale is not None:
            past = past * logit_scale
        logits = torch.cat([own, past], dim=1).div_(TEMPERATURE)  # (B, 1 + K)
        probabilities = logits.softmax(dim=1, dtype=torch.float32)
        losses.append(-(probabilities * labels[pair]).sum(dim=1).log().mean())
    return torch.stack(losses), mined


def eager(
    queries: Tensor, keys: Tensor, queue: Tensor, features: Tensor | None, logit_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    mined = None if features is None else by_pair(*mine_positives_by_each_reference(features, queue[1:3], M))
    return info_nce_reference(queries, keys, queue, mined, TEMPERATURE, logit_scale), mined


def ours(
    queries: Tensor, keys: Tensor, queue: Tensor, features: Tensor | None, logit_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    mined = None if features is None else by_pair(*mine_positives_by_each(features, queue[1:3], M))
    return info_nce(queries, keys, queue, mined, TEMPERATURE, logit_scale=logit_scale), mined


def by_pair(static: Tensor, dynamic: Tensor, both: Tensor) -> Tensor:
    """Return the mined entries (P, B, M) from three rankings (B, M), in the order vv, vs, vd, sv, dv of dclr.methods.

    The queues of vs and vd hold past sv and dv keys, which mining compares with.
    """
    return torch.stack([both, static, dynamic, static, dynamic])


PROVIDERS: dict[str, Callable[[], Step]] = {
    RELEASED: lambda: as_released,
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager, fullgraph=True, dynamic=False),
    "ours": lambda: ours,
}


def _label(entries: Tensor, K: int) -> Tensor:
    """Return labels (B, 1 + K): 1 for the key and for the queue entries (B, M), 0 elsewhere."""
    mined = torch.zeros(entries.shape[0], K, device=entries.device).scatter_(1, entries, 1.0)
    return torch.cat([mined.new_ones(entries.shape[0], 1), mined], dim=1)


# ---------------------------------------------------------------------------------------------------------------- truth


def float64_loss(inputs: Inputs, mined: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return losses (P,) and the gradient (P, B, D) of their sum with respect to the queries, in float64.

    Queries are taken in blocks, because the logits of all queries may not fit into memory.
    """
    B, K = inputs.queries.shape[1], inputs.queue.shape[1]
    losses = torch.zeros(P, dtype=torch.float64, device=inputs.queue.device)
    gradient = torch.zeros(P, B, D, dtype=torch.float64, device=inputs.queue.device)
    for pair in range(P):
        queue = inputs.queue[pair].double()
        if inputs.logit_scale is not None:
            queue = queue * inputs.logit_scale.double()[:, None]
        for block in torch.arange(B, device=queue.device).split(_block_size(K)):
            queries, keys = inputs.queries[pair, block].detach().double(), inputs.keys[pair, block].double()
            key_logits = (queries * keys).sum(dim=1, keepdim=True)
            logits = torch.cat([key_logits, queries @ queue.T], dim=1) / TEMPERATURE  # (b, 1 + K)
            positive = torch.zeros_like(logits, dtype=torch.bool)
            positive[:, 0] = True
            if mined is not None:
                positive.scatter_(1, mined[pair, block] + 1, True)
            among = logits.masked_fill(~positive, -torch.inf)
            losses[pair] += (logits.logsumexp(dim=1) - among.logsumexp(dim=1)).sum() / B
            pull = (logits.softmax(dim=1) - among.softmax(dim=1)) / (TEMPERATURE * B)
            gradient[pair, block] = pull[:, :1] * keys + pull[:, 1:] @ queue
    return losses, gradient


def float64_mined(features: Tensor, queue: Tensor) -> Tensor:
    """Return the entries (P, B, M) that float64 mines."""
    found = []
    static_past, dynamic_past = queue[1:3].double()
    for static, dynamic in features.double().split(_block_size(queue.shape[1]), dim=1):
        by_static, by_dynamic = static @ static_past.T, dynamic @ dynamic_past.T
        both = by_static.softmax(dim=1) + by_dynamic.softmax(dim=1)
        found.append(by_pair(*(each.topk(M, dim=1).indices for each in (by_static, by_dynamic, both))))
    return torch.cat(found, dim=1)


def _block_size(K: int) -> int:
    """Return how many queries have float64 logits of at most 256 MB."""
    return max(2**25 // K, 1)


# ---------------------------------------------------------------------------------------------------------------- floor


def floor_bytes(cell: Cell) -> int:
    """Return the fewest bytes to move: every argument is read once and every result is written once.

    Mining reads two of the five queues, which the loss reads anyway. Mined entries need not be written.
    """
    number = 2 if cell.precision == "bf16" else 4
    queue, queries, keys = P * cell.K * D * number, P * cell.B * D * number, P * cell.B * D * number
    gradient = P * cell.B * D * number if cell.backward else 0
    features = 2 * cell.B * D * number if cell.mining else 0
    scale = cell.K * 4 if cell.decay else 0
    losses = P * 4
    return queue + queries + keys + gradient + features + scale + losses


def floor_flops(cell: Cell) -> int:
    """Return the fewest operations on the matrix units, a multiplication and an addition counting as two.

    Logits are one product (P, B, D) x (P, D, K). The gradient is a second one, probabilities x queue. Mining is two
    products (B, D) x (D, K), static and dynamic, because vv ranks by their sum. Exponentials are not counted.
    """
    product = 2 * cell.B * cell.K * D
    return (2 * P if cell.backward else P) * product + (2 * product if cell.mining else 0)


def floor_ms(cell: Cell, ceilings: Ceilings) -> float:
    """Return the milliseconds that memory alone or the matrix units alone need, whichever is more."""
    moving = floor_bytes(cell) / ceilings.bytes_per_second
    computing = floor_flops(cell) / ceilings.flops_per_second[cell.precision]
    return max(moving, computing) * 1e3


# -------------------------------------------------------------------------------------------------------------- measure


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Return queries near their keys, as after training, and features near queries, so mined logits are high."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, D, generator=generator, device=device), dim=-1)

    keys = unit(P, cell.B)
    queries = F.normalize(keys + unit(P, cell.B), dim=-1)
    features = F.normalize(queries[1:3] + unit(2, cell.B), dim=-1)
    return Inputs(
        queries=queries.to(dtype).requires_grad_(),
        keys=keys.to(dtype),
        queue=unit(P, cell.K).to(dtype),
        features=features.to(dtype) if cell.mining else None,
        logit_scale=0.99999 ** torch.arange(float(cell.K), device=device) if cell.decay else None,
    )


def run(step: Step, inputs: Inputs, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Make the measured call. Return losses (P,), mined entries (P, B, M) and the gradient (P, B, D) of the queries."""
    if not backward:
        with torch.no_grad():
            return *step(*inputs), None
    losses, mined = step(*inputs)
    return losses, mined, torch.autograd.grad(losses.sum(), inputs.queries)[0]


def accuracy(inputs: Inputs, losses: Tensor, mined: Tensor | None, gradient: Tensor | None) -> dict[str, float | None]:
    """Return the greatest differences from float64. The gradient's is relative to its greatest component.

    Raises ArithmeticError if a result is not finite.
    """
    true_losses, true_gradient = float64_loss(inputs, mined)
    found: dict[str, float | None] = {"loss_error": _difference(losses, true_losses)}
    found |= {"gradient_error": None, "same_rows": None}
    if gradient is not None:
        found["gradient_error"] = _difference(gradient, true_gradient) / float(true_gradient.abs().max())
    if mined is not None and inputs.features is not None:
        true_mined = float64_mined(inputs.features, inputs.queue)
        same = (mined.sort(dim=2).values == true_mined.sort(dim=2).values).all(dim=2)
        found["same_rows"] = float(same.double().mean())
    return found


def _difference(value: Tensor, truth: Tensor) -> float:
    if not bool(value.isfinite().all()):
        raise ArithmeticError("the result is not finite")
    return float((value.detach().double() - truth).abs().max())


def measure(cell: Cell, names: Sequence[str], device: torch.device, repetitions: int, ceilings: Ceilings | None) -> Row:
    """Return one row of the results."""
    # Each cell compiles for its own sizes. Without a reset torch would reach its recompilation limit.
    torch.compiler.reset()
    inputs = make_inputs(cell, device)

    def prepare(name: str) -> tuple[harness.Call, dict[str, Any]]:
        call = partial(run, PROVIDERS[name](), inputs, cell.backward)
        return call, accuracy(inputs, *call())

    with harness.float32_products(cell.precision):
        found = harness.check_and_time(names, prepare, device, repetitions)
    floor = None if ceilings is None else floor_ms(cell, ceilings)
    for provider in found.values():
        if "median_ms" in provider:
            provider["share_of_floor"] = None if floor is None else floor / provider["median_ms"]
    limits = {"floor_bytes": floor_bytes(cell), "floor_flops": floor_flops(cell), "floor_ms": floor}
    return asdict(cell) | limits | {"providers": found}


# --------------------------------------------------------------------------------------------------------------- report


def name_cell(row: Row) -> str:
    return str(harness.from_row(Cell, row))


def judge(rows: Sequence[Row], genuine: bool) -> list[dict[str, Any]]:
    """Judge the goals. The typical row is a training step: forward and backward, with mining."""
    typical = ("training_step", lambda row: row["mining"] and row["backward"])
    rows = [row for row in rows if not row.get("decay")]  # the goals are older than decay
    return harness.judge_kernels(rows, GOALS, name_cell, genuine, typical)


def cell_table(row: Row) -> str:
    """Return what was measured in one cell as a table, one provider a line."""
    lines = []
    for name, found in row["providers"].items():
        if "skipped" in found:
            lines.append([name, harness.spread(found), *[""] * 5])
            continue
        share, gradient, same = found["share_of_floor"], found["gradient_error"], found["same_rows"]
        peak = found["peak_extra_bytes"]
        lines.append([
            name,
            harness.spread(found),
            "" if share is None else f"{share:.0%}",
            "" if peak is None else f"{peak / 2**20:.1f} MiB",
            f"{found['loss_error']:.0e}",
            "" if gradient is None else f"{gradient:.0e}",
            "" if same is None else f"{same:.1%}",
        ])  # fmt: skip
    columns = ["provider", "ms (20 % to 80 %)", "share of the floor", "peak extra memory"]
    columns += ["loss error", "gradient error", "same rows"]
    return f"\n{name_cell(row)}\n\n{harness.table(columns, lines)}"


COLOURS = {RELEASED: "tab:gray", "eager": "tab:blue", "torch.compile": "tab:orange", "ours": "tab:red"}


def plot(rows: Sequence[Row], caption: str) -> Figure:
    """Plot milliseconds against B, with mining, one panel for each K, in the precision that most rows have."""
    rows = harness.most_measured(rows)
    lengths, batches = sorted({row["K"] for row in rows}), sorted({row["B"] for row in rows})
    figure, panels = plt.subplots(
        2, len(lengths), figsize=(2 + 3.6 * len(lengths), 8), sharex=True, sharey=True, squeeze=False
    )
    for line, backward in enumerate((True, False)):
        for column, K in enumerate(lengths):
            panel = panels[line, column]
            here = [row for row in rows if (row["K"], row["mining"], row["backward"]) == (K, True, backward)]
            here.sort(key=lambda row: row["B"])
            for name in rows[0]["providers"]:
                done = [(row["B"], row["providers"][name]) for row in here if "median_ms" in row["providers"][name]]
                sizes = [B for B, _ in done]
                low, median, high = ([found[key] for _, found in done] for key in ("low_ms", "median_ms", "high_ms"))
                panel.fill_between(sizes, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
                panel.plot(sizes, median, "o-", color=COLOURS[name], label=name, markersize=4)
            floors = [(row["B"], row["floor_ms"]) for row in here if row["floor_ms"] is not None]
            if floors:
                panel.plot(*zip(*floors, strict=True), "k--", linewidth=1, label="floor")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(batches, [str(B) for B in batches])
            panel.xaxis.set_minor_locator(NullLocator())
            harness.label_log_axis(panel.yaxis)
            panel.grid(True, alpha=0.3)
            panel.set_title(f"{'forward and backward' if backward else 'forward'}, K = {K}", fontsize=10)
            if column == 0:
                panel.set_ylabel("milliseconds")
            if line == 1:
                panel.set_xlabel("B, clips in a batch")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    precision = "float32" if rows[0]["precision"] == "ieee" else rows[0]["precision"]
    title = f"Contrastive loss over a queue, with mining, {precision}"
    harness.add_titles(figure, title, caption, handles=handles, labels=labels, ncols=len(labels))
    return figure


# ----------------------------------------------------------------------------------------------------------------- main


def plan(arguments: argparse.Namespace, kind: str) -> list[Cell]:
    """Return the cells to measure, the sizes of the goals first. kind: "cuda" or "cpu"."""
    grid = [
        (B, K)
        for B in arguments.batch_sizes or BATCH_SIZES[kind]
        for K in arguments.queue_lengths or QUEUE_LENGTHS[kind]
    ]
    goals = [(B, K) for B, K in grid if {"B": B, "K": K} in (SMALL, LARGE, LARGEST)] or grid[:1]
    cells = []
    for number, precision in enumerate(arguments.precision or PRECISIONS[kind]):
        whole = not arguments.quick and (arguments.precision or number == 0)
        for B, K in grid if whole else goals:
            for mining in (True, False):
                for backward in (True, False):
                    cells.append(Cell(precision=precision, mining=mining, backward=backward, B=B, K=K))
        cells += [Cell(precision=precision, mining=False, backward=True, B=B, K=K, decay=True) for B, K in goals]
    return sorted(cells, key=lambda cell: (cell.B, cell.K) not in goals)


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__, PROVIDERS)
    harness.add_kernel_options(parser, get_args(Precision))
    parser.add_argument("--queue-lengths", nargs="+", type=int, metavar="K")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    device, names = torch.device(arguments.device), arguments.providers or list(PROVIDERS)
    repetitions = arguments.repetitions or (QUICK_REPETITIONS if arguments.quick else REPETITIONS[device.type])
    run = harness.Run("info_nce", argv, arguments, device)
    run.show_device()
    cells = plan(arguments, device.type)
    run.measure(cells, lambda cell: measure(cell, names, device, repetitions, run.ceilings), cell_table)
    verdicts = judge(run.rows, run.genuine)
    columns = {"goal": "goal", "precision": "precision", "training_step": "in a training step", "worst": "worst"}
    columns |= {"worst_at": "where", "verdict": "verdict"}
    print(f"\nGoals for an H200: speedup of ours over the other\n\n{harness.goal_table(verdicts, columns)}\n")
    content = {
        "question": "how fast is the contrastive loss over a queue, with the mining of its positives?",
        "sizes": {"P": P, "D": D, "M": M, "temperature": TEMPERATURE},
        "goals": verdicts,
    }
    caption = run.caption(f"{run.implementation}; median of {repetitions}, band: 20 % to 80 %")
    run.publish(plot(run.rows, caption), content)
    run.refuse_failures(["ours"])


if __name__ == "__main__":
    main()
