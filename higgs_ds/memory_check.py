"""Run the most expensive micro-batch of a run, forward and backward, before its first step.

Otherwise a run that does not fit would end hours later, in the step with the longest rows.
"""

from __future__ import annotations

import torch

from .batching.collate import Batch
from .checkpoint import restore_rng, rng_state
from .distributed.engine import Engine
from .distributed.ranks import Ranks
from .errors import ExitCode, first_of
from .guard import batch_problems
from .model.spec import ModelSpec
from .options.sections import TrainConfig
from .report.metrics import peak_memory_gib, restart_peak_memory

# On a CPU the kernel kills a process that takes too much memory; there is no error to report.
CHECKED_ON = ("cuda",)
ROWS_SHOWN = 8


def is_wanted(device: torch.device, *, compiled: bool) -> bool:
    """True if a run on this device has a memory check.

    With `--compile` there always is one: compiling takes longer than the stall timeout of a step allows.
    """
    return compiled or device.type in CHECKED_ON


class DoesNotFitError(RuntimeError):
    """The most expensive micro-batch exceeds this rank's memory; all ranks end with `exit_code`, without traceback.

    Raised on this rank only: the others may be waiting in a collective.
    """

    exit_code = int(ExitCode.CONFIG)


def advice(config: TrainConfig, stage: int) -> str:
    """Names options that would reduce memory."""
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


def measure(
    engine: Engine, ranks: Ranks, spec: ModelSpec, batch: Batch, config: TrainConfig, predicted: str = ""
) -> str | None:
    """Runs one micro-batch forward and backward; gradients, random states and peak memory are reset afterwards.

    Every rank must call this with the same batch, before the engine's first step. A batch that the guard would refuse
    is skipped. (Under fp16 the loss scaler counts one good step too many.) `predicted` is added to the text.

    Returns:
        tokens, rows and peak memory as text; None if skipped.

    Raises:
        DoesNotFitError: on ranks that ran out of memory; the surrounding `Watch` tells the others.
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
    return f"memory check of the most expensive micro-batch: {took}{predicted}"


def _out_of_memory(engine: Engine, device: torch.device, batch: Batch) -> str | None:
    """The allocator's message if it ran out of memory."""
    try:
        # Scales of 0 make every gradient 0, at the same cost.
        no_scales = torch.zeros(engine.module.num_codebooks, device=device)
        loss, _, _ = engine.forward(batch.model_inputs(device), 0.0, no_scales)
        engine.backward(loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # torch.OutOfMemoryError is a subclass; cuBLAS and NCCL raise this one
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
