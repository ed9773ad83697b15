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

from .config import TrainConfig
from .errors import ConfigError
from .parse import parse_args

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

    Returns 0. Raises ConfigError for wrong flags, for no usable GPU unless DS_ACCELERATOR=cpu, and, without
    --skip_bad_rows, for rows that cannot be used.
    """
    config = parse_args(argv, may_lack=("output_dir",))
    if config.data.codes_cache is None and config.run.output_dir is None:
        raise ConfigError(["--codes_cache: is required here, or --output_dir, whose codes_cache is taken"])
    from .distributed.device import pick_device

    device = pick_device()
    import torch
    import torch.distributed as dist

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size == 1:
        _prepare(config, Alone(), str(device))
        return 0
    from .distributed.engine import Ranks

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        _prepare(config, Ranks(dist.get_rank(), world_size, local_rank, torch.device("cpu")), str(device))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


def _prepare(config: TrainConfig, ranks, device: str) -> None:
    import numpy as np

    from .batching.collate import Collator
    from .batching.token_counts import LengthIndex
    from .codec.base import load_codec
    from .corpus.code_cache import CodeCache
    from .corpus.rows import load_rows
    from .model import base as model
    from .model.padding_free import check_supported

    began = time.monotonic()
    say = partial(print, flush=True) if ranks.is_main else lambda *_, **__: None
    folder = Path(config.data.codes_cache or Path(config.run.output_dir) / "codes_cache")
    base = ranks.each(lambda: model.open_base(config.model.base_ckpt, config.model.base_revision))
    model_config, tokenizer = base.config, base.tokenizer
    if config.model.forward_impl == "padding_free":
        ranks.each(lambda: check_supported(model_config))
    if base.notes:
        say("\n".join(base.notes))
    codec = ranks.each(lambda: load_codec(config.data.codec, config.data.codec_revision, device=device, warn=say))
    cache = ranks.each(lambda: CodeCache(folder, codec))
    sets = load_rows(
        [manifest for manifest in (config.data.train_manifest, config.data.val_manifest) if manifest],
        cache=cache,
        num_codebooks=model_config.audio_num_codebooks,
        codebook_size=model_config.audio_codebook_size,
        max_duration_sec=config.data.max_duration_sec,
        skip_bad_rows=config.data.skip_bad_rows,
        ranks=ranks,
        warn=say,
        lengths=LengthIndex(cache, tokenizer, Collator.of(model_config)),
        max_tokens=config.optim.max_tokens_per_batch,
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
