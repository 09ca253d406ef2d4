"""Everything that knows DeepSpeed.

Invariant: gradients of a step are exactly those of the global objective (train/objective.py), accumulated in fp32, whatever the ZeRO
stage; the engine never divides by micro-steps or ranks on its own account.
"""

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError
from train.config import Config
from train.memory import REDUCE_BUCKET
from train.model.xcomposer2 import Losses
from train.objective import scaled_loss
from train.optim import set_lr
from train.ranks import Ranks


def engine_json(config: Config, world: int, micro_steps: int, dtype: torch.dtype, trainable: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for so many trainable parameters; `deepspeed.extra` has the last word."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": world * micro_steps,
        "zero_optimization": {"stage": config.deepspeed.stage, "reduce_bucket_size": min(trainable, REDUCE_BUCKET)},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": config.train.grad_clip,
        "steps_per_print": 1 << 30,
        **config.deepspeed.extra,
    }


class Engine:
    """The model under ZeRO."""

    def __init__(self, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, dtype: torch.dtype) -> None:
        """`model` is on its device and in `dtype`; `requires_grad` is final, it cannot change under the engine."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        micro_steps = -(-config.data.global_batch // (ranks.world * config.data.micro_packs))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        settings = engine_json(config, ranks.world, micro_steps, dtype, trainable)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
            raise UserError(f"deepspeed: {str(error).splitlines()[0]} (see deepspeed.stage and deepspeed.extra)") from None
        self._engine.train()
        self._world = ranks.world

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._engine.module

    def forward_backward(self, batch: PackedBatch, n_global: int, last: bool) -> Losses:
        """Adds the gradient of one micro-batch.

        Args:
            batch: on the device.
            n_global: supervised tokens of the whole global batch.
            last: no other micro-batch of this step follows.
        """
        losses = self._engine(batch)
        self._engine.backward(scaled_loss(losses.loss_sum, self._world, n_global), scale_wrt_gas=False)
        if not last:
            self._engine.step()  # moves nothing yet: this is how the engine counts micro-batches
        return losses

    def step(self, lr: float) -> int:
        """Moves the weights; returns 1 where the engine left them alone because a gradient was not finite, else 0."""
        set_lr(self._optimizer, lr)
        before = self._engine.skipped_steps
        self._engine.step()
        return int(self._engine.skipped_steps - before)

    def grad_norm(self) -> float:
        """Norm of the last step's gradient, before clipping; the engine read it in its step."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def save(self, folder: Path, tag: str) -> None:
        """Writes this rank's part of a checkpoint to `folder/tag`, without frozen weights. All ranks call it."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Reads this rank's part of a checkpoint. Frozen weights must be in place."""
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)

    def weights(self, keep: bool) -> dict[str, Tensor]:
        """All weights on the CPU, in the model's number format, on ranks that `keep` them. All ranks call it."""
        found = {}
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if keep:
                    found[name] = parameter.detach().to("cpu", copy=True).contiguous()
        return found
