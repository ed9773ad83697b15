"""Model families: their checkpoints, the adapter on them, the training forward. Nothing outside names their classes."""
