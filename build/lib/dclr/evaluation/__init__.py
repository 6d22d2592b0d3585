"""Evaluation of a checkpoint: what the subcommands of eval.py compute. Nothing here imports dclr.training."""
