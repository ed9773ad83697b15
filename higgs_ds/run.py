"""Assemble a run; shared by `train_ds.py`, `check`, `prepare`, benchmarks and tests.

open_setup    resolve options, check the checkpoint     -> Setup     nothing large is loaded
load_data     check manifests, encode clips, plan steps -> Data
load_model    base weights, LoRA, DeepSpeed             -> Engine
make_trainer  guard, schedule, saver                    -> Trainer
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import nn

from . import checkpoint, memory_check, run_dir
from .batching import micro_batches
from .batching.batch_plan import MicroBatch, StepPlan
from .distributed.agreement import check_same, check_shared, versions
from .distributed.ds_config import nothing_to_shard_note
from .distributed.engine import Engine, full_weight, join_group, leave_ranks, loading, meet_ranks
from .distributed.rank_watch import STALL_TIMEOUT_SEC, Watch, check_stall_timeout
from .distributed.ranks import NoWatch, Ranks
from .distributed.stop import StopRequest
from .errors import ConfigError, ExitCode
from .guard import BadLossError, Guard
from .judges.clips import Sentence, enrolled
from .judges.in_run import RunJudges
from .load_data import Corpus, Data, codes_folder, load_data
from .model import flops
from .model.families import family_of
from .model.lora import attach_lora, set_lora
from .model.memory import Load, RankMemory, Weights
from .options.sections import TrainConfig
from .report.cards import pinned
from .report.samples import COUNT, Prompt, Sampler, Voice, prompts_from_file, prompts_from_rows
from .report.tracking import Tracker
from .saver import Saver
from .schedule import schedule
from .setup import Setup, open_setup
from .trainer import Best, Trainer

MOST_RECORDINGS = 256  # of the training rows, that the judges choose from where there are no validation rows


@contextlib.contextmanager
def joined(
    config: TrainConfig, *, keeps_nothing: bool = False, stop: StopRequest | None = None
) -> Iterator[tuple[Ranks, Watch]]:
    """Joins the other ranks, starts the watch and locks the run's folder.

    Args:
        keeps_nothing: for `check`: the folder may hold a run, and is not locked.
        stop: collects stop requests; without it a signal kills the process as usual.

    Raises:
        ConfigError: on all ranks, after the process group is left.
    """
    ranks, meeting = meet_ranks(deterministic=config.run.deterministic)
    ranks.seed(config.optim.seed)
    output_dir = config.output_dir
    is_new = not keeps_nothing and config.run.resume == "none"
    writes = ranks.is_main and not keeps_nothing
    seconds = config.run.stall_timeout_sec or STALL_TIMEOUT_SEC[ranks.device.type]
    with Watch(ranks, meeting.connections, stall_timeout_sec=seconds, stop=stop) as watch:
        try:
            # All ranks have joined. Compare options and versions.
            join_group(ranks, meeting)
            check_stall_timeout(seconds, on_gpu=ranks.device.type == "cuda")
            check_same({f"--{name}": value for name, value in config.as_dict().items()} | versions(), ranks)
            # Then the folder: it must be free, is created by rank 0, and must be the same for all.
            ranks.on_main(lambda: run_dir.refuse_a_run(output_dir) if is_new else None)
            ranks.on_main(lambda: run_dir.prepare_run_dir(output_dir))
            check_shared({"--output_dir": output_dir, "--codes_cache": codes_folder(config)}, ranks)
            ranks.each(lambda: run_dir.prepare_run_dir(output_dir))
            with ranks.each(lambda: run_dir.lock_run_dir(output_dir) if writes else contextlib.nullcontext()):
                # Check again under the lock: its previous holder may have left a run.
                ranks.on_main(lambda: run_dir.refuse_a_run(output_dir) if is_new else None)
                if writes:
                    watch.before_end.append(
                        lambda end: run_dir.write_stopped(output_dir, end.text, end.exit_code, watch.resume_command)
                    )
                yield ranks, watch
        except ConfigError:
            leave_ranks(ExitCode.CONFIG, wait=False)
            raise


def load_model(
    setup: Setup,
    ranks: Ranks,
    watch: Watch | NoWatch,
    *,
    first_inputs: Callable[[], dict] | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Engine:
    """Loads base weights, LoRA and, when resuming, the training state under DeepSpeed.

    Args:
        first_inputs: gives model inputs of any micro-batch; needed when resuming.
        wrap: wraps the model with LoRA, for tests.
    """
    config, base = setup.config, setup.base
    watch.untimed("loading the model")
    with loading(setup.ds_config):
        quantize_on = ranks.device if config.model.base_dtype else None
        model = family_of(base).load_base(base.folder, base.config, config.model.dtype, quantize_on=quantize_on)
    engine = adapt(setup, model, ranks, wrap=wrap)
    if setup.resumed:
        assert first_inputs is not None, "needed to resume"
        engine.load_state(setup.resumed.state, first_inputs())
        checkpoint.restore_rng(setup.resumed.rng, ranks, config.optim.seed + setup.resumed.progress.step)
    return engine


def adapt(
    setup: Setup,
    model: nn.Module,
    ranks: Ranks,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    forward: Callable[[nn.Module], nn.Module] | None = None,
) -> Engine:
    """Attaches LoRA to a base model, builds the training forward and puts it under DeepSpeed.

    Args:
        wrap: wraps the model with LoRA, for tests.
        forward: replaces the training forward, for benchmarks.
    """
    config = setup.config
    modules = family_of(setup.base).modules
    base_name, base_revision = pinned(config.model.base_ckpt, config.model.base_revision)
    lora_model = attach_lora(
        model,
        rank=config.lora.lora_r,
        alpha=config.lora.lora_alpha,
        rslora=config.lora.lora_rslora,
        dropout=config.lora.lora_dropout,
        target_modules=modules.targets(config.lora.lora_target_modules),
        groups=modules.lora_groups,
        modules_to_save=modules.trained_whole(config.lora.train_audio_embeddings, config.lora.train_heads),
        whole=full_weight,
        seed=config.optim.seed,
        base_name=base_name,
        base_revision=base_revision,
    )
    resumed, initial = setup.resumed, setup.initial
    if resumed is not None:
        ranks.each(lambda: set_lora(lora_model, resumed.adapter, str(resumed.folder)))
    elif initial is not None:
        ranks.each(lambda: set_lora(lora_model, initial, f"--init_adapter {config.lora.init_adapter}"))
    forward = forward or partial(
        family_of(setup.base).training_forward,
        config=setup.base.config,
        forward_impl=config.model.forward_impl,
        loss_impl=config.loss.loss_impl,
        checkpoint_every=config.model.checkpoint_every,
        compiled=config.model.compile,
    )
    module = forward(wrap(lora_model))
    optim = config.optim
    return Engine(module, setup.ds_config, weight_decay=optim.weight_decay, max_grad_norm=optim.max_grad_norm)


def make_guard(setup: Setup, ranks: Ranks) -> Guard:
    """The loss guard of this rank."""
    return Guard(rank=ranks.rank, output_dir=setup.output_dir, spec=setup.base.spec, weights=setup.weights)


def say_plan(setup: Setup, data: Data, engine: Engine, ranks: Ranks) -> None:
    """Prints the sizes of a step and of the run, the engine, and hints on cheaper settings."""
    config, plan = setup.config, data.plan
    note = micro_batches.launch_bound_note(
        plan.mean_tokens(data.corpus.train_rows.tokens),
        device_type=ranks.device.type,
        batch_size=config.optim.batch_size,
        max_tokens=config.optim.max_tokens_per_batch,
        grad_accum=config.optim.grad_accum,
    )
    dtype = config.model.dtype + (f" (frozen layers {config.model.base_dtype})" if config.model.base_dtype else "")
    lines = [plan.describe(data.total_steps), engine.describe(dtype), note]
    lines.append(nothing_to_shard_note(setup.ds_config, world_size=ranks.world_size))
    ranks.say("\n".join(line for line in lines if line))


def check_memory(setup: Setup, data: Data, engine: Engine, ranks: Ranks, watch: Watch | NoWatch) -> None:
    """Runs the plan's most expensive micro-batch on GPUs, so that a run that does not fit ends before its first step.

    With `--compile`, on any device; compile time is reported.
    """
    config, tokens = setup.config, data.corpus.train_rows.tokens
    if not memory_check.is_wanted(ranks.device, compiled=config.model.compile):
        return
    if config.model.compile:
        watch.untimed("compiling the decoder layers")
    else:
        watch.at(setup.first_step - 1, "checking the memory of the most expensive micro-batch")
    assert tokens is not None, "counted wherever memory is checked"
    # Of the whole run, even if only one step is checked.
    last_step = max(setup.first_step, data.plan.total_steps(config.optim.epochs, config.optim.max_steps))
    rows = data.plan.most_expensive(tokens, setup.first_step, last_step, padded=not setup.padding_free)
    batch = data.dataset(data.corpus.train_rows)[MicroBatch(rows)]
    predicted = ""
    if batch.index is not None:
        weights = Weights.of(family_of(setup.base), setup.base.config, config)
        known = (config, setup.base.spec, weights, setup.ds_config, ranks.world_size)
        size = RankMemory(*known, on_gpu=ranks.device.type == "cuda").measured(Load.of(batch.index))
        predicted = f" (predicted: {size / 2**30:.1f})"
    if took := memory_check.measure(engine, ranks, setup.base.spec, batch, config, predicted):
        ranks.say(took)
    if config.model.compile:
        from .model.compiler import seconds_compiling

        slowest = max(row[0] for row in ranks.table([seconds_compiling()]))
        ranks.say(f"compiled the decoder layers: {slowest:.0f} s on the slowest rank")


def open_judges(config: TrainConfig, ranks: Ranks, watch: Watch | NoWatch) -> RunJudges | None:
    """Rank 0's judges of the samples, once they have been loaded; None elsewhere, and where there are none.

    Raises:
        ConfigError: on all ranks: a library or a model that is missing.
    """

    def checked() -> RunJudges:
        judges = RunJudges(config.run.judges or (), config.run.words, config.run.voice, str(ranks.device))
        judges.check()
        return judges

    if not config.run.judges:
        return None
    watch.untimed("loading the judges")
    return ranks.on_main(checked)


def _teach(judges: RunJudges, prompts: list[Prompt], corpus: Corpus) -> None:
    """Tells the judges the texts of the samples, and recordings of their speakers: of the validation, or training."""
    rows, known = corpus.val_rows, {}
    places = range(len(rows))
    if not rows:
        rows = corpus.train_rows
        places = range(0, len(rows), max(1, len(rows) // MOST_RECORDINGS))
    for place in places:
        if sentence := Sentence.of_row(rows[place], rows.column(place, "language")):
            known[sentence.origin] = sentence
    recordings = enrolled(list(known.values()))
    speakers = {sentence.speaker for sentence in recordings}
    anyone = next(iter(speakers)) if len(speakers) == 1 else None
    for prompt in prompts:
        judges.sentences[prompt.origin] = known.get(prompt.origin) or Sentence(prompt.text, prompt.origin, anyone)
    asked = {sentence.speaker for sentence in judges.sentences.values()}
    judges.corpus = [sentence for sentence in recordings if sentence.speaker in asked]


def make_sampler(
    setup: Setup,
    data: Data,
    engine: Engine,
    ranks: Ranks,
    watch: Watch | NoWatch,
    stop: StopRequest,
    judges: RunJudges | None,
) -> Sampler | None:
    """The run's sampler, as its options say; None without samples.

    Raises:
        ConfigError: on all ranks: a file of texts that is empty.
    """
    config, rows, cache = setup.config, data.corpus.val_rows, data.corpus.cache
    wanted = config.run.sample_every or config.run.sample_texts or config.run.sample_count
    if not wanted:
        return None
    prompts = []
    if config.run.sample_texts:
        file = Path(config.run.sample_texts)
        prompts += ranks.each(lambda: prompts_from_file(file, config.data.prompt_style))
    if config.run.sample_count or not prompts:
        count = config.run.sample_count or COUNT
        prompts += prompts_from_rows(rows, count, lambda ref: cache.get(ref)[: setup.base.spec.num_codebooks])
    if judges is not None:
        _teach(judges, prompts, data.corpus)
    base, family = setup.base, family_of(setup.base)

    @contextlib.contextmanager
    def voice() -> Iterator[Voice | None]:
        with engine.generating(lambda: family.empty_base(base.config, config.model.dtype)) as model:
            if model is None:
                ranks.say("WARNING: samples are left out: a copy of the model does not fit beside ZeRO-3's shards")
            yield None if model is None else family.voice(model, base, data.corpus.codec, ranks.device)

    return Sampler(
        *(prompts, setup.output_dir, ranks, voice),
        seed=config.optim.seed,
        progressed=watch.progressed,
        stop_requested=lambda: stop.reason is not None,
        judges=judges,
    )


def make_trainer(
    setup: Setup,
    data: Data,
    engine: Engine,
    ranks: Ranks,
    watch: Watch | NoWatch,
    *,
    tracker: Tracker | None = None,
    saver: Saver | None = None,
    sampler: Sampler | None = None,
    stop: StopRequest | None = None,
    on_bad_loss: str | None = None,
) -> Trainer:
    """Builds the training loop over the engine, with the guard.

    Args:
        saver: None saves nothing.
        stop: None never stops early.
        on_bad_loss: overrides the option.
    """
    config = setup.config
    trainer = Trainer(
        engine=engine,
        ranks=ranks,
        guard=make_guard(setup, ranks),
        weights=setup.weights,
        learning_rate=schedule(config.as_dict(), data.total_steps),
        on_bad_loss=on_bad_loss or config.loss.on_bad_loss,
        log_every=config.run.log_every,
        total_steps=data.total_steps,
        first_step=setup.first_step,
        eval_every=config.run.eval_every or data.plan.steps_per_epoch,
        validation=data.validation if data.corpus.val_rows else None,
        tracker=tracker,
        saver=saver,
        sampler=sampler,
        sample_every=config.run.sample_every,
        keep_best=config.run.keep_best and (config.run.best_by != "loss" or len(data.corpus.val_rows) > 0),
        best=Best(by=config.run.best_by),
        save_every=config.run.save_every,
        save_minutes=config.run.save_minutes,
        early_stop=config.run.early_stop,
        stop_requested=lambda: stop is not None and stop.reason is not None,
        at=watch.at,
        utilisation=flops.utilisation(
            config,
            setup.base.spec,
            lora_targets=family_of(setup.base).modules.targets(config.lora.lora_target_modules),
            tokens=data.plan.first_epoch(data.corpus.train_rows.tokens),
            device=ranks.device,
            world_size=ranks.world_size,
        ),
    )
    if setup.resumed:
        at = setup.resumed.progress
        trainer.dropped_steps = at.dropped_steps
        if saver is not None:  # `check` runs its one step in any case
            trainer.owes_validation = at.owes_validation and trainer.validation is not None
            trainer.resumed_from = StepPlan(at.step, at.epoch, ())
            if at.best_by == config.run.best_by:  # by another measure there is no best yet
                value = at.best_loss if at.best_value is None else at.best_value  # older ones: the loss alone
                trainer.best = Best(at.best_step, value, at.validations_since_best, at.best_by)
    return trainer


def is_complete(setup: Setup, data: Data, ranks: Ranks) -> bool:
    """True if the resumed run had finished and saved its adapter."""
    if setup.resumed is None:
        return False
    at, patience = setup.resumed.progress, setup.config.run.early_stop
    over = patience is not None and at.validations_since_best >= patience
    over = over and at.best_by == setup.config.run.best_by
    left = ranks.gather((setup.output_dir / "adapter").is_dir())[0]
    owes = at.owes_validation and len(data.corpus.val_rows) > 0
    complete = left and not owes and (over or setup.first_step > data.total_steps)
    if complete and ranks.is_main:
        run_dir.forget_stopped(setup.output_dir)
    return complete


def say_stopped(setup: Setup, ranks: Ranks, watch: Watch, reason: str | None, exit_code: ExitCode) -> None:
    """Writes `stopped.json`; every rank must call it, with its reason or None."""
    reasons = dict.fromkeys(reason for reason in ranks.gather(reason) if reason)
    if ranks.is_main:
        run_dir.write_stopped(setup.output_dir, "; ".join(reasons), exit_code, watch.resume_command)


def check(config: TrainConfig, ds_raw: dict) -> int:
    """Runs one optimizer step without sinks and prints the checklist; the exit code is 0 or 1."""
    with joined(config, keeps_nothing=True) as (ranks, watch):
        setup = open_setup(config, ds_raw, ranks, watch)
        if (judges := open_judges(config, ranks, watch)) is not None:
            judges.close()
        data = load_data(setup, ranks, watch, only_one_step=True)
        engine = load_model(setup, ranks, watch, first_inputs=data.any_inputs)
        say_plan(setup, data, engine, ranks)
        check_memory(setup, data, engine, ranks, watch)
        trainer = make_trainer(setup, data, engine, ranks, watch, on_bad_loss="raise")
        try:
            with data.steps(setup.first_step, data.total_steps) as steps:
                trainer.train(steps)
        except BadLossError as error:
            return leave_ranks(ExitCode.FAILED, str(error))
        return leave_ranks(ExitCode.OK)
