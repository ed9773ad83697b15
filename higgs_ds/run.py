"""The assembly of a run, shared by `train_ds.py`, `check`, `prepare`, benchmarks and tests.

open_setup    options settled, checkpoint looked at     -> Setup     nothing large is loaded
load_data     manifests checked, clips encoded, planned -> Data
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
from .distributed.engine import Engine, Ranks, full_weight, join_group, leave_ranks, loading, meet_ranks
from .distributed.rank_watch import STALL_TIMEOUT_SEC, Watch, check_stall_timeout
from .distributed.single_process import NoWatch
from .distributed.stop import StopRequest
from .errors import ConfigError, ExitCode
from .guard import BadLossError, Guard
from .load_data import Data, codes_folder, load_data
from .model import flops
from .model.families import family_of
from .model.lora import attach_lora, set_lora
from .options.sections import TrainConfig
from .report.cards import pinned
from .report.samples import COUNT, Sampler, Voice, prompts_from_file, prompts_from_rows
from .report.tracking import Tracker
from .saver import Saver
from .schedule import schedule
from .setup import Setup, open_setup
from .trainer import Best, Trainer


@contextlib.contextmanager
def joined(
    config: TrainConfig, *, keeps_nothing: bool = False, stop: StopRequest | None = None
) -> Iterator[tuple[Ranks, Watch]]:
    """This process among the other ranks, watched, in a run's folder that is this run's alone.

    Args:
        keeps_nothing: the folder may hold a run, and is not taken (`check`).
        stop: what this process was asked for; without it a signal kills, as it kills any program.

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
            # All ranks are here. First that they agree: options, versions, clocks.
            join_group(ranks, meeting)
            check_stall_timeout(seconds, on_gpu=ranks.device.type == "cuda")
            check_same({f"--{name}": value for name, value in config.as_dict().items()} | versions(), ranks)
            # Then the folder: no other run's, made by rank 0, and one and the same for all.
            ranks.on_main(lambda: run_dir.refuse_a_run(output_dir) if is_new else None)
            ranks.on_main(lambda: run_dir.prepare_run_dir(output_dir))
            check_shared({"--output_dir": output_dir, "--codes_cache": codes_folder(config)}, ranks)
            ranks.each(lambda: run_dir.prepare_run_dir(output_dir))
            with ranks.each(lambda: run_dir.lock_run_dir(output_dir) if writes else contextlib.nullcontext()):
                # Again, now that it is locked: whoever held the lock before may have left a run.
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
    """Base weights, LoRA and where it stands, under DeepSpeed.

    Args:
        first_inputs: any micro-batch's model inputs; asked for where a run is resumed.
        wrap: what is put around the model with LoRA, for tests.
    """
    config, base = setup.config, setup.base
    watch.untimed("loading the model")
    with loading(setup.ds_config):
        quantize_on = ranks.device if config.model.base_dtype else None
        model = family_of(base).load_base(base.folder, base.config, config.model.dtype, quantize_on=quantize_on)
    engine = adapt(setup, model, ranks, wrap=wrap)
    if setup.resumed:
        assert first_inputs is not None, "a run that is gone on with"
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
    """LoRA on a base model, started as the options say, and the training forward of both, under DeepSpeed.

    Args:
        wrap: what is put around the model with LoRA, for tests.
        forward: makes another module of it than the training forward, for benchmarks.
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
    """Says the arithmetic of a step and of the run, the engine, and what of them could be cheaper."""
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
    """The most expensive micro-batch of the plan, once, on GPUs: a run that does not fit ends before its first step.

    On any device with `--compile`, whose seconds are said.
    """
    config, tokens = setup.config, data.corpus.train_rows.tokens
    if not memory_check.is_wanted(ranks.device, compiled=config.model.compile):
        return
    if config.model.compile:
        watch.untimed("compiling the decoder layers")
    else:
        watch.at(setup.first_step - 1, "checking the memory of the most expensive micro-batch")
    assert tokens is not None, "counted wherever memory is checked"
    # The whole run's, also where only one step is checked.
    last_step = max(setup.first_step, data.plan.total_steps(config.optim.epochs, config.optim.max_steps))
    rows = data.plan.most_expensive(tokens, setup.first_step, last_step, padded=not setup.padding_free)
    batch = data.dataset(data.corpus.train_rows)[MicroBatch(rows)]
    if took := memory_check.measure(engine, ranks, setup.base.spec, batch, config):
        ranks.say(took)
    if config.model.compile:
        from .model.compiler import seconds_compiling

        slowest = max(row[0] for row in ranks.table([seconds_compiling()]))
        ranks.say(f"compiled the decoder layers: {slowest:.0f} s on the slowest rank")


def make_sampler(
    setup: Setup, data: Data, engine: Engine, ranks: Ranks, watch: Watch | NoWatch, stop: StopRequest
) -> Sampler | None:
    """The samples that the run speaks, as its options say; None where there are none.

    Raises:
        ConfigError: on all ranks: a file of texts that holds none.
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
    empty, voice_of = family_of(setup.base).voice(setup.base, config.model.dtype, data.corpus.codec, ranks.device)

    @contextlib.contextmanager
    def voice() -> Iterator[Voice | None]:
        with engine.generating(empty) as model:
            if model is None:
                ranks.say("WARNING: samples are left out: a copy of the model does not fit beside ZeRO-3's shards")
            yield None if model is None else voice_of(model)

    return Sampler(
        *(prompts, setup.output_dir, ranks, voice),
        seed=config.optim.seed,
        progressed=watch.progressed,
        stop_requested=lambda: stop.reason is not None,
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
    """The loop over the engine, under the guard.

    Args:
        saver: without one nothing is saved.
        stop: without it nobody asks for an end.
        on_bad_loss: what happens whatever the option says.
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
        keep_best=config.run.keep_best and len(data.corpus.val_rows) > 0,
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
        if saver is not None:  # `check` takes its one step, whatever validations have said
            trainer.owes_validation = at.owes_validation and trainer.validation is not None
            trainer.resumed_from = StepPlan(at.step, at.epoch, ())
            trainer.best = Best(at.best_step, at.best_loss, at.validations_since_best)
    return trainer


def is_complete(setup: Setup, data: Data, ranks: Ranks) -> bool:
    """True if the run that is gone on with was at its end, and left its adapter."""
    if setup.resumed is None:
        return False
    at, patience = setup.resumed.progress, setup.config.run.early_stop
    over = patience is not None and at.validations_since_best >= patience
    left = ranks.gather((setup.output_dir / "adapter").is_dir())[0]
    owes = at.owes_validation and len(data.corpus.val_rows) > 0
    complete = left and not owes and (over or setup.first_step > data.total_steps)
    if complete and ranks.is_main:
        run_dir.forget_stopped(setup.output_dir)
    return complete


def say_stopped(setup: Setup, ranks: Ranks, watch: Watch, reason: str | None, exit_code: ExitCode) -> None:
    """Leaves `stopped.json`; every rank must call it, with its own reason or None."""
    reasons = dict.fromkeys(reason for reason in ranks.gather(reason) if reason)
    if ranks.is_main:
        run_dir.write_stopped(setup.output_dir, "; ".join(reasons), exit_code, watch.resume_command)


def check(config: TrainConfig, ds_raw: dict) -> int:
    """The same run for one optimizer step, without sinks: its checklist, and an exit code of 0 or 1."""
    with joined(config, keeps_nothing=True) as (ranks, watch):
        setup = open_setup(config, ds_raw, ranks, watch)
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
