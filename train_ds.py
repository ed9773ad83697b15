"""LoRA fine-tuning of Higgs Audio v2 on DeepSpeed: `deepspeed --num_gpus 8 train_ds.py --train_manifest …`.

Numbered stages only; this is the one file that sees the whole configuration.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_ds.config import ConfigError, TrainConfig, parse_args
from higgs_ds.ds_config import read_deepspeed_config, resolve
from higgs_ds.process import end_process

if TYPE_CHECKING:
    from higgs_ds.engine import Ranks
    from higgs_ds.watch import Watch

EXIT_OK, EXIT_CHECK_FAILED, EXIT_CONFIG, EXIT_BAD_LOSS, EXIT_STOPPED = 0, 1, 2, 3, 75


def main(argv: list[str], *, check_only: bool = False) -> int:
    """Trains; with `check_only` runs one optimizer step for its checklist and leaves no run behind.

    Returns the exit code: 0 done, 1 a failed checklist, 2 wrong flags or data, 3 a loss that is not real, 75 asked to
    stop, saved.
    """
    try:
        # 1. Parse: every wrong flag and YAML key, before torch is imported.
        config = parse_args(argv)
        ds_raw = read_deepspeed_config(config.deepspeed_config)
        return run(config, ds_raw, check_only=check_only)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(error.problems), file=sys.stderr, flush=True)
        return EXIT_CONFIG


def run(config: TrainConfig, ds_raw: dict, *, check_only: bool) -> int:
    """Stage 2, and around all that follows a watch over the other ranks."""
    from higgs_ds.engine import leave_ranks, start_ranks
    from higgs_ds.run_dir import lock_run_dir, prepare_run_dir
    from higgs_ds.watch import Watch

    # 2. Distribute: this process among the other ranks, in a folder that is this run's alone.
    ranks = start_ranks()
    ranks.seed(config.seed)
    output_dir = Path(config.output_dir)
    may_hold_a_run = check_only or config.resume != "none"
    alone = ranks.is_main and not check_only
    with Watch(ranks, stall_timeout_sec=config.stall_timeout_sec) as watch:
        try:
            ranks.each(lambda: prepare_run_dir(output_dir, may_hold_a_run=may_hold_a_run))
            with ranks.each(lambda: lock_run_dir(output_dir) if alone else contextlib.nullcontext()):
                return train(config, ds_raw, ranks, watch, check_only=check_only)
        except ConfigError:
            leave_ranks(EXIT_CONFIG, wait=False)
            raise


def train(config: TrainConfig, ds_raw: dict, ranks: Ranks, watch: Watch, *, check_only: bool) -> int:
    """Stages 3 to 6."""
    from higgs_ds import cards, checkpoint, layouts, model, run_dir
    from higgs_ds.codec import load_codec
    from higgs_ds.codes import CodeCache
    from higgs_ds.collate import Collator
    from higgs_ds.dataset import MicroBatches, load_windows
    from higgs_ds.engine import Engine, StopSignal, leave_ranks, loading
    from higgs_ds.forward import training_forward
    from higgs_ds.guard import BadLossError, Guard
    from higgs_ds.lengths import LengthIndex
    from higgs_ds.loss import LossWeights
    from higgs_ds.padding_free import check_supported
    from higgs_ds.rows import load_rows
    from higgs_ds.sampler import MicroBatch, evaluation_windows, make_plan
    from higgs_ds.schedule import learning_rate
    from higgs_ds.tracking import open_tracker
    from higgs_ds.trainer import Trainer

    stop = StopSignal()
    say = partial(print, flush=True) if ranks.is_main else lambda *_, **__: None
    output_dir = Path(config.output_dir)
    resumed, notes = ranks.each(lambda: checkpoint.find_checkpoint(config.resume, output_dir))
    watch.untimed("finding the base checkpoint")
    base_dir = ranks.each(lambda: model.locate_checkpoint(config.base_ckpt, config.base_revision))
    model_config = ranks.each(lambda: model.read_model_config(base_dir))
    ranks.each(lambda: model.check_weights(base_dir, model_config))
    initial = ranks.each(lambda: None if resumed else model.read_init_adapter(config, model_config))
    padding_free = config.forward_impl == "padding_free"
    if padding_free:
        ranks.each(lambda: check_supported(model_config))
    weights = LossWeights.of(
        config.text_loss_weight,
        config.audio_loss_weight,
        config.codebook_weights,
        model_config.audio_num_codebooks,
    )
    if resumed:
        config.grad_accum = ranks.each(lambda: checkpoint.keep_global_batch(resumed, config, ranks.world_size))
    ds_config = resolve(
        ds_raw,
        config,
        world_size=ranks.world_size,
        on_cpu=ranks.device.type == "cpu",
        layer=model.layer_sizes(model_config),
    )

    # 3. Data: every row checked and every clip encoded once, before anything large is loaded.
    watch.untimed("opening the codec")
    codec = ranks.each(lambda: load_codec(config.codec, config.codec_revision, device=str(ranks.device), warn=say))
    cache = ranks.each(lambda: CodeCache(config.codes_cache or output_dir / "codes_cache", codec))
    tokenizer = ranks.each(lambda: model.load_tokenizer(base_dir))
    collator = Collator.of(model_config, with_layout=padding_free)
    watch.at(0, "reading manifests, encoding clips")
    read = partial(
        load_rows,
        cache=cache,
        num_codebooks=model_config.audio_num_codebooks,
        codebook_size=model_config.audio_codebook_size,
        max_duration_sec=config.max_duration_sec,
        skip_bad_rows=config.skip_bad_rows,
        ranks=ranks,
        warn=say,
        moved=watch.moved,
        lengths=LengthIndex(cache, tokenizer, collator) if config.max_tokens_per_batch else None,
        max_tokens=config.max_tokens_per_batch,
    )
    train_rows, val_rows = read([m for m in (config.train_manifest, config.val_manifest) if m])
    codec.release()  # every clip has its codes: the model may have the memory
    plan = make_plan(
        len(train_rows),
        train_rows.tokens,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens_per_batch,
        grad_accum=config.grad_accum,
        world_size=ranks.world_size,
        seed=config.seed,
        round_to=1 if padding_free else collator.round_to,
    )
    first_step = resumed.position.step + 1 if resumed else 1
    total_steps = first_step if check_only else plan.total_steps(config.epochs, config.max_steps)
    notes += checkpoint.changed_settings(resumed, config.as_dict(), len(train_rows))
    say("\n".join([*notes, f"resuming after step {first_step - 1}" if resumed else "a fresh start"]))

    def batches(rows, windows):
        dataset = MicroBatches(rows, tokenizer, cache, collator)
        on_gpu = ranks.device.type == "cuda"
        return load_windows(dataset, windows, num_workers=config.num_workers, pin_memory=on_gpu)

    def validation():
        budget = {"tokens": val_rows.tokens, "max_tokens": config.max_tokens_per_batch}
        windows = evaluation_windows(len(val_rows), config.batch_size, ranks.rank, ranks.world_size, **budget)
        return batches(val_rows, windows)

    # 4. Model: base weights, LoRA, engine, guard.
    watch.untimed("loading the model")
    base_name, base_revision = cards.pinned(config.base_ckpt, config.base_revision)
    origin = {"layout": layouts.layout_of(base_dir), "codec": config.codec}
    with loading(ds_config):
        base = model.load_base(base_dir, model_config, config.dtype)
    lora_model = model.attach_lora(
        base,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        seed=config.seed,
        base_name=base_name,
        base_revision=base_revision,
    )
    if resumed:
        ranks.each(lambda: model.set_lora(lora_model, resumed.adapter, str(resumed.folder)))
    elif initial:
        ranks.each(lambda: model.set_lora(lora_model, initial, f"--init_adapter {config.init_adapter}"))
    engine = Engine(
        training_forward(
            lora_model,
            model_config,
            forward_impl=config.forward_impl,
            loss_impl=config.loss_impl,
            checkpoint_every=config.checkpoint_every,
        ),
        ds_config,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
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
        checkpoint.restore_rng(resumed.rng, ranks, config.seed + resumed.position.step)
    say(plan.describe(total_steps), engine.describe(config.dtype), sep="\n")

    # 5. Train, under the guard.
    def opened():
        if check_only or not ranks.is_main:
            return contextlib.nullcontext(None)
        tracker = open_tracker(
            output_dir,
            config=config.as_dict() | {"world_size": ranks.world_size, "deepspeed": ds_config},
            total_steps=total_steps,
            first_step=first_step - 1,
            run_name=config.run_name,
            wandb_project=config.wandb_project,
            wandb_mode=config.wandb_mode,
        )
        run_dir.write_resolved(output_dir, config.as_dict(), ds_config)
        return tracker

    writer = checkpoint.CheckpointWriter(
        output_dir / "checkpoints", keep_last=config.keep_last, lora=lora_model.peft_config["default"]
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
                    peak=config.lr,
                    total_steps=total_steps,
                    warmup_ratio=config.warmup_ratio,
                    shape=config.lr_scheduler,
                ),
                on_bad_loss="raise" if check_only else config.on_bad_loss,
                log_every=config.log_every,
                total_steps=total_steps,
                first_step=first_step,
                eval_every=config.eval_every or plan.steps_per_epoch,
                validation=validation if val_rows else None,
                tracker=tracker,
                save=None if check_only else save,
                save_every=config.save_every,
                raise_if_save_failed=writer.raise_if_failed,
                stop_requested=stop.requested,
                at=watch.at,
                dropped_steps=resumed.position.dropped_steps if resumed else 0,
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
            lora_model, engine.gather_trainable(), output_dir / "adapter_before_failure", ranks, facts, **origin
        )
        say(f"nothing of the failed step was trained; the weights before it are in {saved}")
        return leave_ranks(EXIT_BAD_LOSS)

    # 6. Close: the adapter, and where to look.
    if not finished:
        say(f"asked to stop: saved in {output_dir / 'checkpoints'}; --resume auto goes on from there")
        return leave_ranks(EXIT_STOPPED)
    if not check_only:
        facts = {"rows": len(train_rows), "optimizer steps": total_steps, **trainer.last_losses}
        facts |= cards.prompt_facts(train_rows)
        adapter = output_dir / "adapter"
        saved = run_dir.save_adapter(lora_model, engine.gather_trainable(), adapter, ranks, facts, **origin)
        say(f"adapter: {saved}")
        say(
            f"listen:  python -m higgs_ds generate --base_ckpt {config.base_ckpt} --adapter {saved} "
            f"--codec {config.codec} --text '…' --output_file speech.wav"
        )
    return leave_ranks(EXIT_OK)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
