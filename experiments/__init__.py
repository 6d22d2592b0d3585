"""One short file an experiment: question, exact command, seeds, expected time. `python -m experiments.NAME` runs it."""
