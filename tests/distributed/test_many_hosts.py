"""Runs on two hosts made of network namespaces, with real ranks: the promises of docs/many-machines.md."""

import json
import os
import shutil
import time

import pytest

from higgs_ds.checkpoint import list_checkpoints
from higgs_ds.codec.sample import SampleCodec
from tests.conftest import SPEECH
from tests.support.hosts import COLLECTIVES, RENDEZVOUS_PORT, SHORT_SILENCE_SEC, two_hosts
from tests.support.ranks import assert_all
from tests.test_faults import steps_done, until


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as both:
        yield both


@pytest.fixture
def on_hosts(hosts, forks):
    """Starts so many ranks on each of the first `count` hosts; `instead` are the second host's own folders."""

    def start(flags, *, ranks_each=1, count=2, instead=None, then=None, **how):
        def env_of(rank):
            place = {"RANK": rank, "LOCAL_RANK": rank % ranks_each, "WORLD_SIZE": count * ranks_each}
            return place | {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": RENDEZVOUS_PORT}

        def patch(rank):
            host = rank // ranks_each
            folders = {str(place): str(folder) for place, folder in (instead or {}).items()} if host else {}
            return ["on_host", hosts[host].name, folders, then]

        patches = {rank: patch(rank) for rank in range(count * ranks_each)}
        return forks.start(flags, count * ranks_each, patches=patches, env_of=env_of, **how)

    return start


@pytest.fixture
def refused(on_hosts, forks):
    """Starts a rank on each host, which must both end with code 2; returns the output of rank 0."""

    def run(flags, **how):
        results = forks.wait(on_hosts(flags, **how), 300)
        assert_all(results, returncode=2)
        assert "Traceback" not in results[0].output + results[1].output
        return results[0].output

    return run


def test_a_host_that_is_cut_off_ends_the_run_by_name_and_the_other_goes_on_with_it(
    hosts, on_hosts, forks, flags_of, tmp_path
):
    """Two ranks on each; nothing but the meeting place and the system's own ports is open between them."""
    folder = tmp_path / "run"
    settings = {"dtype": "fp32", "save_every": 2, "resume": "auto", "max_steps": 60, "lr_scheduler": "constant"}
    ranks = on_hosts(flags_of(folder, **settings), ranks_each=2, then=["slowly", 0.3, 0.0])
    until(lambda: steps_done(folder) >= 4 or forks.ended(ranks[0]), 450)
    hosts[1].cut_off()
    started = time.monotonic()
    results = forks.wait(ranks, SHORT_SILENCE_SEC + 300)
    print(f"ended {time.monotonic() - started:.0f} s after the host was cut off")
    assert_all(results, returncode=1)
    for here, other in (((0, 1), hosts[1]), ((2, 3), hosts[0])):
        for rank in here:
            text = f"on {other.name} has not been heard from for {SHORT_SILENCE_SEC:.0f} s, in step"
            assert text in results[rank].output, results[rank].output[-2000:]
            assert results[rank].ended_after_sec < SHORT_SILENCE_SEC + 60

    stopped = json.loads((folder / "stopped.json").read_text())
    assert stopped["exit_code"] == 1 and hosts[1].name in stopped["reason"]
    saved = list_checkpoints(folder / "checkpoints")[-1]
    step = int(saved.name.removeprefix("step-"))
    settings["max_steps"] = step + 2
    results = forks.wait(on_hosts(flags_of(folder, **settings), ranks_each=2, count=1), 300)
    assert_all(results)
    assert f"resuming after step {step}" in results[0].output
    assert "2 rows × 2 accumulation × 2 ranks = 8 rows" in results[0].output  # 2 × 1 × 4 ranks before
    steps = [json.loads(line)["global_step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))
    hosts[1].run("ip", "link", "set", hosts[1].device, "up")


def test_a_firewall_between_the_hosts_is_said_in_seconds(hosts, refused, flags_of, tmp_path):
    hosts[0].open_only(1, 1)
    try:
        said = refused(flags_of(tmp_path / "run"))
    finally:
        hosts[0].open_only(*COLLECTIVES)
    reached = f"rank 1 on {hosts[1].name} reaches {hosts[0].address} on port {RENDEZVOUS_PORT} (MASTER_PORT), but not"
    assert reached in said and "TCP ports 40000-40199 (net.ipv4.ip_local_port_range)" in said, said


def test_folders_that_the_other_host_does_not_see(hosts, refused, flags_of, tmp_path):
    folders = {"--output_dir": tmp_path / "run", "--codes_cache": tmp_path / "cache"}
    for folder in (*folders.values(), tmp_path / "elsewhere"):
        folder.mkdir()
    flags = flags_of(tmp_path / "run", codes_cache=tmp_path / "cache")
    said = refused(flags, instead=dict.fromkeys(folders.values(), tmp_path / "elsewhere"))
    one, other = (host.name for host in hosts)
    for flag, folder in folders.items():
        assert f"{flag}: rank 1 on {other} cannot see what rank 0 on {one} has written to {folder}" in said, said
    assert not list(tmp_path.rglob(".seen-by-all-*"))


def test_clips_that_the_other_host_does_not_see(hosts, refused, flags_of, tmp_path):
    shutil.copytree(SPEECH.parent, tmp_path / "speech")
    (tmp_path / "empty").mkdir()
    (clips,) = {json.loads(line)["audio"].split("/")[0] for line in SPEECH.read_text().splitlines()}
    flags = flags_of(tmp_path / "run", train_manifest=tmp_path / "speech" / SPEECH.name)
    said = refused(flags, instead={tmp_path / "speech" / clips: tmp_path / "empty"})
    assert f"{SPEECH.name}:1: rank 0 on {hosts[0].name}: " in said and " bytes; rank 1 on " in said, said
    assert f"rank 1 on {hosts[1].name}: " in said and "does not exist" in said and "the same clips" in said


def test_a_checkpoint_that_is_missing_different_or_damaged_on_the_other_host(hosts, forks, refused, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_steps=1, save_every=1, resume="auto", dtype="fp32")
    assert_all(forks.run(flags, 1))
    (tmp_path / "empty").mkdir()
    said = refused(flags, instead={tmp_path / "run/checkpoints": tmp_path / "empty"})
    found = tmp_path / "run/checkpoints/step-000001"
    assert f"--resume: rank 0 on {hosts[0].name} goes on from {found}, rank 1 on {hosts[1].name} cannot: " in said
    assert f"{found / 'checksums.json'}: No such file" in said and "share that folder" in said
    shutil.copytree(tmp_path / "run/checkpoints/step-000001", tmp_path / "empty/step-000001")
    assert_all(forks.run(flags_of(tmp_path / "other", max_steps=1, save_every=1, dtype="fp32", seed=7), 1))
    said = refused(flags, instead={tmp_path / "run/checkpoints": tmp_path / "other/checkpoints"})
    assert "holds another checkpoint there" in said, said
    (tmp_path / "other/checkpoints/step-000001").rename(tmp_path / "other/checkpoints/step-000002")
    said = refused(flags, instead={tmp_path / "run/checkpoints": tmp_path / "other/checkpoints"})
    assert f"rank 1 on {hosts[1].name} sees checkpoints up to step 2" in said and "up to 1; all hosts" in said
    # A copy is proven there: one bit of it is another; size, time of change and seal are the same.
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "copy")
    moments = tmp_path / "copy/step-000001/optimizer.safetensors"
    before, content = moments.stat(), bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    os.utime(moments, ns=(before.st_atime_ns, before.st_mtime_ns))
    said = refused(flags, instead={tmp_path / "run/checkpoints": tmp_path / "copy"})
    assert f"rank 1 on {hosts[1].name} cannot: {found / moments.name}: damaged" in said, said


def test_another_codec_or_other_options_on_the_other_host(hosts, refused, flags_of, codec_dir, tmp_path):
    SampleCodec([2 * book for book in SampleCodec.load(codec_dir)._codebooks]).save(tmp_path / "codec")
    one, other = (host.name for host in hosts)
    said = refused(flags_of(tmp_path / "run"), instead={codec_dir: tmp_path / "codec"})
    assert "--codec, by its content: " in said and f" on rank 1 on {other}; give all ranks the same" in said, said
    more = {1: ["--lr", "0.02", "--val_manifest", str(SPEECH)]}
    said = refused(flags_of(tmp_path / "other", lr=0.01), more=more)
    assert f"--lr: 0.01 on rank 0 on {one}, 0.02 on rank 1 on {other}; give all ranks the same" in said, said
    assert "--val_manifest: null on rank 0" in said and said.count("give all ranks") == 2
    assert not (tmp_path / "other").exists()
