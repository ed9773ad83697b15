"""Higgs Audio v2: everything that knows boson_multimodal."""
