"""Generation with Higgs TTS 3: the training model's layers with cached keys and values, and the servers' stop rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ...codec.base import Codec, check_fits
from ...data.chatml import Turn
from ...errors import ConfigError
from ..base import BaseCheckpoint
from ..files.weight_files import all_finite
from ..lora import load_voice
from ..speech import Answer, Sampling
from .layers import Cache
from .load import adaptable_modules, load_base
from .prompt import AUDIO, delayed, tokenize
from .stop_rules import SGLANG, STOP_RULES, Rows

# boson: recommended by Boson, and default of sglang-omni's speech endpoint; served: vllm-omni's default.
SAMPLERS = {"greedy": Sampling(), "boson": Sampling(0.8, 30, 0.8), "served": Sampling(1.0, 50, 0.95)}


class Speaker:
    """A model and a codec, ready to speak; see `speech.Speaker`."""

    samplers: Mapping[str, Sampling] = SAMPLERS
    stop_rules: tuple[str, ...] = STOP_RULES

    def __init__(self, model: nn.Module, base: BaseCheckpoint, codec: Codec, device: torch.device):
        """
        Args:
            model: a `HiggsV3Model`, with LoRA or merged, on `device`; in training too.

        Raises:
            ConfigError: the codec does not fit the model.
        """
        check_fits(codec, base.spec.num_codebooks, base.spec.codebook_size)
        self.model: Any = model
        self.spec, self.tokenizer = base.spec, base.tokenizer
        self.codec, self.device = codec, device

    @classmethod
    def load(cls, base: BaseCheckpoint, adapter: str | None, codec: Codec, **options: Any) -> Speaker:
        """Loads a base checkpoint, an adapter, and a codec; see `lora.load_voice`."""
        modules = adaptable_modules(base.config)
        load = partial(load_base, base.folder, base.config)
        model, device, _ = load_voice(base, adapter, codec, modules, load, **options)
        return cls(model, base, codec, device)

    @torch.no_grad()
    def speak(
        self,
        messages: Sequence[Turn],
        context: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        force_audio: bool = True,
        stop: str = SGLANG,
    ) -> Answer:
        """Answers a prompt.

        Args:
            messages: the prompt's turns.
            context: codes of the reference clip, if the prompt has one.
            force_audio: ignored: this model answers only with speech.
            stop: one of `STOP_RULES`.

        Raises:
            ConfigError: the model computes NaN or infinity.
        """
        prompt, _, clips = tokenize(messages, None, self.tokenizer)
        prompt += self.tokenizer.encode(AUDIO, add_special_tokens=False)
        if len(clips) != len(context):
            raise ValueError(f"the prompt has {len(clips)} clips, codes were given for {len(context)}")
        ids = torch.tensor(prompt, device=self.device)
        cache: Cache = []
        if len(context):
            before = prompt.index(self.spec.audio_in_token) + 1
            codes = torch.from_numpy(np.asarray(context[0], np.int64))[: self.spec.num_codebooks]
            rows = delayed(codes, self.spec.stream_bos, self.spec.stream_eos)
            self.model.cached_forward(ids[:before], rows.to(self.device), cache)
            ids = ids[before:]
        answer = Rows(stop, self.spec.num_codebooks, self.spec.stream_bos)
        choose, none = chooser(sampling, self.device), ids[:0]
        logits = self.model.cached_forward(ids, None, cache)
        for more in reversed(range(sampling.max_new_tokens)):
            if not all_finite(logits * 1000):  # finite even at a temperature of 0.001
                raise ConfigError(["--dtype: the model computes NaN or infinity; fp32 may hold it"])
            row = answer.add(logits, choose)
            if answer.ended or not more:
                break
            logits = self.model.cached_forward(none, row[:, None], cache)
        return Answer(answer.frames().cpu().numpy().astype(np.int16), answer.ended)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the waveform of codes, float32 [samples]; ids beyond the codec's are replaced with its last."""
        return self.codec.decode(np.minimum(codes, self.codec.codebook_size - 1))

    def sample(
        self, turns: Sequence[Turn], context: Sequence[np.ndarray], *, most_frames: int, seed: int
    ) -> tuple[np.ndarray | None, bool]:
        """Answers with sampler `boson`: codes int16 [codebooks, frames], and True if the model ended the answer."""
        sampling = replace(SAMPLERS["boson"], seed=seed, max_new_tokens=most_frames + self.spec.num_codebooks)
        answer = self.speak(turns, context, sampling)
        return answer.codes, answer.ended


def chooser(sampling: Sampling, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that draws one code per codebook: [codebooks, classes] -> [codebooks]"""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        kept, order = (logits / sampling.temperature).sort(-1, descending=True)
        if sampling.top_k is not None:
            kept[:, sampling.top_k :] = -torch.inf
        shares = kept.softmax(-1)
        # Keeps the most likely codes until their total probability reaches top_p.
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= sampling.top_p, 0.0)
        return order.gather(-1, torch.multinomial(shares, 1, generator=generator)).squeeze(-1)

    return draw
