"""`python -m higgs_ds merge` and `export`: converts an adapter for use in other libraries and servers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ExitCode
from ..files import filling, writing
from ..model.higgs_v2.layouts import LAYOUTS, TRANSFORMERS
from ..model.higgs_v3.family import LAYOUT as NATIVE
from ..options.sections import DEFAULT_BASE, DEFAULT_CODEC
from ..process import say
from . import flag_types
from .outputs import empty_place
from .speak_flags import check_adapter

if TYPE_CHECKING:
    from ..model.family import Family


def add_merge(verbs: Any) -> None:
    """Adds the verb `merge`."""
    parser = verbs.add_parser("merge", help="merge an adapter into its base and write one checkpoint, in either layout")
    flag_types.base_flags(parser, f"folder or hub id (default: {DEFAULT_BASE})", DEFAULT_BASE)
    add = flag_types.adder(parser)
    add("--adapter DIR", "LoRA adapter (default: none)", flag_types.path)
    add("--output_dir DIR", "new or empty folder for the checkpoint", flag_types.path, required=True)
    layout_help = "library to load the checkpoint with; not needed for Higgs TTS 3, which has one layout, native"
    add("--layout", layout_help, (*LAYOUTS, NATIVE))
    add("--dtype", "data type of the weights (default: as in the base)", flag_types.DTYPES)
    codec_help = "audio tokenizer to load with the checkpoint: hub id, or folder in the same layout (default: its own)"
    add("--codec", codec_help, flag_types.name)
    add("--codec_revision", "revision of the codec on the hub, for the commands in README.md")
    parser.set_defaults(verb=run_merge)


def add_export(verbs: Any) -> None:
    """Adds the verb `export`."""
    parser = verbs.add_parser("export", help="rename an adapter's weights for use with transformers and PEFT")
    add = flag_types.adder(parser)
    add("--adapter DIR", "LoRA adapter to export", flag_types.path, required=True)
    add("--layout", "library to load the adapter with", (TRANSFORMERS,), required=True)
    add(
        "--output_dir DIR",
        "new or empty folder (default: the adapter's, with `-transformers` appended)",
        flag_types.path,
    )
    flag_types.base_flags(parser, "base that the adapter was trained on (default: as recorded in it)")
    parser.set_defaults(verb=run_export)


def run_merge(args: argparse.Namespace) -> int:
    """Merges; checks the adapter's config before the base is located, and its weights before anything is written."""
    from ..model.families import open_base
    from ..model.files.adapter_file import read_adapter
    from ..model.voice_record import RECORD, read_record, record_text
    from ..report.cards import merged_card, pinned

    args.output_dir = empty_place(args.output_dir)
    lora = check_adapter(args)
    _, family = _family_for(args.layout, args.base_ckpt, args.base_revision)
    args.layout = args.layout or family.layouts[0]
    family.check_codec(args.codec or DEFAULT_CODEC, args.layout)  # before the base's weights are downloaded
    base = open_base(args.base_ckpt, args.base_revision)
    adapter = read_adapter(args.adapter, family.adaptable_modules(base.config), lora) if lora else None
    record = read_record(args.adapter, "--adapter") if lora else None
    name, revision = pinned(args.base_ckpt, args.base_revision)
    table = {"dtype": args.dtype or "as the base"}
    if adapter:
        table |= {"adapter": f"`{args.adapter.resolve()}`", **adapter.describe(), "layers merged": len(adapter.weights)}
    table |= record.table() if record else {}
    where = {"base": name, "revision": revision, "layout": args.layout, "folder": args.output_dir}
    codec = args.codec or ("" if base.bundles_codec else DEFAULT_CODEC)  # a bundled codec needs no flag
    where |= {"codec": codec, "codec_revision": args.codec_revision}
    texts = {"README.md": merged_card(table, **where)} | ({RECORD: record_text(record)} if record else {})
    for note in base.notes:
        say(note)
    size = family.merge(base, adapter, args.output_dir, args.layout, dtype=args.dtype, codec=codec, texts=texts)
    merged = f"{len(adapter.weights)} layers merged" if adapter else "nothing merged"
    merged += f", {' and '.join(adapter.whole)} replaced" if adapter and adapter.whole else ""
    say(
        f"{args.output_dir}: {len(base.stored)} weights, {size / 1e9:.2f} GB, {merged}; verified: every name, shape "
        "and dtype, the tokenizer, and a sample of the values"
    )
    return ExitCode.OK


def _family_for(layout: str | None, base_name: str, revision: str | None) -> tuple[Path, Family]:
    """Locates a base without its weights; returns folder and family. Raises ConfigError if it has no such layout."""
    from ..model.base import locate_checkpoint
    from ..model.families import family_at

    folder = locate_checkpoint(base_name, revision, weights=False)
    family = family_at(folder)
    if layout is None and len(family.layouts) > 1:
        raise ConfigError([f"--layout: is required for {base_name}: {' or '.join(family.layouts)}"])
    if layout is not None and layout not in family.layouts:
        raise ConfigError([f"--layout: {base_name} has no layout {layout}, expected {' or '.join(family.layouts)}"])
    return folder, family


def run_export(args: argparse.Namespace) -> int:
    """Checks an adapter and renames its weights and layers."""
    from safetensors.torch import save_file

    from ..model.files.adapter_file import CONFIG, WEIGHTS, check_base, read_adapter, read_adapter_config, revision_for
    from ..model.files.adapter_names import PREFIX

    lora = read_adapter_config(args.adapter)
    adapter_dir = args.adapter if args.adapter.name not in ("", "..") else args.adapter.resolve()  # of `.`
    beside = adapter_dir.with_name(f"{adapter_dir.resolve().name}-{TRANSFORMERS}")
    output_dir = empty_place(args.output_dir or beside)
    base_name = args.base_ckpt or lora.base_name
    if base_name is None:
        raise ConfigError([f"--base_ckpt: is required, since {args.adapter} does not name its base"])
    given = args.base_revision or (None if args.base_ckpt else lora.base_revision)
    revision = revision_for(lora, base_name, given)
    if not args.other_base:
        check_base(lora, base_name, revision)
    folder, family = _family_for(args.layout, base_name, revision)
    adapter = read_adapter(args.adapter, family.adaptable_modules(family.read_config(folder)), lora)

    def renamed(name: str) -> str:
        return family.name_in(args.layout, name)

    config = {
        "base_model_name_or_path": base_name if family.layout_of(folder) == args.layout else None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": [renamed(name) for name in adapter.whole] or None,
        "peft_type": "LORA",
        "r": lora.rank,
        # Full names: suffixes of boson_multimodal's names may match other layers in transformers.
        "target_modules": sorted(renamed(name) for name in adapter.weights),
        "task_type": None,  # PEFT's wrapper for language models passes arguments this model does not accept
        "use_rslora": lora.rslora,
    }
    weights = {PREFIX + renamed(key.removeprefix(PREFIX)): value for key, value in adapter.state_dict().items()}
    with writing(f"--output_dir: {output_dir}"), filling(output_dir) as beside:
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, beside / WEIGHTS, metadata={"format": "pt"})
    say(f"{output_dir}: the adapter of {len(adapter.weights)} layers under transformers' names")
    return ExitCode.OK
