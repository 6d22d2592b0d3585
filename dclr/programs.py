"""The names of the two programs in messages, as the user starts them.

They are `python train.py` and `python eval.py` in a checkout, and the installed commands `dclr-train` and `dclr-eval`
elsewhere.
"""

import sys
from pathlib import Path


def name_of(program: str) -> str:
    """Return the file or command name of "train" or "eval": "train.py", or "dclr-train"."""
    return f"dclr-{program}" if Path(sys.argv[0]).name.startswith("dclr-") else f"{program}.py"


def command_of(program: str) -> str:
    """Return what the user types to start "train" or "eval": "python train.py", or "dclr-train"."""
    if Path(sys.argv[0]).name.startswith("dclr-"):
        return f"dclr-{program}"
    script = Path(sys.argv[0])
    known = script.name in ("train.py", "eval.py")
    return f"python {script.with_name(f'{program}.py') if known else f'{program}.py'}"
