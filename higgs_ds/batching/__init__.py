"""Which rows make up which step, and how they become tensors."""
