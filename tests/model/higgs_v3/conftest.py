"""A small checkpoint of Higgs TTS 3's layout."""

import pytest

from higgs_ds.model.higgs_v3.load import open_base
from higgs_ds.model.higgs_v3.tiny import write_tiny


@pytest.fixture(scope="session")
def v3_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3")
    write_tiny(folder, seed=0, hidden_size=64, num_layers=2)
    (folder / "LICENSE").write_text("The terms.\n")
    (folder / "NOTICE").write_text("Somebody else's notice.\n")
    return folder


@pytest.fixture(scope="session")
def v3_base(v3_dir):
    return open_base(str(v3_dir), None, "--base_ckpt", v3_dir)
