"""Says how many threads torch, and the OpenMP runtime that DeepSpeed's Adam on the CPU is linked to, would start."""

import ctypes
import os

from higgs_ds.distributed.launch_env import enter_launch

enter_launch()

import torch  # noqa: E402

runtime = ctypes.CDLL("libgomp.so.1").omp_get_max_threads()
print(f"rank {os.environ.get('RANK')}: {torch.get_num_threads()} threads of torch, {runtime} of OpenMP", flush=True)
