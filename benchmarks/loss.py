"""The fused dual-head loss against upstream's way, at the real heads' size: time, memory, value.

Upstream's way: the text head on every position, the audio head on every audio row, cross-entropy over both, autograd.
Here 5 % of 1,024 positions have a text label and all others are audio rows with a label in each of 8 codebooks.

usage: python benchmarks/loss.py [--positions 1024] [--repeats 3] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import interleaved, measuring_device, report
from higgs_ds.loss import IGNORE
from higgs_ds.model.fused_head import FusedHead, LabelledRows

HIDDEN, VOCABULARY, CODEBOOKS, CLASSES = 3072, 128256, 8, 1026
LABELLED = 0.05
BARS = {"fp32 times as fast": 6.0, "bf16 times as fast": 25.0, "extra memory, GB": 0.2, "value, relative": 1e-6}


def products(text_rows: int, audio_rows: int) -> float:
    """TFLOP of the matrix products, forward and backward, with both heads frozen: what the speed can be at most."""
    return 4e-12 * HIDDEN * (text_rows * VOCABULARY + audio_rows * CODEBOOKS * CLASSES)


class Heads:
    """Both heads, one batch of hidden states and its labels, in one dtype."""

    def __init__(self, positions: int, dtype: torch.dtype, device: str):
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(positions, HIDDEN, generator=draw).to(device, dtype).requires_grad_()
        self.text_head = self._head(VOCABULARY, dtype, device, draw)
        self.audio_head = self._head(CODEBOOKS * CLASSES, dtype, device, draw)
        order = torch.randperm(positions, generator=draw)
        count = round(LABELLED * positions)
        self.text_rows, self.audio_rows = (part.sort().values.to(device) for part in (order[:count], order[count:]))
        targets = torch.full((positions,), IGNORE)
        targets[order[:count]] = torch.randint(0, VOCABULARY, (count,), generator=draw)
        self.text_targets = targets.to(device)
        self.labelled_targets = self.text_targets.index_select(0, self.text_rows)[:, None]
        self.audio_targets = torch.randint(0, CLASSES, (positions - count, CODEBOOKS), generator=draw).to(device)
        self.text_scale = torch.full((1,), 1 / count, device=device)
        self.audio_scales = torch.full((CODEBOOKS,), 1 / CODEBOOKS / (positions - count), device=device)

    @staticmethod
    def _head(classes: int, dtype: torch.dtype, device: str, draw: torch.Generator) -> FusedHead:
        with torch.device("meta"):
            head = torch.nn.Linear(HIDDEN, classes, bias=False)
        weight = torch.empty(classes, HIDDEN).normal_(0, 0.02, generator=draw)
        head.weight = torch.nn.Parameter(weight.to(device, dtype), requires_grad=False)
        FusedHead.adopt(head)
        return head

    def naive(self) -> torch.Tensor:
        """Loss, with the gradient in `hidden.grad`."""
        self.hidden.grad = None
        text = F.cross_entropy(
            self.text_head(self.hidden).float(), self.text_targets, ignore_index=IGNORE, reduction="sum"
        )
        logits = self.audio_head(self.hidden.index_select(0, self.audio_rows)).view(-1, CODEBOOKS, CLASSES)
        losses = F.cross_entropy(logits.float().flatten(0, 1), self.audio_targets.flatten(), reduction="none")
        loss = self.text_scale[0] * text + (losses.view(-1, CODEBOOKS).sum(0) * self.audio_scales).sum()
        loss.backward()
        return loss.detach()

    def fused(self) -> torch.Tensor:
        """The same by the fused heads."""
        self.hidden.grad = None
        rows = self.hidden.index_select(0, self.text_rows)
        (text,) = self.text_head(LabelledRows(rows, self.labelled_targets, self.text_scale))
        rows = self.hidden.index_select(0, self.audio_rows)
        (audio,) = self.audio_head(LabelledRows(rows, self.audio_targets, self.audio_scales))
        loss = text.loss + audio.loss
        loss.backward()
        return loss.detach()


def give_back_freed_memory() -> None:
    """To the system, so that what a run takes again is seen in the resident size."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def extra_memory(run) -> float:
    """Peak memory while `run` runs, above what was held before, GB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    resident = Path("/proc/self/statm")
    give_back_freed_memory()

    def held() -> int:
        return int(resident.read_text().split()[1]) * 4096

    done, before = threading.Event(), held()
    peak = [before]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], held())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (peak[0] - before) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = str(measuring_device())
    rows, figures = [], {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        heads = Heads(args.positions, dtype, device)
        seconds = interleaved({"naive": heads.naive, "fused": heads.fused}, args.repeats)
        wanted, theirs = heads.naive(), heads.hidden.grad.double()
        found, ours = heads.fused(), heads.hidden.grad.double()
        memory = {"naive": extra_memory(heads.naive), "fused": extra_memory(heads.fused)}
        away = {
            "value": abs(float(found) - float(wanted)) / abs(float(wanted)),
            "gradient": float((ours - theirs).norm() / theirs.norm()),
        }
        for kind in ("naive", "fused"):
            rows.append(
                {
                    "dtype": name,
                    "loss": kind,
                    "products, TFLOP": products(
                        args.positions if kind == "naive" else len(heads.text_rows), len(heads.audio_rows)
                    ),
                    "seconds": seconds[kind],
                    "times as fast": seconds["naive"] / seconds[kind],
                    "extra memory, GB": memory[kind],
                    "value, relative": away["value"] if kind == "fused" else 0.0,
                    "gradient, relative": away["gradient"] if kind == "fused" else 0.0,
                }
            )
        figures[f"{name} times as fast"] = seconds["naive"] / seconds["fused"]
        figures["extra memory, GB"] = max(figures.get("extra memory, GB", 0.0), memory["fused"])
        if name == "fp32":
            figures["value, relative"] = away["value"]
        del heads
    holds = all(figures[name] >= bar if name.endswith("fast") else figures[name] <= bar for name, bar in BARS.items())
    report(
        f"fused dual-head loss, {args.positions} positions, forward and backward",
        rows,
        figure=figures,
        bar=BARS,
        holds=holds,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
