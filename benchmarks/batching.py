"""How much is computed for each real token, on 8 ranks that wait for the slowest: by token budget and naively.

usage: python benchmarks/batching.py [--manifest FILE] [--json FILE]

A manifest's clips are encoded and its tokens counted as training does (sample codec, byte-level tokenizer); without
one, the shipped speech is taken. Three lengths of micro-batch count: its tokens (a forward without padding), its rows
× the longest (what the attention is padded to), and that rounded up to 8 (upstream's forward, with a plan for it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
from report import report  # noqa: E402

from higgs_ds.batching.batch_plan import TokenPlan  # noqa: E402
from higgs_ds.batching.length_buckets import slowest  # noqa: E402
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec  # noqa: E402

RANKS = 8
EPOCHS = 3
BAR = 1.03
COSTS = ("flat", "attention", "upstream")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=ROOT / "examples/speech/manifest.jsonl")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plan_only", action="store_true", help=argparse.SUPPRESS)  # the child that is measured
    args = parser.parse_args()
    if args.plan_only:
        print(json.dumps(planning(1_000_000)))
        return
    rows: list[dict] = []
    figure: dict[str, float] = {}
    speech = manifest_tokens(args.manifest)
    drawn = lognormal_tokens(100_000)
    for name, tokens, budgets in (
        (f"{args.manifest.parent.name}, {len(speech)} rows", speech, (1024, 2048, 4096)),
        (f"lognormal, {len(drawn):,} rows", drawn, (2048, 8192, 16384)),
    ):
        for budget in budgets:
            ours, steps, mean = by_budget(tokens, budget)
            rows.append({"data": name, "batches": f"up to {budget} tokens", "steps": steps, **ours})
            figure[f"{name}, up to {budget}"] = ours["flat"]
            if budget == budgets[1]:
                count = max(1, round(mean / tokens.mean()))
                theirs, steps = naive(tokens, count)
                rows.append({"data": name, "batches": f"{count} rows at random", "steps": steps, **theirs})
    bar = dict.fromkeys(figure, BAR)
    child = [sys.executable, __file__, "--plan_only"]
    planned = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    figure |= planned
    bar |= {"1,000,000 rows planned, s": 10.0, "peak memory of that, GB": 1.0}
    report(
        f"computed ÷ real tokens, slowest of {RANKS} ranks included ({EPOCHS} epochs)",
        rows,
        figure=figure,
        bar=bar,
        holds=all(figure[name] <= limit for name, limit in bar.items()),
        json_file=args.json,
    )


def by_budget(tokens: np.ndarray, budget: int) -> tuple[dict[str, float], int, float]:
    """Computed ÷ real by kind of forward, steps an epoch, and the mean tokens of a micro-batch."""
    ratios: dict[str, float] = {}
    for round_to, kinds in ((8, ("upstream",)), (1, ("flat", "attention"))):
        plan = TokenPlan(tokens, max_tokens=budget, grad_accum=1, world_size=RANKS, seed=42, round_to=round_to)
        spent, batches = dict.fromkeys(COSTS, 0.0), 0
        for epoch in range(EPOCHS):
            drawn = plan.epoch(epoch)
            for place in range(plan.steps_per_epoch):
                step = [tokens[list(rows)] for rows in drawn.step(place)]
                batches += len(step)
                add(spent, step)
        real = EPOCHS * tokens.sum()
        ratios |= {kind: round(float(spent[kind] / real), 4) for kind in kinds}
    return {kind: ratios[kind] for kind in COSTS}, plan.steps_per_epoch, real / batches


def naive(tokens: np.ndarray, rows: int) -> tuple[dict[str, float], int]:
    """The same for random batches of a fixed number of rows, padded to the longest whatever the forward."""
    random, spent = np.random.RandomState(0), dict.fromkeys(COSTS, 0.0)
    for _ in range(EPOCHS):
        order = tokens[random.permutation(len(tokens))]
        batches = [order[i : i + rows] for i in range(0, len(order), rows)]
        for i in range(0, len(batches), RANKS):
            add(spent, batches[i : i + RANKS])
    ratios = {name: round(float(cost / (EPOCHS * tokens.sum())), 4) for name, cost in spent.items()}
    return ratios, -(-len(tokens) // (rows * RANKS))


def add(spent: dict[str, float], step: list[np.ndarray]) -> None:
    """Adds what one step costs on all ranks; the batches that a last step lacks are waited for all the same."""
    longest = np.array([batch.max() for batch in step])
    sizes = np.array([len(batch) for batch in step])
    spent["flat"] += RANKS * slowest(np.array([batch.sum() for batch in step]), RANKS).sum()
    spent["attention"] += RANKS * slowest(longest * sizes, RANKS).sum()
    spent["upstream"] += RANKS * slowest(-(-longest // 8) * 8 * sizes, RANKS).sum()


def lognormal_tokens(count: int) -> np.ndarray:
    """Clips of 1 to 20 s, median 5.5 s: 25 frames a second, 9 more for BOS, EOS and delay, and the text."""
    random = np.random.RandomState(0)
    seconds = np.clip(random.lognormal(np.log(5.5), 0.6, count), 1, 20)
    text = 25 + random.poisson(3.5 * seconds)  # the prompt's frame, and about 14 letters a second
    return (np.ceil(25 * seconds) + 9 + text).astype(np.int64)


def manifest_tokens(manifest: Path) -> np.ndarray:
    """Tokens of a manifest's rows, counted as training counts them."""
    from higgs_ds.batching.collate import Collator
    from higgs_ds.batching.token_counts import LengthIndex
    from higgs_ds.codec.sample import SampleCodec
    from higgs_ds.data.audio import read_audio
    from higgs_ds.data.code_cache import CodeCache
    from higgs_ds.data.manifest import read_manifest
    from higgs_ds.model.base import load_tokenizer
    from higgs_ds.model.higgs_v2.config import read_checkpoint_config
    from higgs_ds.model.higgs_v2.tiny import write_tiny

    rows, faults = read_manifest(manifest)
    if faults:
        sys.exit("\n".join(map(str, faults)))
    refs = [ref for row in rows for _, ref in row.audio_refs]
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder) / "base", hidden_size=64, num_layers=1)
        cache = CodeCache(Path(folder) / "codes", SampleCodec.fit(map(read_audio, refs[:16]), codebook_entries=16))
        if problems := cache.ensure(refs):
            sys.exit("\n".join(f"{ref.path}: {problem}" for ref, problem in problems.items()))
        base = Path(folder) / "base"
        spec = HiggsV2Spec.from_config(read_checkpoint_config(base))
        index = LengthIndex(cache, load_tokenizer(base), Collator(spec))
        return index.count(rows)


def planning(count: int) -> dict[str, float]:
    """Seconds and peak memory of this process to read a table of lengths, plan, and draw an epoch and its step."""
    import resource
    import time

    from higgs_ds.batching.token_counts import LENGTH
    from higgs_ds.data.records import Records, checksums

    with tempfile.TemporaryDirectory() as folder:
        table = np.zeros(count, LENGTH)
        table["key"] = np.random.RandomState(0).randint(0, 1 << 62, size=(count, 4))
        table["tokens"] = lognormal_tokens(count)
        table["check"] = checksums(table)
        table.tofile(Path(folder) / "a.lengths")
        keys = np.ascontiguousarray(table["key"])
        del table
        started = time.perf_counter()
        records = Records(Path(folder), ".lengths", LENGTH)
        tokens = records.rows["tokens"][records.find_each(keys)].astype(np.int32)
        plan = TokenPlan(tokens, max_tokens=8192, grad_accum=4, world_size=RANKS, seed=42)
        for epoch in range(2):
            next(plan.steps(0, epoch * plan.steps_per_epoch + 1, plan.steps_per_epoch * 2))
        took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"1,000,000 rows planned, s": round(took, 2), "peak memory of that, GB": round(peak, 3)}


if __name__ == "__main__":
    main()
