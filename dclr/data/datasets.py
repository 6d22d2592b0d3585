"""The data set of --data, or the built-in demo videos."""

from pathlib import Path

from dclr import report
from dclr.config import DataConfig
from dclr.data.catalog import Catalog, open_catalog
from dclr.data.demo import render_demo

DEMO_VIDEOS = Path("runs") / "demo-videos"


def make_demo() -> None:
    """Render the built-in demo videos if they do not exist."""
    report.say(f"no --data: using the built-in demo videos in {DEMO_VIDEOS}")
    render_demo(DEMO_VIDEOS)


def open_data(data: DataConfig) -> Catalog:
    """Return the catalog of --data, or of the demo videos without --data."""
    return open_catalog(Path(data.data), data.split, data.allow_outside) if data.data else open_catalog(DEMO_VIDEOS)
