"""Progress: a bar on a terminal, lines elsewhere, and no error of the output reaches the caller."""

import errno
import io
import os
import pty
import select
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from helpers import REPOSITORY

from dclr import progress
from dclr.errors import UserError
from dclr.progress import ProgressBar, check_output, describe, write_line


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_one_at_the_end(clock):
    log = io.StringIO()
    with ProgressBar(1400, "verifying videos", "video", file=log) as bar:
        for _ in range(40):
            clock[0] += 1
            bar.advance(31)
        bar.show({"loss": "4.2"})
        clock[0] += 9.9
        bar.advance(0)
        assert log.getvalue().count("\n") == 4
        clock[0] += 0.1
        bar.advance(0)
        bar.advance(160)
    assert log.getvalue().splitlines() == [
        "verifying videos: 310 of 1,400 (22 %), 31/s, 00:35 left",
        "verifying videos: 620 of 1,400 (44 %), 31/s, 00:25 left",
        "verifying videos: 930 of 1,400 (66 %), 31/s, 00:15 left",
        "verifying videos: 1,240 of 1,400 (88 %), 31/s, 00:05 left",
        "verifying videos: 1,240 of 1,400 (88 %), 25/s, 00:06 left, loss 4.2",
        "verifying videos: 1,400 of 1,400 (100 %), 28/s, loss 4.2",
    ]


def test_no_line_is_written_twice_and_a_hidden_bar_writes_none(clock):
    log = io.StringIO()
    with ProgressBar(2, "packing", "frame", file=log) as bar:
        clock[0] += 20
        bar.advance(2)
    assert log.getvalue().count("\n") == 1
    with ProgressBar(2, "packing", "frame", file=log):
        pass
    with ProgressBar(2, "packing", "frame", shown=False, file=log) as bar:
        bar.advance(2)
        assert bar.count == 2
    assert log.getvalue().count("\n") == 1


def test_the_rate_counts_only_what_this_process_did():
    assert describe(120, 200, 100, 10.0) == "120 of 200 (60 %), 2.0/s, 00:40 left"
    assert describe(102, 200, 100, 10.0) == "102 of 200 (51 %), 5.0 s each, 08:10 left"
    assert describe(100, 200, 100, 10.0) == "100 of 200 (50 %)"
    assert describe(0, 0, 0, 0.0) == "0 of 0 (0 %)"


def test_a_terminal_gets_a_bar_and_messages_stand_above_it():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with suppress(OSError), open(theirs, "w") as terminal:  # `close` tries again to write what could not be written
        with ProgressBar(3, "training", "step", start=1, file=terminal) as bar:
            write_line("a message", terminal)
            bar.show({"loss": "4.2"})
            bar.advance(2)
        shown = ""
        while select.select([ours], [], [], 0.2)[0]:  # one read may return only a part
            shown += os.read(ours, 65536).decode()
        assert "training:" in shown
        assert "3/3" in shown
        assert "loss=4.2" in shown
        before, _, after = shown.partition("a message\r\n")
        assert before.endswith("\r")  # the bar was cleared
        assert "training:" in after
        os.close(ours)
        with ProgressBar(3, "training", "step", file=terminal) as bar:  # the terminal is gone
            bar.advance()
            write_line("a message", terminal)
        assert bar.count == 1


def broken_outputs() -> list[io.TextIOBase]:
    """Return a full disk, a pipe that nobody reads, and a closed file."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    return [open("/dev/full", "w"), os.fdopen(writer, "w"), closed]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["full disk", "closed pipe", "closed file"])
def test_an_output_that_fails_ends_nothing(which, monkeypatch, clock):
    output = broken_outputs()[which]
    monkeypatch.setattr(sys, "stdout", output)
    for terminal in (False, True):
        monkeypatch.setattr(progress, "is_terminal", lambda file, terminal=terminal: terminal)
        with ProgressBar(3, "training", "step", file=output) as bar:
            for _ in range(3):
                clock[0] += 20
                write_line("a message", output)
                bar.advance()
    monkeypatch.undo()
    for number in range(2):  # Python would try again to write what the buffer holds
        if number == which:
            with pytest.raises(OSError, match=r"No space|Broken pipe"):
                output.close()


def test_no_output_at_all_is_no_error(monkeypatch):
    """Python sets sys.stdout and sys.stderr to None if they were closed before it started."""
    monkeypatch.setattr(sys, "stderr", None)
    write_line("a message", None)
    with ProgressBar(3, "training", "step") as bar:
        bar.advance(3)


def test_a_print_raises_no_error_and_the_first_error_is_kept(monkeypatch):
    with suppress(OSError), open("/dev/full", "w") as full:  # OSError: when the file is closed
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", sys.stderr)  # restored after the test
        progress.protect_output()
        progress.protect_output()  # a second call changes nothing
        check_output()
        print("line", flush=True)
        print("line", file=sys.stdout, flush=True)
        with pytest.raises(UserError, match=r"^the standard output is incomplete \(No space left on device\): write"):
            check_output()
    print("the file is closed now")
    assert sys.stdout.error.errno == errno.ENOSPC


def test_a_reader_that_stops_early_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    file = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    progress.protect_output()
    print("line")
    check_output()
    assert isinstance(sys.stdout.error, BrokenPipeError)
    with suppress(BrokenPipeError):
        file.close()


def test_characters_that_the_encoding_lacks_are_written_as_numbers():
    content = io.BytesIO()
    safe = progress.SafeFile(io.TextIOWrapper(content, encoding="ascii", write_through=True))
    print("a\u00e9\udce9.mp4", file=safe)
    assert content.getvalue() == b"a\\xe9\\udce9.mp4\n"
    assert safe.error is None


def test_a_file_does_not_take_the_place_of_a_closed_output(tmp_path):
    program = "import os; from dclr import progress; progress.protect_output(); os._exit(os.open('file', os.O_CREAT))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    shell = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, program]
    assert subprocess.run(shell, cwd=tmp_path, env=environment).returncode > 2
