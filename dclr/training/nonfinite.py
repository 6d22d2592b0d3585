"""The guard against non-finite losses and gradients.

A step with a non-finite value changes nothing. The run stops, or skips the step.
"""

import math
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dclr import distributed
from dclr.errors import UserError
from dclr.progress import write_line
from dclr.training.engine import Engine

MOST_SKIPPED_IN_A_ROW = 20
"""Skipped steps in a row that end the run. A bad video makes one step non-finite. A diverged network makes every later
step non-finite, and the run would skip steps for days."""

NAMED_PARAMETERS = 3


@dataclass
class StepValues:
    """The values of one step on one rank."""

    step: int
    terms: list[tuple[list[str], Tensor, Tensor]] = field(default_factory=list)
    """One entry for each micro-batch: names of terms, their values, indices of the samples."""
    parameters: list[str] = field(default_factory=list)
    """Names of the tensors that `norms` belong to; "" for a flat tensor of ZeRO, which holds many parameters."""
    norms: Tensor | None = None
    """(parameters,) largest magnitude in each gradient."""
    bad: Tensor | None = None
    """(1,) float32: 1 if any rank has a non-finite value."""
    bad_on_host: Tensor | None = None
    """A copy of `bad` in host memory, valid once `copied` has happened."""
    copied: torch.cuda.Event | None = None


class NonfiniteGuard:
    """Prevent every update in which a loss or gradient of any rank is not finite, and report it.

    The loop calls `begin`, then `see` before each `engine.step`, then `end`. The device decides before the optimizer
    runs: fused SGD does not change weights and momentum if its `found_inf` is 1. The host learns the decision up to two
    steps later, without waiting. Only `check` waits. The loop calls `check` before log lines and checkpoints.

    Args:
        mode: "stop": the first bad step raises UserError on all ranks. "skip": the step is undone, with batch
            statistics and queue, printed and counted in `skipped`. The key encoder's moving average still advances.
        skipped: steps that earlier parts of a resumed run have skipped.
    """

    def __init__(self, engine: Engine, mode: str, skipped: int = 0) -> None:
        self._engine, self._skips, self.skipped = engine, mode == "skip", skipped
        self._in_a_row = 0
        # The host may be this many steps ahead of the GPU (see DeviceBatches).
        self._lag = 2 if engine.device.type == "cuda" else 0
        self._pending: deque[StepValues] = deque()
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._buffers = list(engine.module.buffers()) if self._skips else []
        self._saved = [torch.empty_like(buffer) for buffer in self._buffers]
        engine.sgd.register_step_pre_hook(self._before_update)

    def begin(self, step: int) -> None:
        """Start a step. Messages name it by this number."""
        self._values = StepValues(step)
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            saved.copy_(buffer)

    def see(self, terms: dict[str, Tensor], indices: Tensor) -> None:
        """Record a micro-batch: its terms by name, each () on the device, and its samples' indices (B,) on the host."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        self._values.terms.append((list(terms), values, indices))

    def end(self) -> None:
        """End the step.

        Raises:
            UserError: on all ranks. In "stop" mode, a step was not finite; in "skip" mode, 20 steps in a row were not.
        """
        values = self._values
        if values.bad is None:
            # The optimizer was not called: the step only fills the queue, or ZeRO itself has skipped it on all ranks.
            overflowed = self._engine.overflowed
            values.bad = torch.ones(1, device=self._engine.device) if overflowed else self._any_rank_bad()
        undo = values.bad[0] > 0  # (): a tensor of shape (1,) would not broadcast into a buffer without dimensions
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            torch.where(undo, saved, buffer, out=buffer)
        values.bad_on_host = values.bad.to("cpu", non_blocking=True)
        if values.bad.is_cuda:
            values.copied = torch.cuda.Event()
            values.copied.record()
        self._pending.append(values)
        while len(self._pending) > self._lag:
            self._look_at(self._pending.popleft())

    def check(self) -> None:
        """Wait for every step that has ended and look at it. Raises UserError as `end` does."""
        while self._pending:
            self._look_at(self._pending.popleft())

    def metrics(self) -> dict[str, float]:
        """Return the number of skipped steps for a log line; nothing in "stop" mode."""
        return {"nonfinite/skipped_steps": float(self.skipped)} if self._skips else {}

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Check the gradients that the optimizer will apply: whole or this rank's shard, after the mean over ranks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        self._values.parameters = [self._names.get(parameter, "") for parameter in parameters]
        self._values.norms = torch.stack(torch._foreach_norm(gradients, ord=math.inf))
        self._values.bad = self._any_rank_bad()
        optimizer.found_inf = self._values.bad  # type: ignore[attr-defined]

    def _any_rank_bad(self) -> Tensor:
        """Return (1,) float32: 1 if any rank has a non-finite term or gradient."""
        found = [values for _, values, _ in self._values.terms]
        if self._values.norms is not None:
            found.append(self._values.norms)
        return distributed.max_over_ranks(1 - torch.cat(found).isfinite().all().float().reshape(1))

    def _look_at(self, values: StepValues) -> None:
        if values.copied is not None:
            values.copied.synchronize()
        assert values.bad_on_host is not None
        if values.bad_on_host.tolist() == [0.0]:
            self._in_a_row = 0
            return
        found = describe(values)
        if not self._skips:
            raise UserError(
                f"{found}. Nothing was updated and the last checkpoint is intact: lower --lr, or use "
                "--on-nonfinite skip"
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{found}. The {MOST_SKIPPED_IN_A_ROW - 1} steps before were skipped for the same reason: the network "
                "has diverged; resume from the last checkpoint with a lower --lr"
            )
        if distributed.rank() == 0:
            write_line(f"skipped: {found}", sys.stderr)


def describe(values: StepValues) -> str:
    """Return what was not finite in a step, and for which samples, over all ranks. Call this on all ranks.

    Terms are named with the samples of their micro-batch and rank. A gradient is a mean over the step, so all samples
    of the step are named with it.
    """
    terms: dict[str, float] = {}
    samples: list[int] = []
    for names, numbers, indices in values.terms:
        bad = {name: number for name, number in zip(names, numbers.tolist(), strict=True) if not math.isfinite(number)}
        terms = bad | terms
        samples += indices.tolist() if bad else []
    if len(terms) > 1:
        terms.pop("loss", None)  # the loss is the sum of the others
    norms = [] if values.norms is None else values.norms.tolist()
    gradients = [name for name, norm in zip(values.parameters, norms, strict=True) if not math.isfinite(norm)]
    all_samples = [index for *_, indices in values.terms for index in indices.tolist()]
    ranks = distributed.gather_objects((terms, samples, gradients, all_samples))

    start = f"non-finite values at step {values.step}"
    if any(terms for terms, *_ in ranks):
        found = [
            (f"on rank {rank}: " if len(ranks) > 1 else "")
            + ", ".join(f"{name} {number}" for name, number in terms.items())
            + f" ({_samples(samples)})"
            for rank, (terms, samples, *_) in enumerate(ranks)
            if terms
        ]
        return f"{start}{' ' if len(ranks) > 1 else ': '}{', '.join(found)}"
    parameters = next((gradients for _, _, gradients, _ in ranks if gradients), [""])
    named = ", ".join(parameters[:NAMED_PARAMETERS])
    more = f" and {len(parameters) - NAMED_PARAMETERS} more" if len(parameters) > NAMED_PARAMETERS else ""
    every = [index for *_, indices in ranks for index in indices]
    return f"{start}: the gradient{' of ' if named else ''}{named}{more} (a mean over {_samples(every)})"


def _samples(indices: list[int]) -> str:
    return f"samples {', '.join(map(str, indices))}"
