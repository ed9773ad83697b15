"""The cache of codes: every clip is encoded once, by whichever rank comes to it, and read from disk ever after."""

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .audio import content_hash, duration_sec, read_audio
from .codec import Codec, check_codes
from .manifest import AudioRef


class MissingCodesError(KeyError):
    """A clip has not been encoded."""

    __str__ = Exception.__str__  # KeyError would show the text in quotes


class CodeCache:
    """Codes of clips in a folder, one file a clip, named by the clip's content and kept apart by codec.

    The same clip under two names is one entry, and codes of another codec are never taken for this one's. Only
    `_load` and `_store` know how the codes lie on disk. Several processes may fill one folder at a time.
    """

    def __init__(self, folder: str | Path, codec: Codec):
        self.codec = codec
        self._folder = Path(folder) / hashlib.sha256(codec.fingerprint.encode()).hexdigest()[:16]
        self._hashes: dict[AudioRef, str] = {}  # so that a clip is not hashed at every epoch

    def get(self, ref: AudioRef) -> np.ndarray:
        """Codes int16 [codebooks, frames] of a clip.

        Raises MissingCodesError if `ensure` has not been over it, ValueError if its file is damaged, and AudioError
        if the clip itself cannot be read.
        """
        return self._load(self._hash(ref))

    def ensure(
        self,
        refs: Sequence[AudioRef],
        *,
        shard: int = 0,
        num_shards: int = 1,
        max_duration_sec: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[AudioRef, str]:
        """Encode the clips of a shard that are not cached yet; what is wrong with the bad ones, by clip.

        The shard is every `num_shards`-th of the different clips. `progress` is told how many of the shard's clips
        are done, and how many there are. A damaged cache file is written anew.
        """
        unique = list(dict.fromkeys(refs))[shard::num_shards]
        problems = {}
        for done, ref in enumerate(unique, start=1):
            try:
                self._ensure_one(ref, max_duration_sec)
            except ValueError as error:  # an AudioError, or codes that cannot be
                problems[ref] = str(error)
            if progress is not None:
                progress(done, len(unique))
        return problems

    def known_hashes(self) -> dict[AudioRef, str]:
        """Content hashes of the clips seen so far, for other ranks' `add_hashes`."""
        return dict(self._hashes)

    def add_hashes(self, hashes: dict[AudioRef, str]) -> None:
        """Takes over what another rank hashed, so that every clip is read once in all."""
        self._hashes.update(hashes)

    def _ensure_one(self, ref: AudioRef, max_duration_sec: float | None) -> None:
        # By the header first: a clip that is hours too long need not be decoded to know it.
        if max_duration_sec is not None and (lasts := duration_sec(ref)) > max_duration_sec:
            raise ValueError(f"lasts {lasts:.1f} s, over --max_duration_sec {max_duration_sec:g}")
        name = self._hash(ref)
        try:
            self._load(name)
            return
        except (MissingCodesError, ValueError):
            pass  # not there, or damaged: encoded below in either case
        codes = self.codec.encode(*read_audio(ref))
        check_codes(codes, self.codec)
        self._store(name, codes)

    def _hash(self, ref: AudioRef) -> str:
        if ref not in self._hashes:
            self._hashes[ref] = content_hash(ref)
        return self._hashes[ref]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _load(self, name: str) -> np.ndarray:
        path = self._path(name)
        try:
            # Mapped, and not np.load: a header cannot make it allocate more than the file holds, nor open an archive.
            codes = np.array(np.lib.format.open_memmap(path, mode="r"))
            if codes.dtype != np.int16:
                raise ValueError(f"codes must be int16, found {codes.dtype}")
            check_codes(codes, self.codec)
        except FileNotFoundError as error:
            raise MissingCodesError(f"no codes in {path}; encode the clip first, with CodeCache.ensure") from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and it will be made anew") from error
        return codes

    def _store(self, name: str, codes: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Ranks on several nodes may write the same clip: each beside, under a name of its own, then in one move.
        temporary = self._folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                np.save(file, codes.astype(np.int16), allow_pickle=False)
            os.replace(temporary, self._path(name))
        finally:
            temporary.unlink(missing_ok=True)
