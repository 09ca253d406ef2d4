"""InternLM2: a pre-norm decoder with rotary positions, grouped-query attention in one fused wqkv, SwiGLU, and an untied head.

Invariant: with PLoRA's contribution left out this is InternLM2 as published, so its weights load unchanged. Tensors are packed,
[T, D]; which positions may see each other is decided by `Segments` alone.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.batch import IGNORE
from data_pipeline.errors import UserError
from train.model.attention import Segments, varlen_attention
from train.model.exchange import to_heads, to_tokens
from train.model.plora import PLoRALinear, take_rows
from train.model_config import DecoderConfig, LowRankMode, PLoRAConfig, RopeKind

CHUNK_LOGITS = 1 << 26
"""Logits that the head holds at once: 256 MiB in fp32."""


class RMSNorm(nn.Module):
    """Statistics in fp32, cast to the input's dtype before the multiplication by the weight, as InternLM2 does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D]."""
        return F.rms_norm(x_TD, self.weight.shape, eps=self.eps) * self.weight


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, [T, 1, 1, H/2]; computed once a forward pass, for the whole pack."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(
        position_ids_T: Tensor, lengths: tuple[int, ...], config: DecoderConfig, dtype: torch.dtype, grown: tuple[int, ...] | None = None
    ) -> "Rotation":
        """Angles in fp32, results in `dtype`. `lengths` are those of the segments: dynamic scaling goes by a document's length, or by what
        it is to be `grown` to, not by what it is packed with.
        """
        head_size, scaling, device = config.hidden // config.heads, config.rope_scaling, position_ids_T.device
        positions_T = position_ids_T.float()
        if scaling.kind is RopeKind.linear:
            positions_T = positions_T / scaling.factor
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
        if scaling.kind is RopeKind.dynamic and max(grown or lengths) > config.max_positions:
            thetas = [_dynamic_theta(length, head_size, config) for length in grown or lengths]
            repeats = torch.tensor(lengths, device=device)
            thetas_T = torch.tensor(thetas, device=device).repeat_interleave(repeats, output_size=sum(lengths))
            angles = positions_T[:, None] * thetas_T[:, None] ** -exponents
        else:
            angles = torch.outer(positions_T, config.rope_theta**-exponents)
        angles = angles[:, None, None, :]
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Rotates [T, *, *, H]; the halves of H are the two coordinates, as in Llama."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


def _dynamic_theta(length: int, head_size: int, config: DecoderConfig) -> float:
    """The base of a segment's angles: as published up to `max_positions`, then growing with the length."""
    factor = config.rope_scaling.factor
    growth = factor * max(length, config.max_positions) / config.max_positions - (factor - 1)
    return config.rope_theta * growth ** (head_size / (head_size - 2))


class Attention(nn.Module):
    """Grouped-query attention. Rows of wqkv: per key head its query heads, the key, the value."""

    def __init__(self, config: DecoderConfig, plora: PLoRAConfig) -> None:
        super().__init__()
        self.kv_heads = config.kv_heads
        self.queries_per_key = config.heads // config.kv_heads
        self.head_size = config.hidden // config.heads
        width = config.heads * self.head_size
        fused = width + 2 * config.kv_heads * self.head_size
        self.wqkv = PLoRALinear.of(plora, "wqkv", config.hidden, fused)
        self.wo = PLoRALinear.of(plora, "wo", width, config.hidden)

    def forward(self, x_TD: Tensor, rotation: Rotation, segments: Segments, image_index_V: Tensor) -> Tensor:
        """[T, D]. In a sequence group T is a part; between the exchanges it is the whole, and N and K are a share of the heads."""
        g = self.queries_per_key
        qkv = self.wqkv(x_TD, image_index_V).unflatten(1, (self.kv_heads, (g + 2) * self.head_size))
        qkv = to_heads(qkv, segments.group).unflatten(2, (g + 2, self.head_size))
        qk, v = qkv.split((g + 1, 1), dim=2)
        q, k = rotation.apply(qk).split((g, 1), dim=2)
        out_TNH = varlen_attention(q.flatten(1, 2), k.squeeze(2), v.squeeze(2), segments)
        return self.wo(to_tokens(out_TNH, segments.group).flatten(1), image_index_V)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * value, which keeps gate and value alone: silu(gate) is computed again. Bitwise what autograd would do."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, value_TF: Tensor) -> Tensor:
        """[T, F]."""
        ctx.save_for_backward(gate_TF, value_TF)
        return F.silu(gate_TF).mul_(value_TF)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Of gate and value."""
        gate_TF, value_TF = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_TF * value_TF, gate_TF), F.silu(gate_TF).mul_(grad_TF)


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, config: DecoderConfig, plora: PLoRAConfig) -> None:
        super().__init__()
        self.w1 = PLoRALinear.of(plora, "w1", config.hidden, config.ffn)
        self.w3 = PLoRALinear.of(plora, "w3", config.hidden, config.ffn)
        self.w2 = PLoRALinear.of(plora, "w2", config.ffn, config.hidden)

    def forward(self, x_TD: Tensor, image_index_V: Tensor) -> Tensor:
        """[T, D]."""
        x_TD, image_rows_VD = take_rows(x_TD, image_index_V) if self.w1.mode is LowRankMode.plora else (x_TD, None)
        gate = self.w1(x_TD, image_index_V, image_rows_VD)
        value = self.w3(x_TD, image_index_V, image_rows_VD)
        return self.w2(_SwiGLU.apply(gate, value), image_index_V)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, plora: PLoRAConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.rms_eps)
        self.attention = Attention(config, plora)
        self.ffn_norm = RMSNorm(config.hidden, config.rms_eps)
        self.feed_forward = FeedForward(config, plora)

    def forward(self, x_TD: Tensor, rotation: Rotation, segments: Segments, image_index_V: Tensor) -> Tensor:
        """[T, D]."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotation, segments, image_index_V)
        return x_TD + self.feed_forward(self.ffn_norm(x_TD), image_index_V)


class Decoder(nn.Module):
    """From embeddings to normed hidden states."""

    def __init__(self, config: DecoderConfig, plora: PLoRAConfig) -> None:
        super().__init__()
        if config.hidden % (2 * config.heads) or config.heads % config.kv_heads:
            raise UserError(
                f"model.decoder: hidden ({config.hidden}) must be a multiple of 2 x heads ({config.heads}), "
                f"and heads a multiple of kv_heads ({config.kv_heads})"
            )
        unknown = sorted(set(plora.linears) - {"wqkv", "wo", "w1", "w3", "w2"})
        if unknown:
            raise UserError(f"model.plora.linears: {unknown[0]} is no linear of the decoder (use wqkv, wo, w1, w3 or w2)")
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config, plora) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.rms_eps)

    def forward(self, x_TD: Tensor, position_ids_T: Tensor, segments: Segments, image_index_V: Tensor) -> Tensor:
        """[T, D]; `x_TD` are embeddings with the image tokens in place; of a part, in a sequence group, with the positions of the whole."""
        rotation = Rotation.of(position_ids_T, segments.lengths, self.config, x_TD.dtype, segments.grown)
        for layer in self.layers:
            x_TD = layer(x_TD, rotation, segments, image_index_V)
        return self.norm(x_TD)


class Head(nn.Module):
    """The output layer together with its loss: under ZeRO-3 its weight exists only while this module runs.

    torch's own `linear_cross_entropy` also chunks, but rounds the per-target losses of bf16 inputs to bf16 (error 0.03 nats) and
    took 8 times as long on a CPU (torch 2.14).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.vocab, config.hidden), math.nan))
        self.chunk_rows = max(1, CHUNK_LOGITS // config.vocab)

    def forward(self, x_TD: Tensor, target_index_L: Tensor, targets_L: Tensor | None = None) -> Tensor:
        """Losses [L] in fp32, 0 where the target is `IGNORE`; without targets the logits [L, vocab], for evaluation and decoding.

        The losses need at most `chunk_rows` x vocab logits at a time, forward and backward.
        """
        x_LD = x_TD.index_select(0, target_index_L)
        if targets_L is None:
            return self._logits(x_LD)
        if len(targets_L) <= self.chunk_rows:
            return self._losses(x_LD, targets_L)
        chunks = zip(x_LD.split(self.chunk_rows), targets_L.split(self.chunk_rows), strict=True)
        # Recomputed in the backward pass, so that the logits of one chunk are freed before the next.
        return torch.cat([checkpoint(self._losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])

    def _logits(self, x_LD: Tensor) -> Tensor:
        return F.linear(x_LD, self.weight).float()

    def _losses(self, x_LD: Tensor, targets_L: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(x_LD), targets_L, reduction="none", ignore_index=IGNORE)
