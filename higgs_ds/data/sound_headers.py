"""How much sound a file's header promises: WAVs that count wrong are mended, files that end before that are found."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Where a writer could not go back to fill in the size: 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF and values near them.
STREAMED_BYTES = 0x7FFF0000
OPEN = 0xFFFFFFFF  # a size of 32 bits that says nothing, or that another of 64 bits says it
# Sizes off by a header's length are common and lose nothing that is heard.
CUT_OFF_SEC = 0.05
MOST_MENDED_BYTES = 1 << 30
MOST_CHUNKS = 1000
MOST_PAGE_BYTES = 27 + 255 + 255 * 255  # of Ogg
# What may stand behind the sound, be it cut off: chunks of a WAV by name, and tags that were put at a file's end.
CHUNKS = frozenset(
    name.encode().ljust(4)
    for name in "LIST INFO id3 ID3 bext iXML _PMX axml chna cue plst labl adtl smpl inst fact JUNK junk FLLR PAD "
    "PEAK cart umid acid strc afsp DISP LGWV SyLp minf elm1 regn bmrk".split()
)
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
_W64_RIFF, _W64_WAVE, _W64_DATA = (
    name + bytes.fromhex(rest)
    for name, rest in (
        (b"riff", "2e91cf11a5d628db04c10000"),
        (b"wave", "f3acd3118cd100c04f8edb8a"),
        (b"data", "f3acd3118cd100c04f8edb8a"),
    )
)


@dataclass(frozen=True)
class Promise:
    """What a header says of the sound behind it."""

    mended: BinaryIO | None = None  # a copy of the file that counts right
    problem: str | None = None
    share: float = 1.0  # of the bytes that it promises, how many are there; where `problem` does not say it


def promise_of(source: Path | BinaryIO) -> Promise:
    """Of a WAV, RF64, W64, AIFF, AU, CAF or Ogg; an empty one of any other file. Raises OSError.

    ffmpeg reads a WAV's data chunk of size 0 to the file's end, and so do we; likewise one behind which nothing begins.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _of_wav(file, size)
        if head[:4] == b"OggS":
            return _of_ogg(file, size)
        found = _data_of_others(file, head, size)
    return Promise() if found is None else _share(*found, size)


def _share(start: int, promised: int, size: int) -> Promise:
    return Promise(share=min(1.0, max(0.0, (size - start) / promised))) if promised > 0 else Promise()


def _of_wav(file: BinaryIO, size: int) -> Promise:
    place = bytes_per_sec = 0
    for name, place, promised in _chunks(file, 12, size, "<I"):  # noqa: B007
        if name == b"data":
            break
        if name == b"fmt ":
            bytes_per_sec = struct.unpack("<I", file.read(16)[8:12].ljust(4, b"\0"))[0]
    else:
        return Promise()
    there = size - place
    if promised > there:
        if promised >= STREAMED_BYTES:
            return Promise()
        if not bytes_per_sec:
            return _share(place, promised, size)
        missing = (promised - there) / bytes_per_sec
        if missing <= CUT_OFF_SEC:
            return Promise()  # libsndfile reads what is there
        whole = promised / bytes_per_sec
        return Promise(problem=f"cannot be decoded: it ends after {whole - missing:.2f} s of {whole:.2f} s")
    ends = {place + promised, place + promised + promised % 2}  # not every writer fills up to an even place
    if promised == there or any(_ends(file, end, size, empty=promised == 0) for end in ends):
        return Promise()
    if size > MOST_MENDED_BYTES:
        return Promise(problem=f"counts {promised} bytes of sound in its header and holds {there}; write it anew")
    file.seek(0)
    content = bytearray(file.read())
    struct.pack_into("<I", content, place - 4, there)
    struct.pack_into("<I", content, 4, size - 8)
    return Promise(mended=io.BytesIO(content))


def _ends(file: BinaryIO, place: int, size: int, *, empty: bool) -> bool:
    """Whether the sound ends here: something else begins, be it cut off, or nothing but padding is left."""
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


def _chunks(file: BinaryIO, place: int, size: int, number: str, even: bool = True) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, its bytes) of each chunk; the file stands at its content."""
    head_bytes = 4 + struct.calcsize(number)
    for _ in range(MOST_CHUNKS):
        file.seek(place)
        head = file.read(head_bytes)
        if len(head) < head_bytes:
            return
        length = struct.unpack(number, head[4:])[0]
        yield head[:4], place + head_bytes, length
        place += head_bytes + length + (length % 2 if even else 0)
        if length < 0 or place > size:
            return


def _of_ogg(file: BinaryIO, size: int) -> Promise:
    """Ogg has no size in a header, but pages: one that is not whole was cut off."""
    file.seek(max(0, size - MOST_PAGE_BYTES))
    tail = file.read()
    place = tail.rfind(b"OggS\0")
    page = tail[place:]
    segments = page[27 : 27 + page[26]] if place >= 0 and len(page) > 26 else b""
    if place >= 0 and (len(page) <= 26 or 27 + page[26] + sum(segments) > len(page)):
        return Promise(problem="cannot be decoded: it is cut off within a page")
    return Promise()


def _data_of_others(file: BinaryIO, head: bytes, size: int) -> tuple[int, int] | None:
    """(where the sound begins, bytes that are promised) of RF64, W64, AIFF, AU and CAF; None where nothing is."""
    if head[:4] == b"RF64" and head[8:] == b"WAVE":
        return _data_of_rf64(file, size)
    if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        found = (chunk for chunk in _chunks(file, 12, size, ">I") if chunk[0] == b"SSND")
        return next(((place, length) for _, place, length in found if length < STREAMED_BYTES), None)
    if head[:4] == b"caff":
        found = (chunk for chunk in _chunks(file, 8, size, ">q", even=False) if chunk[0] == b"data")
        return next(((place, length) for _, place, length in found), None)  # -1 where it is left open
    if head[:4] in (b".snd", b"dns."):
        start, length = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:])
        return (start, length) if length < STREAMED_BYTES else None
    file.seek(0)
    if file.read(16) == _W64_RIFF:
        return _data_of_w64(file)
    return None


def _data_of_rf64(file: BinaryIO, size: int) -> tuple[int, int] | None:
    long_size = 0
    for name, place, length in _chunks(file, 12, size, "<I"):
        if name == b"ds64":
            long_size = struct.unpack("<Q", file.read(16)[8:].ljust(8, b"\0"))[0]
        elif name == b"data":
            return place, long_size if length == OPEN else length
    return None


def _data_of_w64(file: BinaryIO) -> tuple[int, int] | None:
    """Its chunks have names of 16 bytes, sizes of 8 that count the head of 24 too, and begin at multiples of 8."""
    file.seek(24)
    if file.read(16) != _W64_WAVE:
        return None
    place = 40
    for _ in range(MOST_CHUNKS):
        file.seek(place)
        head = file.read(24)
        if len(head) < 24:
            return None
        length = struct.unpack("<Q", head[16:])[0]
        if head[:16] == _W64_DATA:
            return place + 24, length - 24
        place += max(24, length + -length % 8)
    return None
