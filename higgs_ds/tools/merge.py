"""`python -m higgs_ds merge` and `export`: from an adapter to what other stacks load."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ExitCode, reason_of
from ..files import filling
from ..model.files.layouts import BOSON, LAYOUTS, TRANSFORMERS
from ..options.sections import DEFAULT_BASE, DEFAULT_CODEC
from ..process import say
from . import flag_types


def add_merge(verbs) -> None:
    """The flags of `merge`."""
    parser = verbs.add_parser("merge", help="write base and adapter as one checkpoint, in either layout")
    parser.add_argument("--base_ckpt", type=flag_types.name, default=DEFAULT_BASE)
    parser.add_argument("--base_revision")
    parser.add_argument(
        "--adapter", type=flag_types.path, help="folder of a LoRA adapter (default: rewrite the base alone)"
    )
    parser.add_argument("--output_dir", type=flag_types.path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default: as the base)")
    parser.add_argument(
        "--codec",
        type=flag_types.name,
        default=DEFAULT_CODEC,
        help="audio tokenizer that the stack loads: hub id, or folder in its layout",
    )
    parser.add_argument("--codec_revision", help="of a codec on the hub, for the commands in README.md")
    parser.add_argument("--other_base", action="store_true", help="the adapter was trained on another base")
    parser.set_defaults(verb=run_merge)


def add_export(verbs) -> None:
    """The flags of `export`."""
    parser = verbs.add_parser("export", help="write an adapter under transformers' names, for peft there")
    parser.add_argument("--adapter", type=flag_types.path, required=True)
    parser.add_argument("--layout", choices=(TRANSFORMERS,), required=True)
    parser.add_argument(
        "--output_dir", type=flag_types.path, help="default: beside the adapter, its name and -transformers"
    )
    parser.add_argument("--base_ckpt", type=flag_types.name, help="the base it was trained on (default: as it says)")
    parser.add_argument("--base_revision")
    parser.add_argument("--other_base", action="store_true", help="the adapter was trained on another base")
    parser.set_defaults(verb=run_export)


def empty_place(output_dir: Path) -> Path:
    """The whole path of an output folder, links followed.

    Raises:
        ConfigError: it holds something, is a link to nowhere, or cannot be looked for.
    """
    try:
        if output_dir.is_symlink() and not output_dir.exists():
            raise ConfigError([f"--output_dir: {output_dir} is a link to what is not there; name another folder"])
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ConfigError([f"--output_dir: {output_dir} exists; it is not overwritten"])
        return output_dir.resolve()
    except OSError as error:
        raise ConfigError([f"--output_dir: {str(output_dir)[:200]} cannot be written: {reason_of(error)}"]) from None


def run_merge(args: argparse.Namespace) -> int:
    """Checks the adapter's config before the base is looked for, and its weights before anything is written."""
    from ..model.base import locate_checkpoint
    from ..model.files.adapter_file import check_base, read_adapter, read_adapter_config, revision_for
    from ..model.files.load_layout import adaptable_modules
    from ..model.files.processor_files import codec_reference
    from ..model.voice_record import RECORD, base_note, read_record, record_text
    from ..report.cards import merged_card, pinned
    from .merge_weights import Base, merge

    args.output_dir = empty_place(args.output_dir)
    lora = read_adapter_config(args.adapter) if args.adapter else None
    args.base_revision = revision_for(lora, args.base_ckpt, args.base_revision)
    if lora and not args.other_base:
        check_base(lora, args.base_ckpt, args.base_revision)
    codec_reference(args.codec, args.layout)
    base = Base.open(locate_checkpoint(args.base_ckpt, args.base_revision))
    adapter = read_adapter(args.adapter, adaptable_modules(base.config), lora) if lora else None
    record = read_record(args.adapter, "--adapter") if lora else None
    name, revision = pinned(args.base_ckpt, args.base_revision)
    table: dict[str, Any] = {"dtype": args.dtype or "as the base"}
    if lora and adapter:
        table |= {
            "adapter": f"`{args.adapter.resolve()}`",
            **lora.describe(),
            "layers merged": len(adapter.weights),
        }
    table |= record.table() if record else {}
    where = {"base": name, "revision": revision, "layout": args.layout, "folder": args.output_dir}
    where |= {"codec": args.codec, "codec_revision": args.codec_revision}
    texts = {"README.md": merged_card(table, **where)} | ({RECORD: record_text(record)} if record else {})
    note = base_note(args.adapter, "--adapter") if lora else None
    for line in [*base.notes, *([note] if note else [])]:
        say(line)
    size = merge(base, adapter, args.output_dir, args.layout, dtype=args.dtype, codec=args.codec, texts=texts)
    merged = f"{len(adapter.weights)} layers merged" if adapter else "nothing merged"
    merged += f", {' and '.join(adapter.whole)} taken whole" if adapter and adapter.whole else ""
    say(
        f"{args.output_dir}: {len(base.stored)} weights, {size / 1e9:.2f} GB, {merged}; read back: every name, shape "
        "and type, the tokenizer, and a sample of the values"
    )
    return ExitCode.OK


def run_export(args: argparse.Namespace) -> int:
    """Renames a checked adapter's weights and layers."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ..model.base import locate_checkpoint
    from ..model.files.adapter_file import CONFIG, WEIGHTS, check_base, read_adapter, read_adapter_config, revision_for
    from ..model.files.adapter_names import PREFIX
    from ..model.files.layout_config import read_checkpoint_config
    from ..model.files.layouts import layout_of, transformers_name
    from ..model.files.load_layout import adaptable_modules

    lora = read_adapter_config(args.adapter)
    adapter_dir = args.adapter if args.adapter.name not in ("", "..") else args.adapter.resolve()  # of `.`
    beside = adapter_dir.with_name(f"{adapter_dir.resolve().name}-{TRANSFORMERS}")
    output_dir = empty_place(args.output_dir or beside)
    base_name = args.base_ckpt or lora.base_name
    if base_name is None:
        raise ConfigError([f"--base_ckpt: needed, {args.adapter} does not say what it was trained on"])
    given = args.base_revision or (None if args.base_ckpt else lora.base_revision)
    revision = revision_for(lora, base_name, given)
    if not args.other_base:
        check_base(lora, base_name, revision)
    folder = locate_checkpoint(base_name, revision, weights=False)
    adapter = read_adapter(args.adapter, adaptable_modules(read_checkpoint_config(folder)), lora)

    def renamed(name: str) -> str:
        theirs = transformers_name(name)
        assert theirs is not None, name  # of a layer of the model, as `read_adapter` has found
        return theirs

    config = {
        "base_model_name_or_path": None if layout_of(folder) == BOSON else base_name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": [renamed(name) for name in adapter.whole] or None,
        "peft_type": "LORA",
        "r": lora.rank,
        # Whole names: a suffix that boson_multimodal's names have may mean other layers there.
        "target_modules": sorted(map(renamed, adapter.weights)),
        "task_type": None,  # PEFT's wrapper for language models passes arguments that this model does not take
        "use_rslora": lora.rslora,
    }
    weights = {PREFIX + renamed(key.removeprefix(PREFIX)): value for key, value in adapter.state_dict().items()}
    try:
        with filling(output_dir) as beside:
            (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(weights, beside / WEIGHTS, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:  # a full disk is the one or the other, by which file it hits
        reason = reason_of(error)
        raise ConfigError([f"--output_dir: {output_dir} cannot be written: {reason}"]) from error
    say(f"{output_dir}: the adapter of {len(adapter.weights)} layers under transformers' names")
    return ExitCode.OK
