"""Loading a codec from a folder or the hub; the files of a folder tell which codec it is."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import reading
from ..options.sections import DEFAULT_CODEC, DEFAULT_CODEC_REVISION, revision_of
from .base import Codec
from .boson import BosonCodec
from .codec_layout import BUNDLED, BUNDLED_IN, MODEL_TYPE, WEIGHTS
from .sample import SampleCodec

CODEC_FILES = ("config.json", "model.pth", "sample_codec.json", "codebooks.safetensors")


def load_codec(name_or_path: str, revision: str | None = None, device: str = "cpu") -> Codec:
    """The codec in a local folder (Boson's, a sample codec, a Higgs TTS 3 checkpoint) or in a repository of the hub.

    Cheap: the network of Boson's codec is built on `device` by the first `encode` or `decode`, or by `build`.

    Args:
        revision: of the hub; None means the pinned one for `DEFAULT_CODEC`, the newest for any other.

    Raises:
        ConfigError: it is neither, or lacks a file; a file of it is damaged; the hub does not give it.
    """
    with reading(f"--codec: {name_or_path!r} cannot be loaded (a folder is looked for first, then the hub)"):
        folder = Path(name_or_path)
        if not folder.exists():
            folder = _download(name_or_path, revision)
        elif revision is not None:
            raise ValueError(f"it is a local folder, which has no revision: leave {revision!r} out")
        return _load_folder(folder, device)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    revision = revision_of(repo, revision)
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CODEC_FILES)))
    # Only where it is the codec: a repository may hold a file of that name that is something else, and large.
    if wanted := {MODEL_TYPE: [WEIGHTS], BUNDLED_IN: ["*.safetensors", f"{WEIGHTS}.index.json"]}.get(_type_of(folder)):
        snapshot_download(repo, revision=revision, allow_patterns=wanted)
    return folder


def _type_of(folder: Path) -> str:
    """The `model_type` of the folder's config.json; empty for one that cannot be read."""
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""  # what reads it next says what is wrong with it
    return str(raw.get("model_type", "")) if isinstance(raw, dict) else ""


def _load_folder(folder: Path, device: str) -> Codec:
    files = {path.name for path in folder.iterdir()}
    if "sample_codec.json" in files:
        return SampleCodec.load(folder)
    kind = _type_of(folder)
    if kind == BUNDLED_IN:
        from ..model.files.weight_files import weight_headers

        holding = {one.file for name, one in weight_headers(folder, flag="--codec").items() if name.startswith(BUNDLED)}
        if not holding:
            raise ValueError("this Higgs TTS 3 checkpoint bundles no codec")
        return BosonCodec(sorted(holding), device, is_bundled=True)
    weights = WEIGHTS if kind == MODEL_TYPE else "model.pth"
    if {"config.json", weights} <= files:
        return BosonCodec([folder / weights], device)
    lacking = " and ".join(name for name in ("config.json", weights) if name not in files)
    raise ValueError(
        f"it has no {lacking} (Boson's, as {DEFAULT_CODEC} at revision {DEFAULT_CODEC_REVISION} "
        "has them), and no sample_codec.json (a sample codec)"
    )
