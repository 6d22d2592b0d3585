"""One experiment in each file, with its question and commands at the top. `python -m experiments.NAME` runs it."""
