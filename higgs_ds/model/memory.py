"""Memory of a rank by part, computed from the model's shapes, the resolved options and the micro-batch's size.

Tensors saved for the backward are counted one by one as in `higgs_v2.layers`, `fused_lora` and `fused_mlp`;
`benchmarks/memory.py` measures them on the model. Masters, moments, gradients and buffers are those of DeepSpeed
0.19.8. All sizes are in bytes; a GB is 10⁹ bytes.
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

NF4_BYTES = 0.5625  # per weight: 4 bits, and a float32 scale per 64 weights
# Allowances, not measured on a GPU: CUDA's context with the libraries' workspaces, and NCCL's channels to other ranks.
DRIVER_BYTES, NCCL_BYTES = 0.6e9, 0.5e9
PROCESS_BYTES = 0.76e9  # resident in a rank on a CPU, once torch and DeepSpeed are imported
LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters
CODEC_BYTES = 0.8e9  # Boson's codec, to decode samples
SAMPLE_TOKENS = 1000  # prompt and 30 seconds
GRAIN, MOST_TOKENS = 128, 2**20  # step and maximum of a token budget
OUTSIDE = "driver, NCCL"  # memory outside torch's allocator


@dataclass(frozen=True)
class Weights:
    """Parameter counts."""

    base: int  # of the checkpoint
    lora: int
    whole: int  # of the base, trained in full
    adapted: frozenset[str]  # projections with LoRA, by the last part of their names

    @classmethod
    def of(cls, family: Family, base_config: Any, config: TrainConfig) -> Weights:
        """Counts the parameters of a model trained with these options."""
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
    """Sizes of a micro-batch that determine its memory."""

    tokens: int
    learned: float = 0.8  # share of tokens with a label
    padding: float = 1.0  # padded tokens in attention per token

    @classmethod
    def of(cls, index: BatchIndex) -> Load:
        """Reads the sizes of a batch for the padding-free forward."""
        rows = index.num_rows
        return cls(rows, len(index.output_rows) / rows, len(index.pack_index) / rows)


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank; `ds_config` is resolved for `world_size` ranks."""

    config: TrainConfig
    spec: ModelSpec
    weights: Weights
    ds_config: dict
    world_size: int
    on_gpu: bool = True

    @property
    def _size(self) -> int:
        """Bytes per value in the compute dtype."""
        return DTYPES[self.config.model.dtype].itemsize

    def parts(self, batch: Load) -> dict[str, float]:
        """Returns bytes by part at the peak of a step or sample; their sum is the rank's memory."""
        (weights, lora, gradients, optimizer), _ = self.held()
        activations, heads = self._activations(batch), self._heads(batch)
        samples = max(0.0, self._samples() - activations - heads)  # activations are freed before sampling
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
        """Returns the bytes of all parts."""
        return sum(self.parts(batch).values())

    def measured(self, batch: Load) -> float:
        """Returns the bytes that `peak_memory_gib` measures: torch's tensors, or on a CPU the whole process."""
        return self.total(batch) - self.on_gpu * self.parts(batch)[OUTSIDE]

    def largest(self, limit: float, like: Load) -> int:
        """Finds the tokens, a multiple of `GRAIN`, of the largest micro-batch that fits in `limit` bytes."""
        sizes = range(0, MOST_TOKENS, GRAIN)
        fit = bisect.bisect(sizes, limit, key=lambda tokens: self.total(replace(like, tokens=tokens)))
        return max(0, fit - 1) * GRAIN

    @property
    def host(self) -> float:
        """Bytes offloaded to the host's memory."""
        return sum(self.held()[1])

    def held(self) -> tuple[list[float], list[float]]:
        """Returns bytes of (weights, trained parameters, gradients, optimizer) between steps: on device, offloaded."""
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
        # Stage 1 accumulates full gradients in float32 next to the backward's, later stages a rank's share.
        gradients = 4 * trained if plain else (4 + size) * trained if stage < 2 else 4 * trained / ranks
        bucket = zero.get("reduce_bucket_size", 0) * (4 if stage == 3 else size) if stage >= 2 else 0
        if stage < 3 and not self.on_gpu and self.config.model.dtype == "bf16":
            weights -= size * self.spec.vocab_size * self.spec.hidden_size  # memory-mapped, and few rows are read
        if stage == 3:
            weights /= ranks
            lora += size * trained / ranks  # every rank holds LoRA's full matrices and its shards
        device, host = [weights, lora, gradients + bucket, masters + moments], [0.0] * 4
        if _offloads(zero, "optimizer"):
            device[2:], host[2:] = [bucket, 0.0], [2 * gradients, masters + moments]
        if _offloads(zero, "param"):
            device[0], host[0] = 0.0, weights
        return device, host

    def _gathered(self) -> float:
        """Bytes of temporary full weights: of the largest projection, twice if it is dequantized from 4 bits.

        Under ZeRO-3 also the parameters that DeepSpeed keeps gathered for their next use.
        """
        size, spec = self._size, self.spec
        copies = (1 + bool(self.config.model.base_dtype)) * size * max(a * b for _, a, b in projections(spec))
        zero = self.ds_config["zero_optimization"]
        live = zero.get("stage3_max_live_parameters", LIVE_PARAMETERS) if zero["stage"] == 3 else 0
        return copies + size * min(live, self.weights.base)

    def kept_by_layer(self, batch: Load, *, last: bool = False) -> float:
        """Returns the bytes a layer saves for the backward; the last one has only labelled rows after its attention."""
        config, spec, size = self.config, self.spec, self._size
        hidden, ffn = spec.hidden_size, spec.ffn_size
        queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim

        def lora(width: int, *names: str) -> float:
            adapted = len(self.weights.adapted.intersection(names))
            return bool(adapted) * (width * bool(config.lora.lora_dropout) + adapted * config.lora.lora_r * size)

        # On a GPU a norm saves its input, on a CPU a float32 copy.
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
        """Returns the bytes saved for the backward by each layer; the first includes tensors outside the layers."""
        spec, every = self.spec, self.config.model.checkpoint_every
        around = batch.tokens * self._size * (2 * spec.hidden_size * batch.learned + 2 * spec.head_dim)
        whole = [self.kept_by_layer(batch, last=n == spec.num_layers - 1) for n in range(spec.num_layers)]
        kept = [self._input(batch) if every and n % every == 0 else size for n, size in enumerate(whole)]
        return [kept[0] + around, *kept[1:]]

    def _input(self, batch: Load) -> float:
        return batch.tokens * self.spec.hidden_size * self._size

    def _activations(self, batch: Load) -> float:
        """Peak of the backward: the rest of `kept`, and the current layer's temporaries, recomputed if checkpointed."""
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
        """Bytes of a chunk's logits, as far as they exceed the backward's peak, and of gradients of trained heads."""
        spec, size, rows = self.spec, self._size, batch.tokens * batch.learned
        classes = spec.num_codebooks * spec.num_classes
        chunk = min(4 * rows * classes, CHUNK_BYTES)
        in_float = chunk if self.on_gpu else min(chunk, BLOCK_BYTES)
        trained = self.weights.whole * (4 + size)
        logits = chunk * size / 4 + (in_float if size < 4 else 0)
        return max(0.0, sum(self.kept(batch)) + logits - self._activations(batch)) + trained

    def _samples(self) -> float:
        """Bytes for sampling: keys and values, the codec, and under ZeRO-3 a full copy of the model."""
        run, spec = self.config.run, self.spec
        if not (run.sample_every or run.sample_texts or run.sample_count):
            return 0.0
        copied = self.ds_config["zero_optimization"]["stage"] == 3
        values = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim * SAMPLE_TOKENS
        return self._size * (values + copied * (self.weights.base + self.weights.lora)) + CODEC_BYTES


def _offloads(zero: dict, what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device") == "cpu"
