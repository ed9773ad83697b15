"""`--train_manifest A B=0.3`: paths, weights, names, and refusal of invalid weights."""

import pytest
import yaml

from higgs_ds.data.portions import Portion, names_of, portions_of
from higgs_ds.errors import ConfigError
from higgs_ds.options.parse import parse_args


def test_paths_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2").mkdir()
    for name in ("b=0.5", "lr=2/m.jsonl", "c"):
        (tmp_path / name).write_text("{}")
    words = ["a.jsonl", "b=0.5", "c=30e-2", "d.jsonl=2", "e.jsonl=1.0", "lr=2/m.jsonl", "lr=3/gone.jsonl", "b=0.5=.25"]
    with pytest.raises(ConfigError, match=r"--train_manifest: b=0\.5 is given twice"):
        portions_of(words)
    found = portions_of(words[:-1])
    assert found == [
        *(Portion("a.jsonl"), Portion("b=0.5"), Portion("c", 0.3), Portion("d.jsonl", 2.0), Portion("e.jsonl")),
        *(Portion("lr=2/m.jsonl"), Portion("lr=3/gone.jsonl")),
    ]
    assert portions_of(words[-1:]) == [Portion("b=0.5", 0.25)]
    assert portions_of(map(str, found)) == found
    assert names_of(found) == ["a", "b=0", "c", "d", "e", "m", "gone"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["voice/train.jsonl", "general/train.jsonl"], ["voice/train", "general/train"]),
        (["a/train.jsonl", "a/train.json"], ["train.jsonl", "train.json"]),
        (["x/a/train.jsonl", "y/a/train.jsonl", "val.jsonl"], ["x/a/train", "y/a/train", None]),
    ],
)
def test_names_are_short_and_unique(paths, names, tmp_path):
    found = names_of([Portion(str(tmp_path / path)) for path in paths])
    assert len(set(found)) == len(paths)
    assert all(name is None or name == of for name, of in zip(names, found, strict=True))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9", "half", "", "0.3=x"])
def test_invalid_weight_is_one_line(weight):
    with pytest.raises(ConfigError) as caught:
        parse_args(["--train_manifest", "a.jsonl", f"b.jsonl={weight}", "--output_dir", "o"])
    (line,) = caught.value.problems
    assert line.startswith(f"--train_manifest: b.jsonl={weight}: the weight ") and "above 0 and up to 1000" in line


def test_resolved_options_have_manifests_and_weights_and_can_be_read_again(tmp_path):
    flags = ["--output_dir", "o", "--seed", "3"]
    config = parse_args(["--train_manifest", "a b,c.jsonl", "d.jsonl=0.30", "e.jsonl=1", *flags])
    assert config.data.train_manifest == ["a b,c.jsonl", "d.jsonl=0.3", "e.jsonl"]
    assert [portion.weight for portion in config.data.portions] == [1.0, 0.3, 1.0]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == config
    (tmp_path / "one.yaml").write_text("train_manifest: a b,c.jsonl\n")
    assert parse_args(["--config", str(tmp_path / "one.yaml"), *flags]).data.train_manifest == ["a b,c.jsonl"]
