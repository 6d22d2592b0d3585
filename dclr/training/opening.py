"""The data set of a training run, opened once on each machine."""

import ctypes
import sys
from typing import Any

from dclr import distributed
from dclr.config import Config, DataConfig, PretrainConfig
from dclr.data.catalog import Catalog, describe_reading, reading_entry
from dclr.data.coverage import class_warnings, coverage
from dclr.data.datasets import open_data
from dclr.data.duplicates import find_duplicates
from dclr.data.few_labels import keep_few
from dclr.data.manifest import KnownFiles, load_manifest, look_up
from dclr.data.remote import data_path
from dclr.data.store import is_store
from dclr.data.string_array import StringArray, unpack_strings
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.training import engine, machines
from dclr.training.sharing import share_with_machine

SAME_VIDEOS = "every machine must see the same files, for example on a shared disk"


def open_data_once(command: str, config: Config) -> tuple[VideoSet, Catalog | None, dict[str, Any]]:
    """Open the data set of a run. The first rank of each machine reads its lists and folders; all ranks verify videos.

    The other ranks get arrays. A million videos are a gigabyte of Python objects. So only one process of each machine
    holds them, and only until the run starts. Every rank opens a packed store itself.

    Returns:
        the readable videos of the train split, whose arrays the ranks of a machine share; the catalog, None on ranks
        that did not read it; entries of report.json about few labels.

    Raises:
        UserError: on all ranks, something is wrong with the data set, or more than --max-missing percent of its train
            videos are missing; the processes do not see the same videos.
    """
    data = config.data
    is_packed = distributed.on_all_ranks(lambda: bool(data.data) and is_store(data_path(data.data)))
    machines.check_same({"--data": "a packed store" if is_packed else "not a packed store"}, SAME_VIDEOS)
    reads = is_packed or engine.local_rank() == 0
    with distributed.without_timeout():
        catalog = distributed.on_all_ranks(lambda: open_data(data) if reads else None)
        listed = {f"videos of --data {split}": len(found) for split, found in catalog.splits.items()} if catalog else {}
        of_machine = distributed.gather_objects(listed)[distributed.rank() - engine.local_rank()]
        machines.check_same(of_machine, SAME_VIDEOS)
        few_labels: dict[str, Any] = {}
        found = distributed.on_all_ranks(lambda: keep_labelled(command, config, catalog) if catalog else None)
        if found is not None:
            catalog, few_labels = found
        # Before the videos are verified, which may take hours.
        distributed.on_all_ranks(lambda: coverage(catalog, "train", {}).check(data.max_missing) if catalog else None)
        together = distributed.world_size() > 1 and not is_packed
        known = verify_together(catalog, data) if together else None
        workers, timeout = max(1, data.workers), data.video_timeout
        videos = distributed.on_all_ranks(
            lambda: open_videos(catalog, "train", workers, timeout=timeout, known=known) if catalog else None
        )
        if videos is not None:
            videos.fingerprint()  # once on each machine: the ranks get it with the videos
        if videos is None or not is_packed:
            videos = share_with_machine(videos)
    machines.check_same(
        {"readable videos of --data": f"{len(videos)} with digest {videos.fingerprint()[:10]}"}, SAME_VIDEOS
    )
    return videos, catalog, few_labels


def verify_together(catalog: Catalog | None, data: DataConfig) -> KnownFiles | None:
    """Verify the videos of the train split that the cache does not know, on all ranks.

    Args:
        catalog: None on ranks that did not read it.

    Returns:
        what the cache knows; None if videos were verified, and on ranks that did not read the catalog.

    Raises:
        UserError: on all ranks, see load_manifest.
    """

    def in_cache(catalog: Catalog) -> KnownFiles:
        return look_up(catalog.root, [video.path for video in catalog.videos("train")])

    known = distributed.on_all_ranks(lambda: in_cache(catalog) if catalog else None)
    todo = known.unverified() if known else {}
    if not any(distributed.gather_objects(len(todo))):
        return known
    root, paths = share_with_machine((catalog.root, StringArray(todo)) if catalog else None)
    shown, workers = catalog is not None, max(1, data.workers)
    distributed.on_all_ranks(
        lambda: load_manifest(
            root, unpack_strings(paths.packed), workers=workers, progress=shown, timeout=data.video_timeout
        )
    )
    return None


def keep_labelled(command: str, config: Config, catalog: Catalog) -> tuple[Catalog, dict[str, Any]]:
    """Return the catalog with the train videos that the run uses, and entries of report.json about that choice.

    Raises:
        UserError: finetune or linear, but the train videos have no labels; see check_measured and keep_few.
    """
    if isinstance(config, PretrainConfig):
        check_measured(config, catalog)
        return catalog, {}
    if any(video.label < 0 for video in catalog.videos("train")):
        raise UserError(
            f"--data {catalog.root}: its videos have no labels, which {command} needs; use class folders, or lists "
            "with a column `label`"
        )
    if not config.transfer.few_labels:
        return catalog, {}
    few, entry = keep_few(catalog, config.transfer.label_share, config.transfer.shots, config.run.seed)
    return few, {"few_labels": entry}


def check_measured(config: PretrainConfig, catalog: Catalog) -> None:
    """Raise UserError if --knn-every measures, but train or test videos are missing or have no labels."""
    if not config.monitor.knn_every:
        return
    needs = "--knn-every needs labelled training and test videos, and 0 measures nothing"
    for split in ("train", "test"):
        if not catalog.splits.get(split):
            raise UserError(f"{needs}: {catalog.root} has no {split} split")
        if any(video.label < 0 for video in catalog.videos(split)):
            raise UserError(f"{needs}: the {split} videos of {catalog.root} have no labels")


def check_listed(command: str, catalog: Catalog | None, videos: VideoSet) -> dict[str, Any]:
    """Compare the listed videos with the readable ones, and look for videos that are listed twice. Rank 0 does this.

    Rank 0 prints a warning for each fault. Pretraining does not use labels, so it accepts a video with two labels.

    Returns:
        entries of report.json; none on other ranks than 0.

    Raises:
        UserError: on all ranks, a video has two labels and the command needs labels.
    """

    def check(catalog: Catalog) -> dict[str, Any]:
        duplicates = find_duplicates(catalog, videos.unreadable)
        if command != "pretrain":
            duplicates.check_labels()
        covered = coverage(catalog, "train", videos.unreadable)
        gaps = [covered.sentence()] if command != "pretrain" or covered.used < covered.listed else []
        labels = class_warnings(catalog) if command != "pretrain" else []
        for line in filter(None, [*gaps, *labels, *duplicates.lines()]):
            print(f"warning: {line}", file=sys.stderr)
        return {
            **reading_entry(catalog),
            "coverage": {"train": covered.report()},
            "duplicates": duplicates.report(),
        }

    with distributed.without_timeout():
        return distributed.on_all_ranks(lambda: check(catalog) if catalog and distributed.rank() == 0 else {})


def describe_data(catalog: Catalog, few_labels: dict[str, Any]) -> list[str]:
    """Return lines that say how the data set was read and which videos are used."""
    lines = []
    if few_labels:
        lines.append(
            "few labels: {videos} of {of} train videos (choice {fingerprint})".format(**few_labels["few_labels"])
        )
    lines += describe_reading(catalog)
    if catalog.missing:
        count = len({video.path for missing in catalog.missing.values() for video in missing})
        lines.append(f"{count} listed videos are not on disk: report.json and train.py check --report FILE list them")
    return lines


def return_freed_memory() -> None:
    """Return the memory of freed objects to the system.

    glibc keeps freed blocks of up to 32 MB that do not lie at the end of its heap. After the lists of a million videos,
    that was 400 MB for the whole run. Other C libraries have no such function.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
