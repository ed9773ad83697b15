"""Named metrics for JSONL and W&B, from all ranks' sums and counts."""

from __future__ import annotations

import math
import resource
import time

import torch

from ..guard import CHECKS
from ..loss import HEADLINES, LossWeights
from ..model.flops import Utilisation
from ..step_stats import RankStep, StepSums


class StepClock:
    """Times a step on this rank up to its exchange, which sends the time to the other ranks.

    A step's time lasts from reading its batches to its exchange, plus the previous step's update. So every second of
    the loop counts once, except logging, validation and saving.
    """

    def __init__(self):
        self._update_sec = 0.0
        self.begin()

    def begin(self) -> None:
        """Call before reading the step's batches."""
        self._began = self._exchanged = time.perf_counter()
        self.data_sec = 0.0

    def batches_read(self) -> None:
        """Call when the step's batches have been read."""
        self.data_sec = time.perf_counter() - self._began

    def step_sec(self) -> float:
        """Call at the exchange; returns the step's seconds. The time from here to `end` is its update."""
        now = time.perf_counter()
        took, self._update_sec = now - self._began + self._update_sec, 0.0
        self._exchanged = now
        return took

    def end(self) -> None:
        """Call after the update."""
        self._update_sec = time.perf_counter() - self._exchanged


class Window:
    """Sums over the optimizer steps since the last logged point.

    Losses are over all labels of the window, counts are sums; gradient norm, `perf/step_sec` and `perf/data_sec` are
    means over its steps. For a single step they equal that step's values exactly.
    """

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sums: list[StepSums] = []  # by rank
        self._grad_norms: list[float] = []
        self._step_sec = self._data_sec = self._peak_gib = self._reserved_gib = 0.0

    def add(self, ranks: list[RankStep], grad_norm: float) -> None:
        """Adds a trained step: seconds of the slowest rank, GiB of the rank with the highest peak memory."""
        new = [rank.sums for rank in ranks]
        self._sums = [StepSums.total(list(pair)) for pair in zip(self._sums, new, strict=True)] if self._sums else new
        self._grad_norms.append(grad_norm)
        self._step_sec += max(rank.step_sec for rank in ranks)
        self._data_sec += max(rank.data_sec for rank in ranks)
        self._peak_gib = max(self._peak_gib, *(rank.peak_gib for rank in ranks))
        self._reserved_gib = max(self._reserved_gib, *(rank.reserved_gib for rank in ranks))

    def take(
        self, weights: LossWeights, *, learning_rate: float, epoch: float, utilisation: Utilisation | None = None
    ) -> dict[str, float | list]:
        """Returns the window's metrics, with `learning_rate` and `epoch` of its last step, and empties it.

        `rank/<loss>` has one value per rank with 7 digits, None for a rank without labels. {} without steps.
        """
        if not self._sums:
            return {}
        total, steps = StepSums.total(self._sums), len(self._grad_norms)
        # fp16 skips steps with overflow by design; their norms must not make the mean infinite.
        norms = [norm for norm in self._grad_norms if math.isfinite(norm)] or self._grad_norms[-1:]
        tokens_per_sec = total.tokens / self._step_sec
        metrics: dict[str, float | list] = {f"train/{name}": loss for name, loss in total.losses(weights).items()}
        metrics |= {
            "train/learning_rate": learning_rate,
            "train/grad_norm": sum(norms) / len(norms),
            "train/epoch": epoch,
            "train/text_tokens": total.text_count,
            "train/audio_frames": total.audio_frames,
            "train/re_expanded_labels": total.re_expanded,
            "perf/tokens_per_sec": tokens_per_sec,
            "perf/step_sec": self._step_sec / steps,
            "perf/data_sec": self._data_sec / steps,
            "memory/peak_gib": self._peak_gib,
            "memory/reserved_gib": self._reserved_gib,
        }
        if utilisation is not None:
            metrics["perf/mfu"] = utilisation.mfu(tokens_per_sec)
        by_rank = [sums.losses(weights) for sums in self._sums]
        for name in HEADLINES:
            if any(name in losses for losses in by_rank):
                metrics[f"rank/{name}"] = [_seven_digits(losses.get(name)) for losses in by_rank]
        self._clear()
        return metrics


def _seven_digits(loss: float | None) -> float | None:
    """Rounds to float32's precision, which halves the length of a line with 64 ranks."""
    return None if loss is None else float(f"{loss:.7g}")


def guard_metrics(ranks: list[RankStep]) -> dict[str, float | list]:
    """Counts the guard's failed checks since the run began: in total, and by rank for each check that ever failed."""
    failed = {check: [int(rank.failed[i]) for rank in ranks] for i, check in enumerate(CHECKS)}
    metrics: dict[str, float | list] = {
        "guard/failed_checks": sum(map(sum, failed.values())),
        "guard/honest_zeros": sum(rank.honest_zeros for rank in ranks),
    }
    return metrics | {f"guard/{check}": counts for check, counts in failed.items() if any(counts)}


def peak_memory_gib(device: torch.device) -> float:
    """Returns this process's peak memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes


def reserved_memory_gib(device: torch.device) -> float:
    """Returns the peak GPU memory reserved by torch's allocator, including fragmentation; on the CPU as above."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_memory_gib(device)


def restart_peak_memory(device: torch.device) -> None:
    """Resets the peaks; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
