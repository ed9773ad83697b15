"""The default size of micro-batches, and a note where they are too small for a GPU."""

from __future__ import annotations

# What 80 GB hold of the real model with room to spare; see docs/performance.md.
TOKENS_ON_GPU = 16_384
# A micro-batch is some 6,900 kernels. Below so many tokens a GPU is done with them before the CPU has launched the
# next ones.
LAUNCH_BOUND_TOKENS = 8_000


def settle_micro_batches(
    batch_size: int | None, max_tokens: int | None, *, device_type: str, resumed: dict | None = None
) -> tuple[int, int | None]:
    """(`batch_size`, `max_tokens_per_batch`) of a run, from its flags and YAML, or the options that it had before.

    A new run without either is cut by tokens on a GPU and by single rows on a CPU. Beside a token budget the batch size
    is 1 and means nothing.
    """
    if batch_size is None and max_tokens is None:
        if resumed is not None:
            return resumed.get("batch_size") or 1, resumed.get("max_tokens_per_batch")
        max_tokens = TOKENS_ON_GPU if device_type == "cuda" else None
    return batch_size or 1, max_tokens


def launch_bound_note(
    mean_tokens: float | None, *, device_type: str, batch_size: int | None, max_tokens: int | None, grad_accum: int
) -> str | None:
    """A sentence for a run on a GPU whose micro-batches hold too few tokens, on average over the plan; else None."""
    if device_type != "cuda" or mean_tokens is None or mean_tokens >= LAUNCH_BOUND_TOKENS:
        return None
    if max_tokens is None:
        change = f"--max_tokens_per_batch {TOKENS_ON_GPU} instead of --batch_size {batch_size}"
    elif max_tokens < TOKENS_ON_GPU:
        change = f"a larger --max_tokens_per_batch than {max_tokens}"
    elif grad_accum > 1:
        change = f"a smaller --grad_accum than {grad_accum}: the rows do not fill so many micro-batches"
    else:
        change = "fewer GPUs: the rows do not fill a micro-batch on each"
    return (
        f"micro-batches hold {mean_tokens:,.0f} tokens on average; below about {LAUNCH_BOUND_TOKENS:,} a GPU waits for "
        f"the CPU that launches its kernels. Faster with {change}"
    )
