"""How often a micro-batch's forward and backward wait for the device, or would on a GPU.

On a CPU every operation is counted as it is dispatched, backward included: `nonzero` (and an index by a mask, which
calls it), `item` (`_local_scalar_dense`), other operations whose result's size depends on values, and copies between
host and device. On a GPU its profiler counts the same operations, and synchronisations and copies of the driver.

usage: python benchmarks/syncs.py [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.report import report  # noqa: E402
from higgs_ds.collate import Batch, Collator, Sample  # noqa: E402
from higgs_ds.config import DEFAULT_LORA_TARGETS  # noqa: E402
from higgs_ds.forward import training_forward  # noqa: E402
from higgs_ds.model import attach_lora, load_base, load_tokenizer, read_model_config  # noqa: E402
from higgs_ds.tiny import write_tiny  # noqa: E402

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
LAYERS = 4


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


def profiled(run) -> Counter[str]:
    """Counts of one run by the GPU's profiler."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
    found: Counter[str] = Counter()
    for event in seen.events():
        if event.name in NAMES and event.name != "aten::lift_fresh":
            found[NAMES[event.name]] += 1
        elif event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
            found["host copies"] += 1
        elif event.name in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            found["synchronisations"] += 1
    return found


def make_batch(config, tokenizer, *, with_layout: bool) -> Batch:
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
    return Collator.of(config, with_layout=with_layout)(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    cases = {
        "upstream": {"forward_impl": "upstream", "loss_impl": "reference"},
        "padding_free, reference loss": {"loss_impl": "reference"},
        "padding_free, checkpointed": {"checkpoint_every": 1},
        "padding_free": {},
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder, hidden_size=256, num_layers=LAYERS)
        config, tokenizer = read_model_config(folder), load_tokenizer(folder)
        model = attach_lora(
            load_base(folder, config, "bf16" if on_gpu else "fp32"),
            rank=8,
            alpha=16,
            dropout=0.05,
            target_modules=list(DEFAULT_LORA_TARGETS),
            seed=0,
            base_name="tiny",
        )
        model.to(device).train()
        for case, settings in cases.items():
            module = training_forward(model, config, **settings)
            batch = make_batch(config, tokenizer, with_layout=case != "upstream")
            inputs, scales = batch.model_inputs(device), torch.full((8,), 0.01, device=device)

            def micro_batch(module=module, inputs=inputs, scales=scales) -> None:
                loss, _, report = module(inputs, 0.1, scales)
                assert not report.problems
                loss.backward()

            micro_batch()  # the first one draws up what later ones reuse
            found = profiled(micro_batch) if on_gpu else dispatched(micro_batch)
            total = sum(found[column] for column in COLUMNS if column != "item")
            rows.append({"forward": case, **{c: found[c] for c in COLUMNS}, "total": total})
    figure = rows[-1]["total"]
    report(
        f"waits for the device in one micro-batch's forward and backward, {LAYERS} layers",
        rows,
        figure=figure,
        bar=0,
        holds=figure == 0,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
