"""Attention keeps to its segment, in every backend, and equals a dense block-diagonal mask."""

import math

import pytest
import torch
from torch import Tensor

from train.model import attention
from train.model.attention import Segments, choose_backend, varlen_attention

LENGTHS = (13, 8, 1, 37, 16, 5)


def segments_of(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str = "sdpa") -> Segments:
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
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(lengths), n, size, generator=generator).requires_grad_() for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("longest_plain", [512, 0], ids=["plain", "kernel"])
def test_segments_attend_as_under_a_dense_mask(heads: int, kv_heads: int, longest_plain: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    qkv = inputs(LENGTHS, heads, kv_heads)
    weight = torch.randn(sum(LENGTHS), heads, 16, generator=torch.Generator().manual_seed(1))
    out = varlen_attention(*qkv, segments_of(LENGTHS))
    expected = dense_attention(*qkv, LENGTHS)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    grads = torch.autograd.grad((out * weight).sum(), qkv)
    expected_grads = torch.autograd.grad((expected * weight).sum(), qkv)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=5e-6, rtol=0)


@pytest.mark.parametrize("longest_plain", [512, 0], ids=["plain", "kernel"])
@pytest.mark.parametrize("broken", range(len(LENGTHS)))
def test_nan_stays_in_its_segment_forward_and_backward(broken: int, longest_plain: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    start = sum(LENGTHS[:broken])
    sound = torch.ones(sum(LENGTHS), dtype=torch.bool)
    sound[start : start + LENGTHS[broken]] = False
    results = []
    for poison in (False, True):
        qkv = inputs(LENGTHS, 4, 2)
        if poison:
            for x in qkv:
                x.data[~sound] = math.nan
        out = varlen_attention(*qkv, segments_of(LENGTHS))
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for clean, poisoned in zip(*results, strict=True):
        assert poisoned[sound].isfinite().all()
        assert torch.equal(clean[sound], poisoned[sound])
    assert results[1][0][~sound].isnan().all()


def test_bf16_is_as_close_as_bf16_allows() -> None:
    qkv = [x.detach().bfloat16() for x in inputs(LENGTHS, 6, 2)]
    out = varlen_attention(*qkv, segments_of(LENGTHS, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense_attention(*(x.float() for x in qkv), LENGTHS), atol=0.03, rtol=0)


def test_backend_follows_device_and_precision(monkeypatch) -> None:
    cuda = torch.device("cuda")
    assert choose_backend(torch.device("cpu")) == "sdpa"
    assert choose_backend(cuda, torch.float32) == "sdpa"
    for installed, backend in ((True, "flash"), (False, "torch_varlen")):
        monkeypatch.setattr(attention, "_has_flash_attn", lambda installed=installed: installed)
        assert choose_backend(cuda) == backend


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["flash", "torch_varlen", "sdpa"])
def test_gpu_backends_attend_as_under_a_dense_mask(backend: str) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    qkv = [x.detach().cuda().bfloat16().requires_grad_() for x in inputs(LENGTHS, 8, 2, size=64)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    out = varlen_attention(*qkv, segments_of(LENGTHS, torch.bfloat16, "cuda", backend))
    expected = dense_attention(*exact, LENGTHS)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0)
    grads = torch.autograd.grad(out.float().square().sum(), qkv)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(grad.float(), expected_grad, atol=0.1, rtol=0.05)
