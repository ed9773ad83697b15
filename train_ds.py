"""LoRA fine-tuning of Higgs Audio v2 on DeepSpeed: `deepspeed --num_gpus 8 train_ds.py --train_manifest …`.

Numbered stages only; what each of them builds stands in `higgs_ds/run.py`.
"""

from __future__ import annotations

import os
import sys

from higgs_ds.config import TrainConfig
from higgs_ds.distributed.allocator import grow_segments
from higgs_ds.distributed.ds_config import read_deepspeed_config
from higgs_ds.errors import ConfigError, ExitCode
from higgs_ds.parse import parse_args
from higgs_ds.process import end_process, say


def main(argv: list[str]) -> int:
    """Trains; returns an `ExitCode`. What nobody foresaw ends the process with 1 elsewhere: see `rank_watch`."""
    try:
        # 1. Parse: every wrong flag and YAML key, before torch is imported.
        config = parse_args(argv)
        ds_raw = read_deepspeed_config(config.run.deepspeed_config)
        grow_segments()
        return train(config, ds_raw)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            say("\n".join(error.problems), error=True)
        return ExitCode.CONFIG


def train(config: TrainConfig, ds_raw: dict) -> int:
    """Stages 2 to 6."""
    from higgs_ds.distributed.device import name_accelerator

    name_accelerator()  # before anything imports DeepSpeed, which would guess

    from higgs_ds import run, run_dir
    from higgs_ds.distributed.engine import StopSignal, leave_ranks
    from higgs_ds.guard import BadLossError

    # 2. Join: this process among the other ranks, in a folder that is this run's alone.
    with run.joined(config) as (ranks, watch):
        stop = StopSignal()

        # 3. Data: every row checked and every clip encoded once, before anything large is loaded.
        setup = run.open_setup(config, ds_raw, ranks, watch)
        data = run.load_data(setup, ranks, watch)

        # 4. Model: base weights, LoRA, engine, guard.
        engine = run.load_model(setup, ranks, watch, first_inputs=data.any_inputs)
        guard = run.make_guard(setup, ranks)
        run.describe(setup, data, engine, ranks)
        run.rehearse(setup, data, engine, guard, ranks, watch)

        # 5. Train, under the guard.
        origin = {"layout": setup.base.layout, "codec": config.data.codec, "prompt_style": config.data.prompt_style}
        sinks = run.Sinks(setup, data, engine, ranks)
        watch.before_end.append(sinks.writer.finish)
        try:
            with sinks.open_tracker() as tracker:
                trainer = run.make_trainer(
                    setup, data, engine, guard, ranks, watch, tracker=tracker, sinks=sinks, stop=stop
                )
                try:
                    finished = trainer.train(data.steps(setup.first_step, data.total_steps))
                except BadLossError:
                    facts = {"stopped": "by the loss guard, before the failed step was trained"}
                    folder = setup.output_dir / "adapter_before_failure"
                    saved = run_dir.save_adapter(engine, folder, ranks, facts, **origin)
                    watch.untimed("closing")
                    raise
                if finished:  # the adapter first: nothing stands between the last step and the disk
                    facts = data.facts() | trainer.last_losses
                    saved = run_dir.save_adapter(engine, setup.output_dir / "adapter", ranks, facts, **origin)
                watch.at(data.total_steps, "writing the last checkpoint")
                sinks.writer.wait()
                watch.untimed("closing")  # what W&B has yet to upload takes as long as it takes
        except BadLossError:
            ranks.say(f"nothing of the failed step was trained; the weights before it are in {saved}")
            return leave_ranks(ExitCode.BAD_LOSS)

        # 6. Close: where to look.
        if not finished:
            ranks.say(f"asked to stop: saved in {setup.output_dir / 'checkpoints'}; --resume auto goes on from there")
            return leave_ranks(ExitCode.STOPPED)
        ranks.say(f"adapter: {saved}\nlisten:  {run_dir.listen_command(config, saved, ranks.device)}")
        return leave_ranks(ExitCode.OK)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
