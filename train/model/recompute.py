"""Activation checkpointing and compilation of blocks: what is kept for the backward pass, what is computed again.

Invariant: losses are those of the plain model, bitwise, and so are gradients, which `ops` may round otherwise (1e-6); dropout draws
the same numbers. Names in the state dict do not change.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.config import Checkpointing, Recompute

_PRODUCTS = ("mm", "addmm")
_ADDITIONS = ("index_add_", "add_")
_KERNELS = ("_flash_attention", "_efficient_attention", "_cudnn_attention", "_varlen_attn", "_flash_attn_varlen_forward")
"""Parts of the names of fused attention kernels; the plain matmul and softmax of short segments are cheaper to repeat than to keep."""


def is_recomputed(checkpointing: Checkpointing, block: int) -> str:
    """How block number `block` is checkpointed: none, full or ops."""
    if checkpointing.kind is Recompute.every:
        return "none" if block % checkpointing.every else "full"
    return checkpointing.kind.value


def checkpoint_blocks(blocks: Iterable[nn.Module], checkpointing: Checkpointing, low_ranks: set[int]) -> None:
    """Has the blocks recompute as configured. `low_ranks` are the ranks R of their low-rank weights."""
    for i, block in enumerate(blocks):
        mode = is_recomputed(checkpointing, i)
        if mode == "none":
            continue
        context = {"context_fn": partial(_keep_products, low_ranks)} if mode == "ops" else {}
        # Without early stop: it leaves a module's forward by an exception, past the hooks by which ZeRO-3 frees what it gathered.
        block.forward = partial(_again, block.forward, {**context, "use_reentrant": False, "early_stop": False})


def _again(forward: Callable[..., Tensor], arguments: dict[str, Any], *inputs: Any) -> Tensor:
    return checkpoint(forward, *inputs, **arguments) if torch.is_grad_enabled() else forward(*inputs)


def _keep_products(low_ranks: set[int]) -> Any:
    # PLoRA adds to the kept product in place, and what is kept then is the sum: the second pass must not add again.
    return create_selective_checkpoint_contexts(partial(_policy, low_ranks), allow_cache_entry_mutation=True)


def _policy(low_ranks: set[int], _context: Any, operator: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    name = operator.overloadpacket.__name__
    # B's product is as large as W's and, its inner width being the rank, next to free.
    kept = inputs[-2].shape[-1] not in low_ranks if name in _PRODUCTS else name in _ADDITIONS or any(k in name for k in _KERNELS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
