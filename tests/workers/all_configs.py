"""Three bf16 steps under every shipped DeepSpeed file; prints the loss of the third.

usage: all_configs.py BASE_DIR CODEC_DIR OUTPUT_DIR
"""

import sys
from pathlib import Path

from higgs_ds.config import PROJECT_ROOT
from higgs_ds.engine import leave_ranks, start_ranks
from higgs_ds.process import end_process
from higgs_ds.step_stats import StepSums
from tests.workers.common import build, speech_rows


def main() -> None:
    base_dir, codec_dir, out = map(Path, sys.argv[1:4])
    ranks = start_ranks()
    for file in sorted((PROJECT_ROOT / "ds_configs").glob("*.json")):
        run = build(
            ranks,
            base_dir,
            codec_dir,
            out,
            speech_rows(8),
            stage=-1,
            batch_size=2,
            grad_accum=2,
            dtype="bf16",
            ds_file=f"ds_configs/{file.name}",
        )
        for window, batches in run.batches(last_step=3):
            result = run.trainer.train_step(window.step, batches, 1e-2)
            assert not result.failures, result.failures
            assert result.grad_norm > 0, (file.name, result.grad_norm)
        if ranks.is_main:
            print(
                "config",
                file.stem,
                StepSums.total([rank.sums for rank in result.ranks]).losses(run.weights)["loss"],
                flush=True,
            )
    end_process(leave_ranks(0))


if __name__ == "__main__":
    main()
