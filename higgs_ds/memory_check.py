"""The most expensive micro-batch of a run, forward and backward, before its first step.

Without this check a run that is too large ends in the step in which its longest rows happen to meet: hours later, and
after its first epochs.
"""

from __future__ import annotations

import torch

from .batching.collate import Batch
from .checkpoint import restore_rng, rng_state
from .distributed.engine import Engine, Ranks
from .errors import ExitCode, first_of
from .guard import batch_problems
from .model.spec import ModelSpec
from .options.sections import TrainConfig
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


def advice(config: TrainConfig, stage: int) -> str:
    """Options that would make a micro-batch smaller than it is with these, in words."""
    optim, model = config.optim, config.model
    if optim.max_tokens_per_batch is not None:
        changes = [f"a --max_tokens_per_batch below {optim.max_tokens_per_batch}"]
    elif optim.batch_size is not None and optim.batch_size > 1:
        changes = [f"a --batch_size below {optim.batch_size}"]
    else:
        changes = ["shorter rows (--max_duration_sec)"]
    if model.checkpoint_every != 1:
        changes.append("--activation_checkpointing full")
    if stage < 3 and model.base_dtype is None:
        changes += ["--base_dtype nf4", "--deepspeed_config ds_configs/zero3.json"]
    return ", or ".join(changes)


def measure(engine: Engine, ranks: Ranks, spec: ModelSpec, batch: Batch, config: TrainConfig) -> str | None:
    """One micro-batch forward and backward, of which nothing is kept: no gradient, no random draw, no peak of memory.

    Every rank must call this with the same batch; the engine's first step comes after it. A batch that the guard
    refuses is left to the guard. (Under fp16 the loss scaler counts a good step more than there were.)

    Returns what it took, as text; None where nothing was measured.

    Raises:
        DoesNotFitError: on the ranks that ran out of memory, which the `Watch` around it must tell the others.
    """
    if any(ranks.sum([any(True for _ in batch_problems(batch, spec))])):
        return None
    rng = rng_state(ranks.device)
    engine.train()
    found = _out_of_memory(engine, ranks.device, batch)
    if found is not None:
        raise DoesNotFitError(_message(batch, ranks, found, config, engine.stage))
    engine.drop_step()
    restore_rng({f"{ranks.rank}.{kind}": state for kind, state in rng.items()}, ranks, seed=0)
    peak = max(row[0] for row in ranks.table([peak_memory_gib(ranks.device)]))
    restart_peak_memory(ranks.device)
    took = f"{batch.num_tokens:,} tokens in {len(batch.origins)} rows, {peak:.1f} GiB at the most"
    if ranks.device.type == "cuda":
        took += f" of {torch.cuda.get_device_properties(ranks.device).total_memory / 2**30:.1f}"
    return f"memory check of the most expensive micro-batch: {took}"


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


def _message(batch: Batch, ranks: Ranks, found: str, config: TrainConfig, stage: int) -> str:
    return (
        f"the most expensive micro-batch does not fit into the memory of rank {ranks.rank} ({ranks.device}); nothing "
        f"was trained\n"
        f"  rows:   {', '.join(first_of(batch.origins, ROWS_SHOWN))}\n"
        f"  tokens: {batch.num_tokens:,}\n"
        f"  found:  {found}\n"
        f"  change: {advice(config, stage)}"
    )
