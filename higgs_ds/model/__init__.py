"""Boson's model: its checkpoint, the adapter on it, the training forward. Nothing outside names its classes."""
