"""Which device this process computes on: its GPU, or the CPU where `DS_ACCELERATOR=cpu` says so. One answer for all.

A GPU that cannot be used is said. Survived, it would be a run of weeks on the CPU that looks like any other.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, first_line
from ..process import say

if TYPE_CHECKING:
    import torch

DRIVER_FILE = Path("/proc/driver/nvidia/version")
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS gives the same result twice


def pick_device() -> torch.device:
    """The CPU where `DS_ACCELERATOR` is "cpu", else the GPU that `LOCAL_RANK` counts to (0 without a launcher).

    Raises:
        ConfigError: no GPU can be used, with the driver, torch's CUDA and the remedy; there are more ranks on this
            machine than GPUs to be seen, with both numbers; or `DS_ACCELERATOR` names something else.
    """
    wanted = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    import torch

    if wanted == "cpu":
        return torch.device("cpu")
    if wanted not in ("", "cuda"):
        raise _refused(f"DS_ACCELERATOR is {wanted!r}; this program runs on cuda (or leave it out) and on cpu")
    # DeepSpeed's launcher sets it for its ranks, and with it torch counts the cards that are plugged in, and not those
    # that this driver can serve.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    if not torch.cuda.is_available():
        raise _refused(_no_gpu(torch.version.cuda))
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # torchrun says how many ranks it started on this machine, and DeepSpeed's launcher; others do not.
    started = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    if max(started, local_rank + 1) > count:
        raise _refused(
            f"LOCAL_RANK goes up to {max(started - 1, local_rank)} on this machine, but the GPUs to be seen are "
            f"{count}{_visible()}; start as many ranks as there are GPUs (--num_gpus, --nproc_per_node)",
            first_to_know=0 if started else count,
        )
    return torch.device("cuda", local_rank)


def name_accelerator() -> torch.device:
    """`pick_device`, and DeepSpeed told the same: without a word it guesses, and fails where it guesses wrong."""
    device = pick_device()
    os.environ["DS_ACCELERATOR"] = device.type
    return device


def take_device(device: torch.device, *, deterministic: bool = False) -> None:
    """Takes the device for this process, before anything is computed on it.

    Args:
        deterministic: kernels that give the same numbers twice, for this whole process; an operation that has none
            raises RuntimeError.

    Raises:
        ConfigError: the GPU cannot be started: it is another process's alone, or broken.
    """
    import torch

    if deterministic:
        # Read when cuBLAS starts, so it is set before the first use of the GPU.
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES[0]
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # What is read before it is written would be a fault of its own; filling all of it with NaN costs a pass each.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            versions = f"NVIDIA driver {driver_version()}, torch is built for CUDA {torch.version.cuda}"
            text = f"{device} cannot be used: {first_line(error)}; {versions}; nvidia-smi shows its state"
            raise _refused(text, first_to_know=device.index or 0) from None
        # On an H100 torch 2.11 would take cuDNN's attention first, which draws up a plan for every new shape (public
        # figures: a second, forward and backward). With token budgets nearly every step has one. FlashAttention-2,
        # which is next, has no plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # LoRA's gradients are sums over all tokens, a few columns wide. cuBLAS cuts such a sum into parts, which torch
        # would let it round to bf16 or fp16 before it adds them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def describe_devices(device: torch.device, count: int) -> str:
    """`cpu`, or how many GPUs of which name."""
    if device.type != "cuda":
        return device.type
    import torch

    return f"{count} × {torch.cuda.get_device_name(device)}"


def driver_version() -> str | None:
    """Of NVIDIA's driver, from the kernel or nvidia-smi; None where neither knows one."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        text = asked.stdout
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _no_gpu(built_for: str | None) -> str:
    driver = driver_version()
    found = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver found"
    on_purpose = "or set DS_ACCELERATOR=cpu to run on the CPU on purpose"
    if built_for is None:
        return (
            f"no usable GPU: {found}, and this torch is built without CUDA (torch.version.cuda is None); install the "
            f"one of requirements.txt, {on_purpose}"
        )
    needed = "580 or newer" if built_for.startswith("13.") else f"for CUDA {built_for}"
    return (
        f"no usable GPU: {found}, torch is built for CUDA {built_for} (torch.version.cuda){_visible()}; install a "
        f"driver {needed}, {on_purpose}"
    )


def _visible() -> str:
    """What hides GPUs, where something does."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"


def _refused(text: str, *, first_to_know: int = 0) -> ConfigError:
    """The error. Rank 0 says it for all; where it does not meet it (another machine), the first rank that does."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0" and local_rank == str(first_to_know):
        say(f"[rank {rank}] {text}", error=True)
    return ConfigError([text])
