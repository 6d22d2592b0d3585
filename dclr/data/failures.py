"""Videos that cannot be read while a run reads them: warnings, counts and the limit --max-bad."""

import sys

from dclr.data.videos import VideoSet
from dclr.errors import UserError, printable


class Failures:
    """The videos that failed while a run read them. Each video gets one warning on stderr.

    Attributes:
        reasons: path of each failed video -> why it could not be read.
        count: number of failed reads. A video that fails in every epoch counts once for each epoch.
    """

    def __init__(self, consequence: str = "the next video of the epoch takes its position") -> None:
        """`consequence`: what the run does without the video, for the warning."""
        self.reasons: dict[str, str] = {}
        self.count = 0
        self.consequence = consequence

    def add(self, failures: dict[str, str]) -> None:
        """Count the failures of one batch (path -> reason) and warn about the videos that had not failed before."""
        self.count += len(failures)
        for path, reason in failures.items():
            if path not in self.reasons:
                shown = f"{printable(path)} can no longer be read ({printable(reason)})"
                print(f"warning: {shown}; {self.consequence}", file=sys.stderr)
                self.reasons[path] = reason


def check_bad(videos: VideoSet, failed: dict[str, str], max_bad: float) -> None:
    """Raise UserError if more than `max_bad` percent of a split's videos are bad.

    A video is bad if its verification failed, or if it failed while a run read it.

    Args:
        videos: the readable videos of the split, which also name the unreadable ones.
        failed: path -> reason of the videos that failed while the run read them, on all ranks.
        max_bad: percent, 0 to 100.
    """
    bad = {**videos.unreadable, **failed}
    listed = len(videos) + len(videos.unreadable)
    share = 100 * len(bad) / listed
    if share > max_bad:
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{videos.root}: {len(bad)} of the split's {listed} videos cannot be read ({share:.3g} %), "
            f"and --max-bad allows {max_bad:g} %; the first is {path} ({reason}): "
            "see train.py check, or raise --max-bad"
        )
