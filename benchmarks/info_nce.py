"""How fast is the contrastive loss over a queue, with the search for its positives? Four implementations of one formula in one run.

    python -m benchmarks.info_nce                        bfloat16 on the whole grid, tf32 on the goals' sizes
    python -m benchmarks.info_nce --quick                both on the goals' sizes only, fewer repetitions
    python -m benchmarks.info_nce --precision tf32       one precision, on the whole grid; also: bf16, ieee, or several
    python -m benchmarks.info_nce --minutes 8            no new cell is begun after 8 minutes; the goals' sizes come first

Time to expect on one H100 or H200: 4 to 6 minutes for the first, of which most is torch.compile, which compiles anew for every cell (a
precision, with mining or not, forward only or with backward, B, K); 2 for --quick. This is an estimate: no GPU has run it yet.
Without a GPU it runs at small sizes in float32 (one minute on two cores); ours is the reference there, and the output says so.

Providers:
    as released     what the authors' released loss does: pair by pair, concatenate, softmax, multiply by labels, log
    eager           kernels/info_nce.py's reference: all pairs at once, logsumexp
    torch.compile   of eager, with the sizes fixed
    ours            info_nce and mine_positives_by_each of `kernels`

With mining, the positives are found as in training (dclr/method.py): three searches for five pairs. "Forward and backward" includes the
gradient of the queries, the only one there is. An error is that of the measured call itself, against float64 with the rows that this
call mined, so that two equally similar rows are no error; "same rows" is the share of searches whose rows are those of float64.

Prints tables, writes info_nce.json and info_nce.png into results/DEVICE; --precision and --quick add their names to the files'.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Ceilings, Precision
from dclr.report import environment
from kernels import describe, info_nce, mine_positives_by_each
from kernels.backend import runs_triton
from kernels.info_nce import info_nce_reference, mine_positives_by_each_reference

P, D, M = 5, 128, 5  # pairs, embedding size, mined positives
TEMPERATURE = 0.07

BATCH_SIZES = {"cuda": (5, 40, 128, 512, 1024), "cpu": (5, 40)}
QUEUE_LENGTHS = {"cuda": (2048, 16384, 65536), "cpu": (256, 2048)}
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cuda": ("bf16", "tf32"), "cpu": ("ieee",)}
REPETITIONS = {"cuda": 50, "cpu": 15}
QUICK_REPETITIONS = 10

# What a provider computes: queries, keys (P, B, D), queue (P, K, D), mining features (2, B, D) or None -> losses (P,) and
# mined rows (P, B, M) or None.
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Inputs(NamedTuple):
    queries: Tensor  # (P, B, D)
    keys: Tensor  # (P, B, D)
    queue: Tensor  # (P, K, D)
    features: Tensor | None  # (2, B, D) static and dynamic features of the query clips; None: without mining


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid."""

    precision: Precision
    mining: bool
    backward: bool
    B: int
    K: int

    def __str__(self) -> str:
        return f"{self.precision}, {self.kind}, B {self.B}, K {self.K}"

    @property
    def kind(self) -> str:
        mining = "with mining" if self.mining else "without mining"
        return f"{mining}, {'forward and backward' if self.backward else 'forward'}"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Ours is to be at least `times` better than `against`."""

    text: str
    against: str
    times: float
    quantity: str = "median_ms"
    size: tuple[int, int] | None = None  # (B, K); None: everywhere


GOALS = (
    Goal(text="8 times as released at B 40, K 2048", against="as released", times=8, size=(40, 2048)),
    Goal(text="3 times torch.compile at B 40, K 2048", against="torch.compile", times=3, size=(40, 2048)),
    Goal(text="8 times as released at B 128, K 65536", against="as released", times=8, size=(128, 65536)),
    Goal(text="2 times torch.compile at B 128, K 65536", against="torch.compile", times=2, size=(128, 65536)),
    Goal(text="never slower than torch.compile", against="torch.compile", times=1),
    Goal(
        text="peak extra memory under 2 % of eager's (50 times less) at B 1024, K 65536",
        against="eager",
        times=50,
        quantity="peak_extra_bytes",
        size=(1024, 65536),
    ),
)
GOAL_SIZES = {goal.size for goal in GOALS}


# -------------------------------------------------------------------------------------------------------------- providers


def as_released(queries: Tensor, keys: Tensor, queue: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The steps of the authors' released loss, a pair at a time. In bfloat16 the products are bfloat16 and the softmax is float32, as
    autocast would have it."""
    B, K = queries.shape[1], queue.shape[1]
    with torch.no_grad():
        if features is None:
            rows = None
            labels = [_label(queries.new_empty(B, 0, dtype=torch.int64), K)] * P
        else:
            static, dynamic = (
                (feature @ past.clone().T).softmax(dim=1, dtype=torch.float32)
                for feature, past in zip(features, queue[1:3], strict=True)
            )
            found = [similarity.topk(M, dim=1).indices for similarity in (static + dynamic, static, dynamic)]
            rows = torch.stack([found[0], found[1], found[2], found[1], found[2]])
            of_search = [_label(indices, K) for indices in found]
            labels = [of_search[0], of_search[1], of_search[2], of_search[1], of_search[2]]
    losses = []
    for pair in range(P):
        own = (queries[pair] * keys[pair]).sum(dim=1, keepdim=True)
        past = queries[pair] @ queue[pair].clone().T
        logits = torch.cat([own, past], dim=1).div_(TEMPERATURE)  # (B, 1 + K)
        probabilities = logits.softmax(dim=1, dtype=torch.float32)
        losses.append(-(probabilities * labels[pair]).sum(dim=1).log().mean())
    return torch.stack(losses), rows


def eager(queries: Tensor, keys: Tensor, queue: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows = None
    if features is not None:
        static, dynamic, both = mine_positives_by_each_reference(features, queue[1:3], M)
        rows = torch.stack([both, static, dynamic, static, dynamic])
    return info_nce_reference(queries, keys, queue, rows, TEMPERATURE), rows


def ours(queries: Tensor, keys: Tensor, queue: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As dclr.method does: pairs in the order vv, vs, vd, sv, dv; the queues of vs and vd hold past static and dynamic views."""
    rows = None
    if features is not None:
        static, dynamic, both = mine_positives_by_each(features, queue[1:3], M)
        rows = torch.stack([both, static, dynamic, static, dynamic])
    return info_nce(queries, keys, queue, rows, TEMPERATURE), rows


PROVIDERS: dict[str, Callable[[], Step]] = {
    "as released": lambda: as_released,
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager, fullgraph=True, dynamic=False),
    "ours": lambda: ours,
}


def _label(rows: Tensor, K: int) -> Tensor:
    """(B, M) row numbers -> (B, 1 + K), 1 for the key and these rows, else 0."""
    mined = torch.zeros(rows.shape[0], K, device=rows.device).scatter_(1, rows, 1.0)
    return torch.cat([mined.new_ones(rows.shape[0], 1), mined], dim=1)


# ------------------------------------------------------------------------------------------------------------------ truth


def float64_loss(inputs: Inputs, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses (P,) and the gradient (P, B, D) of their sum with respect to the queries, some queries at a time: logits are never whole."""
    B, K = inputs.queries.shape[1], inputs.queue.shape[1]
    losses = torch.zeros(P, dtype=torch.float64, device=inputs.queue.device)
    gradient = torch.zeros(P, B, D, dtype=torch.float64, device=inputs.queue.device)
    for pair in range(P):
        queue = inputs.queue[pair].double()
        for part in torch.arange(B, device=queue.device).split(_queries_at_a_time(K)):
            queries, keys = inputs.queries[pair, part].detach().double(), inputs.keys[pair, part].double()
            key_logits = (queries * keys).sum(dim=1, keepdim=True)
            logits = torch.cat([key_logits, queries @ queue.T], dim=1) / TEMPERATURE  # (b, 1 + K)
            positive = torch.zeros_like(logits, dtype=torch.bool)
            positive[:, 0] = True
            if rows is not None:
                positive.scatter_(1, rows[pair, part] + 1, True)
            among = logits.masked_fill(~positive, -torch.inf)
            losses[pair] += (logits.logsumexp(dim=1) - among.logsumexp(dim=1)).sum() / B
            pull = (logits.softmax(dim=1) - among.softmax(dim=1)) / (TEMPERATURE * B)
            gradient[pair, part] = pull[:, :1] * keys + pull[:, 1:] @ queue
    return losses, gradient


def float64_rows(features: Tensor, queue: Tensor) -> Tensor:
    """The positives (P, B, M) by float64."""
    found = []
    static_past, dynamic_past = queue[1:3].double()
    for static, dynamic in features.double().split(_queries_at_a_time(queue.shape[1]), dim=1):
        of_static, of_dynamic = static @ static_past.T, dynamic @ dynamic_past.T
        both = of_static.softmax(dim=1) + of_dynamic.softmax(dim=1)
        static, dynamic = of_static.topk(M, dim=1).indices, of_dynamic.topk(M, dim=1).indices
        found.append(torch.stack([both.topk(M, dim=1).indices, static, dynamic, static, dynamic]))
    return torch.cat(found, dim=1)


def _queries_at_a_time(K: int) -> int:
    """So that their float64 logits take 256 MB at most."""
    return max(2**25 // K, 1)


# ------------------------------------------------------------------------------------------------------------------ floor


def floor_bytes(cell: Cell) -> int:
    """Fewest bytes to move: every argument is read once and every result written once.

    Mining reads two of the five queues, which the loss reads anyway, and rows that are found need not be written.
    """
    number = 2 if cell.precision == "bf16" else 4
    queue, queries, keys = P * cell.K * D * number, P * cell.B * D * number, P * cell.B * D * number
    gradient = P * cell.B * D * number if cell.backward else 0
    features = 2 * cell.B * D * number if cell.mining else 0
    losses = P * 4
    return queue + queries + keys + gradient + features + losses


def floor_flops(cell: Cell) -> int:
    """Fewest operations on the matrix units: a multiplication and an addition for each of D numbers of a query and a row.

    Logits are one product (P, B, D) x (P, D, K); the gradient is a second one, probabilities x queue. Mining is two of (B, D) x (D, K),
    static and dynamic: vv ranks by their sum. Exponentials are not counted.
    """
    product = 2 * cell.B * cell.K * D
    return (2 * P if cell.backward else P) * product + (2 * product if cell.mining else 0)


def floor_ms(cell: Cell, ceilings: Ceilings) -> float:
    """No implementation is faster than memory alone, or than the matrix units alone."""
    moving = floor_bytes(cell) / ceilings.bytes_per_second
    computing = floor_flops(cell) / ceilings.flops_per_second[cell.precision]
    return max(moving, computing) * 1e3


# ---------------------------------------------------------------------------------------------------------------- measure


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Queries near their keys, as trained ones are, and mining features near queries: rows that are mined weigh in the loss."""
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
    )


def run(step: Step, inputs: Inputs, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (P,), mined rows (P, B, M) and the queries' gradient (P, B, D): the call that is measured."""
    if not backward:
        with torch.no_grad():
            return *step(*inputs), None
    losses, rows = step(*inputs)
    return losses, rows, torch.autograd.grad(losses.sum(), inputs.queries)[0]


def accuracy(inputs: Inputs, losses: Tensor, rows: Tensor | None, gradient: Tensor | None) -> dict[str, float | None]:
    """Greatest errors against float64; of the gradient relative to its greatest component. Raises ArithmeticError: not finite."""
    true_losses, true_gradient = float64_loss(inputs, rows)
    found: dict[str, float | None] = {"loss_error": _difference(losses, true_losses), "gradient_error": None}
    if gradient is not None:
        found["gradient_error"] = _difference(gradient, true_gradient) / float(true_gradient.abs().max())
    found["same_rows"] = None
    if rows is not None and inputs.features is not None:
        true_rows = float64_rows(inputs.features, inputs.queue)
        same = (rows.sort(dim=2).values == true_rows.sort(dim=2).values).all(dim=2)
        found["same_rows"] = float(same.double().mean())
    return found


def _difference(value: Tensor, truth: Tensor) -> float:
    if not bool(value.isfinite().all()):
        raise ArithmeticError("the result is not finite")
    return float((value.detach().double() - truth).abs().max())


def measure(
    cell: Cell, names: Sequence[str], device: torch.device, repetitions: int, ceilings: Ceilings | None
) -> dict[str, Any]:
    """One row of the results. A provider that fails, for memory or else, has the reason in place of its numbers."""
    torch._dynamo.reset()  # every cell compiles for its own sizes, and must not meet the limit on recompilations
    inputs = make_inputs(cell, device)
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with harness.float32_products(cell.precision):
        for name in names:
            try:
                step = PROVIDERS[name]()
                calls[name] = partial(run, step, inputs, cell.backward)
                found[name] = accuracy(inputs, *calls[name]())
                found[name]["peak_extra_bytes"] = harness.peak_extra_memory(calls[name], device)
            except Exception as error:  # whatever it is: the other providers and cells are worth having
                found[name] = {"skipped": harness.reason(error)}
                calls.pop(name, None)
        try:
            times = harness.interleaved(calls, device, repetitions) if calls else {}
        except torch.OutOfMemoryError as error:  # each fits alone, but not all graphs beside each other
            found |= {name: {"skipped": harness.reason(error)} for name in calls}
            times = {}
    floor = None if ceilings is None else floor_ms(cell, ceilings)
    for name, of_name in times.items():
        share = None if floor is None else floor / of_name.median_ms
        found[name] = asdict(of_name) | found[name] | {"share_of_floor": share}
    limits = {"floor_bytes": floor_bytes(cell), "floor_flops": floor_flops(cell), "floor_ms": floor}
    return asdict(cell) | limits | {"providers": found}


# ----------------------------------------------------------------------------------------------------------------- report


def judge(rows: Sequence[dict[str, Any]], genuine: bool) -> list[dict[str, Any]]:
    """Each goal in each precision: how many times better ours is in a training step (forward and backward, with mining) and at worst.

    Args:
        rows: what `measure` returned.
        genuine: ours were the kernels, on a GPU; otherwise no goal is judged.
    """
    verdicts: list[dict[str, Any]] = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for goal in GOALS:
            verdict: dict[str, Any] = {"goal": goal.text, "precision": precision, "training_step": None, "worst": None}
            verdict |= {"worst_at": None, "verdict": "not measured on this device"}
            verdicts.append(verdict)
            there = [row for row in rows if row["precision"] == precision and goal.size in (None, (row["B"], row["K"]))]
            if not genuine:
                continue
            if failed := [row for row in there if "skipped" in row["providers"].get("ours", {})]:
                verdict |= {"worst_at": str(_cell(failed[0])), "verdict": "not met: ours failed"}
                continue
            ratios = [(ratio, _cell(row)) for row in there if (ratio := _ratio(row, goal)) is not None]
            if not ratios:
                verdict["verdict"] = "not measured in this run"
                continue
            steps = [ratio for ratio, cell in ratios if cell.mining and cell.backward]
            worst, cell = min(ratios, key=lambda pair: pair[0])
            verdict |= {"training_step": min(steps, default=None), "worst": worst, "worst_at": str(cell)}
            verdict["verdict"] = "met" if worst >= goal.times else "not met"
    return verdicts


def _ratio(row: dict[str, Any], goal: Goal) -> float | None:
    values = [row["providers"].get(name, {}).get(goal.quantity) for name in (goal.against, "ours")]
    return None if None in values else values[0] / max(values[1], 1e-9)


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in ("precision", "mining", "backward", "B", "K")})


def time_line(row: dict[str, Any], names: Sequence[str]) -> str:
    """A row of the first table."""
    cell = _cell(row)
    columns = [cell.precision, cell.kind, str(cell.B), str(cell.K)]
    for name in names:
        of_name = row["providers"][name]
        if "skipped" in of_name:
            columns.append(f"skipped: {of_name['skipped'].split(':')[0]}")
            continue
        mark = " (no graph)" if of_name["captured"] is False else ""
        columns.append(f"{of_name['median_ms']:.3g} ({of_name['low_ms']:.3g} to {of_name['high_ms']:.3g}){mark}")
    share = row["providers"].get("ours", {}).get("share_of_floor")
    return harness.table_line([*columns, *([] if share is None else [f"{share:.0%}"])])


def time_header(names: Sequence[str], with_floor: bool) -> str:
    columns = ["precision", "what", "B", "K", *(f"{name}, ms" for name in names)]
    return harness.table_header([*columns, *(["ours: share of the floor"] if with_floor else [])])


def accuracy_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    lines = [harness.table_header(["precision", "what", "B", "K", *names])]
    for row in rows:
        cell = _cell(row)
        columns = [cell.precision, cell.kind, str(cell.B), str(cell.K)]
        for name in names:
            of_name = row["providers"][name]
            if "skipped" in of_name:
                columns.append("skipped")
                continue
            parts = [f"loss {of_name['loss_error']:.0e}"]
            if of_name["gradient_error"] is not None:
                parts.append(f"gradient {of_name['gradient_error']:.0e}")
            if of_name["same_rows"] is not None:
                parts.append(f"rows {of_name['same_rows']:.1%}")
            if of_name["peak_extra_bytes"] is not None:
                parts.append(f"{of_name['peak_extra_bytes'] / 2**20:.1f} MiB")
            columns.append(", ".join(parts))
        lines.append(harness.table_line(columns))
    return "\n".join(lines)


def goal_table(verdicts: Sequence[dict[str, Any]]) -> str:
    lines = [harness.table_header(["goal", "precision", "a training step", "worst", "where", ""])]
    for verdict in verdicts:
        ratios = ["" if verdict[name] is None else f"{verdict[name]:.2f}" for name in ("training_step", "worst")]
        columns = [verdict["goal"], verdict["precision"], *ratios, verdict["worst_at"] or "", verdict["verdict"]]
        lines.append(harness.table_line(columns))
    return "\n".join(lines)


COLOURS = {"as released": "tab:gray", "eager": "tab:blue", "torch.compile": "tab:orange", "ours": "tab:red"}


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], title: str, caption: str) -> Figure:
    """Milliseconds against B, a panel for each K, of one precision: the one of which most was measured."""
    counts = [row["precision"] for row in rows]
    precision = max(dict.fromkeys(counts), key=counts.count)
    rows = [row for row in rows if row["precision"] == precision]
    lengths = sorted({row["K"] for row in rows})
    figure, panels = plt.subplots(
        2, len(lengths), figsize=(2 + 3.6 * len(lengths), 8), sharex=True, sharey=True, squeeze=False
    )
    for line, backward in enumerate((True, False)):
        for column, K in enumerate(lengths):
            panel = panels[line, column]
            here = [row for row in rows if (row["K"], row["mining"], row["backward"]) == (K, True, backward)]
            here.sort(key=lambda row: row["B"])
            for name in names:
                done = [row for row in here if "median_ms" in row["providers"][name]]
                sizes = [row["B"] for row in done]
                low, median, high = (
                    [row["providers"][name][key] for row in done] for key in ("low_ms", "median_ms", "high_ms")
                )
                panel.fill_between(sizes, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
                panel.plot(sizes, median, "o-", color=COLOURS[name], label=name, markersize=4)
            floors = [(row["B"], row["floor_ms"]) for row in here if row["floor_ms"] is not None]
            if floors:
                panel.plot(*zip(*floors, strict=True), "k--", linewidth=1, label="floor")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted({row["B"] for row in rows})
            panel.set_xticks(ticks, [str(B) for B in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.grid(True, alpha=0.3)
            what = "forward and backward" if backward else "forward"
            panel.set_title(f"{what}, K = {K}", fontsize=10)
            if column == 0:
                panel.set_ylabel("milliseconds")
            if line == 1:
                panel.set_xlabel("B, clips in a batch")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.suptitle(f"{title}, {'float32' if precision == 'ieee' else precision}", y=0.985)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=len(labels), frameon=False)
    figure.text(0.5, 0.012, caption, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.035 + 0.015 * caption.count("\n"), 1, 0.94))
    return figure


# ------------------------------------------------------------------------------------------------------------------- main


def plan(arguments: argparse.Namespace, kind: str) -> list[Cell]:
    """The cells to measure, the goals' sizes first."""
    grid = [
        (B, K)
        for B in arguments.batch_sizes or BATCH_SIZES[kind]
        for K in arguments.queue_lengths or QUEUE_LENGTHS[kind]
    ]
    goals = [size for size in grid if size in GOAL_SIZES] or grid[:1]
    cells = []
    for number, precision in enumerate(arguments.precision or PRECISIONS[kind]):
        whole = not arguments.quick and (arguments.precision or number == 0)
        for B, K in grid if whole else goals:
            for mining in (True, False):
                for backward in (True, False):
                    cells.append(Cell(precision=precision, mining=mining, backward=backward, B=B, K=K))
    return sorted(cells, key=lambda cell: (cell.B, cell.K) not in goals)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), help="each on the whole grid")
    parser.add_argument("--quick", action="store_true", help="the goals' sizes only, fewer repetitions")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B")
    parser.add_argument("--queue-lengths", nargs="+", type=int, metavar="K")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new cell is begun after that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the devices' folders")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    begin = time.monotonic()
    device, names = torch.device(arguments.device), arguments.providers
    repetitions = arguments.repetitions or (QUICK_REPETITIONS if arguments.quick else REPETITIONS[device.type])
    cells = plan(arguments, device.type)
    surroundings = environment(device)
    genuine = device.type == "cuda" and runs_triton(device)
    implementation = f"ours is: {describe(device)}"
    print(f"{surroundings['device']}, torch {surroundings['versions']['torch']}; {implementation}")
    ceilings = harness.ceilings(device)
    if ceilings is None:
        print("The ceilings of this device are not measured: no share of the floor, no peak memory.")
    else:
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings.flops_per_second.items())
        print(f"Measured ceilings: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, {rates}")

    print(f"\nMedian of {repetitions} (20 % to 80 %)\n\n{time_header(names, ceilings is not None)}", flush=True)
    rows: list[dict[str, Any]] = []
    stopped, failed = None, False
    for cell in cells:
        if time.monotonic() - begin > 60 * arguments.minutes:
            stopped = f"{arguments.minutes:g} minutes were over"
            break
        try:
            rows.append(measure(cell, names, device, repetitions, ceilings))
        except RuntimeError as error:  # after some errors a GPU does nothing more in this process
            stopped, failed = f"{cell}: {harness.reason(error)}", True
            break
        print(time_line(rows[-1], names), flush=True)
    if not rows:
        raise SystemExit(f"nothing was measured: {stopped}")
    not_reached = [str(cell) for cell in cells[len(rows) :]]
    verdicts = judge(rows, genuine)
    print(f"\nErrors against float64, and peak extra memory\n\n{accuracy_table(rows, names)}")
    print(f"\nGoals: times better than the other; stated for an H200\n\n{goal_table(verdicts)}\n")
    for row in rows:
        for name, of_name in row["providers"].items():
            if "skipped" in of_name:
                print(f"skipped: {name} at {_cell(row)}: {of_name['skipped']}")
    if stopped:
        print(f"stopped, {stopped}; not measured: {len(not_reached)} of {len(cells)} cells")

    content = {
        "question": "how fast is the contrastive loss over a queue, with the search for its positives?",
        "command": harness.command("info_nce", argv),
        "environment": surroundings,
        "implementation": implementation,
        "seconds": round(time.monotonic() - begin, 1),
        "sizes": {"P": P, "D": D, "M": M, "temperature": TEMPERATURE},
        "ceilings": None if ceilings is None else asdict(ceilings),
        "goals": verdicts,
        "stopped": stopped,
        "not_reached": not_reached,
        "rows": rows,
    }
    name = "_".join(["info_nce", *(arguments.precision or []), *(["quick"] if arguments.quick else [])])
    folder = harness.results_folder(device, arguments.results)
    caption = (
        f"{surroundings['device']}, {surroundings['date'][:10]}, torch {surroundings['versions']['torch']}, "
        f"commit {surroundings['commit']}; {implementation}\nmedian of {repetitions}, band: 20 to 80 %"
    )
    figure = plot(rows, names, "Contrastive loss over a queue, with mining", caption)
    harness.write(folder, name, content, figure)
    print(f"Wrote {folder / name}.json and .png")
    if any("skipped" in row["providers"].get("ours", {}) for row in rows):
        raise SystemExit("ours failed somewhere: see above")
    if failed:
        raise SystemExit("an error stopped the run: see above")


if __name__ == "__main__":
    main()
