"""Training: one loop, and what pretraining and finetuning put into it."""
