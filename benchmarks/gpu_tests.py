"""Run tests that need a GPU and write the outcome of each test at once, for benchmarks/gpu_layers.py.

    python -m benchmarks.gpu_tests NAME TEST ...      pytest's arguments, such as tests/test_gpu.py::test_x or -k word

Writes layers-tests-NAME.json into results/DEVICE after each test. A test that ends the process, as some errors of a GPU
do, leaves its name in the file with the outcome "running". The exit status is pytest's, and 1 if no test ran.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from dclr.report import environment, write_json


class Outcomes:
    """A pytest plugin that writes each test's outcome, its seconds and the first line of its error."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path, self.environment = path, environment
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tests[nodeid] = {"outcome": "running", "seconds": 0.0}
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = self.tests[report.nodeid]
        found["seconds"] = round(found["seconds"] + report.duration, 3)
        if report.when == "call" or report.outcome != "passed":
            found["outcome"] = report.outcome
            if report.outcome != "passed":
                found["reason"] = _reason(report)
            self.write()

    def write(self) -> None:
        outcomes = [found["outcome"] for found in self.tests.values()]
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        content = {
            "question": "do the tests that need a GPU pass?",
            "environment": self.environment,
            "counts": counts,
            "tests": self.tests,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, content)


def _reason(report: pytest.TestReport) -> str:
    """Return in one line the error of a failed test, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return (text.strip() or "no message").splitlines()[0][:300]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder that holds one folder a device")
    arguments, tests = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = harness.results_folder(device, arguments.results) / f"layers-tests-{arguments.name}.json"
    outcomes = Outcomes(path, environment(device))
    os.chdir(harness.ROOT)
    status = int(pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "-rfE", *tests], plugins=[outcomes]))
    print(f"Wrote {path}")
    return status if outcomes.tests else 1


if __name__ == "__main__":
    sys.exit(main())
