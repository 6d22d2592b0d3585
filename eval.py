"""Evaluate and use a checkpoint: see dclr/commands/evaluate.py, or `python eval.py --help`."""

import sys

from dclr.commands.evaluate import start

if __name__ == "__main__":
    sys.exit(start())
