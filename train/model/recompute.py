"""Activation checkpointing and compilation of blocks: what is kept for the backward pass, what is computed again.

Invariant: losses and gradients are those of the plain model, bitwise; dropout draws the same numbers. Names in the state dict do not
change.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.config import Checkpointing, Recompute


def is_recomputed(checkpointing: Checkpointing, block: int) -> str:
    """How block number `block` is checkpointed: none or full."""
    if checkpointing.kind is Recompute.every:
        return "none" if block % checkpointing.every else "full"
    return checkpointing.kind.value


def checkpoint_blocks(blocks: Iterable[nn.Module], checkpointing: Checkpointing) -> None:
    """Has the blocks recompute as configured."""
    for i, block in enumerate(blocks):
        if is_recomputed(checkpointing, i) == "full":
            block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    # Without early stop: it leaves a module's forward by an exception, past the hooks by which ZeRO-3 frees what it gathered.
    return checkpoint(forward, *inputs, use_reentrant=False, early_stop=False) if torch.is_grad_enabled() else forward(*inputs)
