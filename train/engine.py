"""Everything that knows DeepSpeed.

Invariant: gradients of a step are exactly those of the global objective (train/objective.py), accumulated in fp32, whatever the ZeRO
stage; the engine never divides by micro-steps or ranks on its own account.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from deepspeed.runtime import compiler
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError
from train.config import Config, DeepSpeedConfig, OffloadTo
from train.configure import data_parallel
from train.device import Device
from train.memory import REDUCE_BUCKET, moments, require_trainable
from train.model.xcomposer2 import Losses
from train.objective import scaled_loss
from train.optim import set_lr
from train.ranks import Ranks

# Muon's kernels, which nothing here runs, would import all of torch's inductor when the engine is made: 2 seconds of every start.
compiler.compile = lambda: lambda function: function

Files = dict[Path, Any]
"""What belongs into which file, all of it on the CPU and nobody else's."""
_OPTIMIZER = ("optimizer", OPTIMIZER_STATE_DICT)
"""What the optimizer's part is called in files without and with ZeRO."""


def engine_json(config: Config, world: int, micro_steps: int, dtype: torch.dtype, trainable: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for so many trainable parameters; `deepspeed.extra` has the last word."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": world * micro_steps,
        "zero_optimization": _zero_json(config.deepspeed, trainable),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on CPUs too, and needs no compiler
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": config.train.grad_clip,
        "steps_per_print": 1 << 30,
        "timers": {"throughput": {"enabled": False}},  # would wait for the GPU twice a micro-batch
    }
    made = _overridden(settings, config.deepspeed.extra)
    # Without it, ranks' gradients are summed in bf16, where small ones are lost; and the kernel that quantizes them takes all bits for fp16
    made.setdefault("communication_data_type", "fp16" if made["zero_optimization"].get("zero_quantized_gradients") else "fp32")
    return made


def _settings(config: Config, model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> dict[str, Any]:
    micro_steps = -(-config.data.global_batch // (data_parallel(config, ranks.world) * config.data.micro_packs))
    return engine_json(config, ranks.world, micro_steps, dtype, _trainable(model))


def _trainable(model: nn.Module) -> int:
    """Trained numbers, those on other ranks too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _zero_json(engine: DeepSpeedConfig, trainable: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": engine.stage, "reduce_bucket_size": min(trainable, REDUCE_BUCKET)}
    if engine.stage < 3 and get_accelerator().device_name() == "cpu":  # two copies of each gradient fewer; only a GPU wants one buffer
        settings["contiguous_gradients"] = False
    offload, zero_pp = engine.offload, engine.zero_pp
    for name, to in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if to is not OffloadTo.none:
            settings[name] = {"device": to.value, "pin_memory": offload.pin_memory}
        if to is OffloadTo.nvme:
            # DeepSpeed loads no checkpoint into trained weights on a disk: they stay in host memory, and only frozen ones go there.
            settings[name] |= {"nvme_path": offload.nvme_path, "max_in_cpu": trainable}
    if zero_pp.partition_ranks > 1:
        settings["zero_hpz_partition_size"] = zero_pp.partition_ranks
    if zero_pp.quantized_weights:
        settings["zero_quantized_weights"] = True
    if zero_pp.quantized_gradients:
        settings["zero_quantized_gradients"] = True
    return settings


def _overridden(settings: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    found = dict(settings)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _overridden(found[key], value) if both else value
    return found


def partition(config: Config, model: nn.Module, ranks: Ranks, device: Device, fill: Callable[[dict[str, nn.Parameter]], None]) -> None:
    """ZeRO-3: gives every rank its part of the parameters of a model on the meta device, one module after another. All ranks call it.

    Args:
        config: of the run.
        model: on the meta device, in its number format, `requires_grad` set.
        ranks: that share it.
        device: of this rank.
        fill: gives some parameters, by their names in the model, their first values; called on rank 0, which sends them to the others.
    """
    settings, first = _settings(config, model, ranks, device.dtype), None
    for path, module in reversed(list(model.named_modules())):  # children first: DeepSpeed looks through what is below a module
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        module.to_empty(device=device.torch_device, recurse=False)
        named = {f"{path}.{name}".removeprefix("."): p for name, p in module.named_parameters(recurse=False)}
        if ranks.rank == 0:
            fill(named)
        if first is None:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=device.dtype)
            first = next(iter(named.values()))
        else:
            first.convert_to_zero_parameters(param_list=list(named.values()))


class _Snapshots(TorchCheckpointEngine):
    """Keeps copies of what DeepSpeed wants to write, and maps what it wants to read."""

    taken: Files

    def save(self, state_dict: Any, path: str) -> None:
        """Copies everything that training will change."""
        self.taken[Path(path)] = _copied(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The weights of a file lie in memory once for all ranks of a node, which copy them out of it.

        The optimizer keeps what it is given: that is copied, since the file may go while training runs.
        """
        found = torch.load(path, map_location=map_location, mmap=True, weights_only=False)
        return {key: _copied(value) if key in _OPTIMIZER else value for key, value in found.items()}


def _copied(value: Any) -> Any:
    """Tensors on the CPU, with memory of their own, in containers of their own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        found = copy(value)  # an OrderedDict stays one
        found.update((key, _copied(each)) for key, each in value.items())
        return found
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(each) for each in value))
    return type(value)(_copied(each) for each in value) if type(value) in (list, tuple, set) else value


class Engine:
    """The model under ZeRO."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        dtype: torch.dtype,
        universal: bool = False,
    ) -> None:
        """`model` is on its device and in `dtype`; `requires_grad` is final, it cannot change under the engine.

        `universal`: the checkpoint that will be loaded is a converted one (train/reshape.py).
        """
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        require_trainable(config.deepspeed.stage, dtype)
        settings = _settings(config, model, ranks, dtype)
        if universal:
            settings = _overridden(settings, {"checkpoint": {"load_universal": True}})
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
            raise UserError(f"deepspeed: {str(error).splitlines()[0]} (see deepspeed.stage and deepspeed.extra)") from None
        self._snapshots = self._engine.checkpoint_engine = _Snapshots()
        self._engine.train()
        self._world, self._adamw, self._moments = ranks.world, optimizer, moments(_trainable(model), config, ranks.world)
        self._checks_itself = config.deepspeed.stage == 0 and dtype is torch.float32
        self._norm = math.nan

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._engine.module

    def forward(self, batch: PackedBatch) -> Losses:
        """The losses of one micro-batch, which is on the device."""
        return self._engine(batch)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside it, `forward` only measures: no dropout, no gradient."""
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def backward(self, loss_sum: Tensor, n_global: int, last: bool, factor: Tensor | None = None) -> None:
        """Adds the gradient of one micro-batch.

        Args:
            loss_sum: of its `forward`.
            n_global: supervised tokens of the whole global batch.
            last: no other micro-batch of this step follows.
            factor: scalar that the loss is multiplied by (train/guard.py).
        """
        loss = scaled_loss(loss_sum, self._world, n_global)
        self._engine.backward(loss if factor is None else loss * factor, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # moves nothing yet: this is how the engine counts micro-batches

    def rehearse(self, batch: PackedBatch) -> None:
        """Runs a micro-batch forward and backward, the exchange between ranks too, before a step: to its gradient it adds zero.

        Of a fresh optimizer the first step makes the moments: until then their room is held empty, or memory would end only later.
        """
        fresh = not any(self._adamw.state.values())
        held = torch.empty(self._moments if fresh else 0, dtype=torch.uint8, device=self._engine.device)
        self._engine.set_gradient_accumulation_boundary(True)
        with torch.random.fork_rng([batch.images.device] if batch.images.is_cuda else []):
            self._engine.backward(self._engine(batch).loss_sum * 0.0, scale_wrt_gas=False)
        self._engine._is_gradient_accumulation_boundary = None  # DeepSpeed counts micro-batches again; it has no call for that
        del held
        get_accelerator().empty_cache()  # it goes back whole: cut up for smaller tensors, it would leave holes between them

    def step(self, lr: float) -> int:
        """Moves the weights; returns 1 where weights and optimizer were left alone because a gradient was not finite, else 0."""
        set_lr(self._optimizer, lr)
        if self._checks_itself:
            return self._checked_step()
        before = self._engine.skipped_steps
        self._engine.step()
        return int(self._engine.skipped_steps - before)

    def _checked_step(self) -> int:
        """ZeRO-0 in fp32, where DeepSpeed would apply any gradient and tells no norm. Waits for the device."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._norm = float(norm)
        bad = not math.isfinite(self._norm)
        if bad:
            self._optimizer.found_inf = torch.ones((), device=norm.device)  # the fused kernel then leaves everything as it is
        self._engine.step()
        if bad:
            del self._optimizer.found_inf
        return int(bad)

    def grad_norm(self) -> float:
        """Norm of the last step's gradient, before clipping; the engine read it in its step."""
        norm = self._norm if self._checks_itself else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    def snapshot(self, folder: Path, tag: str) -> Files:
        """Copies this rank's part of a checkpoint, without frozen weights, out of the model; all ranks call it.

        Returns what is to be written to which file below `folder/tag`; training may go on before it is.
        """
        self._snapshots.taken = {}
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        return self._snapshots.taken

    def load(self, folder: Path, tag: str) -> None:
        """Reads this rank's part of a checkpoint. Frozen weights must be in place."""
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        # Of a converted checkpoint DeepSpeed leaves the count of steps on the CPU; a fused step on a GPU does not take it from there.
        for parameter, kept in self._adamw.state.items():
            if isinstance(kept.get("step"), Tensor):
                kept["step"] = kept["step"].to(parameter.device)

    def weights(self, keep: bool) -> dict[str, Tensor]:
        """All weights on the CPU, in the model's number format, on ranks that `keep` them. All ranks call it."""
        found = {}
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if keep:
                    found[name] = parameter.detach().to("cpu", copy=True).contiguous()
        return found
