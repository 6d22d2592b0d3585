"""The command line of a program that adds a method, a backbone or a layout of its own: docs/extend.md has examples."""

import sys

from dclr import programs
from dclr.commands import evaluate, train


def start() -> int:
    """Run the command line of this process, with any subcommand of train.py or of eval.py. Return the exit status.

    Without a subcommand, it pretrains.
    """
    programs.use_own(sys.argv[0])
    given = programs.without_local_rank(sys.argv[1:])
    evaluates = bool(given) and given[0] in (*evaluate.DESCRIPTIONS, *evaluate.USES)
    return evaluate.start() if evaluates else train.start()
