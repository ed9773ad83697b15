"""Runs in the second environment: what transformers 5 makes of our folders, as JSON on the last line.

`python transformers_side.py VERB REQUEST.json`; each function below is a verb, the request its arguments.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    DacConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    Qwen3Config,
    Qwen3Model,
)

warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)


def facts():
    """Of the classes themselves: their defaults, and every name and shape at real size."""
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(HiggsAudioV2Config(codebook_size=1026), use_text_head=True)
        codec = HiggsAudioV2TokenizerModel(codec_config())
    return {
        "version": transformers.__version__,
        "defaults": HiggsAudioV2Config().to_dict(),
        "model": {name: list(value.shape) for name, value in model.state_dict().items()},
        "codec": {name: list(value.shape) for name, value in codec.state_dict().items()},
        "codec_config": codec_config().to_dict(),
    }


def codec_config(small=False):
    """Of Boson's codec; `small` is the same at a size that a test can afford."""
    sizes = {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "hidden_size": 32} if small else {}
    acoustic = {"encoder_hidden_size": 64, "decoder_hidden_size": 1024, "hidden_size": 256} | sizes
    ratios = [8, 5, 4, 2, 3]
    semantic = {"model_type": "hubert", "mask_time_prob": 0.0}
    if small:
        semantic |= {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        semantic |= {"conv_dim": [32] * 7}
    return HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],
        acoustic_model_config=DacConfig(**acoustic, downsampling_ratios=ratios, upsampling_ratios=ratios),
        semantic_model_config=semantic,
    )


def make_codec(folder):
    """A random codec, for a processor to load."""
    torch.manual_seed(0)
    HiggsAudioV2TokenizerModel(codec_config(small=True)).save_pretrained(folder)


def load(folder, text_head=True, adapter=None):
    """The model, strictly; with an adapter by peft."""
    model, report = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=text_head, output_loading_info=True, dtype=torch.float32
    )
    report = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if adapter:
        from peft import PeftModel

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, adapter)
        report |= {"peft": [str(one.message) for one in said if "keys" in str(one.message)]}
        report = {key: value for key, value in report.items() if value}
    return model.eval(), report


def load_report(folder, text_head=True):
    """What the loader complained about: nothing."""
    return load(folder, text_head)[1]


def logits(folder, inputs, output, adapter=None):
    """Text and audio logits of whole sequences, [positions, …]; what the loader complained about."""
    model, report = load(folder, adapter=adapter)
    given, found = load_file(inputs), {}
    inner = model.base_model.model if adapter else model
    head = inner.text_lm_head
    for row in sorted({key.split(".")[0] for key in given}):
        arguments = {key.split(".")[1]: value for key, value in given.items() if key.startswith(row + ".")}
        with torch.no_grad():
            hidden = inner.model(**arguments).last_hidden_state
            found[f"{row}.text"] = head(hidden)[0].contiguous()
            found[f"{row}.audio"] = inner.audio_lm_head(hidden)[0].contiguous()
    save_file(found, output)
    return report


def chat(folder, conversations, add_generation_prompt=False):
    """Token ids of conversations, by the folder's own processor; clips are its placeholders."""
    processor = AutoProcessor.from_pretrained(folder)
    ids = []
    for conversation in conversations:
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        ids.append(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    alone = [
        processor.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=add_generation_prompt)
        for one in conversations
    ]
    return {"ids": ids, "alone": [processor.tokenizer(one, add_special_tokens=False)["input_ids"] for one in alone]}


def generate(folder, conversations, output, max_new_tokens):
    """Codes that transformers' own greedy `generate` answers with, [codebooks, frames] each."""
    processor = AutoProcessor.from_pretrained(folder)
    model, report = load(folder, text_head=False)
    model.generation_config.ras_win_len = None  # resampling is random: the likeliest code is wanted
    codes = {}
    for number, conversation in enumerate(conversations):
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            stream = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
        begins = (stream == 1024).all(-1).nonzero()[-1].item()
        ends = (stream == 1025).all(-1).nonzero()
        end = ends[0].item() if len(ends) else len(stream)
        codes[str(number)] = processor.revert_delay_pattern(stream[begins + 1 : end]).T.contiguous()
    save_file(codes, output)
    return report


def run(code, folder):
    """Runs a snippet in a folder."""
    os.chdir(folder)
    torch.manual_seed(0)
    exec(code, {})
    return sorted(os.listdir(folder))


def encode(folder, waveform, output):
    """Codes of a waveform at 24 kHz by the new layout's own codec."""
    codec = AutoModel.from_pretrained(folder).eval()
    samples = load_file(waveform)["samples"]
    with torch.no_grad():
        codes = codec.encode(samples[None, None]).audio_codes[0]
    save_file({"codes": codes.contiguous()}, output)


def higgs_v3(folder, lora, scale, prompts, codes, output):
    """Higgs TTS 3 by transformers' Qwen3 on embedded rows and one product with the table of codes.

    Args:
        lora: file of the factors A and B by PEFT's names; `scale` is the factor of their product.
        prompts: token ids of each sequence up to `<|audio|>`; -100 stands for a row of its reference's codes.
        codes: file of each sequence's clips by "<sequence>.target" and "<sequence>.reference", [codebooks, frames].
        output: file of the logits of every predicted row, each codebook's sum of cross-entropy, and the gradients of A
            and B in the sum of them all.
    """
    with open(os.path.join(folder, "config.json")) as file:
        model = Qwen3Model(Qwen3Config(**json.load(file)["text_config"])).float().eval()
    stored = {name: value.float() for name, value in load_file(os.path.join(folder, "model.safetensors")).items()}
    table = stored["tied.embedding.modality_embeddings.0.embedding.weight"]
    embedding = stored["tied.embedding.text_embedding.weight"]
    factors = {name: value.requires_grad_() for name, value in load_file(lora).items()}
    weights = {}
    for name in model.state_dict():
        weights[name] = stored[f"body.{name}"] if name != "embed_tokens.weight" else embedding
        a, b = (factors.get(f"base_model.model.body.{name[:-7]}.lora_{part}.weight") for part in "AB")
        if a is not None:
            weights[name] = weights[name] + scale * b @ a
    clips, found, sums = load_file(codes), {}, 0.0

    def delayed(clip):
        frames = clip.shape[1]
        return [
            [1024 if row < c else 1025 if row >= c + frames else int(clip[c, row - c]) for c in range(8)]
            for row in range(frames + 7)
        ]

    def embedded(row):
        return sum(table[1026 * c + code] for c, code in enumerate(row))

    for number, ids in enumerate(prompts):
        reference = iter(delayed(clips[f"{number}.reference"])) if -100 in ids else iter(())
        rows = [embedded(next(reference)) if token == -100 else embedding[token] for token in ids]
        target = delayed(clips[f"{number}.target"])
        inputs = torch.stack([*rows, *map(embedded, target[:-1])])[None]
        hidden = torch.func.functional_call(model, weights, (), {"inputs_embeds": inputs}).last_hidden_state[0]
        logits = torch.nn.functional.linear(hidden[len(ids) - 1 :], table).view(len(target), 8, 1026)
        labels = torch.tensor(target)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        sums = sums + (losses.view(labels.shape) * (labels != 1024)).sum(0)
        found[f"{number}.logits"] = logits.detach().contiguous()
    sums.sum().backward()
    save_file(found | {"sums": sums.detach()} | {name: value.grad for name, value in factors.items()}, output)


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        answer = globals()[sys.argv[1]](**json.load(file))
    print("\n" + json.dumps(answer))
