"""Judges of synthesised speech: its words, its voice, its sound, its end; one file each."""
