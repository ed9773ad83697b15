"""LoRA fine-tuning of Higgs Audio v2 on DeepSpeed: `deepspeed --num_gpus 8 train_ds.py --train_manifest …`.

Numbered stages only; this is the one file that sees the whole configuration.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_ds.config import TrainConfig
from higgs_ds.distributed.allocator import grow_segments
from higgs_ds.distributed.ds_config import read_deepspeed_config, resolve
from higgs_ds.errors import ConfigError
from higgs_ds.parse import parse_args
from higgs_ds.process import end_process

if TYPE_CHECKING:
    from higgs_ds.distributed.engine import Ranks
    from higgs_ds.distributed.rank_watch import Watch

EXIT_OK, EXIT_CHECK_FAILED, EXIT_CONFIG, EXIT_BAD_LOSS, EXIT_STOPPED = 0, 1, 2, 3, 75


def main(argv: list[str], *, check_only: bool = False) -> int:
    """Trains; with `check_only` runs one optimizer step for its checklist and leaves no run behind.

    Returns the exit code: 0 done, 1 a failed checklist, 2 wrong flags or data or a run that does not fit on its GPUs,
    3 a loss that is not real, 75 asked to stop, saved.
    """
    try:
        # 1. Parse: every wrong flag and YAML key, before torch is imported.
        config = parse_args(argv)
        ds_raw = read_deepspeed_config(config.run.deepspeed_config)
        grow_segments()
        return run(config, ds_raw, check_only=check_only)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(error.problems), file=sys.stderr, flush=True)
        return EXIT_CONFIG


def run(config: TrainConfig, ds_raw: dict, *, check_only: bool) -> int:
    """Stage 2, and around all that follows a watch over the other ranks."""
    from higgs_ds.distributed.engine import leave_ranks, start_ranks
    from higgs_ds.distributed.rank_watch import Watch, check_stall_timeout
    from higgs_ds.run_dir import lock_run_dir, prepare_run_dir

    # 2. Distribute: this process among the other ranks, in a folder that is this run's alone.
    ranks = start_ranks(deterministic=config.run.deterministic)
    ranks.seed(config.optim.seed)
    output_dir = Path(config.run.output_dir)
    may_hold_a_run = check_only or config.run.resume != "none"
    alone = ranks.is_main and not check_only
    with Watch(ranks, stall_timeout_sec=config.run.stall_timeout_sec) as watch:
        try:
            check_stall_timeout(config.run.stall_timeout_sec, on_gpu=ranks.device.type == "cuda")
            ranks.each(lambda: prepare_run_dir(output_dir, may_hold_a_run=may_hold_a_run))
            with ranks.each(lambda: lock_run_dir(output_dir) if alone else contextlib.nullcontext()):
                return train(config, ds_raw, ranks, watch, check_only=check_only)
        except ConfigError:
            leave_ranks(EXIT_CONFIG, wait=False)
            raise


def train(config: TrainConfig, ds_raw: dict, ranks: Ranks, watch: Watch, *, check_only: bool) -> int:
    """Stages 3 to 6."""
    from higgs_ds import checkpoint, rehearsal, run_dir
    from higgs_ds.batching import micro_batches
    from higgs_ds.batching.batch_plan import MicroBatch, evaluation_windows, make_plan
    from higgs_ds.batching.collate import Collator
    from higgs_ds.batching.loader import MicroBatches, load_windows
    from higgs_ds.batching.shared_memory import check_shared_memory
    from higgs_ds.batching.token_counts import LengthIndex
    from higgs_ds.codec.base import load_codec
    from higgs_ds.corpus.code_cache import CodeCache
    from higgs_ds.corpus.rows import load_rows
    from higgs_ds.distributed.engine import Engine, StopSignal, leave_ranks, loading
    from higgs_ds.guard import BadLossError, Guard
    from higgs_ds.loss import LossWeights
    from higgs_ds.model import base as model
    from higgs_ds.model import flops
    from higgs_ds.model.forward import training_forward
    from higgs_ds.model.padding_free import check_supported
    from higgs_ds.report.tracking import open_tracker
    from higgs_ds.schedule import learning_rate
    from higgs_ds.trainer import Trainer

    stop = StopSignal()
    say = partial(print, flush=True) if ranks.is_main else lambda *_, **__: None
    output_dir = Path(config.run.output_dir)
    resumed, notes = ranks.each(lambda: checkpoint.find_checkpoint(config.run.resume, output_dir))
    watch.untimed("finding the base checkpoint")
    checkpoint_files = ranks.each(lambda: model.open_base(config.model.base_ckpt, config.model.base_revision))
    base_dir, model_config, tokenizer = checkpoint_files.folder, checkpoint_files.config, checkpoint_files.tokenizer
    notes += checkpoint_files.notes
    padding_free = config.model.forward_impl == "padding_free"
    if padding_free:
        ranks.each(lambda: check_supported(model_config))
    weights = LossWeights.of(
        config.loss.text_loss_weight,
        config.loss.audio_loss_weight,
        config.loss.codebook_weights,
        model_config.audio_num_codebooks,
    )
    config.optim.batch_size, config.optim.max_tokens_per_batch = micro_batches.settle_micro_batches(
        config.optim.batch_size,
        config.optim.max_tokens_per_batch,
        device_type=ranks.device.type,
        resumed=resumed.position.config if resumed else None,
    )
    if resumed:
        config.optim.grad_accum = ranks.each(lambda: checkpoint.keep_global_batch(resumed, config, ranks.world_size))
    ds_config = resolve(
        ds_raw,
        config,
        world_size=ranks.world_size,
        on_cpu=ranks.device.type == "cpu",
        layer=model.layer_sizes(model_config),
    )

    # 3. Data: every row checked and every clip encoded once, before anything large is loaded.
    watch.untimed("opening the codec")
    codec = ranks.each(
        lambda: load_codec(config.data.codec, config.data.codec_revision, device=str(ranks.device), warn=say)
    )
    cache = ranks.each(lambda: CodeCache(config.data.codes_cache or output_dir / "codes_cache", codec))
    collator = Collator.of(model_config, with_layout=padding_free)
    rehearsed = rehearsal.is_wanted(ranks.device)
    watch.at(0, "reading manifests, encoding clips")
    read = partial(
        load_rows,
        cache=cache,
        num_codebooks=model_config.audio_num_codebooks,
        codebook_size=model_config.audio_codebook_size,
        max_duration_sec=config.data.max_duration_sec,
        skip_bad_rows=config.data.skip_bad_rows,
        ranks=ranks,
        warn=say,
        moved=watch.moved,
        lengths=LengthIndex(cache, tokenizer, collator) if config.optim.max_tokens_per_batch or rehearsed else None,
        max_tokens=config.optim.max_tokens_per_batch,
    )
    train_rows, val_rows = read([m for m in (config.data.train_manifest, config.data.val_manifest) if m])
    codec.release()  # every clip has its codes: the model may have the memory
    plan = make_plan(
        len(train_rows),
        train_rows.tokens,
        batch_size=config.optim.batch_size,
        max_tokens=config.optim.max_tokens_per_batch,
        grad_accum=config.optim.grad_accum,
        world_size=ranks.world_size,
        seed=config.optim.seed,
        round_to=1 if padding_free else collator.round_to,
    )
    first_step = resumed.position.step + 1 if resumed else 1
    total_steps = first_step if check_only else plan.total_steps(config.optim.epochs, config.optim.max_steps)
    notes += checkpoint.changed_settings(resumed, config.as_dict(), len(train_rows))
    say("\n".join([*notes, f"resuming after step {first_step - 1}" if resumed else "a fresh start"]))

    on_gpu = ranks.device.type == "cuda"

    def batches(rows, windows):
        dataset = MicroBatches(rows, tokenizer, cache, collator)
        return load_windows(dataset, windows, num_workers=config.data.num_workers, pin_memory=on_gpu)

    host = socket.gethostname()
    check_memory = partial(
        check_shared_memory,
        MicroBatches(train_rows, tokenizer, cache, collator),
        num_workers=config.data.num_workers * (2 if val_rows else 1),
        batch_size=config.optim.batch_size,
        max_tokens=config.optim.max_tokens_per_batch,
        kept=0 if on_gpu else config.optim.grad_accum,
        ranks_here=ranks.gather(host).count(host),
    )
    ranks.each(check_memory)

    def validation():
        budget = {"tokens": val_rows.tokens, "max_tokens": config.optim.max_tokens_per_batch}
        windows = evaluation_windows(len(val_rows), config.optim.batch_size, ranks.rank, ranks.world_size, **budget)
        return batches(val_rows, windows)

    # 4. Model: base weights, LoRA, engine, guard.
    watch.untimed("loading the model")
    with loading(ds_config):
        base = model.load_base(base_dir, model_config, config.model.dtype)
    lora_model = model.attach_lora(
        base,
        rank=config.lora.lora_r,
        alpha=config.lora.lora_alpha,
        dropout=config.lora.lora_dropout,
        target_modules=config.lora.lora_target_modules,
        seed=config.optim.seed,
        base_name=config.model.base_ckpt,
        base_revision=config.model.base_revision,
    )
    if resumed:
        ranks.each(lambda: model.set_lora(lora_model, resumed.adapter, str(resumed.folder)))
    elif config.lora.init_adapter:
        adapter = ranks.each(lambda: model.read_adapter(Path(config.lora.init_adapter)))
        ranks.each(lambda: model.set_lora(lora_model, adapter, f"--init_adapter {config.lora.init_adapter}"))
    engine = Engine(
        training_forward(
            lora_model,
            model_config,
            forward_impl=config.model.forward_impl,
            loss_impl=config.loss.loss_impl,
            checkpoint_every=config.model.checkpoint_every,
        ),
        ds_config,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
    )
    guard = Guard(
        rank=ranks.rank,
        output_dir=output_dir,
        audio_out_token=model_config.audio_out_token_idx,
        max_code=model_config.audio_codebook_size + 1,
        weights=weights,
    )
    if resumed:
        any_batch = MicroBatches(train_rows, tokenizer, cache, collator)[MicroBatch((0,))]
        engine.load_state(resumed.state, any_batch.model_inputs(ranks.device))
        checkpoint.restore_rng(resumed.rng, ranks, config.optim.seed + resumed.position.step)
    say(plan.describe(total_steps), engine.describe(config.model.dtype), sep="\n")
    note = micro_batches.launch_bound_note(
        plan.mean_tokens(train_rows.tokens),
        device_type=ranks.device.type,
        batch_size=config.optim.batch_size,
        max_tokens=config.optim.max_tokens_per_batch,
        grad_accum=config.optim.grad_accum,
    )
    if note:
        say(note)
    if rehearsed:
        watch.at(first_step - 1, "rehearsing the dearest micro-batch")
        last_step = plan.total_steps(config.optim.epochs, config.optim.max_steps)  # also where only one step is checked
        rows = plan.dearest(train_rows.tokens, first_step, max(first_step, last_step), padded=not padding_free)
        batch = MicroBatches(train_rows, tokenizer, cache, collator)[MicroBatch(rows)]
        advice = rehearsal.Advice(
            config.optim.batch_size, config.optim.max_tokens_per_batch, config.model.checkpoint_every, engine.stage
        )
        took = rehearsal.rehearse(engine, ranks, guard, batch, advice)
        if took:
            say(took)

    # 5. Train, under the guard.
    def opened():
        if check_only or not ranks.is_main:
            return contextlib.nullcontext(None)
        tracker = open_tracker(
            output_dir,
            config=config.as_dict() | {"world_size": ranks.world_size, "deepspeed": ds_config},
            total_steps=total_steps,
            first_step=first_step - 1,
            run_name=config.run.run_name,
            wandb_project=config.run.wandb_project,
            wandb_mode=config.run.wandb_mode,
        )
        run_dir.write_resolved(output_dir, config.as_dict(), ds_config)
        return tracker

    writer = checkpoint.CheckpointWriter(
        output_dir / "checkpoints", keep_last=config.run.keep_last, lora=lora_model.peft_config["default"]
    )

    watch.before_end.append(writer.finish)
    if ranks.is_main and not check_only:
        writer.clean()

    def save(window):
        writer.save(
            checkpoint.Position(
                step=window.step,
                epoch=window.epoch,
                dropped_steps=trainer.dropped_steps,
                rows_per_step=plan.rows_per_step,
                micro_batches_per_step=plan.micro_batches_per_step,
                num_rows=len(train_rows),
                world_size=ranks.world_size,
                config=config.as_dict(),
            ),
            engine,
            ranks,
        )

    try:
        with ranks.each(opened) as tracker:
            trainer = Trainer(
                engine=engine,
                ranks=ranks,
                guard=guard,
                weights=weights,
                learning_rate=partial(
                    learning_rate,
                    peak=config.optim.lr,
                    total_steps=total_steps,
                    warmup_ratio=config.optim.warmup_ratio,
                    shape=config.optim.lr_scheduler,
                ),
                on_bad_loss="raise" if check_only else config.loss.on_bad_loss,
                log_every=config.run.log_every,
                total_steps=total_steps,
                first_step=first_step,
                eval_every=config.run.eval_every or plan.steps_per_epoch,
                validation=validation if val_rows else None,
                tracker=tracker,
                save=None if check_only else save,
                save_every=config.run.save_every,
                raise_if_save_failed=writer.raise_if_failed,
                stop_requested=stop.requested,
                at=watch.at,
                dropped_steps=resumed.position.dropped_steps if resumed else 0,
                utilisation=flops.utilisation(
                    config,
                    model_config,
                    tokens=train_rows.tokens,
                    device=ranks.device,
                    world_size=ranks.world_size,
                ),
            )
            finished = trainer.train(batches(train_rows, plan.windows(ranks.rank, first_step, total_steps)))
            watch.at(total_steps, "writing the last checkpoint")
            writer.wait()
            watch.untimed("closing")  # what W&B has yet to upload takes as long as it takes
    except BadLossError as error:
        if check_only:
            say(error)
            return leave_ranks(EXIT_CHECK_FAILED)
        facts = {"stopped": "by the loss guard, before the failed step was trained"}
        saved = run_dir.save_adapter(
            lora_model, engine.gather_trainable(), output_dir / "adapter_before_failure", ranks, facts
        )
        say(f"nothing of the failed step was trained; the weights before it are in {saved}")
        return leave_ranks(EXIT_BAD_LOSS)

    # 6. Close: the adapter, and where to look.
    if not finished:
        say(f"asked to stop: saved in {output_dir / 'checkpoints'}; --resume auto goes on from there")
        return leave_ranks(EXIT_STOPPED)
    if not check_only:
        facts = {"rows": len(train_rows), "optimizer steps": total_steps, **trainer.last_losses}
        saved = run_dir.save_adapter(lora_model, engine.gather_trainable(), output_dir / "adapter", ranks, facts)
        say(f"adapter: {saved}")
        on_cpu = "" if on_gpu else "DS_ACCELERATOR=cpu "
        say(
            f"listen:  {on_cpu}python -m higgs_ds generate --base_ckpt {config.model.base_ckpt} --adapter {saved} "
            f"--codec {config.data.codec} --text '…' --output_file speech.wav"
        )
    return leave_ranks(EXIT_OK)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
