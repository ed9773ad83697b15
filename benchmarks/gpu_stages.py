"""The stages of gpu_check.py, each in a process of its own; small sizes where there is no GPU.

usage: python benchmarks/gpu_stages.py STAGE FOLDER
       writes FOLDER/STAGE.json: {"what", "found", "limit", "verdict"} a check, after every check anew
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from higgs_ds.distributed.launch_env import grow_segments  # noqa: E402

grow_segments()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.report import measuring_device  # noqa: E402
from higgs_ds.distributed.device import take_device  # noqa: E402
from higgs_ds.process import end_process  # noqa: E402

HOLDS, FAILS, MEASURED, NO_GPU = "HOLDS", "DOES NOT HOLD", "measured", "no GPU"
PAYS = 1.1  # times as fast, from which on another kernel would be worth its code
SPEECH = "examples/speech/manifest.jsonl"


class Checks:
    """What a stage has found so far, on the console and in its file."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[dict[str, str]] = []

    def add(self, what: str, found: str, *, limit: str = "", holds: bool | None = None) -> None:
        """`holds`: None where nothing is asked of it."""
        verdict = MEASURED if holds is None else HOLDS if holds else FAILS
        self._add({"what": what, "found": found, "limit": "" if holds is None else limit, "verdict": verdict})

    def no_gpu(self, what: str) -> None:
        """What only a GPU could show."""
        self._add({"what": what, "found": "", "limit": "", "verdict": NO_GPU})

    def _add(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        self.file.write_text(json.dumps(self.rows, indent=2) + "\n", encoding="utf-8")
        print("  ".join(row.values()), flush=True)


# --- Is it right?


class SmallModel:
    """A random model with LoRA on all projections, whose values are the same in every dtype."""

    def __init__(self, folder: Path, hidden_size: int, num_layers: int):
        from higgs_ds.model.base import load_tokenizer
        from higgs_ds.model.higgs_v2.checkpoint import load_base
        from higgs_ds.model.higgs_v2.config import read_checkpoint_config
        from higgs_ds.model.higgs_v2.tiny import write_tiny

        write_tiny(folder, hidden_size=hidden_size, num_layers=num_layers)
        self.config, self.tokenizer = read_checkpoint_config(folder), load_tokenizer(folder)
        self.bases = {dtype: load_base(folder, self.config, dtype) for dtype in ("fp32", "bf16")}

    def module(self, dtype: str, device: torch.device, *, dropout: float = 0.0, **settings):
        """The training forward in `dtype`, "fp64", "fp32" or "bf16"."""
        from higgs_ds.model.higgs_v2.forward import training_forward
        from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
        from higgs_ds.model.lora import attach_lora

        model = attach_lora(
            copy.deepcopy(self.bases["bf16" if dtype == "bf16" else "fp32"]),
            rank=16,
            alpha=32,
            dropout=dropout,
            target_modules=list(DEFAULT_LORA_TARGETS),
            seed=0,
            base_name="small",
        )
        draw = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=draw) * 0.05 if "lora_B" in name else parameter.data
                parameter.data.copy_(drawn.bfloat16())
        model = model.double() if dtype == "fp64" else model
        return training_forward(model.to(device), self.config, **settings).train()

    def batches(self) -> dict:
        """Micro-batches with audio, without, and with both kinds of rows."""
        from benchmarks.step import make_samples
        from higgs_ds.batching.collate import Collator, Sample
        from higgs_ds.model.higgs_v2.spec import HiggsV2Spec

        speech, ids = make_samples(4, self.config, self.tokenizer, 1.5), torch.arange(20)
        text = [Sample(ids, ids, (), "text:1")]
        collate = Collator(HiggsV2Spec.from_config(self.config), with_index=True)
        return {"speech": collate(speech), "text alone": collate(text), "both": collate(speech + text)}


def gradients(module, batch, device: torch.device, *, index: bool = True, seed: int = 0) -> torch.Tensor:
    """The loss and the gradients of all LoRA weights of one micro-batch, in one row, float64 on the CPU."""
    torch.manual_seed(seed)
    inputs = batch.model_inputs(device)
    if not index:
        inputs.pop("index")
    counts = batch.codebook_counts or [0] * module.num_codebooks
    scales = torch.tensor([1 / (len(counts) * count) if count else 0.0 for count in counts], device=device)
    loss, _, report = module(inputs, 1 / max(1, batch.text_count), scales)
    assert not report.problems, report.problems
    module.zero_grad()
    loss.backward()
    trained = [p.grad for _, p in sorted(module.named_parameters()) if p.requires_grad]
    return torch.cat([value.detach().double().cpu().flatten() for value in (loss, *trained)])


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance of the gradients."""
    return float((ours[1:] - wanted[1:]).norm() / wanted[1:].norm())


def right(checks: Checks, work: Path) -> None:
    """Forward and gradients against float64; dropout's masks where layers are computed again; twice to the bit."""
    device, cpu = measuring_device(), torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    take_device(device)
    model = SmallModel(work, *((512, 8) if device.type == "cuda" else (128, 2)))
    for name, batch in model.batches().items():
        exact = gradients(model.module("fp64", cpu), batch, cpu)
        upstream = {"forward_impl": "upstream", "loss_impl": "reference"}
        theirs = distance(gradients(model.module("bf16", device, **upstream), batch, device, index=False), exact)
        limits = {"fp32": (1e-5, "1e-5", 1e-5), "bf16": (1.1 * theirs, f"1.1 × upstream's {theirs:.2e}", 1e-2)}
        for dtype, (limit, said, of_loss) in limits.items():
            ours = gradients(model.module(dtype, device), batch, device)
            off = distance(ours, exact)
            checks.add(f"{name}, {dtype}: LoRA's gradients off float64", f"{off:.2e}", limit=said, holds=off < limit)
            off = abs(float(ours[0] / exact[0]) - 1)
            checks.add(f"{name}, {dtype}: loss off float64", f"{off:.2e}", limit=f"{of_loss:g}", holds=off < of_loss)
    take_device(device, deterministic=True)  # for the next two, where attention's backward may add in any order
    dropped = [gradients(model.module("bf16", device, dropout=0.1, checkpoint_every=n), batch, device) for n in (0, 1)]
    same = torch.equal(*dropped)
    checks.add("dropout, all layers computed again", "equal" if same else "other masks", limit="to the bit", holds=same)
    twice = [gradients(model.module("bf16", device, dropout=0.1), batch, device) for _ in range(2)]
    same = torch.equal(*twice)
    checks.add("--deterministic, twice", "equal" if same else "differs", limit="to the bit", holds=same)


# --- Which kernels pay at the real shapes?


class Bench:
    """Times of operations, the median of some on a GPU, each beside what it would replace."""

    def __init__(self, checks: Checks, device: torch.device):
        self.checks, self.device = checks, device
        self.milliseconds: dict[str, float] = {}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def drawn(self, *shape: int) -> torch.Tensor:
        """bf16 values."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def time(
        self,
        what: str,
        run: Callable[[], object],
        *,
        flop: float = 0,
        moved: float = 0,
        instead_of: str = "",
        needs_gpu: bool = False,
    ) -> None:
        """A line of it: what it reached of the card, and how much faster it is than what was timed before."""
        if needs_gpu and not self.on_gpu:
            return self.checks.no_gpu(what)
        try:
            took = self._milliseconds(run)
        except (RuntimeError, NotImplementedError, ImportError) as error:  # a card that has no such kernel
            return self.checks.add(what, f"cannot: {str(error).splitlines()[0][:60]}")
        self.milliseconds[what] = took
        said = [f"{took:.3f} ms"]
        said += [f"{flop / took / 1e9:.3g} TFLOP/s"] * bool(flop) + [f"{moved / took / 1e9:.3g} TB/s"] * bool(moved)
        if instead_of in self.milliseconds:
            faster = self.milliseconds[instead_of] / took
            said.append(f"{faster:.2f} × as fast{', PAYS' if self.on_gpu and faster >= PAYS else ''}")
        self.checks.add(what, ", ".join(said))

    def _milliseconds(self, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        if not self.on_gpu:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        took = []
        for _ in range(12):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            took.append(first.elapsed_time(last))
        return statistics.median(took)


def kernels(checks: Checks, work: Path) -> None:
    """The real model's operations on 13,894 tokens, 10,075 of them audio, and what could replace them."""
    bench = Bench(checks, measuring_device())
    shrink = 1 if bench.on_gpu else 32
    text, audio, hidden, ffn, rank = 3819 // shrink, 10075 // shrink, 3072 // shrink, 8192 // shrink, 16
    rows, inner = bench.drawn(audio, hidden), bench.drawn(audio, ffn)
    _products(bench, rows, bench.drawn(text, hidden), bench.drawn(ffn, hidden), rank)
    _passes(bench, inner, bench.drawn(audio, ffn))
    _attention(bench, sequences=90 // min(shrink, 8), length=158)


def _products(bench: Bench, rows: torch.Tensor, text: torch.Tensor, weight: torch.Tensor, rank: int) -> None:
    """Products of audio rows [rows, hidden] and text rows with a frozen weight [ffn, hidden] and LoRA's."""
    ffn, hidden = weight.shape
    flop = 2 * len(rows) * ffn * hidden
    columns, second = bench.drawn(len(rows), rank), bench.drawn(ffn, rank)
    wide_rows, wide_weight = torch.cat([rows, columns], 1), torch.cat([weight, second], 1)
    bench.time("gate's product, audio rows", lambda: F.linear(rows, weight), flop=flop)
    bench.time("with LoRA's added into it", lambda: F.linear(rows, weight).addmm_(columns, second.t()), flop=flop)
    one = lambda: F.linear(wide_rows, wide_weight)  # noqa: E731
    bench.time("with LoRA's rank as extra columns", one, flop=flop, instead_of="with LoRA's added into it")
    out = bench.drawn(len(rows), ffn)
    bench.time("gradient of LoRA's B", lambda: out.t() @ columns, moved=out.nbytes)
    both, ends = torch.cat([text, rows]), torch.tensor([len(text), len(text) + len(rows)], device=bench.device)
    weights, ends = torch.stack([weight.t(), weight.t()]), ends.int()
    bench.time("text and audio rows, a product each", lambda: (F.linear(text, weight), F.linear(rows, weight)))
    grouped = lambda: torch._grouped_mm(both, weights, offs=ends)  # noqa: E731
    bench.time("in one grouped product", grouped, instead_of="text and audio rows, a product each")

    def by_row(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = values.abs().amax(1, keepdim=True).float() / 448
        return (values / scales).to(torch.float8_e4m3fn), scales

    def in_fp8() -> torch.Tensor:
        (short, scales), (other, its) = by_row(rows), kept
        return torch._scaled_mm(short, other.t(), scale_a=scales, scale_b=its.t(), out_dtype=torch.bfloat16)

    kept = by_row(weight)
    name = "gate's product in fp8, rows cast to it"
    bench.time(name, in_fp8, flop=flop, instead_of="gate's product, audio rows", needs_gpu=True)


def _passes(bench: Bench, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Passes over memory: values of a layer's FFN [rows, ffn]."""
    mask, norm = torch.rand_like(gate, dtype=torch.float32) > 0.05, torch.ones_like(gate[0])
    masked = 2 * gate.nbytes + mask.nbytes
    bench.time("copy", gate.clone, moved=2 * gate.nbytes)
    bench.time("rms_norm", lambda: F.rms_norm(gate, norm.shape, norm, 1e-5), moved=2 * gate.nbytes)
    bench.time("dropout", lambda: torch.native_dropout(gate, 0.05, True), moved=masked)
    bench.time("values × mask", lambda: gate * mask, moved=masked)
    by_kernel = lambda: torch.ops.aten.native_dropout_backward(gate, mask, 1.0)  # noqa: E731
    bench.time("by dropout's own backward", by_kernel, moved=masked, instead_of="values × mask")

    def swiglu_backward():
        activated = F.silu(gate)
        return activated * up, torch.ops.aten.silu_backward(up * up, gate), activated * up

    bench.time("SwiGLU's backward", swiglu_backward, moved=5 * gate.nbytes)
    compiled = torch.compile(swiglu_backward)
    name, instead = "SwiGLU's backward, compiled", "SwiGLU's backward"
    bench.time(name, compiled, moved=5 * gate.nbytes, instead_of=instead, needs_gpu=True)


def _attention(bench: Bench, sequences: int, length: int) -> None:
    """Attention there and back, 24 heads of 128 on 8, by what torch has for it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def heads(count: int) -> torch.Tensor:
        return bench.drawn(sequences, length, count, 128).transpose(1, 2).requires_grad_()

    query, key, value, gradient = heads(24), heads(8), heads(8), heads(24).detach()

    def there_and_back(kind: SDPBackend) -> None:
        with sdpa_kernel(kind):
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(gradient)

    bench.time("attention, flash", lambda: there_and_back(SDPBackend.FLASH_ATTENTION))
    cudnn = lambda: there_and_back(SDPBackend.CUDNN_ATTENTION)  # noqa: E731
    bench.time("attention, cuDNN", cudnn, instead_of="attention, flash", needs_gpu=True)

    def varlen() -> None:
        from torch.nn.attention.varlen import varlen_attn

        starts = torch.arange(0, sequences * length + 1, length, device=bench.device, dtype=torch.int32)
        flat = [t.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for t in (query, key, value)]
        out = varlen_attn(*flat, starts, starts, length, length, window_size=(-1, 0))
        out.backward(gradient.transpose(1, 2).flatten(0, 1))

    bench.time("attention, varlen", varlen, instead_of="attention, flash", needs_gpu=True)


# --- How fast, and where does the time go?


def _rates(checks: Checks, work: Path, cases: str) -> dict[str, float]:
    """Tokens a second of cases of gpu.py; one that fails, as out of memory, does not hold."""
    file = work / "rates.json"
    command = [sys.executable, "benchmarks/gpu.py", "--steps", "6", "--cases", cases, "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        rate = row["tokens/s a GPU"]
        said = f"{rate:,.0f} tokens/s, {row['peak memory, GB']:.1f} GB" if rate else "failed"
        checks.add(f"{row['case']}: {row.get('tokens a batch', 0):,} tokens", said, holds=rate > 0)
    return {row["case"]: row["tokens/s a GPU"] for row in rows}


def speed(checks: Checks, work: Path) -> None:
    """ZeRO-1, 2 and 3 at 8,192 and 16,384 tokens."""
    stages = ("zero1", "zero2", "zero3") if measuring_device().type == "cuda" else ("zero1",)
    _rates(checks, work, ";".join(f"{stage}{more}" for more in ("", ", twice the tokens") for stage in stages))


def compiled(checks: Checks, work: Path) -> None:
    """What --compile gives, and that it trains alike."""
    if measuring_device().type != "cuda":
        return checks.no_gpu("zero2, compiled")
    rates = _rates(checks, work, "zero2;zero2, compiled")
    faster = rates["zero2, compiled"] / max(rates["zero2"], 1e-9)
    checks.add("--compile", f"{faster:.2f} × as fast{', PAYS' if faster >= PAYS else ''}")
    run = SmallRun(work)
    run.train("plain", *SIX_STEPS)
    run.train("compiled", *SIX_STEPS, "--compile")
    usual, loss = run.last_loss("plain"), run.last_loss("compiled")
    near = abs(loss / usual - 1) < 0.02
    checks.add("--compile: loss of step 6", f"{loss:.4f}", limit=f"2% from {usual:.4f}", holds=near)


def profile(checks: Checks, work: Path) -> None:
    """A micro-batch under ZeRO-1, by its kernels; more of them in profile.txt."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from benchmarks.gpu import Case, batches_of, config_of, engine_of
    from benchmarks.step import wait_for
    from higgs_ds.distributed.engine import leave_ranks, start_ranks

    measuring_device()
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    config, tokenizer = config_of(on_gpu)
    engine, _ = engine_of(Case(1), config, ranks)
    batches, _ = batches_of(Case(1), config, tokenizer, ranks, 16_384 if on_gpu else 512, 2)
    scales = torch.full((config.audio_num_codebooks,), 1e-4, device=ranks.device)
    engine.train()

    def timed(run: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds until it was launched, and until it was done."""
        wait_for(ranks.device)
        started = time.perf_counter()
        run()
        launched = time.perf_counter() - started
        wait_for(ranks.device)
        return 1e3 * launched, 1e3 * (time.perf_counter() - started)

    def micro_batch(batch) -> None:
        loss, _, _ = engine.forward(batch.model_inputs(ranks.device), 1e-3, scales)
        engine.backward(loss)

    for batch in batches:
        micro_batch(batch)
        engine.step(1e-4)
    launched, took = timed(lambda: micro_batch(batches[-1]))
    _, update = timed(lambda: engine.step(1e-4))
    tokens = batches[-1].num_tokens
    checks.add(f"micro-batch of {tokens:,} tokens", f"{took:.0f} ms, {1e3 * tokens / took:,.0f} tokens/s")
    # Launched before it is done: the card does not wait for the host.
    checks.add("its launches", f"{launched:.0f} ms", limit=f"{took:.0f} ms", holds=launched < took if on_gpu else None)
    checks.add("an update", f"{update:.0f} ms")
    with profiled(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
        micro_batch(batches[-1])
        wait_for(ranks.device)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kind = "CUDA" if on_gpu else "CPU"  # a GPU's kernels alone: an operation's entry has its kernels' time again
    events = [event for event in seen.key_averages() if event.device_type.name == kind]
    events.sort(key=lambda event: -getattr(event, by))
    table = seen.key_averages().table(sort_by=by, row_limit=60)
    checks.file.with_suffix(".txt").write_text(table, encoding="utf-8")
    whole = sum(getattr(event, by) for event in events)
    for event in events[:10]:
        share = getattr(event, by) / whole
        checks.add(event.key[:60], f"{getattr(event, by) / 1e3:.1f} ms, {share:.0%}, {event.count} calls")
    leave_ranks(0)


# --- Does the whole program run?


def _python(*words: object, to: Path) -> None:
    """Runs python on these words; its output goes to a file, whose end is said where it fails."""
    with to.open("w", encoding="utf-8") as log:
        ran = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if ran.returncode != 0:
        end = " | ".join(to.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
        raise RuntimeError(f"exit code {ran.returncode}: {end}")


class SmallRun:
    """Runs of train_ds.py on a small random base and the shipped speech."""

    def __init__(self, work: Path):
        self.work = work
        _python("-m", "higgs_ds", "tiny", "--output_dir", work / "base", to=work / "tiny.log")
        flags = ["--train_manifest", SPEECH, "--output_dir", work / "codec"]
        _python("-m", "higgs_ds", "sample-codec", *flags, to=work / "codec.log")
        self.voice = ["--base_ckpt", work / "base", "--codec", work / "codec", "--train_manifest", SPEECH]

    def train(self, name: str, *flags: object, engine: str = "zero1") -> None:
        """Into the folder `name`."""
        words = ["train_ds.py", *self.voice, "--output_dir", self.work / name, "--wandb_mode", "disabled"]
        words += ["--deepspeed_config", f"ds_configs/{engine}.json", *flags]
        _python(*words, to=self.work / f"{name}-{len(flags)}.log")

    def last_loss(self, name: str) -> float:
        """Of the last step that was logged."""
        lines = (self.work / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row][-1]

    def adapter(self, name: str) -> bytes:
        """The file of weights."""
        return (self.work / name / "adapter/adapter_model.safetensors").read_bytes()


SIX_STEPS = ("--max_steps", 6, "--save_every", 3, "--lr", 1e-3, "--batch_size", 8, "--deterministic")
NF4 = ("--base_dtype", "nf4")


def program(checks: Checks, work: Path) -> None:
    """Every engine file and a 4-bit base: six steps, and gone on with to the bit from a checkpoint."""
    on_gpu = measuring_device().type == "cuda"
    run = SmallRun(work)
    engines = sorted(file.stem for file in (ROOT / "ds_configs").glob("*.json")) if on_gpu else ["zero1", "zero3"]
    cases = {engine: (engine, *SIX_STEPS) for engine in engines} | {"4-bit base": ("zero1", *SIX_STEPS, *NF4)}

    def ended(name: str) -> tuple[float, bool] | str:
        """The last loss, and whether going on gave the same adapter; or what went wrong."""
        engine, *flags = cases[name]
        try:
            run.train(name, *flags, engine=engine)
            # As a machine leaves it that went down after step 3.
            again = shutil.copytree(work / name, work / f"{name}, again")
            shutil.rmtree(again / "checkpoints/step-000006")
            shutil.rmtree(again / "adapter")
            run.train(again.name, *flags, "--resume", "auto", engine=engine)
            return run.last_loss(name), run.adapter(name) == run.adapter(again.name)
        except (OSError, RuntimeError, IndexError) as error:
            return str(error)[-200:]

    with ThreadPoolExecutor(max(1, min(len(cases), (os.cpu_count() or 1) // 2))) as pool:
        found = dict(zip(cases, pool.map(ended, cases), strict=True))
    usual = statistics.median([end[0] for end in found.values() if not isinstance(end, str)] or [math.nan])
    for name, end in found.items():
        if isinstance(end, str):
            checks.add(f"{name}: six steps, and gone on with", end, holds=False)
            continue
        loss, same = end
        apart = 0.1 if name == "4-bit base" else 0.02
        near = abs(loss / usual - 1) < apart
        checks.add(f"{name}: loss of step 6", f"{loss:.4f}", limit=f"{apart:.0%} from {usual:.4f}", holds=near)
        checks.add(f"{name}: gone on with", "equal" if same else "differs", limit="to the bit", holds=same)


def voice(checks: Checks, work: Path) -> None:
    """The quick start's run in bf16, and every sentence of it spoken again."""
    on_gpu = measuring_device().type == "cuda"
    run = SmallRun(work)
    steps, rows = (240, 32) if on_gpu else (4, 1)
    run.train("run", "--config", "examples/quickstart.yaml", "--dtype", "bf16", "--batch_size", 8, "--max_steps", steps)
    texts = [json.loads(line)["text"] for line in (ROOT / SPEECH).read_text(encoding="utf-8").splitlines()]
    (work / "texts.txt").write_text("\n".join(texts[:rows]) + "\n", encoding="utf-8")
    words = ["-m", "higgs_ds", "reproduce", *run.voice, "--adapter", work / "run/adapter", "--dtype", "bf16"]
    words += ["--texts", work / "texts.txt", "--stop", "boson", "--output_dir", work / "speech"]
    _python(*words, to=work / "recite.log")
    spoken = json.loads((work / "speech/recital.json").read_text(encoding="utf-8"))
    share = statistics.mean(row["share"] for row in spoken)
    enough = share >= 0.99 if on_gpu else None
    checks.add(f"codes given back, {len(spoken)} clips", f"{share:.2%}", limit="99 %", holds=enough)


STAGES = (right, program, speed, profile, voice, kernels, compiled)

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    (stage,) = (stage for stage in STAGES if stage.__name__ == name)
    with tempfile.TemporaryDirectory() as work:
        stage(Checks(folder / f"{name}.json"), Path(work))
    end_process(0)
