"""Speech with upstream's class and its own `generate`, with a plain PEFT adapter merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from torch import nn

from ...batching.collate import Collator, Sample
from ...codec.base import Codec, check_fits
from ...data.manifest import Turn
from ...errors import ConfigError
from ..base import DTYPES, BaseCheckpoint
from ..files.weight_files import all_finite
from ..lora import load_voice
from ..speech import Answer, Sampling
from .load import adaptable_modules, load_checkpoint
from .prompt import tokenize
from .stop_rules import BOSON, STOP_RULES, stopping

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
# The last ends a clip; an untrained model may continue with a token that upstream cannot handle.
STOP_STRINGS = ["<|end_of_text|>", "<|eot_id|>", "<|audio_eos|>"]


# boson: its serve engine's own defaults; served: vllm-omni's.
SAMPLERS = {
    "greedy": Sampling(),
    "boson": Sampling(0.7, None, 0.95, ras_window=7),
    "served": Sampling(1.0, 50, 0.95, ras_window=7),
}


def generate_options(sampling: Sampling) -> dict:
    """Arguments of upstream's `generate`."""
    if sampling.temperature == 0:
        return {"do_sample": False, "max_new_tokens": sampling.max_new_tokens}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "max_new_tokens": sampling.max_new_tokens,
        "ras_win_len": sampling.ras_window,
        "ras_win_max_num_repeat": sampling.ras_max_repeats,
    }


class Speaker:
    """A model with a codec, ready to speak; see `speech.Speaker`."""

    samplers: Mapping[str, Sampling] = SAMPLERS
    stop_rules: tuple[str, ...] = STOP_RULES

    def __init__(self, model: nn.Module, base: BaseCheckpoint, codec: Codec, device: torch.device):
        """
        Args:
            model: upstream's, with LoRA or merged, on `device`; may be in training.

        Raises:
            ConfigError: a codec of another model.
        """
        check_fits(codec, base.spec.num_codebooks, base.spec.codebook_size)
        self.model: Any = model
        self.spec, self.tokenizer = base.spec, base.tokenizer
        self.codec, self.device = codec, device
        self.collator = Collator(self.spec, round_to=1)

    @classmethod
    def load(cls, base: BaseCheckpoint, adapter: str | None, codec: Codec, **options: Any) -> Speaker:
        """Of a base checkpoint, an adapter, and a codec; see `lora.load_voice`."""
        model, device, dtype = load_voice(
            base,
            adapter,
            codec,
            adaptable_modules(base.config),
            lambda dtype: load_checkpoint(HiggsAudioModel, base.folder, base.config, DTYPES[dtype]),
            **options,
        )
        model.register_forward_hook(partial(_refuse_noise, dtype))
        return cls(model, base, codec, device)

    def speak(
        self,
        messages: Sequence[Turn],
        context: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        force_audio: bool,
        stop: str = BOSON,
    ) -> Answer:
        """See `speech.Speaker`; `force_audio` begins the answer with `<|audio_out_bos|>`."""
        if stop != BOSON and sampling.temperature:
            raise ValueError(f"the stop rule {stop} is greedy")
        prompt, _, clips = tokenize(messages, None, self.tokenizer)
        header = ASSISTANT_HEADER + ("<|audio_out_bos|>" if force_audio else "")
        input_ids = torch.tensor(prompt + self.tokenizer.encode(header, add_special_tokens=False))
        if len(clips) != len(context):
            raise ValueError(f"the prompt has {len(clips)} clips, codes were given for {len(context)}")
        codes = tuple(torch.from_numpy(np.asarray(c, dtype=np.int64)) for c in context)
        sample = Sample(input_ids, torch.full_like(input_ids, -100), codes, "prompt")
        inputs = self.collator([sample]).model_inputs(self.device)
        kinds = ("input_ids", "attention_mask", "audio_out_ids", "audio_out_ids_start")
        names = (*kinds, "audio_in_ids", "audio_in_ids_start")
        with stopping(self.model, stop) as ending:
            said, sequences = self.model.generate(
                **{name: inputs[name] for name in names},
                use_cache=True,
                stop_strings=STOP_STRINGS,
                tokenizer=self.tokenizer,
                **generate_options(sampling),
            )
        if not sequences:
            return Answer(None, said.shape[1] - len(input_ids) < sampling.max_new_tokens)
        spoken, ended = self._codes_of(sequences[-1])
        return Answer(spoken.cpu().numpy().astype(np.int16), ended, ending.rules_agree)

    def _codes_of(self, stream: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Codes [codebooks, frames] of a delayed stream [codebooks, columns] with BOS and EOS; and whether it ended by
        itself."""
        delay = len(stream) - 1 if self.spec.use_delay_pattern else 0
        if stream.shape[1] < delay + 2:  # cut before the last codebook began
            return stream[:, :0], False
        # Upstream ends with the last codebook's choice, EOS or not.
        ended = bool((stream[: max(1, len(stream) - 1), -1] == self.spec.stream_eos).all())
        if delay:
            stream = revert_delay_pattern(stream)
        return stream.clip(0, self.spec.codebook_size - 1)[:, 1:-1], ended

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codes, float32 [samples]; ids beyond the codec's range become its last."""
        return self.codec.decode(np.minimum(codes, self.codec.codebook_size - 1))

    def sample(
        self, turns: Sequence[Turn], context: Sequence[np.ndarray], *, most_frames: int, seed: int
    ) -> tuple[np.ndarray | None, bool]:
        """An answer with Boson's sampler: codes int16 [codebooks, frames] or None, and whether it ended by itself."""
        sampling = replace(SAMPLERS["boson"], seed=seed, max_new_tokens=most_frames + self.spec.num_codebooks)
        answer = self.speak(turns, context, sampling, force_audio=True)
        return answer.codes, answer.ended


def _refuse_noise(dtype: str, _model, _inputs, out) -> None:
    """Forward hook: refuses infinite logits, which would sample noise or fail deep inside the sampler."""
    for logits in (out.logits if out.logits is None else out.logits[:, -1:], out.audio_logits):
        # × 1000: the lowest temperature is 0.001.
        if logits is not None and not all_finite(logits[-1:].float() * 1000):
            hint = "the weights are broken" if dtype == "fp32" else "--dtype fp32 may hold it"
            raise ConfigError([f"--dtype: the model computes NaN or infinity in {dtype}; {hint}"])
