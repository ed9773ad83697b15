"""Speaking with the model: plain peft on upstream's class, upstream's own `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern
from torch import nn

from ...batching.collate import Collator, Sample
from ...codec.base import Codec, check_fits
from ...data.manifest import Turn
from ...distributed.device import pick_device, take_device
from ...errors import ConfigError
from ..base import DTYPES, BaseCheckpoint
from ..files.adapter_file import Adapter, check_base, read_adapter, read_adapter_config
from ..files.weight_files import all_finite
from ..lora import attach_adapter
from ..speech import Answer, Sampling, default_dtype
from .load import adaptable_modules, load_checkpoint
from .prompt import tokenize
from .stop_rules import BOSON, STOP_RULES, stopping

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
# The last ends a clip: what an untrained model says after it may be a token that upstream cannot go on from.
STOP_STRINGS = ["<|end_of_text|>", "<|eot_id|>", "<|audio_eos|>"]


# boson: its serve engine's own defaults; served: vllm-omni's.
SAMPLERS = {
    "greedy": Sampling(),
    "boson": Sampling(0.7, None, 0.95, ras_window=7),
    "served": Sampling(1.0, 50, 0.95, ras_window=7),
}


def generate_options(sampling: Sampling) -> dict:
    """For upstream's `generate`."""
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
    """A model and a codec, ready to speak; see `speech.Speaker`."""

    samplers: Mapping[str, Sampling] = SAMPLERS
    stop_rules: tuple[str, ...] = STOP_RULES

    def __init__(self, model: nn.Module, base: BaseCheckpoint, codec: Codec, device: torch.device):
        """
        Args:
            model: upstream's, with LoRA or merged, on `device`; in training too.

        Raises:
            ConfigError: a codec of another model.
        """
        check_fits(codec, base.spec.num_codebooks, base.spec.codebook_size)
        self.model: Any = model
        self.spec, self.tokenizer = base.spec, base.tokenizer
        self.codec, self.device = codec, device
        self.collator = Collator(self.spec, round_to=1)

    @classmethod
    def load(
        cls,
        base: BaseCheckpoint,
        adapter: str | None,
        codec: Codec,
        *,
        dtype: str | None = None,
        other_base: bool = False,
    ) -> Speaker:
        """Of a base checkpoint, an adapter, and a codec.

        Args:
            dtype: what the model computes in; None is bf16 on a GPU and fp32 on the CPU.

        Raises:
            ConfigError: no usable GPU unless DS_ACCELERATOR=cpu; a codec of another model; an adapter that is not
                plain LoRA or whose weights do not fit the base one to one, or, without `other_base`, one that was
                trained on another base; weights that are NaN or infinite in this dtype.
        """
        device = pick_device()
        take_device(device)
        dtype = dtype or default_dtype(device)
        weights = None
        if adapter is not None:
            lora = read_adapter_config(Path(adapter))
            if not other_base:
                check_base(lora, base.name, base.revision)
            weights = read_adapter(Path(adapter), adaptable_modules(base.config), lora)
        check_fits(codec, base.spec.num_codebooks, base.spec.codebook_size)
        codec.build()  # what is wrong with it is said before the base is loaded
        model = load_checkpoint(HiggsAudioModel, base.folder, base.config, DTYPES[dtype])
        if weights is not None:
            model = attach_adapter(model, weights).merge_and_unload()
        model = model.to(device).eval()
        _refuse_broken(model, dtype, base, adapter, weights)
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
        """Codes [codebooks, frames] of a stream [codebooks, columns] with BOS first and EOS last, delayed; whether it
        ended by itself."""
        delay = len(stream) - 1 if self.spec.use_delay_pattern else 0
        if stream.shape[1] < delay + 2:  # cut off before the last codebook had begun
            return stream[:, :0], False
        # Upstream ends with what the last codebook says, EOS or not.
        ended = bool((stream[: max(1, len(stream) - 1), -1] == self.spec.stream_eos).all())
        if delay:
            stream = revert_delay_pattern(stream)
        return stream.clip(0, self.spec.codebook_size - 1)[:, 1:-1], ended

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codes, float32 [samples]; ids that the codec does not know are taken as its last."""
        return self.codec.decode(np.minimum(codes, self.codec.codebook_size - 1))

    def sample(
        self, turns: Sequence[Turn], context: Sequence[np.ndarray], *, most_frames: int, seed: int
    ) -> tuple[np.ndarray | None, bool]:
        """An answer by Boson's own sampler: codes int16 [codebooks, frames] or None, and whether it ended by itself."""
        sampling = replace(SAMPLERS["boson"], seed=seed, max_new_tokens=most_frames + self.spec.num_codebooks)
        answer = self.speak(turns, context, sampling, force_audio=True)
        return answer.codes, answer.ended


def _refuse_broken(
    model: nn.Module, dtype: str, base: BaseCheckpoint, folder: str | None, adapter: Adapter | None
) -> None:
    """Weights that are NaN or infinite, in the files or by the sum or the dtype. Raises ConfigError."""
    changed = {f"{module}.weight" for module in (adapter.weights if adapter else ())}
    broken = [name for name, value in model.state_dict().items() if not all_finite(value)]
    more = "; --dtype bf16 or fp32 holds more" if dtype == "fp16" else ""
    where = f"{base.flag}: {base.folder}: ", f"--adapter: {folder}: base + scale · B·A of "
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        name = f"{where[broken[0] in changed]}{broken[0]}{others}"
        raise ConfigError([f"{name} holds NaN or infinity in {dtype}{more}"])


def _refuse_noise(dtype: str, _model, _inputs, out) -> None:
    """A forward hook: what infinite logits would choose is no speech, or an error in the sampler's depths."""
    for logits in (out.logits if out.logits is None else out.logits[:, -1:], out.audio_logits):
        # A temperature of 0.001 is the lowest that divides them.
        if logits is not None and not all_finite(logits[-1:].float() * 1000):
            hint = "the weights are broken" if dtype == "fp32" else "--dtype fp32 may hold it"
            raise ConfigError([f"--dtype: the model computes NaN or infinity in {dtype}; {hint}"])
