"""ZeRO-3 with another kind of rows on every rank.

usage: uneven.py BASE_DIR CODEC_DIR OUTPUT_DIR STEPS
"""

import sys
from pathlib import Path

import torch

from higgs_ds.batching.batch_plan import MicroBatch, StepPlan
from higgs_ds.batching.collate import Collator, Sample
from higgs_ds.data.manifest import AudioRef, Turn, speech_messages
from higgs_ds.distributed.engine import leave_ranks, start_ranks
from higgs_ds.model.higgs_v2.config import read_checkpoint_config
from higgs_ds.model.higgs_v2.prompt import tokenize
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.process import end_process
from tests.support.workers.common import build, without_text_labels

CLIP = AudioRef(path=Path("/clip.wav"), raw_audio=None, offset_sec=None, duration_sec=None)
TEXT = (Turn("user", ("What is two and two?",)), Turn("assistant", ("Four, as ever.",)))


def main() -> None:
    base_dir, codec_dir, out = map(Path, sys.argv[1:4])
    steps = int(sys.argv[4])
    ranks = start_ranks()
    run = build(ranks, base_dir, codec_dir, out, 2, stage=3, total_steps=steps)
    collator = Collator(HiggsV2Spec.from_config(read_checkpoint_config(base_dir)), with_index=True)
    draw = torch.Generator().manual_seed(ranks.rank)

    def batch_of(kind: int):
        seconds = {2: 20.0, 3: 0.5}.get(kind, 1.0)
        messages = TEXT if kind == 0 else speech_messages("Hello there.", CLIP)[0]
        input_ids, label_ids, clips = tokenize(messages, None, run.dataset.tokenizer)
        codes = tuple(torch.randint(0, 1024, (8, int(25 * seconds)), generator=draw) for _ in clips)
        batch = collator([Sample(torch.tensor(input_ids), torch.tensor(label_ids), codes, f"kind{kind}:1")])
        if kind == 1:
            batch = without_text_labels(batch)
        return batch

    plans = ((StepPlan(step, 0.0, (MicroBatch((0,)),)), [batch_of(ranks.rank % 4)]) for step in range(1, steps + 1))
    run.trainer.train(plans)
    print(f"done: {steps} steps", flush=True)
    end_process(leave_ranks(0))


if __name__ == "__main__":
    main()
