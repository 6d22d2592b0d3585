"""Evaluate and use a checkpoint: see dclr/commands/evaluate.py, or `python eval.py --help`."""

import sys

try:
    from dclr.commands.evaluate import start
except KeyboardInterrupt:  # Ctrl-C while packages are imported, which takes seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(start())
