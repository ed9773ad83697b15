"""Folders and files as others write and read them: base checkpoints, adapters, layouts of the serving stacks."""
