"""Tables of fixed-size records in a folder, written by many processes concurrently and safe against killed writers.

Each writer appends to a file of its own, without locks and without rewriting. Each record has a checksum; partial and
corrupt records are skipped when the table is read. `benchmarks/NOTES.md` has a comparison with SQLite.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np

KEY = ("key", "<u8", (4,))  # 32 bytes that identify a record
_CHECKSUM = ("check", "<u8")
# Odd, so that a change of any single word changes the sum.
_FACTORS = np.random.RandomState(20260).randint(0, 1 << 63, size=64, dtype=np.uint64) * 2 + 1
_START = np.uint64(0x9E3779B97F4A7C15)  # not 0, so that zero bytes, which a crash may leave, are not a valid record


def record_type(*fields: tuple) -> np.dtype:
    """Returns the dtype of a record: key, `fields` (together a multiple of 8 bytes) and checksum."""
    dtype = np.dtype([KEY, *fields, _CHECKSUM])
    assert dtype.itemsize % 8 == 0
    return dtype


def key_words(key: bytes) -> np.ndarray:
    """Returns a key of 32 bytes in the format of a record, uint64 [4]."""
    return np.frombuffer(key, dtype="<u8")


def checksums(records: np.ndarray) -> np.ndarray:
    """Returns the expected checksums, uint64 [records], over all words of a record but the last."""
    words = np.ascontiguousarray(records).view("<u8").reshape(len(records), records.itemsize // 8)[:, :-1]
    return ((words ^ (words >> np.uint64(29))) * _FACTORS[: words.shape[1]]).sum(axis=1, dtype=np.uint64) + _START


class RecordWriter:
    """Appends records to a new file `<random name><suffix>`; the first record creates the file and its folder."""

    def __init__(self, folder: Path, suffix: str, dtype: np.dtype):
        self.path = folder / f"{uuid.uuid4().hex}{suffix}"
        self._dtype = dtype
        self._file: int | None = None

    def append(self, key: bytes, **values) -> None:
        """Writes one record in one system call. Raises OSError; the next record then goes to a new file."""
        record = np.zeros(1, self._dtype)
        record["key"][0] = key_words(key)
        for name, value in values.items():
            record[name][0] = value
        record["check"] = checksums(record)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        try:
            write_all(self._file, record.tobytes())
        except OSError:
            os.close(self._file)  # a partial record would shift all later ones
            self._start_new_file()
            raise

    def close(self) -> None:
        """Flushes the file to disk; the next record goes to a new file."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._start_new_file()

    def _start_new_file(self) -> None:
        self._file = None
        self.path = self.path.with_name(f"{uuid.uuid4().hex}{self.path.suffix}")


class Records:
    """Intact records of a folder's files with one suffix, looked up by key; about 75 bytes of memory each.

    `rows` has the records, `files` the paths, and `file_numbers`, int32 [records], the index of each record's file.
    """

    def __init__(self, folder: Path, suffix: str, dtype: np.dtype):
        """Reads the files in their current state. A missing folder is an empty table. Raises OSError."""
        self.files = sorted(folder.glob(f"*{suffix}"))
        parts = [np.zeros(0, dtype)]
        for file in self.files:
            records = np.fromfile(file, dtype)  # ignores a partial record at the end
            whole = checksums(records) == records["check"]
            parts.append(records if whole.all() else records[whole])
        self.rows = np.concatenate(parts)
        self.file_numbers = np.repeat(np.arange(len(self.files), dtype=np.int32), [len(part) for part in parts[1:]])
        first_words = self.rows["key"][:, 0]
        self._order = np.argsort(first_words, kind="stable").astype(np.int32)
        self._sorted = first_words[self._order]

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, key: bytes) -> list[int]:
        """Returns the indices in `rows` of the records with this key of 32 bytes."""
        first_word = key_words(key)[0]
        place = int(np.searchsorted(self._sorted, first_word, side="left"))
        found = []
        while place < len(self._sorted) and self._sorted[place] == first_word:
            number = int(self._order[place])
            if self.rows["key"][number].tobytes() == key:
                found.append(number)
            place += 1
        return found

    def find_each(self, keys: np.ndarray) -> np.ndarray:
        """Returns an index in `rows` for each of `keys` uint64 [keys, 4], -1 if it is missing; int64 [keys]."""
        if len(self) == 0:
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self._sorted, keys[:, 0], side="left"), len(self) - 1)
        found = self._order[places].astype(np.int64)
        wrong = ~(self.rows["key"][found] == keys).all(axis=1)
        # Keys are hashes: different keys almost never have the same first word.
        for i in np.flatnonzero(wrong & (self._sorted[places] == keys[:, 0])).tolist():
            others = self.find(keys[i].tobytes())
            found[i], wrong[i] = (others[0], False) if others else (-1, True)
        found[wrong] = -1
        return found


def write_all(file: int, content: bytes) -> None:
    """Writes all of `content`, in several calls if needed. Raises OSError, as on a full disk."""
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
