"""From manifests to the batches of each optimizer step."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import checkpoint, memory_check, schedule
from .batching.batch_plan import MicroBatch, Plan, StepPlan, evaluation_plans, make_plan, total_steps
from .batching.collate import Batch, Collator
from .batching.loader import MicroBatches, load_steps
from .batching.mixture import Mixture, rows_taken
from .batching.references import References
from .batching.shared_memory import check_shared_memory
from .batching.token_counts import LengthIndex
from .codec.base import Codec, check_fits
from .codec.boson import BosonCodec
from .codec.load import load_codec
from .data.chatml import Row
from .data.code_cache import CodeCache
from .data.controls import control_tokens
from .data.portions import names_of, portions_of
from .data.row_set import RowSet
from .data.rows import RowOptions, load_rows
from .distributed.agreement import check_same, made_once
from .distributed.rank_watch import Watch
from .distributed.ranks import NoWatch, Ranks
from .model.base import BaseCheckpoint
from .model.voice_record import base_detail
from .options.sections import TrainConfig
from .report.cards import prompt_details
from .setup import Setup

SHOWN_CHARACTERS = 4000  # of a prompt

# Steps with their batches, in a context that ends the worker processes.
LoadedSteps = AbstractContextManager[Iterator[tuple[StepPlan, list[Batch]]]]


def codes_folder(config: TrainConfig) -> Path:
    """The cache folder of encoded clips."""
    return Path(config.data.codes_cache or config.output_dir / "codes_cache")


@dataclass
class Corpus:
    """Usable rows, and the cache of their clips' codes."""

    train_rows: RowSet
    val_rows: RowSet
    cache: CodeCache
    codec: Codec


def load_corpus(
    config: TrainConfig,
    base: BaseCheckpoint,
    ranks: Ranks,
    watch: Watch | NoWatch,
    *,
    device: str,
    collator: Collator,
    count_tokens: bool,
    outcome: str,
) -> Corpus:
    """Checks every row and encodes every clip before the model is loaded, then frees the codec's memory.

    Args:
        device: device for encoding.
        count_tokens: count the tokens of each row.
        outcome: last line after a list of faults.
    """
    data, spec = config.data, base.spec
    watch.untimed("opening the codec")
    codec = ranks.each(lambda: load_codec(data.codec, data.codec_revision, device=device))
    _agree_on_fingerprint(codec, ranks)
    check_fits(codec, spec.num_codebooks, spec.codebook_size)
    cache = ranks.each(lambda: CodeCache(codes_folder(config), codec))
    watch.at(0, "reading manifests, encoding clips")
    options = RowOptions(
        max_duration_sec=data.max_duration_sec,
        skip_bad_rows=data.skip_bad_rows,
        count_tokens=count_tokens,
        max_tokens=config.optim.max_tokens_per_batch,
        max_row_tokens=min(data.max_row_tokens, spec.max_positions),
        audio_root=data.audio_root,
        channel=data.channel,
        audio_track=data.audio_track,
        controls=control_tokens(base.tokenizer),
        prompt_style=data.prompt_style,
        problem_of=lambda row: spec.problem_of(row.messages, row.start_index),
        faults_dir=Path(config.run.output_dir or codes_folder(config)),
        outcome=outcome,
    )
    train = [portion.path for portion in data.portions]
    train_rows, val_rows = load_rows(
        [*train, *([data.val_manifest] if data.val_manifest else [])],
        options,
        trained=len(train),
        cache=cache,
        ranks=ranks,
        lengths=LengthIndex(cache, base.tokenizer, collator),
        on_progress=watch.progressed,
    )
    codec.release()
    return Corpus(train_rows, val_rows, cache, codec)


def _agree_on_fingerprint(codec: Codec, ranks: Ranks) -> None:
    """Compares the codec's fingerprint across ranks; hashing Boson's 0.8 GB is done once per shared file system.

    Raises:
        ConfigError: on all ranks, naming those with another codec.
    """
    # Equal stamps mean shared files.
    same_for: object = codec.files if isinstance(codec, BosonCodec) else codec.fingerprint
    fingerprint = made_once(same_for, lambda: codec.fingerprint, ranks)
    if isinstance(codec, BosonCodec):
        codec.fingerprint = fingerprint
    check_same({"--codec, by its content": fingerprint}, ranks)


@dataclass
class Data:
    """Rows and their order of training; batches are built on demand."""

    corpus: Corpus
    plan: Plan
    total_steps: int
    setup: Setup
    collator: Collator
    ranks: Ranks
    references: References | None = None  # of the training rows

    def dataset(self, rows: RowSet) -> MicroBatches:
        """Micro-batches of these rows, by index."""
        references = self.references if rows is self.corpus.train_rows else None
        return MicroBatches(rows, self.setup.base.tokenizer, self.corpus.cache, self.collator, references)

    def steps(self, first_step: int, last_step: int) -> LoadedSteps:
        """This rank's batches of the optimizer steps `first_step`…`last_step`, both included."""
        return self._load(self.corpus.train_rows, self.plan.steps(self.ranks.rank, first_step, last_step))

    def validation(self) -> LoadedSteps:
        """This rank's share of the validation rows; every rank has the same number of batches."""
        rows, optim = self.corpus.val_rows, self.setup.config.optim
        plans = evaluation_plans(
            len(rows),
            self.setup.batch_size,
            self.ranks.rank,
            self.ranks.world_size,
            tokens=rows.tokens,
            max_tokens=optim.max_tokens_per_batch,
            round_to=_round_to(self.setup, self.collator),
        )
        return self._load(rows, plans)

    def details(self) -> dict[str, object]:
        """Rows of an adapter's card on its training data."""
        rows = self.corpus.train_rows
        style = {"prompt style": self.setup.config.data.prompt_style}
        rate = self.setup.config.data.reference_rate
        drawn = {} if rate is None else {"reference rate": f"{rate:g}"}
        manifests = {f"manifest {name}".replace("|", "/"): text for name, text in self.plan.mixture.lines().items()}
        counts = {"rows": len(rows), **manifests, "optimizer steps": self.total_steps}
        base = base_detail(self.setup.config.model.base_dtype)
        return {**counts, **style, **prompt_details(rows), **drawn, **base}

    def any_inputs(self) -> dict:
        """Model inputs of some micro-batch, on this rank's device."""
        batch = self.dataset(self.corpus.train_rows)[MicroBatch((0,))]
        return batch.model_inputs(self.ranks.device)

    def _load(self, rows: RowSet, plans: Iterable[StepPlan]) -> LoadedSteps:
        num_workers = self.setup.config.data.num_workers
        on_gpu = self.ranks.device.type == "cuda"
        return load_steps(self.dataset(rows), plans, num_workers=num_workers, pin_memory=on_gpu)


def load_data(setup: Setup, ranks: Ranks, watch: Watch | NoWatch, *, only_one_step: bool = False) -> Data:
    """Checks every row, encodes every clip and plans all optimizer steps.

    Raises:
        ConfigError: bad rows (without --skip_bad_rows), or too little shared memory for the data workers.
    """
    config, base = setup.config, setup.base
    collator = Collator(base.spec, with_index=setup.padding_free)
    corpus = load_corpus(
        config,
        base,
        ranks,
        watch,
        device=str(ranks.device),
        collator=collator,
        count_tokens=bool(config.optim.max_tokens_per_batch)
        or config.data.reference_rate is not None
        or memory_check.is_wanted(ranks.device, compiled=config.model.compile),
        outcome="nothing was trained (--skip_bad_rows trains without them)",
    )
    rows = corpus.train_rows
    references = _references(setup, rows)
    if only_one_step:
        ranks.say("\n".join([*rows.summary, *corpus.val_rows.summary]))
        ranks.say(shown_prompt(rows[0], setup.base))
    portions = config.data.portions
    mixture = Mixture(
        rows.counts,
        [portion.weight for portion in portions],
        seed=config.optim.seed,
        tokens=rows.tokens if config.optim.max_tokens_per_batch else None,
        names=names_of(portions),
    )
    plan = make_plan(
        len(rows),
        rows.tokens,
        mixture=mixture,
        batch_size=setup.batch_size,
        max_tokens=config.optim.max_tokens_per_batch,
        grad_accum=config.optim.grad_accum,
        world_size=ranks.world_size,
        seed=config.optim.seed,
        round_to=_round_to(setup, collator),
    )
    total_steps = setup.first_step if only_one_step else plan.total_steps(config.optim.epochs, config.optim.max_steps)
    data = Data(corpus, plan, total_steps, setup, collator, ranks, references)
    _say_how_it_begins(setup, data, ranks)
    host = socket.gethostname()
    check_memory = partial(
        check_shared_memory,
        data.dataset(rows),
        num_workers=config.data.num_workers * (2 if corpus.val_rows else 1),
        batch_size=setup.batch_size,
        max_tokens=config.optim.max_tokens_per_batch,
        kept=0 if ranks.device.type == "cuda" else config.optim.grad_accum,
        ranks_here=ranks.gather(host).count(host),
    )
    ranks.each(check_memory)
    return data


def _round_to(setup: Setup, collator: Collator) -> int:
    """The multiple to which the forward pads the longest row of a micro-batch."""
    return 1 if setup.padding_free else collator.round_to


def shown_prompt(row: Row, base: BaseCheckpoint) -> str:
    """A row's tokens decoded to text, with special tokens; the trained answer is at the end."""
    input_ids, _, _ = base.spec.tokenize(row.messages, row.start_index, base.tokenizer)
    text = base.tokenizer.decode(input_ids, clean_up_tokenization_spaces=False)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}… ({len(text) - SHOWN_CHARACTERS:,} more characters)"
    return f"the first row's prompt ({row.origin}):\n{text}"


def _references(setup: Setup, rows: RowSet) -> References | None:
    """The draw of reference clips, if there is one; `rows.tokens` then become upper bounds."""
    config, base = setup.config, setup.base
    if config.data.reference_rate is None:
        return None
    limits = (config.optim.max_tokens_per_batch, config.data.max_row_tokens, base.spec.max_positions)
    references = References(
        rows,
        rate=config.data.reference_rate,
        seed=config.optim.seed,
        max_tokens=min(limit for limit in limits if limit is not None),
        tokenize=lambda turns: base.spec.tokenize(turns, None, base.tokenizer)[0],
    )
    rows.tokens = references.longest
    return references


def _say_how_it_begins(setup: Setup, data: Data, ranks: Ranks) -> None:
    rows = data.corpus.train_rows
    changed = checkpoint.changed_settings(setup.resumed, setup.config.as_dict(), len(rows), rows.counts)
    mixed = [f"manifest {name}: {text}" for name, text in data.plan.mixture.lines().items()]
    begins = f"resuming after step {setup.first_step - 1}" if setup.resumed else "a fresh start"
    if setup.resumed:
        changed += _another_rate(setup, setup.resumed.progress, data.plan)
    drawn = [data.references.describe()] if data.references is not None else []
    ranks.say("\n".join([*setup.notes, *mixed, *drawn, *changed, begins]))


def _another_rate(setup: Setup, progress: checkpoint.Progress, plan: Plan) -> list[str]:
    """See `schedule.jump`; steps per epoch of the checkpoint's run follow from its own row counts."""
    optim, now = setup.config.optim, setup.config.as_dict()
    saved = checkpoint.DEFAULTS | progress.config
    per_epoch = plan.steps_per_epoch
    if progress.rows_per_step:
        num_rows = progress.num_rows
        if progress.manifest_rows:
            weights = [portion.weight for portion in portions_of(saved["train_manifest"])]
            num_rows = sum(map(rows_taken, progress.manifest_rows, weights))
        per_epoch = math.ceil(num_rows / progress.rows_per_step)
    saved_steps = total_steps(per_epoch, saved["epochs"], saved["max_steps"])
    return schedule.jump(saved, saved_steps, now, plan.total_steps(optim.epochs, optim.max_steps), progress.step)
