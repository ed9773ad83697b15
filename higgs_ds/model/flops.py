"""Floating-point operations per token, and model FLOPs utilisation (MFU) of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ..options.sections import TrainConfig
    from .spec import ModelSpec

# Dense bf16 and fp16 FLOP/s from data sheets (their larger figures are for sparse matrices), by
# torch.cuda.get_device_name without "NVIDIA". Other names, such as MIG slices, have no known peak.
PEAK_FLOPS = {
    "L4": 121e12,
    "A10": 125e12,
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
    """Dense FLOP/s of a card by its full name, for "bf16" and "fp16"; None if unknown."""
    return PEAK_FLOPS.get(card.removeprefix("NVIDIA ")) if dtype in ("bf16", "fp16") else None


def touched_parameters(spec: ModelSpec) -> int:
    """Number of decoder projection weights that a token is multiplied with, the same for text and audio.

    A token passes through one FFN per layer, however many there are. Embeddings, norms and heads are not counted; the
    heads see labelled positions only.
    """
    return spec.num_layers * sum(a * b for _, a, b in projections(spec))


def flop_per_token(
    spec: ModelSpec,
    *,
    lora_rank: int,
    lora_targets: list[str],
    checkpoint_every: int,
    row_tokens: float,
) -> float:
    """FLOP per token of a training step, forward and backward, as computed.

    A frozen weight costs 2 forward and 2 for its input's gradient (2 more if recomputed), a LoRA weight 2 more for its
    own gradient. Attention counts the unmasked half, and its backward as two forwards.

    Args:
        lora_targets: as in `--lora_target_modules`.
        checkpoint_every: every N-th layer is recomputed, 0 for none.
        row_tokens: length of a token's row, averaged over tokens: Σ tokens² / Σ tokens of the rows.
    """
    layers = spec.num_layers
    recomputed = -(-layers // checkpoint_every) / layers if checkpoint_every else 0.0
    forward = 2 * (1 + recomputed)
    names = {target.rsplit(".", 1)[-1] for target in lora_targets}
    lora = sum(lora_rank * (a + b) for name, a, b in projections(spec) if name in names)
    # Scores and values: 2 FLOP each per head dimension and for each of row_tokens / 2 earlier positions.
    attention = 2 * spec.num_heads * spec.head_dim * row_tokens
    trained = layers * ((forward + 4) * lora + (3 + recomputed) * attention)
    return (forward + 2) * touched_parameters(spec) + trained


def projections(spec) -> list[tuple[str, int, int]]:
    """(name, in, out) of the linear layers that a token passes in a decoder layer."""
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
    """FLOP per token and peak FLOP/s of a run."""

    flop_per_token: float
    peak_flops: float  # of all ranks together

    def mfu(self, tokens_per_sec: float) -> float:
        """Fraction of the peak at this many tokens per second over all ranks."""
        return tokens_per_sec * self.flop_per_token / self.peak_flops


def card_name(device: torch.device) -> str | None:
    """The full name of a GPU, as torch reports it; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def mean_row_tokens(tokens: np.ndarray) -> float:
    """Length of a token's row, averaged over tokens; `tokens` [rows]."""
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
    """Utilisation of a run on cards like `device`; None if their peak or the rows' `tokens` [rows] are unknown."""
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
