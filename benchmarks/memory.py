"""What the real model's forward keeps for its backward, and the operations of both, counted without a GPU.

The 5.8 B model in bf16, LoRA rank 16 on all projections, one micro-batch of speech rows as batches by token budget cut
them. Tensors have sizes and a device, `cuda`, but no data: what autograd keeps there is counted byte by byte, and so
are the products of forward and backward. What kernels need for a moment, and how long they take, only a GPU shows.

usage: python benchmarks/memory.py [--tokens 8192] [--gpu_gb 80] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.gpu import config_of  # noqa: E402
from benchmarks.report import report  # noqa: E402
from benchmarks.step import make_samples  # noqa: E402
from higgs_ds.batching.batch_plan import TokenPlan  # noqa: E402
from higgs_ds.batching.collate import Batch, Collator  # noqa: E402
from higgs_ds.distributed.ds_config import LayerSizes, read_deepspeed_config, resolve  # noqa: E402
from higgs_ds.model import lora as model  # noqa: E402
from higgs_ds.model.families import HIGGS_V2  # noqa: E402
from higgs_ds.model.higgs_v2.forward import training_forward  # noqa: E402
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS  # noqa: E402
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec  # noqa: E402
from higgs_ds.model.higgs_v2.upstream import HiggsAudioForTraining  # noqa: E402
from higgs_ds.model.memory import Load, RankMemory, Weights  # noqa: E402
from higgs_ds.model.quantized import QuantizedLinear  # noqa: E402
from higgs_ds.options.parse import parse_args  # noqa: E402
from higgs_ds.tools.plan import FILLED  # noqa: E402

CASES = {
    "no checkpointing": (0, False),
    "every 4th layer": (4, False),
    "every 2nd layer": (2, False),
    "every layer": (1, False),
    "no checkpointing, nf4": (0, True),
    "every layer, nf4": (1, True),
}
BOOKS = 8
KEPT_BAR = 2.85  # MB a token without checkpointing: what it must not grow back to


def lora_model(config, dropout: float = 0.05, quantized: bool = False):
    """The model with LoRA on all projections, on the device without memory; `quantized` as by `--base_dtype nf4`."""
    with torch.device("meta"):
        base = HiggsAudioForTraining._from_config(config, torch_dtype=torch.bfloat16)
    for place, layer in list(base.layers.named_modules()) if quantized else ():
        if isinstance(layer, torch.nn.Linear):
            base.layers.set_submodule(place, QuantizedLinear(layer.weight, None, torch.bfloat16, torch.device("meta")))
    base.requires_grad_(False)
    targets = list(DEFAULT_LORA_TARGETS)
    lora = model.attach_lora(base, rank=16, alpha=32, dropout=dropout, target_modules=targets, seed=0, base_name="none")
    return lora.to(torch.bfloat16).train()


def batch_of(config, tokenizer, tokens: int) -> Batch:
    """A micro-batch of about so many tokens, of rows of about one length."""
    samples = make_samples(tokens // 4, config, tokenizer, None)
    collator = Collator(HiggsV2Spec.from_config(config), with_index=True)
    lengths = torch.tensor([collator([sample]).num_tokens for sample in samples]).numpy()
    plan = TokenPlan(lengths, max_tokens=tokens, grad_accum=1, world_size=1, seed=0)
    (step,) = plan.steps(0, 1, 1)
    return collator([samples[i] for i in step.micro_batches[0].rows])


@contextlib.contextmanager
def meta_has_no_autocast():
    """transformers turns autocast off by the device's name, which torch does not know for "meta"."""
    autocast = torch.autocast

    def known(device_type, **settings):
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, **settings)

    with mock.patch.object(torch, "autocast", known):
        yield


def addmm_flops(onto, first, second, **_) -> int:
    """Of a product that is added in place, by shapes."""
    return 2 * first[0] * first[1] * second[1]


def operations(config, batch: Batch, every: int, quantized: bool = False) -> float:
    """FLOP of the products in one forward and backward, attention's left out."""
    module = training_forward(lora_model(config, quantized=quantized), config, checkpoint_every=every)
    in_place = {torch.ops.aten.addmm_: addmm_flops}  # torch's counter does not know it
    with meta_has_no_autocast(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, *_ = module(batch.model_inputs("meta"), 0.1, torch.full((BOOKS,), 0.1, device="meta"))
        loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    counts = counter.get_flop_counts()["Global"]
    return float(sum(count for op, count in counts.items() if "bmm" not in str(op) and "attention" not in str(op)))


def planned(config, every: int, quantized: bool = False, *, stage: int = 1, world_size: int = 1) -> RankMemory:
    """The same by the arithmetic of `python -m higgs_ds plan`."""
    flags = {"train_manifest": "-", "output_dir": "-", "activation_checkpointing": every or "none"}
    flags |= {"base_dtype": "nf4"} if quantized else {}
    options = parse_args([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    spec, raw = HiggsV2Spec.from_config(config), read_deepspeed_config(f"ds_configs/zero{stage}.json")
    layer = LayerSizes.from_spec(spec)
    ds_config = resolve(raw, options, world_size=world_size, on_cpu=False, layer=layer)
    return RankMemory(options, spec, Weights.of(HIGGS_V2, config, options), ds_config, world_size)


def kept_bytes(config, batch: Batch, every: int, quantized: bool = False) -> tuple[int, int]:
    """(bytes that autograd keeps after the forward, bytes of all weights)."""
    module = training_forward(lora_model(config, quantized=quantized), config, checkpoint_every=every)
    fake = FakeTensorMode()

    def on_gpu(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    def flash(query, key, value, dropout_p=0.0, is_causal=False, **_):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with fake:
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = torch.nn.Parameter(on_gpu(value), requires_grad=value.requires_grad)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = on_gpu(value)
        inputs = {
            name: value if value is None else value._each(on_gpu) if name == "index" else on_gpu(value)
            for name, value in batch.model_inputs().items()
        }
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with mock.patch("higgs_ds.model.flat_rows.F.scaled_dot_product_attention", flash), hooks:
            loss, *_ = module(inputs, 0.1, torch.full((BOOKS,), 0.1, device="cuda"))
        assert loss.device.type == "cuda" and loss.requires_grad
        held = [*module.parameters(), *module.buffers()]  # quantized weights are buffers
        weights = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in held}
    return sum(s.nbytes() for address, s in kept.items() if address not in weights), sum(weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of the micro-batch")
    parser.add_argument("--gpu_gb", type=float, default=80.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config, tokenizer = config_of(True)
    batch = batch_of(config, tokenizer, args.tokens)
    tokens, rows = batch.num_tokens, []
    for case, how in CASES.items():
        kept, weights = kept_bytes(config, batch, *how)
        plan, load = planned(config, *how), Load.of(batch.index)
        rows.append(
            {
                "": case,
                "tokens": tokens,
                "GFLOP a token": operations(config, batch, *how) / tokens / 1e9,
                "weights, GB": weights / 1e9,
                "kept, GB": kept / 1e9,
                "kept, MB a token": kept / tokens / 1e6,
                "planned": sum(plan.kept(load)) / tokens / 1e6,
                f"tokens in {args.gpu_gb:g} GB": plan.largest(FILLED * args.gpu_gb * 1e9, load),
            }
        )
    report(
        "kept for the backward by the 5.8 B model in bf16, counted on tensors without data",
        rows,
        figure={"kept, MB a token": rows[0]["kept, MB a token"], "GFLOP a token": rows[0]["GFLOP a token"]},
        bar={"kept, MB a token": KEPT_BAR},
        holds=rows[0]["kept, MB a token"] <= KEPT_BAR,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
