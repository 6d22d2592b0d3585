"""A decoder process: its answers, its death, and its end."""

import os
import signal
import time
from collections import deque
from pathlib import Path

import pytest
from helpers import block, children, crash, loop

from dclr.config import DataConfig
from dclr.data import decoder_process, pack
from dclr.data.decoder_process import TICK, DecoderDied, DecoderProcess, Progress, RemoteTraceback, answers
from dclr.errors import UserError


def result(child: DecoderProcess, request: object) -> object:
    """Request and wait for the answer as the users of DecoderProcess do."""
    child.request(request)
    while not child.connection.poll(TICK):
        child.end_if_stalled()
    return child.answer()


@pytest.fixture
def child():
    """A decoder process that calls the function in each request."""
    own = DecoderProcess(lambda call: call(), limit=1)
    yield own
    own.stop()
    assert children() == []


class Call:
    """A function with its arguments that can be pickled."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> object:
        return self.function(*self.arguments)


def raises(error: BaseException) -> None:
    raise error


def begin_and(function) -> None:
    decoder_process.report_video(7)
    function()


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} of {second}")


def raise_unpicklable() -> None:
    raise Unpicklable(1, 2)


def lambda_of() -> object:
    return lambda: 0


def test_one_process_answers_one_request_after_the_other(child):
    assert children() == []  # no process before the first request
    process = result(child, Call(os.getpid))
    assert [process] == children()
    assert result(child, Call(os.getpid)) == process
    large = bytes(10_000_000)
    assert result(child, Call(bytes, large)) == large  # more than a pipe holds, both ways


@pytest.mark.parametrize("error", [UserError("one line"), KeyError("k"), KeyboardInterrupt()])
def test_what_is_raised_there_is_raised_here_with_its_traceback(child, error):
    process = result(child, Call(os.getpid))
    with pytest.raises(type(error)) as caught:
        result(child, Call(raises, error))
    assert caught.value.args == error.args
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in raises" in str(caught.value.__cause__)
    assert result(child, Call(os.getpid)) == process  # it continues


def test_an_exception_that_cannot_be_pickled_comes_as_its_words(child):
    with pytest.raises(RuntimeError, match=r"^Unpicklable: 1 of 2$"):
        result(child, Call(raise_unpicklable))
    with pytest.raises(AttributeError, match="lambda"):
        result(child, Call(lambda_of))
    assert children() != []  # it continues


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (crash, "the decoder crashes on it (SIGSEGV)"),
        (Call(os._exit, 3), "the decoder crashes on it (exit status 3)"),
        (Call(os._exit, 0), "the decoder crashes on it (exit status 1)"),
        (loop, "the decoder gives no frame for 1 s"),
        (block, "the decoder gives no frame for 1 s"),
    ],
)
def test_a_child_that_dies_or_stalls_says_on_what_and_another_takes_its_place(child, fault, reason):
    process = result(child, Call(os.getpid))
    began = time.monotonic()
    with pytest.raises(DecoderDied) as caught:
        result(child, Call(begin_and, fault))
    assert time.monotonic() - began < 1 + 3 * TICK
    assert str(caught.value) == reason
    assert not caught.value.out_of_memory
    assert child.video == 7
    assert children() == []
    assert result(child, Call(os.getpid)) != process


def test_a_child_that_dies_while_it_waits_is_noticed_at_the_next_request(child):
    process = result(child, Call(os.getpid))
    os.kill(process, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(DecoderDied) as caught:
        result(child, Call(os.getpid))
    assert caught.value.out_of_memory
    assert child.video is None


def test_signals_to_the_group_do_not_end_it(child):
    process = result(child, Call(os.getpid))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(process, number)
    assert result(child, Call(os.getpid)) == process


def beats(count: int, seconds: float) -> str:
    for _ in range(count):
        time.sleep(seconds)
        decoder_process.report_progress()
    return "done"


def test_no_time_is_too_long_while_there_are_beats(child):
    assert result(child, Call(beats, 6, 0.4)) == "done"
    with pytest.raises(DecoderDied, match="no frame for 1 s"):
        result(child, Call(beats, 1, 5.0))


def test_waiting_between_requests_is_no_stall(child):
    result(child, Call(os.getpid))
    time.sleep(1.5)
    assert result(child, Call(beats, 1, 0.3)) == "done"


def test_a_busy_process_that_reads_no_video_is_killed_too_unless_only_reading_is_limited():
    calls = [Call(time.sleep, 3.0)]
    found = [answer for _, answer in answers(lambda call: call(), deque(calls), workers=1, limit=0.5)]
    assert [type(answer) for answer in found] == [DecoderDied]
    waited = answers(lambda call: call(), deque(calls), workers=1, limit=0.5, only_while_reading=True)
    assert [answer for _, answer in waited] == [None]
    assert children() == []


def test_time_in_which_nobody_looked_does_not_count(monkeypatch):
    """A run that was stopped by Ctrl-Z continues. Its decoder process was stopped too."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress()
    for _ in range(10):
        now += TICK
        progress.idle()
    assert progress.idle() == pytest.approx(10 * TICK)
    now += 3600
    assert progress.idle() == pytest.approx(12 * TICK)


def test_a_stopped_child_is_ended_at_once_whatever_it_does():
    for fault in (block, loop):
        child = DecoderProcess(lambda call: call(), limit=60)
        child.request(fault)
        time.sleep(0.1)
        began = time.monotonic()
        child.stop()
        assert time.monotonic() - began < 1
        assert children() == []
    DecoderProcess(lambda call: call(), limit=60).stop()  # no request


def test_a_child_ends_with_its_parent_however_that_ends(tmp_path):
    parent = os.fork()
    if parent == 0:
        child = DecoderProcess(lambda call: call(), limit=60)
        child.request(block)
        (tmp_path / "part").write_text(str(children()[0]))
        (tmp_path / "part").rename(tmp_path / "child")
        time.sleep(100)
        os._exit(0)
    end = time.monotonic() + 10
    while not (tmp_path / "child").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert process.exists()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 2
    while process.exists() and process.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pack_whose_decoder_does_not_return_ends_with_one_line(demo_videos, tmp_path, monkeypatch):
    def stuck(*_):
        block()
        yield

    monkeypatch.setattr(pack, "resized_planes", stuck)
    with pytest.raises(
        UserError, match=r"^\S+\.mp4: the decoder gives no frame for 1 s, though it did before; .*--video-timeout$"
    ):
        pack.pack(DataConfig(data=str(demo_videos), video_timeout=1), str(tmp_path / "store"))
    assert children() == []
