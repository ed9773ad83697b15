"""A clip of a speaker, by name, out of a manifest: the reference to speak with."""

from __future__ import annotations

from pathlib import Path

from ..data.chatml import AudioRef
from ..data.faults import grouped
from ..data.manifest import read_manifest
from ..errors import ConfigError, nearest


def reference_of(manifest: str | Path, speaker: str) -> tuple[str, AudioRef]:
    """Transcript and clip of the speaker's speech row whose text is of middle length; the same at every call.

    A voice shows little in one word, and a long clip costs as much as it is long.

    Raises:
        ConfigError: the manifest cannot be read, or none of its rows is a speech row of that speaker.
    """
    rows, faults = read_manifest(manifest)
    speech = [row for row in rows if row.is_speech]
    of_speaker = [(row, target) for row in speech if row.speaker == speaker and (target := row.target())]
    if not of_speaker:
        names = sorted({row.speaker for row in speech if row.speaker is not None})
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        hint = nearest(speaker, names) or (f"; it has {', '.join(names[:10])}{more}" if names else "; it has none")
        raise ConfigError([*grouped(faults), f"--speaker: {manifest} has no usable row of {speaker!r}{hint}"])
    row, (text, clip) = sorted(of_speaker, key=lambda found: len(found[1][0]))[len(of_speaker) // 2]
    return text, row.audio_refs[clip][1]
