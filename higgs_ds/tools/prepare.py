"""`python -m higgs_ds prepare`: encodes the clips and counts the tokens in advance of training.

Runs as a single process, or as several ranks under torchrun or the DeepSpeed launcher, but without DeepSpeed itself.
"""

from __future__ import annotations

import datetime
import os
import time

from ..distributed.ranks import NoWatch, Ranks
from ..errors import ConfigError, ExitCode
from ..options.parse import parse_args
from ..options.sections import TrainConfig
from ..process import say

# Timeout of collectives: ranks may wait hours for the slowest.
PATIENCE = datetime.timedelta(days=2)


def main(argv: list[str]) -> int:
    """Encodes the clips and counts the tokens of the manifests; takes the flags of train_ds.py.

    Returns 0. Raises ConfigError for wrong flags, if there is no usable GPU and DS_ACCELERATOR is not cpu, and for
    faulty rows without --skip_bad_rows.
    """
    config = parse_args(argv, may_lack=("output_dir",), prog="python -m higgs_ds prepare")
    if config.data.codes_cache is None and config.run.output_dir is None:
        raise ConfigError(["--codes_cache: is required, or --output_dir to use its codes_cache folder"])
    from ..distributed.device import name_accelerator

    device = name_accelerator()
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        say(_prepare(config, Ranks(), str(device)))
        return ExitCode.OK
    from ..distributed.engine import leave_ranks
    from ..distributed.rendezvous import meet

    met = meet(on_cpu=True)
    dist.init_process_group("gloo", store=met.store, rank=met.rank, world_size=met.world_size, timeout=PATIENCE)
    try:
        ranks = Ranks(met.rank, met.world_size, int(os.environ.get("LOCAL_RANK", "0")), torch.device("cpu"), met.hosts)
        done = _prepare(config, ranks, str(device))
    except BaseException:
        dist.destroy_process_group()
        raise
    return leave_ranks(ExitCode.OK, done)


def _prepare(config: TrainConfig, ranks: Ranks, device: str) -> str:
    """Encodes and counts; returns a summary on rank 0, "" on others."""
    import numpy as np

    from ..batching.collate import Collator
    from ..distributed.agreement import check_shared
    from ..load_data import codes_folder, load_corpus
    from ..setup import open_base_for

    began = time.monotonic()
    check_shared({"--codes_cache": codes_folder(config)}, ranks)
    base, config = ranks.each(lambda: open_base_for(config))
    if base.notes:
        ranks.say("\n".join(base.notes))
    corpus = load_corpus(
        config,
        base,
        ranks,
        NoWatch(),
        device=device,
        collator=Collator(base.spec),
        count_tokens=True,
        outcome="the other rows are prepared (--skip_bad_rows skips these)",
    )
    cache, codec, sets = corpus.cache, corpus.codec, (corpus.train_rows, corpus.val_rows)
    encoded = sum(ranks.gather(cache.encoded))
    if not ranks.is_main:
        return ""
    clips = np.unique(np.concatenate([rows.keys for rows in sets]), axis=0)
    frames = int(cache.frames_each(clips).sum())
    tokens = sum(int(rows.tokens.sum()) for rows in sets if rows.tokens is not None)
    return (
        f"{codes_folder(config)}: {sum(map(len, sets)):,} rows, {len(clips):,} different clips of "
        f"{frames / codec.frame_rate / 3600:,.2f} hours, {frames * codec.num_codebooks * 2:,} bytes of codes, "
        f"{tokens:,} tokens; {encoded:,} clips encoded now, the others were cached "
        f"({time.monotonic() - began:.1f} s)"
    )
