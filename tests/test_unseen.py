"""The corpus of benchmarks/unseen.py: held-out sentences that are new, of words that are not."""

import soundfile

from benchmarks.unseen import FRAME, HELD_OUT, takes, write_corpus
from higgs_ds.report.jsonl import read_rows


def test_held_out_sentences_are_new_and_their_words_are_not(tmp_path):
    write_corpus(tmp_path, sentences=150)
    sets = {name: [row["text"] for row in read_rows(tmp_path / f"{name}.jsonl")] for name in ("train", "val", "test")}
    assert [len(texts) for texts in sets.values()] == [150, HELD_OUT, HELD_OUT]
    assert len({text for texts in sets.values() for text in texts}) == 150 + 2 * HELD_OUT
    of = {name: {word for text in texts for word in text.lower().strip(".").split()} for name, texts in sets.items()}
    assert of["train"] == {word for slot in takes() for word in slot} and of["val"] | of["test"] <= of["train"]

    for row in read_rows(tmp_path / "test.jsonl"):
        assert soundfile.info(tmp_path / row["audio"]).frames % FRAME == 0
