"""One experiment a file: question, command, seeds and duration. `python -m experiments.NAME` runs it."""
