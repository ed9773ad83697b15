"""`python -m higgs_ds prepare`: everything that training would make of the clips before its first step, ahead of it.

Alone, or as several ranks under torchrun or the DeepSpeed launcher; DeepSpeed itself is not started.
"""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .config import ConfigError, TrainConfig, parse_args

# Ranks wait for the slowest; how long that takes says nothing about whether something hangs.
PATIENCE = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Alone:
    """What `load_rows` asks of ranks, for a process without others."""

    rank: int = 0
    world_size: int = 1
    is_main: bool = True

    def gather(self, value):
        return [value]

    def each(self, function):
        return function()


def main(argv: list[str]) -> int:
    """Encodes the clips and counts the tokens of the manifests; takes the flags of train_ds.py.

    Returns 0. Raises ConfigError for wrong flags and, without --skip_bad_rows, for rows that cannot be used.
    """
    config = parse_args(argv, may_lack=("output_dir",))
    if config.codes_cache is None and config.output_dir is None:
        raise ConfigError(["--codes_cache: is required here, or --output_dir, whose codes_cache is taken"])
    import torch
    import torch.distributed as dist

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    device = "cpu" if on_cpu else f"cuda:{local_rank}"
    if world_size == 1:
        _prepare(config, Alone(), device)
        return 0
    from .engine import Ranks

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        _prepare(config, Ranks(dist.get_rank(), world_size, local_rank, torch.device("cpu")), device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


def _prepare(config: TrainConfig, ranks, device: str) -> None:
    import numpy as np

    from . import model
    from .codec import load_codec
    from .codes import CodeCache
    from .collate import Collator
    from .lengths import LengthIndex
    from .rows import load_rows

    began = time.monotonic()
    say = partial(print, flush=True) if ranks.is_main else lambda *_, **__: None
    folder = Path(config.codes_cache or Path(config.output_dir) / "codes_cache")
    base_dir = ranks.each(lambda: model.locate_checkpoint(config.base_ckpt, config.base_revision))
    model_config = ranks.each(lambda: model.read_model_config(base_dir))
    codec = ranks.each(lambda: load_codec(config.codec, config.codec_revision, device=device, warn=say))
    tokenizer = ranks.each(lambda: model.load_tokenizer(base_dir))
    cache = ranks.each(lambda: CodeCache(folder, codec))
    sets = load_rows(
        [manifest for manifest in (config.train_manifest, config.val_manifest) if manifest],
        cache=cache,
        num_codebooks=model_config.audio_num_codebooks,
        codebook_size=model_config.audio_codebook_size,
        max_duration_sec=config.max_duration_sec,
        skip_bad_rows=config.skip_bad_rows,
        ranks=ranks,
        warn=say,
        lengths=LengthIndex(cache, tokenizer, Collator.of(model_config)),
        max_tokens=config.max_tokens_per_batch,
        outcome="the other rows are prepared (--skip_bad_rows leaves these out)",
    )
    codec.release()
    encoded = sum(ranks.gather(cache.encoded))
    if not ranks.is_main:
        return
    clips = np.unique(np.concatenate([rows.keys for rows in sets]), axis=0)
    frames = int(cache.frames_each(clips).sum())
    tokens = sum(int(rows.tokens.sum()) for rows in sets if rows)
    say(
        f"{folder}: {sum(map(len, sets)):,} rows, {len(clips):,} different clips of "
        f"{frames / codec.frame_rate / 3600:,.2f} hours, {frames * codec.num_codebooks * 2:,} bytes of codes, "
        f"{tokens:,} tokens; {encoded:,} clips were encoded now, the others were there "
        f"({time.monotonic() - began:.1f} s)"
    )
