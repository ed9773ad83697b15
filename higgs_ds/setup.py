"""Resolve a run's options for its checkpoint and number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import checkpoint, run_dir
from .batching import micro_batches
from .checkpoint import Checkpoint
from .distributed.agreement import check_same, patiently
from .distributed.ds_config import LayerSizes, ignored_keys, resolve
from .distributed.engine import check_config
from .distributed.rank_watch import Watch
from .distributed.ranks import NoWatch, Ranks
from .errors import ConfigError
from .loss import LossWeights
from .model.base import BaseCheckpoint
from .model.families import family_of, open_base
from .model.init_adapter import settle_lora
from .options.sections import TrainConfig


@dataclass
class Setup:
    """A run's resolved options, base checkpoint and starting point."""

    config: TrainConfig
    base: BaseCheckpoint
    ds_config: dict  # for `deepspeed.initialize`
    weights: LossWeights
    resumed: Checkpoint | None = None
    initial: dict[str, torch.Tensor] | None = None  # the weights of --init_adapter
    notes: list[str] = field(default_factory=list)  # lines to print once

    @property
    def output_dir(self) -> Path:
        return self.config.output_dir

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch, as resolved by `settle`."""
        return self.config.optim.batch_size or 1

    @property
    def padding_free(self) -> bool:
        return self.config.model.forward_impl == "padding_free"

    @property
    def first_step(self) -> int:
        return self.resumed.progress.step + 1 if self.resumed else 1


def open_setup(config: TrainConfig, ds_raw: dict, ranks: Ranks, watch: Watch | NoWatch) -> Setup:
    """Finds and checks the checkpoint to resume and the base, and resolves the options for them."""
    resumed, notes = find_together(config, ranks)
    if resumed is None and config.run.resume == "auto":
        ranks.each(lambda: run_dir.refuse_a_result(config.output_dir))
    watch.untimed("finding the base checkpoint")
    base, config = ranks.each(lambda: open_base_for(config))
    saved = resumed.progress.config if resumed else None
    config, initial = ranks.each(lambda: settle_lora(config, family_of(base), base.config, saved))
    setup = settle(config, ds_raw, base, ranks, resumed, [*notes, *base.notes])
    setup.initial = initial
    check_same(
        {f"--{name} (as resolved)": value for name, value in setup.config.as_dict().items()}
        | {f"{config.run.deepspeed_config}: {name}": value for name, value in setup.ds_config.items()}
        | {f"--base_ckpt: {name}": value for name, value in asdict(base.spec).items()},
        ranks,
    )
    return setup


def find_together(config: TrainConfig, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint found by rank 0, read by every rank from the same path, and notes on skipped ones.

    Rank 0 verifies the checksums; so does any rank that sees different files.

    Raises:
        ConfigError: on all ranks, naming those that cannot read it, or find another one there.
    """
    resume, output_dir = config.run.resume, config.output_dir
    if resume == "auto":
        _wait_for_the_newest(output_dir / "checkpoints", ranks)
    resumed, notes = ranks.on_main(lambda: checkpoint.find_checkpoint(resume, output_dir)) or (None, [])
    mine = (str(resumed.folder), resumed.seal, resumed.stamps) if resumed else None
    found, notes = ranks.gather((mine, notes))[0]
    if found is None:
        return None, notes
    folder, seal, stamps = found

    def read() -> Checkpoint:
        if resumed is not None:
            return resumed
        who = f"{ranks.named([0])} goes on from {folder}, {ranks.named([ranks.rank])} cannot: "
        # A network file system may show this host stale entries for a while.
        read_here = patiently(lambda: _read_or_why(Path(folder), stamps), lambda found: isinstance(found, Checkpoint))
        if isinstance(read_here, str):
            raise ConfigError([f"--resume: {who}{read_here}; all hosts must share that folder"])
        if read_here.seal != seal:
            raise ConfigError([f"--resume: {who}it holds another checkpoint there; all hosts must share that folder"])
        return read_here

    return ranks.each(read), notes


def _wait_for_the_newest(folder: Path, ranks: Ranks) -> None:
    """Waits until rank 0 sees the newest checkpoint seen by any rank; its host may have a stale directory listing.

    Raises:
        ConfigError: on all ranks, naming those that see a newer one.
    """

    def newest() -> int:
        return max(map(checkpoint.step_of, checkpoint.list_checkpoints(folder)), default=0)

    of_ranks = ranks.gather(newest())
    if max(of_ranks) > of_ranks[0]:
        seen = patiently(newest, lambda step: step >= max(of_ranks)) if ranks.is_main else 0
        of_ranks = ranks.gather(seen or newest())  # ask again: it may be gone by now
    ahead = [rank for rank, step in enumerate(of_ranks) if step > of_ranks[0]]
    if ahead:
        raise ConfigError(
            [
                f"--resume auto: {ranks.named(ahead)} sees checkpoints up to step {max(of_ranks)} in {folder}, "
                f"{ranks.named([0])} up to {of_ranks[0]}; all hosts must share that folder"
            ]
        )


def _read_or_why(folder: Path, proven: dict[str, tuple]) -> Checkpoint | str:
    try:
        return checkpoint.read_checkpoint(folder, proven)
    except ConfigError as error:
        return str(error).removeprefix("--resume: ")


def open_base_for(config: TrainConfig) -> tuple[BaseCheckpoint, TrainConfig]:
    """Opens the base checkpoint, refused if the run's forward does not support it; and the options with its codec."""
    base = open_base(config.model.base_ckpt, config.model.base_revision)
    if config.model.forward_impl == "padding_free":
        family_of(base).check_forward(base)
    if base.bundles_codec and not {"codec", "codec_revision"} & config.given:
        config = config.settled(**dict(zip(("codec", "codec_revision"), base.codec, strict=True)))
    return base, config


def settle(
    config: TrainConfig,
    ds_raw: dict,
    base: BaseCheckpoint,
    ranks: Ranks,
    resumed: Checkpoint | None = None,
    notes: Iterable[str] = (),
) -> Setup:
    """Resolves open options. Raises ConfigError for contradictions."""
    if config.lora.lora_r > base.spec.hidden_size:
        width = base.spec.hidden_size
        raise ConfigError([f"--lora_r: {config.lora.lora_r} is above {width}, the width of the model's layers"])
    if config.model.compile:
        from .model.compiler import check_compiler

        ranks.each(lambda: check_compiler(ranks.device.type))
    weights = LossWeights.from_options(config.loss, base.spec.num_codebooks)
    batch_size, max_tokens = micro_batches.settle_micro_batches(
        config.optim.batch_size,
        config.optim.max_tokens_per_batch,
        device_type=ranks.device.type,
        resumed=resumed.progress.config if resumed else None,
    )
    config = config.settled(batch_size=batch_size, max_tokens_per_batch=max_tokens)
    if resumed:
        accumulated = ranks.each(lambda: checkpoint.keep_global_batch(resumed, config, ranks.world_size))
        config = config.settled(grad_accum=accumulated)
    ds_config = resolve(
        ds_raw,
        config,
        world_size=ranks.world_size,
        on_cpu=ranks.device.type == "cpu",
        layer=LayerSizes.from_spec(base.spec),
    )
    check_config(ds_config, config.run.deepspeed_config)
    ignored = ignored_keys(ds_raw)
    if ignored:
        notes = [*notes, f"{config.run.deepspeed_config}: {', '.join(ignored)}: of no effect here, left out"]
    return Setup(config, base, ds_config, weights, resumed, notes=list(notes))
