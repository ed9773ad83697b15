"""Tables of fixed-size records in a folder that many processes add to at a time, and that survive a killed writer.

Each writer appends to a file of its own, so nothing is ever locked or rewritten. A record carries a checksum: half of
one, or one that was damaged later, is left out when the table is read, as if it had never been written.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np

KEY = ("key", "<u8", (4,))  # 32 bytes that tell records apart
_CHECK = ("check", "<u8")
# Odd, so that a change of any one word changes the sum.
_FACTORS = np.random.RandomState(20260).randint(0, 1 << 63, size=64, dtype=np.uint64) * 2 + 1
_SEAL = np.uint64(0x9E3779B97F4A7C15)


def record_type(*fields: tuple) -> np.dtype:
    """A record of the key, `fields` (together a multiple of 8 bytes) and the checksum."""
    kind = np.dtype([KEY, *fields, _CHECK])
    assert kind.itemsize % 8 == 0
    return kind


def words_of(key: bytes) -> np.ndarray:
    """A key of 32 bytes as it stands in a record: uint64 [4]."""
    return np.frombuffer(key, dtype="<u8")


class RecordWriter:
    """Appends records to a new file, which appears with the first of them."""

    def __init__(self, folder: Path, suffix: str, kind: np.dtype):
        self.path = folder / f"{uuid.uuid4().hex}{suffix}"
        self._kind = kind
        self._file: int | None = None

    def append(self, key: bytes, **values) -> None:
        """Writes one record in one call to the system. Raises OSError, after which a new file is begun."""
        record = np.zeros(1, self._kind)
        record["key"][0] = words_of(key)
        for name, value in values.items():
            record[name][0] = value
        record["check"] = _checks(record)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        try:
            write_all(self._file, record.tobytes())
        except OSError:
            os.close(self._file)  # half a record would shift all that follow
            self._start_another()
            raise

    def close(self) -> None:
        """Brings what was written to the disk; the next record begins another file."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._start_another()

    def _start_another(self) -> None:
        self._file = None
        self.path = self.path.with_name(f"{uuid.uuid4().hex}{self.path.suffix}")


class Records:
    """Every whole record of a folder's files with one suffix, found by key; about 75 bytes of memory each."""

    def __init__(self, folder: Path, suffix: str, kind: np.dtype):
        """Reads the files as they are now. A folder that is not there holds no record."""
        self.files = sorted(folder.glob(f"*{suffix}"))
        parts, numbers = [np.zeros(0, kind)], [np.zeros(0, np.int32)]
        for number, file in enumerate(self.files):
            content = file.read_bytes()
            records = np.frombuffer(content, kind, count=len(content) // kind.itemsize)
            records = records[_checks(records) == records["check"]]
            parts.append(records)
            numbers.append(np.full(len(records), number, np.int32))
        self.rows = np.concatenate(parts)
        self.file_numbers = np.concatenate(numbers)
        first_words = self.rows["key"][:, 0]
        self._order = np.argsort(first_words, kind="stable").astype(np.int32)
        self._sorted = first_words[self._order]

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, key: bytes) -> list[int]:
        """Numbers in `rows` of the records with this key."""
        words = words_of(key)
        first = int(np.searchsorted(self._sorted, words[0], side="left"))
        found = []
        while first < len(self._sorted) and self._sorted[first] == words[0]:
            number = int(self._order[first])
            if (self.rows["key"][number] == words).all():
                found.append(number)
            first += 1
        return found

    def find_each(self, keys: np.ndarray) -> np.ndarray:
        """int64 [keys]: a record's number for each of `keys` uint64 [keys, 4], -1 where there is none."""
        if len(self) == 0:
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self._sorted, keys[:, 0], side="left"), len(self) - 1)
        found = self._order[places].astype(np.int64)
        wrong = ~(self.rows["key"][found] == keys).all(axis=1)
        # Keys are hashes, so that a first word in common is either the same key or next to impossible.
        for i in np.flatnonzero(wrong & (self._sorted[places] == keys[:, 0])).tolist():
            others = self.find(keys[i].tobytes())
            found[i], wrong[i] = (others[0], False) if others else (-1, True)
        found[wrong] = -1
        return found


def write_all(file: int, content: bytes) -> None:
    """Writes all of it. Raises OSError where the disk is full."""
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _checks(records: np.ndarray) -> np.ndarray:
    """uint64 [records]: the checksum that each of them should carry."""
    words = np.ascontiguousarray(records).view("<u8").reshape(len(records), records.itemsize // 8)[:, :-1]
    return ((words ^ (words >> np.uint64(29))) * _FACTORS[: words.shape[1]]).sum(axis=1, dtype=np.uint64) + _SEAL
