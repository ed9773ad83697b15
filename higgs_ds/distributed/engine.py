"""The DeepSpeed engine and the process group: the only file that imports deepspeed.

In the order of a run: `meet_ranks` finds the other ranks, `join_group` makes the process group, `check_config` has
DeepSpeed judge its JSON, `loading` shards the base while it loads, `Engine` trains and hands out its state,
`leave_ranks` ends it.

The boundaries of an optimizer step are ours (`managed_gradient_accumulation: false`): any number of `backward` calls,
then one `step`. Only public calls are used, but for the ones in `_without_kernel_build` and `_without_pynvml`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn

from ..errors import ConfigError, reading, shown
from ..model.lora import with_lora
from ..process import end_in_time, say
from .device import name_accelerator, take_device
from .optimizer_state import GatheredState, OptimizerState
from .ranks import Ranks
from .rendezvous import Meeting, meet


def start_ranks(*, deterministic: bool = False) -> Ranks:
    """`meet_ranks` and `join_group` in one, for programs that nobody watches."""
    ranks, meeting = meet_ranks(deterministic=deterministic)
    join_group(ranks, meeting)
    return ranks


def meet_ranks(*, deterministic: bool = False) -> tuple[Ranks, Meeting]:
    """Finds the other ranks of whatever launched this; plain `python` becomes one rank of its own. No collective yet.

    Args:
        deterministic: only kernels that give the same numbers twice, see `take_device`.

    Raises:
        ConfigError: this rank has no GPU, and `DS_ACCELERATOR` does not say that it is to use the CPU; or the ranks
            cannot meet, see `rendezvous.meet`.
    """
    device = name_accelerator()
    take_device(device, deterministic=deterministic)
    meeting = meet(on_cpu=device.type == "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Ranks(meeting.rank, meeting.world_size, local_rank, device, meeting.hosts), meeting


def join_group(ranks: Ranks, meeting: Meeting) -> None:
    """The ranks' process group: from here on there are collectives. Waits a day for a rank that does not come."""
    on_cpu = ranks.device.type == "cpu"
    backend = "gloo" if on_cpu else "nccl"
    dist.init_process_group(
        backend,
        store=meeting.store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(days=1),
        # NCCL need not guess the rank's GPU, and connects now, where an error has a place. A single rank has nobody to
        # connect to, and doing it all the same has failed on some machines (DeepSpeed's issue 8248).
        device_id=ranks.device if not on_cpu and ranks.world_size > 1 else None,
    )
    import deepspeed

    if on_cpu:
        _without_kernel_build(deepspeed)
    else:
        _without_pynvml(deepspeed)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _without_kernel_build(deepspeed: ModuleType) -> None:
    """Keeps DeepSpeed from compiling its shared-memory kernel (65 s) on CPU, where only inference uses it.

    `deepspeed.ops.__compatible_ops__` is what `deepspeed.comm.torch.build_shm_op` asks;
    tests/distributed/test_engine.py fails when that changes.
    """
    deepspeed.ops.__compatible_ops__ = {}


def _without_pynvml(deepspeed: ModuleType) -> None:
    """Has CUDA say how much of the GPU's memory is free, which DeepSpeed asks at stages 1 and 2, the model loaded.

    Where pynvml is installed DeepSpeed would ask that, by the number in CUDA_VISIBLE_DEVICES, and fail where Kubernetes
    or Slurm has written UUIDs or MIG names. tests/distributed/test_engine.py fails when that changes.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def leave_ranks(exit_code: int, last_line: str = "", *, wait: bool = True) -> int:
    """Leaves the process group; returns `exit_code`, to end with by `process.end_process`, within END_SEC from here.

    Args:
        last_line: printed by rank 0, once nobody is waited for any more.
        wait: for the other ranks, where all of them are known to come here.
    """
    if dist.is_initialized():
        if wait:
            dist.barrier()
        if last_line and dist.get_rank() == 0:
            say(last_line)
        end_in_time(exit_code)
        dist.destroy_process_group()
    return exit_code


def check_config(ds_config: dict, name: str) -> None:
    """Has DeepSpeed's own models validate the resolved file, before anything is loaded.

    Args:
        ds_config: as resolved by `ds_config.resolve`; it stays as it is.
        name: the file's, for errors, which name every field that DeepSpeed refuses, as far as it reads on.
    """
    from deepspeed import DeepSpeedConfig
    from pydantic import ValidationError

    with reading(f"{name}: DeepSpeed does not take it"):
        try:
            DeepSpeedConfig(copy.deepcopy(ds_config))
        except ValidationError as error:
            faults = [(shown(".".join(map(str, one["loc"])))[1:-1], one) for one in error.errors()]
            says = f"DeepSpeed's {error.title} says"
            raise ConfigError(
                [f"{name}: {place} is {shown(one['input'])}; {says}: {one['msg']}" for place, one in faults]
            ) from None


@contextlib.contextmanager
def loading(ds_config: dict) -> Iterator[None]:
    """Inside, `from_pretrained` shards the weights over the ranks while it loads them, if the stage is 3."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(ds_config)  # transformers holds it weakly and asks it in from_pretrained
    yield
    del keep_alive


class DroppableAdamW(torch.optim.AdamW):
    """AdamW whose next step can be dropped: moments and weights stay, the engine clears the gradients as always.

    The same at every ZeRO stage, without reaching into how each of them keeps gradients. With `clip_norm` it clips
    and reports the norm itself, for stage 0 in float32, where DeepSpeed does not report one.
    """

    drop_next = False
    clip_norm: float | None = None
    norm: float | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors that it steps, in order; at stages 1 and 2 this rank's partition of everything, as one."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.drop_next:
            return None
        if self.clip_norm is not None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            # In float64, as at DeepSpeed's other stages: on a CPU torch's float32 norm of 25 M values is 0.1 % too low.
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm or float("inf"), norm)
            self.norm = float(norm)
            if not math.isfinite(self.norm):
                return None
        return super().step(closure)


class Engine:
    """A module under DeepSpeed: forward, backward, one update an optimizer step."""

    def __init__(self, module: nn.Module, ds_config: dict, *, weight_decay: float, max_grad_norm: float):
        import deepspeed

        # 1. The optimizer, with the duties that DeepSpeed's stage leaves to it.
        # With fp16 the loss is scaled up until gradients overflow now and then: such a step is dropped, and no failure.
        self.overflows_by_design: bool = ds_config["fp16"]["enabled"]
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self._optimizer = DroppableAdamW(list(_trained(module).values()), lr=0.0, weight_decay=weight_decay)
        # In float32 at stage 0 DeepSpeed reports no norm: the optimizer clips and measures itself.
        if self.stage == 0 and not ds_config["bf16"]["enabled"] and not ds_config["fp16"]["enabled"]:
            self._optimizer.clip_norm = max_grad_norm
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        # At stage 0 in bf16, DeepSpeed takes a step on zero gradients to make the moments, and leaves it counted:
        # Adam's bias correction would then be off by one, and the first update 0.74 of what it should be.
        self._optimizer.drop_next = self.stage == 0
        # 2. The modules that stage 3 gathers at once, with all that is in them.
        leaves = list(getattr(module, "leaf_modules", ()))
        if self.stage == 3 and leaves:
            deepspeed.utils.set_z3_leaf_modules(module, leaves)
            # DeepSpeed reduces such a module's gradients once the one of its input is there. Without one it would do so
            # before the module's backward, and take the gradients for zero.
            module.input_gradient = True  # type: ignore[assignment]  # a flag of the training forward's
        # 3. DeepSpeed's engine. Its own groups keep NCCL's ten minutes, and a rank that reads the base from a slow disk
        # may take longer: the ranks meet before there are any, on the group that has a day's patience.
        dist.barrier()
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=ds_config)
        self._optimizer.drop_next = False
        # 4. At stages 2 and 3 all ranks must add up their gradients in one order: noted here, compared in each step.
        self._came = [0, 0]  # gradients since the last step, and a checksum of their order
        for number, parameter in enumerate(_trained(module).values() if self.stage >= 2 else ()):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._note_gradient, number))
        self._layout_is_known = False  # until the first state was gathered and held against the module

    @property
    def module(self) -> Any:
        """The wrapped module, an `nn.Module` with `model` and `num_codebooks`: see `Family.training_forward`."""
        return self._engine.module

    @property
    def lora_config(self) -> LoraConfig:
        """Of the one adapter on the module's model."""
        return self.module.model.peft_config["default"]

    def describe(self, dtype: str) -> str:
        """Stage, dtype, devices and how many parameters train, as text."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.module.parameters()]
        trained = sum(size for size, learns in sizes if learns)
        total = sum(size for size, _ in sizes)
        total += sum(getattr(module, "quantized_values", 0) for module in self.module.modules())
        where, device = "cpu", self._engine.device
        if device.type == "cuda":
            where = f"{dist.get_world_size()} × {torch.cuda.get_device_name(device)}"
        return f"engine: ZeRO-{self.stage}, {dtype} on {where}; {trained:,} of {total:,} parameters train"

    def train(self, mode: bool = True) -> None:
        """Dropout on or off."""
        self._engine.train(mode)

    def forward(self, *args: Any) -> Any:
        """The module's forward, with the stage's gathering of weights."""
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the loss's gradients to the step's; nothing is divided by the accumulation."""
        # The clone matters at stage 0: DeepSpeed 0.19.8 hooks the module's own output to divide by the accumulation,
        # and learns that `backward` was told not to only from a hook on what it is given, which must fire first.
        self._engine.backward(loss.clone(), scale_wrt_gas=False)

    def _note_gradient(self, number: int, parameter: nn.Parameter) -> None:
        count, order = self._came
        self._came = [count + 1, zlib.crc32(number.to_bytes(4, "little"), order)]

    def gradient_order(self) -> list[float]:
        """The number of gradients that have come since the last step, and a checksum of their order.

        Stages 2 and 3 lay them into one buffer as they come and add the ranks' buffers up, whatever lies where: ranks
        whose backward goes another way would train each weight on others' gradients. The other stages have an order of
        their own, and zeros here.
        """
        return [float(value) for value in self._came]

    def step(self, learning_rate: float) -> float:
        """One update with all gradients since the last one; returns their norm before clipping, over all ranks.

        A norm that is not finite means that the update was not made, at any stage and dtype.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._came = [0, 0]
        # DeepSpeed sums the gradients over the ranks, clips, has the optimizer step, and clears them.
        self._engine.step()
        norm = self._optimizer.norm if self._optimizer.clip_norm is not None else self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def drop_step(self) -> None:
        """Ends the optimizer step without an update: gradients are cleared, weights and moments stay."""
        self._optimizer.drop_next = True
        self._came = [0, 0]
        try:
            self._engine.step()
        finally:
            self._optimizer.drop_next = False

    @contextlib.contextmanager
    def generating(self, empty: Callable[[], nn.Module]) -> Iterator[nn.Module | None]:
        """The base model with LoRA, dropout off and every weight whole, to generate with beside the engine.

        Under ZeRO-3 it is a copy that every rank gathers, so that no rank waits for another while it generates; None on
        every rank where a copy does not fit into some rank's memory. Every rank must enter it; training mode after it.

        Args:
            empty: makes the base model on the meta device.
        """
        self.train(False)
        try:
            yield self.module.model.get_base_model() if self.stage < 3 else self._copy_of_model(empty)
        finally:
            self.train()

    def _copy_of_model(self, empty: Callable[[], nn.Module]) -> nn.Module | None:
        source, device = self.module.model, self._engine.device
        num_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in source.parameters())
        fits = torch.ones(1, device=device)
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            fits *= torch.cuda.mem_get_info(device)[0] + unused > 1.1 * num_bytes
        dist.all_reduce(fits, op=dist.ReduceOp.MIN)
        if not fits:
            return None
        with torch.device("meta"):
            model = with_lora(empty(), self.lora_config)
        weights = {name: full_weight(parameter) for name, parameter in source.named_parameters()}
        model.load_state_dict(weights, assign=True, strict=False)
        for place, module in source.named_modules():
            model.get_submodule(place)._buffers.update(module._buffers)  # rotary tables, not in a state dict
        return model.eval().get_base_model()

    def gather_state(self) -> GatheredState | None:
        """Weights in float32 and Adam's moments for rank 0, which put themselves together when called; None elsewhere.

        The same whatever the stage and the world size, so that any of them can go on from it. Every rank must call
        this. Training may go on before the result is called, in another thread too: all of it is on the host by then.
        Three collectives in all: gathered tensor by tensor, a large adapter would hold up training for seconds.
        """
        # First the collectives, on every rank; the rest is rank 0's.
        weights, exp_avg, exp_avg_sq = [self._gather(parts) for parts in self._local_state()]
        if dist.get_rank() != 0:
            return None
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in _trained(self.module).items()}
        state = GatheredState(weights, exp_avg, exp_avg_sq, self._adam_steps(), shapes, by_parameter=self.stage == 3)
        if not self._layout_is_known:
            self._check_layout(state)
        return state

    def _gather(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every rank's share on rank 0's host, in memory of its own; nothing elsewhere."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if self.stage == 0 or world_size == 1:
            return [torch.cat(parts).cpu()] if rank == 0 else []  # a copy: the masters go on training
        # Under offload_optimizer masters and moments are on the CPU at stages 1 and 2, and NCCL serves GPUs alone. A
        # share is small, and leaves the GPU before the next kind comes.
        share = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self._engine.device)
        shares = [torch.empty_like(share) for _ in range(world_size)] if rank == 0 else None
        dist.gather(share, shares)
        return [gathered.cpu() for gathered in shares or ()]

    def _local_state(self) -> Iterator[list[torch.Tensor]]:
        """This rank's weights, exp_avg, exp_avg_sq, flat float32: by parameter, or at stages 1 and 2 by partition."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            parameters = _trained(self.module).values()
            masters = [safe_get_local_fp32_param(p).flatten() for p in parameters]
        else:
            masters = [master.detach().flatten() for master in self._optimizer.parameters]
        yield masters
        for key in ("exp_avg", "exp_avg_sq"):
            if not self._adam_steps():  # before its first update Adam has no moments, which is to say zeros
                yield [torch.zeros_like(master) for master in masters]
            elif self.stage == 3:
                yield [safe_get_local_optimizer_state(p, key).flatten() for p in parameters]
            else:
                yield [self._optimizer.state[master][key].flatten() for master in self._optimizer.parameters]

    def _check_layout(self, state: GatheredState) -> None:
        """Raises RuntimeError where the gathered weights, rounded, are not the module's: the layout has changed.

        Not at stage 3, where no rank has the full weights, and DeepSpeed itself says which part of which is whose.
        """
        if self.stage < 3:
            trained = _trained(self.module)
            for name, weight in state.full_weights().items():
                own = trained[name].detach().cpu()
                if not torch.equal(weight.to(own.dtype), own):
                    raise RuntimeError(f"{name}: gathered weights are not the model's; DeepSpeed's layout has changed")
        self._layout_is_known = True

    def load_state(self, state: OptimizerState, first_inputs: dict) -> None:
        """Sets a state of `gather_state`; the module's own weights must hold the same, in the engine's dtype, already.

        Args:
            first_inputs: any micro-batch's model inputs. One step with gradients of zero and learning rate 0 on it
                makes every stage create its moments, which are then set.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        # First a step that changes nothing, for the moments that it makes.
        books = self.module.num_codebooks
        device = next(value for value in first_inputs.values() if value is not None).device
        loss, _, _ = self.forward(first_inputs, 0.0, torch.zeros(books, device=device))
        self.backward(loss)
        self.step(0.0)
        # Then the saved values: at stage 0 into the optimizer's own tensors, else through DeepSpeed, which cuts them.
        trained = _trained(self.module)
        masters = self._optimizer.parameters if self.stage == 0 else [None] * len(trained)
        for (name, parameter), master in zip(trained.items(), masters, strict=True):
            values = [part[name].to(device) for part in (state.weights, state.exp_avg, state.exp_avg_sq)]
            if master is not None:
                own = self._optimizer.state[master]
                for target, value in zip((master.data, own["exp_avg"], own["exp_avg_sq"]), values, strict=True):
                    target.copy_(value)
            else:
                safe_set_full_fp32_param(parameter, values[0])
                safe_set_full_optimizer_state(parameter, values[1], "exp_avg")
                safe_set_full_optimizer_state(parameter, values[2], "exp_avg_sq")
        # Adam's count last: the step above has raised it.
        for own in self._optimizer.state.values():
            own["step"].fill_(state.adam_steps)

    def _adam_steps(self) -> int:
        steps = {int(own["step"]) for own in self._optimizer.state.values() if "step" in own} or {0}
        assert len(steps) == 1, steps
        return steps.pop()

    def gather_trainable(self) -> dict[str, torch.Tensor]:
        """The full trained weights on the CPU, by their names in the module. Every rank must call it."""
        trained = _trained(self.module)
        with _gathered(trained.values()):
            return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the module's order, which every list of them keeps."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def full_weight(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a weight, which ZeRO-3 may have sharded. Every rank must call it."""
    with _gathered([parameter]):
        return parameter.detach().clone()


@contextlib.contextmanager
def _gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, those that ZeRO-3 has sharded are gathered on every rank."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield
