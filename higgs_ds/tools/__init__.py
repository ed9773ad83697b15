"""The verbs other than training, `python -m higgs_ds VERB`. They import the trainer, never the reverse."""
