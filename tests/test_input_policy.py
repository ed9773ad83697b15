"""docs/decisions/input-policy.md: damaged files end in lines, and nothing in a file is executed or fetched."""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from higgs_ds import checkpoint
from higgs_ds.data.audio import AudioError, duration_sec, read_audio
from higgs_ds.data.chatml import AudioRef
from higgs_ds.data.manifest import read_manifest
from higgs_ds.distributed.ds_config import LayerSizes, read_deepspeed_config, resolve
from higgs_ds.distributed.engine import check_config
from higgs_ds.errors import ConfigError
from higgs_ds.model.files.adapter_file import read_adapter, read_adapter_config, write_adapter
from higgs_ds.model.higgs_v2.checkpoint import load_base
from higgs_ds.model.higgs_v2.load import adaptable_modules
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from higgs_ds.model.lora import attach_lora
from higgs_ds.options.parse import parse_args
from higgs_ds.tools import cli
from tests.conftest import ROOT, SPEECH
from tests.support.ranks import assert_all
from tests.support.workers.common import with_lora_b

EXAMPLES = int(os.environ.get("HIGGS_DS_FUZZ", "60"))  # of each kind; a minute in all
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HIGGS_DS_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

texts = st.text(st.characters(codec=None), max_size=20)
numbers = st.integers(-(2**70), 2**70) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
seeds = st.integers(0, 2**32)


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes are other ones, or gone, or there twice; or the end is missing."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, count = draw.randrange(len(content) + 1), draw.randint(1, 40)
        kind = draw.choice(["flip", "cut", "double", "end", "noise"])
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[at : at + count]
        elif kind == "double":
            content[at:at] = content[at : at + count]
        elif kind == "noise":
            content[at : at + count] = draw.randbytes(count)
        elif draw.random() < 0.3:
            del content[at:]
    return bytes(content)


def damaged_json(tree: object, value: object, draw: random.Random) -> object:
    """One value, wherever it stands, is `value`; or a key has another name, or is gone."""
    tree = copy.deepcopy(tree)
    places = []

    def visit(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(tree)
    node, key = draw.choice(places)
    kind = draw.choice(["value", "value", "gone", "renamed"])
    if kind == "value" or isinstance(node, list):
        node[key] = value
    elif kind == "gone":
        del node[key]
    else:
        node[f"{key}x"] = node.pop(key)
    return tree


def written(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damaged(file: Path, by_bytes: bool, value: object, draw: random.Random) -> bytes:
    """A file's content with damage to its bytes, or to a value of its JSON."""
    content = file.read_bytes()
    if by_bytes or file.suffix != ".json":
        return damaged_bytes(content, draw)
    return written(damaged_json(json.loads(content), value, draw))


@contextlib.contextmanager
def told_in_lines(prefix: str = ""):
    """Inside, nothing is raised but a ConfigError of whole lines that begin with `prefix`."""
    try:
        yield
    except ConfigError as error:
        assert all(line.startswith(prefix) and line and "\n" not in line for line in error.problems)


@fuzz
@given(seed=seeds, value=values, by_bytes=st.booleans())
def test_damaged_manifests_are_lines(seed, value, by_bytes, tmp_path):
    draw = random.Random(seed)
    lines = [line.encode() for line in SPEECH.read_text().splitlines()[:4]]
    lines += [
        b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]}',
        b'{"audio": "clips/a.wav", "text": "Hm.", "duration": 1.5, "speaker": "a", "scene": "quiet"}',
    ]
    if by_bytes:
        content = damaged_bytes(b"\n".join(lines), draw)
    else:
        at = draw.randrange(len(lines))
        lines[at] = written(damaged_json(json.loads(lines[at]), value, draw))
        content = b"\n".join(lines)
    file = tmp_path / draw.choice(["m.jsonl", "m.json", "m.csv", "m.tsv", "m.txt", "m.list"])
    file.write_bytes(content)
    with told_in_lines():
        rows, faults = read_manifest(file)
        assert all(str(fault) for fault in faults) and all(row.origin for row in rows)


@pytest.fixture(scope="module")
def sounds() -> list[bytes]:
    """Of three kinds: a RIFF file, FLAC and Ogg."""
    import io

    import numpy as np
    import soundfile

    noise = np.random.default_rng(0).normal(size=4000).astype("float32") * 0.1
    files = []
    for kind in ("WAV", "FLAC", "OGG"):
        file = io.BytesIO()
        soundfile.write(file, noise, 16000, format=kind)
        files.append(file.getvalue())
    return files


@fuzz
@given(seed=seeds)
def test_damaged_audio_is_a_line(seed, sounds, tmp_path):
    draw = random.Random(seed)
    file = tmp_path / draw.choice(["a.wav", "a.flac", "a.mp3"])
    file.write_bytes(damaged_bytes(draw.choice(sounds), draw))
    for read in (duration_sec, read_audio):
        try:
            read(AudioRef(path=file))
        except AudioError as error:
            assert str(error) and "\n" not in str(error)


@fuzz
@given(seed=seeds, value=values, by_bytes=st.booleans())
def test_damaged_deepspeed_files_are_lines(seed, value, by_bytes, tmp_path):
    draw = random.Random(seed)
    file = tmp_path / "ds.json"
    file.write_bytes(damaged(draw.choice(sorted((ROOT / "ds_configs").glob("*.json"))), by_bytes, value, draw))
    layer = LayerSizes(parameters=1_000_000, widest=4096)
    options = parse_args(["--train_manifest", "x", "--output_dir", "x", "--dtype", "fp32"])
    with told_in_lines():
        resolved = resolve(read_deepspeed_config(str(file)), options, world_size=2, on_cpu=True, layer=layer)
        check_config(resolved, str(file))


@pytest.fixture(scope="module")
def adapter(tiny_dir, tiny_config, tmp_path_factory) -> Path:
    options = dict(rank=4, alpha=8, dropout=0.0, target_modules=list(DEFAULT_LORA_TARGETS), seed=0)
    model = with_lora_b(attach_lora(load_base(tiny_dir, tiny_config, "fp32"), **options, base_name="tiny"))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, model.peft_config["default"], weights)
    return folder


@fuzz
@given(seed=seeds, value=values, by_bytes=st.booleans())
def test_damaged_adapters_are_lines(seed, value, by_bytes, adapter, tiny_config, tmp_path):
    draw = random.Random(seed)
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / draw.choice(["adapter_config.json", "adapter_model.safetensors"])
    file.write_bytes(damaged(file, by_bytes, value, draw))
    with told_in_lines("--adapter: "):
        config = read_adapter_config(tmp_path / "adapter")
        read_adapter(tmp_path / "adapter", adaptable_modules(tiny_config), config)


@pytest.fixture(scope="module")
def saved(forks, flags_of, tmp_path_factory) -> Path:
    """A real checkpoint of one step."""
    folder = tmp_path_factory.mktemp("saved")
    assert_all(forks.run(flags_of(folder, max_steps=1, dtype="fp32"), 1))
    (found,) = (folder / "checkpoints").glob("step-*")
    return found


@fuzz
@given(seed=seeds, value=values, by_bytes=st.booleans())
def test_damaged_checkpoints_are_lines(seed, value, by_bytes, saved, tmp_path):
    draw = random.Random(seed)
    copied = tmp_path / saved.name
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(saved, copied)
    file = draw.choice(sorted(path for path in copied.rglob("*") if path.is_file()))
    file.write_bytes(damaged(file, by_bytes, value, draw))
    with pytest.raises(ConfigError) as refused:
        checkpoint.read_checkpoint(copied)
        if file.read_bytes() == (saved / file.relative_to(copied)).read_bytes():
            raise ConfigError(["not damaged at all"])
    assert "\n" not in str(refused.value)


@fuzz
@given(seed=seeds, value=values, by_bytes=st.booleans())
def test_damaged_options_are_lines(seed, value, by_bytes, tmp_path):
    draw = random.Random(seed)
    content = (ROOT / "examples/quickstart.yaml").read_bytes()
    if not by_bytes:
        content += f"\nlora_r: {json.dumps(value)}\n".encode("utf-8", "surrogatepass")
    file = tmp_path / "options.yaml"
    file.write_bytes(damaged_bytes(content, draw) if by_bytes else content)
    with told_in_lines():
        parse_args(["--config", str(file), "--train_manifest", "x", "--output_dir", "x"])


EVIL = "open({!r}, 'w').close()"


def test_nothing_in_a_file_is_executed(adapter, tiny_dir, tmp_path, monkeypatch):
    """A YAML object, a module that an adapter names, code that a base folder brings, a pickle."""
    ran = tmp_path / "it ran"
    (tmp_path / "evil.py").write_text(EVIL.format(str(ran)))
    monkeypatch.syspath_prepend(tmp_path)
    yaml = tmp_path / "options.yaml"
    yaml.write_text(f"seed: !!python/object/apply:builtins.eval [{EVIL.format(str(ran))!r}]\n")
    with pytest.raises(ConfigError):
        parse_args(["--config", str(yaml), "--train_manifest", "x", "--output_dir", "x"])
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copied / "adapter_config.json").read_text())
    config |= {"megatron_core": "evil", "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}
    (copied / "adapter_config.json").write_text(json.dumps(config))
    read_adapter_config(copied)
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    shutil.copy(tmp_path / "evil.py", base)
    import pickle

    class Evil:
        def __reduce__(self):
            return eval, (EVIL.format(str(ran)),)

    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    from higgs_ds.model.higgs_v2.checkpoint import open_base

    try:
        open_base(str(base))
    except ConfigError as error:
        assert error.problems
    assert not ran.exists()


def test_nothing_in_a_file_is_fetched(tmp_path, monkeypatch, capsys):
    """Addresses in a manifest are clips that are not found."""

    def refuse(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    file = tmp_path / "m.jsonl"
    rows = [{"audio": at, "text": "Hm."} for at in ("http://localhost/a.wav", "s3://bucket/a.wav", "hf://x/a.wav")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["describe", "--train_manifest", str(file)]) == 2
    assert "m.jsonl" in capsys.readouterr().err


def test_every_sentence_of_the_policy_names_tests_that_exist():
    text = (ROOT / "docs/decisions/input-policy.md").read_text()
    sections = text.split("\n## ")[1:]
    assert len(sections) == 4
    for section in sections:
        named = re.findall(r"^- (tests/[\w/]+\.py)::(\w+)$", section, flags=re.M)
        assert named, section
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), (file, test)
