"""Evaluation: what eval.py computes from a checkpoint."""
