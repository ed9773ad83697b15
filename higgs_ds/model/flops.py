"""Floating-point operations of a token, and the share of a card's peak that a run makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ..options.sections import TrainConfig
    from .spec import ModelSpec

# Dense bf16 (and fp16) FLOP/s by the name that torch.cuda.get_device_name gives, without "NVIDIA": from the makers'
# data sheets, whose larger figures are for sparse matrices. A name that is not here, a slice of a card among them
# ("… MIG 3g.40gb"), has no known peak.
PEAK_FLOPS = {
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A800-SXM4-80GB": 312e12,
    "A800 80GB PCIe": 312e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100 80GB HBM3": 989e12,  # SXM
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200 480GB": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def peak_flops(card: str, dtype: str) -> float | None:
    """Dense FLOP/s of a card by its full name, for "bf16" and "fp16"; None where it is not known."""
    return PEAK_FLOPS.get(card.removeprefix("NVIDIA ")) if dtype in ("bf16", "fp16") else None


def touched_parameters(spec: ModelSpec) -> int:
    """Weights of the decoder's projections that one token is multiplied with, text and audio alike.

    A token goes through one FFN of a layer, however many it has. Embedding, norms and heads are left out: the heads
    see labelled positions alone.
    """
    return spec.num_layers * sum(a * b for _, a, b in _projections(spec))


def flop_per_token(
    spec: ModelSpec,
    *,
    lora_rank: int,
    lora_targets: list[str],
    checkpoint_every: int,
    row_tokens: float,
) -> float:
    """FLOP of a training step for one token, forward and backward, as they are computed.

    A frozen weight costs 2 forward and 2 for its input's gradient (and 2 more where the forward is done again), a LoRA
    weight 2 more for its own gradient. Attention counts what its causal mask leaves, and its backward as two forwards.

    Args:
        lora_targets: as in `--lora_target_modules`.
        checkpoint_every: every N-th layer is recomputed, 0 for none.
        row_tokens: of the row that a token stands in, on average over the tokens: Σ tokens² / Σ tokens of the rows.
    """
    layers = spec.num_layers
    recomputed = -(-layers // checkpoint_every) / layers if checkpoint_every else 0.0
    forward = 2 * (1 + recomputed)
    names = {target.rsplit(".", 1)[-1] for target in lora_targets}
    lora = sum(lora_rank * (a + b) for name, a, b in _projections(spec) if name in names)
    # Scores and values: 2 FLOP each for a head's every dimension and every one of the row_tokens / 2 positions before.
    attention = 2 * spec.num_heads * spec.head_dim * row_tokens
    trained = layers * ((forward + 4) * lora + (3 + recomputed) * attention)
    return (forward + 2) * touched_parameters(spec) + trained


def _projections(spec) -> list[tuple[str, int, int]]:
    """(name, in, out) of the linear layers that a token goes through in one decoder layer."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    return [
        ("q_proj", hidden, queries),
        ("k_proj", hidden, keys),
        ("v_proj", hidden, keys),
        ("o_proj", queries, hidden),
        ("gate_proj", hidden, ffn),
        ("up_proj", hidden, ffn),
        ("down_proj", ffn, hidden),
    ]


@dataclass(frozen=True)
class Utilisation:
    """A run's speed as a share of the peak of all its cards."""

    flop_per_token: float
    peak_flops: float  # of all ranks together

    def mfu(self, tokens_per_sec: float) -> float:
        """Share of the peak, 0 to 1, at so many tokens a second over all ranks."""
        return tokens_per_sec * self.flop_per_token / self.peak_flops


def card_name(device: torch.device) -> str | None:
    """The full name of a GPU, as torch reports it; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def mean_row_tokens(tokens: np.ndarray) -> float:
    """Tokens of the row that a token stands in, on average over the tokens; `tokens` [rows]."""
    tokens = np.asarray(tokens, np.float64)
    return float((tokens**2).sum() / tokens.sum())


def utilisation(
    config: TrainConfig,
    spec: ModelSpec,
    *,
    lora_targets: list[str],
    tokens: np.ndarray | None,
    device: torch.device,
    world_size: int,
) -> Utilisation | None:
    """Of a run on cards like `device`; None where their peak is not known, or the rows' tokens [rows] are not."""
    card = card_name(device)
    peak = card and peak_flops(card, config.model.dtype)
    if not peak or tokens is None:
        return None
    cost = flop_per_token(
        spec,
        lora_rank=config.lora.lora_r,
        lora_targets=lora_targets,
        checkpoint_every=config.model.checkpoint_every,
        row_tokens=mean_row_tokens(tokens),
    )
    return Utilisation(cost, peak * world_size)
