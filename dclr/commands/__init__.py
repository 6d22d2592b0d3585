"""The two programs: `train` (train.py, dclr-train) and `evaluate` (eval.py, dclr-eval)."""
