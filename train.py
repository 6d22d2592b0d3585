"""Train a backbone or a classifier: see dclr/commands/train.py, or `python train.py --help`."""

import sys

try:
    from dclr.commands.train import start
except KeyboardInterrupt:  # Ctrl-C while packages are imported, which takes seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(start())
