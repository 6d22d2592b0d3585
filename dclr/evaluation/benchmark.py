"""The splits of a data set that an evaluation uses, and what is wrong with them: missing videos and duplicates."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dclr import distributed
from dclr.config import DataConfig
from dclr.data.catalog import Catalog, describe_reading, reading_entry
from dclr.data.coverage import Coverage, class_warnings, coverage
from dclr.data.duplicates import find_duplicates
from dclr.data.videos import VideoSet
from dclr.errors import printable


class Benchmark:
    """The splits that an evaluation uses. Figures are computed only if almost all listed videos can be read."""

    def __init__(self, catalog: Catalog, data: DataConfig, **videos: VideoSet) -> None:
        """`videos`: the readable videos of the splits that the evaluation uses, by the name of the split.

        All ranks call this. Rank 0 looks for duplicates, because that reads files.

        Raises UserError: on all ranks, more than --max-missing percent of a split's listed videos are missing, or a
        video has two labels.
        """
        self.catalog, self.videos, self.max_missing = catalog, videos, data.max_missing
        self.failures: dict[str, str] = {}
        for line in describe_reading(catalog):
            print(line)
        self.check()
        unreadable = {path for split in videos.values() for path in split.unreadable}
        with distributed.without_timeout():
            self.duplicates = distributed.on_rank_zero(lambda: find_duplicates(catalog, unreadable))
        self.duplicates.check_labels()

    def check(self) -> list[Coverage]:
        """Return what the figures cover, by split. Raises UserError: too many videos are missing."""
        covered = [
            coverage(self.catalog, split, {**videos.unreadable, **self.failures})
            for split, videos in self.videos.items()
        ]
        for split in covered:
            split.check(self.max_missing)
        return covered

    def add_failures(self, failures: Mapping[str, str]) -> None:
        """Add videos (path -> reason) that failed in the evaluation. Raises UserError: too many videos are missing."""
        self.failures |= failures
        self.check()

    def print_faults(self) -> None:
        """Print one line for each fault: on stdout, below the table of figures, and as a warning on stderr."""
        warnings = [*class_warnings(self.catalog), *self.duplicates.lines(), *self.catalog.warnings]
        for line in map(printable, [*self.gaps(), *warnings]):
            print(line)
            print(f"warning: {line}", file=sys.stderr)

    def gaps(self) -> list[str]:
        """Return one line for each split of which the figures do not cover all listed videos and classes."""
        sentences = [split.sentence() for split in self.check()]
        return [f"these figures are of {sentence}" for sentence in sentences if sentence]

    def title(self, checkpoint: Path, finding: str, videos: str, *more: str) -> str:
        """Return the title of a picture: a line for the checkpoint, one for the data set, others, and one for each gap.

        Checkpoint and data set are named without the folders above them, because pictures are published.

        Args:
            finding: what was found for the checkpoint, next to chance.
            videos: which videos of the data set it was found for.
            more: other lines.
        """
        names = checkpoint.resolve().parts
        run = "/".join(names[-2:]) if checkpoint.is_file() else names[-1]
        return "\n".join(
            [f"{run}: {finding}", f"data set {self.catalog.root.resolve().name}: {videos}", *more, *self.gaps()]
        )

    def report(self) -> dict[str, Any]:
        """Return the entries of report.json."""
        return {
            "data": reading_entry(self.catalog),
            "coverage": {split.split: split.report() for split in self.check()},
            "duplicates": self.duplicates.report(),
        }
