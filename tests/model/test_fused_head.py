"""The fused head against plain cross-entropy: value, gradient, counts, chunks, dtypes."""

import pytest
import torch

from higgs_ds.guard import HONEST_ZERO_UNITS
from higgs_ds.loss import head_sums
from higgs_ds.model import fused_head
from higgs_ds.model.fused_head import FusedHead, LabelledRows
from tests.test_loss import reference_sum


def head_of(hidden: int, classes: int, dtype=torch.float32, scale=1.0) -> FusedHead:
    head = torch.nn.Linear(hidden, classes, bias=False, dtype=dtype).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    head.weight.copy_(torch.randn(head.weight.shape, generator=draw) * scale * hidden**-0.5)
    FusedHead.adopt(head)
    return head


def rows_of(rows: int, groups: int, classes: int, hidden=32, dtype=torch.float32, unlabelled=0.3):
    draw = torch.Generator().manual_seed(1)
    states = (torch.randn(rows, hidden, generator=draw) * 2).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (rows, groups), generator=draw)
    targets[torch.rand(rows, groups, generator=draw) < unlabelled] = -100
    return states, targets, torch.rand(groups, generator=draw) + 0.1


def plain(head, states, targets, scales):
    """(loss, sums in float64) by autograd over the logits."""
    logits = head(states).view(states.shape[0], targets.shape[1], -1).double()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view(targets.shape)
    return (scales * losses.sum(0)).sum(), losses.sum(0)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000])
def test_is_plain_cross_entropy_whatever_the_chunks(groups, chunk_rows, monkeypatch):
    classes = 97
    monkeypatch.setattr(fused_head, "CHUNK_BYTES", chunk_rows * groups * classes * 4)
    head = head_of(32, groups * classes)
    states, targets, scales = rows_of(50, groups, classes)
    (found,) = head(LabelledRows(states, targets, scales))
    found.loss.backward(torch.tensor(3.0))
    ours, states.grad = states.grad, None
    loss, sums = plain(head, states, targets, scales)
    loss.backward(torch.tensor(3.0))
    assert torch.allclose(found.sums.double(), sums, rtol=1e-6)
    assert float(found.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert torch.allclose(ours, states.grad, rtol=1e-5, atol=1e-6)
    assert found.counts.tolist() == (targets != -100).sum(0).tolist()
    assert found.shape == (50, groups, classes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32_and_survives_small_scales(dtype):
    """A global count of a million makes scales that fp16 cannot multiply a gradient by; a loss scale brings it back."""
    head, (states, targets, _) = head_of(32, 8 * 97, dtype), rows_of(200, 8, 97, dtype=dtype)
    scales = torch.full((8,), 1e-7)
    (found,) = head(LabelledRows(states, targets, scales))
    found.loss.backward(torch.tensor(65536.0))
    for k in range(8):
        logits = head(states).view(200, 8, 97)[:, k]
        assert float(found.sums[k]) == pytest.approx(reference_sum(logits, targets[:, k])[0], rel=1e-5)
    exact = states.detach().float().requires_grad_()
    loss, _ = plain(head_of(32, 8 * 97), exact, targets, scales)
    loss.backward(torch.tensor(65536.0))
    assert float((states.grad.float() - exact.grad).norm() / exact.grad.norm()) < 0.02


def test_no_rows_stay_in_the_graph():
    head, (states, targets, scales) = head_of(32, 97), rows_of(0, 1, 97)
    (found,) = head(LabelledRows(states, targets, scales))
    found.loss.backward()
    assert float(found.loss) == 0 and states.grad.shape == (0, 32)
    assert found.shape == (0, 1, 97) and found.counts.tolist() == [0]


def test_scales_of_zero_give_a_gradient_of_zero():
    head, (states, targets, scales) = head_of(32, 97), rows_of(5, 1, 97)
    (found,) = head(LabelledRows(states, targets, scales * 0))
    found.loss.backward()
    assert float(found.loss) == 0 and not states.grad.any() and float(found.sums) > 0


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_saturation_is_that_of_the_reference(scale):
    head, (states, targets, scales) = head_of(32, 97, scale=scale), rows_of(40, 1, 97, unlabelled=0)
    (found,) = head(LabelledRows(states, targets, scales))
    wanted = head_sums(head(states)[None], torch.zeros(0, 8, 9), targets.t(), torch.zeros(0, 8).long())
    assert float(found.saturation) == pytest.approx(float(wanted.text_saturation), rel=1e-4)


def test_an_honest_zero_is_known_as_one():
    head = head_of(32, 97)
    head.weight.zero_()
    head.weight[5] = 30.0
    (found,) = head(LabelledRows(torch.ones(3, 32), torch.full((3, 1), 5), torch.ones(1)))
    assert float(found.loss) == 0 and float(found.saturation) <= HONEST_ZERO_UNITS


def test_infinite_logits_are_not_hidden():
    head, (states, targets, scales) = head_of(32, 97), rows_of(5, 1, 97, unlabelled=0)
    (found,) = head(LabelledRows(states.detach() * float("inf"), targets, scales))
    assert not torch.isfinite(found.loss) and not torch.isfinite(found.saturation)


def trained(head: FusedHead) -> FusedHead:
    head.requires_grad_(True)
    head.trained = True
    return head


@pytest.mark.parametrize("chunk_rows", [7, 1000])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_a_trained_head_gets_its_gradient_whatever_the_chunks(chunk_rows, dtype, near, monkeypatch):
    monkeypatch.setattr(fused_head, "CHUNK_BYTES", chunk_rows * 8 * 97 * 4)
    head, (states, targets, _) = trained(head_of(32, 8 * 97, dtype)), rows_of(50, 8, 97, dtype=dtype)
    scales = torch.rand(8, generator=torch.Generator().manual_seed(4)) * 1e-7  # as over a million labels
    found = head.loss_of(LabelledRows(states, targets, scales))
    found.loss.backward(torch.tensor(65536.0))
    assert head.weight.grad.dtype == dtype
    exact, rows = head_of(32, 8 * 97).requires_grad_(True), states.detach().float().requires_grad_()
    exact.weight.data.copy_(head.weight.detach())
    plain(exact, rows, targets, scales)[0].backward(torch.tensor(65536.0))
    for ours, wanted in ((head.weight.grad, exact.weight.grad), (states.grad, rows.grad)):
        assert float((ours.float() - wanted).norm() / wanted.norm()) < near


def test_a_trained_head_without_rows_or_without_gradient():
    head, (states, targets, scales) = trained(head_of(32, 97)), rows_of(0, 1, 97)
    head.loss_of(LabelledRows(states, targets, scales)).loss.backward()
    assert head.weight.grad.shape == (97, 32) and not head.weight.grad.any()
    with torch.no_grad():
        assert not head.loss_of(LabelledRows(states, targets, scales)).loss.requires_grad
    head.trained = False
    with pytest.raises(RuntimeError, match="treated as frozen would get no gradient"):
        head.loss_of(LabelledRows(states, targets, scales))
