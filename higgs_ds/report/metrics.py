"""From every rank's sums and counts to the names that JSONL and W&B carry."""

from __future__ import annotations

import resource
import sys
import time

import torch

from ..guard import CHECKS
from ..loss import HEADLINES, LossWeights
from ..model.flops import Utilisation
from ..step_stats import RankStep, StepSums


class StepClock:
    """How long a step takes on this rank, so that one exchange before its update can carry it.

    A step's time is that up to its own exchange, from the reading of its batches on, and that of the update of the
    step before it: every second of the loop once, but for what is between steps (logging, validating, saving).
    """

    def __init__(self):
        self._update_sec = 0.0
        self.begin()

    def begin(self) -> None:
        """The step's batches are being read."""
        self._began = self._exchanged = time.perf_counter()
        self.data_sec = 0.0

    def batches_read(self) -> None:
        """The step's batches are there."""
        self.data_sec = time.perf_counter() - self._began

    def step_sec(self) -> float:
        """The step's seconds, at its exchange; what comes until `end` is its update."""
        now = time.perf_counter()
        took, self._update_sec = now - self._began + self._update_sec, 0.0
        self._exchanged = now
        return took

    def end(self) -> None:
        """The step is done."""
        self._update_sec = time.perf_counter() - self._exchanged


def step_metrics(
    ranks: list[RankStep],
    weights: LossWeights,
    *,
    learning_rate: float,
    grad_norm: float,
    epoch: float,
    utilisation: Utilisation | None = None,
) -> dict[str, float]:
    """The metrics of one optimizer step. Times are the slowest rank's, seconds; memory is the fullest rank's, GiB."""
    total = StepSums.total([rank.sums for rank in ranks])
    step_sec = max(rank.step_sec for rank in ranks)
    tokens_per_sec = total.tokens / step_sec
    metrics = {f"train/{name}": value for name, value in total.losses(weights).items()}
    metrics |= {
        "train/learning_rate": learning_rate,
        "train/grad_norm": grad_norm,
        "train/epoch": epoch,
        "train/text_tokens": total.text_count,
        "train/audio_frames": total.audio_frames,
        "train/re_expanded_labels": total.re_expanded,
        "perf/tokens_per_sec": tokens_per_sec,
        "perf/step_sec": step_sec,
        "perf/data_sec": max(rank.data_sec for rank in ranks),
        "memory/peak_gib": max(rank.peak_gib for rank in ranks),
        "memory/reserved_gib": max(rank.reserved_gib for rank in ranks),
    }
    if utilisation is not None:
        metrics["perf/mfu"] = utilisation.mfu(tokens_per_sec)
    for rank, part in enumerate(ranks):
        losses = part.sums.losses(weights)
        for name in HEADLINES:
            if name in losses:
                metrics[f"rank/{rank}/{name}"] = losses[name]
    return metrics


def guard_metrics(ranks: list[RankStep]) -> dict[str, float]:
    """What the guard has seen since the run began."""
    metrics = {"guard/honest_zeros": sum(rank.honest_zeros for rank in ranks)}
    for i, check in enumerate(CHECKS):
        for rank, part in enumerate(ranks):
            metrics[f"guard/{check}/rank_{rank}"] = part.failed[i]
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20 if sys.platform != "darwin" else kilobytes / 2**30


def reserved_memory_gib(device: torch.device) -> float:
    """Most memory that torch's allocator has taken from the GPU so far; beside what tensors took, the rest is gaps.

    Without a GPU there is no such thing, and this is `peak_memory_gib`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_memory_gib(device)


def restart_peak_memory(device: torch.device) -> None:
    """From here on "so far" begins anew, where it can: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
