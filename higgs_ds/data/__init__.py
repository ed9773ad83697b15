"""Data to train on, looked at before the first step: manifests, rows, clips and their codes. No torch."""
