"""The names of the two programs in messages, as the user starts them, and the flag that launchers add.

They are `python train.py` and `python eval.py` in a checkout. A user without a checkout has the installed commands
`dclr-train` and `dclr-eval`. The user's own program stands for both (`use_own`).
"""

import re
import sys
from pathlib import Path

_running = "train"
"""Which of the two programs this process runs, "train" or "eval"."""

_own: str | None = None
"""The path of the user's own program, if the user started one."""


def use_own(path: str) -> None:
    """Use the name of the user's own program in all messages from now on."""
    global _own
    _own = path


def run_as(program: str) -> None:
    """Use the name of "train" or "eval" in the messages of code that both programs use, from now on."""
    global _running
    _running = program


def running() -> str:
    """Return which of the two programs this process runs: "train" or "eval"."""
    return _running


def own_program() -> str | None:
    """Return the path of the user's own program, or None if train.py or eval.py was started."""
    return _own


def name_of(program: str) -> str:
    """Return the file or the installed command of "train" or "eval": "train.py", or "dclr-train"."""
    if _own is not None:
        return Path(_own).name
    return f"dclr-{program}" if _is_installed() else f"{program}.py"


def command_of(program: str) -> str:
    """Return what the user types to start "train" or "eval": "python train.py" with its folder, or "dclr-train"."""
    if _own is not None:
        return f"python {_own}"
    if _is_installed():
        return f"dclr-{program}"
    started = Path(sys.argv[0])
    script = started.with_name(f"{program}.py") if started.name in ("train.py", "eval.py") else f"{program}.py"
    return f"python {script}"


def with_names(text: str) -> str:
    """Return `text` with train.py and eval.py replaced by the names of the programs that the user started."""
    if _own is not None:
        return re.sub(r"(?<![\w./-])(train|eval)\.py\b", lambda match: Path(str(_own)).name, text)
    if not _is_installed():
        return text
    return re.sub(r"(?<![\w./-])(?:python |deepspeed )?(train|eval)\.py\b", r"dclr-\1", text)


def without_local_rank(arguments: list[str]) -> list[str]:
    """Return the arguments without --local_rank N or --local-rank N, also in the form --local_rank=N.

    deepspeed and torch.distributed.launch add one of them. The variable LOCAL_RANK holds the same number.
    """
    given, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--local_rank", "--local-rank"):
            next(rest, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            given.append(argument)
    return given


def _is_installed() -> bool:
    return Path(sys.argv[0]).name in ("dclr-train", "dclr-eval")
