"""The most expensive micro-batch of a run, forward and backward, before its first step: does the run fit on its GPUs?

Without it a run ends in the step in which its longest rows happen to meet: hours later, and after its first epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .batching.collate import Batch
from .checkpoint import restore_rng, rng_state
from .distributed.engine import Engine, Ranks
from .errors import ExitCode
from .guard import Guard
from .report.metrics import peak_memory_gib, restart_peak_memory

# On a CPU memory is the machine's, and what is too much for it is killed without an error that could be named.
CHECKED_ON = ("cuda",)
ROWS_SHOWN = 8


def is_wanted(device: torch.device, *, compiled: bool) -> bool:
    """True if a run on this device has a memory check, with `--compile` or without.

    Compiling takes longer than a rank may stand still in a step, so that it is done here, whatever the device.
    """
    return compiled or device.type in CHECKED_ON


class DoesNotFitError(RuntimeError):
    """The most expensive micro-batch is more than this rank's memory; all ranks end with `exit_code`, no traceback.

    A rank of its own: others may have fitted, or stand in a collective and wait for this one.
    """

    exit_code = int(ExitCode.CONFIG)


@dataclass(frozen=True)
class Advice:
    """The settings that decide how much memory a micro-batch takes, as they are."""

    batch_size: int | None
    max_tokens: int | None
    checkpoint_every: int
    stage: int
    quantized: bool = False  # the base

    def __str__(self) -> str:
        if self.max_tokens is not None:
            changes = [f"a --max_tokens_per_batch below {self.max_tokens}"]
        elif self.batch_size is not None and self.batch_size > 1:
            changes = [f"a --batch_size below {self.batch_size}"]
        else:
            changes = ["shorter rows (--max_duration_sec)"]
        if self.checkpoint_every != 1:
            changes.append("--activation_checkpointing full")
        if self.stage < 3 and not self.quantized:
            changes += ["--base_dtype nf4", "--deepspeed_config ds_configs/zero3.json"]
        return ", or ".join(changes)


def measure(engine: Engine, ranks: Ranks, guard: Guard, batch: Batch, advice: Advice) -> str | None:
    """One micro-batch forward and backward, of which nothing is kept: no gradient, no random draw, no peak of memory.

    Every rank must call this with the same batch; the engine's first step comes after it. A batch that the guard
    refuses is left to the guard. (Under fp16 the loss scaler counts a good step more than there were.)

    Returns what it took, as text; None where nothing was measured.

    Raises:
        DoesNotFitError: on the ranks that ran out of memory, which the `Watch` around it must tell the others.
    """
    seen = guard.failed.copy()
    refused = any(ranks.sum([len(guard.check_batch(batch, 0, 0))]))
    guard.failed = seen  # it will be counted where it is trained on
    if refused:
        return None
    rng = rng_state(ranks.device)
    engine.train()
    found = _out_of_memory(engine, ranks.device, batch)
    if found is not None:
        raise DoesNotFitError(_message(batch, ranks, found, advice))
    engine.drop_step()
    restore_rng({f"{ranks.rank}.{kind}": state for kind, state in rng.items()}, ranks, seed=0)
    peak = max(row[0] for row in ranks.table([peak_memory_gib(ranks.device)]))
    restart_peak_memory(ranks.device)
    return (
        f"memory check of the most expensive micro-batch: {batch.num_tokens:,} tokens in {len(batch.origins)} rows, "
        f"{peak:.1f} GiB at the most" + _of_all(ranks.device)
    )


def _out_of_memory(engine: Engine, device: torch.device, batch: Batch) -> str | None:
    """The allocator's words if it had no more."""
    try:
        # Scales of 0 make every gradient 0, at the same cost.
        no_scales = torch.zeros(engine.module.num_codebooks, device=device)
        loss, _, _ = engine.forward(batch.model_inputs(device), 0.0, no_scales)
        engine.backward(loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; cuBLAS and NCCL have none of their own
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            word in text for word in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
        ):
            raise
        return " ".join(text.split(" If reserved but unallocated")[0].split())
    return None


def _message(batch: Batch, ranks: Ranks, found: str, advice: Advice) -> str:
    rows = ", ".join(batch.origins[:ROWS_SHOWN])
    if len(batch.origins) > ROWS_SHOWN:
        rows += f", … and {len(batch.origins) - ROWS_SHOWN} more"
    return (
        f"the most expensive micro-batch does not fit into the memory of rank {ranks.rank} ({ranks.device}); nothing "
        f"was trained\n"
        f"  rows:   {rows}\n"
        f"  tokens: {batch.num_tokens:,}\n"
        f"  found:  {found}\n"
        f"  change: {advice}"
    )


def _of_all(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}"
