"""Adapters, weight files and config values as others write and read them."""
