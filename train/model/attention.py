"""Causal attention inside packed segments: one function, three backends.

Invariant: a position attends to itself and to earlier positions of its own segment, never to another segment; not even a NaN
crosses a border. Segment lengths are Python ints from the batch, so nothing here reads a tensor's value on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UserError

ROUND = 8
"""The sdpa backend runs segments whose lengths round up to the same multiple of this as one batch."""
LONGEST_PLAIN = 512
"""Up to this length plain matmul and softmax beat CPU flash SDPA (bf16, forward and backward: 1.3 against 5 ms for 24 segments of
10 to 16 tokens); above it they lose, and their memory grows with the square."""
LONGEST_PLAIN_FP32 = 128
"""The same in fp32, where that kernel is the faster one sooner (52 against 72 ms for a segment of 464, 16 heads of 64)."""

NOT_INSTALLED = "is not installed"


@dataclass(frozen=True)
class LengthGroup:
    """`count` segments, each right-padded to `length` tokens."""

    count: int
    length: int
    causal_bias: Tensor | None
    """[length, length], 0 on and below the diagonal, -inf above; absent where the kernel masks by itself."""


@dataclass(frozen=True)
class Segments:
    """What the backends need to know about a pack; built once a forward pass and shared by all layers."""

    backend: str
    cu_seqlens: Tensor
    """[S+1] int32."""
    max_seqlen: int
    lengths: tuple[int, ...]
    groups: tuple[LengthGroup, ...] = ()
    """sdpa only: the padded layout, group after group."""
    padded_index: Tensor | None = None
    """sdpa only: the packed position of every padded row. A segment is padded with its own last row, so that whatever it holds
    stays in it; causality hides padding from real rows."""
    packed_index: Tensor | None = None
    """sdpa only: [T], the padded row of every packed position."""
    cache: Callable[[Tensor, Tensor, Tensor, "Segments"], Tensor] | None = None
    """Decoding only: called by every layer in turn with its queries, keys and values instead of attention inside the pack alone."""
    grown: tuple[int, ...] | None = None
    """Decoding only: of each segment the length that dynamic RoPE scaling goes by, which a text that is being written may grow to."""
    group: dist.ProcessGroup | None = None
    """The ranks that hold a part of the pack each; heads are exchanged with them (train/model/exchange.py)."""

    @staticmethod
    def build(
        lengths: tuple[int, ...], cu_seqlens: Tensor, dtype: torch.dtype, backend: str = "auto", group: dist.ProcessGroup | None = None
    ) -> "Segments":
        """Segments of the given lengths on the device of `cu_seqlens`, for activations of `dtype`."""
        device = cu_seqlens.device
        backend = choose_backend(device, dtype, backend)
        if backend != "sdpa":
            return Segments(backend, cu_seqlens, max(lengths), lengths, group=group)
        starts_by_length: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in lengths:
            starts_by_length.setdefault(-(-length // ROUND) * ROUND, []).append((start, length))
            start += length
        groups = []
        padded_index: list[int] = []
        packed_index = [0] * start
        for padded_length, segments in sorted(starts_by_length.items()):
            groups.append(LengthGroup(len(segments), padded_length, _causal_bias(padded_length, dtype, device)))
            for first, length in segments:
                packed_index[first : first + length] = range(len(padded_index), len(padded_index) + length)
                padded_index += range(first, first + length)
                padded_index += [first + length - 1] * (padded_length - length)
        return Segments(
            backend,
            cu_seqlens,
            max(lengths),
            lengths,
            tuple(groups),
            torch.tensor(padded_index, device=device),
            torch.tensor(packed_index, device=device),
            group=group,
        )


def choose_backend(device: torch.device, dtype: torch.dtype = torch.bfloat16, wanted: str = "auto") -> str:
    """The backend that `wanted` (train.attention) means there: auto is `flash` where flash-attn can be imported, else `torch_varlen`, both
    on CUDA in half precision, and `sdpa` everywhere else.

    Raises:
        UserError: this machine, or this number format, has no such backend.
    """
    fits = device.type == "cuda" and dtype != torch.float32
    if wanted == "auto":
        return "sdpa" if not fits else "torch_varlen" if _flash_attn_problem() else "flash"
    if wanted != "sdpa" and not fits:
        lacks = "a GPU" if device.type != "cuda" else "train.precision bf16"
        raise UserError(f"train.attention: {wanted} needs {lacks} (set train.attention=auto, which takes sdpa here)")
    problem = _flash_attn_problem() if wanted == "flash" else None
    if problem:
        raise UserError(f"train.attention: flash needs flash-attn, which {problem} (pip install flash-attn, or train.attention=auto)")
    return wanted


def spoken(backend: str, wanted: str) -> str:
    """A chosen backend for the log: with the reason, where `auto` passed over a flash-attn that is installed."""
    problem = _flash_attn_problem() if (backend, wanted) == ("torch_varlen", "auto") else None
    return f"{backend} (flash-attn {problem})" if problem and problem != NOT_INSTALLED else backend


def varlen_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> Tensor:
    """Causal attention inside each segment, scaled by H ** -0.5; N is a multiple of K. Returns [T, N, H].

    Where `segments` carries a cache, that answers: decoding attends to keys and values of earlier calls (train/generate.py).
    """
    if segments.cache is not None:
        return segments.cache(q_TNH, k_TKH, v_TKH, segments)
    if segments.backend == "flash":
        return _flash(q_TNH, k_TKH, v_TKH, segments)
    if segments.backend == "torch_varlen":
        return _torch_varlen(q_TNH, k_TKH, v_TKH, segments)
    return _sdpa(q_TNH, k_TKH, v_TKH, segments)


@cache
def _flash_attn_problem() -> str | None:
    """Why flash-attn cannot run here. What is installed may still not load: it is compiled for one torch and one C library."""
    if find_spec("flash_attn") is None:
        return NOT_INSTALLED
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # noqa: BLE001  whatever a compiled module raises, it cannot be used
        return f"cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def _flash(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # an optional extra

    borders, longest = segments.cu_seqlens, segments.max_seqlen
    k_TKH, v_TKH = k_TKH.contiguous(), v_TKH.contiguous()  # as slices they would keep all of q, k and v for the backward pass
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q_TNH, k_TKH, v_TKH, borders, borders, longest, longest, causal=True, deterministic=deterministic)


def _torch_varlen(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = segments.cu_seqlens, segments.max_seqlen
    k_TKH, v_TKH = k_TKH.contiguous(), v_TKH.contiguous()  # as in _flash
    grouped = q_TNH.shape[1] != k_TKH.shape[1]
    causal = (-1, 0)
    return varlen_attn(q_TNH, k_TKH, v_TKH, borders, borders, longest, longest, window_size=causal, enable_gqa=grouped)


def _sdpa(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> Tensor:
    rows = [group.count * group.length for group in segments.groups]
    padded = (x.index_select(0, segments.padded_index).split(rows) for x in (q_TNH, k_TKH, v_TKH))
    outputs = [_attend(q, k, v, group) for q, k, v, group in zip(*padded, segments.groups, strict=True)]
    return torch.cat(outputs).index_select(0, segments.packed_index)


def _attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: LengthGroup) -> Tensor:
    """One batched call for the segments of a group; here T = count * length."""
    count, length = group.count, group.length
    (T, N, H), K = q_TNH.shape, k_TKH.shape[1]
    q, k, v = (x.view(count, length, -1, H).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
    if group.causal_bias is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=N != K)
    else:
        # The query heads that share a key head become rows of one product: k and v are not repeated.
        q = q.reshape(count * K, N // K * length, H)
        k, v = k.reshape(count * K, length, H), v.reshape(count * K, length, H)
        bias = group.causal_bias.repeat(N // K, 1)
        weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=H**-0.5).softmax(-1)  # sums in fp32 inside the kernel
        out = torch.bmm(weights, v).view(count, N, length, H)
    return out.transpose(1, 2).reshape(T, N, H)


def longest_plain(dtype: torch.dtype) -> int:
    """The longest segment that the sdpa backend runs by plain products, whose scores are rounded to `dtype`; its kernel keeps fp32."""
    return min(LONGEST_PLAIN, LONGEST_PLAIN_FP32) if dtype is torch.float32 else LONGEST_PLAIN


def _causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if length > longest_plain(dtype):
        return None
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu(1)
