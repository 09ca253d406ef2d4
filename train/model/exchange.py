"""Ulysses: ranks that hold parts of one pack exchange heads for tokens around attention (arXiv 2309.14509).

Invariant: `to_heads` and `to_tokens` are each other's inverse and each other's gradient; the spare rows of a part (data_pipeline/part.py)
take no part in attention, get zeros from it and give it no gradient. All ranks of a group call them in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.part import SPARE


def to_heads(x_TNE: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """From a part's tokens with all heads, [T / ranks + SPARE, N, E], to all tokens with a share of the heads, [T, N / ranks, E].

    Without a group, what it was given.
    """
    return x_TNE if group is None else _uncompiled(_ToHeads, x_TNE, group)


def to_tokens(x_TNE: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """From all tokens with a share of the heads, [T, N / ranks, E], to a part's tokens with all heads, [T / ranks + SPARE, N, E].

    Without a group, what it was given.
    """
    return x_TNE if group is None else _uncompiled(_ToTokens, x_TNE, group)


@torch.compiler.disable
def _uncompiled(exchange: type[torch.autograd.Function], x_TNE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A collective is a border of compiled graphs."""
    return exchange.apply(x_TNE, group)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNE: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _heads(x_TNE, group)

    @staticmethod
    def backward(ctx: Any, grad_TNE: Tensor) -> tuple[Tensor, None]:
        return _tokens(grad_TNE, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNE: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _tokens(x_TNE, group)

    @staticmethod
    def backward(ctx: Any, grad_TNE: Tensor) -> tuple[Tensor, None]:
        return _heads(grad_TNE, ctx.group), None


def _heads(x_TNE: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    sent = x_TNE[: len(x_TNE) - SPARE].unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    return _exchanged(sent, group).flatten(0, 1)


def _tokens(x_TNE: Tensor, group: dist.ProcessGroup) -> Tensor:
    (T, N, E), ranks = x_TNE.shape, group.size()
    received = _exchanged(x_TNE.contiguous().unflatten(0, (ranks, -1)), group)
    part = x_TNE.new_zeros(T // ranks + SPARE, ranks, N, E)
    part[: T // ranks] = received.transpose(0, 1)
    return part.flatten(1, 2)


def _exchanged(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row i goes to rank i of the group; row i of the result came from it."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
