"""The verbs beside training: what their flags refuse before anything is read or written."""

import pytest

from higgs_ds.tools.cli import main

RIGHT = {
    "tiny": ["--output_dir", "out"],
    "sample-codec": ["--train_manifest", "rows.jsonl", "--output_dir", "out"],
    "import": ["corpus", "--output", "out"],
    "describe": ["--train_manifest", "rows.jsonl"],
}
NAMES = [
    *[("tiny", "--output_dir"), ("sample-codec", "--train_manifest"), ("sample-codec", "--output_dir")],
    *[("import", "PATH"), ("import", "--output"), ("import", "--val_speakers")],
    *[("describe", f"--{name}") for name in ("train_manifest", "val_manifest", "output_dir")],
    *[("describe", "--audio_root"), ("describe", "--base_ckpt")],
]


@pytest.mark.parametrize(("value", "why"), [("", "is empty; give a value"), (" ", "is empty")])
@pytest.mark.parametrize(("verb", "name"), NAMES)
def test_a_blank_name_is_refused_by_its_flag(verb, name, value, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [value, *RIGHT[verb][1:]] if name == "PATH" else [*RIGHT[verb], f"{name}={value}"]
    with pytest.raises(SystemExit) as ended:
        main([verb, *words])
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and name in line and why in line
    assert list(tmp_path.iterdir()) == []
