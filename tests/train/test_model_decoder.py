"""The decoder is InternLM2, and the head's loss is cross-entropy over dense logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of, mixed_segments, tiny_config, tiny_model
from torch import Tensor

from data_pipeline.batch import IGNORE
from data_pipeline.errors import UserError
from train.model.attention import Segments
from train.model.decoder import Decoder, Head, RMSNorm, Rotation
from train.model_config import RopeKind, RopeScaling


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def reference_decoder(decoder: Decoder, x_TD: Tensor, position_ids: Tensor, lengths: tuple[int, ...], image_index: Tensor) -> Tensor:
    """Plain InternLM2 with PLoRA merged into separate q, k, v weights for image rows, and a dense block-diagonal mask."""
    config = tiny_config().decoder
    T, N, K = len(x_TD), config.heads, config.kv_heads
    H, g = config.hidden // N, N // K
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row = torch.arange(T)
    hidden = ~((segment[:, None] == segment) & (row[:, None] >= row))
    is_image = torch.zeros(T, 1, dtype=torch.bool).index_fill_(0, image_index, True)
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, H, 2).float() / H)
    angles = torch.cat([torch.outer(position_ids.float(), frequencies)] * 2, -1)[:, None]

    def linear(x, layer, rows=slice(None)):
        merged = layer.weight + layer.scale * layer.plora_b @ layer.plora_a
        return torch.where(is_image, x @ merged[rows].T, x @ layer.weight[rows].T)

    for layer in decoder.layers:
        x = rms_norm(x_TD, layer.attention_norm.weight)
        size = (g + 2) * H  # rows of one key head in wqkv
        q_rows = torch.cat([torch.arange(k * size, k * size + g * H) for k in range(K)])
        k_rows = torch.cat([torch.arange(k * size + g * H, k * size + (g + 1) * H) for k in range(K)])
        q, k, v = (linear(x, layer.attention.wqkv, rows).view(T, -1, H) for rows in (q_rows, k_rows, k_rows + H))
        q, k = (y * angles.cos() + rotate_half(y) * angles.sin() for y in (q, k))
        k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
        scores = torch.einsum("inh,jnh->nij", q, k) / math.sqrt(H)
        out = torch.einsum("nij,jnh->inh", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
        x_TD = x_TD + linear(out.reshape(T, N * H), layer.attention.wo)
        x, ffn = rms_norm(x_TD, layer.ffn_norm.weight), layer.feed_forward
        x_TD = x_TD + linear(F.silu(linear(x, ffn.w1)) * linear(x, ffn.w3), ffn.w2)
    return rms_norm(x_TD, decoder.norm.weight)


def test_decoder_is_internlm2_with_fused_wqkv_and_a_block_diagonal_mask() -> None:
    decoder, batch = tiny_model().decoder, batch_of(mixed_segments())
    for norm in (module for module in decoder.modules() if isinstance(module, RMSNorm)):
        norm.weight.data.uniform_(0.5, 1.5)
    decoder = decoder.double()  # fp32 matmuls differ by processor, by more than the formulas may
    x = decoder.tok_embeddings(batch.input_ids)
    segments = Segments.build(batch.segment_lengths, batch.cu_seqlens, x.dtype)
    out = decoder(x, batch.position_ids, segments, batch.image_index)
    expected = reference_decoder(decoder, x, batch.position_ids, batch.segment_lengths, batch.image_index)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(decoder.layers.parameters())
    grads = torch.autograd.grad((out * weight).sum(), parameters)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_before_the_weight(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-5)
    norm.weight.data.uniform_(0.5, 1.5)
    norm = norm.to(dtype)
    x = (torch.randn(33, 48, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    assert torch.equal(norm(x), rms_norm(x, norm.weight))


def test_impossible_head_counts_are_refused() -> None:
    config = tiny_config()
    config.decoder.kv_heads = 4
    with pytest.raises(UserError, match=r"model.decoder.*kv_heads"):
        Decoder(config.decoder, config.plora)


def angles_of(rotation: Rotation) -> Tensor:
    return torch.atan2(rotation.sin, rotation.cos).flatten(1)


def rotation_of(lengths: tuple[int, ...], kind: RopeKind, factor: float = 2.0) -> Rotation:
    config = tiny_config().decoder
    config.rope_scaling, config.max_positions = RopeScaling(kind, factor), 8
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Rotation.of(positions, lengths, config, torch.float32)


def test_linear_scaling_divides_positions() -> None:
    plain, scaled = rotation_of((21,), RopeKind.none), rotation_of((21,), RopeKind.linear, 4.0)
    torch.testing.assert_close(angles_of(scaled)[::4], angles_of(plain)[: len(range(0, 21, 4))])


def test_dynamic_scaling_is_the_published_formula_beyond_the_trained_length_and_nothing_up_to_it() -> None:
    plain, scaled = rotation_of((8, 20), RopeKind.none), rotation_of((8, 20), RopeKind.dynamic)
    assert torch.equal(scaled.cos[:8], plain.cos[:8])
    size, theta = 8, 1e4 * (2.0 * 20 / 8 - 1.0) ** (8 / 6)
    frequencies = theta ** (-torch.arange(0, size, 2).float() / size)
    expected = torch.outer(torch.arange(20).float(), frequencies)
    torch.testing.assert_close(scaled.sin[8:].flatten(1), expected.sin(), atol=1e-6, rtol=1e-5)


def test_dynamic_scaling_of_a_document_does_not_depend_on_what_it_is_packed_with() -> None:
    alone, packed = rotation_of((20,), RopeKind.dynamic), rotation_of((5, 20, 31), RopeKind.dynamic)
    torch.testing.assert_close(alone.cos, packed.cos[5:25])


def head_and_rows() -> tuple[Head, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = Head(tiny_config().decoder)
    head.weight.data.normal_(generator=generator)
    x_TD = torch.randn(40, 48, generator=generator).requires_grad_()
    targets = torch.randint(0, len(head.weight), (27,), generator=generator)
    targets[22:] = IGNORE
    return head, x_TD, torch.randint(0, 40, (27,), generator=generator), targets


def test_loss_is_cross_entropy_over_dense_logits() -> None:
    head, x_TD, target_index, targets = head_and_rows()
    dense = (x_TD @ head.weight.T)[target_index]
    losses = head(x_TD, target_index, targets)
    assert losses.dtype == torch.float32 and losses.shape == (27,)
    assert (losses[22:] == 0).all()
    expected = dense.double().log_softmax(-1)[range(22), targets[:22]].neg()
    torch.testing.assert_close(losses[:22].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(head(x_TD, target_index), dense)


@pytest.mark.parametrize("chunk_rows", [1, 8, 26])
def test_chunked_loss_equals_the_loss_in_one_piece_with_gradients(chunk_rows: int) -> None:
    head, x_TD, target_index, targets = head_and_rows()
    whole = head(x_TD, target_index, targets)
    grads = torch.autograd.grad(whole.sum(), [x_TD, head.weight])
    head.chunk_rows = chunk_rows
    chunked = head(x_TD, target_index, targets)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    for grad, expected in zip(torch.autograd.grad(chunked.sum(), [x_TD, head.weight]), grads, strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=0)


def test_chunked_loss_keeps_no_logits_for_the_backward_pass() -> None:
    head, x_TD, target_index, targets = head_and_rows()

    def saved_numbers() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            head(x_TD, target_index, targets)
        return sum(size for size in sizes if size != head.weight.numel())

    assert saved_numbers() >= 27 * len(head.weight)
    head.chunk_rows = 4
    assert saved_numbers() < 27 * len(head.weight)
