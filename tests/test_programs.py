"""The names of the programs in messages."""

import pytest

from dclr import programs

TEXT = "see train.py check, python eval.py accuracy, deepspeed train.py --ds_config zero1 and /home/me/train.py"


@pytest.mark.parametrize(
    ("started", "name", "command", "text"),
    [
        ("train.py", "eval.py", "python eval.py", TEXT),
        ("/opt/dclr/train.py", "eval.py", "python /opt/dclr/eval.py", TEXT),
        ("/env/bin/pytest", "eval.py", "python eval.py", TEXT),
        (
            "/env/bin/dclr-train",
            "dclr-eval",
            "dclr-eval",
            "see dclr-train check, dclr-eval accuracy, dclr-train --ds_config zero1 and /home/me/train.py",
        ),
    ],
)
def test_programs_are_named_as_the_user_starts_them(monkeypatch, started, name, command, text):
    monkeypatch.setattr("sys.argv", [started, "pretrain"])
    assert programs.name_of("eval") == name
    assert programs.command_of("eval") == command
    assert programs.with_names(TEXT) == text
