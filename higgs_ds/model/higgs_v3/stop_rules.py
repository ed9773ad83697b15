"""Stop rules of the two servers, row by row; in both, only codebook 0's EOC ends an answer.

sglang  EOC counts from row 8 on; the six rows after it are chosen freely: T frames take T + 7 rows
vllm    EOC counts in every row; other codebooks cannot choose EOC before it. In the seven rows after it, codebooks 0,
        0-1, … are forced to EOC, one row later than in training: T frames take T + 8 rows, the last frame is dropped

Both set codebooks that have not started yet, because of the delay, to BOC.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .prompt import undelayed

STOP_RULES = SGLANG, VLLM = ("sglang", "vllm")


class Rows:
    """Rows of one answer under one rule."""

    def __init__(self, rule: str, num_codebooks: int, boc: int):
        if rule not in STOP_RULES:
            raise ValueError(f"unknown stop rule: {rule!r}")
        self._rule, self._books, self._boc, self._eoc = rule, num_codebooks, boc, boc + 1
        self._rows: list[torch.Tensor] = []
        self._stop: int | None = None  # row of codebook 0's EOC

    @property
    def ended(self) -> bool:
        """True once the answer is complete."""
        behind = self._books - (2 if self._rule == SGLANG else 1)
        return self._stop is not None and len(self._rows) > self._stop + behind

    def add(self, logits: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Chooses the next row: logits [codebooks, classes] -> codes [codebooks]."""
        row = len(self._rows)
        if self._rule == VLLM:
            logits = self._masked(logits, row)
        codes = choose(logits)
        codes[row + 1 :] = self._boc
        if self._stop is None:
            if codes[0] == self._eoc and (self._rule == VLLM or row >= self._books):
                self._stop = row
        elif self._rule == VLLM:
            codes[: row - self._stop] = self._eoc
        self._rows.append(codes)
        return codes

    def _masked(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        logits = logits.clone()
        logits[: row + 1, self._boc] = -torch.inf
        logits[1 if self._stop is None else 0 :, self._eoc] = -torch.inf
        return logits

    def frames(self) -> torch.Tensor:
        """Returns the answer's codes, [codebooks, frames]; BOC and EOC become 0, as in the servers."""
        if len(self._rows) < self._books:
            return torch.zeros((self._books, 0), dtype=torch.long)
        codes = undelayed(torch.stack(self._rows, 1))
        if self._rule == VLLM and self.ended:
            codes = codes[:, :-1]
        return codes.masked_fill(codes >= self._boc, 0)
