"""The way from rows to steps, and to their tensors."""
