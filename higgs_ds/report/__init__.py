"""Outputs of a run's numbers: JSON lines, curves, the console, Weights & Biases, report.html."""
