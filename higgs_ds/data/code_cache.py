"""The cache of codes: each clip is encoded once, by any rank, and then read from disk.

`DIR/<codec>/` holds the codes of one codec: int16, one clip after another in a few large files, each with an index.
`DIR/*.hashes` maps files to hashes of their content, so that a file of the same size and time is not read again.
Index and hashes are tables of `records`: any number of processes, ranks and runs may write to a folder concurrently.
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
# A file changed more recently may change again without a new time stamp: its hash is not stored.
MIN_AGE_SEC = 2.0
MAX_ADDED = 100_000  # additions kept as objects before the index is read again, where each takes 75 bytes


class MissingCodesError(LookupError):
    """A clip has not been encoded."""


class CodeCache:
    """Codes of clips in a folder, looked up by codec and the clip's content.

    The same clip under two names is one entry. Codes of different codecs are never mixed.
    """

    def __init__(self, folder: str | Path, codec: Codec):
        self.codec = codec
        self.folder = Path(folder) / hashlib.sha256(codec.fingerprint.encode()).hexdigest()[:16]
        self._store = CodeStore(self.folder, codec)
        self._hashes = FileHashes(Path(folder))
        self.encoded = 0  # clips encoded by this object
        self._keys: dict[AudioRef, bytes] = {}  # so that a clip is hashed once per run, not once per epoch

    def get(self, ref: AudioRef) -> np.ndarray:
        """Returns a clip's codes, int16 [codebooks, frames].

        Raises MissingCodesError if the clip has not been encoded, ValueError if the codes are corrupt, and AudioError
        if the clip itself cannot be read.
        """
        return self._store.get(self.key(ref))

    def frames(self, ref: AudioRef) -> int:
        """Returns a clip's number of frames, from the index alone. Raises MissingCodesError and AudioError."""
        return self._store.frames(self.key(ref))

    def frames_each(self, keys: np.ndarray) -> np.ndarray:
        """Returns the frames, int64 [clips], of clips by key, uint8 [clips, 32]. Raises MissingCodesError."""
        return self._store.frames_each(keys)

    def key(self, ref: AudioRef) -> bytes:
        """Returns the key of a clip's content, 32 bytes. Raises AudioError."""
        if ref.key is not None:
            return ref.key
        if ref not in self._keys:
            self._keys[ref] = self._hashes.hash_and_duration(ref)[0]
        return self._keys[ref]

    def ensure(self, refs: Sequence[AudioRef], *, max_duration_sec: float | None = None) -> dict[AudioRef, str]:
        """Encodes all clips that are missing in the newest index. Returns the problems of bad clips."""
        self.read_index()
        found = list(self.ensure_each(list(dict.fromkeys(refs)), max_duration_sec))
        self._keys.update({ref: key for ref, key, _ in found if key is not None})
        return {ref: problem for ref, _, problem in found if problem is not None}

    def ensure_each(
        self, refs: Sequence[AudioRef], max_duration_sec: float | None = None
    ) -> Iterator[tuple[AudioRef, bytes | None, str | None]]:
        """Encodes the clips that are not cached yet, one per step of the iterator.

        Yields (clip, key, None), or (clip, None, problem). Corrupt codes are encoded again, and so are clips that
        other processes have encoded since the last `read_index`.

        Raises:
            OSError: the cache is not writable.
            ConfigError: the codec's network cannot be built.
        """
        try:
            for ref in refs:
                try:
                    yield ref, self._ensure_one(ref, max_duration_sec), None
                except ConfigError:  # the codec's fault, not the clip's
                    raise
                except ValueError as error:  # an AudioError, or invalid codes
                    yield ref, None, str(error)
        finally:
            self._store.close_writer()
            self._hashes.close_writer()

    def read_index(self) -> None:
        """Reads the index again, with the additions of other processes."""
        self._store.read_index()
        self._hashes.read_again()

    def _ensure_one(self, ref: AudioRef, max_duration_sec: float | None) -> bytes:
        # The header first: a clip that is hours too long need not be decoded.
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
    """Location of a clip's codes: `offset` in bytes; the codes are [codebooks, frames] in row-major order."""

    file: Path
    offset: int
    frames: int
    crc: int


class CodeStore:
    """One codec's codes by key, in append-only files of one folder that are memory-mapped for reading.

    Each writer has two files of its own: `<name>.codes` with the codes and `<name>.index` with their locations.
    """

    def __init__(self, folder: Path, codec: Codec):
        self._folder = folder
        self._codec = codec
        self._index: Records | None = None
        self._code_files: list[Path] = []  # one per file of the index
        self._maps: dict[Path, mmap.mmap] = {}
        self._added: dict[bytes, Location] = {}  # since the index was read
        self._writer: RecordWriter | None = None
        self._codes_file: int | None = None
        self._codes_size = 0  # bytes in the open file

    def get(self, key: bytes) -> np.ndarray:
        """Returns a copy of the codes, int16 [codebooks, frames]. Raises MissingCodesError, ValueError if corrupt."""
        damage = None
        for location in self._locations(key):
            try:
                return self._read(location)
            except ValueError as error:
                damage = damage or f"{location.file} is corrupt at byte {location.offset} ({error})"
        raise ValueError(f"{damage}; start again to re-encode it")

    def frames(self, key: bytes) -> int:
        """Returns the number of frames of a key's codes. Raises MissingCodesError."""
        return self._locations(key)[0].frames

    def frames_each(self, keys: np.ndarray) -> np.ndarray:
        """Returns the frames, int64 [clips], of keys uint8 [clips, 32].

        Reads the index again if a key is missing. Raises MissingCodesError if it still is.
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
        """Returns True if the index as last read, or an addition since, has intact codes of this key."""
        for location in self._find(key):
            try:
                self._read(location)
                return True
            except ValueError:
                pass  # corrupt: another copy may be intact
        return False

    def read_index(self) -> Records:
        """Reads and returns the index, with the additions of other processes."""
        self._index = Records(self._folder, ".index", INDEX)
        self._code_files = [file.with_suffix(".codes") for file in self._index.files]
        self._added.clear()
        return self._index

    def add(self, key: bytes, codes: np.ndarray) -> None:
        """Appends codes [codebooks, frames], then their index entry: a kill between the two adds nothing."""
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
            self.close_writer()  # a partial write would shift all later codes
            raise
        self._added[key] = Location(self._writer.path.with_suffix(".codes"), offset, codes.shape[1], crc)
        if len(self._added) > MAX_ADDED:
            self.read_index()

    def close_writer(self) -> None:
        """Flushes additions to disk; the next codes go to a new file."""
        writer, data, self._writer, self._codes_file = self._writer, self._codes_file, None, None
        if writer is not None and data is not None:
            os.fsync(data)
            os.close(data)
            writer.close()

    def _locations(self, key: bytes) -> list[Location]:
        """Returns the locations of all copies; reads the index again if there is none. Raises MissingCodesError."""
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
        """Returns the codes at a location. Raises ValueError if they are not as written."""
        file, end = location.file, location.offset + location.frames * self._codec.num_codebooks * 2
        try:
            size = file.stat().st_size  # on each call: access beyond the end of a mapped file kills the process
            if end > size:
                raise ValueError(f"the file has {size} bytes, the codes end at {end}")
            if file not in self._maps or end > len(self._maps[file]):
                with file.open("rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"the file cannot be read: {reason_of(error)}") from error
        content = self._maps[file][location.offset : end]
        if zlib.crc32(content) != location.crc:
            raise ValueError("checksum mismatch")
        codes = np.frombuffer(bytearray(content), dtype="<i2").reshape(self._codec.num_codebooks, location.frames)
        check_codes(codes, self._codec)
        return codes


class FileHashes:
    """Content hashes and durations of clips, stored in a folder by path, size and time of the file, and the slice."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._records: Records | None = None
        self._writer: RecordWriter | None = RecordWriter(folder, ".hashes", HASH)

    def hash_and_duration(self, ref: AudioRef) -> tuple[bytes, float]:
        """Returns (SHA-256 of the content, seconds); reads a clip only if it is new or changed. Raises AudioError."""
        name, may_store = self._name(ref)
        if name is not None:
            if self._records is None:
                self._records = Records(self._folder, ".hashes", HASH)
            for i in self._records.find(name):
                return self._records.rows["content"][i].tobytes(), float(self._records.rows["seconds"][i])
        seconds = duration_sec(ref)
        content = bytes.fromhex(content_hash(ref))
        if name is not None and may_store and self._writer is not None:
            try:
                self._writer.append(name, content=key_words(content), seconds=seconds)
            except OSError:
                self._writer = None  # a read-only cache still serves its codes
        return content, seconds

    def read_again(self) -> None:
        """Makes the next lookup read the tables again, with the additions of other processes."""
        self._records = None

    def close_writer(self) -> None:
        """Flushes additions to disk."""
        if self._writer is not None:
            self._writer.close()

    @staticmethod
    def _name(ref: AudioRef) -> tuple[bytes | None, bool]:
        """Returns the file's key, None for a clip that is not a file, and True if its hash may be stored."""
        if ref.path is None:
            return None, False
        try:
            stat = ref.path.stat()
        except OSError:
            return None, False  # reading the clip reports the error
        rate = "" if ref.sample_rate is None else f" {ref.sample_rate} Hz"
        name = f"{ref.path}\0{stat.st_size} {stat.st_mtime_ns} {ref.span}{rate}"
        may_store = time.time() - stat.st_mtime > MIN_AGE_SEC
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), may_store
