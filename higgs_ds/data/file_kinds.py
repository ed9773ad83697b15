"""What a file is that was given as a manifest and is no text, by its first bytes, and what to do about it."""

from __future__ import annotations

_TABLE = "export it as JSONL, a row a line (pandas: `to_json(path, orient='records', lines=True)`)"
_PACKED = "unpack it and name what is in it"
_SOUND = "name the manifest that lists the clips, or a folder of clips to `python -m higgs_ds import`"
_TEXT = "save it as UTF-8"
_SIGNS = (  # (where, bytes, what it is, what to do)
    (0, b"PAR1", "a Parquet file", _TABLE),
    (0, b"ARROW1", "an Arrow file", _TABLE),
    (0, b"FEA1", "a Feather file", _TABLE),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", _TABLE),
    (0, b"SQLite format 3\0", "an SQLite database", _TABLE),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _TABLE),
    (0, b"\x93NUMPY", "a NumPy array", _TABLE),
    (0, b"\x1f\x8b", "packed by gzip", _PACKED),
    (0, b"BZh", "packed by bzip2", _PACKED),
    (0, b"\xfd7zXZ\0", "packed by xz", _PACKED),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd", _PACKED),
    (0, b"PK\x03\x04", "a ZIP file (or a table of an office program)", _PACKED),
    (257, b"ustar", "a TAR file", _PACKED),
    (8, b"WAVE", "a WAV file", _SOUND),
    (0, b"fLaC", "a FLAC file", _SOUND),
    (0, b"OggS", "an Ogg file", _SOUND),
    (0, b"ID3", "an MP3 file", _SOUND),
    (0, b"\xff\xfb", "an MP3 file", _SOUND),
    (0, b"\xff\xf3", "an MP3 file", _SOUND),
    (4, b"ftyp", "an MP4 file", _SOUND),
    (0, b"\x1aE\xdf\xa3", "a Matroska file", _SOUND),
    (0, b"\xff\xfe", "UTF-16", _TEXT),
    (0, b"\xfe\xff", "UTF-16", _TEXT),
)


def no_text(content: bytes) -> str | None:
    """One sentence about a file that is of another kind; None where its first bytes are of none that is known."""
    if content[:64].lstrip()[:1] in (b"{", b"["):  # JSON, whatever stands further on
        return None
    for place, sign, kind, advice in _SIGNS:
        if content.startswith(sign, place):
            return f"is {kind}, not a manifest; {advice}"
    return None
