"""A process that makes training steps of one source tree, for benchmarks/baseline.py.

    cd TREE; PYTHONPATH=TREE python -P .../baseline_worker.py

It imports the code of TREE, an older commit or today's. So this file uses only what all these commits have. Each line
of standard input is a request, and each request is answered with one line on standard output, both in JSON:

    {"do": "build", "cell": {...}, "provider": NAME}  ->  {"first_loss": ..., "precision": ..., "first_step_s": ...}
    {"do": "turn", "steps": N}                        ->  {"ms": [...], "peak_bytes": ...}

An error is answered with {"error": TEXT}. The process ends at the end of its standard input.
"""

import importlib
import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def untimed(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def start_processes() -> torch.device:
    """Join the process group as a program of the tree does. The module has another name in older commits."""
    # To try an import is not enough: in a tree without the module, it would find that of an installed dclr.
    name = "dclr.engine" if Path("dclr/engine.py").is_file() else "dclr.training.engine"
    return importlib.import_module(name).start_processes()


class Worker:
    """The steps of one provider, made on request."""

    def __init__(self) -> None:
        self.device = start_processes()
        self.provider: Any = None

    def build(self, cell: dict[str, Any], provider: str) -> dict[str, Any]:
        """Make the provider and its first step. Afterwards the queue counts as full, so later steps mine entries."""
        providers = importlib.import_module("benchmarks.step_providers")
        made = providers.Cell(**cell)
        inputs = providers.make_inputs(made, self.device)
        self.provider = providers.PROVIDERS[provider](made, inputs, self.device)
        begin = time.perf_counter()
        loss = float(self.provider.step(untimed))  # waits for the device
        seconds = time.perf_counter() - begin
        network = self.provider.network if hasattr(self.provider, "network") else self.provider.method
        network.enqueued.fill_(network.method.queue_length)
        return {"first_loss": loss, "precision": self.provider.precision, "first_step_s": seconds}

    def turn(self, steps: int) -> dict[str, Any]:
        """Make one step that is not measured, then `steps` that are. Return their milliseconds and the peak memory."""
        self.provider.step(untimed)
        if self.device.type == "cpu":
            borders_s = [time.perf_counter()]
            for _ in range(steps):
                self.provider.step(untimed)
                borders_s.append(time.perf_counter())
            return {"ms": [(end - begin) * 1e3 for begin, end in pairwise(borders_s)], "peak_bytes": None}
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        borders = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        borders[0].record()
        for border in borders[1:]:
            self.provider.step(untimed)
            border.record()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()  # the other process needs the memory for its turn
        return {"ms": [begin.elapsed_time(end) for begin, end in pairwise(borders)], "peak_bytes": peak}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # of any kind, because the other process waits for an answer
            answer = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
