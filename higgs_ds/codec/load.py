"""Loading a codec from a folder or the hub; the files of a folder tell which codec it is."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import reading
from ..options.sections import DEFAULT_CODEC, DEFAULT_CODEC_REVISION, revision_of
from .base import Codec
from .boson import BosonCodec
from .codec_layout import WEIGHTS, is_renamed
from .sample import SampleCodec

CODEC_FILES = ("config.json", "model.pth", "sample_codec.json", "codebooks.safetensors")


def load_codec(name_or_path: str, revision: str | None = None, device: str = "cpu") -> Codec:
    """The codec in a local folder (Boson's or a sample codec) or in a repository of the hub.

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
    if _is_renamed(folder):
        snapshot_download(repo, revision=revision, allow_patterns=[WEIGHTS])
    return folder


def _is_renamed(folder: Path) -> bool:
    """True where the folder's config.json is of transformers' layout; one that cannot be read is not."""
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # what reads it next says what is wrong with it
    return isinstance(raw, dict) and is_renamed(raw)


def _load_folder(folder: Path, device: str) -> Codec:
    files = {path.name for path in folder.iterdir()}
    if "sample_codec.json" in files:
        return SampleCodec.load(folder)
    weights = WEIGHTS if _is_renamed(folder) else "model.pth"
    if {"config.json", weights} <= files:
        return BosonCodec(folder, device, weights)
    lacking = " and ".join(name for name in ("config.json", weights) if name not in files)
    raise ValueError(
        f"it has no {lacking} (Boson's, as {DEFAULT_CODEC} at revision {DEFAULT_CODEC_REVISION} "
        "has them), and no sample_codec.json (a sample codec)"
    )
