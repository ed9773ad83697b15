"""The tokens of each row, counted once and kept beside the codes: batches by token budget are made from them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.code_cache import CodeCache
from ..data.manifest import AudioRef, Row
from ..data.records import Records, RecordWriter, record_type
from .collate import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..model.spec import ModelSpec

LENGTH = record_type(("tokens", "<u8"))
CACHED_TEXTS = 4096
RULE = 2  # of counting; counts on disk by an earlier one are made again


class LengthIndex:
    """The tokens of rows, kept on disk by their content (roles, texts, clips), tokenizer, codec and collator."""

    def __init__(self, cache: CodeCache, tokenizer: PreTrainedTokenizerBase, collator: Collator):
        self._cache = cache
        # Remembers the last few thousand texts: headers and scenes are the same in every row.
        cached = functools.lru_cache(CACHED_TEXTS)(partial(tokenizer.encode, add_special_tokens=False))
        # Each call gets a list of its own: a family may extend it.
        self._tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(cached(text)))
        self._collator = collator
        self._records: Records | None = None
        # The codec is in the folder's name.
        spec = collator.spec
        content = tokenizer.backend_tokenizer.to_str()  # of which the number of tokens of a text follows
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        context = [RULE, digest, spec.num_codebooks, spec.use_delay_pattern, spec.audio_in_codes]
        self._context = hashlib.sha256(json.dumps(context).encode()).digest()

    def count(self, rows: list[Row], on_row: Callable[[], None] = lambda: None) -> np.ndarray:
        """int32 [rows]: the tokens of each row, read from disk where they were counted before.

        Counts of other processes are found if they were there at this object's first call.

        Args:
            rows: whose clips are all encoded.
            on_row: called after each row that had to be counted.

        Raises:
            MissingCodesError: a clip is not encoded.
        """
        counted = np.zeros(len(rows), np.int32)
        if not rows:
            return counted
        if self._records is None:
            self._records = Records(self._cache.folder, ".lengths", LENGTH)
        keys = [self._key(row) for row in rows]
        found = self._records.find_each(np.frombuffer(b"".join(keys), "<u8").reshape(-1, 4))
        counted[found >= 0] = self._records.rows["tokens"][found[found >= 0]]
        writer: RecordWriter | None = RecordWriter(self._cache.folder, ".lengths", LENGTH)
        for i in np.flatnonzero(found < 0).tolist():
            counted[i] = self.tokens(rows[i])
            if writer is not None:
                try:
                    writer.append(keys[i], tokens=counted[i])
                except OSError:
                    writer = None  # a cache that may only be read still serves; these are counted again
            on_row()
        if writer is not None:
            writer.close()
        return counted

    def tokens(self, row: Row) -> int:
        """Positions that the model computes for a row: text tokens, each clip's placeholder replaced by its frames."""
        return count_tokens(row, self._collator.spec, self._tokenizer, self._cache.frames)

    def _key(self, row: Row) -> bytes:
        content = [
            (turn.role, turn.recipient, [p if isinstance(p, str) else [self._cache.key(p).hex()] for p in turn.content])
            for turn in row.messages
        ]
        return hashlib.sha256(self._context + json.dumps(content).encode()).digest()


def count_tokens(row: Row, spec: ModelSpec, tokenizer: Any, frames_of: Callable[[AudioRef], int]) -> int:
    """Positions that the model computes for a row, given the frames of each clip, encoded or not."""
    total = len(spec.tokenize(row.messages, row.start_index, tokenizer)[0])
    for turn in row.messages:
        if turn.role != "assistant" and not spec.audio_in_codes:
            continue  # its placeholder stays one token
        total += sum(spec.stream_length(frames_of(piece)) - 1 for piece in turn.content if not isinstance(piece, str))
    return total
