"""What the documentation says: every flag, the drawing of a layout, and that its commands parse."""

import dataclasses
import re

import pytest
import torch

from higgs_ds.batching.layout import make_layout
from higgs_ds.config import ALIASES, OPTIONS
from tests.conftest import ROOT

AUDIO_OUT, AUDIO_IN, NONE = 90, 91, -100


def test_the_drawing_of_a_layout_is_what_the_code_makes():
    layout = make_layout(
        torch.tensor([[1, 2, AUDIO_OUT, 3], [4, AUDIO_OUT, 5, 0]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        torch.tensor([[NONE, NONE, NONE, 3], [NONE, NONE, 5, NONE]]),
        torch.tensor([[NONE, 11, 12, NONE, 21], [NONE, NONE, 13, NONE, NONE]]),
        audio_out_token=AUDIO_OUT,
        audio_in_token=AUDIO_IN,
        out_lengths=torch.tensor([3, 2]),
        in_lengths=torch.zeros(0, dtype=torch.long),
        num_codebooks=2,
    )
    text = (ROOT / "docs/internals.md").read_text()
    drawn = dict(re.findall(r"^\| `(\w+)` \| `(\[.*?\])` \|", text, flags=re.M))
    tensors = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    assert drawn == {name: str(value.tolist()) for name, value in tensors.items()}


def flags_table() -> str:
    """The table of docs/flags.md, from the options themselves."""
    lines, section = [], None
    for name, option in OPTIONS.items():
        if option.section != section:
            section = option.section
            lines += ["", f"## {section}", "", "| flag | default | |", "|---|---|---|"]
        rules = option.field.metadata
        default = option.field.default
        if default is dataclasses.MISSING:
            default = " ".join(map(str, option.field.default_factory()))
        shown = "**required**" if rules.get("required") else "" if default is None else f"`{default}`"
        choices = f"; one of {', '.join(f'`{choice}`' for choice in rules['choices'])}" if "choices" in rules else ""
        also = [f"`--{alias}`" for alias, target in ALIASES.items() if target == name]
        also = f" (also {', '.join(also)})" if also else ""
        lines.append(f"| `--{name}` | {shown} | {rules['help']}{choices}{also} |")
    return "\n".join(lines).strip() + "\n"


def test_the_list_of_flags_is_that_of_the_options():
    """Where this fails: `python -m tests.test_docs` writes the table anew."""
    assert (ROOT / "docs/flags.md").read_text().endswith(flags_table())


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_and_every_named_file_is_there(file):
    path = ROOT / file if (ROOT / file).exists() else ROOT / "docs" / file
    text = path.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    named = re.findall(r"`((?:higgs_ds|tests|benchmarks|launch|ds_configs|examples|docs)/[\w./-]+\.\w+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing


if __name__ == "__main__":
    file = ROOT / "docs/flags.md"
    head = (
        "# Flags of `train_ds.py`\n\nAll can stand in a YAML file given by `--config`; flags win. Unknown names "
        "fail, naming the nearest valid one.\n\n"
    )
    file.write_text(head + flags_table())
