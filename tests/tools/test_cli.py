"""The verbs other than training: errors from argparse, before anything is read or written."""

import pytest

from higgs_ds.tools.cli import main

VERBS = ("tiny", "sample-codec", "import", "describe", "generate", "reproduce", "merge", "export")


def ended(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([*words])
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    code, said = ended(capsys, verb, "--help")
    assert code == 0 and f"python -m higgs_ds {verb} " in said and "--debug" in said


@pytest.mark.parametrize(
    ("verb", "flag"),
    [("tiny", "output_dir"), ("describe", "base_ckpt"), ("generate", "ref_audio"), ("merge", "adapter")],
)
def test_an_empty_name_is_refused(verb, flag, capsys):
    """It must mean neither the working directory, as in pathlib, nor the flag's default."""
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
def test_a_number_out_of_range_is_reported_with_its_flag(verb, flag, value, capsys):
    code, said = ended(capsys, verb, f"--{flag}={value}")
    assert code == 2 and f"--{flag}" in said.splitlines()[-1] and value in said.splitlines()[-1]
