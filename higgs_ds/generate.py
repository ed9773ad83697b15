"""Speaking with a trained adapter: plain peft on upstream's model, upstream's own `generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern

from .batching.collate import Collator, Sample, tokenize
from .codec.base import Codec, check_fits
from .corpus.audio import read_audio, write_wav
from .corpus.manifest import AudioRef, Row, Turn
from .distributed.device import pick_device, take_device
from .model.adapter_file import attach, check_base, read_adapter, read_adapter_config
from .model.base import DTYPES, BaseCheckpoint
from .model.load_layout import linear_layers, load_checkpoint

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
STOP_STRINGS = ["<|end_of_text|>", "<|eot_id|>"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest one."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 0.95
    seed: int | None = None
    max_new_tokens: int = 1024

    def as_kwargs(self) -> dict:
        """For upstream's `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
        }


def default_dtype(device: torch.device) -> str:
    """What the model speaks in: a GPU is made for bf16, and a CPU slower in it."""
    return "bf16" if device.type == "cuda" else "fp32"


class Speaker:
    """Base checkpoint, adapter and codec, ready to speak."""

    def __init__(
        self,
        base: BaseCheckpoint,
        adapter: str | None,
        codec: Codec,
        *,
        dtype: str | None = None,
        other_base: bool = False,
    ):
        """
        Args:
            dtype: what the model computes in; None is bf16 on a GPU and fp32 on the CPU.

        Raises:
            ConfigError: no usable GPU unless DS_ACCELERATOR=cpu; a codec of another model; an adapter that is not
                plain LoRA or whose weights do not fit the base one to one, or, without `other_base`, one that was
                trained on another base.
        """
        self.device = pick_device()
        take_device(self.device)
        dtype = dtype or default_dtype(self.device)
        self.config, self.tokenizer = base.config, base.tokenizer
        lora = None if adapter is None else read_adapter_config(Path(adapter))
        if lora and not other_base:
            check_base(lora, base.name, base.revision)
        weights = lora and read_adapter(Path(adapter), linear_layers(self.config), lora)
        check_fits(codec, self.config.audio_num_codebooks, self.config.audio_codebook_size)
        codec.build()  # what is wrong with it is said before the base is loaded
        self.codec = codec
        model = load_checkpoint(HiggsAudioModel, base.folder, self.config, DTYPES[dtype])
        if weights is not None:
            model = attach(model, weights).merge_and_unload()
        self.model = model.to(self.device).eval()
        self.collator = Collator.of(self.config, round_to=1)

    def speak(
        self, messages: Sequence[Turn], context: Sequence[np.ndarray], sampling: Sampling, *, force_audio: bool
    ) -> np.ndarray | None:
        """Codes that the model answers a prompt with, int16 [codebooks, frames]; None if it answers without audio.

        Args:
            messages: the prompt's turns; the assistant's turn follows.
            context: codes of the clips in the prompt, in reading order.
            force_audio: begin the answer with `<|audio_out_bos|>` instead of leaving that to the model.
        """
        input_ids, _, clips = tokenize(messages, None, self.tokenizer)
        header = ASSISTANT_HEADER + ("<|audio_out_bos|>" if force_audio else "")
        input_ids = torch.tensor(input_ids + self.tokenizer.encode(header, add_special_tokens=False))
        if len(clips) != len(context):
            raise ValueError(f"the prompt has {len(clips)} clips, codes were given for {len(context)}")
        codes = tuple(torch.from_numpy(np.asarray(c, dtype=np.int64)) for c in context)
        sample = Sample(input_ids, torch.full_like(input_ids, -100), codes, "prompt")
        inputs = self.collator([sample]).model_inputs(self.device)
        kinds = ("input_ids", "attention_mask", "audio_out_ids", "audio_out_ids_start")
        names = (*kinds, "audio_in_ids", "audio_in_ids_start")
        _, sequences = self.model.generate(
            **{name: inputs[name] for name in names},
            use_cache=True,
            stop_strings=STOP_STRINGS,
            tokenizer=self.tokenizer,
            **sampling.as_kwargs(),
        )
        if not sequences:
            return None
        stream = sequences[-1]  # [codebooks, frames], BOS first, EOS last, delayed
        if self.config.use_delay_pattern:
            stream = revert_delay_pattern(stream)
        codes = stream.clip(0, self.config.audio_codebook_size - 1)[:, 1:-1]
        return codes.cpu().numpy().astype(np.int16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codes, float32 [samples]; ids that the codec does not know are taken as its last."""
        return self.codec.decode(np.minimum(codes, self.codec.codebook_size - 1))


@dataclass(frozen=True)
class Recital:
    """One training row spoken again."""

    origin: str
    text: str
    share: float  # of the training codes given back, over the longer of the two
    frames: int
    spoken_frames: int
    file: str


def recite(speaker: Speaker, rows: Sequence[Row], output_dir: Path, *, limit: int | None = None) -> list[Recital]:
    """Lets the model speak the last assistant clip of each row, greedily, and compares it with the training codes.

    Writes `<n>-<clip>.spoken.wav` beside `<n>-<clip>.original.wav`, and `recital.json`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    recitals = []
    for number, row in enumerate(rows[:limit], 1):
        last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")
        target = next((piece for piece in row.messages[last].content if isinstance(piece, AudioRef)), None)
        if target is None:
            continue
        prompt = row.messages[:last]
        wanted = speaker.codec.encode(*read_audio(target))[: speaker.config.audio_num_codebooks]
        context = [
            speaker.codec.encode(*read_audio(piece))
            for turn in prompt
            for piece in turn.content
            if isinstance(piece, AudioRef)
        ]
        sampling = Sampling(max_new_tokens=2 * wanted.shape[1] + 64)
        spoken = speaker.speak(prompt, context, sampling, force_audio=False)
        stem = f"{number:02d}-{target.path.stem if target.path else 'clip'}"
        original, rate = read_audio(target)
        write_wav(output_dir / f"{stem}.original.wav", original, rate)
        if spoken is not None and spoken.shape[1]:
            write_wav(output_dir / f"{stem}.spoken.wav", speaker.decode(spoken), speaker.codec.sample_rate)
        text = " ".join(piece for turn in prompt[-1:] for piece in turn.content if isinstance(piece, str))
        frames = 0 if spoken is None else spoken.shape[1]
        recitals.append(
            Recital(row.origin, text, share_given_back(wanted, spoken), wanted.shape[1], frames, f"{stem}.spoken.wav")
        )
    facts = [recital.__dict__ for recital in recitals]
    (output_dir / "recital.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return recitals


def share_given_back(wanted: np.ndarray, spoken: np.ndarray | None) -> float:
    """Share of equal codes, 0 to 1, over the longer of the two clips."""
    if spoken is None:
        return 0.0
    frames = min(wanted.shape[1], spoken.shape[1])
    equal = int((wanted[:, :frames] == spoken[:, :frames]).sum())
    return equal / (wanted.shape[0] * max(wanted.shape[1], spoken.shape[1]))
