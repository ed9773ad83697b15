"""Judges of synthesised speech, one file each: words, voice, sound, endings."""
