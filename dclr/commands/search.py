"""Find the videos nearest to a query: `eval.py search`."""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dclr import config as configuration
from dclr.commands.features import CLIP_FLAGS, refuse_unless_demo
from dclr.commands.launcher import require_one_process
from dclr.commands.ranks import connected_ranks
from dclr.errors import UserError

DESCRIPTION = "find the videos nearest to a query, by motion, by scene or by both: a table, a picture and a page"

KIND_OF_LIKENESS = {"both": "pooled", "motion": "motion", "scene": "scene"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    heading = parser.add_argument_group("The query, the videos to search, and the result")
    heading.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the folder of a run, also of one that is still running, or a file of weights",
    )
    heading.add_argument(
        "--query",
        required=True,
        nargs="+",
        metavar="VIDEO",
        help="video files, inside or outside the searched data set. "
        "A path that the data set lists works too, for example in a packed store. A query does not find itself",
    )
    heading.add_argument(
        "--features",
        metavar="FEATURES",
        help="search this file of eval.py features, written with the same checkpoint, and not --data. "
        "Only queries that are files are embedded",
    )
    heading.add_argument(
        "--like",
        choices=KIND_OF_LIKENESS,
        default="both",
        metavar="WHAT",
        help="motion, scene or both. Motion and scene need the projection heads, which files of pretraining with DCLR "
        "have. Both uses the pooled feature, which every checkpoint has (default: both)",
    )
    heading.add_argument("--count", type=int, default=10, metavar="N", help="nearest videos of a query (default: 10)")
    heading.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder for results.csv and nearest.png. It must be new or empty (default: the next free runs/search-N)",
    )
    heading.add_argument(
        "--html",
        action="store_true",
        help="also write search.html, which plays the videos next to the query. It is one file and needs no network",
    )
    configuration.add_flags(parser, [configuration.DataConfig], only=CLIP_FLAGS)


def run(flags: dict[str, Any]) -> None:
    """Search, print the table and write the files. Raises UserError for wrong input."""
    checkpoint, features, out = Path(flags.pop("checkpoint")), flags.pop("features", None), flags.pop("out", None)
    kind, queries = KIND_OF_LIKENESS[flags.pop("like")], list(dict.fromkeys(flags.pop("query")))
    count, html = flags.pop("count"), flags.pop("html")
    if count < 1:
        raise UserError(f"--count is {count}, but must be at least 1")
    if features is not None:
        if fixed := sorted(CLIP_FLAGS.intersection(flags) - {"workers", "video_timeout"}):
            names = ", ".join(map(configuration.flag_of, fixed))
            raise UserError(f"{names} cannot be used with --features, whose file says which videos and clips it is of")
        require_one_process(os.environ, "eval.py search --features")  # there is nothing to divide among several
    elif not flags.get("data"):
        refuse_unless_demo(checkpoint)

    from dclr import distributed, report
    from dclr.data.catalog import Catalog, print_reading
    from dclr.evaluation.features import find_data
    from dclr.evaluation.search import clips_of, read_gallery, search
    from dclr.evaluation.search_results import print_table, title_of, write_results
    from dclr.models import load_pretrained

    with connected_ranks() as device, ExitStack() as at_end:
        distributed.only_on_rank_zero(lambda: refuse_unless_empty(out))
        pretrained = load_pretrained(checkpoint)
        table = read_gallery(Path(features), pretrained, kind) if features else None
        data = configuration.DataConfig(**{**clips_of(table, pretrained), **flags})
        source = table or find_data(data)
        folder = distributed.on_rank_zero(lambda: at_end.enter_context(report.open_run(out or "", "search")))
        print(pretrained.loaded)
        if isinstance(source, Catalog) and distributed.rank() == 0:
            print_reading(source)
        result = search(source, pretrained, data, queries, kind, count, device)
        if result is not None:
            found, gallery = result
            print_table(found, gallery, kind)
            write_results(found, gallery, title_of(kind, pretrained), folder, html, data.video_timeout)
        print(f"\nresults.csv, nearest.png{' and search.html' if html else ''} written to {folder}")


def refuse_unless_empty(out: str | None) -> None:
    """Raise UserError if --out exists and is not an empty folder."""
    if out is not None and Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder: give another name, or delete it")
