"""Two ranks of one machine open a data set: one reads it, both verify it, and its arrays are in memory once."""

import ctypes
import os
import pickle
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from helpers import make_list, on_two_ranks

from dclr.config import make_config
from dclr.data import datasets, verification
from dclr.errors import UserError
from dclr.training import opening
from dclr.training.sharing import share_with_machine


def _call(rank: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
    dist.init_process_group("gloo")
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = error
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def results_of(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work(rank, ...)` in two connected processes and return both results, or errors."""
    assert on_two_ranks(_call, folder, work, *arguments) == [0, 0]
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(2)]


def maps_of(name: str) -> str:
    return "".join(re.findall(rf".*{name}.*", Path("/proc/self/maps").read_text()))


def share_and_change(rank: int, temporary: Path) -> Any:
    tempfile.tempdir = str(temporary)
    made = {"a": np.arange(5), "b": ["text", np.zeros(0), np.ones(3000, bool)]} if rank == 0 else None
    shared = share_with_machine(made)
    mapped = "/temporary/dclr-" in maps_of("dclr-")
    if rank == 1:
        shared["a"][0] = 9
    return mapped, shared, share_with_machine(shared["a"])[0]


def test_arrays_are_mapped_and_a_change_stays_in_its_rank(tmp_path):
    (tmp_path / "temporary").mkdir()
    for rank, (mapped, shared, of_rank_0) in enumerate(results_of(tmp_path, share_and_change, tmp_path / "temporary")):
        assert mapped
        assert shared["a"].tolist() == [9 * rank, 1, 2, 3, 4]
        assert (shared["b"][0], len(shared["b"][1]), shared["b"][2].all()) == ("text", 0, True)
        assert of_rank_0 == 0
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_temporary_folder_that_is_full_is_one_line_on_all_ranks(tmp_path):
    errors = results_of(tmp_path, share_and_change, tmp_path / "absent")
    assert [type(error) for error in errors] == [UserError, UserError]
    assert all("absent (No such file or directory): free disk space or set $TMPDIR" in str(error) for error in errors)


def processes_of(log: Path) -> set[str]:
    """Return the processes of the lines that decoded videos have written."""
    return {line.split()[1] for line in log.read_text().splitlines() if " " in line}


def open_logged(rank: int, log: Path, config: Any) -> Any:
    """Open the data set. The log gets a line for each opened list and each decoded video.

    A video is decoded only after both ranks have begun with one. Else a fast rank could decode all before the other.
    """
    verify_video = verification.verify_video

    def decode(path: Path) -> Any:
        with log.open("a") as file:
            file.write(f"{path.name} {os.getppid()}\n")
        end = time.monotonic() + 30
        while len(processes_of(log)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return verify_video(path)

    def read(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write("read\n")
        return datasets.open_data(*arguments)

    verification.verify_video, opening.open_data = decode, read
    videos, catalog, few_labels = opening.open_data_once("pretrain", config)
    listed = opening.check_listed("pretrain", catalog, videos)
    return videos, (catalog is None, few_labels, "coverage" in listed)


def test_one_rank_reads_the_lists_and_both_decode(tmp_path):
    train = [(f"{number:02d}.mp4", number % 3) for number in range(24)]
    data = make_list(tmp_path / "data", train=[*train, ("lost.mp4", 1)], test=[("e.mp4", 0)])
    log = tmp_path / "decoded.txt"
    config = make_config("pretrain", {"data": str(data), "out": str(tmp_path / "run"), "workers": 1, "max_missing": 50})
    first, second = results_of(tmp_path, open_logged, log, config)
    lines = log.read_text().splitlines()
    decoded = [line.split() for line in lines if line != "read"]
    assert lines.count("read") == 1
    assert Counter(name for name, _ in decoded) == Counter(name for name, _ in train)
    assert len(processes_of(log)) == 2
    assert (first[1], second[1]) == ((False, {}, True), (True, {}, False))
    for videos, _ in (first, second):
        assert [videos.path(index) for index in range(len(videos))] == [name for name, _ in train]
        assert videos.labels.tolist() == [label for _, label in train]
        assert videos.faults.tolist() == [0] * 24
    assert first[0].fingerprint() == second[0].fingerprint()

    again, _ = results_of(tmp_path, open_logged, log, config)
    assert log.read_text().splitlines()[len(lines) :] == ["read"]
    assert again[0].fingerprint() == first[0].fingerprint()


def open_with_one_store(rank: int, config: Any) -> Any:
    opening.is_store = lambda path: rank == 1
    return opening.open_data_once("pretrain", config)


def test_a_store_on_one_machine_and_video_files_on_another_are_refused(tmp_path):
    """Only the ranks without a store would verify videos together, so the ranks would wait for each other."""
    data = make_list(tmp_path / "data", train=[("a.mp4", 0), ("b.mp4", 1)], test=[])
    errors = results_of(tmp_path, open_with_one_store, make_config("pretrain", {"data": str(data), "workers": 1}))
    assert [type(error) for error in errors] == [UserError, UserError]
    assert all(str(error).startswith("--data: a packed store on rank 1 on ") for error in errors)
    assert all(", but not a packed store on rank 0 on " in str(error) for error in errors)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc has malloc_trim")
def test_freed_memory_below_memory_in_use_goes_back_to_the_system():
    arrays = [np.ones(100_000, np.uint8) for _ in range(1000)]
    before = resident_bytes()
    del arrays[:-1]  # the last array lies above the freed ones
    opening.return_freed_memory()
    assert before - resident_bytes() > 80e6
