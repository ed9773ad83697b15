"""The end of an answer, row by row, as each server has it; both let codebook 0 alone begin it.

sglang  codebook 0's EOC counts from row 8 on, and the six rows behind it are chosen freely: T frames are T + 7 rows
vllm    it counts in every row, the other codebooks cannot say EOC before it, and codebooks 0, 0-1, … are forced to EOC
        in the seven rows behind it, a row later than they were learned: T frames are T + 8 rows, the last frame is none

While the delay begins, both set the codebooks that have not begun to BOC.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .prompt import undelayed

STOP_RULES = SGLANG, VLLM = ("sglang", "vllm")


class Rows:
    """The rows of one answer by one of the rules."""

    def __init__(self, rule: str, num_codebooks: int, boc: int):
        if rule not in STOP_RULES:
            raise ValueError(f"no such stop rule: {rule!r}")
        self._rule, self._books, self._boc, self._eoc = rule, num_codebooks, boc, boc + 1
        self._rows: list[torch.Tensor] = []
        self._stop: int | None = None  # the row in which codebook 0 said EOC

    @property
    def ended(self) -> bool:
        """True once the rule wants no further row."""
        behind = self._books - (2 if self._rule == SGLANG else 1)
        return self._stop is not None and len(self._rows) > self._stop + behind

    def add(self, logits: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The next row, [codebooks], of its logits, [codebooks, classes], by a choice of codes."""
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
        """The answer's codes, [codebooks, frames]; what is no code in them is 0, as the servers have it."""
        if len(self._rows) < self._books:
            return torch.zeros((self._books, 0), dtype=torch.long)
        codes = undelayed(torch.stack(self._rows, 1))
        if self._rule == VLLM and self.ended:
            codes = codes[:, :-1]
        return codes.masked_fill(codes >= self._boc, 0)
