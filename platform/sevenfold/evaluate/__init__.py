"""Evaluation of finished runs: metrics, baselines, significance tests and lm-eval tasks."""
