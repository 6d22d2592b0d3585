"""Train a backbone or a classifier: see dclr/commands/train.py, or `python train.py --help`."""

import sys

from dclr.commands.train import start

if __name__ == "__main__":
    sys.exit(start())
