"""ZeRO-1 and ZeRO-2 through `start_ranks`, with pynvml installed and GPUs that go by UUID and by MIG name; prints how
often CUDA was asked for its free memory, and what DeepSpeed says by itself.

The accelerator is DeepSpeed's for CPUs, but for the question after free memory, which is CUDA_Accelerator's own code.
pynvml, and what torch.cuda says of GPUs, are stood in for.
"""

import os
import sys
import types

import torch
import torch.distributed as dist

NAMES = ("GPU-8f2c1c1e-0d6b-4b5c-9f0e-3a1b2c3d4e5f", "MIG-41b35014-745c-5228-9c7b-a18b5d6e1f20")
GPU_BYTES = 80 << 30
pynvml = types.ModuleType("pynvml")
pynvml.NVMLError = RuntimeError
pynvml.nvmlInit = lambda: None
pynvml.nvmlDeviceGetHandleByIndex = lambda index: index
pynvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(free=GPU_BYTES)
sys.modules["pynvml"] = pynvml

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device, torch.cuda.current_device = lambda device: None, lambda: 0

asked = []
torch.cuda.mem_get_info = lambda device=None: asked.append(device) or (GPU_BYTES, GPU_BYTES)


def main() -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    from higgs_ds.distributed.engine import _without_kernel_build, leave_ranks, start_ranks
    from higgs_ds.process import end_process

    accelerator = CPU_Accelerator()
    CUDA_Accelerator()  # imports pynvml
    for name in ("available_memory", "current_device", "_get_nvml_gpu_id"):
        setattr(CPU_Accelerator, name, getattr(CUDA_Accelerator, name))
    set_accelerator(accelerator)
    _without_kernel_build(deepspeed)
    init_process_group = dist.init_process_group
    dist.init_process_group = lambda backend, device_id, **settings: init_process_group("gloo", **settings)
    ranks = start_ranks()
    assert ranks.device.type == "cuda" and deepspeed.accelerator.get_accelerator() is accelerator

    def initialize(stage: int) -> None:
        model = torch.nn.Linear(8, 8)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            config=config | {"zero_allow_untested_optimizer": True},
        )

    for name in NAMES:
        os.environ["CUDA_VISIBLE_DEVICES"] = name
        asked.clear()
        initialize(1)
        initialize(2)
        print(f"{name}: CUDA was asked {len(asked)} times")
        ours = accelerator.__dict__.pop("available_memory")
        try:
            initialize(2)
        except ValueError as error:
            print(f"DeepSpeed by itself: {error}")
        accelerator.available_memory = ours
    end_process(leave_ranks(0))


if __name__ == "__main__":
    main()
