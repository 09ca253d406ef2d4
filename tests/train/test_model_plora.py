"""Partial LoRA acts on image tokens and on nothing else."""

import pytest
import torch
import torch.nn.functional as F
from batches import IMAGE_SIZE, batch_of, mixed_segments, tiny_config

from data_pipeline.errors import UserError
from train.config import Checkpointing, Recompute
from train.model.plora import PLoRALinear
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRank, LowRankMode

T, IN, OUT, RANK = 21, 16, 24, 4
IMAGE_INDEX = torch.tensor([2, 3, 4, 9, 10])
TEXT_INDEX = torch.tensor([row for row in range(T) if row not in IMAGE_INDEX.tolist()])


def layer(dropout: float = 0.0) -> PLoRALinear:
    generator = torch.Generator().manual_seed(0)
    linear = PLoRALinear(IN, OUT, RANK, alpha=8.0, dropout=dropout)
    for parameter in linear.parameters():
        parameter.data.normal_(generator=generator)
    return linear


def rows() -> torch.Tensor:
    return torch.randn(T, IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_positions_get_the_base_layer_bitwise(dtype: torch.dtype) -> None:
    linear, x = layer(dropout=0.5).to(dtype), rows().to(dtype)
    out, base = linear(x, IMAGE_INDEX), F.linear(x, linear.weight)
    assert torch.equal(out[TEXT_INDEX], base[TEXT_INDEX])
    assert not torch.equal(out[IMAGE_INDEX], base[IMAGE_INDEX])


def test_image_positions_get_the_scaled_low_rank_product() -> None:
    linear, x = layer(), rows()
    expected = F.linear(x, linear.weight + 8.0 / RANK * linear.plora_b @ linear.plora_a)
    torch.testing.assert_close(linear(x, IMAGE_INDEX)[IMAGE_INDEX], expected[IMAGE_INDEX], atol=2e-5, rtol=0)


def test_of_the_low_rank_product_itself_nothing_waits_for_the_backward_pass() -> None:
    """At the 7B these are 10 GiB, and no gradient needs them."""
    linear, x = layer(), rows().requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(tuple(saved.shape)) or saved, lambda saved: saved):
        linear(x, IMAGE_INDEX)
    assert (len(IMAGE_INDEX), IN) in kept  # the gathered rows, which A's gradient needs
    assert (len(IMAGE_INDEX), OUT) not in kept


def test_gradients_are_those_of_a_dense_mask() -> None:
    linear = layer()
    x = rows().requires_grad_()
    mask = torch.zeros(T, 1).index_fill_(0, IMAGE_INDEX, 1.0)
    dense = F.linear(x, linear.weight) + 8.0 / RANK * mask * F.linear(F.linear(x, linear.plora_a), linear.plora_b)
    wanted = [x, *linear.parameters()]
    grads = torch.autograd.grad(linear(x, IMAGE_INDEX).square().sum(), wanted)
    for grad, expected in zip(grads, torch.autograd.grad(dense.square().sum(), wanted), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-2, rtol=1e-5)


def test_shared_image_rows_change_nothing() -> None:
    linear, x = layer(), rows()
    assert torch.equal(linear(x, IMAGE_INDEX, x[IMAGE_INDEX]), linear(x, IMAGE_INDEX))


def test_dropout_acts_in_training_only_and_on_the_low_rank_input() -> None:
    linear, x = layer(dropout=0.5), rows()
    assert not torch.equal(linear(x, IMAGE_INDEX), linear(x, IMAGE_INDEX))
    linear.eval()
    assert torch.equal(linear(x, IMAGE_INDEX), layer()(x, IMAGE_INDEX))


def test_forgotten_initialisation_is_loud() -> None:
    assert PLoRALinear(IN, OUT, RANK, 8.0, 0.0)(rows(), IMAGE_INDEX).isnan().all()


@pytest.mark.parametrize(
    "index", [[], [0], [T - 1], [0, 1, 2, 3], [T - 4, T - 3, T - 2, T - 1], [0, 1, 8, 9, 10, T - 1], list(range(T))],
    ids=["no image", "first", "last", "first image", "last image", "many", "nothing else"],
)  # fmt: skip
def test_by_index_equals_by_boolean_mask(index: list[int]) -> None:
    """The official code's way, forward and gradients."""
    linear, x = layer(), rows().requires_grad_()
    mask = torch.zeros(T, dtype=torch.bool)
    mask[index] = True
    base = F.linear(x, linear.weight)
    delta = 8.0 / RANK * F.linear(F.linear(x[mask], linear.plora_a), linear.plora_b)
    expected = base.masked_scatter(mask[:, None].expand_as(base), base[mask] + delta)
    wanted = [x, *linear.parameters()]
    out = linear(x, torch.tensor(index, dtype=torch.int64))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), wanted)
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        torch.testing.assert_close(grad, other, atol=1e-3, rtol=1e-4)


def test_lora_acts_on_all_tokens_and_none_has_no_weights() -> None:
    lora, x = layer(), rows()
    lora.mode = LowRankMode.lora
    torch.testing.assert_close(lora(x, IMAGE_INDEX), layer()(x, torch.arange(T)), atol=1e-5, rtol=1e-5)
    none = PLoRALinear(IN, OUT, RANK, 8.0, 0.0, LowRankMode.none)
    assert [name for name, _ in none.named_parameters()] == ["weight"]
    none.weight.data = lora.weight.data
    assert torch.equal(none(x, IMAGE_INDEX), F.linear(x, lora.weight))


@pytest.mark.parametrize("mode", LowRankMode)
def test_the_whole_model_trains_in_every_mode(mode: LowRankMode) -> None:
    config = tiny_config()
    config.plora.mode = mode
    model = XComposer2(config, IMAGE_SIZE)
    model.init_weights(0)
    model.apply_cost_settings(Checkpointing(Recompute.full))
    model(batch_of(mixed_segments())).loss_sum.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert any("plora" in name for name, _ in model.named_parameters()) == (mode is not LowRankMode.none)


def test_rank_and_scale_may_differ_by_linear_and_an_unknown_linear_is_refused() -> None:
    config = tiny_config()
    config.plora.linears = {"wqkv": LowRank(rank=2, alpha=6.0)}
    first = XComposer2(config, IMAGE_SIZE).decoder.layers[0]
    assert (first.attention.wqkv.plora_a.shape[0], first.attention.wqkv.scale) == (2, 3.0)
    assert (first.attention.wo.plora_a.shape[0], first.attention.wo.scale) == (4, 2.0)
    config.plora.linears = {"w4": LowRank(rank=2, alpha=6.0)}
    with pytest.raises(UserError, match=r"model.plora.linears: w4.*wqkv"):
        XComposer2(config, IMAGE_SIZE)
