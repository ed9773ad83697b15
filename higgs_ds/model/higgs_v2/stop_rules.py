"""Stop rules of the serving stacks, applied in upstream's `generate` by replacing the choice of codes.

boson         the lowest of the codebooks that predict EOS first; those below it end with it, those above it one after
              the other (upstream unchanged)
transformers  any codebook that predicts EOS begins the end: each further step forces one more codebook to EOS
vllm          codebook 0 only; the others cannot predict EOS before it

A clip ends alike under all three if the first EOS is codebook 0's alone and the last codebook predicts its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

import torch

STOP_RULES = BOSON, TRANSFORMERS, VLLM = ("boson", "transformers", "vllm")


@dataclass
class Ending:
    """The codebooks' predictions at the end of a clip."""

    first: tuple[int, ...] = ()  # codebooks with EOS at the first step with any
    last: bool = False  # the last codebook predicted EOS at the last step

    @property
    def rules_agree(self) -> bool:
        """True if every rule ends the clip here."""
        return self.first == (0,) and self.last


@contextlib.contextmanager
def stopping(model, rule: str) -> Iterator[Ending]:
    """Context in which `model.generate(do_sample=False)` ends clips by this rule and fills in the `Ending`.

    Replaces upstream's method that chooses codes, on this object only.

    Raises:
        ValueError: unknown rule.
    """
    if rule not in STOP_RULES:
        raise ValueError(f"no such stop rule: {rule!r}")
    upstream, ending = model._sample_audio_tokens, Ending()
    bos, eos = model.config.audio_stream_bos_id, model.config.audio_stream_eos_id

    def choose(self, *, audio_logits, num_delay, num_remaining_delays, **more):
        likeliest = audio_logits[-1].float().argmax(-1)
        said = likeliest[: num_delay + 1] == eos  # the other codebooks have not begun
        if not ending.first:
            ending.first = tuple(said.nonzero().flatten().tolist())
        ending.last = len(said) == len(likeliest) and bool(said[-1])
        if rule == TRANSFORMERS:
            return _any_begins(likeliest, audio_logits, num_delay, num_remaining_delays, more)
        if rule == VLLM and num_remaining_delays is None:
            audio_logits = audio_logits.clone()
            audio_logits[-1, 1:, eos] = -torch.inf
        return upstream(
            audio_logits=audio_logits, num_delay=num_delay, num_remaining_delays=num_remaining_delays, **more
        )

    def _any_begins(codes, audio_logits, num_delay, since, more):
        """`since`: steps since the first EOS, returned by the previous call."""
        codes = codes.clone()
        if num_delay + 1 < len(codes):
            codes[num_delay + 1 :] = bos
            num_delay += 1
        if since is not None:
            since += 1
            codes[:since] = eos
        elif bool((codes == eos).any()):
            since = 0
        ended = bool((codes == eos).all())
        ids = more["generation_config"].generation_kwargs
        token = ids["audio_eos_token_id"] if ended else model.config.audio_out_token_idx
        text = codes.new_full((audio_logits.shape[0],), token)
        logits = audio_logits[-1].float()
        if ended:
            num_delay, since = 0, None
        return text, codes, logits, logits, num_delay, since

    model._sample_audio_tokens = MethodType(choose, model)
    try:
        yield ending
    finally:
        del model._sample_audio_tokens
