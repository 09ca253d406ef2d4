"""Activation checkpointing and compilation of blocks: what is kept for the backward pass, what is computed again.

Invariant: losses and gradients are those of the plain model, bitwise; dropout draws the same numbers. Names in the state dict do not
change.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.config import Checkpointing, Recompute

KERNELS = ("_flash_attention", "_efficient_attention", "_cudnn_attention", "_varlen_attn", "_flash_attn_varlen_forward")
"""Parts of the names of fused attention kernels, whose results `ops` keeps. Nothing writes into them, as PLoRA does into products."""


def is_recomputed(checkpointing: Checkpointing, block: int) -> str:
    """How block number `block` is checkpointed: none, full or ops."""
    if checkpointing.kind is Recompute.every:
        return "none" if block % checkpointing.every else "full"
    return checkpointing.kind.value


def checkpoint_blocks(blocks: Iterable[nn.Module], checkpointing: Checkpointing) -> None:
    """Has the blocks recompute as configured."""
    for i, block in enumerate(blocks):
        mode = is_recomputed(checkpointing, i)
        if mode != "none":
            kept = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "ops" else {}
            block.forward = partial(_again, block.forward, kept)


def _again(forward: Callable[..., Tensor], kept: dict[str, Any], *inputs: Any) -> Tensor:
    # Without early stop: it leaves a module's forward by an exception, past the hooks by which ZeRO-3 frees what it gathered.
    return checkpoint(forward, *inputs, use_reentrant=False, early_stop=False, **kept) if torch.is_grad_enabled() else forward(*inputs)


def _policy(_context: Any, operator: Any, *_inputs: Any, **_settings: Any) -> CheckpointPolicy:
    kept = any(kernel in str(operator) for kernel in KERNELS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
