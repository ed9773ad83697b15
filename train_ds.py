"""LoRA fine-tuning of Higgs Audio v2 on DeepSpeed: `deepspeed --num_gpus 8 train_ds.py --train_manifest …`.

Numbered stages only; what each of them builds stands in `higgs_ds/run.py`.
"""

from __future__ import annotations

import sys

from higgs_ds.distributed.ds_config import read_deepspeed_config
from higgs_ds.distributed.launch_env import enter_launch, grow_segments
from higgs_ds.distributed.stop import StopRequest
from higgs_ds.errors import ConfigError, ExitCode
from higgs_ds.options.parse import parse_args
from higgs_ds.options.sections import TrainConfig
from higgs_ds.process import end_process, lasting_console, tell


def main(argv: list[str]) -> int:
    """Trains; returns an `ExitCode`. What nobody foresaw ends the process with 1 elsewhere: see `rank_watch`."""
    try:
        # 1. Parse: who started this, and every wrong flag and YAML key, before torch is imported.
        enter_launch()
        config = parse_args(argv)
        ds_raw = read_deepspeed_config(config.run.deepspeed_config)
        grow_segments()
        with lasting_console():
            return train(config, ds_raw, StopRequest())
    except ConfigError as error:
        return tell(error, argv)


def train(config: TrainConfig, ds_raw: dict, stop: StopRequest) -> int:
    """Stages 2 to 6."""
    from higgs_ds.distributed.device import name_accelerator

    name_accelerator()  # before anything imports DeepSpeed, which would guess

    from higgs_ds import run, run_dir
    from higgs_ds.distributed.engine import leave_ranks
    from higgs_ds.guard import BadLossError
    from higgs_ds.load_data import load_data
    from higgs_ds.saver import Saver, settle_wandb
    from higgs_ds.setup import open_setup

    # 2. Join: this process among the other ranks, in a folder that is this run's alone.
    with run.joined(config, stop=stop) as (ranks, watch):
        wandb = settle_wandb(config, ranks)

        # 3. Data: every row checked and every clip encoded once, before anything large is loaded.
        setup = open_setup(config, ds_raw, ranks, watch)
        judges = run.open_judges(config, ranks, watch)
        data = load_data(setup, ranks, watch)
        if run.is_complete(setup, data, ranks):
            at_end = f"nothing is left to train: {setup.output_dir / 'adapter'} is of the run's last step"
            return leave_ranks(ExitCode.OK, at_end)

        # 4. Model: base weights, LoRA, engine; and whether its largest micro-batch fits.
        engine = run.load_model(setup, ranks, watch, first_inputs=data.any_inputs)
        run.say_plan(setup, data, engine, ranks)
        run.check_memory(setup, data, engine, ranks, watch)

        # 5. Train, under the guard. From here on a signal is a request to save and stop.
        saver = Saver(setup, data, engine, ranks, wandb)
        watch.before_end.insert(0, saver.writer.finish)  # before stopped.json says what is saved
        try:
            with saver.open_tracker() as tracker:
                sampler = run.make_sampler(setup, data, engine, ranks, watch, stop, judges)
                sinks = {"tracker": tracker, "saver": saver, "sampler": sampler}
                trainer = run.make_trainer(setup, data, engine, ranks, watch, **sinks, stop=stop)
                stop.training()
                try:
                    with data.steps(setup.first_step, data.total_steps) as steps:
                        finished = trainer.train(steps)
                except BadLossError:
                    saved = saver.save_after_failure(trainer)
                    raise
                # The adapter first: nothing stands between the last step and the disk. Then the checkpoint.
                if finished:
                    saved = saver.save_last(trainer)
                trainer.save_end()
                saver.writer.wait()
                if not finished:
                    run.say_stopped(setup, ranks, watch, stop.reason, ExitCode.STOPPED)
                watch.untimed("closing")  # what W&B has yet to upload takes as long as it takes
        except BadLossError as error:
            run.say_stopped(setup, ranks, watch, str(error), ExitCode.BAD_LOSS)
            return leave_ranks(ExitCode.BAD_LOSS, f"nothing of the failed step was trained; weights before it: {saved}")

        # 6. Close: where to look. An adapter that its folder did not take is a run that failed.
        if not finished:
            saved = setup.output_dir / "checkpoints"
            return leave_ranks(ExitCode.STOPPED, f"asked to stop: saved in {saved}; --resume auto goes on from there")
        listen = run_dir.listen_command(config, saved, ranks.device)
        exit_code = ExitCode.OK if saved.parent == setup.output_dir else ExitCode.FAILED
        return leave_ranks(exit_code, f"adapter: {saved}\nlisten:  {listen}")


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
