"""Two ranks of one machine open a data set: one reads it, both verify it, and its arrays are in memory once."""

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from helpers import make_list

from dclr.config import make_config
from dclr.data import datasets, verification
from dclr.errors import UserError
from dclr.training import opening
from dclr.training.sharing import share_with_machine


@pytest.fixture
def on_two_ranks(tmp_path, monkeypatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Return a function that calls `work(rank)` in two connected processes and returns both results, or errors."""

    def run(work: Callable[[int], Any]) -> list[Any]:
        processes = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
                dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
                try:
                    result = work(rank)
                except Exception as error:
                    result = error
                (tmp_path / f"result{rank}").write_bytes(pickle.dumps(result))
                os._exit(0)
            processes.append(process)
        assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
        return [pickle.loads((tmp_path / f"result{rank}").read_bytes()) for rank in range(2)]

    return run


def maps_of(name: str) -> str:
    return "".join(re.findall(rf".*{name}.*", Path("/proc/self/maps").read_text()))


def test_arrays_are_mapped_and_a_change_stays_in_its_rank(on_two_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def share(rank: int) -> Any:
        made = {"a": np.arange(5), "b": ["text", np.zeros(0), np.ones(3000, bool)]} if rank == 0 else None
        shared = share_with_machine(made)
        mapped = "/temporary/dclr-" in maps_of("dclr-")
        if rank == 1:
            shared["a"][0] = 9
        return mapped, shared, share_with_machine(shared["a"])[0]

    for rank, (mapped, shared, of_rank_0) in enumerate(on_two_ranks(share)):
        assert mapped
        assert shared["a"].tolist() == [9 * rank, 1, 2, 3, 4]
        assert (shared["b"][0], len(shared["b"][1]), shared["b"][2].all()) == ("text", 0, True)
        assert of_rank_0 == 0
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_temporary_folder_that_is_full_is_one_line_on_all_ranks(on_two_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    errors = on_two_ranks(lambda rank: share_with_machine([rank]))
    assert [type(error) for error in errors] == [UserError, UserError]
    assert all("absent (No such file or directory): free disk space or set $TMPDIR" in str(error) for error in errors)


def test_one_rank_reads_the_lists_and_both_decode(on_two_ranks, tmp_path, monkeypatch):
    train = [(f"{number:02d}.mp4", number % 3) for number in range(24)]
    data = make_list(tmp_path / "data", train=[*train, ("lost.mp4", 1)], test=[("e.mp4", 0)])
    real, log = verification.verify_video, tmp_path / "decoded.txt"

    def decode(path: Path) -> Any:
        with log.open("a") as file:
            file.write(f"{path.name} {os.getppid()}\n")
        return real(path)

    def read(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write("read\n")
        return datasets.open_data(*arguments)

    monkeypatch.setattr(verification, "verify_video", decode)
    monkeypatch.setattr(opening, "open_data", read)
    config = make_config("pretrain", {"data": str(data), "out": str(tmp_path / "run"), "workers": 1})

    def open_data(rank: int) -> Any:
        videos, catalog, few_labels = opening.open_data_once("pretrain", config)
        listed = opening.check_listed("pretrain", catalog, videos, 50)
        return videos, (catalog is None, few_labels, "coverage" in listed)

    first, second = on_two_ranks(open_data)
    lines = log.read_text().splitlines()
    decoded = [line.split() for line in lines if line != "read"]
    assert lines.count("read") == 1
    assert Counter(name for name, _ in decoded) == Counter(name for name, _ in train)
    assert len({process for _, process in decoded}) == 2
    assert (first[1], second[1]) == ((False, {}, True), (True, {}, False))
    for videos, _ in (first, second):
        assert [videos.path(index) for index in range(len(videos))] == [name for name, _ in train]
        assert videos.labels.tolist() == [label for _, label in train]
        assert videos.faults.tolist() == [0] * 24
    assert first[0].fingerprint() == second[0].fingerprint()
