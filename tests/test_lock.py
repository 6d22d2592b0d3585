"""Lock files: one writer at a time, a killed writer is no obstacle, and an owner that lost its lock stops."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from dclr import lock as locks
from dclr import report
from dclr.errors import UserError
from dclr.lock import LOCK, Lock, LockLost, check_lock, folder_lock


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


@pytest.fixture
def no_locks(monkeypatch, request) -> None:
    """Use a file system without locks."""

    def fails(*_):
        raise OSError(getattr(request, "param", errno.ENOSYS), "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", fails)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)


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
    monkeypatch.setattr(locks, "SILENCE_S", 0.0)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    (tmp_path / LOCK).write_text(content)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("no_locks", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF], indirect=True)
def test_without_locks_of_the_file_system_the_process_and_its_start_decide(tmp_path, monkeypatch, no_locks):
    with folder_lock(tmp_path):
        monkeypatch.setattr(locks, "POLL_S", 0.01)
        os.utime(tmp_path / LOCK, (0, 0))
        touching = threading.Timer(0.05, os.utime, (tmp_path / LOCK,))
        touching.start()
        assert f"is being written by process {os.getpid()} on" in refusal(tmp_path)
        touching.join()
    leave(tmp_path, started="1")  # the number of the process is used again
    with folder_lock(tmp_path):
        pass
    leave(tmp_path, process=2**22 + 1)  # no such process
    with folder_lock(tmp_path):
        pass


def test_without_locks_of_the_file_system_one_of_several_processes_gets_a_new_lock(tmp_path, no_locks):
    context = multiprocessing.get_context("fork")
    begin, end, results = context.Barrier(4), context.Event(), context.Queue()

    def contend() -> None:
        lock = Lock(tmp_path / LOCK)
        begin.wait()
        results.put(lock.take())
        end.wait()

    processes = [context.Process(target=contend) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=20) for _ in processes) == [False, False, False, True]
    end.set()
    for process in processes:
        process.join()


def test_the_processes_of_another_container_are_not_taken_for_ended(tmp_path, monkeypatch, capsys, no_locks):
    """Its numbers of processes mean nothing here."""
    monkeypatch.setattr(locks, "SILENCE_S", 0.2)
    leave(tmp_path, process=2**22 + 1, namespace="pid:[1]")
    with folder_lock(tmp_path):
        pass
    assert "to see whether it still runs" in capsys.readouterr().err


def test_the_copy_of_a_folder_that_is_being_written_can_be_used(tmp_path, monkeypatch, holder):
    shutil.copytree(tmp_path, copy := tmp_path / "copy")
    with folder_lock(copy):
        pass
    monkeypatch.setattr(locks, "SILENCE_S", 0.2)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    monkeypatch.setattr(locks, "_lock_of_system", lambda descriptor: None)
    shutil.copy(tmp_path / LOCK, copy)
    with folder_lock(copy):
        pass


@pytest.mark.parametrize(("restart", "waits"), [(1, False), (0, True)])
def test_a_job_that_torchrun_restarts_on_another_machine_gets_its_lock_at_once(
    tmp_path, monkeypatch, capsys, restart, waits
):
    monkeypatch.setattr(locks, "SILENCE_S", 0.2)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ucf")
    leave(tmp_path, host="other", machine="other", process=7)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    with folder_lock(tmp_path):
        pass
    assert ("waiting" in capsys.readouterr().err) == waits


def test_an_owner_whose_lock_was_taken_over_stops_and_leaves_the_lock_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "REFRESH_S", 0.01)
    other = json.dumps({"process": 9, "host": "node7", "since": "2026"})
    with folder_lock(tmp_path) as lock:
        check_lock(tmp_path)
        (tmp_path / LOCK).write_text(other)
        with pytest.raises(LockLost) as caught:
            check_lock(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path} has been taken over by process 9 on node7, since 2026: this command stops and writes nothing "
            "more there"
        )
        lock._thread.join(20)  # it does not keep the other's lock alive
        assert not lock._thread.is_alive()
    assert (tmp_path / LOCK).read_text() == other
    check_lock(tmp_path)  # this process has no lock there

    (tmp_path / LOCK).unlink()
    with folder_lock(tmp_path):
        (tmp_path / LOCK).unlink()
        with pytest.raises(LockLost, match=f"^{tmp_path / LOCK} has been deleted, so another process may write to"):
            check_lock(tmp_path)


def test_a_suspended_owner_on_another_machine_loses_its_lock(tmp_path, monkeypatch):
    """Both processes are here, and the second one thinks that it is elsewhere."""
    monkeypatch.setattr(locks, "_lock_of_system", lambda descriptor: None)
    monkeypatch.setattr(locks, "REFRESH_S", 1000.0)
    monkeypatch.setattr(locks, "SILENCE_S", 0.1)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    with folder_lock(tmp_path) as first:
        monkeypatch.setattr(locks, "machine_id", lambda: "elsewhere")
        with folder_lock(tmp_path) as second:
            assert first.is_lost()
            assert not second.is_lost()
        with pytest.raises(LockLost):
            first.check()


def test_a_full_disk_is_one_line_and_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with pytest.raises(UserError) as caught, report.open_run(str(tmp_path / "run"), "pretrain"):
        pass
    assert str(caught.value) == (
        f"--out {tmp_path / 'run'}: cannot write there (No space left on device); choose a folder that you may write to"
    )
    assert os.listdir(tmp_path) == []


def test_an_owner_on_another_machine_is_alive_if_the_time_of_its_file_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SILENCE_S", 0.4)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    leave(tmp_path, host="other", machine="other", process=7)
    with folder_lock(tmp_path):
        pass
    assert "was written by process 7 on other, since 20" in capsys.readouterr().err

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
    monkeypatch.setattr(locks, "REFRESH_S", 0.02)
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
