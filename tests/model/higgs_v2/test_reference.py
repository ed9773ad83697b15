"""The wrapper drops only `labels`; the labels are the model's, or exactly re-expanded."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from higgs_ds.batching.collate import Collator
from higgs_ds.loss import audio_targets, text_targets
from higgs_ds.model.higgs_v2.checkpoint import load_base
from higgs_ds.model.higgs_v2.reference import AlignmentError, ReferenceForward, clip_lengths, expand_labels
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.model.higgs_v2.upstream import HiggsAudioForTraining
from higgs_ds.model.lora import attach_lora
from higgs_ds.step_stats import MicroBatchStats
from tests.batching.test_collate import samples_of
from tests.test_loss import reference_sum

BATCHES = {
    "one row (padded left)": ["clone"],
    "one long row (padded left)": ["dialog"],
    "padded right": ["speech", "clone"],
    "several clips a row": ["dialog", "speech", "dialog from turn 3"],
    "text only": ["text", "text"],
    "one row of text": ["text"],
    "mixed": ["text", "dialog", "speech", "clone"],
}


@pytest.fixture(scope="module")
def model(tiny_dir, tiny_config):
    return load_base(tiny_dir, tiny_config, "fp32").eval()


@pytest.fixture(scope="module")
def lora_model(tiny_dir, tiny_config):
    base = load_base(tiny_dir, tiny_config, "fp32")
    return attach_lora(
        base, rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj"], seed=1, base_name="tiny"
    )


def batch_of(name, tokenizer, config):
    return Collator(HiggsV2Spec.from_config(config))(samples_of(BATCHES[name], tokenizer))


@pytest.mark.parametrize("name", BATCHES)
def test_sums_are_the_float64_reference_on_the_models_own_logits(name, lora_model, tokenizer, tiny_config):
    batch = batch_of(name, tokenizer, tiny_config)
    training = ReferenceForward.from_config(lora_model, tiny_config)
    loss, flat, report = training(batch.model_inputs(), 1.0, torch.ones(8))
    stats = MicroBatchStats.empty(8).unpack(flat.tolist())
    assert report.problems == [] and report.path == "expanded_labels"
    with torch.no_grad():
        outputs = lora_model(**batch.model_inputs())
    text_sum, text_count = reference_sum(outputs.logits.flatten(0, 1), text_targets(outputs.expanded_labels).flatten())
    assert stats.text_sum == pytest.approx(text_sum, rel=1e-5)
    assert stats.text_count == text_count == batch.text_count
    total = text_sum
    if batch.audio_out_ids.numel():
        targets = audio_targets(batch.label_audio_ids)
        for k in range(8):
            wanted, count = reference_sum(outputs.audio_logits[:, k], targets[:, k])
            assert stats.codebook_sums[k] == pytest.approx(wanted, rel=1e-5)
            assert stats.codebook_counts[k] == count == batch.codebook_counts[k]
            total += wanted
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    grads = [p.grad for p in lora_model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    lora_model.zero_grad()


@pytest.mark.parametrize("name", BATCHES)
def test_re_expansion_is_what_the_model_returns(name, model, tokenizer, tiny_config):
    batch = batch_of(name, tokenizer, tiny_config)
    with torch.no_grad():
        outputs = model(**batch.model_inputs())

    def lengths(starts, codes):
        return clip_lengths(starts, codes.shape[-1]) if len(starts) else torch.zeros(0, dtype=torch.long)

    kwargs = dict(
        audio_out_token=tiny_config.audio_out_token_idx,
        audio_in_token=tiny_config.audio_in_token_idx,
        out_lengths=lengths(batch.audio_out_ids_start, batch.audio_out_ids),
        in_lengths=lengths(batch.audio_in_ids_start, batch.audio_in_ids),
    )
    again = expand_labels(batch.label_ids, batch.input_ids, batch.attention_mask, **kwargs)
    assert torch.equal(again, outputs.expanded_labels)
    length = outputs.expanded_labels.shape[1]
    with pytest.raises(AlignmentError, match=f"expand to {length} positions, the model's sequence has {length + 4}"):
        expand_labels(batch.label_ids, batch.input_ids, batch.attention_mask, **kwargs, length=length + 4)
    with pytest.raises(AlignmentError, match="tokens for"):
        expand_labels(
            batch.label_ids,
            batch.input_ids,
            batch.attention_mask,
            **(kwargs | {"out_lengths": torch.cat([kwargs["out_lengths"], torch.tensor([3])])}),
        )


class WithoutExpandedLabels(torch.nn.Module):
    """A model that returns what the wrapped one returns, but for one field."""

    def __init__(self, model, **changes):
        super().__init__()
        self.model, self.changes = model, changes

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        for name, change in self.changes.items():
            setattr(outputs, name, change(getattr(outputs, name)))
        return outputs


def test_missing_expanded_labels_give_the_same_loss_and_say_so(model, tokenizer, tiny_config):
    batch = batch_of("mixed", tokenizer, tiny_config)
    normal, *_ = ReferenceForward.from_config(model, tiny_config)(batch.model_inputs(), 1.0, torch.ones(8))
    training = ReferenceForward.from_config(WithoutExpandedLabels(model, expanded_labels=lambda _: None), tiny_config)
    loss, _, report = training(batch.model_inputs(), 1.0, torch.ones(8))
    assert float(loss) == float(normal)
    assert report.path == "re-expanded" and report.problems == []


def test_what_cannot_be_aligned_is_a_problem_and_never_cut(model, tokenizer, tiny_config):
    batch = batch_of("mixed", tokenizer, tiny_config)
    training = ReferenceForward.from_config(
        WithoutExpandedLabels(model, expanded_labels=lambda _: None, logits=lambda x: x[:, :-4]), tiny_config
    )
    loss, stats, report = training(batch.model_inputs(), 1.0, torch.ones(8))
    ((check, found),) = report.problems
    assert check == "expanded_labels" and "refusing to cut" in found
    assert torch.isnan(stats).all()


def test_audio_logits_of_no_frames_are_a_problem(model, tokenizer, tiny_config):
    """The failure that started this: `Audio logits shape: [0, 8, 1026]`, total loss 0.0000."""
    batch = batch_of("padded right", tokenizer, tiny_config)
    training = ReferenceForward.from_config(WithoutExpandedLabels(model, audio_logits=lambda x: x[:0]), tiny_config)
    _, _, report = training(batch.model_inputs(), 1.0, torch.ones(8))
    ((check, found),) = report.problems
    assert check == "audio_logits" and "(0, 8, 1026)" in found


def test_only_labels_is_dropped(tiny_dir, tiny_config, tokenizer, model):
    batch = batch_of("padded right", tokenizer, tiny_config)
    inputs = batch.model_inputs()
    with torch.no_grad():
        plain = model(**inputs)
        with_labels = model(**inputs, labels=torch.zeros(1))
    assert torch.equal(plain.logits, with_labels.logits)
    assert plain.expanded_labels is not None and plain.audio_logits.shape[0] == batch.audio_out_ids.shape[1]
    with pytest.raises(TypeError, match="unknown keys in the batch: labels_ids"):
        model(**inputs, labels_ids=torch.zeros(1))

    # Under PEFT, which passes labels= whether it is given or not.
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(peft_model(**inputs).logits, plain.logits)
        assert torch.equal(peft_model(**inputs, labels=torch.zeros(1)).logits, plain.logits)


def test_every_field_of_the_batch_reaches_the_model(tokenizer, tiny_config, model, monkeypatch):
    batch = batch_of("mixed", tokenizer, tiny_config)
    seen = {}
    upstream = HiggsAudioForTraining.__mro__[1]
    original = upstream.forward
    monkeypatch.setattr(upstream, "forward", lambda self, **kw: seen.update(kw) or original(self, **kw))
    model(**batch.model_inputs(), labels=torch.zeros(1))
    assert set(seen) == set(batch.upstream_fields())
    assert all(seen[key] is None or torch.equal(seen[key], getattr(batch, key)) for key in seen)
