"""Numbers go bad: a step whose loss or gradient is not finite changes nothing; the run stops, or goes on without it."""

import math
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dclr import distributed
from dclr.errors import UserError
from dclr.training.engine import Engine

# One bad video or batch spoils a step now and then. A network that spoils its own numbers does so at every step, and would for days.
MOST_SKIPPED_IN_A_ROW = 20
NAMED_PARAMETERS = 3


@dataclass
class Seen:
    """What one rank saw of one step."""

    step: int
    parts: list[tuple[list[str], Tensor, Tensor]] = field(default_factory=list)  # names of terms, their values, samples
    parameters: list[str] = field(default_factory=list)  # "" for a part of ZeRO's, which holds many
    norms: Tensor | None = None  # (parameters,) greatest magnitude in each gradient
    bad: Tensor | None = None  # (1,) float32: 1 where any rank saw a number that is not finite
    flag: Tensor | None = None  # `bad` on the host, once `came` has
    came: torch.cuda.Event | None = None


class FiniteGuard:
    """Leaves out every step in which any rank's losses or gradients are not finite, and tells of it.

    A loop calls `begin`, then `see` before each `engine.step`, then `end`. The device decides, in front of the optimizer (a fused one,
    which leaves weights and momentum alone where its `found_inf` is 1), and the host learns of it up to two steps later: it waits for
    nothing. `check` waits, and comes before everything that must not hold what such a step left: log lines and checkpoints.

    mode: "stop": the first bad step raises UserError, on all ranks. "skip": it is undone, batch statistics and queue included, printed
    and counted in `skipped` (which starts at the given number); the key network's average goes on, as nothing in it can have gone bad.
    """

    def __init__(self, engine: Engine, mode: str, skipped: int = 0) -> None:
        self._engine, self._skips, self.skipped = engine, mode == "skip", skipped
        self._in_a_row = 0
        self._lag = (
            2 if engine.device.type == "cuda" else 0
        )  # steps that the host may be ahead of the GPU (DeviceBatches)
        self._pending: deque[Seen] = deque()
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._buffers = list(engine.module.buffers()) if self._skips else []
        self._saved = [torch.empty_like(buffer) for buffer in self._buffers]
        engine.sgd.register_step_pre_hook(self._before_update)

    def begin(self, step: int) -> None:
        """step: by which it is reported."""
        self._seen = Seen(step)
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            saved.copy_(buffer)

    def see(self, terms: dict[str, Tensor], indices: Tensor) -> None:
        """A micro-batch's losses, (), by the names they are logged by, and the samples they are of (B,), on the host."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        self._seen.parts.append((list(terms), values, indices))

    def _before_update(self, optimizer: torch.optim.SGD, *_: Any) -> None:
        """Here the gradients are those about to be applied, whole or this rank's part of them, after the mean over ranks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        self._seen.parameters = [self._names.get(parameter, "") for parameter in parameters]
        self._seen.norms = torch.stack(torch._foreach_norm(gradients, ord=math.inf))
        self._seen.bad = self._any_rank_bad()
        optimizer.found_inf = self._seen.bad  # type: ignore[attr-defined]

    def _any_rank_bad(self) -> Tensor:
        seen = self._seen
        values = [values for _, values, _ in seen.parts] + ([] if seen.norms is None else [seen.norms])
        return distributed.max_over_ranks(1 - torch.cat(values).isfinite().all().float().reshape(1))

    def end(self) -> None:
        """After the step. Raises UserError, on all ranks: see the class; 20 steps in a row were skipped."""
        seen = self._seen
        if seen.bad is None:  # a step that only fills the queue, or one that ZeRO left out by itself, on all ranks
            seen.bad = torch.ones(1, device=self._engine.device) if self._engine.overflowed else self._any_rank_bad()
        undo = seen.bad[0] > 0  # (): any other shape would not fit a buffer without dimensions
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            torch.where(undo, saved, buffer, out=buffer)
        seen.flag = seen.bad.to("cpu", non_blocking=True)
        if seen.bad.is_cuda:
            seen.came = torch.cuda.Event()
            seen.came.record()
        self._pending.append(seen)
        while len(self._pending) > self._lag:
            self._look(self._pending.popleft())

    def check(self) -> None:
        """Look at every step that has ended. Raises UserError as `end` does."""
        while self._pending:
            self._look(self._pending.popleft())

    def metrics(self) -> dict[str, float]:
        """For a line of the log: how many steps were skipped so far, where any can be."""
        return {"nonfinite/skipped_steps": float(self.skipped)} if self._skips else {}

    def _look(self, seen: Seen) -> None:
        if seen.came is not None:
            seen.came.synchronize()
        assert seen.flag is not None
        if seen.flag.tolist() == [0.0]:
            self._in_a_row = 0
            return
        found = describe(seen)
        if not self._skips:
            raise UserError(
                f"{found}; nothing was updated, the last checkpoint is intact: lower --lr, or --on-nonfinite skip"
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{found}; so were the {MOST_SKIPPED_IN_A_ROW - 1} steps before, all skipped: the network spoils its own numbers; "
                "resume from the last checkpoint with a lower --lr"
            )
        if distributed.rank() == 0:
            tqdm.write(f"skipped: {found}", file=sys.stderr)


def describe(seen: Seen) -> str:
    """What was not finite in a step, and of which samples, over all ranks; to be called on all.

    Terms with the samples of the micro-batches and ranks in which they were bad. A gradient alone is a mean over all samples of the
    step, so all are named.
    """
    terms: dict[str, float] = {}
    samples: list[int] = []
    for names, values, indices in seen.parts:
        bad = {name: value for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)}
        terms = bad | terms
        samples += indices.tolist() if bad else []
    if len(terms) > 1:
        terms.pop("loss", None)  # the sum of the others
    norms = [] if seen.norms is None else seen.norms.tolist()
    gradients = [name for name, norm in zip(seen.parameters, norms, strict=True) if not math.isfinite(norm)]
    everyone = distributed.gather_objects(
        (terms, samples, gradients, [index for *_, indices in seen.parts for index in indices.tolist()])
    )
    start = f"the numbers are not finite at step {seen.step}"
    if any(terms for terms, *_ in everyone):
        found = [
            (f"on rank {rank}: " if len(everyone) > 1 else "")
            + ", ".join(f"{name} {value}" for name, value in terms.items())
            + f" ({_samples(samples)})"
            for rank, (terms, samples, *_) in enumerate(everyone)
            if terms
        ]
        return f"{start}{' ' if len(everyone) > 1 else ': '}{', '.join(found)}"
    parameters = next((gradients for *_, gradients, _ in everyone if gradients), [""])
    of = ", ".join(parameters[:NAMED_PARAMETERS])
    more = f" and {len(parameters) - NAMED_PARAMETERS} more" if len(parameters) > NAMED_PARAMETERS else ""
    every = [index for *_, indices in everyone for index in indices]
    return f"{start}: the gradient{' of ' if of else ''}{of}{more} (a mean over {_samples(every)})"


def _samples(indices: list[int]) -> str:
    return f"samples {', '.join(map(str, indices))}"
