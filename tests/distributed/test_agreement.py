"""Checks of what all ranks must share; ranks are threads here, and processes on two hosts in test_many_hosts.py."""

import shutil
import threading
import time

import pytest

from higgs_ds.distributed import agreement
from higgs_ds.distributed.agreement import check_same, check_shared, made_once
from higgs_ds.distributed.rendezvous import named
from higgs_ds.errors import ConfigError
from higgs_ds.files import stamp
from tests.data.test_rows import on_ranks

HOSTS = ("node01", "node01", "node02", "node03")


def test_values_are_compared_as_they_are_written():
    assert named([2], ()) == "rank 2" and named([1, 3], ("a",) * 4) == "ranks 1, 3"
    assert named([0, 1, 3], HOSTS) == "ranks 0, 1 on node01 and rank 3 on node03"
    same = {"--lr": 1e-4, "--lora_target_modules": ["a", "b"], "--seed": None}
    assert on_ranks(3, lambda ranks: check_same(same, ranks)) == [None] * 3
    errors = on_ranks(3, lambda ranks: check_same(same | ({"--lr": 1e-3, "more": 1} if ranks.rank else {}), ranks))
    assert len({str(error) for error in errors}) == 1 and isinstance(errors[0], ConfigError)
    assert errors[0].problems == [
        "--lr: 0.0001 on rank 0, 0.001 on ranks 1, 2; give all ranks the same",
        "more: not there on rank 0, 1 on ranks 1, 2; give all ranks the same",
    ]


def test_ranks_that_share_a_file_have_it_read_by_the_first_of_them(tmp_path):
    """Two hosts of two ranks, with a copy each that keeps its times."""
    copies = tmp_path / "one", tmp_path / "other"
    copies[0].write_text("codec")
    shutil.copy2(*copies)
    read = []

    def agree(ranks) -> str:
        mine = copies[ranks.rank // 2]

        def content() -> str:
            read.append(ranks.rank)
            if not (text := mine.read_text()):
                raise ConfigError([f"{mine.name} is empty"])
            return text

        return made_once(stamp(mine), content, ranks)

    assert on_ranks(4, agree) == ["codec"] * 4 and sorted(read) == [0, 2]
    copies[1].write_text("CODEC")
    assert on_ranks(4, agree) == ["codec"] * 2 + ["CODEC"] * 2
    copies[1].write_text("")
    assert [str(error) for error in on_ranks(4, agree)] == ["other is empty"] * 4


@pytest.fixture
def of_two_hosts(monkeypatch, tmp_path):
    """Looks at one folder from two hosts, while `late(host0, host1)` brings to the one what the other has written."""
    monkeypatch.setattr(agreement, "PAUSE_SEC", 0.05)
    hosts = tmp_path / "host0", tmp_path / "host1"
    hosts[1].mkdir()

    def look(late=lambda one, other: None, *, patience_sec: float = 0.3) -> list:
        monkeypatch.setattr(agreement, "PATIENCE_SEC", patience_sec)
        helper = threading.Thread(target=late, args=hosts)
        helper.start()
        results = on_ranks(2, lambda ranks: check_shared({"--output_dir": hosts[ranks.rank]}, ranks))
        helper.join()
        return results

    return look


def test_a_stale_listing_is_waited_for_and_another_folder_is_refused(of_two_hosts, tmp_path):
    def later(one, other) -> None:
        time.sleep(0.5)
        shutil.copytree(one, other, dirs_exist_ok=True)

    assert of_two_hosts(later, patience_sec=60) == [None, None]
    assert list((tmp_path / "host0").iterdir()) == []
    errors = of_two_hosts()
    assert str(errors[0]) == str(errors[1])
    paths = f"{tmp_path / 'host0'} ({tmp_path / 'host1'} there)"
    assert f"--output_dir: rank 1 cannot see what rank 0 has written to {paths}" in str(errors[0])
    assert "it must be one folder, which all hosts share" in str(errors[0])


def test_a_folder_that_may_only_be_read_is_known_by_the_names_in_it(of_two_hosts, monkeypatch, tmp_path):
    def refuse(*args) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(agreement.Path, "touch", refuse)
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir(exist_ok=True)
        (tmp_path / host / "a.index").write_text("")
    assert of_two_hosts() == [None, None]
    (tmp_path / "host0/b.index").write_text("")
    assert "cannot see what rank 0" in str(of_two_hosts()[0])
