"""From every rank's sums and counts to the names that JSONL and W&B carry."""

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
    """Times a step on this rank, so that one exchange before its update can carry it.

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


class Window:
    """The optimizer steps since the last logged point, which the next one covers: on every rank's sums and counts.

    Losses are those of all labels of the window, counts are summed; the gradient norm, `perf/step_sec` and
    `perf/data_sec` are means over its steps. Of one step alone they are that step's, to the bit.
    """

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sums: list[StepSums] = []  # by rank
        self._grad_norms: list[float] = []
        self._step_sec = self._data_sec = self._peak_gib = self._reserved_gib = 0.0

    def add(self, ranks: list[RankStep], grad_norm: float) -> None:
        """One step that was trained. Its times are the slowest rank's, seconds; memory is the fullest rank's, GiB."""
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
        """The window's metrics, `learning_rate` and `epoch` of its last step among them; then it is empty.

        `rank/<loss>` has a value a rank, 7 digits of it, None where a rank had no such label. Without a step: {}.
        """
        if not self._sums:
            return {}
        total, steps = StepSums.total(self._sums), len(self._grad_norms)
        # fp16 drops steps whose gradient overflows, by design: one of them hides no other's norm.
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
    """As much as float32 holds, in which the loss was summed: half the text of a line of 64 ranks."""
    return None if loss is None else float(f"{loss:.7g}")


def guard_metrics(ranks: list[RankStep]) -> dict[str, float | list]:
    """Counts of what the guards of all ranks have seen since the run began.

    Their failed checks together, 0 where every loss on every rank was real, and by rank those that ever failed.
    """
    failed = {check: [int(rank.failed[i]) for rank in ranks] for i, check in enumerate(CHECKS)}
    metrics: dict[str, float | list] = {
        "guard/failed_checks": sum(map(sum, failed.values())),
        "guard/honest_zeros": sum(rank.honest_zeros for rank in ranks),
    }
    return metrics | {f"guard/{check}": counts for check, counts in failed.items() if any(counts)}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes


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
