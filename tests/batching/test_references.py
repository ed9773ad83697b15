"""Rows that carry another clip of their speaker, or leave out their own: how often, which, and at what length."""

import json

import pytest

from higgs_ds.batching.batch_plan import MicroBatch, TokenPlan
from higgs_ds.batching.collate import Collator
from higgs_ds.batching.loader import MicroBatches
from higgs_ds.batching.references import References
from higgs_ds.batching.token_counts import LengthIndex
from higgs_ds.codec.load import load_codec
from higgs_ds.data.chatml import speech_messages
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.rows import RowOptions, load_rows
from higgs_ds.distributed.ranks import Ranks
from higgs_ds.model.higgs_v2.prompt import tokenize
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from tests.conftest import SPEECH
from tests.support.ranks import assert_all, changed

OWN, STRANGER, LONELY, CHAT = 8, 9, 10, 11  # rows of the manifest below; those before are of one voice
RATE, MOST = 0.5, 700


def write_manifest(folder):
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()][:11]
    for row in rows:
        row["audio"] = str(SPEECH.parent / row["audio"])
        row["speaker"] = "a"
    rows[1]["audio"], rows[3]["scene"] = rows[0]["audio"], "A quiet room."  # rows 0 and 1 speak the same clip
    rows[OWN] |= {"speaker": "b", "ref_audio": rows[0]["audio"], "ref_text": rows[0]["text"]}
    del rows[STRANGER]["speaker"]
    rows[LONELY]["speaker"] = "c"
    clip = {"type": "audio", "audio_url": rows[4]["audio"]}
    rows.append({"messages": [{"role": "user", "content": "Hm."}, {"role": "assistant", "content": [clip]}]})
    rows[CHAT]["speaker"] = "a"
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "m.jsonl"


@pytest.fixture(scope="module")
def loaded(codec_dir, tokenizer, tiny_config, tmp_path_factory):
    """(rows, cache, collator)"""
    folder = tmp_path_factory.mktemp("references")
    cache = CodeCache(folder / "codes", load_codec(str(codec_dir)))
    spec = HiggsV2Spec.from_config(tiny_config)
    collator = Collator(spec)
    rows, _ = load_rows(
        [str(write_manifest(folder))],
        RowOptions(max_duration_sec=30),
        cache=cache,
        ranks=Ranks(),
        lengths=LengthIndex(cache, tokenizer, collator),
    )
    return rows, cache, collator


def references_of(loaded, tokenizer, rate=RATE, seed=0, most=MOST) -> References:
    return References(
        loaded[0],
        rate=rate,
        seed=seed,
        max_tokens=most,
        tokenize=lambda turns: tokenize(turns, None, tokenizer)[0],
    )


def test_a_row_carries_another_clip_of_its_speaker_as_often_as_asked(loaded, tokenizer):
    rows, references = loaded[0], references_of(loaded, tokenizer)
    epochs, carried, donors = 200, 0, set()
    for epoch in range(epochs):
        for i in range(OWN):
            row = references.row(i, epoch)
            if row == rows[i]:
                continue
            carried += 1
            (_, reference), (_, target) = row.audio_refs
            assert reference.key != target.key == rows[i].audio_refs[0][1].key
            donor = next(d for d in range(OWN) if rows[d].target()[0] == row.messages[-4].content[0])
            donors.add(donor)
            assert rows[donor].audio_refs[0][1].key == reference.key
            given = {"ref_text": rows[donor].target()[0], "ref_audio": reference}
            assert (row.messages, row.start_index) == speech_messages(
                rows[i].target()[0], target, scene=rows[i].scene, **given
            )
    assert abs(carried / (epochs * OWN) - RATE) < 0.05 and donors == set(range(OWN))
    bare = [references.row(OWN, epoch) for epoch in range(epochs)]
    assert abs(sum(row == rows[OWN] for row in bare) / epochs - RATE) < 0.12
    text, (_, target) = rows[OWN].target()[0], rows[OWN].audio_refs[1]
    assert {row.messages for row in bare} == {rows[OWN].messages, speech_messages(text, target)[0]}
    for i in (STRANGER, LONELY, CHAT):
        assert all(references.row(i, epoch) == rows[i] for epoch in range(20))


def test_0_and_1_are_never_and_always_and_a_seed_draws_the_same_again(loaded, tokenizer):
    rows = loaded[0]
    never, always = (references_of(loaded, tokenizer, rate) for rate in (0.0, 1.0))
    for epoch in range(5):
        assert [len(never.row(i, epoch).audio_refs) for i in range(len(rows))] == [1] * len(rows)
        assert [len(always.row(i, epoch).audio_refs) for i in range(OWN + 1)] == [2] * (OWN + 1)
    drawn = [[references_of(loaded, tokenizer, seed=seed).row(i, 3) for i in range(OWN)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("most", [170, 250, MOST])
def test_no_epoch_takes_a_row_beyond_what_the_plan_counts(loaded, tokenizer, most):
    rows, cache, collator = loaded
    most = max(most, int(rows.tokens.max()))
    references = references_of(loaded, tokenizer, 1.0, most=most)
    assert (references.longest >= rows.tokens).all() and references.longest.max() <= most
    plan = TokenPlan(references.longest, max_tokens=most, grad_accum=1, world_size=1, seed=0)
    dataset = MicroBatches(rows, tokenizer, cache, collator, references)
    seen = set()
    for step in plan.steps(0, 1, 3 * plan.steps_per_epoch):
        for micro_batch in step.micro_batches:
            seen.add(micro_batch.epoch)
            tokens = dataset[micro_batch].num_tokens
            assert tokens <= min(most, references.longest[list(micro_batch.rows)].sum())
            assert tokens <= dataset[MicroBatch(micro_batch.rows)].num_tokens + 64 * len(micro_batch.rows)
    assert seen == {0, 1, 2}


def test_the_loss_is_the_same_on_two_ranks_and_after_a_resume(forks, flags_of, tmp_path):
    manifest = write_manifest(tmp_path)
    flags = {"train_manifest": manifest, "reference_rate": RATE, "max_tokens_per_batch": MOST, "batch_size": None}
    flags |= {"lora_dropout": 0, "lr_scheduler": "constant", "dtype": "fp32", "save_every": 3}
    losses = {}
    for name, ranks, grad_accum in (("one", 1, 2), ("two", 2, 1)):
        run = flags_of(tmp_path / name, **flags, grad_accum=grad_accum, max_steps=6, resume="auto")
        if name == "one":
            assert_all(forks.run(changed(run, "--max_steps", "3"), 1))
        results = forks.run(run, ranks)
        assert_all(results)
        assert "references: 0.5 of 9 rows an epoch (8 with" in results[0].output
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses["one"]) == 6 and losses["one"] == pytest.approx(losses["two"], rel=2e-4)
