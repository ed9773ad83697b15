"""The end of a clip: each stack's rule over the same logits, by upstream's own `generate` with another choice of codes.

boson         the lowest codebook of those that say EOS first; those below it are ended with it, and those above it one
              after the other (upstream as it is)
transformers  any codebook that says EOS begins the end: one more codebook is forced to EOS at each step after it
vllm          codebook 0 alone; the others cannot say EOS until it has

A clip whose first EOS is codebook 0's alone, and whose last codebook says its own, is the same by all three.
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
    """The codebooks' word on a clip's end."""

    first: tuple[int, ...] = ()  # the codebooks that said EOS at the first step at which any did
    last: bool = False  # whether the last codebook said EOS at the last step

    @property
    def rules_agree(self) -> bool:
        """True where every rule ends the clip here."""
        return self.first == (0,) and self.last


@contextlib.contextmanager
def stopping(model, rule: str) -> Iterator[Ending]:
    """Within it `model.generate(do_sample=False)` ends clips by this rule; what was said is in the `Ending`.

    Replaces the one method of upstream's class that chooses codes, on this object alone.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in STOP_RULES:
        raise ValueError(f"no such stop rule: {rule!r}")
    upstream, ending = model._sample_audio_tokens, Ending()
    bos, eos = model.config.audio_stream_bos_id, model.config.audio_stream_eos_id

    def choose(self, *, audio_logits, num_delay, num_remaining_delays, **more):
        likeliest = audio_logits[-1].float().argmax(-1)
        said = likeliest[: num_delay + 1] == eos  # the others have not begun
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
        """`since`: steps since the first EOS, which only this function is given back."""
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
