"""Headers that do not hold what they promise: WAVs that count wrong are mended, files that end early are refused.

Only RIFF/WAV is read by hand, and the last page of an Ogg, which has no length; of all others libsndfile's log says it.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Where a writer could not go back to fill in the size: 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF and values near them.
STREAMED_BYTES = 0x7FFF0000
# Sizes off by a header's length are common and lose nothing that is heard.
CUT_OFF_SEC = 0.05
MOST_MENDED_BYTES = 1 << 30
MOST_CHUNKS = 1000
MOST_PAGE_BYTES = 27 + 255 + 255 * 255  # of Ogg
# What may stand behind a WAV's sound, be it cut off: chunks by name, and tags that were put at a file's end.
CHUNKS = frozenset(
    name.encode().ljust(4)
    for name in "LIST INFO id3 ID3 bext iXML _PMX axml chna cue plst labl adtl smpl inst fact JUNK junk FLLR PAD "
    "PEAK cart umid acid strc afsp DISP LGWV SyLp minf elm1 regn bmrk".split()
)
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
_SHOULD_BE = re.compile(r": (\d+) \(should be (\d+)\)")


class AudioError(ValueError):
    """Fault of a clip, as a short text to stand after its name: `is empty`, `cannot be decoded: ...`."""


def share_there(log: str) -> float:
    """Of the bytes that a header promises, how many are there, by what libsndfile says of the file."""
    sizes = [(int(promised), int(there)) for promised, there in _SHOULD_BE.findall(log)]
    return min([there / promised for promised, there in sizes if there < promised < STREAMED_BYTES], default=1.0)


def mended(source: Path | io.BytesIO) -> Path | io.BytesIO:
    """The source, or a copy of it that counts right.

    ffmpeg reads a WAV's data chunk of size 0 to the file's end, and so do we; likewise one behind which nothing begins.
    Raises AudioError for a WAV or an Ogg that is cut off, OSError.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head[:4] == b"OggS":
            _check_last_page(file, size)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _of_wav(file, size) or source
    return source


def _of_wav(file: BinaryIO, size: int) -> io.BytesIO | None:
    place = promised = bytes_per_sec = 0
    for name, place, promised in _chunks(file, size):  # noqa: B007
        if name == b"data":
            break
        if name == b"fmt ":
            bytes_per_sec = struct.unpack("<I", file.read(16)[8:12].ljust(4, b"\0"))[0]
    else:
        return None
    there = size - place
    if promised > there:  # libsndfile reads what is there
        missing, whole = ((count / max(1, bytes_per_sec)) for count in (promised - there, promised))
        if promised < STREAMED_BYTES and missing > CUT_OFF_SEC:
            raise AudioError(f"cannot be decoded: it ends after {whole - missing:.2f} s of {whole:.2f} s")
        return None
    ends = {place + promised, place + promised + promised % 2}  # not every writer fills up to an even place
    if promised == there or any(_ends(file, end, size, empty=promised == 0) for end in ends):
        return None
    if size > MOST_MENDED_BYTES:
        raise AudioError(f"counts {promised} bytes of sound in its header and holds {there}; write it anew")
    file.seek(0)
    content = bytearray(file.read())
    struct.pack_into("<I", content, place - 4, there)
    struct.pack_into("<I", content, 4, size - 8)
    return io.BytesIO(content)


def _ends(file: BinaryIO, place: int, size: int, *, empty: bool) -> bool:
    """True if the sound ends here: something else begins, be it cut off, or nothing but padding is left."""
    if size - place < 8:
        return True
    file.seek(place)
    head = file.read(16)
    name, fits = head[:4], struct.unpack("<I", head[4:8])[0] <= size - place - 8
    if empty:  # a size that was never filled in is far likelier than a file without sound
        return name in CHUNKS and fits
    if name in CHUNKS or head.startswith(TAGS) or (fits and all(32 <= byte < 127 for byte in name)):
        return True
    while head and not head.strip(b"\0"):
        head = file.read(1 << 16)
    return not head


def _chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, its bytes) of each chunk; the file stands at its content."""
    place = 12
    for _ in range(MOST_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or place > size:
            return
        length = struct.unpack("<I", head[4:])[0]
        yield head[:4], place + 8, length
        place += 8 + length + length % 2


def _check_last_page(file: BinaryIO, size: int) -> None:
    """Raises AudioError where the last page of an Ogg is not whole."""
    file.seek(max(0, size - MOST_PAGE_BYTES))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS\0")) :]
    if page.startswith(b"OggS\0") and (len(page) < 27 or 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)):
        raise AudioError("cannot be decoded: it is cut off within a page")
