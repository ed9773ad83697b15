"""Data workers without room in shared memory die of a bus error; that is refused before."""

import re

import pytest

from higgs_ds.batching.batch_plan import MicroBatch
from higgs_ds.batching.collate import Collator
from higgs_ds.batching.loader import MicroBatches
from higgs_ds.batching.shared_memory import _bytes_of, check_shared_memory
from higgs_ds.codec.load import load_codec
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.errors import ConfigError
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from tests.support.workers.common import speech_rows


@pytest.fixture(scope="module")
def dataset(codec_dir, tiny_config, tokenizer, tmp_path_factory):
    rows = speech_rows(12)
    cache = CodeCache(tmp_path_factory.mktemp("codes"), load_codec(str(codec_dir)))
    assert not any(cache.ensure([ref for row in rows for _, ref in row.audio_refs]))
    return MicroBatches(rows, tokenizer, cache, Collator(HiggsV2Spec.from_config(tiny_config), with_index=True))


MANY = 10_000_000


@pytest.mark.parametrize("budget", [{"batch_size": 4, "max_tokens": None}, {"batch_size": 1, "max_tokens": 1200}])
def test_what_is_needed_holds_every_real_batch(budget, dataset):
    with pytest.raises(ConfigError) as caught:
        check_shared_memory(dataset, num_workers=MANY, kept=0, ranks_here=2, **budget)
    text = str(caught.value)
    assert "--num_workers 0" in text and "--ipc=host" in text and "--shm-size" in text and "2 ranks" in text
    (needed,) = re.findall(r"about ([\d,]+) MB", text)
    estimate = float(needed.replace(",", "")) * 1e6 / (2 * 4 * MANY)
    batches = [dataset[MicroBatch(tuple(range(i, i + 4)))] for i in range(9)]
    batches = [batch for batch in batches if batch.num_tokens <= (budget["max_tokens"] or MANY)]
    sizes = [_bytes_of(batch) for batch in batches]
    assert sizes and max(sizes) <= estimate < 4 * max(sizes), (sizes, estimate)


def test_no_workers_need_no_room_and_two_fit(dataset, tmp_path):
    shared = {"batch_size": 4, "max_tokens": None, "kept": 8, "ranks_here": 8}
    check_shared_memory(dataset, num_workers=0, **shared | {"ranks_here": MANY})
    check_shared_memory(dataset, num_workers=2, **shared)
    check_shared_memory(dataset, num_workers=MANY, folder=tmp_path / "no such place", **shared)


def test_a_run_is_refused_before_its_model_is_loaded(forks, flags_of, tmp_path):
    # A rank holds on to the batches of its whole accumulation.
    (result,) = forks.run(flags_of(tmp_path / "run", num_workers=1, grad_accum=1_000_000), 1)
    assert result.returncode == 2, result.output
    assert "--num_workers: /dev/shm has " in result.output and "engine:" not in result.output
