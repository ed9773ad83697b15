"""`python -m higgs_ds plan`: estimates a rank's memory, the largest token budget and a run's hours in advance.

Takes the flags of train_ds.py, and `--json`. Only configs, the tokenizer and the clips' headers are read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ..batching.batch_plan import Plan, make_plan
from ..batching.micro_batches import settle_micro_batches
from ..batching.mixture import Mixture
from ..data.faults import plural
from ..data.portions import names_of
from ..distributed.ds_config import LayerSizes, read_deepspeed_config, resolve
from ..errors import ConfigError, ExitCode
from ..options.parse import parse_args
from ..options.sections import TrainConfig
from ..process import say
from .describe import FRAMES_PER_SEC, describe

if TYPE_CHECKING:
    from ..model.base import BaseCheckpoint
    from ..model.memory import RankMemory

PROG = "python -m higgs_ds plan"
SHIPPED = tuple(f"ds_configs/{name}.json" for name in "zero0 zero1 zero2 zero2_offload zero3 zero3_offload".split())
GPUS, CARD_GB = (1, 2, 4, 8), (16, 24, 40, 80, 141)
FILLED = 0.95  # usable share of a card; the rest is lost to fragmentation
PADDING = 1.03  # padded tokens in attention per token, for rows of similar length; benchmarks/batching.py
CARDS = ("L4", "A10", "L40S", "A100-SXM4-80GB", "H100 80GB HBM3", "H200", "B200")  # of `flops.PEAK_FLOPS`
SHARE_OF_PEAK = 0.37  # 32,000 tokens a second on an H100: benchmarks/roofline.py
RESTS_ON = (
    f"memory: computed from the model's shapes, within 15 % of measurements on a CPU; allowances for driver and NCCL; "
    f"{1 - FILLED:.0%} of a card is reserved for fragmentation",
    f"hours: the run's FLOP at {SHARE_OF_PEAK:.0%} of a card's dense peak, as benchmarks/roofline.py calculates for an "
    "H100 (not measured); excludes encoding, validation, samples and saving; offloading and ZeRO-3 take longer",
)


def main(argv: list[str]) -> int:
    """Plans a run; returns 0. Raises ConfigError for wrong flags and for manifests without a usable row."""
    config = parse_args([word for word in argv if word != "--json"], may_lack=("output_dir",), prog=PROG)
    if config.model.forward_impl == "upstream":
        raise ConfigError(["--forward_impl: plan supports padding_free only"])
    from ..model.families import family_of, open_base
    from ..model.init_adapter import settle_lora

    base = open_base(config.model.base_ckpt, config.model.base_revision, weights=False)
    config, _ = settle_lora(config, family_of(base), base.config)
    rows, max_tokens = settle_micro_batches(
        config.optim.batch_size, config.optim.max_tokens_per_batch, device_type="cuda"
    )
    found = planned(config.settled(batch_size=rows, max_tokens_per_batch=max_tokens), base)
    say(json.dumps(found, indent=2) if "--json" in argv else "\n".join(shown(found)))
    return ExitCode.OK


def planned(config: TrainConfig, base: BaseCheckpoint) -> dict[str, Any]:
    """Plans memory by DeepSpeed file and number of GPUs, and steps and hours by number of GPUs; sizes in GB."""
    from ..model.families import family_of
    from ..model.flops import flop_per_token, mean_row_tokens, peak_flops
    from ..model.memory import Load, RankMemory, Weights

    counts, tokens, learned, notes = read_rows(config, base)
    plans = {gpus: plan_of(config, counts, tokens, gpus) for gpus in GPUS}
    weights = Weights.of(family_of(base), base.config, config)
    batch = Load(int(tokens[list(plans[1].most_expensive(tokens, 1, 1))].sum()), learned, PADDING)
    if config.optim.max_tokens_per_batch:
        batch = Load(config.optim.max_tokens_per_batch, learned, PADDING)
    memory: list[dict[str, Any]] = []
    refused: dict[str, tuple[str, list[int]]] = {}
    for file in dict.fromkeys((*SHIPPED, config.run.deepspeed_config)):
        raw, with_file = read_deepspeed_config(file), config.settled(deepspeed_config=file)
        for gpus in GPUS:
            try:
                ds_config = resolve(
                    raw, with_file, world_size=gpus, on_cpu=False, layer=LayerSizes.from_spec(base.spec)
                )
            except ConfigError as error:
                refused.setdefault(file, (error.problems[0], []))[1].append(gpus)
                continue
            rank = RankMemory(config, base.spec, weights, ds_config, gpus)
            memory.append({"deepspeed_config": file, "gpus": gpus, **sizes_of(rank, batch, int(tokens.max()))})
    if not memory:
        raise ConfigError([problem for problem, _ in refused.values()])
    for file, (problem, on) in refused.items():
        notes.append(f"on {', '.join(map(str, on))} GPUs: {problem.replace('--deepspeed_config', file)}")
    cost = flop_per_token(
        base.spec,
        lora_rank=config.lora.lora_r,
        lora_targets=sorted(weights.adapted),
        checkpoint_every=config.model.checkpoint_every,
        row_tokens=mean_row_tokens(tokens),
    )
    run = []
    for gpus, plan in plans.items():
        steps = plan.total_steps(config.optim.epochs, config.optim.max_steps)
        of_epoch = plan.first_epoch(tokens)
        total = float(of_epoch.sum()) * steps / plan.steps_per_epoch  # type: ignore[union-attr]
        peaks = {card: peak for card in CARDS if (peak := peak_flops(card, config.model.dtype))}
        hours = {
            card.split("-")[0].split()[0]: total * cost / (peak * SHARE_OF_PEAK * gpus) / 3600
            for card, peak in peaks.items()
        }
        run.append({"gpus": gpus, "steps": steps, "tokens": round(total), "hours": hours})
    return {
        "base_ckpt": base.name,
        "parameters": weights.base + weights.lora,
        "trained": weights.lora + weights.whole,
        "rows": len(tokens),
        "tokens": batch.tokens,
        "gflop_per_token": cost / 1e9,
        "memory": memory,
        "run": run,
        "notes": notes,
        "rests_on": RESTS_ON,
    }


def read_rows(config: TrainConfig, base: BaseCheckpoint) -> tuple[list[int], np.ndarray, float, list[str]]:
    """Reads the manifests; returns (usable rows of each, tokens of all rows, share of audio tokens, notes)."""
    data, optim, notes = config.data, config.optim, []
    limit = min(optim.max_tokens_per_batch or np.inf, data.max_row_tokens, base.spec.max_positions)
    read_as = {name: getattr(data, name) for name in ("audio_root", "channel", "audio_track", "prompt_style")}
    counts, tokens, frames = [], [], 0.0
    for portion in data.portions:
        found = describe(portion.path, base=base, trains=True, **read_as)
        fits = found.tokens <= limit
        if left_out := len({fault.row for fault in found.faults}) + int((~fits).sum()):
            notes.append(f"{portion.path}: {plural(left_out, 'row')} skipped, faulty or too long (see describe)")
        if not fits.any():
            raise ConfigError([f"{portion.path}: no usable row"])
        counts.append(int(fits.sum()))
        tokens.append(found.tokens[fits])
        frames += float(found.speech.seconds[fits].sum()) * FRAMES_PER_SEC
    joined = np.concatenate(tokens)
    return counts, joined, frames / float(joined.sum()), notes


def plan_of(config: TrainConfig, counts: list[int], tokens: np.ndarray, gpus: int) -> Plan:
    """Makes the batch plan for `gpus` GPUs, as `load_data` does."""
    optim, portions = config.optim, config.data.portions
    mixture = Mixture(
        counts,
        [portion.weight for portion in portions],
        seed=optim.seed,
        tokens=tokens if optim.max_tokens_per_batch else None,
        names=names_of(portions),
    )
    return make_plan(
        *(len(tokens), tokens),
        mixture=mixture,
        batch_size=optim.batch_size or 1,
        max_tokens=optim.max_tokens_per_batch,
        grad_accum=optim.grad_accum,
        world_size=gpus,
        seed=optim.seed,
    )


def sizes_of(rank: RankMemory, batch: Any, longest: int) -> dict[str, Any]:
    """Returns a rank's memory by part in GB, and the largest token budget by card size; None if a row does not fit."""
    budgets = {size: rank.largest(FILLED * size * 1e9, batch) for size in CARD_GB}
    return {
        "parts": {part: size / 1e9 for part, size in rank.parts(batch).items()},
        "total": rank.total(batch) / 1e9,
        "host": rank.host / 1e9,
        "max_tokens_per_batch": {size: tokens if tokens >= longest else None for size, tokens in budgets.items()},
    }


def shown(found: dict[str, Any]) -> list[str]:
    """Formats the plan: a table of memory and token budgets, a table of steps and hours, notes."""
    memory, run = found["memory"], found["run"]
    used = [part for part in memory[0]["parts"] if any(row["parts"][part] for row in memory)]
    sums = ["total", *(["host"] if any(row["host"] for row in memory) else [])]
    head = ["", "GPUs", *used, *sums, *(f"{size} GB" for size in CARD_GB)]
    table = [head]
    for row in memory:
        budgets = [f"{tokens:,}" if tokens else "–" for tokens in row["max_tokens_per_batch"].values()]
        sizes = [row["parts"][part] for part in used] + [row[name] for name in sums]
        name = row["deepspeed_config"].removeprefix("ds_configs/").removesuffix(".json")
        table.append([name, str(row["gpus"]), *(f"{size:.2f}" for size in sizes), *budgets])
    times = [["", "GPUs", "steps", "tokens", *run[0]["hours"]]]
    for row in run:
        hours = [f"{value:.3g}" for value in row["hours"].values()]
        times.append(["", str(row["gpus"]), f"{row['steps']:,}", f"{row['tokens']:,}", *hours])
    return [
        f"{found['base_ckpt']}: {found['trained']:,} of {found['parameters']:,} parameters are trained",
        f"memory of a rank in GB with micro-batches of {found['tokens']:,} tokens; the largest --max_tokens_per_batch "
        "by card size",
        *_lines(table),
        f"hours by card for {plural(found['rows'], 'row')} at {found['gflop_per_token']:.3g} GFLOP per token",
        *_lines(times),
        *found["notes"],
        *found["rests_on"],
    ]


def _lines(table: list[list[str]]) -> list[str]:
    """Aligns the columns, the first to the left; omits repeated names."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    names = ["" if before and row[0] == before[0] else row[0] for before, row in zip([[], *table], table, strict=False)]
    return [
        "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for name, row in zip(names, table, strict=True)
    ]
