"""The documentation: every flag, the drawing of an index, and that its commands parse."""

import argparse
import dataclasses
import re
import shlex

import pytest
import torch

from higgs_ds.batching.batch_index import make_batch_index
from higgs_ds.options.parse import parse_args
from higgs_ds.options.sections import OPTIONS
from higgs_ds.tools import cli
from tests.conftest import ROOT

AUDIO_OUT, AUDIO_IN, NONE = 90, 91, -100


def test_the_drawing_of_an_index_is_what_the_code_makes():
    index = make_batch_index(
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
    tensors = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    assert drawn == {name: str(value.tolist()) for name, value in tensors.items()}


FLAGS_HEAD = """# Flags of `train_ds.py`

`plan`, `prepare` and `check` take the same flags; `python -m higgs_ds VERB --help` lists those of every other verb. All
of them can also be set in a YAML file (`--config`). Flags override the file: `--warmup_steps` also overrides its
`warmup_ratio`, `--max_tokens_per_batch` its `batch_size`, and vice versa. YAML values are read as written:
`run_name: 2026_11_27` is text, `batch_size: 010` is ten. Unknown names are refused, with the closest valid name. A flag
given twice is refused, unless it takes a list: `--train_manifest a.jsonl --train_manifest b.jsonl` names both.

"""


def flags_table() -> str:
    """The table of docs/flags.md, from the options themselves."""
    lines, section = [], None
    for name, option in OPTIONS.items():
        if option.section != section:
            section = option.section
            lines += ["", f"## {section}", "", "| flag | default | |", "|---|---|---|"]
        shown = "**required**" if option.required else f"`{option.default}`" if option.default else ""
        choices = f" Choices: {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
        also = [f"`--{alias}`" for alias in option.also]
        also += [f"`--{theirs}` ({other})" for theirs, other in option.others.items() if theirs != name]
        also = f" Also: {', '.join(also)}." if also else ""
        lines.append(f"| `--{name}` | {shown} | {option.field.description}{choices}{also} |")
    return "\n".join(lines).strip() + "\n"


def test_the_list_of_flags_is_that_of_the_options():
    """`python -m tests.test_docs` writes the page anew."""
    assert (ROOT / "docs/flags.md").read_text() == FLAGS_HEAD + flags_table()


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_and_every_named_file_is_there(file):
    path = ROOT / file if (ROOT / file).exists() else ROOT / "docs" / file
    text = path.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    folders = "higgs_ds|tests|benchmarks|launch|ds_configs|examples|docs"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.\w+)", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of the documentation that starts one of ours: (where it stands, its words)."""
    found = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if word != "…"]
                if {"train_ds.py", "higgs_ds"} & set(words):
                    found.append((path.name, words))
    return found


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_a_verb_and_flags_that_exist(where, words):
    """Their effects are tested elsewhere: test_train.py, tools, report/test_cards.py, data."""
    if "train_ds.py" in words:
        flags = words[words.index("train_ds.py") + 1 :]
        parse_args(flags, may_lack=("train_manifest", "output_dir"))
        return
    verb, *flags = words[words.index("higgs_ds") + 1 :]
    if verb in cli.LIKE_TRAINING:
        parse_args(flags, may_lack=("train_manifest", "output_dir"))
        return
    parser = cli.build_parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    known = {name for action in verbs.choices[verb]._actions for name in action.option_strings}
    assert not [flag for flag in flags if flag.startswith("--") and flag not in known]


@pytest.mark.parametrize("verb", [*cli.LIKE_TRAINING, "describe"])
def test_the_help_of_a_verb_names_it(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m higgs_ds {verb} ")


if __name__ == "__main__":
    (ROOT / "docs/flags.md").write_text(FLAGS_HEAD + flags_table())
