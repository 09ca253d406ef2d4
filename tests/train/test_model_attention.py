"""Attention keeps to its segment, in every backend, and equals a dense block-diagonal mask."""

import math
import sys

import pytest
import torch
from attending import LENGTHS, dense_attention, inputs, segments_of
from batches import batch_of, mixed_segments, tiny_model

from data_pipeline.errors import UserError
from train.config import Attention, Checkpointing
from train.model import attention
from train.model.attention import NOT_INSTALLED, choose_backend, spoken, varlen_attention


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


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    ("backend", "device", "longest_plain"),
    [
        pytest.param("sdpa", "cpu", 512, id="plain"),
        pytest.param("sdpa", "cpu", 0, id="kernel"),
        *(pytest.param(backend, "cuda", 512, id=f"gpu {backend}", marks=ON_GPU) for backend in ("flash", "torch_varlen", "sdpa")),
    ],
)
@pytest.mark.parametrize("broken", range(len(LENGTHS)))
def test_nan_stays_in_its_segment_forward_and_backward(broken: int, backend: str, device: str, longest_plain: int, monkeypatch) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    start = sum(LENGTHS[:broken])
    sound = torch.ones(sum(LENGTHS), dtype=torch.bool)
    sound[start : start + LENGTHS[broken]] = False
    results = []
    for poison in (False, True):
        qkv = [x.detach().to(device, dtype).requires_grad_() for x in inputs(LENGTHS, 4, 2, size=64)]
        if poison:
            for x in qkv:
                x.data[~sound] = math.nan
        out = varlen_attention(*qkv, segments_of(LENGTHS, dtype, device, backend))
        results.append([x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), qkv))])
    bitwise = {"atol": 0, "rtol": 0} if device == "cpu" else {"atol": 0.02, "rtol": 0.02}  # GPUs add gradients up in any order
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned[sound], clean[sound], **bitwise)
        assert poisoned[sound].isfinite().all()
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
        monkeypatch.setattr(attention, "_flash_attn_problem", lambda installed=installed: None if installed else NOT_INSTALLED)
        assert choose_backend(cuda) == backend
        assert choose_backend(cuda, wanted="torch_varlen") == "torch_varlen"
        assert choose_backend(cuda, wanted="sdpa") == "sdpa"


@pytest.mark.parametrize(
    ("device", "dtype", "wanted", "lacks"),
    [
        ("cpu", torch.bfloat16, "flash", "needs a GPU"),
        ("cpu", torch.float32, "torch_varlen", "needs a GPU"),
        ("cuda", torch.float32, "torch_varlen", "needs train.precision bf16"),
        ("cuda", torch.bfloat16, "flash", "needs flash-attn, which is not installed"),
    ],
)
def test_a_backend_that_is_not_there_is_refused_in_one_line_with_a_cure(device, dtype, wanted, lacks, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_flash_attn_problem", lambda: NOT_INSTALLED)
    with pytest.raises(UserError, match=rf"^train\.attention: {wanted} {lacks} \(.*train\.attention=auto.*\)$"):
        choose_backend(torch.device(device), dtype, wanted)


def test_a_flash_attn_that_is_installed_and_cannot_be_imported_is_passed_over_with_its_reason_and_refused_where_it_is_asked_for(
    monkeypatch, tmp_path
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10\\nand more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    attention._flash_attn_problem.cache_clear()
    try:
        cuda = torch.device("cuda")
        assert choose_backend(cuda) == "torch_varlen"
        reason = "cannot be imported: flash_attn_2_cuda.so: undefined symbol: _ZN3c10"
        assert spoken("torch_varlen", "auto") == f"torch_varlen (flash-attn {reason})"
        assert [spoken(*asked) for asked in (("torch_varlen", "torch_varlen"), ("sdpa", "auto"))] == ["torch_varlen", "sdpa"]
        with pytest.raises(UserError, match=rf"^train\.attention: flash needs flash-attn, which {reason} \(.*train\.attention=auto\)$"):
            choose_backend(cuda, wanted="flash")
    finally:
        attention._flash_attn_problem.cache_clear()


def test_the_model_attends_with_the_backend_that_is_set() -> None:
    model, batch = tiny_model(), batch_of(mixed_segments())
    for setting in (Attention.auto, Attention.sdpa):
        model.apply_cost_settings(Checkpointing(), attention=setting.value)
        assert model(batch).loss_sum.isfinite()
    model.apply_cost_settings(Checkpointing(), attention="flash")
    with pytest.raises(UserError, match=r"^train\.attention: flash needs a GPU"):
        model(batch)
