"""Chooses the device that this process computes on: its GPU, or the CPU where `DS_ACCELERATOR=cpu` says so.

A GPU that cannot be used is an error, and never a run of weeks on the CPU instead.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..process import say

if TYPE_CHECKING:
    import torch


def pick_device() -> torch.device:
    """The CPU where `DS_ACCELERATOR` is "cpu", else the GPU that `LOCAL_RANK` counts to (0 without a launcher).

    Raises:
        ConfigError: no GPU can be used; there are more ranks on this machine than GPUs to be seen; or
            `DS_ACCELERATOR` names something else.
    """
    import torch

    wanted = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted not in ("", "cuda"):
        raise _refused(f"DS_ACCELERATOR is {wanted!r}; this program runs on cuda (or leave it out) and on cpu")
    # Set by DeepSpeed's launcher. With it torch counts the cards that are plugged in, even if the driver is too old.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
    if not torch.cuda.is_available():
        why = "torch.cuda.is_available() is False"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
            why = str(error).splitlines()[0]  # advice on debugging follows
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}{visible}"
        raise _refused(f"no usable GPU: {why}; {built}; set DS_ACCELERATOR=cpu to run on the CPU on purpose")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # torchrun and DeepSpeed's launcher say how many ranks they started on this machine, others do not.
    started = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    if max(started, local_rank + 1) > count:
        raise _refused(
            f"LOCAL_RANK goes up to {max(started - 1, local_rank)} on this machine, but the GPUs to be seen are "
            f"{count}{visible}; start as many ranks as there are GPUs (--num_gpus, --nproc_per_node)",
            first_to_know=0 if started else count,
        )
    return torch.device("cuda", local_rank)


def name_accelerator() -> torch.device:
    """Picks the device and tells DeepSpeed, which would otherwise guess, and fail where it guesses wrong."""
    device = pick_device()
    os.environ["DS_ACCELERATOR"] = device.type
    return device


def take_device(device: torch.device, *, deterministic: bool = False) -> None:
    """Takes the device for this process, before anything is computed on it.

    Args:
        deterministic: kernels that give the same numbers twice, for this whole process; an operation that has none
            raises RuntimeError.

    Raises:
        ConfigError: the GPU cannot be started: another process has it exclusively, or it is broken.
    """
    import torch

    if deterministic:
        # With it cuBLAS gives the same result twice; read when it starts, so set before the first use of the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Fills new tensors with NaN, one pass over memory each, to find reads before writes.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in torch's stub
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            text = f"{device} cannot be used: {str(error).splitlines()[0]}; nvidia-smi shows its state"
            raise _refused(text, first_to_know=device.index or 0) from None
        # On an H100 torch 2.11 prefers cuDNN's attention, which plans each new shape (public figures: a second, forward
        # and backward). With token budgets nearly every step has one. FlashAttention-2, the next choice, has no plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # LoRA's gradients are sums over all tokens, a few columns wide. cuBLAS splits such a sum, and by default
        # may round the parts to bf16 or fp16 before adding them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _refused(text: str, *, first_to_know: int = 0) -> ConfigError:
    """Makes the error. Rank 0 prints it for all; on another machine, so does the first rank that meets it."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0" and local_rank == str(first_to_know):
        say(f"[rank {rank}] {text}", error=True)
    return ConfigError([text])
