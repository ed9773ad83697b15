"""One optimizer step under ZeRO-2 and ZeRO-3 by every forward and loss; rank 0 writes Adam's first moments.

usage: forwards.py BASE_DIR CODEC_DIR OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from higgs_ds.distributed.engine import leave_ranks, start_ranks
from higgs_ds.files import write_text
from higgs_ds.model.higgs_v2 import compiled
from higgs_ds.model.higgs_v2 import layers as padding_free
from higgs_ds.options.sections import PROJECT_ROOT
from higgs_ds.process import end_process
from tests.batching.test_collate import samples_of
from tests.support.workers.common import build, with_lora_b, without_text_labels

STAGES = (2, 3)
VARIANTS = {
    "upstream": {"forward_impl": "upstream", "loss_impl": "reference"},
    "fused": {},
    "reference": {"loss_impl": "reference"},
    "checkpointed": {"activation_checkpointing": "full"},
}
WHOLE = {"train_audio_embeddings": True, "train_heads": "both"}
VARIANTS |= {f"{name}, whole modules": VARIANTS[name] | WHOLE for name in ("upstream", "fused")}
HEADS = {"lora_target_modules": "all,text_lm_head,audio_lm_head"}
VARIANTS |= {f"{name}, heads": VARIANTS[name] | HEADS for name in ("upstream", "reference")}
# Under ZeRO-2 weights are whole, and a layer computes as in one process: nothing but the gradients' way is another.
STAGE_2 = ("upstream", "fused", "upstream, whole modules", "fused, whole modules")


def of_stage(stage: int) -> dict[str, dict]:
    """The variants to compute under a stage."""
    if stage == 1:
        return {"compiled": {"compile": True}}
    return VARIANTS if stage == 3 else {name: VARIANTS[name] for name in STAGE_2}


def main() -> None:
    base_dir, codec_dir, out = map(Path, sys.argv[1:4])
    ranks = start_ranks()
    compiled.CompiledDecoderLayer.programs = compiled.programs("aot_eager")  # traced as ever, without kernels to build
    for stage in (1, *STAGES):
        for name, settings in of_stage(stage).items():
            if name == "fused, whole modules":
                settings = settings | {"ds_file": small_buckets(stage, out)}
            run = build(ranks, base_dir, codec_dir, out, 1, stage=stage, wrap_model=with_lora_b, **settings)
            result = run.trainer.train_step(1, batches_of(ranks.rank, run.dataset), 1e-3)
            assert not result.failures, result.failures
            state = run.engine.gather_state()
            if ranks.is_main:
                save_file(state().exp_avg, out / f"{stage}-{name}.safetensors")
    say_what_mixed_ranks_do(ranks, base_dir, codec_dir, out)
    end_process(leave_ranks(0))


def say_what_mixed_ranks_do(ranks, base_dir: Path, codec_dir: Path, out: Path) -> None:
    """The projections of rank 1 stand in another order, as they might in another version of the program."""
    if ranks.rank:
        project = padding_free.project
        padding_free.project = lambda parts, rows, **more: project(parts[::-1], rows, **more)[::-1]
    for stage in (1, *STAGES):
        run = build(ranks, base_dir, codec_dir, out, 1, stage=stage, wrap_model=with_lora_b)
        before = run.engine.gather_trainable()
        result = run.trainer.train_step(1, batches_of(ranks.rank, run.dataset), 1e-3)
        kept = all(torch.equal(before[name], weight) for name, weight in run.engine.gather_trainable().items())
        state = None if result.failures else run.engine.gather_state()
        if ranks.is_main:
            found = [[failure.check, failure.rank] for failure in result.failures]
            write_text(out / f"{stage}-mixed.json", json.dumps({"failures": found, "kept": kept}))
            if state:
                save_file(state().exp_avg, out / f"{stage}-mixed.safetensors")


def small_buckets(stage: int, folder: Path) -> str:
    """The shipped JSON with buckets that no whole module fits into, as the text head does not at the real size."""
    raw = json.loads((PROJECT_ROOT / f"ds_configs/zero{stage}.json").read_text())
    raw["zero_optimization"] |= {"reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000}
    write_text(folder / f"zero{stage}.json", json.dumps(raw))  # by every rank, the same
    return str(folder / f"zero{stage}.json")


def batches_of(rank: int, dataset) -> list:
    """Two micro-batches: text alone and mixed rows on rank 0; speech without text labels and a filler on rank 1."""

    def batch(names: list[str], **settings):
        return dataset.collator(samples_of(names, dataset.tokenizer), **settings)

    if rank == 0:
        return [batch(["text"]), batch(["dialog", "text", "clone"])]
    speech = without_text_labels(batch(["speech", "dialog from turn 3"]))
    return [speech, batch(["speech"], filler=True)]


if __name__ == "__main__":
    main()
