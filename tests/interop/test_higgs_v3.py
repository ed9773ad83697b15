"""Higgs TTS 3's forward against transformers' own Qwen3 and a product with the table of codes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from higgs_ds.batching.collate import Collator, Sample
from higgs_ds.model.files.adapter_names import peft_key
from higgs_ds.model.higgs_v3.forward import training_forward
from higgs_ds.model.higgs_v3.layers import CodeTable
from higgs_ds.model.higgs_v3.load import load_base, open_base
from higgs_ds.model.higgs_v3.tiny import write_tiny
from higgs_ds.model.lora import attach_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# (text, frames, the reference's text, its frames): plain, a reference without its text, with it, and a long one.
ROWS = [
    ("Hello there.", 11, None, None),
    ("Ha <|sfx:laughter|>Haha.", 23, None, 9),
    ("Grüße!", 8, "What was said.", 17),
    ("A somewhat longer text than the others have, to have padding.", 40, "And this.", 12),
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A base, LoRA on it that is not zero, and the rows both as a batch and as plain lists."""
    folder = tmp_path_factory.mktemp("v3")
    write_tiny(folder / "base", seed=3, hidden_size=128, num_layers=3)
    base = open_base("base", None, "--base_ckpt", folder / "base")
    generator = torch.Generator().manual_seed(0)

    def encode(text):
        return base.tokenizer.encode(text, add_special_tokens=False)

    samples, prompts, codes = [], [], {}
    for number, (text, frames, ref_text, ref_frames) in enumerate(ROWS):
        before = encode("<|tts|>")
        if ref_text is not None:
            before += encode("<|ref_text|>") + encode(ref_text)
        behind = encode("<|text|>") + encode(text) + encode("<|audio|>")
        clips = [torch.randint(0, 1024, (8, frames), generator=generator)]
        if ref_frames is not None:
            before += encode("<|ref_audio|>")
            clips.insert(0, torch.randint(0, 1024, (8, ref_frames), generator=generator))
            codes[f"{number}.reference"] = clips[0]
        codes[f"{number}.target"] = clips[-1]
        ids = torch.tensor(before + behind)
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        samples.append(Sample(ids, labels, tuple(clips), f"{number}"))
        prompts.append(before + [-100] * (ref_frames + 7 if ref_frames else 0) + behind)
    save_file(codes, folder / "codes.safetensors")
    return folder, base, samples, prompts


def model_of(base, loss_impl):
    model = load_base(base.folder, base.config, "fp32")
    lora = attach_lora(model, rank=4, alpha=8.0, dropout=0.0, target_modules=TARGETS, seed=0, base_name="base")
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=generator)
    return training_forward(lora, base.config, loss_impl=loss_impl, checkpoint_every=2)


@pytest.fixture(scope="module")
def theirs(case, transformers_side):
    folder, base, _, prompts = case
    lora = {peft_key(n): p.data for n, p in model_of(base, "fused").named_parameters() if p.requires_grad}
    save_file(lora, folder / "lora.safetensors")
    files = {"lora": folder / "lora.safetensors", "codes": folder / "codes.safetensors", "output": folder / "out"}
    transformers_side("higgs_v3", folder=base.folder, scale=2.0, prompts=prompts, **files)
    return load_file(folder / "out")


def test_every_row_has_the_logits_of_transformers_qwen3(case, theirs):
    _, base, samples, _ = case
    forward, seen = model_of(base, "reference"), []
    (table,) = [module for module in forward.modules() if isinstance(module, CodeTable)]
    table.register_forward_hook(lambda _module, given, out: seen.append(out) if given[0].is_floating_point() else None)
    batch = Collator(base.spec, round_to=1, with_index=True)(samples)
    forward(batch.model_inputs(), 0.0, torch.ones(8))
    (ours,) = seen
    wanted = torch.cat([theirs[f"{number}.logits"] for number in range(len(samples))])
    assert len(ours) == sum(frames + 7 for _, frames, *_ in ROWS)
    torch.testing.assert_close(ours.view(-1, 8, 1026), wanted, **CLOSE)


@pytest.mark.parametrize("together", [1, 4])
def test_loss_and_all_lora_gradients_are_those_of_plain_cross_entropy(case, theirs, together):
    _, base, samples, _ = case
    forward, collate = model_of(base, "fused"), Collator(base.spec, round_to=1, with_index=True)
    total = 0.0
    for first in range(0, len(samples), together):
        batch = collate(samples[first : first + together])
        assert batch.text_count == 0
        loss, _, report = forward(batch.model_inputs(), 0.0, torch.ones(8))
        assert not report.problems
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(float(theirs["sums"].sum()), rel=1e-6)
    gradients = {peft_key(name): p.grad for name, p in forward.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name in theirs if "lora_" in name} and len(gradients) == 3 * 7 * 2
    for name, gradient in gradients.items():
        largest = float(theirs[name].abs().max())
        assert largest > 0, name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=name: n + m)
