"""Training: the loop, pretraining, finetuning, checkpoints, and what keeps the ranks of a run consistent."""
