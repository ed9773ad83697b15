"""Manifests out of the corpora of other tools."""
