"""The verbs beside training: what argparse refuses before anything is read or written."""

import pytest

from higgs_ds.tools.cli import main

VERBS = ("tiny", "sample-codec", "import", "describe", "generate", "reproduce", "merge", "export")


def ended(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([*words])
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    code, said = ended(capsys, verb, "--help")
    assert code == 0 and f"python -m higgs_ds {verb} " in said and "--debug" in said


@pytest.mark.parametrize(
    ("verb", "flag"),
    [("tiny", "output_dir"), ("describe", "base_ckpt"), ("generate", "ref_audio"), ("merge", "adapter")],
)
def test_an_empty_word_is_no_name(verb, flag, capsys):
    """pathlib takes it for the working folder, and a default must not stand in for it."""
    code, said = ended(capsys, verb, f"--{flag}=")
    assert code == 2 and f"--{flag}" in said.splitlines()[-1] and "is empty" in said


@pytest.mark.parametrize(
    ("verb", "flag", "value"),
    [
        ("generate", "temperature", "nan"),
        ("generate", "top_k", "0"),
        ("reproduce", "at_least", "2"),
        ("describe", "epochs", "inf"),
        ("describe", "max_tokens_per_batch", "x"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_flag(verb, flag, value, capsys):
    code, said = ended(capsys, verb, f"--{flag}={value}")
    assert code == 2 and f"--{flag}" in said.splitlines()[-1] and value in said.splitlines()[-1]
