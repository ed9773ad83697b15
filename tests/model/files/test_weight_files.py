"""Tensors of safetensors files, mapped only while they are used."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from higgs_ds.model.files.weight_files import MappedWeights, header_of


class Small(PreTrainedModel):
    """Two layers that look at what is mapped while transformers fills them."""

    config_class = PretrainedConfig
    maps: list[int]

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        for layer in (self.first, self.second):
            layer._register_load_state_dict_pre_hook(self.look)

    def look(self, *_):
        self.maps.append(mapped(self.config.file))


def mapped(file: str) -> int:
    """How often this process maps a file now."""
    return Path("/proc/self/maps").read_text().count(file)


def test_transformers_loader_holds_one_modules_tensors_at_a_time(tmp_path):
    """As under ZeRO-3, where all tensors together would take the memory of the whole checkpoint."""
    file = str(tmp_path / "model.safetensors")
    tensors = {f"{layer}.{name}": torch.randn(8, 8).bfloat16()[: 8 if name == "weight" else 1].squeeze(0)
               for layer in ("first", "second") for name in ("weight", "bias")}  # fmt: skip
    save_file(tensors, file)
    stored, Small.maps = header_of(Path(file), file), []
    held = [one.read() for one in stored.values()]
    assert mapped(file) == len(held) == 4  # what a dict of tensors holds
    del held
    weights = MappedWeights(stored)
    model = Small.from_pretrained(None, config=PretrainedConfig(file=file), state_dict=weights)
    assert Small.maps == [0, 0] and mapped(file) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name].float()), name
