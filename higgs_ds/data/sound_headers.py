"""Wrong audio headers: repairs the sizes in WAVs and refuses truncated files.

Parses RIFF/WAV, NIST SPHERE, MP3 frames and an Ogg's last page; for all other formats relies on libsndfile's log.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Sizes from here on are placeholders of streaming writers: 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF and values near them.
STREAMED_BYTES = 0x7FFF0000
# Sizes wrong by a header's length are common, and nothing audible is lost.
TRUNCATED_SEC = 0.05
MOST_REPAIRED_BYTES = 1 << 30
MOST_CHUNKS = 1000
MOST_PAGE_BYTES = 27 + 255 + 255 * 255  # of Ogg
# Content that may follow a WAV's sound, even truncated: named chunks, and tags appended to the file.
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
    """A clip's fault, as a predicate to follow its name: `is empty`, `cannot be decoded: ...`."""


def present_share(log: str) -> float:
    """Returns the share of the header's bytes that are present, from libsndfile's log of the file."""
    sizes = [(int(stated), int(present)) for stated, present in _SHOULD_BE.findall(log)]
    return min([present / stated for stated, present in sizes if present < stated < STREAMED_BYTES], default=1.0)


def repaired(source: Path | io.BytesIO) -> Path | io.BytesIO:
    """Returns the source, or a copy with correct sizes in its header.

    A WAV's data chunk of size 0 extends to the file's end, as in ffmpeg; so does one that no other content follows.
    Raises AudioError for a truncated WAV, SPHERE or Ogg, and OSError.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head == b"version http":
            raise AudioError("is a Git LFS pointer, not the clip itself; fetch it with `git lfs pull`")
        if head[:4] == b"OggS":
            _check_last_page(file, size)
        if head[:8] == b"NIST_1A\n":
            _check_sphere(head + file.read(1 << 12), size)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _repaired_wav(file, size) or source
    return source


def _repaired_wav(file: BinaryIO, size: int) -> io.BytesIO | None:
    """Returns a copy of a WAV with corrected sizes; None if they are right."""
    place = stated = bytes_per_sec = 0
    for name, place, stated in _chunks(file, size):  # noqa: B007
        if name == b"data":
            break
        if name == b"fmt ":
            bytes_per_sec = struct.unpack("<I", file.read(16)[8:12].ljust(4, b"\0"))[0]
    else:
        return None
    present = size - place
    if present < stated:  # libsndfile reads up to the file's end
        missing, whole = ((count / max(1, bytes_per_sec)) for count in (stated - present, stated))
        if stated < STREAMED_BYTES and missing > TRUNCATED_SEC:
            raise AudioError(f"is truncated: it ends after {whole - missing:.2f} s of {whole:.2f} s")
        return None
    ends = {place + stated, place + stated + stated % 2}  # not every writer pads chunks to an even size
    if stated == present or any(_ends(file, end, size, empty=stated == 0) for end in ends):
        return None
    if size > MOST_REPAIRED_BYTES:
        raise AudioError(f"has {stated} bytes of sound by its header, but {present} in the file; convert it again")
    file.seek(0)
    content = bytearray(file.read())
    struct.pack_into("<I", content, place - 4, present)
    struct.pack_into("<I", content, 4, size - 8)
    return io.BytesIO(content)


def _ends(file: BinaryIO, place: int, size: int, *, empty: bool) -> bool:
    """Returns True if the sound ends here: other content begins, even if truncated, or only padding is left."""
    if size - place < 8:
        return True
    file.seek(place)
    head = file.read(16)
    name, fits = head[:4], struct.unpack("<I", head[4:8])[0] <= size - place - 8
    if empty:  # a size never filled in is far likelier than a file without sound
        return name in CHUNKS and fits
    if name in CHUNKS or head.startswith(TAGS) or (fits and all(32 <= byte < 127 for byte in name)):
        return True
    while head and not head.strip(b"\0"):
        head = file.read(1 << 16)
    return not head


def _chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start of its content, its size) of each chunk, with the file positioned at the content."""
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
    """Raises AudioError if a NIST SPHERE file has fewer samples than its header says."""
    count = {
        name: int(n) for name, n in re.findall(rb"^(channel_count|sample_n_bytes|sample_count) -i (\d+)$", head, re.M)
    }
    whole = int(head[8:16]) + count.get(b"sample_count", 0) * count.get(b"channel_count", 1) * count.get(
        b"sample_n_bytes", 0
    )
    if size < whole and b"shorten" not in head:
        raise AudioError(f"is truncated: it has {size} of {whole} bytes")


def _check_last_page(file: BinaryIO, size: int) -> None:
    """Raises AudioError if the last page of an Ogg is truncated, or belongs to another stream (concatenated Oggs)."""
    file.seek(0)
    head = file.read(HEAD_OGG_BYTES)
    file.seek(max(0, size - MOST_PAGE_BYTES))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS\0")) :]
    if page.startswith(b"OggS\0") and (len(page) < 27 or 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)):
        raise AudioError("is truncated within a page")
    if page.startswith(b"OggS\0") and page[14:18] not in head:
        raise AudioError("contains several concatenated streams, but only the first can be read; convert it again")


def without_count(source: Path | io.BytesIO) -> Path | io.BytesIO | None:
    """Returns the source if it is ADTS, a FLAC or an MP3 without a full sample count in its header; None otherwise.

    Of an MP3, only the audio frames are returned. Its Xing, Info or VBRI header has a count, which is too low for
    concatenated files. Raises AudioError for a truncated MP3.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getbuffer()) as file:
        head = file.read(HEAD_BYTES)
        if head[:4] == b"fLaC" and len(head) >= 26:
            return None if head[21] & 0x0F or any(head[22:26]) else source
        if head[:1] == b"\xff" and head[1] & 0xF6 == 0xF0:  # ADTS, regardless of the suffix
            return source
        if head[:3] != b"ID3" and head.strip(b"\0") and not _mpeg_frame(head[:4]):
            return None
        return _mp3_without_count(head + file.read())


def _mp3_without_count(content: bytes) -> io.BytesIO | None:
    """Implements `without_count` for an MP3."""
    at, end = _after_tags(content, 0), len(content)
    at += len(content[at : at + MOST_TAIL_BYTES]) - len(content[at : at + MOST_TAIL_BYTES].lstrip(b"\0"))  # padding
    if not _mpeg_frame(content[at : at + 4]):
        return None  # another format, or damaged: the decoder reports it
    end -= 128 * (content[-128:-125] == b"TAG")
    for name in (b"APETAGEX", b"LYRICSBEGIN"):
        found = content.find(name, max(at, end - MOST_TAIL_BYTES))
        end = found if found > 0 else end
    frames: list[bytes] = []
    counted: int | None = None
    while at < end:
        size = _mpeg_frame(content[at : at + 4])
        if not size:
            after = _after_tags(content, at)
            at = after if after > at else _next_frame(content, at, end)
            continue
        if at + size > end and end - at > 4:
            raise AudioError(f"is truncated within frame {len(frames)}")
        frame = content[at : at + size]
        count = _xing_count(frame)
        if count is None:  # otherwise the frame is a header without sound
            frames.append(frame)
        elif not frames:
            counted = count
        at += size
    if counted is not None and len(frames) < counted:
        raise AudioError(f"is truncated: it ends after {len(frames)} of {counted} frames")
    return None if len(frames) == counted else io.BytesIO(b"".join(frames))


def _mpeg_frame(head: bytes) -> int:
    """Returns the size in bytes of the MPEG layer III frame with this header; 0 for anything else."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, rate, index = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or rate == 3 or index in (0, 15):
        return 0
    of_one = version == 3
    kbit = (MPEG1_KBITS if of_one else MPEG2_KBITS)[index - 1]
    sample_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if of_one else 72) * kbit * 1000 // sample_rate + (head[2] >> 1 & 1)


def _after_tags(content: bytes, at: int) -> int:
    while content[at : at + 3] == b"ID3" and len(content) >= at + 10:
        sizes = content[at + 6 : at + 10]
        at += 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(sizes))
    return at


def _next_frame(content: bytes, at: int, end: int) -> int:
    """Returns the next position followed by two consecutive frames, or the end."""
    while 0 <= (at := content.find(b"\xff", at + 1)) < end:
        size = _mpeg_frame(content[at : at + 4])
        if size and (at + size >= end or _mpeg_frame(content[at + size : at + size + 4])):
            return at
    return end


def _xing_count(frame: bytes) -> int | None:
    """Returns the frame count of a Xing, Info or VBRI header; None without one."""
    for name, skipped, flag in ((b"Xing", 8, True), (b"Info", 8, True), (b"VBRI", 14, False)):
        place = frame.find(name, 4, 64)
        if place > 0 and len(frame) >= place + skipped + 4 and not (flag and not frame[place + 7] & 1):
            return struct.unpack(">I", frame[place + skipped : place + skipped + 4])[0]
    return None
