"""Checkpoint files: atomic writes, the files that are kept, and damaged files."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from dclr import files
from dclr.errors import UserError
from dclr.training import checkpoint

TENSORS = {"model/weight": torch.arange(6.0).reshape(2, 3), "model/count": torch.tensor([3])}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_checkpoint_is_read_and_the_newest_has_the_highest_step(tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest(folder) is None
    for step in (9_999_999, 10_000_000):  # compared as numbers, not as names
        path = checkpoint.write(folder, step, TENSORS, {"last": {"loss": 0.1}, "loss": None})
        assert checkpoint.newest(folder) == path
    tensors, state = checkpoint.read(path)
    assert state == {"last": {"loss": 0.1}, "loss": None, "step": 10_000_000}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    for step, loss in enumerate([None, 5.0, 2.0, 4.0, 3.0, None, 6.0], start=1):
        checkpoint.write(folder, step, TENSORS, {"loss": loss})
    assert names(folder) == [f"step-000000{step}.safetensors" for step in (3, 6, 7)]


def test_a_strange_loss_in_an_older_checkpoint_is_no_loss(tmp_path):
    folder = tmp_path / "checkpoints"
    nested: list = []
    for _ in range(500):
        nested = [nested]
    for step, loss in enumerate(["low", {"a": 1}, True, nested, 5.0, None, None], start=1):
        checkpoint.write(folder, step, TENSORS, {"loss": loss})
    assert names(folder) == [f"step-000000{step}.safetensors" for step in (5, 6, 7)]


def test_other_files_in_the_folder_are_neither_read_nor_deleted(tmp_path):
    for name in ("step-0000099.safetensors.tmp", "step-12.safetensors", "notes.txt", "unfinished"):
        (tmp_path / name).write_text("x")
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, TENSORS, {})
    assert checkpoint.newest(tmp_path).name == "step-0000003.safetensors"
    # The file "unfinished", which a kill during a write leaves, was overwritten by the next write.
    assert names(tmp_path) == [
        "notes.txt", "step-0000002.safetensors", "step-0000003.safetensors", "step-0000099.safetensors.tmp",
        "step-12.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_earlier_checkpoint_and_no_other_file(tmp_path, monkeypatch, call):
    checkpoint.write(tmp_path, 1, TENSORS, {})
    before = (tmp_path / "step-0000001.safetensors").read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 2, TENSORS, {})
    assert names(tmp_path) == ["step-0000001.safetensors"]
    assert (tmp_path / "step-0000001.safetensors").read_bytes() == before


def test_every_byte_is_on_disk_before_the_file_gets_its_name(tmp_path, monkeypatch):
    """After a power failure, a rename without its bytes on disk would give an incomplete checkpoint its final name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    checkpoint.write(tmp_path, 1, TENSORS, {})
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_missing_folder_is_not_created(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path / "run" / "checkpoints", 1, TENSORS, {})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "damage", ["cut", "flipped header", "empty", "pickle", "other metadata", "state without a step"]
)
def test_a_damaged_checkpoint_is_refused_by_name_with_the_one_before_it(tmp_path, damage):
    checkpoint.write(tmp_path, 1, TENSORS, {})
    path = checkpoint.write(tmp_path, 2, TENSORS, {})
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "flipped header":
        path.write_bytes(b"\xff" + content[1:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        torch.save(TENSORS, path)
    elif damage == "other metadata":
        save_file(TENSORS, path, {"format": "pt"})
    else:
        save_file(TENSORS, path, {"format": "dclr checkpoint 1", "state": "[]"})
    with pytest.raises(UserError) as caught:
        checkpoint.read(path)
    message = str(caught.value)
    assert message.startswith(f"--resume: {path} is not a readable checkpoint (")
    assert message.endswith("): delete it, and --resume continues from step-0000001.safetensors")
    assert "\n" not in message
    (tmp_path / "step-0000001.safetensors").unlink()
    with pytest.raises(UserError, match=r"start another run$"):
        checkpoint.read(path)
