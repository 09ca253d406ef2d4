"""Partial LoRA acts on image tokens and on nothing else."""

import pytest
import torch
import torch.nn.functional as F

from train.model.plora import PLoRALinear

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
