"""Sums and counts against a float64 reference written from the definition, one position at a time."""

import pytest
import torch

from higgs_ds.errors import ConfigError
from higgs_ds.guard import HONEST_ZERO_UNITS
from higgs_ds.loss import LossWeights, audio_targets, head_sums, loss_scales, mean_losses, scaled_loss, text_targets
from higgs_ds.options.sections import LossOptions


def reference_sum(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, int]:
    """Σ CE in float64 over rows of [rows, classes] with a label, and how many."""
    total, count = 0.0, 0
    for row, label in zip(logits.detach().double(), target, strict=True):
        if label >= 0:
            total += float(torch.logsumexp(row, 0) - row[label])
            count += 1
    return total, count


def random_heads(batch=3, length=40, vocabulary=97, frames=23, books=8, classes=1026, scale=4.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, length, vocabulary, generator=draw) * scale
    audio = torch.randn(frames, books, classes, generator=draw) * scale
    text_target = torch.randint(0, vocabulary, (batch, length), generator=draw)
    text_target[torch.rand(batch, length, generator=draw) < 0.7] = -100
    audio_target = torch.randint(0, classes, (frames, books), generator=draw)
    audio_target[torch.rand(frames, books, generator=draw) < 0.2] = -100
    return text, audio, text_target, audio_target


@pytest.mark.parametrize("kind", ["both", "text only", "audio only", "no labels", "no audio rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_float64_reference(kind, dtype):
    frames = 0 if kind == "no audio rows" else 23
    text, audio, text_target, audio_target = random_heads(frames=frames)
    if kind in ("audio only", "no labels"):
        text_target[:] = -100
    if kind in ("text only", "no labels"):
        audio_target[:] = -100
    text, audio = text.to(dtype).requires_grad_(), audio.to(dtype).requires_grad_()
    sums = head_sums(text, audio, text_target, audio_target)

    wanted, count = reference_sum(text.flatten(0, 1), text_target.flatten())
    assert float(sums.text_sum) == pytest.approx(wanted, rel=1e-5, abs=0)
    assert int(sums.text_count) == count
    for k in range(8):
        wanted, count = reference_sum(audio[:, k], audio_target[:, k])
        assert float(sums.codebook_sums[k]) == pytest.approx(wanted, rel=1e-5, abs=0)
        assert int(sums.codebook_counts[k]) == count
    # Also without a label the loss stays in the graph, so that every rank runs the same backward.
    scaled_loss(sums, torch.tensor(1.0), torch.ones(8)).backward()
    assert text.grad is not None and torch.isfinite(text.grad).all()
    assert audio.grad is not None and torch.isfinite(audio.grad).all()


def test_shift_asks_each_position_for_the_next():
    labels = torch.tensor([[-100, 5, 6, -100], [7, 8, 9, 1]])
    assert text_targets(labels).tolist() == [[5, 6, -100, -100], [8, 9, 1, -100]]
    codes = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, 4, -100, -100]])  # two clips, 3 and 2 frames
    assert audio_targets(codes).tolist() == [[1, -100], [2, 4], [-100, -100], [3, -100], [-100, -100]]


def test_split_and_scaled_is_the_whole_and_the_mean_of_means_is_not():
    """Two ranks with different counts: world_size × sums / global counts, averaged over ranks, is the loss itself."""
    weights = LossWeights.from_options(LossOptions(audio_loss_weight=2.0, codebook_weights=[1, 2, 3, 4, 5, 6, 7, 8]), 8)
    parts = [random_heads(seed=1, frames=5, length=10), random_heads(seed=2, frames=37, length=90)]
    sums = [head_sums(*part) for part in parts]
    text_count = float(sum(s.text_count for s in sums))
    book_counts = [float(c) for c in sum(s.codebook_counts for s in sums)]
    text_scale, scales = loss_scales(weights, text_count, book_counts, world_size=2)
    per_rank = [float(scaled_loss(s, text_scale, torch.tensor(scales))) for s in sums]
    losses = mean_losses(
        weights,
        float(sum(s.text_sum for s in sums)),
        text_count,
        [float(c) for c in sum(s.codebook_sums for s in sums)],
        book_counts,
    )
    assert sum(per_rank) / 2 == pytest.approx(losses["loss"], rel=1e-6)

    def own_mean(s):
        return mean_losses(
            weights, float(s.text_sum), float(s.text_count), s.codebook_sums.tolist(), s.codebook_counts.tolist()
        )["loss"]

    assert abs(sum(map(own_mean, sums)) / 2 - losses["loss"]) > 1e-3


def test_weights_sum_to_one_and_are_checked():
    assert LossWeights.from_options(LossOptions(), 8).codebooks == (0.125,) * 8
    assert LossWeights.from_options(LossOptions(codebook_weights=[2, 2]), 2).codebooks == (0.5, 0.5)
    with pytest.raises(ConfigError, match="3 weights for a model with 8 codebooks"):
        LossWeights.from_options(LossOptions(codebook_weights=[1, 1, 1]), 8)


def test_a_kind_without_labels_is_left_out():
    weights = LossWeights.from_options(LossOptions(), 2)
    assert mean_losses(weights, 0.0, 0, [2.0, 4.0], [1, 2]) == {
        "codebook_loss/0": 2.0,
        "codebook_loss/1": 2.0,
        "audio_loss": 2.0,
        "loss": 2.0,
    }
    assert loss_scales(weights, 0, [0, 0], 4) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("margin", [20.0, 60.0, 200.0])
@pytest.mark.parametrize("magnitude", [0.0, 30.0, 300.0])
def test_saturated_text_is_exactly_zero_and_its_margins_explain_it(margin, magnitude):
    logits = torch.full((1, 4, 1000), magnitude - margin)
    logits[..., 7] = magnitude
    logits[..., 9:] = -1000.0
    target = torch.full((1, 4), 7)
    sums = head_sums(logits, torch.zeros(0, 8, 1026), target, torch.full((0, 8), -100))
    assert float(sums.text_sum) == 0
    assert 0 <= float(sums.text_saturation) <= HONEST_ZERO_UNITS


def test_margins_do_not_explain_an_ordinary_loss():
    text, audio, text_target, audio_target = random_heads(scale=1.0)
    assert float(head_sums(text, audio, text_target, audio_target).text_saturation) > 1000 * HONEST_ZERO_UNITS
