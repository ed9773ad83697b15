"""The servers' stop rules on confident logits: both reproduce a learned stream and its end."""

from __future__ import annotations

import pytest
import torch

from higgs_ds.model.higgs_v3.prompt import delayed
from higgs_ds.model.higgs_v3.stop_rules import SGLANG, VLLM, Rows

BOC, EOC = 1024, 1025


def run(rule, rows, most=100):
    """Answers to logits that predict exactly these rows, [codebooks, R], and then EOC."""
    answer, given = Rows(rule, 8, BOC), []
    for number in range(most):
        codes = rows[:, number] if number < rows.shape[1] else torch.full((8,), EOC)
        logits = torch.nn.functional.one_hot(codes, 1026).float()
        given.append(answer.add(logits, lambda logits: logits.argmax(-1)))
        if answer.ended:
            break
    return answer, torch.stack(given, 1)


@pytest.mark.parametrize("frames", [8, 9, 40])
def test_a_learned_stream_is_reproduced_completely(frames):
    codes = torch.randint(0, 1024, (8, frames), generator=torch.Generator().manual_seed(0))
    rows = delayed(codes, BOC, EOC)
    answer, given = run(SGLANG, rows)
    assert answer.ended and torch.equal(given, rows) and torch.equal(answer.frames(), codes)
    answer, given = run(VLLM, rows)
    # One row more, with its frame dropped; the codebooks' EOC comes one row late, the codes are equal.
    assert answer.ended and given.shape[1] == frames + 8 and torch.equal(answer.frames(), codes)
    assert given[0, frames:].tolist() == [EOC] * 8 and (given[7] != EOC).all()
    assert given[1, frames + 1] < BOC and given[1, frames + 2 :].tolist() == [EOC] * 6


def test_sglang_accepts_the_end_from_row_8_on_and_vllm_always():
    rows = delayed(torch.full((8, 3), 5), BOC, EOC)
    answer, given = run(SGLANG, rows)
    assert given.shape[1] == 15 and answer.frames().shape[1] == 8
    assert answer.frames()[0].tolist() == [5, 5, 5, 0, 0, 0, 0, 0]  # BOC and EOC become 0
    assert run(VLLM, rows)[0].frames().tolist() == [[5, 5, 5]] * 8


def test_only_codebook_0_ends_an_answer():
    rows = delayed(torch.full((8, 20), 5), BOC, EOC)
    rows[1:, 12] = EOC
    for rule in (SGLANG, VLLM):
        assert run(rule, rows)[0].frames().shape[1] == 20
    never = torch.full((8, 30), 5)
    for rule in (SGLANG, VLLM):
        answer, _ = run(rule, never, most=30)
        assert not answer.ended and answer.frames().shape[1] == 23
    assert run(SGLANG, never, most=7)[0].frames().shape == (8, 0)


def test_a_codebook_is_boc_before_it_starts():
    for rule in (SGLANG, VLLM):
        _, given = run(rule, torch.full((8, 30), 5), most=9)
        assert torch.equal(given == BOC, torch.ones(8, 9, dtype=torch.bool).tril(-1))
