"""A whole training step against what users pick instead, on the same rows and weights, in one run of real ranks.

naive: upstream's forward, plain cross-entropy over the logits of every position, random batches of 8 rows; for Higgs
       TTS 3, which has no upstream, Qwen3's layers as transformers computes them, padded and with a mask.
ours:  batches by token budget, the padding-free forward, the fused loss, under the trainer with its guard.

Both see every row once a pass; passes alternate, and the median counts. A learned token is a text label or a labelled
audio frame. Peak memory is what a first pass adds to the idle process at its highest, and one model's weights.

usage: python benchmarks/step.py [--family v3] [--stage 2|3] [--ranks 2] [--dtype fp32] [--rows 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
NAIVE_ROWS = 8  # a rank and micro-batch
BARS = {("v2", 2): 7.5, ("v2", 3): 5.0, ("v3", 2): 6.0, ("v3", 3): 4.0}
MEMORY_BAR = 0.5
FULL_VOCABULARY = 128256
FASTER, SMALLER = "times as fast, learned tokens a second", "peak memory, of naive's"
WORKER = "HIGGS_DS_BENCHMARK_WORK"
# By the model's type: around a speech row's text, and the learned end of a row.
PROMPTS = {
    "v2": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>",
    ),
    "higgs_multimodal_qwen3": ("<|tts|><|text|>", "", "<|audio|>"),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("v2", "v3"), default="v2")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", type=int, default=64, help="speech rows of a pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=FULL_VOCABULARY)
    parser.add_argument("--max_tokens", type=int, help="of our micro-batches (default: as many as the naive ones hold)")
    parser.add_argument("--seconds", type=float, help="every clip as long as this, instead of lognormal lengths")
    parser.add_argument("--activation_checkpointing", type=int, default=0, help="every N-th layer of ours")
    parser.add_argument("--no_naive", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    from benchmarks.report import report

    rows = measure(sys.argv[1:])
    figure, bar = {}, {}
    if not args.no_naive:
        naive, ours = rows
        figure = {
            FASTER: ours["learned tokens/s"] / naive["learned tokens/s"],
            SMALLER: ours["peak memory, GB"] / naive["peak memory, GB"],
        }
        bar = {FASTER: BARS[args.family, 3 if args.stage == 3 else 2], SMALLER: MEMORY_BAR}
    report(
        f"one optimizer step: {args.ranks} ranks, ZeRO-{args.stage}, {args.dtype}, hidden {args.hidden}, "
        f"{args.layers} layers, {args.vocabulary:,} tokens",
        rows,
        figure=figure,
        bar=bar,
        holds=not figure or (figure[FASTER] >= bar[FASTER] and figure[SMALLER] <= bar[SMALLER]),
        json_file=args.json,
    )


def measure(words: list[str]) -> list[dict]:
    """Runs the ranks with these flags; a row for naive, unless it is left out, and one for ours."""
    with tempfile.TemporaryDirectory() as name:
        return _measure(words, Path(name))


def _measure(words: list[str], work: Path) -> list[dict]:
    from benchmarks.report import measuring_device
    from higgs_ds.model.higgs_v2 import tiny as v2
    from higgs_ds.model.higgs_v3 import tiny as v3

    measuring_device()
    args = parse(words)
    sizes = {"hidden_size": args.hidden, "num_layers": args.layers}
    if args.family == "v2":
        ffn_size = 128 * round(args.hidden * 8 / 3 / 128)  # the real model's proportion
        v2.write_tiny(work / "base", vocab_size=args.vocabulary, ffn_size=ffn_size, **sizes)
    else:
        v3.write_tiny(work / "base", **sizes)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}", str(Path(__file__))]
    threads = str(max(1, (os.cpu_count() or 1) // args.ranks))
    env = {**os.environ, WORKER: str(work), "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *launch, *words], cwd=ROOT, env=env, check=True)
    return json.loads((work / "result.json").read_text())["rows"]


def make_samples(count: int, config, tokenizer, seconds: float | None):
    """Speech rows as the collator takes them: lognormal lengths (median 5.5 s, 1 to 20 s), 4 text tokens a second."""
    import numpy as np
    import torch

    from higgs_ds.batching.collate import Sample

    draw = np.random.default_rng(0)
    codes_of = torch.Generator().manual_seed(0)
    before, behind, end = PROMPTS.get(config.model_type, PROMPTS["v2"])
    samples = []
    for number in range(count):
        lasts = seconds or float(np.clip(np.exp(draw.normal(math.log(5.5), 0.6)), 1, 20))
        words = "".join(chr(97 + c) for c in draw.integers(0, 26, max(4, round(4 * lasts))))
        ids = tokenizer.encode(f"{before}{words}{behind}", add_special_tokens=False)
        learned = tokenizer.encode(end, add_special_tokens=False)
        labels = torch.tensor([-100] * len(ids) + learned)
        codes = torch.randint(0, 1024, (8, round(25 * lasts)), generator=codes_of)
        samples.append(Sample(torch.tensor(ids + learned), labels, (codes,), f"row:{number}"))
    return samples


def learned_tokens(batch) -> int:
    """Text labels, and frames with a label in some codebook."""
    from higgs_ds.loss import IGNORE, audio_targets

    return batch.text_count + int((audio_targets(batch.label_audio_ids) != IGNORE).any(1).sum())


def work_as_rank(args: argparse.Namespace, work: Path) -> None:
    import torch

    from higgs_ds import run
    from higgs_ds.batching.batch_plan import TokenPlan
    from higgs_ds.batching.collate import Collator
    from higgs_ds.distributed.engine import Engine, leave_ranks, loading, start_ranks
    from higgs_ds.model.families import family_of, open_base
    from higgs_ds.options.parse import parse_args
    from higgs_ds.process import end_process
    from higgs_ds.setup import settle
    from higgs_ds.trainer import Trainer

    ranks = start_ranks()
    flags = f"--train_manifest x --output_dir {work} --dtype {args.dtype} --batch_size {NAIVE_ROWS} --seed 0"
    checkpointed = ["--activation_checkpointing", str(args.activation_checkpointing or "none")]
    raw = json.loads((ROOT / f"ds_configs/zero{args.stage}.json").read_text())
    base = open_base(str(work / "base"))
    setup = settle(parse_args([*flags.split(), *checkpointed]), raw, base, ranks)
    config, tokenizer, spec = base.config, base.tokenizer, base.spec
    samples = make_samples(args.rows, config, tokenizer, args.seconds)

    def engine_for(forward=None) -> Engine:
        ranks.seed(0)
        with loading(setup.ds_config):
            model = family_of(base).load_base(base.folder, config, args.dtype)
        return run.adapt(setup, model, ranks, forward=forward)

    before = resident()
    ours = engine_for()
    one_model = resident() - before
    as_naive = {"v2": naive_forward, "v3": naive_forward_v3}[args.family]
    naive = None if args.no_naive else engine_for(lambda m: as_naive(m, spec.num_codebooks))

    plain, flat = Collator(spec, with_index=args.family == "v3"), Collator(spec, with_index=True)
    tokens = torch.tensor([flat([sample]).num_tokens for sample in samples]).numpy()
    budget = args.max_tokens or int(NAIVE_ROWS * tokens.mean())
    plan = TokenPlan(tokens, max_tokens=max(budget, tokens.max()), grad_accum=1, world_size=ranks.world_size, seed=0)
    trainer = Trainer(
        engine=ours,
        ranks=ranks,
        guard=run.make_guard(setup, ranks),
        weights=setup.weights,
        learning_rate=lambda step: 1e-4,
        on_bad_loss="raise",
        log_every=1,
        total_steps=1,
        eval_every=10**9,
    )
    trainer._checklist_due = False

    # Batches are made ahead: both would have them made by data workers.
    naive_steps = [
        plain([samples[(i * ranks.world_size + ranks.rank) * NAIVE_ROWS + k] for k in range(NAIVE_ROWS)])
        for i in range(args.rows // (NAIVE_ROWS * ranks.world_size))
    ]
    our_steps = [
        [flat([samples[i] for i in micro.rows], filler=micro.filler) for micro in step.micro_batches]
        for step in plan.steps(ranks.rank, 1, plan.steps_per_epoch)
    ]

    def run_naive() -> None:
        for batch in naive_steps:
            loss = naive.forward(batch.model_inputs(ranks.device))
            naive.backward(loss)
            naive.step(1e-4)

    def run_ours() -> None:
        for number, batches in enumerate(our_steps, start=1):
            result = trainer.train_step(number, batches, 1e-4)
            assert not result.failures, result.failures

    cases = {"ours": (run_ours, [batch for batches in our_steps for batch in batches])}
    if naive is not None:
        cases = {"naive": (run_naive, naive_steps)} | cases
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(args.repeats + 1):
        for name, (one_pass, _) in cases.items():
            if repeat == 0:  # warms up, and shows the memory: watching it, and giving it back, cost time
                give_back_memory()
                with Peak(ranks.device) as peak:
                    one_pass()
                    wait_for(ranks.device)
                peaks[name].append(peak.added)
                continue
            ranks.barrier()
            started = time.perf_counter()
            one_pass()
            wait_for(ranks.device)
            ranks.barrier()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, (_, batches) in cases.items():
        filled = [batch for batch in batches if not batch.filler]
        learned, real = ranks.sum([sum(map(learned_tokens, filled)), sum(batch.num_tokens for batch in filled)])
        median = statistics.median(seconds[name])
        memory = max(row[0] for row in ranks.table([statistics.median(peaks[name]) + one_model]))
        rows.append(
            {
                "": name,
                "rows": round(ranks.sum([sum(len(batch.origins) for batch in filled)])[0]),
                "learned tokens": round(learned),
                "seconds a pass": median,
                "slowest pass": max(seconds[name]),
                "learned tokens/s": learned / median,
                "tokens/s": real / median,
                "peak memory, GB": memory,
                "of which the model": one_model,
            }
        )
    if ranks.is_main:
        (work / "result.json").write_text(json.dumps({"rows": rows}))
    end_process(leave_ranks(0))


def naive_forward(model, num_codebooks: int):
    """Upstream's forward and a plain cross-entropy on every position of both heads, a mean of each."""
    import torch
    import torch.nn.functional as F

    class NaiveForward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            outputs = self.model(**inputs)
            text = outputs.logits[:, :-1].float().flatten(0, 1)
            audio = outputs.audio_logits[:-1].float().flatten(0, 1)
            text_loss = F.cross_entropy(text, outputs.expanded_labels[:, 1:].flatten(), ignore_index=-100)
            targets = inputs["label_audio_ids"].view(num_codebooks, -1)[:, 1:].t().flatten()
            return text_loss + F.cross_entropy(audio, targets, ignore_index=-100)

    return NaiveForward()


def naive_forward_v3(model, num_codebooks: int):
    """Qwen3's layers on padded rows with a mask, the table's product and a plain cross-entropy on every position.

    Of a batch's index it takes only the places of rows and labels in the padded batch.
    """
    import torch
    import torch.nn.functional as F

    class NaiveForward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            base, index = self.model.get_base_model(), inputs["index"]
            codes = inputs["audio_out_ids"]
            rows = base._embed(inputs["input_ids"].flatten()[index.text_index], [codes, codes[:, :0]])
            hidden = rows[index.pack_index].view(index.num_sequences, index.longest, -1)
            lengths = index.positions.new_zeros(index.num_sequences)
            lengths.scatter_reduce_(0, index.unpack_index // index.longest, index.positions, "amax")
            places = torch.arange(index.longest, device=hidden.device)
            mask = (places <= places[:, None]) & (places <= lengths[:, None, None, None])
            rope = [wave[:, 0] for wave in base.rope(places, hidden.dtype)]
            for layer in base.layers:
                hidden = hidden + self.attended(layer.self_attn, layer.input_layernorm(hidden), rope, mask)
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            logits = base.code_table(base.body["norm"](hidden)).float()
            labels = index.pack_index.new_full((logits.shape[0] * logits.shape[1], num_codebooks), -100)
            labels[index.unpack_index[index.output_rows[index.head_rows]]] = index.audio_targets
            return F.cross_entropy(logits.view(labels.numel(), -1), labels.flatten(), ignore_index=-100)

        def attended(self, attention, normed, rope, mask):
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            query, key, value = (p(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
            query, key = attention.q_norm(query), attention.k_norm(key)
            query, key = (rows * rope[0] + turned(rows) * rope[1] for rows in (query, key))
            groups = attention.num_key_value_groups
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return attention.o_proj(out.transpose(1, 2).flatten(2))

    def turned(rows):
        first, second = rows.chunk(2, -1)
        return torch.cat([-second, first], -1)

    return NaiveForward()


def resident() -> float:
    """Memory of this process now, GB; on a GPU what tensors take there."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def give_back_memory() -> None:
    """What the last pass freed goes back to the system, so that the next one's peak is its own."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def wait_for(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


class Peak:
    """The most memory that was added within the context, GB."""

    def __init__(self, device):
        self._on_gpu = device.type == "cuda"
        self._stop = threading.Event()
        self.added = 0.0

    def __enter__(self) -> Peak:
        import torch

        self._before = resident()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.added = max(self.added, resident() - self._before)

    def __exit__(self, *_) -> None:
        import torch

        if self._on_gpu:
            self.added = torch.cuda.max_memory_allocated() / 1e9 - self._before
        else:
            self._stop.set()
            self._thread.join()


if __name__ == "__main__":
    if WORKER in os.environ:
        work_as_rank(parse(), Path(os.environ[WORKER]))
    else:
        main()
