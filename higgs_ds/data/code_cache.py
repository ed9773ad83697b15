"""The cache of codes: every clip is encoded once, by whichever rank comes to it, and read from disk ever after.

`DIR/<codec>/` holds the codes, kept apart by codec: int16, clip after clip in a few large files, each beside its
index. `DIR/*.hashes` remembers which content a file had, so that a file whose size and time are the same is not read
again. Both are tables of `records`: any number of processes, ranks and runs may fill one folder at a time.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..codec.base import Codec, check_codes
from ..errors import ConfigError, reason_of
from .audio import content_hash, duration_sec, read_audio
from .manifest import AudioRef
from .records import Records, RecordWriter, key_words, record_type, write_all

INDEX = record_type(("offset", "<u8"), ("frames", "<u4"), ("crc", "<u4"))  # offset: bytes from the file's start
HASH = record_type(("content", "<u8", (4,)), ("seconds", "<f8"))
# A file changed less than this long ago may be changed again within its clock's tick: its hash is not remembered.
MIN_AGE_SEC = 2.0
MAX_ADDED = 100_000  # additions kept as objects before the index is read anew, where each takes 75 bytes


class MissingCodesError(LookupError):
    """A clip has not been encoded."""


class CodeCache:
    """Codes of clips in a folder, found by the clip's content and kept apart by codec.

    The same clip under two names is one entry, and codes of another codec are never taken for this one's.
    """

    def __init__(self, folder: str | Path, codec: Codec):
        self.codec = codec
        self.folder = Path(folder) / hashlib.sha256(codec.fingerprint.encode()).hexdigest()[:16]
        self._store = CodeStore(self.folder, codec)
        self._hashes = FileHashes(Path(folder))
        self.encoded = 0  # clips that this object had the codec encode
        self._keys: dict[AudioRef, bytes] = {}  # so that a clip is hashed once a run, not at every epoch

    def get(self, ref: AudioRef) -> np.ndarray:
        """Codes int16 [codebooks, frames] of a clip.

        Raises MissingCodesError if `ensure` has not been over it, ValueError if they are damaged, and AudioError if
        the clip itself cannot be read.
        """
        return self._store.get(self.key(ref))

    def frames(self, ref: AudioRef) -> int:
        """Frames of a clip, from the index alone. Raises MissingCodesError and AudioError as `get` does."""
        return self._store.frames(self.key(ref))

    def frames_each(self, keys: np.ndarray) -> np.ndarray:
        """int64 [clips]: frames of the clips with these keys, uint8 [clips, 32]. Raises MissingCodesError."""
        return self._store.frames_each(keys)

    def key(self, ref: AudioRef) -> bytes:
        """32 bytes that stand for the clip's content."""
        if ref.key is not None:
            return ref.key
        if ref not in self._keys:
            self._keys[ref] = self._hashes.hash_and_duration(ref)[0]
        return self._keys[ref]

    def ensure(self, refs: Sequence[AudioRef], *, max_duration_sec: float | None = None) -> dict[AudioRef, str]:
        """`ensure_each` of all at once, by the newest index; what is wrong with the bad ones, by clip."""
        self.read_index()
        found = list(self.ensure_each(list(dict.fromkeys(refs)), max_duration_sec))
        self._keys.update({ref: key for ref, key, _ in found if key is not None})
        return {ref: problem for ref, _, problem in found if problem is not None}

    def ensure_each(
        self, refs: Sequence[AudioRef], max_duration_sec: float | None = None
    ) -> Iterator[tuple[AudioRef, bytes | None, str | None]]:
        """Encode the clips that are not cached yet, as they are asked for, whatever their number.

        Yields each clip with its key and None, or with None and what is wrong with it. Damaged codes are made anew.
        What other processes have written since the last `read_index` is encoded again.

        Raises:
            OSError: the cache cannot be written to.
            ConfigError: the codec's network cannot be built.
        """
        try:
            for ref in refs:
                try:
                    yield ref, self._ensure_one(ref, max_duration_sec), None
                except ConfigError:  # of the codec itself, which is no fault of the clip
                    raise
                except ValueError as error:  # an AudioError, or codes that cannot be
                    yield ref, None, str(error)
        finally:
            self._store.close_writer()
            self._hashes.close_writer()

    def read_index(self) -> None:
        """Finds what other processes have written by now."""
        self._store.read_index()
        self._hashes.read_again()

    def _ensure_one(self, ref: AudioRef, max_duration_sec: float | None) -> bytes:
        # By the header first: a clip that is hours too long need not be decoded to know it.
        key, seconds = self._hashes.hash_and_duration(ref)
        if max_duration_sec is not None and seconds > max_duration_sec:
            raise ValueError(f"lasts {seconds:.1f} s, over --max_duration_sec {max_duration_sec:g}")
        if not self._store.holds(key):
            codes = self.codec.encode(*read_audio(ref))
            check_codes(codes, self.codec)
            self._store.add(key, codes)
            self.encoded += 1
        return key


@dataclass(frozen=True)
class Location:
    """Place of a clip's codes: from `offset` (bytes) of a file, row after row of [codebooks, frames]."""

    file: Path
    offset: int
    frames: int
    crc: int


class CodeStore:
    """One codec's codes by key, in append-only files of one folder that are memory-mapped to be read.

    A writer has two files of its own: `<name>.codes`, clip after clip, and `<name>.index`, where each of them is.
    """

    def __init__(self, folder: Path, codec: Codec):
        self._folder = folder
        self._codec = codec
        self._index: Records | None = None
        self._code_files: list[Path] = []  # of the index's files
        self._maps: dict[Path, mmap.mmap] = {}
        self._added: dict[bytes, Location] = {}  # written since the index was read
        self._writer: RecordWriter | None = None
        self._codes_file: int | None = None
        self._codes_size = 0  # bytes written to the open file

    def get(self, key: bytes) -> np.ndarray:
        """Codes int16 [codebooks, frames], of their own memory. Raises MissingCodesError, or ValueError if damaged."""
        damage = None
        for location in self._locations(key):
            try:
                return self._read(location)
            except ValueError as error:
                damage = damage or f"{location.file} is damaged at byte {location.offset} ({error})"
        raise ValueError(f"{damage}; start again, and it is made anew")

    def frames(self, key: bytes) -> int:
        """Frames of this key's codes. Raises MissingCodesError."""
        return self._locations(key)[0].frames

    def frames_each(self, keys: np.ndarray) -> np.ndarray:
        """int64 [clips]: frames of keys uint8 [clips, 32]; reads the index again if it lacks one of them.

        Raises MissingCodesError.
        """
        words = np.ascontiguousarray(keys).view("<u8")
        index = self.read_index() if self._index is None else self._index
        found = index.find_each(words)
        if (found < 0).any():
            index = self.read_index()
            found = index.find_each(words)
        if (found < 0).any():
            raise MissingCodesError(f"{int((found < 0).sum())} clips have no codes in {self._folder}")
        return index.rows["frames"][found].astype(np.int64)

    def holds(self, key: bytes) -> bool:
        """True if whole codes of this key were there when the index was last read, or were added since."""
        for location in self._find(key):
            try:
                self._read(location)
                return True
            except ValueError:
                pass  # damaged: another copy may be whole
        return False

    def read_index(self) -> Records:
        """Finds what other processes have written by now, in place of what was known."""
        self._index = Records(self._folder, ".index", INDEX)
        self._code_files = [file.with_suffix(".codes") for file in self._index.files]
        self._added.clear()
        return self._index

    def add(self, key: bytes, codes: np.ndarray) -> None:
        """Appends codes [codebooks, frames], then their place to the index: killed between, nothing was added."""
        content = np.ascontiguousarray(codes, dtype="<i2").tobytes()
        if self._writer is None or self._codes_file is None:
            self._writer = RecordWriter(self._folder, ".index", INDEX)
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._writer.path.with_suffix(".codes")
            self._codes_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            self._codes_size = 0
        offset, crc = self._codes_size, zlib.crc32(content)
        try:
            write_all(self._codes_file, content)
            self._codes_size += len(content)
            self._writer.append(key, offset=offset, frames=codes.shape[1], crc=crc)
        except OSError:
            self.close_writer()  # what was written in part would shift all that follows
            raise
        self._added[key] = Location(self._writer.path.with_suffix(".codes"), offset, codes.shape[1], crc)
        if len(self._added) > MAX_ADDED:
            self.read_index()

    def close_writer(self) -> None:
        """Brings what was added to the disk; the next codes begin another file."""
        writer, data, self._writer, self._codes_file = self._writer, self._codes_file, None, None
        if writer is not None and data is not None:
            os.fsync(data)
            os.close(data)
            writer.close()

    def _locations(self, key: bytes) -> list[Location]:
        """Places of all copies; reads the index again if it knows none. Raises MissingCodesError."""
        found = self._find(key)
        if not found:
            self.read_index()
            found = self._find(key)
        if not found:
            raise MissingCodesError(f"no codes in {self._folder}; encode the clip first, with CodeCache.ensure")
        return found

    def _find(self, key: bytes) -> list[Location]:
        if key in self._added:
            return [self._added[key]]
        index = self._index
        if index is None:
            return []
        locations = []
        for i in index.find(key):
            file, row = self._code_files[index.file_numbers[i]], index.rows[i]
            locations.append(Location(file, int(row["offset"]), int(row["frames"]), int(row["crc"])))
        return locations

    def _read(self, location: Location) -> np.ndarray:
        """Raises ValueError for anything but the codes that were written."""
        file, end = location.file, location.offset + location.frames * self._codec.num_codebooks * 2
        try:
            size = file.stat().st_size  # at each call: touching a map past its file's end kills the process
            if end > size:
                raise ValueError(f"it has {size} bytes, these codes end at {end}")
            if file not in self._maps or end > len(self._maps[file]):
                with file.open("rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"it cannot be read: {reason_of(error)}") from error
        content = self._maps[file][location.offset : end]
        if zlib.crc32(content) != location.crc:
            raise ValueError("its checksum is not the one that was written")
        codes = np.frombuffer(bytearray(content), dtype="<i2").reshape(self._codec.num_codebooks, location.frames)
        check_codes(codes, self._codec)
        return codes


class FileHashes:
    """Content hash and duration of clips, remembered in a folder by path, size and time of the file, and the slice."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._records: Records | None = None
        self._writer: RecordWriter | None = RecordWriter(folder, ".hashes", HASH)

    def hash_and_duration(self, ref: AudioRef) -> tuple[bytes, float]:
        """(SHA-256 of the content, seconds) of a clip; reads it only if it is new or has changed. Raises AudioError."""
        name, may_remember = self._name(ref)
        if name is not None:
            if self._records is None:
                self._records = Records(self._folder, ".hashes", HASH)
            for i in self._records.find(name):
                return self._records.rows["content"][i].tobytes(), float(self._records.rows["seconds"][i])
        seconds = duration_sec(ref)
        content = bytes.fromhex(content_hash(ref))
        if name is not None and may_remember and self._writer is not None:
            try:
                self._writer.append(name, content=key_words(content), seconds=seconds)
            except OSError:
                self._writer = None  # a cache that may only be read still serves the codes that it has
        return content, seconds

    def read_again(self) -> None:
        """Has the next call read what other processes have remembered by then."""
        self._records = None

    def close_writer(self) -> None:
        """Brings what is to be remembered to the disk."""
        if self._writer is not None:
            self._writer.close()

    @staticmethod
    def _name(ref: AudioRef) -> tuple[bytes | None, bool]:
        """Name that the file is remembered by, and whether it may be; None for a clip that is no file."""
        if ref.path is None:
            return None, False
        try:
            stat = ref.path.stat()
        except OSError:
            return None, False  # what is wrong with it is said by whoever reads it
        rate = "" if ref.sample_rate is None else f" {ref.sample_rate} Hz"
        name = f"{ref.path}\0{stat.st_size} {stat.st_mtime_ns} {ref.span}{rate}"
        may_remember = time.time() - stat.st_mtime > MIN_AGE_SEC
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), may_remember
