"""Activation checkpointing changes memory and time, and neither losses nor gradients; compiled blocks compute the same."""

from collections.abc import Callable

import pytest
import torch
from batches import IMAGE_SIZE, batch_of, mixed_segments, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import Checkpointing, Recompute
from train.model import attention
from train.model.recompute import KERNELS
from train.model.xcomposer2 import XComposer2

MODES = {
    "full": Checkpointing(Recompute.full),
    "every": Checkpointing(Recompute.every, 2),
    "ops": Checkpointing(Recompute.ops),
}


def model_of(checkpointing: Checkpointing, dropout: float = 0.5, compiled: bool = False) -> XComposer2:
    config = tiny_config()
    config.decoder.layers, config.plora.dropout = 3, dropout
    model = XComposer2(config, IMAGE_SIZE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("plora_b"):
            parameter.data.normal_(0, 0.2, generator=generator)
    model.apply_cost_settings(checkpointing, compiled)
    return model


def losses_and_gradients(model: XComposer2) -> list[torch.Tensor]:
    torch.manual_seed(5)
    losses = model(batch_of(mixed_segments()))
    losses.loss_sum.backward()
    return [losses.per_target_L, *(p.grad for p in model.parameters() if p.grad is not None)]


def freeze_decoder(model: XComposer2) -> XComposer2:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("plora" in name or name.startswith(("vision", "projector")))
    return model


@pytest.mark.parametrize("prepare", [lambda model: model, freeze_decoder], ids=["sft", "pretrain"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_without_checkpointing(mode: str, prepare: Callable[[XComposer2], XComposer2]) -> None:
    """Bitwise; with dropout: the second forward pass must draw what the first drew."""
    plain = losses_and_gradients(prepare(model_of(Checkpointing())))
    again = losses_and_gradients(prepare(model_of(MODES[mode])))
    assert len(plain) == len(again) > 10
    assert torch.equal(plain[0], again[0])
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def kept_bytes(model: XComposer2) -> int:
    """Bytes of activations that wait for the backward pass. Their storages live; whoever drops a checkpoint's would not see them."""
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model(batch_of(mixed_segments()))
    losses.loss_sum.detach()
    return sum(found.values())


def test_checkpointing_keeps_less_the_more_it_recomputes() -> None:
    kept = {mode: kept_bytes(model_of(c)) for mode, c in {"none": Checkpointing(), **MODES}.items()}
    assert kept["full"] < kept["every"] < kept["none"]


def test_ops_runs_a_fused_attention_kernel_once_and_products_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same losses and gradients, bitwise, whichever of the modes."""
    monkeypatch.setattr(attention, "LONGEST_PLAIN", 0)  # a fused kernel, as on a GPU
    monkeypatch.setattr("train.model.vision.LONGEST_PLAIN", 0)
    runs, found = {}, {}
    for mode, checkpointing in {"none": Checkpointing(), **MODES}.items():
        with Counted() as counted:
            found[mode] = losses_and_gradients(model_of(checkpointing))
        runs[mode] = counted.kernels, counted.products
    kernels, products = runs["none"]
    assert kernels > 3, "blocks of ViT and decoder"
    assert runs["full"][0] == 2 * kernels
    assert runs["ops"][0] == kernels
    assert runs["ops"][1] == runs["full"][1] > products
    assert all(torch.equal(a, b) for mode in MODES for a, b in zip(found["none"], found[mode], strict=True))


class Counted(TorchDispatchMode):
    """Counts the forward runs of fused attention kernels, and products."""

    kernels = products = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        self.kernels += any(kernel in name for kernel in KERNELS) and "backward" not in name
        self.products += ".mm." in name
        return operator(*args, **(kwargs or {}))


def test_names_in_the_state_dict_stay(mode: str = "full") -> None:
    plain, again = model_of(Checkpointing()), model_of(MODES[mode])
    assert list(plain.state_dict()) == list(again.state_dict())


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_compute_the_same(mode: str) -> None:
    checkpointing = {"none": Checkpointing(), **MODES}[mode]
    plain = losses_and_gradients(model_of(Checkpointing(), dropout=0.0))
    for a, b in zip(plain, losses_and_gradients(model_of(checkpointing, dropout=0.0, compiled=True)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
