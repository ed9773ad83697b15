"""Outputs of a run's metrics: JSONL files, curves, console, Weights & Biases, report.html, model cards."""
