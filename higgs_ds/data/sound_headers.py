"""Wrong audio headers: sizes of WAVs are corrected, files that end early are refused.

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
HEAD_BYTES, HEAD_OGG_BYTES = 64, 4096
MOST_TAIL_BYTES = 1 << 16  # of tags at an MP3's end
MPEG1_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MPEG2_KBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
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
        if head == b"version http":
            raise AudioError("is a Git LFS pointer, not the clip itself; `git lfs pull` brings it")
        if head[:4] == b"OggS":
            _check_last_page(file, size)
        if head[:8] == b"NIST_1A\n":
            _check_sphere(head + file.read(1 << 12), size)
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


def _check_sphere(head: bytes, size: int) -> None:
    """Raises AudioError where less than the samples that NIST's header counts is there."""
    count = {
        name: int(n) for name, n in re.findall(rb"^(channel_count|sample_n_bytes|sample_count) -i (\d+)$", head, re.M)
    }
    whole = int(head[8:16]) + count.get(b"sample_count", 0) * count.get(b"channel_count", 1) * count.get(
        b"sample_n_bytes", 0
    )
    if size < whole and b"shorten" not in head:
        raise AudioError(f"cannot be decoded: it holds {size} bytes of {whole}")


def _check_last_page(file: BinaryIO, size: int) -> None:
    """Raises AudioError where the last page of an Ogg is not whole, or of another sound than the first: glued Oggs."""
    file.seek(0)
    head = file.read(HEAD_OGG_BYTES)
    file.seek(max(0, size - MOST_PAGE_BYTES))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS\0")) :]
    if page.startswith(b"OggS\0") and (len(page) < 27 or 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)):
        raise AudioError("cannot be decoded: it is cut off within a page")
    if page.startswith(b"OggS\0") and page[14:18] not in head:
        raise AudioError("holds several sounds one behind the other, of which only the first is read; write it anew")


def uncounted(source: Path | io.BytesIO) -> Path | io.BytesIO | None:
    """ADTS, a FLAC or an MP3 whose header does not count all of its samples, of the MP3 its frames; None for others.

    An MP3's Xing or Info header counts; several glued together hold more than their first says.
    Raises AudioError for an MP3 that is cut off.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as file:
        head = file.read(HEAD_BYTES)
        if head[:4] == b"fLaC" and len(head) >= 26:
            return None if head[21] & 0x0F or any(head[22:26]) else source
        if head[:1] == b"\xff" and head[1] & 0xF6 == 0xF0:  # ADTS, under whatever name
            return source
        if head[:3] != b"ID3" and head.strip(b"\0") and not _mpeg_frame(head[:4]):
            return None
        return _of_mp3(head + file.read())


def _of_mp3(content: bytes) -> io.BytesIO | None:
    """`uncounted` of an MP3."""
    at, end = _behind_tags(content, 0), len(content)
    at += len(content[at : at + MOST_TAIL_BYTES]) - len(content[at : at + MOST_TAIL_BYTES].lstrip(b"\0"))  # padding
    if not _mpeg_frame(content[at : at + 4]):
        return None  # not what it seemed, or damaged: its decoder says it
    end -= 128 * (content[-128:-125] == b"TAG")
    for name in (b"APETAGEX", b"LYRICSBEGIN"):
        found = content.find(name, max(at, end - MOST_TAIL_BYTES))
        end = found if found > 0 else end
    frames: list[bytes] = []
    counted: int | None = None
    while at < end:
        size = _mpeg_frame(content[at : at + 4])
        if not size:
            behind = _behind_tags(content, at)
            at = behind if behind > at else _next_frame(content, at, end)
            continue
        if at + size > end and end - at > 4:
            raise AudioError(f"cannot be decoded: it is cut off within its frame {len(frames)}")
        frame = content[at : at + size]
        count = _xing_count(frame)
        if count is None:  # else it is a header, no sound
            frames.append(frame)
        elif not frames:
            counted = count
        at += size
    if counted is not None and len(frames) < counted:
        raise AudioError(f"cannot be decoded: it ends after {len(frames)} frames of {counted}")
    return None if len(frames) == counted else io.BytesIO(b"".join(frames))


def _mpeg_frame(head: bytes) -> int:
    """Bytes of the MPEG audio frame, layer III, that begins so; 0 for anything else."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, rate, index = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or rate == 3 or index in (0, 15):
        return 0
    of_one = version == 3
    kbit = (MPEG1_KBITS if of_one else MPEG2_KBITS)[index - 1]
    sample_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if of_one else 72) * kbit * 1000 // sample_rate + (head[2] >> 1 & 1)


def _behind_tags(content: bytes, at: int) -> int:
    while content[at : at + 3] == b"ID3" and len(content) >= at + 10:
        sizes = content[at + 6 : at + 10]
        at += 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(sizes))
    return at


def _next_frame(content: bytes, at: int, end: int) -> int:
    """The next place from which two frames follow each other, or the end."""
    while 0 <= (at := content.find(b"\xff", at + 1)) < end:
        size = _mpeg_frame(content[at : at + 4])
        if size and (at + size >= end or _mpeg_frame(content[at + size : at + size + 4])):
            return at
    return end


def _xing_count(frame: bytes) -> int | None:
    """Frames by a Xing, Info or VBRI header; None without one."""
    for name, skipped, flag in ((b"Xing", 8, True), (b"Info", 8, True), (b"VBRI", 14, False)):
        place = frame.find(name, 4, 64)
        if place > 0 and len(frame) >= place + skipped + 4 and not (flag and not frame[place + 7] & 1):
            return struct.unpack(">I", frame[place + skipped : place + skipped + 4])[0]
    return None
