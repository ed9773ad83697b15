"""The ways that numbers take: JSON lines, curves, the console, Weights & Biases."""
