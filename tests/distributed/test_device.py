"""The device that a run takes: an unusable GPU is an error, and the CPU is taken only where it was asked for."""

import os

import pytest
import torch
import torch.distributed as dist

import train_ds
from higgs_ds.distributed import engine
from higgs_ds.distributed.device import pick_device, take_device
from higgs_ds.distributed.engine import start_ranks
from higgs_ds.distributed.rank_watch import NCCL_TIMEOUT_SEC, STALL_TIMEOUT_SEC, check_stall_timeout
from higgs_ds.distributed.rendezvous import Meeting
from higgs_ds.errors import ConfigError
from higgs_ds.model.speech import default_dtype
from higgs_ds.tools.cli import main as higgs_ds
from tests.conftest import SPEECH

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU can be used")


@pytest.fixture
def gpus(monkeypatch):
    """A machine where torch sees so many GPUs, as far as one can ask before using them."""

    def set_number(count: int, **environment) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return set_number


def refusal() -> str:
    with pytest.raises(ConfigError) as caught:
        pick_device()
    assert len(caught.value.problems) == 1
    return str(caught.value)


@needs_no_gpu
@pytest.mark.parametrize("verb", ["train", "check", "prepare", "generate", "reproduce"])
def test_no_usable_gpu_ends_every_verb_with_2_before_anything_is_made(verb, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("DS_ACCELERATOR")
    run = ["--train_manifest", str(SPEECH), "--output_dir", str(tmp_path / "run")]
    speak = ["--text", "Hello.", "--output_file", str(tmp_path / "run.wav")]
    if verb == "train":
        code = train_ds.main(run)
    else:
        code = higgs_ds([verb, *(speak if verb == "generate" else run)])
    said = capfd.readouterr().err
    assert code == 2 and not list(tmp_path.glob("run*"))
    assert said.count("no usable GPU") == 1 and "\n" not in said.strip(), said
    assert "NVIDIA" in said and f"is built for CUDA {torch.version.cuda}; set DS_ACCELERATOR=cpu" in said


def test_a_gpu_that_does_not_start_is_one_line(gpus, monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might …")

    gpus(1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(ConfigError) as caught:
        take_device(pick_device())
    (said,) = caught.value.problems
    assert said.startswith(
        "cuda:0 cannot be used: CUDA error: CUDA-capable device(s) is/are busy or unavailable; nvidia-smi"
    )


def test_torchs_own_words_and_gpus_that_are_hidden_are_said(gpus, monkeypatch):
    """DeepSpeed's launcher has torch count the cards by NVML, which a driver that is too old answers too."""

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080). Please update it")

    gpus(0, CUDA_VISIBLE_DEVICES="", PYTORCH_NVML_BASED_CUDA_CHECK="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "PYTORCH_NVML_BASED_CUDA_CHECK" in os.environ)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    said = refusal()
    assert "driver on your system is too old (found version 12080)" in said and "CUDA_VISIBLE_DEVICES is ''" in said


def test_more_ranks_than_gpus_are_refused_on_all_of_them(gpus, capsys):
    for rank in (0, 3, 7):
        gpus(4, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=8)
        text = refusal()
        assert "LOCAL_RANK goes up to 7" in text and "GPUs to be seen are 4" in text
    assert capsys.readouterr().err == ""  # rank 0 says it, as any ConfigError
    gpus(0, RANK=8, LOCAL_RANK=0)  # another machine says it too
    assert refusal() in capsys.readouterr().err
    gpus(4, RANK=4, LOCAL_RANK=4)  # a launcher that does not say how many it started
    assert "LOCAL_RANK goes up to 4" in refusal() and "LOCAL_RANK" in capsys.readouterr().err
    gpus(4, RANK=3, LOCAL_RANK=3)
    assert pick_device() == torch.device("cuda", 3)


def test_the_cpu_is_taken_where_it_is_asked_for(gpus):
    gpus(4, DS_ACCELERATOR="cpu", LOCAL_RANK=9)
    assert pick_device() == torch.device("cpu")
    assert default_dtype(pick_device()) == "fp32" and default_dtype(torch.device("cuda", 0)) == "bf16"
    gpus(4, DS_ACCELERATOR="xpu")
    assert "DS_ACCELERATOR is 'xpu'" in refusal()


class Joined(Exception):
    """The process group was about to be joined."""


@pytest.mark.parametrize(("world_size", "bound"), [(8, torch.device("cuda", 3)), (1, None)])
def test_ranks_on_gpus_bind_theirs_leave_cudnn_attention_and_sum_in_float32(world_size, bound, gpus, monkeypatch):
    gpus(8, RANK=0, LOCAL_RANK=3, WORLD_SIZE=world_size)
    seen = {}

    def init_process_group(backend, **settings):
        seen.update(settings, backend=backend)
        raise Joined

    monkeypatch.setattr(engine, "meet", lambda *, on_cpu: Meeting(None, 0, world_size, (), {}))
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    cudnn_before, products = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.matmul
    assert products.allow_bf16_reduced_precision_reduction and products.allow_fp16_reduced_precision_reduction
    try:
        with pytest.raises(Joined):
            start_ranks()
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        assert not products.allow_bf16_reduced_precision_reduction
        assert not products.allow_fp16_reduced_precision_reduction
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn_before)
        products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    assert seen["backend"] == "nccl" and seen["device_id"] == bound and seen["timeout"].days == 1
    assert os.environ["DS_ACCELERATOR"] == "cuda"


def test_deterministic_holds_for_the_whole_process(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        take_device(torch.device("cpu"), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        take_device(torch.device("cpu"), deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def test_a_stall_timeout_that_nccl_would_come_before_is_refused_with_both_numbers():
    for seconds in (600, 1200):
        with pytest.raises(ConfigError, match=f"--stall_timeout_sec: {seconds} is not below 600"):
            check_stall_timeout(seconds, on_gpu=True)
        check_stall_timeout(seconds, on_gpu=False)
    check_stall_timeout(599.5, on_gpu=True)
    check_stall_timeout(STALL_TIMEOUT_SEC["cuda"], on_gpu=True)
    assert dist.constants.default_pg_nccl_timeout.total_seconds() == NCCL_TIMEOUT_SEC
