"""Three bf16 steps (stage 0: fp32) under every shipped DeepSpeed file and two of other trainers, then its state saved
and set; prints the loss of the third step.

usage: all_configs.py BASE_DIR CODEC_DIR OUTPUT_DIR
"""

import gc
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from higgs_ds.checkpoint import CheckpointWriter, Progress, read_checkpoint
from higgs_ds.distributed.engine import leave_ranks, start_ranks
from higgs_ds.model.base import DTYPES
from higgs_ds.model.families import HIGGS_V2
from higgs_ds.model.memory import RankMemory, Weights
from higgs_ds.options.sections import PROJECT_ROOT
from higgs_ds.process import end_process
from higgs_ds.step_stats import StepSums
from tests.distributed.test_ds_config import FROM_THE_FIELD
from tests.support.workers.common import build
from tests.support.workers.residence import Residence, tensors_within

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def main() -> None:
    base_dir, codec_dir, out = map(Path, sys.argv[1:4])
    ranks = start_ranks()
    times: dict[str, float] = {}
    note_initialize(times)
    files = sorted((PROJECT_ROOT / "ds_configs").glob("*.json"))
    for name in ("llama_factory_zero2", "axolotl_zero3_offload"):
        files.append(out / f"rank{ranks.rank}" / f"{name}.json")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(json.dumps(FROM_THE_FIELD[name]))
    for number, file in enumerate(files):
        run = None
        before = set(alive())

        def loaded(model, late=2.0 * ranks.rank * (number == 0)):
            time.sleep(late)  # rank 1 reads from a slower disk
            times["loaded"] = time.time()
            return model

        run = build(
            ranks,
            base_dir,
            codec_dir,
            out,
            8,
            batch_size=2,
            grad_accum=2,
            dtype="fp32" if file.stem == "zero0" else "bf16",  # refused on two ranks in bf16
            lora_r=64,
            ds_file=str(file),
            wrap_model=loaded,
        )
        met = ranks.gather(times)
        assert min(t["initialize"] for t in met) >= max(t["loaded"] for t in met), met
        run.trainer.at = partial(held_as_planned, run, before)
        steps = list(run.batches(last_step=3))
        before.update(tensor.untyped_storage().data_ptr() for tensor in tensors_within(steps))
        for plan, batches in steps:
            result = run.trainer.train_step(plan.step, batches, 1e-2)
            assert not result.failures, result.failures
            assert result.grad_norm > 0, (file.name, result.grad_norm)
        if ranks.is_main:
            total = StepSums.total([rank.sums for rank in result.ranks])
            print("config", file.stem, total.losses(run.weights)["loss"], flush=True)
        run.trainer.at = lambda step, doing: None  # copies of the state are alive from here on
        save_and_set(run, out / file.stem, steps[-1], offloaded="offload" in file.stem)
    if ranks.is_main:
        print("saved and set under every file", flush=True)
    end_process(leave_ranks(0))


def alive() -> dict[int, int]:
    """Bytes of every tensor's memory, by its place."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [one.grad for one in tensors if type(one) is torch.nn.Parameter and one.grad is not None]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
    return {place: storage.nbytes() for place, storage in storages.items()}


def held_as_planned(run, before: set[int], step: int, doing: str) -> None:
    """Before the third update all that trains is there: weights, masters, moments and gradients, as planned."""
    setup, ds_config = run.data.setup, run.data.setup.ds_config
    zero = ds_config["zero_optimization"]
    if (
        step != 3
        or doing != "updating the weights"
        or any(f"offload_{what}" in zero for what in ("optimizer", "param"))
    ):
        return
    weights = Weights.of(HIGGS_V2, setup.base.config, setup.config)
    plan = RankMemory(setup.config, setup.base.spec, weights, ds_config, run.ranks.world_size)
    (base, lora, gradients, optimizer), _ = plan.held()
    bucket = zero.get("reduce_bucket_size", 0) * {2: DTYPES[setup.config.model.dtype].itemsize, 3: 4}.get(
        zero["stage"], 0
    )
    trained = [p for p in run.engine.module.parameters() if p.requires_grad]
    assert weights.lora == sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    optim = run.engine._optimizer
    own = [value for state in optim.state.values() for key, value in state.items() if key != "step"]
    own += optim.parameters if zero["stage"] in (1, 2) else []  # stage 3 shows its masters in a step alone
    share = 2 / 3 if zero["stage"] == 3 else 1
    assert sum(value.nbytes for value in own) == pytest.approx(share * optimizer, rel=0.001)
    found = sum(size for place, size in alive().items() if place not in before)
    planned = base + lora + gradients + optimizer - bucket
    found -= bucket if zero["stage"] == 3 else 0  # stage 2 has given it back by now
    print("memory", zero["stage"], f"{found / planned:.4f}", [base, lora, gradients - bucket, optimizer], flush=True)
    assert zero["stage"] == 3 or found == pytest.approx(planned, rel=0.05)  # stage 3 may hold weights gathered


def note_initialize(times: dict[str, float]) -> None:
    """When DeepSpeed begins to start."""
    import deepspeed

    original = deepspeed.initialize

    def initialize(**settings):
        times["initialize"] = time.time()
        return original(**settings)

    deepspeed.initialize = initialize


def save_and_set(run, folder: Path, step, *, offloaded: bool) -> None:
    """A checkpoint, set again, and another step: as on GPUs, whose collectives take nothing from the CPU."""
    ranks, engine, optimizer = run.ranks, run.engine, run.engine._optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    live = [*masters, *(v for own in optimizer.state.values() for k, v in own.items() if k != "step")]
    residence = Residence()
    if offloaded:
        residence.put_on_host(live)
    writer = CheckpointWriter(folder, keep_last=1, keep_best=False, lora=engine.lora_config)
    with residence.watching():
        put_together = engine.gather_state()
        settings = {"lora_r": 8, "lora_target_modules": []}
        writer.save(Progress(3, 0.0, 0, 8, 8, ranks.world_size, settings), engine, ranks)
    writer.wait()
    assert residence.collectives > 0
    module = engine.gather_trainable()  # another way to them: what the model computes with
    saved = ranks.gather(put_together is not None and folder / "step-000003")[0]
    saved = read_checkpoint(saved).state
    with residence.watching():
        # A step on gradients of zero, which lets the moments shrink, and then what was saved.
        engine.load_state(saved, step[1][0].model_inputs(ranks.device))
        again = engine.gather_state()
    plan, batches = step
    run.trainer.train_step(plan.step, batches, 1e-2)
    if put_together is not None:
        rounded = {name: value.to(module[name].dtype) for name, value in saved.weights.items()}
        assert module.keys() == rounded.keys() and all(torch.equal(module[name], rounded[name]) for name in module)
        check_host_only(put_together, residence, [*live, *engine.module.parameters()])
        assert_same(put_together(), saved, "something else was saved, or training changed what was gathered")
        assert_same(again(), saved, "something else was set")


def assert_same(ours, wanted, what: str) -> None:
    for kind in KINDS:
        values = getattr(ours, kind)
        assert values.keys() == getattr(wanted, kind).keys()
        differing = [name for name, value in getattr(wanted, kind).items() if not torch.equal(value, values[name])]
        assert not differing, (what, kind, differing[:3])


def check_host_only(put_together, residence: Residence, live: list[torch.Tensor]) -> None:
    """What the writing thread is given is on the host, holds no memory that trains, and asks for nothing else."""
    held = list(tensors_within(put_together))
    assert held and all(map(residence.on_host, held)), "a tensor of the GPU in the writing thread"
    alive = {tensor.untyped_storage().data_ptr() for tensor in live} - {0}
    assert not alive & {tensor.untyped_storage().data_ptr() for tensor in held}, "memory that goes on training"
    residence.host_only = True
    with residence.watching():
        put_together()
    residence.host_only = False


if __name__ == "__main__":
    main()
