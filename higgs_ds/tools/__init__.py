"""The verbs beside training, `python -m higgs_ds VERB`. They import the trainer; the trainer imports none of them."""
