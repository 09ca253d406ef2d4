"""The model as training gets it: built without memory, rules applied, then each parameter given its first value in its place.

Invariant: nobody holds more than it must. Without ZeRO-3 the host has one foreign tensor at a time; under ZeRO-3 a rank has its part of
the parameters and one module besides, and rank 0 alone reads the files.
"""

from dataclasses import dataclass

import torch

from train import optim
from train.config import Config
from train.device import Device
from train.engine import partition
from train.flops import StepCost
from train.model.attention import choose_backend, spoken
from train.model.xcomposer2 import XComposer2
from train.optim import Group
from train.ranks import Ranks
from train.weights.initial import Initial


@dataclass(frozen=True)
class Built:
    """A model with its first weights, on the device and in its number format."""

    model: XComposer2
    trained: list[Group]
    frozen: list[Group]
    cost: StepCost
    attention: str
    """The backend that runs: flash, torch_varlen or sdpa; and why, where another was to be expected."""


def build_model(config: Config, device: Device, ranks: Ranks | None = None) -> Built:
    """The model with the stage's starting weights; under ZeRO-3 all `ranks` call it.

    Raises:
        UserError: weights that do not fit, rules that leave nothing to train, or an attention backend that is not there.
    """
    attention = choose_backend(device.torch_device, device.dtype, config.train.attention.value)
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    model = model.to(device.dtype)
    trained, frozen = optim.resolve(model, config.train)
    cost = StepCost.of(model, config.train.checkpointing)
    initial = Initial(config, model)
    if config.deepspeed.stage == 3 and ranks is not None:
        partition(config, model, ranks, device, initial.fill)
    else:
        model.to_empty(device=device.torch_device)
        initial.fill(dict(model.named_parameters()))
    model.apply_cost_settings(config.train.checkpointing, config.train.compile, attention)
    return Built(model, trained, frozen, cost, spoken(attention, config.train.attention.value))
