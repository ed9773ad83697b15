"""How often a micro-batch's forward and backward wait for the device, or would on a GPU: the module's and the engine's.

On a CPU every operation is counted as it is dispatched, backward included: `nonzero` (and an index by a mask, which
calls it), `item` (`_local_scalar_dense`), other operations whose result's size depends on values, and copies between
host and device; and DeepSpeed is told that its device is one that must be waited for, as a GPU is, and counted where
it waits. On a GPU its profiler counts the same operations, and synchronisations and copies of the driver.

usage: python benchmarks/syncs.py [--json FILE]; exits with 1 where the engine's micro-batches wait at all
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.report import measuring_device, report  # noqa: E402
from higgs_ds.batching.collate import Batch, Collator, Sample  # noqa: E402
from higgs_ds.distributed.ds_config import LayerSizes, resolve  # noqa: E402
from higgs_ds.distributed.engine import Engine, leave_ranks, loading, start_ranks  # noqa: E402
from higgs_ds.model.base import load_tokenizer  # noqa: E402
from higgs_ds.model.higgs_v2.checkpoint import load_base  # noqa: E402
from higgs_ds.model.higgs_v2.config import read_checkpoint_config  # noqa: E402
from higgs_ds.model.higgs_v2.forward import training_forward  # noqa: E402
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS  # noqa: E402
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec  # noqa: E402
from higgs_ds.model.higgs_v2.tiny import write_tiny  # noqa: E402
from higgs_ds.model.lora import attach_lora  # noqa: E402
from higgs_ds.options.parse import parse_args  # noqa: E402
from higgs_ds.process import end_process  # noqa: E402

NAMES = {
    "aten::nonzero": "nonzero",
    "aten::masked_select": "nonzero",
    "aten::unique_dim": "nonzero",
    "aten::_unique2": "nonzero",
    "aten::repeat_interleave.Tensor": "nonzero",
    "aten::item": "item",
    "aten::_local_scalar_dense": "_local_scalar_dense",
    "aten::lift_fresh": "host copies",  # torch.tensor(…) from Python values
}
INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
COLUMNS = ("nonzero", "item", "_local_scalar_dense", "host copies", "synchronisations")
MEASURED = "what is counted"
LAYERS = 4
STEPS_BEFORE = 3  # DeepSpeed's throughput timer begins to wait after two
MICRO_BATCHES = 4  # of the step that is counted


class Counting(TorchDispatchMode):
    """Counts what would wait for a GPU, by column."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in NAMES:
            self.found[NAMES[name]] += 1
        elif name.startswith(INDEXING):
            indices = [index for index in args[1] if index is not None]
            self.found["nonzero"] += sum(index.dtype in (torch.bool, torch.uint8) for index in indices)
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if tensors and results and any(r.device.type != tensors[0].device.type for r in results):
            self.found["host copies"] += 1
        return out


def dispatched(run) -> Counter[str]:
    """Counts of one run by dispatch; `item` is the call, `_local_scalar_dense` what it dispatches."""
    with Counting() as counting:
        run()
    counting.found["item"] = counting.found["_local_scalar_dense"]
    return counting.found


def profiled(run, activities: tuple[str, ...] = ("CPU", "CUDA")) -> Counter[str]:
    """Counts of one run by the profiler, without its own wait for the GPU at the end."""
    from torch.profiler import ProfilerActivity, profile, record_function

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    watched = [getattr(ProfilerActivity, name) for name in activities]
    with profile(activities=watched) as seen, record_function(MEASURED):
        run()
    events = list(seen.events())
    (last,) = {event.time_range.end for event in events if event.name == MEASURED and event.device_type.name == "CPU"}
    found: Counter[str] = Counter()
    for event in events:
        if event.device_type.name == "CPU" and event.time_range.start > last:
            continue
        if event.name in NAMES and event.name != "aten::lift_fresh":
            found[NAMES[event.name]] += 1
        elif event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
            found["host copies"] += 1
        elif event.name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"):
            found["synchronisations"] += 1
    return found


def make_batch(config, tokenizer, *, with_index: bool) -> Batch:
    """Three rows of several lengths: reference audio, speech, and text alone."""
    draw = torch.Generator().manual_seed(0)
    speech = "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    texts = [
        f"<|begin_of_text|>A voice.<|audio_bos|><|AUDIO|><|audio_eos|>Say it: hello there.{speech}",
        f"<|begin_of_text|>{'Good morning to all of you. ' * 3}{speech}",
        "<|begin_of_text|>What is two and two? Four, as ever.<|eot_id|>",
    ]
    samples = []
    for number, text in enumerate(texts):
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        clips = int(((ids == config.audio_in_token_idx) | (ids == config.audio_out_token_idx)).sum())
        codes = tuple(torch.randint(0, 1024, (8, 40 + 7 * number), generator=draw) for _ in range(clips))
        labels = ids.clone()
        labels[: len(ids) - 6] = -100
        samples.append(Sample(ids, labels, codes, f"row:{number}"))
    return Collator(HiggsV2Spec.from_config(config), with_index=with_index)(samples)


class AskedDevice:
    """DeepSpeed's accelerator on a CPU, behaving as one whose work goes on behind the host's back, and counted.

    Inside the context DeepSpeed takes the branches that it takes on a GPU: its streams and events are stand-ins, and
    `waits` is how often it waited for one of them or for the whole device.
    """

    def __init__(self):
        self.waits = 0

    def _wait(self, *_, **__) -> None:
        self.waits += 1

    @contextlib.contextmanager
    def __call__(self) -> Iterator[AskedDevice]:
        from deepspeed.accelerator import get_accelerator

        asked, kind = self, type(get_accelerator())

        class Stream:
            """A stream or an event; everything put on it is done at once."""

            def __init__(self, *_, **__):
                pass

            def synchronize(self) -> None:
                asked._wait()

            def query(self) -> bool:
                return True

            def record(self, *_) -> None:
                pass

            wait_stream = wait_event = wait = record

        one = Stream()
        stood_in = {
            "is_synchronized_device": lambda self: False,
            "resolves_data_dependency": lambda self: False,
            "handles_memory_backpressure": lambda self: False,
            "synchronize": lambda self, *_: asked._wait(),
            "current_stream": lambda self, *_: one,
            "default_stream": lambda self, *_: one,
            "stream": lambda self, stream: contextlib.nullcontext(),
            "Stream": property(lambda self: Stream),
            "Event": property(lambda self: Stream),
        }
        kept = {name: vars(kind)[name] for name in stood_in}
        record_stream = torch.Tensor.record_stream
        for name, value in stood_in.items():
            setattr(kind, name, value)
        torch.Tensor.record_stream = lambda self, stream: None  # there is no such thing for a tensor of the CPU
        try:
            yield self
        finally:
            torch.Tensor.record_stream = record_stream
            for name, value in kept.items():
                setattr(kind, name, value)


class Bench:
    """A small checkpoint and the modules and engines made of it."""

    def __init__(self, folder: Path, device: torch.device):
        write_tiny(folder, hidden_size=256, num_layers=LAYERS)
        self.folder, self.device = folder, device
        self.config, self.tokenizer = read_checkpoint_config(folder), load_tokenizer(folder)
        self.scales = torch.full((8,), 0.01, device=device)

    def lora(self, dtype: str):
        """The checkpoint with LoRA on every projection."""
        return attach_lora(
            load_base(self.folder, self.config, dtype),
            rank=8,
            alpha=16,
            dropout=0.05,
            target_modules=list(DEFAULT_LORA_TARGETS),
            seed=0,
            base_name="tiny",
        )

    def inputs(self, *, with_index: bool = True) -> dict:
        """A micro-batch on the device."""
        return make_batch(self.config, self.tokenizer, with_index=with_index).model_inputs(self.device)

    def module_waits(self, **settings) -> Counter[str]:
        """Counts of one micro-batch through the bare module."""
        dtype = "bf16" if self.device.type == "cuda" else "fp32"
        module = training_forward(self.lora(dtype).to(self.device).train(), self.config, **settings)
        inputs = self.inputs(with_index=settings.get("forward_impl") != "upstream")

        def micro_batch() -> None:
            loss, _, report = module(inputs, 0.1, self.scales)
            assert not report.problems
            loss.backward()

        micro_batch()  # the first one draws up what later ones reuse
        return counted(micro_batch, self.device)

    def engine_waits(self, stage: int, *, overrides: dict | None = None) -> Counter[str]:
        """Counts of all micro-batches of one optimizer step through the engine, without the update.

        Args:
            overrides: keys of the resolved DeepSpeed JSON that are replaced, a section at a time.
        """
        flags = parse_args(["--train_manifest", "x", "--output_dir", "x"])
        raw = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text(encoding="utf-8"))
        # Resolved as for a GPU, whatever this is.
        ds_config = resolve(
            raw, flags, world_size=1, on_cpu=False, layer=LayerSizes.from_spec(HiggsV2Spec.from_config(self.config))
        )
        for section, values in (overrides or {}).items():
            ds_config[section] = ds_config[section] | values
        asked = AskedDevice()
        with asked() if self.device.type == "cpu" else contextlib.nullcontext():
            with loading(ds_config):
                lora = self.lora("bf16")
            engine = Engine(training_forward(lora, self.config), ds_config, weight_decay=0.0, max_grad_norm=1.0)
            engine.train()
            inputs = self.inputs()

            def micro_batches(count: int = 1) -> None:
                for _ in range(count):
                    loss, _, report = engine.forward(inputs, 0.1, self.scales)
                    assert not report.problems
                    engine.backward(loss)

            for _ in range(STEPS_BEFORE):
                micro_batches()
                engine.step(1e-4)
            asked.waits = 0
            found = counted(lambda: micro_batches(MICRO_BATCHES), self.device)
        found["synchronisations"] += asked.waits
        return found


def counted(run, device: torch.device) -> Counter[str]:
    """Counts of one run, as the device allows."""
    return profiled(run) if device.type == "cuda" else dispatched(run)


def total(found: Counter[str]) -> int:
    """Waits of all kinds; `item` is what calls `_local_scalar_dense`, and not another."""
    return sum(found[column] for column in COLUMNS if column != "item")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    measuring_device()
    ranks = start_ranks()
    modules = {
        "upstream": {"forward_impl": "upstream", "loss_impl": "reference"},
        "padding_free, reference loss": {"loss_impl": "reference"},
        "padding_free, checkpointed": {"checkpoint_every": 1},
        "padding_free": {},
    }
    engines = {
        "engine, ZeRO-3": (3, {}),
        "engine, ZeRO-2, throughput timer": (2, {"timers": {"throughput": {"enabled": True, "synchronized": True}}}),
        "engine, ZeRO-2, overlap_comm": (2, {"zero_optimization": {"overlap_comm": True}}),
        "engine, ZeRO-2": (2, {}),
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), ranks.device)
        found = {case: (bench.module_waits(**settings), 1) for case, settings in modules.items()}
        for case, (stage, overrides) in engines.items():
            found[case] = bench.engine_waits(stage, overrides=overrides), MICRO_BATCHES
    for case, (waits, batches) in found.items():
        rows.append({"forward": case, **{c: waits[c] / batches for c in COLUMNS}, "total": total(waits) / batches})
    figure = max(row["total"] for row in rows if row["forward"] in ("padding_free", "engine, ZeRO-2"))
    report(
        f"waits for the device in one micro-batch's forward and backward, {LAYERS} layers",
        rows,
        figure=figure,
        bar=0,
        holds=figure == 0,
        json_file=args.json,
    )
    return leave_ranks(0 if figure == 0 else 1)


if __name__ == "__main__":
    end_process(main())
