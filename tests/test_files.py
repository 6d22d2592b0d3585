"""The lock of a folder: one writer at a time, and a killed writer is no obstacle."""

import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dclr import files
from dclr.errors import UserError
from dclr.files import LOCK, folder_lock


def hold(folder: Path, locked) -> None:
    """Hold the lock until the process is killed. A child process survives it and has all of its open files."""
    with folder_lock(folder):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        locked.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of tmp_path."""
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=lead_and_hold, args=(tmp_path, locked))
    process.start()
    assert locked.wait(20)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def lead_and_hold(folder: Path, locked) -> None:
    os.setsid()
    hold(folder, locked)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught, folder_lock(folder):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message


def leave(folder: Path, **changes) -> None:
    """Leave the lock file of a process that was killed, with some entries changed."""
    (folder / LOCK).unlink(missing_ok=True)
    with folder_lock(folder):
        owner = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**owner, **changes}))


def test_a_second_process_is_refused_with_the_name_of_the_first_and_a_killed_one_is_no_obstacle(tmp_path, holder):
    for _ in range(2):  # the refusal leaves the lock as it was
        message = refusal(tmp_path)
        assert message.startswith(f"{tmp_path} is being written by process {holder.pid} on ")
        assert message.endswith(": wait until that process has ended, stop it, or give another --out")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / LOCK).exists()
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_released_shortly_after_its_owner_ended_is_waited_for(tmp_path):
    leave(tmp_path, process=2**22 + 1)  # no process has this number
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with folder_lock(tmp_path):
            assert not timer.is_alive()
        timer.join()


def test_a_process_cannot_lock_a_folder_twice_and_keeps_its_lock(tmp_path):
    with folder_lock(tmp_path):
        assert f"is being written by process {os.getpid()} on" in refusal(tmp_path)
        context = multiprocessing.get_context("fork")
        other = context.Process(target=lambda: os._exit("is being written by process" in refusal(tmp_path)))
        other.start()
        other.join()
        assert other.exitcode == 1
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", '{"process": "x", "machine": 3}'])
def test_a_damaged_lock_file_without_a_lock_is_no_obstacle(tmp_path, content, monkeypatch):
    monkeypatch.setattr(files, "SILENCE_S", 0.0)
    (tmp_path / LOCK).write_text(content)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_without_locks_of_the_file_system_the_process_and_its_start_decide(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", fails)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    leave(tmp_path)
    assert f"is being written by process {os.getpid()} on" in refusal(tmp_path)
    leave(tmp_path, started="1")  # the number of the process is used again
    with folder_lock(tmp_path):
        pass
    leave(tmp_path, process=2**22 + 1)  # no such process
    with folder_lock(tmp_path):
        pass


def test_an_owner_on_another_machine_is_alive_if_the_time_of_its_file_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "SILENCE_S", 0.4)
    leave(tmp_path, host="other", machine="other", process=7)
    with folder_lock(tmp_path):
        pass
    assert "was written by process 7 on other: waiting" in capsys.readouterr().err

    leave(tmp_path, host="other", machine="other", process=7)
    alive = threading.Event()

    def touch() -> None:
        while not alive.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        assert f"{tmp_path} is being written by process 7 on other, since " in refusal(tmp_path)
    finally:
        alive.set()
        thread.join()


def test_the_owner_changes_the_time_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REFRESH_S", 0.02)
    with folder_lock(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_folder_that_vanished_is_no_error_at_the_end(tmp_path):
    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "away")
    with folder_lock(tmp_path / "away"):  # the lock file moved along, and nobody holds it
        pass
