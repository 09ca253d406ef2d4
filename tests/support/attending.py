"""Attention under a dense mask, which every backend is held against."""

import math

import torch
from torch import Tensor

from train.model.attention import Segments

LENGTHS = (13, 8, 1, 37, 16, 5)


def segments_of(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str = "sdpa") -> Segments:
    """Neighbouring segments of these lengths."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return Segments.build(lengths, cu_seqlens, dtype, backend)


def dense_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The reference: all scores, then a block-diagonal causal mask."""
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    k, v = k_TKH.repeat_interleave(repeats, 1), v_TKH.repeat_interleave(repeats, 1)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q_TNH.device)
    row = torch.arange(len(segment), device=q_TNH.device)
    visible = (segment[:, None] == segment) & (row[:, None] >= row)
    scores = torch.einsum("inh,jnh->nij", q_TNH, k) / math.sqrt(q_TNH.shape[-1])
    return torch.einsum("nij,jnh->inh", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


def inputs(lengths: tuple[int, ...], heads: int, kv_heads: int, size: int = 16) -> list[Tensor]:
    """Queries, keys and values [T, heads, size] fp32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(lengths), n, size, generator=generator).requires_grad_() for n in (heads, kv_heads, kv_heads)]
