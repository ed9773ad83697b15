"""Batches of a family with other facts: a stream without a BOS frame, and text that predicts nothing.

Higgs TTS 3 puts T + 7 rows behind `<|audio|>`, whose embedding predicts the first of them. To the batch that token is
the clip's first frame: a mark, which the family's forward embeds as the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from higgs_ds.batching.collate import Collator, Sample
from higgs_ds.loss import IGNORE
from higgs_ds.model.higgs_v2.prompt import delay
from higgs_ds.model.spec import ModelSpec

BOC, EOC = 1024, 1025
TTS, REF_TEXT, REF_AUDIO, TEXT, AUDIO = 900, 901, 902, 903, 904


@dataclass(frozen=True)
class OtherSpec(ModelSpec):
    def tokenize(self, messages, start_index, tokenizer):
        raise NotImplementedError

    def stream(self, codes):
        return torch.nn.functional.pad(delay(codes, BOC, EOC), (1, 0), value=BOC)

    def stream_labels(self, codes, trained):
        labels = torch.nn.functional.pad(delay(codes, IGNORE, EOC), (1, 0), value=IGNORE)
        return labels if trained else torch.full_like(labels, IGNORE)

    def stream_length(self, frames):
        return frames + self.num_codebooks


SPEC = OtherSpec(
    *(8, 1024, BOC, EOC, True), audio_in_token=REF_AUDIO, audio_out_token=AUDIO, audio_in_codes=True, pad_token=0,
    hidden_size=2560, ffn_size=9728, num_ffns=1, num_layers=36, num_heads=32, num_key_value_heads=8, head_dim=128,
    vocab_size=151936, max_positions=32768,
)  # fmt: skip


def test_an_audio_token_that_predicts_the_first_row_is_a_clips_first_frame():
    """Two rows: a clone with reference, and a speech whose text is longer."""
    draw = torch.Generator().manual_seed(0)
    reference, one, two = (torch.randint(1024, (8, frames), generator=draw) for frames in (9, 12, 10))

    def sample(tokens, *codes):
        labels = [token if token == AUDIO else IGNORE for token in tokens]
        return Sample(torch.tensor(tokens), torch.tensor(labels), codes, "here")

    clone = [TTS, REF_TEXT, 5, REF_AUDIO, TEXT, 6, 7, AUDIO]
    samples = [sample(clone, reference, one), sample([TTS, TEXT, *range(1, 9), AUDIO], two)]
    batch = Collator(SPEC, with_index=True)(samples)
    index = batch.index
    assert batch.text_count == 0 and not len(index.text_targets)
    # All 8 · T codes and the 28 EOC of each clip's tail are learned, BOC never; codebook 7 never says EOC.
    assert batch.codebook_counts == [12 + 7 - c + 10 + 7 - c for c in range(8)]
    assert index.num_frames == (12 + 8) + (10 + 8) + (9 + 8) and index.num_text == 6 + 10

    rows = delay(one, IGNORE, EOC).t()
    first = index.output_rows[index.head_rows[0]]  # where `<|audio|>` stands, behind P - 1 tokens and the reference
    assert first == index.num_text and index.positions[first] == len(clone) - 1 + 9 + 7
    assert torch.equal(index.audio_targets[: 12 + 7], rows)
    assert torch.equal(index.audio_targets[12 + 7 :], delay(two, IGNORE, EOC).t())
    marks = (torch.cat([batch.audio_out_ids, batch.audio_in_ids], 1) == BOC).all(0).nonzero().flatten()
    assert marks.tolist() == [0, 20, 38]  # what the forward embeds as `<|audio|>`, twice, and as `<|ref_audio|>`
