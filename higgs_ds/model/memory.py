"""Memory of a rank by its parts, by arithmetic: from the model's shapes, the resolved options and a micro-batch's size.

What is kept for the backward is counted tensor by tensor as `higgs_v2.layers`, `fused_lora` and `fused_mlp` keep it;
`benchmarks/memory.py` counts the same on the model itself. Masters, moments, gradients and buffers are as DeepSpeed
0.19.8 holds them. All sizes are bytes; a GB is 10⁹ of them.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .base import DTYPES
from .files.adapter_names import layers_named
from .flops import projections
from .fused_head import BLOCK_BYTES, CHUNK_BYTES

if TYPE_CHECKING:
    from ..batching.batch_index import BatchIndex
    from ..options.sections import TrainConfig
    from .family import Family
    from .spec import ModelSpec

NF4_BYTES = 0.5625  # a weight: 4 bits, and a float32 scale for 64 of them
# Allowances, not measured on a GPU: CUDA's context with the libraries' workspaces, and NCCL's channels to other ranks.
DRIVER_BYTES, NCCL_BYTES = 0.6e9, 0.5e9
PROCESS_BYTES = 0.76e9  # resident in a rank on a CPU, once torch and DeepSpeed are imported
LIVE_PARAMETERS = 10**9  # DeepSpeed's own stage3_max_live_parameters
CODEC_BYTES = 0.8e9  # Boson's, which turns samples into sound
SAMPLE_TOKENS = 1000  # prompt and 30 seconds
GRAIN, MOST_TOKENS = 128, 2**20  # of a token budget
OUTSIDE = "driver, NCCL"  # the part that is none of torch's tensors


@dataclass(frozen=True)
class Weights:
    """Numbers of values."""

    base: int  # of the checkpoint
    lora: int
    whole: int  # of the base, trained in full
    adapted: frozenset[str]  # projections with LoRA, by the last part of their names

    @classmethod
    def of(cls, family: Family, base_config: Any, config: TrainConfig) -> Weights:
        """Of a model as these options train it."""
        modules, (linears, savable) = family.modules, family.adaptable_modules(base_config)
        adapted = layers_named(modules.targets(config.lora.lora_target_modules), linears)
        whole = layers_named(
            modules.trained_whole(config.lora.train_audio_embeddings, config.lora.train_heads), savable
        )
        empty = family.empty_base(base_config, config.model.dtype)
        return cls(
            sum(parameter.numel() for parameter in empty.parameters()),
            config.lora.lora_r * sum(sum(linears[name]) for name in adapted),
            sum(math.prod(savable[name]) for name in whole),
            frozenset(name.rsplit(".", 1)[-1] for name in adapted),
        )


@dataclass(frozen=True)
class Load:
    """Sizes of a micro-batch that memory depends on."""

    tokens: int
    learned: float = 0.8  # share of its tokens that a head predicts from
    padding: float = 1.0  # places of attention, by tokens

    @classmethod
    def of(cls, index: BatchIndex) -> Load:
        """Of a batch that the padding-free forward takes."""
        rows = index.num_rows
        return cls(rows, len(index.output_rows) / rows, len(index.pack_index) / rows)


@dataclass(frozen=True)
class RankMemory:
    """A run's memory on one of its ranks; `ds_config` as resolved for so many ranks."""

    config: TrainConfig
    spec: ModelSpec
    weights: Weights
    ds_config: dict
    world_size: int
    on_gpu: bool = True

    @property
    def _size(self) -> int:
        """Bytes of a value that is computed with."""
        return DTYPES[self.config.model.dtype].itemsize

    def parts(self, batch: Load) -> dict[str, float]:
        """Bytes by part, at the moment in which a step or a sample takes most; all together they are the rank's."""
        (weights, lora, gradients, optimizer), _ = self.held()
        activations, heads = self._activations(batch), self._heads(batch)
        samples = max(0.0, self._samples() - activations - heads)  # spoken when activations are gone
        ranks = NCCL_BYTES if self.world_size > 1 else 0.0
        return {
            "weights": weights + self._gathered(),
            "LoRA": lora,
            "optimizer": optimizer,
            "gradients": gradients,
            "activations": activations,
            "heads": heads,
            "samples": samples,
            OUTSIDE: DRIVER_BYTES + ranks if self.on_gpu else PROCESS_BYTES,
        }

    def total(self, batch: Load) -> float:
        """Bytes of all parts."""
        return sum(self.parts(batch).values())

    def measured(self, batch: Load) -> float:
        """Bytes that `peak_memory_gib` will find: of torch's tensors, on a CPU of the process."""
        return self.total(batch) - self.on_gpu * self.parts(batch)[OUTSIDE]

    def largest(self, limit: float, like: Load) -> int:
        """The tokens of the largest micro-batch whose total is at most so many bytes, a multiple of `GRAIN`."""
        sizes = range(0, MOST_TOKENS, GRAIN)
        fit = bisect.bisect(sizes, limit, key=lambda tokens: self.total(replace(like, tokens=tokens)))
        return max(0, fit - 1) * GRAIN

    @property
    def host(self) -> float:
        """Bytes that are offloaded to the host's memory."""
        return sum(self.held()[1])

    def held(self) -> tuple[list[float], list[float]]:
        """(weights, LoRA and all that trains, gradients, optimizer) between steps: on the device, and offloaded."""
        zero, size, ranks = self.ds_config["zero_optimization"], self._size, self.world_size
        stage, count = zero["stage"], self.weights
        trained = count.lora + count.whole
        weights: float = size * (count.base - count.whole)
        if self.config.model.base_dtype:
            weights -= (size - NF4_BYTES) * self.spec.num_layers * self.spec.layer_parameters
        plain = stage == 0 and self.config.model.dtype == "fp32"  # the weights are their own masters
        shares = ranks if stage else 1
        lora, masters = float(size * trained), 0.0 if plain else 4 * trained / shares
        moments = 8 * trained / shares
        # Stage 1 adds up whole gradients in float32 beside the backward's own, later stages a rank's share.
        gradients = 4 * trained if plain else (4 + size) * trained if stage < 2 else 4 * trained / ranks
        bucket = zero.get("reduce_bucket_size", 0) * (4 if stage == 3 else size) if stage >= 2 else 0
        if stage < 3 and not self.on_gpu and self.config.model.dtype == "bf16":
            weights -= size * self.spec.vocab_size * self.spec.hidden_size  # mapped, and few of its rows are read
        if stage == 3:
            weights /= ranks
            lora += size * trained / ranks  # LoRA's matrices stay whole on every rank, beside their shards
        device, host = [weights, lora, gradients + bucket, masters + moments], [0.0] * 4
        if _offloads(zero, "optimizer"):
            device[2:], host[2:] = [bucket, 0.0], [2 * gradients, masters + moments]
        if _offloads(zero, "param"):
            device[0], host[0] = 0.0, weights
        return device, host

    def _gathered(self) -> float:
        """Whole weights that a rank holds for a moment: a projection's beside its B, made of 4 bits before.

        Under ZeRO-3 also as many as DeepSpeed keeps gathered for their next use.
        """
        size, spec = self._size, self.spec
        copies = (1 + bool(self.config.model.base_dtype)) * size * max(a * b for _, a, b in projections(spec))
        zero = self.ds_config["zero_optimization"]
        live = zero.get("stage3_max_live_parameters", LIVE_PARAMETERS) if zero["stage"] == 3 else 0
        return copies + size * min(live, self.weights.base)

    def kept_by_layer(self, batch: Load, *, last: bool = False) -> float:
        """Bytes that a decoder layer keeps for the backward, the last one of learned rows behind its attention."""
        config, spec, size = self.config, self.spec, self._size
        hidden, ffn = spec.hidden_size, spec.ffn_size
        queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim

        def lora(width: int, *names: str) -> float:
            adapted = len(self.weights.adapted.intersection(names))
            return bool(adapted) * (width * bool(config.lora.lora_dropout) + adapted * config.lora.lora_r * size)

        # A GPU's norm keeps its input, a CPU's a copy in float32.
        norm = hidden * (size if self.on_gpu else 4) + 4
        key_heads = keys if self.on_gpu and size < 4 else queries  # see `flat_rows.causal_attention`
        attention = norm + hidden * size + lora(hidden, "q_proj", "k_proj", "v_proj")
        if spec.norms_heads:
            attention += (queries + keys) * (size if self.on_gpu else 4)
        padded = (2 * queries + 2 * key_heads) * size + 4 * spec.num_heads
        behind = queries * size + lora(queries, "o_proj") + norm + hidden * size
        behind += 2 * ffn * size + lora(hidden, "gate_proj", "up_proj") + lora(ffn, "down_proj")
        return batch.tokens * (attention + batch.padding * padded + (batch.learned if last else 1.0) * behind)

    def kept(self, batch: Load) -> list[float]:
        """Bytes that are kept for the backward by each decoder layer, the first with what is kept beside them."""
        spec, every = self.spec, self.config.model.checkpoint_every
        around = batch.tokens * self._size * (2 * spec.hidden_size * batch.learned + 2 * spec.head_dim)
        whole = [self.kept_by_layer(batch, last=n == spec.num_layers - 1) for n in range(spec.num_layers)]
        kept = [self._input(batch) if every and n % every == 0 else size for n, size in enumerate(whole)]
        return [kept[0] + around, *kept[1:]]

    def _input(self, batch: Load) -> float:
        return batch.tokens * self.spec.hidden_size * self._size

    def _activations(self, batch: Load) -> float:
        """The most that the backward holds: what is left of `kept`, and one layer at work, made again where it must."""
        spec, every, left, most = self.spec, self.config.model.checkpoint_every, self.kept(batch), 0.0
        while left:
            last = len(left) == spec.num_layers
            rows = batch.tokens * (batch.learned if last else 1.0)
            at_work = rows * self._size * (4 * spec.ffn_size + 3 * spec.hidden_size)
            if every and (len(left) - 1) % every == 0:
                at_work += self.kept_by_layer(batch, last=last) - self._input(batch)
            most = max(most, sum(left) + at_work)
            left.pop()
        return most

    def _heads(self, batch: Load) -> float:
        """Logits of a chunk of rows, beyond what the backward takes, and the gradient of heads that train."""
        spec, size, rows = self.spec, self._size, batch.tokens * batch.learned
        classes = spec.num_codebooks * spec.num_classes
        chunk = min(4 * rows * classes, CHUNK_BYTES)
        in_float = chunk if self.on_gpu else min(chunk, BLOCK_BYTES)
        trained = self.weights.whole * (4 + size)
        logits = chunk * size / 4 + (in_float if size < 4 else 0)
        return max(0.0, sum(self.kept(batch)) + logits - self._activations(batch)) + trained

    def _samples(self) -> float:
        """Bytes to speak with: keys and values, the codec, and under ZeRO-3 a whole copy of the model."""
        run, spec = self.config.run, self.spec
        if not (run.sample_every or run.sample_texts or run.sample_count):
            return 0.0
        copied = self.ds_config["zero_optimization"]["stage"] == 3
        values = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim * SAMPLE_TOKENS
        return self._size * (values + copied * (self.weights.base + self.weights.lora)) + CODEC_BYTES


def _offloads(zero: dict, what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device") == "cpu"
