"""`train_ds.py` with one thing changed underneath it, for failures that no input can cause.

usage: train_with.py CHANGE RANK FLAG…   (CHANGE on rank RANK, or on all with -1)
"""

import os
import sys

import torch

import train_ds
from higgs_ds import cli
from higgs_ds.batching import collate, layout
from higgs_ds.model import higgs, reference
from higgs_ds.process import end_process


def code_out_of_range() -> None:
    original = collate.Collator.__call__

    def call(self, samples, filler=False):
        batch = original(self, samples, filler)
        batch.audio_out_ids[0, 1] = 5000
        return batch

    collate.Collator.__call__ = call


def lost_audio() -> None:
    """The trainer that started this project: audio_out_ids filtered away on the way to the model."""
    original = higgs.HiggsAudioForTraining.forward

    def call(self, *args, **kwargs):
        if "layout" in kwargs:
            return original(self, *args, **{**kwargs, "audio_out_ids": None})
        outputs = original(self, *args, **kwargs)
        outputs.audio_logits = outputs.audio_logits[:0] + outputs.audio_logits.sum() * 0
        return outputs

    higgs.HiggsAudioForTraining.forward = call


def unshifted_audio() -> None:
    """Position t is asked for its own code: the loss falls, and the model is silent."""
    reference.audio_targets = layout.audio_targets = lambda label_audio_ids: label_audio_ids.t()


def no_expanded_labels() -> None:
    original = higgs.HiggsAudioForTraining.forward

    def call(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        outputs.expanded_labels = None
        return outputs

    higgs.HiggsAudioForTraining.forward = call


CHANGES = {f.__name__: f for f in (code_out_of_range, lost_audio, unshifted_audio, no_expanded_labels)}

if __name__ == "__main__":
    change, rank, *flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    torch.set_num_threads(1)
    if int(rank) in (-1, int(os.environ.get("RANK", "0"))):
        CHANGES[change]()
    others = [flag for flag in flags if flag != "--check"]
    end_process(cli.main(["check", *others]) if "--check" in flags else train_ds.main(flags))
