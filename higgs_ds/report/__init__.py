"""Where numbers go: JSON lines, curves, the console, Weights & Biases."""
